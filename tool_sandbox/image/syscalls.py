"""A seccomp filter for the processes of a call, on top of Docker's own, which goes with the engine's age.

It takes away what a call never needs and what would let it out of its accounts, out of its slot or near the kernel's newest
code: memory files (charged to the container, to no process), io_uring, tracing, namespaces, mounts, keys; priorities and
affinities, as the process that cleans a slot has the slot's uid for a moment, and would keep what a call made of it; and
every kind of socket, as the slots of a container share one network namespace, and AF_VSOCK has none. `socketpair` works, so
asyncio does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from functools import cache

# Name → number on x86_64 and on aarch64 (asm/unistd_64.h, asm-generic/unistd.h).
DENIED = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "clone3": (435, 435),  # its flags are behind a pointer; C libraries fall back to clone
    "fanotify_init": (300, 262),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and AUDIT_ARCH of linux/audit.h
CLONE, SOCKET = (56, 220), (41, 198)
CLONE_NEW = 0x7E020000  # all CLONE_NEW… flags that clone takes
AF_INET, AF_INET6 = 2, 10
X32_BIT = 0x40000000  # x86_64's other numbering; no system call of aarch64 has a number so high

# Fields of struct seccomp_data, and the instructions of linux/bpf_common.h that are used here.
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


class Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def assemble(machine: str) -> bytes:
    """The filter for `machine`, as `os.uname` names it."""
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no system call table for {machine}; there is one for {' and '.join(MACHINES)}")
    column, arch = MACHINES[machine]

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def fail(number: int) -> bytes:
        return instruction(RETURN, FAIL_WITH | number)

    program = [
        instruction(LOAD, ARCH),
        instruction(JUMP_EQUAL, arch, if_true=1),
        fail(errno.ENOSYS),
        instruction(LOAD, NUMBER),
        instruction(JUMP_GREATER_EQUAL, X32_BIT, if_false=1),
        fail(errno.ENOSYS),
    ]
    for numbers in DENIED.values():
        program += [instruction(JUMP_EQUAL, numbers[column], if_false=1), fail(errno.ENOSYS)]
    program += [
        instruction(JUMP_EQUAL, CLONE[column], if_false=4),
        instruction(LOAD, FIRST_ARGUMENT),
        instruction(JUMP_ANY_BIT, CLONE_NEW, if_false=1),
        fail(errno.EPERM),
        instruction(RETURN, ALLOW),
        # As without a route, which is what code that asks for the network knows how to report.
        instruction(JUMP_EQUAL, SOCKET[column], if_false=5),
        instruction(LOAD, FIRST_ARGUMENT),
        instruction(JUMP_EQUAL, AF_INET, if_true=1),
        instruction(JUMP_EQUAL, AF_INET6, if_false=1),
        fail(errno.ENETUNREACH),
        fail(errno.EACCES),
        instruction(RETURN, ALLOW),
    ]
    return b"".join(program)


@cache
def _program() -> tuple[ctypes.CDLL, Program, bytes]:
    instructions = assemble(os.uname().machine)
    return ctypes.CDLL(None, use_errno=True), Program(len(instructions) // 8, instructions), instructions


def prepare() -> None:
    """Build the filter, once, in the process that forks. Raises OSError on a machine without a table."""
    _program()


def restrict() -> None:
    """Put this process, and all that it will start, under the filter. There is no way back."""
    libc, program, _ = _program()
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the system call filter can't be set")
