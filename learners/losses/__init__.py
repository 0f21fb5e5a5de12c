"""Losses: functions from tensors to a scalar and its metrics. No processes, no model, no global state."""
