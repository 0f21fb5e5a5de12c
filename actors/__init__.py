"""Ray actors with vLLM: the engine, the episode loop, rollouts, repair and the reward model."""
