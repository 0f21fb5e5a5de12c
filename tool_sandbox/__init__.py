"""Hardened containers that run what a model writes. No Ray, no torch."""
