"""A Ray cluster on this machine, with Ray's real autoscaler and nodes that are processes, to try things out."""
