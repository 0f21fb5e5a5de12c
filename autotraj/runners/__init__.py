"""The rollout and repair actors as the controller sees them."""
