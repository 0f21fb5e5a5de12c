"""Losses, batching and the DeepSpeed learner group."""
