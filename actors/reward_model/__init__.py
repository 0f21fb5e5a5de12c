"""Serving of the reward model: its forward pass, and the actor around it."""
