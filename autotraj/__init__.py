"""The roof: command line, configuration, one file a stage."""
