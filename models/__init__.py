"""The one place that loads a language model or a scalar head and runs its forward pass, for training and for serving."""
