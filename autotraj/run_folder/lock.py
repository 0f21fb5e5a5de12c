"""One command at a time works on a run's folder.

The lock is the kernel's (`flock` on `.run.lock`), so it ends with the process that holds it, however that ends; nobody has
to tell a dead holder's lock from a living one's. The file's text is only for the message. For a run at a URI the folder is
the working folder on the driver's machine; `run_claim` keeps other machines out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autotraj.errors import UserError

OWN = ".run."
"""How the files begin that are the working folder's own, and stay when it is emptied."""
LOCK_FILE = f"{OWN}lock"


@contextmanager
def locked(folder: Path, *, called: str = "run_dir") -> Iterator[None]:
    """Within it this process alone works on `folder`, which is made if it isn't there. `called`: the
    setting or option that names it.

    Raises UserError at once if another process, or another such block of this one, does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{called}: {folder} can't be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{called}: {folder} is in use by {_holder(folder / LOCK_FILE)}; wait until it ends, stop it, or choose "
                f"another {called}"
            ) from None
        file.truncate(0)
        file.write(
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": sys.argv})
        )
        file.flush()
        yield


def clear(folder: Path) -> None:
    """Empties a run's folder, if it is there. The lock's file stays, or another process could lock a new one beside it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.startswith(OWN):
            path.unlink()


def _holder(path: Path) -> str:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        minutes = (time.time() - float(said["since"])) / 60
        command = " ".join(["autotraj", *map(str, said["command"][1:])])
        return f"process {int(said['pid'])} on {said['host']} (`{command}`, started {minutes:.0f} minutes ago)"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has just begun
