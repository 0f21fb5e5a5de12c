"""Settings of a run, of its stages and of benchmarks."""
