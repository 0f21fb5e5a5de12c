"""The status, progress and metrics of a live run."""
