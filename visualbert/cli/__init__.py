"""The command line: one module a command, imported when it is used.

A user's mistake ends in one sentence on standard error and exit status 2, never in a traceback; a
check that fails ends in 1.
"""

import importlib
import io
import os
import sys

from visualbert import __version__
from visualbert.cli.parser import Parser
from visualbert.errors import VisualBertError

COMMANDS = ("inspect", "convert", "verify", "answer", "bench", "scenes")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no character is worth a traceback
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 130)
    except MemoryError as error:
        return _fail(args.command, f"not enough memory ({error})", 2)
    except (VisualBertError, OSError) as error:
        return _fail(args.command, str(error), 2)


def _fail(command: str, message: str, status: int) -> int:
    from visualbert.cli.common import worded

    print(f"visualbert {command}: {worded(message)}", file=sys.stderr)
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="visualbert",
        description="VisualBERT in PyTorch, TensorFlow and Flax: inspect, convert and verify "
        "checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"visualbert {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"visualbert.cli.{name}").register(commands)
    return parser
