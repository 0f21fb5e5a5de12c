"""The application: command line, configuration, and the stages of the method."""
