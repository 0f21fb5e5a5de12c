"""Runs as a job: on SIGTERM it takes longer than Ray's default patience of 3 s to write what it must."""

import signal
import sys
import time
from pathlib import Path


def finish(number: int, frame: object) -> None:
    time.sleep(5)
    Path(sys.argv[1]).write_text("checkpoint")
    sys.exit(130)


signal.signal(signal.SIGTERM, finish)
print("running", flush=True)
time.sleep(120)
