"""Inference engines: the protocol that actors use, and vLLM as its implementation."""
