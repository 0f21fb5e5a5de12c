"""Errors of a group of learners.

    LearnerError
    ├── LearnerDied             a rank's process is gone
    │   └── LearnerOutOfMemory  Ray's memory monitor ended the process
    ├── LearnerFailed           a rank raised an exception
    │   └── AllocationFailed    there was no memory for what it wanted to allocate
    └── LearnerTimeout          ranks did not answer within their deadline

After each of them all ranks of the group have been stopped, since the others would wait in a collective.
`LearnerGroup.recreate` starts new ones.
"""

MEMORY_WORDS = ("OutOfMemoryError", "out of memory", "MemoryError", "can't allocate memory")
"""What PyTorch and Python say when an allocation fails."""


class LearnerError(RuntimeError):
    """Base class of the errors that `LearnerGroup` raises."""


class LearnerDied(LearnerError):
    """A rank's process is gone: killed, out of memory, or its node was lost."""


class LearnerOutOfMemory(LearnerDied):
    """Ray's memory monitor ended a rank, because its node's memory was nearly full."""


class LearnerFailed(LearnerError):
    """A rank raised an exception, which is this error's cause."""


class AllocationFailed(LearnerFailed):
    """A rank raised an exception because an allocation failed, on the GPU or on the CPU."""


def failed(what: str, rank: int, cause: BaseException) -> LearnerFailed:
    """The error for `cause`, which `rank` raised during `what`."""
    message = f"{type(cause).__name__}: {cause}"
    # PyTorch raises plain RuntimeErrors too, and a cause that can't be unpickled here arrives as Ray's text of it.
    kind = AllocationFailed if any(words in message for words in MEMORY_WORDS) else LearnerFailed
    return kind(f"{what}: rank {rank} raised {message}")


class LearnerTimeout(LearnerError):
    """Ranks did not answer within their deadline. The message names them."""
