"""The rights that the gateway gives up for good before it has any client.

After that it can't run a program or open a Unix socket, which is how container engines are reached. If it belonged to root,
it now belongs to `nobody`, without groups and capabilities.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from tool_sandbox.image import syscalls

NOBODY = 65534
AF_UNIX = 1
# Name → number on x86_64 and on aarch64, as in image/syscalls.py, whose filter is for code that models write.
DENIED = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "io_uring_setup": syscalls.DENIED["io_uring_setup"],  # it could open sockets that this filter doesn't see
    "process_vm_writev": syscalls.DENIED["process_vm_writev"],
    "ptrace": syscalls.DENIED["ptrace"],
}
SECCOMP = (317, 277)
PR_SET_NO_NEW_PRIVS = 38
SET_MODE_FILTER, SYNCHRONISE_THREADS = 1, 1


def drop() -> bool:
    """Give up the rights. False if this process doesn't belong to root: it then keeps its user and groups. Raises OSError.

    This holds also for threads that already run."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(
            NOBODY, NOBODY, NOBODY
        )  # this also drops the capabilities, and other processes of nobody can't trace this one
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs can't be set")
    machine = os.uname().machine
    instructions = assemble(machine)
    program = syscalls.FilterProgram(len(instructions) // 8, instructions)
    number = SECCOMP[syscalls.MACHINES[machine][0]]
    if libc.syscall(number, SET_MODE_FILTER, SYNCHRONISE_THREADS, ctypes.byref(program)) != 0:
        raise OSError(ctypes.get_errno(), "the gateway's system call filter can't be set")
    return os.getuid() == NOBODY


def assemble(machine: str) -> bytes:
    """The program of the filter, as bytes."""
    if machine not in syscalls.MACHINES:
        known = " and ".join(syscalls.MACHINES)
        raise OSError(errno.ENOSYS, f"no system call table for {machine}; there is one for {known}")
    column, arch = syscalls.MACHINES[machine]

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    deny = instruction(syscalls.RETURN, syscalls.FAIL_WITH | errno.EACCES)
    program = [
        instruction(syscalls.LOAD, syscalls.ARCH),
        instruction(syscalls.JUMP_EQUAL, arch, if_true=1),
        deny,
        instruction(syscalls.LOAD, syscalls.NUMBER),
        instruction(syscalls.JUMP_GREATER_EQUAL, syscalls.X32_BIT, if_false=1),
        deny,
    ]
    for numbers in DENIED.values():
        program += [instruction(syscalls.JUMP_EQUAL, numbers[column], if_false=1), deny]
    program += [
        instruction(syscalls.JUMP_EQUAL, syscalls.SOCKET[column], if_false=3),
        instruction(syscalls.LOAD, syscalls.FIRST_ARGUMENT),
        instruction(syscalls.JUMP_EQUAL, AF_UNIX, if_false=1),
        deny,
        instruction(syscalls.RETURN, syscalls.ALLOW),
    ]
    return b"".join(program)
