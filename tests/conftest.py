"""Settings of all tests."""

from hypothesis import settings

# A test asserts no time: on a busy machine one example may take long.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
