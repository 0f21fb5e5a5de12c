"""From scored trajectories to repair requests and preference pairs."""
