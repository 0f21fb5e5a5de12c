"""What all training stages share: the supervised loop, replaced learners, skipped steps."""
