"""Runs a call in a forked child: takes the slot's uid and limits, then runs the code as `python` would."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import inspect
import io
import linecache
import multiprocessing.context
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import traceback
import types

from tool_sandbox.image import source, syscalls
from tool_sandbox.image.advice import NO_NETWORK, advice
from tool_sandbox.image.cleaning import SCRIPT, become, close_all_but, home_of
from tool_sandbox.image.shares import NICENESS

EXIT_MEMORY = 77
"""The exit code, and a cell's reply, of code that ended with MemoryError. Code can fake it, which only harms itself."""

MAX_FRAMES = 8
MAX_LINE_CHARS = 120
OWN_CODE = re.compile(r"main\.py|cell_\d+\.py")
"""The names under which a caller's code is compiled."""

PARSES = ("compile(", "eval(", "exec(", "parse(")
"""If a line that raised MemoryError calls one of these, the reason is Python's parser and not the memory limit."""

RESERVE = [bytearray(4 << 20)]
"""Address space that is given back when a call has used up its own, so that the error can be reported."""


class DeadlineInterrupt(KeyboardInterrupt):
    """The call's deadline is near. Code may catch it like Ctrl-C, and print its partial results. SIGKILL follows."""


def run(slot: int, session: bool, fds: list[int], limits: dict[str, int]) -> int:
    os.setsid()
    code_fd, output_fd = fds[0], fds[1]
    null_fd = os.open("/dev/null", os.O_RDWR)
    os.dup2(null_fd, 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    control = socket.socket(fileno=fds[2]) if session else None
    close_all_but({0, 1, 2, code_fd, *fds[2:]})
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # before the supervisor, always
    os.nice(NICENESS)
    limit(limits)
    become(limits["uid_base"] + slot)
    home = home_of(slot)
    os.umask(0o077)
    os.chdir(home)
    os.environ.update(HOME=home, TMPDIR=home, PWD=home, USER="sandbox", LOGNAME="sandbox")
    reseed()
    sys.argv = [SCRIPT]
    sys.path[0] = home  # as for a user's script; it was this file's directory
    # Line-buffered, so that printed lines aren't lost when the call is killed at its deadline.
    # Opened again, as the zygote's streams were made for a file.
    open_stdin()
    sys.stdout = sys.__stdout__ = stream(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = stream(2)  # type: ignore[misc]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.displayhook = display
    builtins.display = display_all  # type: ignore[attr-defined]
    # A new interpreter would run the file again without the definitions of earlier cells, and a pool of those would wait
    # forever.
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["forkserver"] = contexts["fork"]
    signal.signal(signal.SIGINT, on_interrupt)
    syscalls.restrict()
    if control is None:
        return leave(execute(take(code_fd), os.path.join(home, SCRIPT), module.__dict__))
    cell = 0
    while True:
        cell += 1
        if getattr(sys.stdin, "closed", False):
            open_stdin()  # `exit()` closes it, and a later cell may ask for input
        path = os.path.join(home, f"cell_{cell}.py")
        status = execute(take(code_fd), path, module.__dict__)
        with contextlib.suppress(OSError):  # or the cells of a long session would fill the scratch
            os.unlink(path)
        sys.stdout.flush()
        control.send(bytes([status]))
        _, cells, _, _ = socket.recv_fds(control, 1, 1)
        if not cells:
            return 0
        code_fd = cells[0]


def on_interrupt(number: int, frame: types.FrameType | None) -> None:
    raise DeadlineInterrupt


def open_stdin() -> None:
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115


def stream(fd: int) -> io.TextIOWrapper:
    return open(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def limit(limits: dict[str, int]) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    for name, value in (
        (resource.RLIMIT_AS, mapped + limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["scratch_bytes"]),
        (resource.RLIMIT_NPROC, limits["max_processes"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 1),  # no core dump, and no crash handler of the machine: syscalls.py
    ):
        resource.setrlimit(name, (value, value))


def reseed() -> None:
    """Seeds the random generators. Calls forked from one zygote would all draw the same numbers."""
    random.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "sympy.core.random" in sys.modules:
        sys.modules["sympy.core.random"].seed(None)


def take(fd: int) -> str:
    """The code in `fd`, a memory file, which is closed."""
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read().decode("utf-8", errors="replace")


def execute(code: str, path: str, namespace: dict[str, object]) -> int:
    """Run `code` as `python path` would, or a notebook: image/source.py. 0, 1, EXIT_MEMORY, or what `sys.exit` said."""
    filename = os.path.basename(path)
    remember(code, filename, path)
    try:
        program = source.prepare(code, filename, call_solution=filename == SCRIPT)
    except (RecursionError, MemoryError):
        print("SyntaxError: the source is nested too deeply for Python's parser", file=sys.stderr)
        return 1
    except Exception as error:
        show(error, filename)
        return 1
    remember(program.text, filename, path)
    save(program.text, path, namespace)
    started_by = os.getpid()
    try:
        run_parts(program, namespace)
    except SystemExit as end:
        return exit_code(end)
    except DeadlineInterrupt as error:
        sys.stdout.flush()  # a last line without its end; the status says the rest
        if os.getpid() == started_by:  # but not in a child that the code forked
            show_place(error, filename)
        return 1
    except MemoryError as error:
        RESERVE.clear()
        sys.stdout.flush()
        if of_parser := is_of_parser(error):
            error.add_note("the text is nested too deeply for Python's parser; it is not the memory limit")
        show(error, filename)
        return 1 if of_parser else EXIT_MEMORY
    except BaseException as error:
        sys.stdout.flush()
        show(error, filename)
        return 1
    return 0


def remember(text: str, filename: str, path: str) -> None:
    """Makes the source known to tracebacks, and to `inspect`, which looks for a class by its module's file."""
    for name in (filename, path):
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)


def save(text: str, path: str, namespace: dict[str, object]) -> None:
    """Writes the source to the file `__file__`, which code may read and start."""
    namespace["__file__"] = path
    with contextlib.suppress(OSError):  # earlier cells may have filled the scratch
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, text.encode("utf-8", "surrogatepass"))
        finally:
            os.close(fd)


def run_parts(program: source.Program, namespace: dict[str, object]) -> None:
    coroutines = [part for part in program.parts if part.co_flags & inspect.CO_COROUTINE]
    if not coroutines:
        for part in program.parts:
            exec(part, namespace)
        return
    import asyncio  # late, as it takes longer than most calls

    with asyncio.Runner() as runner:
        for part in program.parts:
            result = eval(part, namespace)
            if part in coroutines:
                runner.run(result)


def display(value: object) -> None:
    """Shows a value as a notebook does, except None and what a command without captured output returns."""
    if value is None or (type(value).__name__ == "CompletedProcess" and getattr(value, "stdout", None) is None):
        return
    builtins._ = value  # type: ignore[attr-defined]
    print(repr(value))


def display_all(*values: object, **options: object) -> None:
    """The `display` of notebooks."""
    for value in values:
        print(repr(value))


def is_of_parser(error: MemoryError) -> bool:
    """Whether a MemoryError comes from Python's parser, which raises it, without a message, for too deep nesting."""
    frames = traceback.extract_tb(error.__traceback__)
    return not error.args and bool(frames) and any(name in (frames[-1].line or "") for name in PARSES)


def exit_code(end: BaseException | None) -> int:
    code = end.code if isinstance(end, SystemExit) else 1
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def show(error: BaseException, filename: str) -> None:
    """The traceback from the first frame of the user's code on, and an explanation if the error needs one."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != filename:
        trace = trace.tb_next
    try:
        sentence = advice(error)
        if sentence == NO_NETWORK:
            # The traceback through the libraries would be long, and this is always the reason.
            own = [frame for frame in traceback.extract_tb(trace) if OWN_CODE.fullmatch(frame.filename)]
            name = traceback.format_exception_only(error)[-1].partition(":")[0].strip()
            text = "".join(
                ["Traceback (most recent call last):\n", *traceback.format_list(own), f"{name}: {sentence}\n"]
            )
        else:
            text = "".join(traceback.format_exception(type(error), error, trace, limit=-MAX_FRAMES))
            text += sentence and f"({sentence})\n"
    except MemoryError:
        text = "MemoryError: the memory limit of a call was reached\n"
    sys.stderr.write(text)


def show_place(error: DeadlineInterrupt, filename: str) -> None:
    """The innermost line of the caller's code at the deadline. Empty if there is none, as in a coroutine that waits. C code
    that doesn't return never gets here."""
    place = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if OWN_CODE.fullmatch(frame.f_code.co_filename):
            place = frame.f_code, number
    if place is None:
        return
    code, number = place
    line = linecache.getline(code.co_filename, number).strip()
    line = line if len(line) <= MAX_LINE_CHARS else line[:MAX_LINE_CHARS] + "..."
    of_file = "" if code.co_filename == filename else f" of {code.co_filename}"
    within = "" if code.co_name.startswith("<") else f", in {code.co_name}"
    print(f"It was at line {number}{of_file}{within}: {line}", file=sys.stderr)


def leave(code: int) -> int:
    """Does what the interpreter does at its end: waits for threads, runs exit handlers, flushes."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
