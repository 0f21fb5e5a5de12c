"""Errors of a group of learners.

    LearnerError
    ├── LearnerDied             a rank's process is gone
    │   └── LearnerOutOfMemory  Ray's memory monitor ended the process
    ├── LearnerFailed           a rank raised an exception
    └── LearnerTimeout          ranks did not answer within their deadline

After each of them all ranks of the group have been stopped, since the others would wait in a collective.
`LearnerGroup.recreate` starts new ones.
"""


class LearnerError(RuntimeError):
    """Base class of the errors that `LearnerGroup` raises."""


class LearnerDied(LearnerError):
    """A rank's process is gone: killed, out of memory, or its node was lost."""


class LearnerOutOfMemory(LearnerDied):
    """Ray's memory monitor ended a rank, because its node's memory was nearly full."""


class LearnerFailed(LearnerError):
    """A rank raised an exception, which is this error's cause."""


class LearnerTimeout(LearnerError):
    """Ranks did not answer within their deadline. The message names them."""
