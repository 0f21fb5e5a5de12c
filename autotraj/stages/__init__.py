"""The stages of the method, and the pipeline that runs them in order."""
