"""The reward model as it is served: its forward pass, and the actor around it."""
