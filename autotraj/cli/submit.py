"""`python -m autotraj submit`: runs one of our commands as a job on a running cluster, and checks for common mistakes.

submit --address http://HEAD:8265 -- run --config … run_dir=/shared/runs/mine
       │ the configuration is read here first: an error costs no upload
       │ results must be on an absolute path or at a URI: the job's working directory goes with the job
       ▼
working directory ▶ job server ▶ head: python -m autotraj run … ▶ its log here ▶ its exit code
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from autotraj.cli.parser import parser
from autotraj.config.run import RunConfig, load, with_changes
from autotraj.config.stage_registry import STAGES
from autotraj.errors import UserError
from autotraj.planning.preflight import EVALUATION_ALONE, GRPO_ALONE, asks
from cluster import jobs
from cluster.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from cluster.jobs import JobError
from cluster.roles import read_node_types, unmet
from storage.locations import is_uri

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("run", *STAGES, "evaluate")
EXCLUDES = (
    "/runs",
    "/build",
    "/.venv",
    "/.git",
    "/tests",
    "/docs",
    "/benchmarks",
    ".*_cache",
    "__pycache__",
    ".hypothesis",
)
"""Files of the repository that no command of `COMMANDS` reads. Files that git ignores aren't shipped either."""
STOP_WAIT_S = 600
"""How long a stopped job may take to finish its step and write its checkpoint, seconds; Ray's default is 3 s."""
RESUME_KEY = "autotraj_resume"
"""Key in a job's metadata for the words of the command that continues it, as JSON."""


def submit(args: argparse.Namespace) -> int:
    """Returns the job's exit code: 0 success, 1 failure, 2 an error that the user can fix, 130 stopped or interrupted."""
    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    words = list(args.words)
    if words[:1] == ["--"]:
        del words[0]
    chosen = [bool(words), bool(args.follow), bool(args.stop), bool(args.resume)]
    if sum(chosen) != 1:
        raise UserError("submit: one of a command (after --), --follow JOB, --stop JOB, --resume JOB")
    try:
        if args.follow:
            return _follow(jobs.connect(address), args.follow)
        if args.stop:
            return _stop(jobs.connect(address), args.stop)
        if args.resume:
            client = jobs.connect(address)
            words = _words_to_resume(client, args.resume)
            config = check(words, args.cluster_file)
        else:
            config = check(words, args.cluster_file)
            client = jobs.connect(address)
        job_id = jobs.submit(client, job_of(words, config, args))
        print(f"job {job_id} on {address}: {shlex.join(words)}", flush=True)
        if args.no_follow:
            print(f"follow it with: python -m autotraj submit --address {address} --follow {job_id}")
            return EXIT_OK
        return _follow(client, job_id)
    except JobError as error:
        raise UserError(str(error)) from error


def job_of(words: Sequence[str], config: RunConfig | None, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of Ray's `submit_job` for the job that runs `python -m autotraj WORDS`."""
    folder = config.run_dir if config is not None else words[-1]  # for a resumed run it follows --resume
    # The job's page shows them in this order. Ray's list of jobs has a column for `job_name`.
    metadata = {"job_name": f"{words[0]} {Path(folder).name}", "command": shlex.join(["autotraj", *words])}
    if config is not None:
        metadata |= {"model": config.model, "run_dir": config.run_dir}
    if commit := commit_of(ROOT):
        metadata["commit"] = commit
    metadata[RESUME_KEY] = json.dumps(resume_words(words, config))
    runtime_env: dict[str, Any] = {
        "working_dir": str(ROOT),
        "excludes": [*EXCLUDES, *args.exclude],
        # The last value counts, so the user's settings replace ours.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUNBUFFERED": "1"} | environment(args.env),
    }
    if args.pip:
        runtime_env["pip"] = list(args.pip)
    return {
        "entrypoint": shlex.join(["python", "-m", "autotraj", *words]),
        "runtime_env": runtime_env,
        "metadata": metadata,
        "submission_id": args.job_id,
    }


def commit_of(folder: Path) -> str:
    """The version of the code that a job runs: `git describe` of the working directory; empty where there is no git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=, with changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def environment(settings: Sequence[str]) -> dict[str, str]:
    """The job's environment. NAME=VALUE sets a value; NAME alone copies it from this environment, which keeps a secret off
    the command line."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name:
            raise UserError(f"--env {setting}: write it as NAME=VALUE, or NAME to hand on this environment's")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name}: it isn't set here; write --env {name}=VALUE")
            value = os.environ[name]
        found[name] = value
    return found


def resume_words(words: Sequence[str], config: RunConfig | None) -> list[str]:
    """The command that continues where `words` stopped: the same one, except for `grpo`, which needs --resume for that."""
    if words[0] == "grpo" and config is not None:
        return ["grpo", "--resume", config.run_dir]
    return list(words)


def check(words: Sequence[str], cluster_file: str | None) -> RunConfig | None:
    """The configuration of the command, checked for mistakes that would fail on a cluster; None for a resumed run."""
    if words[0] not in COMMANDS:
        raise UserError(f"submit: {words[0]!r} can't run as a job; these can: {', '.join(COMMANDS)}")
    args = parser().parse_args(list(words))
    if resumed := getattr(args, "resume", None):
        _require_absolute("--resume", resumed)
        return None
    if words[0] == "evaluate":
        config = load(args.config, [*args.overrides, EVALUATION_ALONE])
    else:
        config = load(args.config, args.overrides)
    if words[0] == "grpo":
        config = with_changes(config, GRPO_ALONE)
    if not getattr(args, "dry_run", False):
        _require_absolute("run_dir", config.run_dir)
    if getattr(args, "benchmarks", None):
        _require_absolute("--out", args.out)
    if cluster_file:
        try:
            problems = unmet(asks(config), read_node_types(cluster_file))
        except ValueError as error:
            raise UserError(f"--cluster-file: {error}") from error
        if problems:
            raise UserError(f"{cluster_file} can never offer what this asks for:\n" + "\n".join(problems))
    return config


def _require_absolute(name: str, path: str) -> None:
    may_be_uri = name != "--out"
    if not (may_be_uri and is_uri(path)) and not Path(path).is_absolute():
        other = f", or a URI such as s3://bucket/{path}" if may_be_uri else ""
        raise UserError(
            f"{name} = {path} is within the job's working directory, which goes with the job: give an absolute path on a "
            f"file system that every node mounts, such as /shared/{path}{other}"
        )


def _words_to_resume(client: JobSubmissionClient, job_id: str) -> list[str]:
    job = jobs.details(client, job_id)
    if not job.status.is_terminal():
        raise UserError(f"--resume {job_id}: it is {job.status}; follow it with --follow, or end it with --stop")
    try:
        words = json.loads((job.metadata or {})[RESUME_KEY])
    except (KeyError, json.JSONDecodeError):
        raise UserError(f"--resume {job_id}: it wasn't started by submit; submit its command again") from None
    return [str(word) for word in words]


def _follow(client: JobSubmissionClient, job_id: str) -> int:
    address = client.get_address()
    try:
        job = asyncio.run(jobs.follow(client, job_id))
    except KeyboardInterrupt:
        print(
            f"\njob {job_id} goes on; follow or end it with:\n"
            f"  python -m autotraj submit --address {address} --follow {job_id}\n"
            f"  python -m autotraj submit --address {address} --stop {job_id}"
        )
        return EXIT_INTERRUPTED
    code = jobs.exit_code(job.status, job.driver_exit_code)
    if code != EXIT_OK:
        # The rest of Ray's message is the end of the log, which is already printed above.
        print(f"job {job_id}: {job.status}; {(job.message or 'no reason given').splitlines()[0]}")
    if code in (EXIT_FAILED, EXIT_INTERRUPTED):
        print(f"go on with it: python -m autotraj submit --address {address} --resume {job_id}")
    return code


def _stop(client: JobSubmissionClient, job_id: str) -> int:
    before = jobs.details(client, job_id)
    if before.status.is_terminal():
        print(f"job {job_id} had ended before: {before.status}")
        return EXIT_OK
    print(f"job {job_id}: stopping after its step, with a checkpoint; {STOP_WAIT_S} s at most …", flush=True)
    job = jobs.stop(client, job_id, STOP_WAIT_S + 60.0)
    print(f"job {job_id}: {job.status}")
    return EXIT_OK
