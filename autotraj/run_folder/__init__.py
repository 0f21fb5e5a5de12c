"""A run's folder, local or at a URI."""
