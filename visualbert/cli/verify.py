"""`visualbert verify`: prove on this machine that the frameworks agree on a checkpoint."""

import argparse
import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visualbert.errors import InputError, UsageError

if TYPE_CHECKING:
    from visualbert.pretrained import Checkpoint

DTYPES = ("float64", "float32")


def register(commands: Any) -> None:
    """Add the command to the parser."""
    from visualbert.cli.common import add_source

    parser = commands.add_parser(
        "verify",
        help="run a checkpoint in every framework and compare everything",
        description="Load a checkpoint in every framework, run the same inputs, and compare every "
        "output, hidden state, attention, the loss and the gradients; then save from each and "
        "compare the tensors bit for bit. Exits 1 above the tolerance.",
    )
    add_source(parser)
    parser.add_argument("--backends", help="comma-separated; all that are installed if left out")
    parser.add_argument(
        "--against", choices=["transformers"], help="compare with transformers' own class as well"
    )
    parser.add_argument("--inputs", metavar="FILE", help="safetensors file of inputs by name")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="type to compute in (float64)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference, by the array's largest value where that is above 1 (1e-9; in "
        "float32 1e-5)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, print the table, and return 1 if something differs."""
    from visualbert.cli.common import console, load_backend, step_progress
    from visualbert.parity import verify

    _check_options(args)
    backends = _backends(args.backends, args.against)
    checkpoint, architecture, cases = _open(args)
    with step_progress("verifying") as progress:
        for name in [*backends, *([args.against] if args.against else [])]:
            progress(f"importing {name}")
            load_backend(name)
        report = verify(
            checkpoint,
            architecture,
            backends,
            against=args.against,
            dtype=args.dtype,
            tolerance=args.tolerance,
            cases=cases,
            progress=progress,
        )
    _print(report, console())
    if args.json:
        Path(args.json).write_text(_json(report), encoding="utf-8")
    return 0 if report.passed else 1


def _check_options(args: argparse.Namespace) -> None:
    if args.tolerance is not None and not 0 < args.tolerance < math.inf:
        raise UsageError(f"--tolerance {args.tolerance} must be a positive number")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise UsageError(f"--json {args.json}: not a file in a folder that exists")


def _open(args: argparse.Namespace) -> tuple["Checkpoint", str, Any]:
    """The checkpoint, its class and the cases; all that can be wrong with them is said here, as
    importing a framework takes seconds.
    """
    from visualbert.checkpoint.match import match
    from visualbert.checkpoint.read import find_weights
    from visualbert.cli.common import choose_architecture, open_any, verify_checksum

    checkpoint = open_any(args)
    architecture = choose_architecture(checkpoint, args.architecture)
    cases = _read_cases(Path(args.inputs), architecture) if args.inputs else None
    if args.against:
        find_weights(checkpoint.folder)  # a framework's own format is none that it could read
    match(checkpoint.tensors, architecture, checkpoint.config)
    verify_checksum(checkpoint)
    return checkpoint, architecture, cases


def _read_cases(path: Path, architecture: str) -> Any:
    from visualbert.inputs.contract import BODY_INPUTS, INPUTS
    from visualbert.parity import read_cases

    cases = read_cases(path)
    for name in sorted({name for inputs in cases.values() for name in inputs}):
        if name not in BODY_INPUTS and name not in INPUTS[architecture]:
            raise InputError(f"{path}: {name} is not an input of {architecture}; leave it out")
    return cases


def _json(report: Any) -> str:
    """The report as JSON, in which an infinite error is null."""
    values = dataclasses.asdict(report)
    for row in values["rows"]:
        row["error"] = row["error"] if math.isfinite(row["error"]) else None
    return json.dumps({**values, "passed": report.passed}, indent=2) + "\n"


def _backends(asked: str | None, against: str | None) -> list[str]:
    """The names that were asked for, known and installed; no framework is imported to see that."""
    from visualbert.backend import backend_names, get_backend

    installed = backend_names(installed=True)
    names = asked.split(",") if asked is not None else installed
    names = list(dict.fromkeys(name.strip() for name in names))
    if not names:
        raise UsageError("no framework is installed: pip install visualbert[all]")
    absent = [name for name in names if name not in installed]
    if against and importlib.util.find_spec(against) is None:
        absent.append(against)
    for name in absent:
        get_backend(name)  # says what it is, or what it needs
    return names


def _print(report: Any, out: Any) -> None:
    from rich.markup import escape

    from visualbert.cli.common import table, worded

    made = table(
        "case",
        "compared",
        "tensors",
        "worst tensor",
        "difference",
        "",
        right=("tensors", "difference"),
    )
    for row in report.rows:
        if row.skipped:
            reason = f"[dim]{escape(row.skipped)}[/dim]"
            made.add_row(escape(worded(row.case)), row.pair, "", reason, "", "skipped")
            continue
        bits = row.case == "save and reload"
        difference = f"{row.error:.0f} differ" if bits else f"{row.error:.1e}"
        verdict = "equal" if row.passed else "[bold red]DIFFERS[/bold red]"
        worst = row.worst if not bits or row.error else "bit for bit"
        case = escape(worded(row.case))
        made.add_row(case, row.pair, str(row.compared), escape(worst), difference, verdict)
    source = escape(worded(report.source))
    out.print(f"[bold]{source}[/bold]  {report.architecture}, {report.dtype}", soft_wrap=True)
    out.print(made)
    if len(report.backends) == 1:
        out.print(f"{report.backends[0]} was compared with nothing but its own files")
        return
    outcome = "agree" if report.passed else "[bold red]do not agree[/bold red]"
    out.print(f"{', '.join(report.backends)} {outcome} within {report.tolerance:g}")
