"""The sandbox gateways of a run."""
