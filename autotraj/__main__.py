"""`python -m autotraj`: parses the command line, then imports what the chosen command needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from autotraj.errors import RunError, UserError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m autotraj",
        description="AutoTraj: online RL for LLMs that reason with tools.",
        epilog="Every command takes --config FILE.toml and overrides such as grpo.num_steps=20 model=PATH.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    grpo = _with_config(commands, "grpo", "train a policy with GRPO and tools", _grpo)
    grpo.add_argument("--resume", metavar="RUN_DIR", help="continue a run from its last checkpoint")
    _with_config(commands, "evaluate", "measure a checkpoint's accuracy with tools running", _evaluate)

    demo = commands.add_parser("demo", help="the whole method on the embedded tiny model")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--run-dir", default="runs/demo", help="where the run goes (default: %(default)s)")
    demo.set_defaults(handler=_demo)

    sandbox = commands.add_parser("sandbox", help="the tool sandbox: serve it, build its image")
    actions = sandbox.add_subparsers(dest="action", required=True, metavar="ACTION")
    _with_config(actions, "serve", "run a gateway in the foreground", _sandbox_serve)
    _with_config(actions, "build", "build the image if it isn't there", _sandbox_build)
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


def _grpo(args: argparse.Namespace) -> int:
    from autotraj import commands

    return commands.grpo(args.config, args.overrides, resume=args.resume)


def _evaluate(args: argparse.Namespace) -> int:
    from autotraj import commands

    return commands.evaluate(args.config, args.overrides)


def _demo(args: argparse.Namespace) -> int:
    from autotraj import demo

    return demo.main(seed=args.seed, run_dir=args.run_dir)


def _sandbox_serve(args: argparse.Namespace) -> int:
    from autotraj import sandbox

    return sandbox.serve(args.config, args.overrides)


def _sandbox_build(args: argparse.Namespace) -> int:
    from autotraj import sandbox

    return sandbox.build(args.config, args.overrides)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return int(args.handler(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
