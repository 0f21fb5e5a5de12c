"""Checks and estimates before anything is started."""
