"""Inference engines: the protocol that actors use, and vLLM behind it."""
