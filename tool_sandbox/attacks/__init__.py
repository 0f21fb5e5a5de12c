"""Attacks of hostile code and hostile clients, as data, and how they are run and judged."""
