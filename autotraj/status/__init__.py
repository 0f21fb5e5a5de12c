"""What a live run shows of itself."""
