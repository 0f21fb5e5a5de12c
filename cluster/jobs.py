"""Jobs on a running Ray cluster, through the head's job server: connect, check, submit a command, follow it, stop it.

Ray's own client reports little when something is wrong, and it waits without a limit. Here every request has a deadline, and
every error says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 60.0
"""Longest wait of one request between two bytes, seconds."""
NUM_RETRIES = 2
"""How often a query is repeated when a busy head closed the connection. Orders such as submit and stop aren't repeated."""
POLL_S = 2.0
LOST_AFTER_S = 180.0
"""A head that answers nothing for this long counts as lost, seconds."""
AGENT_TIMEOUT_S = 120.0
"""How long a head that has just started may take until it can start jobs, seconds."""
LAST_LINES_S = 10.0
"""How long the last lines of an ended job's log may take to arrive, seconds."""


class JobError(ValueError):
    """The cluster can't be used as requested. The message names the cause and the remedy."""


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a limit for each request; without it, requests would wait forever."""

    def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
        settings = {"timeout": REQUEST_TIMEOUT_S} | settings
        for _ in range(NUM_RETRIES if method == "GET" else 0):
            with contextlib.suppress(requests.ConnectionError, ConnectionError):
                return super()._do_request(method, endpoint, **settings)
            time.sleep(POLL_S / 2)
        return super()._do_request(method, endpoint, **settings)


# The working directory leaves out what .gitignore names, and `.git` itself.
for _name in ("_private.runtime_env.packaging", "_private.runtime_env.working_dir"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.ERROR)
for _name in ("dashboard_sdk", "job.sdk"):
    logging.getLogger(f"ray.dashboard.modules.{_name}").setLevel(logging.ERROR)


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`, `http://host:port`. JobError if it can't be reached, refuses this client, or
    has another version of Ray."""
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise JobError(f"--address {address}: write it as http://HEAD:8265, the address of the head's dashboard")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise JobError(
            f"--address {address}: nothing answers there ({error}); is the cluster up, and port {port} forwarded? "
            f"`ray dashboard FILE` or `kubectl port-forward service/…-head-svc 8265:8265` forwards it"
        ) from error
    # These environment variables would take precedence over the address that Ray is given.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    with explained(address):
        client = _Client(address)
        server = client._do_request("GET", "/api/version").json()["ray_version"]
        if server != ray.__version__:
            raise JobError(
                f"Ray {ray.__version__} here, {server} on the cluster: install ray=={server} here, or start the cluster "
                f"with an image of cluster/Dockerfile"
            )
        described = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
    theirs = str(described.get("pythonVersion") or "")
    ours = platform.python_version()
    if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
        raise JobError(
            f"Python {ours} here, {theirs} on the cluster: what was tested here isn't what would run there; use one version"
        )
    return client


@contextlib.contextmanager
def explained(address: str) -> Any:
    """Raises Ray's and HTTP's errors as JobError."""
    try:
        yield
    except AuthenticationError as error:
        raise JobError(
            f"{address} refuses this client's token: put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN, and "
            f"set RAY_AUTH_MODE=token"
        ) from error
    except (requests.Timeout, requests.ConnectionError, ConnectionError) as error:
        raise JobError(f"{address} stopped answering: {error}") from error
    except (requests.RequestException, KeyError, RuntimeError) as error:
        raise JobError(f"{address}: {error}") from error


def check_size(working_dir: Path, excludes: Sequence[str], limit_bytes: int = packaging.GCS_STORAGE_MAX_SIZE) -> int:
    """The number of bytes that Ray would ship, by Ray's own rules. JobError, with the largest entries, if it is too
    large."""
    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            sizes["/".join(path.relative_to(working_dir).parts[:2])] += path.stat().st_size

    rules = [packaging._get_excludes(working_dir, [*get_runtime_env_default_excludes(), *excludes])]
    packaging._dir_travel(working_dir, rules, add, include_gitignore=True)
    if (total := sizes.total()) > limit_bytes:
        largest = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.most_common(3))
        raise JobError(
            f"the working directory {working_dir} is {total / 2**20:.0f} MiB, Ray ships {limit_bytes / 2**20:.0f} MiB at "
            f"most; largest: {largest}. Put models and data where every node sees them, and leave them out with --exclude"
        )
    return total


def submit(client: JobSubmissionClient, job: Mapping[str, Any]) -> str:
    """Ship the working directory and start the command; returns the job's id. `job`: the arguments of Ray's `submit_job`."""
    check_size(Path(job["runtime_env"]["working_dir"]), job["runtime_env"]["excludes"])
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            with explained(client.get_address()):
                return str(client.submit_job(**job))
        except JobError as error:
            # The job server answers some seconds before the agent that starts jobs is ready.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S / 2)


def details(client: JobSubmissionClient, job_id: str) -> JobDetails:
    with explained(client.get_address()):
        return client.get_job_info(job_id)


def stop(client: JobSubmissionClient, job_id: str, timeout_s: float) -> JobDetails:
    """Ask the job to stop and wait until it has ended. JobError after `timeout_s`."""
    with explained(client.get_address()):
        client.stop_job(job_id)
    deadline = time.monotonic() + timeout_s
    while True:
        job = details(client, job_id)
        if job.status.is_terminal():
            return job
        if time.monotonic() > deadline:
            raise JobError(
                f"waited {timeout_s:.0f} s for job {job_id} to end after it was asked to; it is {job.status}"
            )
        time.sleep(POLL_S / 4)


async def follow(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Print the job's log as it grows, until the job has ended. JobError if the head stops answering."""
    written, answered = 0, time.monotonic()
    last_problem = "no answer"

    async def tail() -> None:
        """Write new lines. The log starts from its beginning with each new connection."""
        nonlocal written
        seen = 0
        async for text in client.tail_job_logs(job_id):
            new = text[max(0, written - seen) :]
            seen += len(text)
            if new:
                print(new, end="", flush=True)
                written = seen

    tailing = asyncio.create_task(tail())
    try:
        while True:
            await asyncio.wait({tailing}, timeout=POLL_S)
            try:
                job = await asyncio.to_thread(details, client, job_id)
                answered = time.monotonic()
            except JobError as error:
                last_problem = str(error)
                if time.monotonic() - answered > LOST_AFTER_S:
                    raise JobError(
                        f"the cluster has not answered for {LOST_AFTER_S:.0f} s, while job {job_id} ran: {last_problem}"
                    ) from error
                await asyncio.sleep(POLL_S / 2)
                continue
            if job.status.is_terminal():
                await asyncio.wait({tailing}, timeout=LAST_LINES_S)
                return job
            if tailing.done():
                # The connection broke, or the job hasn't started yet.
                problem = tailing.exception()
                if problem is not None and not isinstance(problem, (RuntimeError, OSError, aiohttp.ClientError)):
                    raise problem
                await asyncio.sleep(POLL_S / 2)
                tailing = asyncio.create_task(tail())
    finally:
        tailing.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError, OSError, aiohttp.ClientError):
            await tailing


def exit_code(status: JobStatus, driver_exit_code: int | None) -> int:
    """The exit code of the command line for a job's end. Only a job that Ray reports as succeeded is a success."""
    if status == JobStatus.SUCCEEDED:
        return EXIT_OK
    if status == JobStatus.STOPPED or driver_exit_code == EXIT_INTERRUPTED:
        return EXIT_INTERRUPTED
    return EXIT_USAGE if driver_exit_code == EXIT_USAGE else EXIT_FAILED
