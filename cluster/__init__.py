"""Placement and cluster files."""
