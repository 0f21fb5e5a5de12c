"""Shows a run as one HTML page. It reads a run's folder, and needs neither Ray nor the program that made the run."""
