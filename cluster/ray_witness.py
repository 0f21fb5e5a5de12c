"""A process beside a run that says why the run has ended when the run itself can't.

If the main thread is in `ray.put` when its raylet dies, Ray's library ends the process at once, without a message and before
another thread can run (2.60: "The connection to the plasma store is failed. Terminate the process."). So `session_watch`
starts this file as a process of its own. It needs only the standard library.

    python ray_witness.py RUN_PID [DAEMON_PID MESSAGE]...     until a byte on stdin, or the end of the run
"""

from __future__ import annotations

import os
import select
import sys


def watch(run_pid: int, messages: dict[int, str]) -> str:
    """Wait until the process `run_pid` has ended; returns the message of a daemon that had ended before it. Empty if no
    daemon had ended, or if the run wrote a byte to stdin, which means that it reports by itself. Of several that ended
    at the same moment, as this process sees it, the first of `messages` counts."""
    poller, names = select.poll(), dict[int, int]()
    for pid in (run_pid, *messages):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            if pid == run_pid:
                return ""
            continue
        names[descriptor] = pid
        poller.register(descriptor, select.POLLIN)
    poller.register(0, select.POLLIN)
    said = ""
    while True:
        ended = set()
        for descriptor, _ in poller.poll():
            if descriptor == 0:
                if os.read(0, 1):
                    return ""
            else:
                ended.add(names[descriptor])
            poller.unregister(descriptor)
        said = said or next((message for pid, message in messages.items() if pid in ended), "")
        if run_pid in ended:
            return said


if __name__ == "__main__":
    words = sys.argv[1:]
    found = watch(int(words[0]), {int(pid): message for pid, message in zip(words[1::2], words[2::2], strict=True)})
    if found:
        print(f"failed: {found}", file=sys.stderr, flush=True)
