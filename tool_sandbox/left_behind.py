"""Finds containers whose gateway was killed, by their label, and removes them.

Such containers normally end by themselves, as their input ends with the gateway. This is for those that did not.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

logger = logging.getLogger(__name__)

LABEL = "autotraj.gateways.session"
DOCKER_TIMEOUT_S = 30.0


def own_label() -> str:
    """The label `autotraj.gateways.session=OWNER` of this process."""
    return f"{LABEL}={_owner(os.getpid())}"


def _owner(pid: int) -> str:
    """`NAMESPACE-PID-STARTTIME`, which is unique to this process; empty if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The command name in parentheses may hold spaces; field 22 is the start time.
    return f"{_namespace()}-{pid}-{stat.rpartition(')')[2].split()[19]}"


def _namespace() -> int:
    """The namespace of process ids. A gateway in a container can't see whether processes of other containers live."""
    return os.stat("/proc/self/ns/pid").st_ino


def remove_left_behind() -> list[str]:
    """Remove the containers of dead gateways and return their names. A failure is only logged: they disturb nothing."""
    template = f'{{{{.Names}}}} {{{{.Label "{LABEL}"}}}}'
    try:
        listed = _docker("ps", "--all", "--filter", f"label={LABEL}", "--format", template)
        dead = [name for name, _, owner in (line.partition(" ") for line in listed.splitlines()) if not _lives(owner)]
        if dead:
            _docker("rm", "--force", *dead)
            logger.warning("removed containers that a killed gateway left behind: %s", ", ".join(dead))
        return dead
    except (subprocess.SubprocessError, ValueError) as error:
        logger.warning("containers that a killed gateway left behind can't be removed: %s", error)
        return []


def _lives(owner: str) -> bool:
    namespace, _, rest = owner.partition("-")
    # Containers of another namespace, or with a label that isn't ours, are left alone: their owner may live.
    return namespace != str(_namespace()) or _owner(int(rest.partition("-")[0])) == owner


def _docker(*arguments: str) -> str:
    command = ["docker", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DOCKER_TIMEOUT_S, check=True).stdout
