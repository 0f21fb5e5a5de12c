"""The process behind `verifier`: one JSON request a line on stdin, one JSON verdict or error a line on stdout.

Run as a file; imports nothing of ours. First line out: "ready".
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

MEMORY_BYTES = 2 << 30


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    from math_verify import parse, verify

    logging.disable()  # it warns at each call that no deadline of its own is set
    parse("\\boxed{\\frac{1}{2}}", parsing_timeout=None)  # builds the grammar now, not within the first deadline
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)  # whatever a library prints must not be taken for a verdict
    os.dup2(devnull, 2)
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Should the parent be gone, nobody kills us at the deadline: this signal has no Python handler, so it does.
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + 1)
        verdict: dict[str, bool | str]
        try:
            gold, answer = (
                parse(f"\\boxed{{{request[key]}}}", parsing_timeout=None, raise_on_error=True)
                for key in ("gold", "answer")
            )
            verdict = {"equal": verify(gold, answer, timeout_seconds=None, raise_on_error=True)}
        except (Exception, MemoryError) as error:  # parsers of hostile text raise whatever they like
            verdict = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(verdict).encode() + b"\n")


if __name__ == "__main__":
    main()
