"""Ray actors around vLLM: engine, episode loop, rollout."""
