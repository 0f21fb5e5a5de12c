"""Groups of trajectories from tasks: leased, sampled, scored, or handed back with a reason."""
