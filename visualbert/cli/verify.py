"""`visualbert verify`: prove on this machine that the frameworks agree on a checkpoint."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from visualbert.errors import UsageError


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
    parser.add_argument("--dtype", default="float64", help="float64 (the default) or float32")
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
    from visualbert.checkpoint.read import SafetensorsFiles
    from visualbert.cli.common import choose_architecture, console, open_any, step_progress
    from visualbert.parity import read_cases, verify

    backends = _backends(args.backends, args.against)
    if args.tolerance is not None and not args.tolerance > 0:
        raise UsageError(f"--tolerance {args.tolerance} must be positive")
    checkpoint = open_any(args.path, args.revision)
    architecture = choose_architecture(checkpoint, args.architecture)
    if isinstance(checkpoint.tensors, SafetensorsFiles):
        checkpoint.tensors.verify_checksum()
    cases = read_cases(Path(args.inputs)) if args.inputs else None
    with step_progress("verifying") as progress:
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
        text = json.dumps({**dataclasses.asdict(report), "passed": report.passed}, indent=2)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0 if report.passed else 1


def _backends(asked: str | None, against: str | None) -> list[str]:
    from visualbert.backend import backend_names, get_backend

    names = asked.split(",") if asked else backend_names(installed=True)
    if not names:
        raise UsageError("no framework is installed: pip install visualbert[all]")
    for name in names:
        get_backend(name)  # an unknown or missing one is an error before anything is loaded
    if against:
        get_backend(against)
    return names


def _print(report: Any, out: Any) -> None:
    from visualbert.cli.common import table

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
            made.add_row(row.case, row.pair, "", f"[dim]{row.skipped}[/dim]", "", "skipped")
            continue
        bits = row.case == "save and reload"
        difference = f"{row.error:.0f} differ" if bits else f"{row.error:.1e}"
        verdict = "equal" if row.passed else "[bold red]DIFFERS[/bold red]"
        worst = row.worst if not bits or row.error else "bit for bit"
        made.add_row(row.case, row.pair, str(row.compared), worst, difference, verdict)
    out.print(f"[bold]{report.source}[/bold]  {report.architecture}, {report.dtype}")
    out.print(made)
    outcome = "agree" if report.passed else "[bold red]do not agree[/bold red]"
    out.print(f"{', '.join(report.backends)} {outcome} within {report.tolerance:g}")
