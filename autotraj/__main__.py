"""`python -m autotraj`: parses the command line, then imports what the chosen command needs."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Callable, Sequence

from autotraj.errors import RunError, UserError
from autotraj.interrupt import EXIT_INTERRUPTED, graceful_interrupt, last_words
from storage.objects import StorageError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
GO_ON = "the same command goes on with what is done"
WAYS_ON = dict.fromkeys(("run", "synthesize", "sft", "reward-model", "demo"), GO_ON) | dict.fromkeys(
    ("grpo", "evaluate"), "the same command starts again"
)
"""After Ctrl-C, where the command itself hasn't said it."""
FULL = "Free some space; then `run` goes on with the same command, `grpo` with --resume RUN_DIR"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m autotraj",
        description="AutoTraj: online RL for LLMs that reason with tools.",
        epilog="Every command takes --config FILE.toml and overrides such as grpo.num_steps=20 model=PATH.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _with_config(commands, "run", "the whole method: synthesize, sft, reward-model, grpo, report", _run)
    run.add_argument("--dry-run", action="store_true", help="print what it would need, and start nothing")
    _with_config(commands, "synthesize", "stage 1: sample, score, keep the good, repair the bad", _stage)
    _with_config(commands, "sft", "fine-tune on what synthesize made", _stage)
    _with_config(commands, "reward-model", "train the trajectory reward model on the preference pairs", _stage)
    grpo = _with_config(commands, "grpo", "train a policy with GRPO and tools", _grpo)
    grpo.add_argument("--resume", metavar="RUN_DIR", help="continue a run from its last checkpoint")
    evaluate = _with_config(commands, "evaluate", "measure a checkpoint's accuracy with tools running", _evaluate)
    evaluate.add_argument(
        "--benchmarks", metavar="FILE", help="a suite of benchmark files, e.g. examples/benchmarks.toml"
    )
    evaluate.add_argument("--out", default="runs/benchmarks", help="where --benchmarks writes (default: %(default)s)")

    compare = commands.add_parser("compare", help="results of evaluate --benchmarks side by side")
    compare.add_argument("folders", nargs="+", metavar="FOLDER")
    compare.set_defaults(handler=_compare)

    report = commands.add_parser("report", help="write a run folder's report.html again")
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.set_defaults(handler=_report)

    status = commands.add_parser("status", help="who does what in a live run, who waits on whom, and for how long")
    status.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="without it: all runs of the Ray cluster")
    status.set_defaults(handler=_status)

    demo = commands.add_parser("demo", help="the whole method on the embedded tiny model")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--run-dir", default="runs/demo", help="where the run goes (default: %(default)s)")
    demo.set_defaults(handler=_demo)

    index = commands.add_parser("search-index", help="index a corpus for the tool search (BM25)")
    index.add_argument("corpus", metavar="CORPUS.jsonl", help='a document a line: {"id": …, "contents": …}')
    index.add_argument("out", metavar="FOLDER", help="for sandbox.search.index")
    index.set_defaults(handler=_search_index)

    sandbox = commands.add_parser("sandbox", help="the tool sandbox: serve it, measure it, build its image")
    actions = sandbox.add_subparsers(dest="action", required=True, metavar="ACTION")
    _with_config(actions, "serve", "run a gateway in the foreground", _sandbox_serve)
    _with_config(actions, "build", "build the image if it isn't there", _sandbox_build)
    _with_config(actions, "attack", "run the attack suite against the configured containers", _sandbox_attack)
    _with_config(actions, "stats", "what the gateway at sandbox.address says of itself", _sandbox_stats)
    bench = _with_config(actions, "bench", "measure calls/s and latencies here and now", _sandbox_bench)
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
    submit.add_argument("--resume", metavar="JOB", help="submit what goes on where an ended job stopped")
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND …", help="e.g. -- run --config FILE")
    submit.set_defaults(handler=_submit)
    return root


def _with_config(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    description: str,
    handler: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description)
    command.add_argument("--config", metavar="FILE", help="TOML file; examples are under examples/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. grpo.num_steps=20")
    command.set_defaults(handler=handler)
    return command


def _run(args: argparse.Namespace) -> int:
    from autotraj.cli import commands

    return (commands.dry_run if args.dry_run else commands.run)(args.config, args.overrides)


def _stage(args: argparse.Namespace) -> int:
    from autotraj.cli import commands

    return commands.stage(args.command, args.config, args.overrides)


def _report(args: argparse.Namespace) -> int:
    from autotraj.cli import commands

    return commands.report(args.run_dir)


def _status(args: argparse.Namespace) -> int:
    from autotraj.status.show import show

    print(show(args.run_dir))
    return EXIT_OK


def _grpo(args: argparse.Namespace) -> int:
    from autotraj.cli import commands

    return commands.grpo(args.config, args.overrides, resume=args.resume)


def _evaluate(args: argparse.Namespace) -> int:
    if args.benchmarks:
        from autotraj.cli import benchmarks

        return benchmarks.evaluate_suite(args.config, args.overrides, args.benchmarks, args.out)
    from autotraj.cli import commands

    return commands.evaluate(args.config, args.overrides)


def _compare(args: argparse.Namespace) -> int:
    from autotraj.cli import benchmarks

    return benchmarks.compare(args.folders)


def _search_index(args: argparse.Namespace) -> int:
    from autotraj.gateways import session as sandbox

    return sandbox.search_index(args.corpus, args.out)


def _demo(args: argparse.Namespace) -> int:
    from autotraj.cli import demo

    return demo.main(seed=args.seed, run_dir=args.run_dir)


def _submit(args: argparse.Namespace) -> int:
    from autotraj.cli import submit

    return submit.submit(args)


def _sandbox_serve(args: argparse.Namespace) -> int:
    from autotraj.gateways import session as sandbox

    return sandbox.serve(args.config, args.overrides)


def _sandbox_attack(args: argparse.Namespace) -> int:
    from autotraj.cli import attack

    return attack.attack(args.config, args.overrides)


def _sandbox_build(args: argparse.Namespace) -> int:
    from autotraj.gateways import session as sandbox

    return sandbox.build(args.config, args.overrides)


def _sandbox_stats(args: argparse.Namespace) -> int:
    from autotraj.gateways import session as sandbox

    return sandbox.stats(args.config, args.overrides)


def _sandbox_bench(args: argparse.Namespace) -> int:
    from autotraj.gateways import session as sandbox

    return sandbox.bench(args.config, args.overrides, args.seconds)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    way_on = GO_ON if getattr(args, "resume", None) else WAYS_ON.get(args.command, "")
    try:
        with graceful_interrupt() as interrupt:
            interrupt.way_on = way_on
            interrupt.nothing_begun = args.command in WAYS_ON
            return int(args.handler(args))
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
    for number in (signal.SIGINT, signal.SIGTERM):  # what was started is ended: nothing is left to interrupt
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
