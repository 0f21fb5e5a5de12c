"""The GRPO loop with online repair, as an RLlib algorithm."""
