"""What can go wrong with a gang of learners.

    LearnerError
    ├── LearnerDied             a rank's process is gone
    │   └── LearnerOutOfMemory  Ray's memory monitor ended it
    ├── LearnerFailed           a rank raised an exception
    └── LearnerTimeout          ranks did not answer within their deadline

After any of them the gang has been taken down (its other ranks would wait in a collective); `LearnerGroup.recreate`
brings up a new one.
"""


class LearnerError(RuntimeError):
    """Base of the errors that `LearnerGroup` raises."""


class LearnerDied(LearnerError):
    """A rank's process is gone: killed, out of memory, or its node was lost."""


class LearnerOutOfMemory(LearnerDied):
    """Ray's memory monitor ended a rank, as its node's memory was nearly full."""


class LearnerFailed(LearnerError):
    """A rank raised; its exception is the cause."""


class LearnerTimeout(LearnerError):
    """Ranks did not answer within their deadline; the message names them."""
