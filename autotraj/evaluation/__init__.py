"""Measures a policy, with confidence intervals."""
