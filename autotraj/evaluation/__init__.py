"""Measuring a policy, and how sure the figures are."""
