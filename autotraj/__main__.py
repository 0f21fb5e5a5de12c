"""`python -m autotraj`: parses the command line, then imports only what the chosen command needs."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Sequence

from autotraj.cli.parser import parser
from autotraj.config.stage_registry import STAGES
from autotraj.errors import RunError, UserError
from autotraj.interrupt import graceful_interrupt, last_words
from cluster.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from storage.objects import StorageError

GO_ON = "the same command goes on with what is done"
WAYS_ON = dict.fromkeys(("run", *STAGES, "demo"), GO_ON) | dict.fromkeys(
    ("grpo", "evaluate"), "the same command starts again"
)
"""How to continue after Ctrl-C, if the command itself hasn't printed it."""
FULL = "Free some space; then `run` goes on with the same command, `grpo` with --resume RUN_DIR"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    way_on = GO_ON if getattr(args, "resume", None) else WAYS_ON.get(args.command, "")
    try:
        with graceful_interrupt() as interrupt:
            interrupt.way_on = way_on
            interrupt.nothing_begun = args.command in WAYS_ON
            module, function = args.handler.split(":")
            carry_out = getattr(importlib.import_module(module), function)
            given = vars(args) | {"args": args}
            return int(carry_out(*(given[name] for name in args.takes.split())))
    except KeyboardInterrupt as interruption:
        print(last_words(str(interruption) or way_on), file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (RunError, StorageError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"failed: the disk is full: {error}. {FULL}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM):  # everything has ended, so nothing is left to interrupt
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
