"""The command line: every command with its arguments and the function that runs it. Imports nothing heavy.

A command names its function as `module:function` (`handler`) and the arguments with which it is called (`takes`), so that
nothing is imported before a command is chosen.
"""

from __future__ import annotations

import argparse

from autotraj.config.stage_registry import STAGES


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m autotraj",
        description="AutoTraj: online RL for LLMs that reason with tools.",
        epilog="Every command takes --config FILE.toml and overrides such as grpo.num_steps=20 model=PATH.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _with_config(
        commands,
        "run",
        f"the whole method: {', '.join(STAGES)}, report",
        "commands:run",
        extra="dry_run",
    )
    run.add_argument("--dry-run", action="store_true", help="print what it would need, and start nothing")
    for stage in STAGES.values():
        if stage.help:
            _with_config(commands, stage.name, stage.help, "commands:stage", extra="command")
    grpo = _with_config(commands, "grpo", "train a policy with GRPO and tools", "commands:grpo", extra="resume")
    grpo.add_argument("--resume", metavar="RUN_DIR", help="continue a run from its last checkpoint")
    evaluate = _with_config(
        commands,
        "evaluate",
        "measure a checkpoint's accuracy with tools running",
        "commands:evaluate",
        extra="benchmarks out",
    )
    evaluate.add_argument(
        "--benchmarks", metavar="FILE", help="a suite of benchmark files, e.g. examples/benchmarks.toml"
    )
    evaluate.add_argument("--out", default="runs/benchmarks", help="where --benchmarks writes (default: %(default)s)")

    compare = commands.add_parser("compare", help="results of evaluate --benchmarks side by side")
    compare.add_argument("folders", nargs="+", metavar="FOLDER")
    compare.set_defaults(handler="autotraj.cli.benchmarks:compare", takes="folders")

    report = commands.add_parser("report", help="write a run folder's report.html again")
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.set_defaults(handler="autotraj.cli.commands:report", takes="run_dir")

    status = commands.add_parser("status", help="what each part of a live run does, what it waits for, and how long")
    status.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="without it: all runs of the Ray cluster")
    status.set_defaults(handler="autotraj.cli.commands:status", takes="run_dir")

    demo = commands.add_parser("demo", help="the whole method on the embedded tiny model")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--run-dir", default="runs/demo", help="where the run goes (default: %(default)s)")
    demo.set_defaults(handler="autotraj.cli.demo:main", takes="seed run_dir")

    index = commands.add_parser("search-index", help="index a corpus for the tool search (BM25)")
    index.add_argument("corpus", metavar="CORPUS.jsonl", help='a document a line: {"id": …, "contents": …}')
    index.add_argument("out", metavar="FOLDER", help="for sandbox.search.index")
    index.set_defaults(handler="autotraj.cli.sandbox:search_index", takes="corpus out")

    sandbox = commands.add_parser("sandbox", help="the tool sandbox: serve it, measure it, build its image")
    actions = sandbox.add_subparsers(dest="action", required=True, metavar="ACTION")
    _with_config(actions, "serve", "run a gateway in the foreground", "sandbox:serve")
    _with_config(actions, "build", "build the image if it isn't there", "sandbox:build")
    _with_config(actions, "attack", "run the attack suite against the configured containers", "attack:attack")
    _with_config(actions, "stats", "the figures of the gateway at sandbox.address", "sandbox:stats")
    bench = _with_config(
        actions, "bench", "measure calls/s and latencies here and now", "sandbox:bench", extra="seconds"
    )
    bench.add_argument("--seconds", type=float, default=5.0, help="of each row (default: %(default)s)")

    submit = commands.add_parser("submit", help="run a command as a job on a Ray cluster, and follow it")
    submit.add_argument("--address", metavar="URL", help="the head's dashboard (default: http://127.0.0.1:8265)")
    submit.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="environment of the job")
    submit.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="don't ship such files")
    submit.add_argument(
        "--pip", action="append", default=[], metavar="PACKAGE", help="install on the nodes for this job"
    )
    submit.add_argument("--job-id", metavar="ID", help="name the job (default: Ray does)")
    submit.add_argument("--cluster-file", metavar="FILE", help="refuse what this cluster's node types can't offer")
    submit.add_argument("--no-follow", action="store_true", help="don't wait for the job's end")
    submit.add_argument("--follow", metavar="JOB", help="show a job's log until it ends; its exit code is this one's")
    submit.add_argument("--stop", metavar="JOB", help="end a job after its step, with a checkpoint")
    submit.add_argument("--resume", metavar="JOB", help="submit a job that continues where an ended one stopped")
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND …", help="e.g. -- run --config FILE")
    submit.set_defaults(handler="autotraj.cli.submit:submit", takes="args")
    return root


def _with_config(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    description: str,
    handler: str,
    *,
    extra: str = "",
) -> argparse.ArgumentParser:
    """A command whose function takes the configuration's file, the overrides and the arguments `extra`."""
    command = commands.add_parser(name, help=description, description=description)
    command.add_argument("--config", metavar="FILE", help="TOML file; examples are under examples/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. grpo.num_steps=20")
    command.set_defaults(handler=f"autotraj.cli.{handler}", takes=f"config overrides {extra}")
    return command
