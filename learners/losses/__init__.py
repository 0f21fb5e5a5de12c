"""Losses: tensors in, a scalar and its metrics out. No processes, no model, no global state."""
