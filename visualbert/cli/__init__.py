"""The command line: one module a command, imported when it is used.

A user's mistake ends in one sentence on standard error and exit status 2, never in a traceback; a
check that fails ends in 1.
"""

import argparse
import importlib
import os
import sys

from visualbert import __version__
from visualbert.errors import VisualBertError

COMMANDS = ("inspect", "convert", "verify")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except VisualBertError as error:
        print(f"visualbert {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"visualbert {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"visualbert {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visualbert",
        description="VisualBERT in PyTorch, TensorFlow and Flax: inspect, convert and verify "
        "checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"visualbert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"visualbert.cli.{name}").register(commands)
    return parser
