"""`python -m examples.fake_cluster`: starts the fake cluster, says how to use it, and ends it with Ctrl-C."""

import contextlib
import signal
import sys

from examples.fake_cluster.cluster import fake_cluster


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background commands with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    print("starting a head …", flush=True)
    with fake_cluster() as cluster, contextlib.suppress(KeyboardInterrupt):
        print(
            f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN={cluster.token} RAY_API_SERVER_ADDRESS={cluster.dashboard} "
            f"RAY_ADDRESS={cluster.address}\n"
            "In a shell with these, `submit` and `status` of `python -m autotraj` find this cluster; a browser finds its "
            "dashboard at that address. Ctrl-C ends the cluster and what runs on it.",
            flush=True,
        )
        cluster.head.wait()
        sys.exit("the head ended by itself")


if __name__ == "__main__":
    main()
