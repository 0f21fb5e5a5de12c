"""One command at a time works on a run's folder.

The lock is the kernel's (`flock` on `.run.lock`), so it ends with the process that holds it, however that process ends. The
file's text is only for the message. For a run at a URI the folder is the working folder on the driver's machine; `claim`
keeps other machines out.
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
"""The working folder's own files begin with this. They stay when it is emptied."""
LOCK_FILE = f"{OWN}lock"


@contextmanager
def locked(folder: Path, *, called: str = "run_dir") -> Iterator[None]:
    """Within the block only this process works on `folder`, which is made if it isn't there. `called` is the setting or
    option that names the folder.

    Raises UserError at once if another process, or another such block of this process, works on it."""
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
    """Empties a run's folder, if it exists. The lock's file stays: otherwise another process could lock a new one."""
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
