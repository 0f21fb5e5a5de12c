"""A seccomp filter for the processes of a call. Docker's own filter, which depends on the engine's version, stays, too.

It forbids system calls that no call needs and that could avoid its limits, leave its slot or reach the newest code of the
kernel: memory files (they count for the container and for no process), io_uring, tracing, namespaces, mounts, keys. It also
forbids priorities and affinities: a call could change those of the process that cleans its slot and has its uid meanwhile.

It forbids what the whole machine shares without a limit for each container: contexts for asynchronous I/O
(`fs.aio-max-nr`), reserved huge pages, the memory for compiled BPF programs (filters of sockets and of system calls: when
it is used up, Docker starts no container), the crash handler that `kernel.core_pattern` names, and `sync` of all disks.

Only sockets of AF_UNIX are allowed, which Python itself needs; `socketpair` would create those of any family.
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
    "io_setup": (206, 0),
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
    "seccomp": (317, 277),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
IGNORED = {"sync": (162, 81), "syncfs": (306, 267)}
"""These return success without doing anything: nothing that a call writes is on a disk."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and AUDIT_ARCH of linux/audit.h
CLONE, MMAP, PRCTL, SETSOCKOPT = (56, 220), (9, 222), (157, 167), (54, 208)
SOCKET, SOCKETPAIR = (41, 198), (53, 199)
PRLIMIT, SETRLIMIT = (302, 261), (160, 164)
CLONE_NEW = 0x7E020000  # all CLONE_NEW… flags that clone takes
MAP_HUGETLB = 0x40000
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
SOL_SOCKET = 1
ATTACHES = (26, 50, 51, 52)  # SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF and …_EBPF
RLIMIT_CORE = 4
X32_BIT = 0x40000000  # x86_64's other numbering; no system call of aarch64 has a number so high

# Fields of struct seccomp_data, and the instructions of linux/bpf_common.h that are used here.
NUMBER, ARCH, FIRST_ARGUMENT, ARGUMENT_BYTES = 0, 4, 16, 8
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ANY = 0xFFFFFFFF


class FilterProgram(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """An instruction of BPF, 8 bytes. The jumps count instructions."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def fail(number: int) -> list[bytes]:
    return [instruction(RETURN, FAIL_WITH | number)]


def argument(index: int, *, high: bool = False) -> bytes:
    """Load the low, or the high, 32 bits of a system call's argument."""
    return instruction(LOAD, FIRST_ARGUMENT + ARGUMENT_BYTES * index + (4 if high else 0))


def when(test: int, value: int, then: list[bytes]) -> list[bytes]:
    """Run `then`, which must return, if the loaded value passes the test."""
    return [instruction(test, value, if_false=len(then)), *then]


def assemble(machine: str) -> bytes:
    """The filter for `machine`, as `os.uname` names it."""
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no system call table for {machine}; there is one for {' and '.join(MACHINES)}")
    column, arch = MACHINES[machine]
    allow = [instruction(RETURN, ALLOW)]
    # For the network: the error of a missing route, which code can report.
    only_unix = [
        argument(0),
        *when(JUMP_EQUAL, AF_UNIX, allow),
        *when(JUMP_EQUAL, AF_INET, fail(errno.ENETUNREACH)),
        *when(JUMP_EQUAL, AF_INET6, fail(errno.ENETUNREACH)),
        *fail(errno.EACCES),
    ]
    attaches = [part for option in ATTACHES for part in when(JUMP_EQUAL, option, fail(errno.EPERM))]
    # A crash handler is started for a limit of 0, too (core(5)); for the limit of 1 that a call has, it isn't.
    sets_limit = [
        *(argument(2), *when(JUMP_ANY_BIT, ANY, fail(errno.EPERM))),
        *(argument(2, high=True), *when(JUMP_ANY_BIT, ANY, fail(errno.EPERM))),
    ]
    rules: list[tuple[tuple[int, int], list[bytes]]] = [
        *((numbers, fail(errno.ENOSYS)) for numbers in DENIED.values()),
        *((numbers, fail(0)) for numbers in IGNORED.values()),
        (CLONE, [argument(0), *when(JUMP_ANY_BIT, CLONE_NEW, fail(errno.EPERM)), *allow]),
        (MMAP, [argument(3), *when(JUMP_ANY_BIT, MAP_HUGETLB, fail(errno.ENOMEM)), *allow]),
        (PRCTL, [argument(0), *when(JUMP_EQUAL, PR_SET_SECCOMP, fail(errno.EPERM)), *allow]),
        (SETSOCKOPT, [argument(1), *when(JUMP_EQUAL, SOL_SOCKET, [argument(2), *attaches, *allow]), *allow]),
        (SETRLIMIT, [argument(0), *when(JUMP_EQUAL, RLIMIT_CORE, fail(errno.EPERM)), *allow]),
        (PRLIMIT, [argument(1), *when(JUMP_EQUAL, RLIMIT_CORE, [*sets_limit, *allow]), *allow]),
        (SOCKET, only_unix),
        (SOCKETPAIR, only_unix),
    ]
    program = [
        instruction(LOAD, ARCH),
        instruction(JUMP_EQUAL, arch, if_true=1),
        *fail(errno.ENOSYS),
        instruction(LOAD, NUMBER),
        *when(JUMP_GREATER_EQUAL, X32_BIT, fail(errno.ENOSYS)),
    ]
    for numbers, then in rules:
        program += when(JUMP_EQUAL, numbers[column], then)
    return b"".join([*program, *allow])


@cache
def _program() -> tuple[ctypes.CDLL, FilterProgram, bytes]:
    instructions = assemble(os.uname().machine)
    return ctypes.CDLL(None, use_errno=True), FilterProgram(len(instructions) // 8, instructions), instructions


def prepare() -> None:
    """Build the filter, once, in the process that forks. Raises OSError on a machine without a table."""
    _program()


def restrict() -> None:
    """Apply the filter to this process and to all that it will start. This can't be undone."""
    libc, program, _ = _program()
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the system call filter can't be set")
