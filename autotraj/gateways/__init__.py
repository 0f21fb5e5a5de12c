"""Sandbox gateways for the length of a run."""
