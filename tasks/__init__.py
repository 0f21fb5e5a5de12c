"""Questions with gold answers: read from files and data sets, or generated."""
