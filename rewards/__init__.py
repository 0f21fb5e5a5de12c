"""Pure reward functions: format, outcome, quality, and their combination. No Ray and no torch."""
