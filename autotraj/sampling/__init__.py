"""Samples groups of trajectories for tasks and scores them; hands failed ones back with a reason."""
