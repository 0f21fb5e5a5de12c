"""Repair of bad trajectories: the prompt, the attempts, and the actor that makes them."""
