"""The command that starts a container, with everything switched off that a call doesn't need."""

from __future__ import annotations

import itertools
import json
import os
import random

from tool_sandbox import build, left_behind
from tool_sandbox.config import SandboxConfig

MIB = 1 << 20
SPARE_PROCESSES = 16  # supervisor, zygotes and cleaners, in addition to the calls' own
BASELINE_MIB = 256  # supervisor and zygotes
# RLIMIT_NPROC counts a user id's processes over all containers of the kernel, so every container has its own ids: one for
# each slot's calls and one for its guard (image/cleaning.py).
UID_STRIDE = 32
_uid_blocks = itertools.count(random.randrange(1 << 20))


def docker_command(name: str, config: SandboxConfig, user_ids: range) -> list[str]:
    """`docker run …` for a container of that name, with a label of this process and ids from `user_ids`."""
    uid_base = user_ids[next(_uid_blocks) % (len(user_ids) // UID_STRIDE) * UID_STRIDE]
    memory_mib = BASELINE_MIB + config.slots_per_container * (config.memory_mib + config.scratch_mib)
    cpus = min(config.cpus, os.cpu_count() or 1)  # Docker refuses more cores than the machine has
    limits = {
        "num_slots": config.slots_per_container,
        "uid_base": uid_base,
        "memory_bytes": config.memory_mib * MIB,
        "scratch_bytes": config.scratch_mib * MIB,
        "max_processes": config.max_processes,
        "max_output_bytes": config.max_output_bytes,
        "container_bytes": memory_mib * MIB,
        "cpus": max(1, int(cpus)),
    }
    # It belongs to root, so a call that may write there can't give its neighbours access.
    owned = "uid=0,gid={0},mode=0770,nosuid,nodev"
    tmpfs = [
        f"/w/{slot}:size={config.scratch_mib}m,nr_inodes=4096,{owned.format(uid_base + slot)}"
        for slot in range(config.slots_per_container)
    ]
    command = ["docker", "run", "--rm", "--interactive", "--init", "--name", name, "--label", left_behind.own_label()]
    if config.runtime:
        command += ["--runtime", config.runtime]
    command += ["--network", "none", "--ipc", "private", "--read-only", "--log-driver", "none"]
    # Docker's own /dev/shm limits bytes but not inodes. A million empty files would use kernel memory and be slow to remove.
    shared = "size=16m,nr_inodes=4096,mode=1777,nosuid,nodev"
    for mount in (f"/tmp:{shared}", f"/dev/shm:{shared}", *tmpfs):
        command += ["--tmpfs", mount]
    command += ["--cap-drop", "ALL", "--cap-add", "SETUID", "--cap-add", "SETGID"]
    command += ["--security-opt", "no-new-privileges"]
    command += ["--pids-limit", str(config.slots_per_container * config.max_processes + SPARE_PROCESSES)]
    command += ["--memory", f"{memory_mib}m", "--memory-swap", f"{memory_mib}m", "--cpus", str(cpus)]
    command += [
        "--ulimit",
        "nofile=4096",
        "--ulimit",
        "core=1",
    ]  # a core size of 0 would still start a crash handler: image/syscalls.py
    # No System V objects and no message queues, as they would outlive the call that made them.
    for setting in ("kernel.shmmni=0", "kernel.msgmni=0", "kernel.sem=0 0 0 0", "fs.mqueue.queues_max=0"):
        command += ["--sysctl", setting]
    return [*command, build.resolve_image(config), json.dumps(limits)]
