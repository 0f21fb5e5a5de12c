"""Pure reward functions: format, outcome, quality, their combination. No Ray, no torch."""
