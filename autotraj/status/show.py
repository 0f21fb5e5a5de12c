"""`python -m autotraj status`: shows the status of a live run, or of the last one. It imports Ray only to ask a cluster."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import psutil

from autotraj.errors import UserError
from autotraj.status.rows import ENDED, STATUS_FILE, render_status
from storage.locations import local_path


def show(run_dir: str | None) -> str:
    """The status of the run in `run_dir`, or of all runs of the Ray cluster. Raises UserError."""
    if run_dir is not None:
        return _of_folder(local_path(run_dir))
    from autotraj.status.board import of_cluster

    return "\n\n".join(render_status(status, gone=_is_gone(status)) for status in of_cluster())


def _of_folder(folder: Path) -> str:
    """The newest status in a run's folder or in those of its stages."""
    paths = [*folder.glob(STATUS_FILE), *folder.glob(f"*/{STATUS_FILE}")]
    if not paths:
        raise UserError(f"{folder}: no {STATUS_FILE} there; is it the run_dir of a run that was started here?")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    try:
        status = json.loads(newest.read_bytes())
        return render_status(status, gone=_is_gone(status))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{newest} can't be read as the status of a run ({type(error).__name__}: {error}); a live run writes it again "
            "within seconds, so ask again, or remove the file"
        ) from error


def _is_gone(status: dict[str, Any]) -> bool:
    """Whether the controller was on this machine and has ended. Of one on another machine nothing is known here: False."""
    return status["host"] == socket.gethostname() and status["doing"] != ENDED and not psutil.pid_exists(status["pid"])
