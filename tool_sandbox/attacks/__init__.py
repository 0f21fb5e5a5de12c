"""What hostile code and hostile clients try, as data, and how it is run and judged."""
