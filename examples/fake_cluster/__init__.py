"""A Ray cluster on this machine for trials and tests. The autoscaler is Ray's own, and the nodes are processes."""
