"""`visualbert bench`: speed and memory against transformers' VisualBERT on this machine."""

import argparse
import contextlib
import importlib.util
import json
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from visualbert.bench.workloads import (
    BACKENDS,
    DEVICES,
    DTYPES,
    IMPLEMENTATIONS,
    REFERENCE,
    SIZES,
    SWEEP,
    WORKLOADS,
    Implementation,
    Workload,
)
from visualbert.errors import MissingBackendError, UsageError, did_you_mean


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory against transformers",
        description="Run workloads in every framework and in transformers, in turn, and print the "
        "ratios, each figure's share of the machine's own matrix-product rate, and peak memory. "
        "Outputs are compared before anything is timed; exits 1 if they differ.",
    )
    add = parser.add_argument
    add("--workload", metavar="NAMES", help=f"comma-separated, of {', '.join(WORKLOADS)}")
    add("--backend", metavar="NAMES", help=f"comma-separated, of {', '.join(BACKENDS)}")
    add("--dtype", metavar="NAMES", help=f"comma-separated, of {', '.join(DTYPES)} (float32)")
    add("--runs", type=int, default=5, metavar="N", help="turns of each implementation (5)")
    add("--batch", type=int, metavar="N", help="examples in a batch (16; cuda 256; vcr half of it)")
    add("--device", choices=list(DEVICES), default="cpu", help="cuda: PyTorch alone, bfloat16")
    add("--threads", type=int, metavar="N", help="processors for each implementation (all)")
    add("--sweep", action="store_true", help="cost against real tokens, new shapes included")
    add("--json", metavar="FILE", help="write every figure there")
    add("--plot", metavar="FILE", help="draw the ratios, or the sweep: .png, .pdf or .svg")
    add("--size", choices=list(SIZES), default="base", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write, and return 1 if an implementation gives other numbers."""
    _check_options(args)
    workloads, chosen = _workloads(args), _implementations(args)
    from visualbert.bench.report import machine, show_machine
    from visualbert.bench.run import Different, Settings
    from visualbert.cli.common import console, step_progress

    out = console()
    with (
        _ended_like_interrupted(),
        tempfile.TemporaryDirectory(prefix="visualbert-bench-") as folder,
    ):
        settings = Settings(Path(folder), SIZES[args.size], args.device, args.threads, args.runs)
        measure = _sweep if args.sweep else _measure
        found = machine(settings)
        show_machine(found, out)
        try:
            with step_progress("bench") as progress:
                values, draw = measure(workloads, chosen, settings, progress, out)
        except Different as error:
            out.print(f"[bold red]{error}[/bold red]", soft_wrap=True)
            return 1
    if args.json:
        text = json.dumps({"machine": found, **values}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    if args.plot:
        from visualbert.explain.style import save_picture

        save_picture(draw(), args.plot)
    return 0


@contextlib.contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """A process that is told to end takes its workers and its gigabyte of weights with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(
    workloads: Sequence[Workload],
    chosen: Sequence[Implementation],
    settings: Any,
    progress: Any,
    out: Any,
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The table, workload by workload: its JSON, and how to draw it."""
    from visualbert.bench.plot import ratios_figure
    from visualbert.bench.report import results_as_json, show_result
    from visualbert.bench.run import measure

    results = []
    for workload in workloads:
        able = [x for x in chosen if workload.kind in x.kinds]
        results.append(measure(workload, able, settings, progress))
        show_result(results[-1], out)
    return results_as_json(results), partial(ratios_figure, results)


def _sweep(
    workloads: Sequence[Workload],
    chosen: Sequence[Implementation],
    settings: Any,
    progress: Any,
    out: Any,
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The same of the sweep."""
    from visualbert.bench.plot import sweep_figure
    from visualbert.bench.report import show_sweep, sweep_as_json
    from visualbert.bench.sweep import run_sweep

    sweep = run_sweep(chosen, workloads, settings, progress)
    show_sweep(sweep, out)
    return sweep_as_json(sweep), partial(sweep_figure, sweep)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before anything is started."""
    from visualbert.backend import get_backend

    for name in ("runs", "batch", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} must be at least 1")
    for name in ("json", "plot"):
        value = getattr(args, name)
        if value and (Path(value).is_dir() or not Path(value).absolute().parent.is_dir()):
            raise UsageError(f"--{name} {value}: not a file in a folder that exists")
    if args.plot and not args.plot.lower().endswith((".png", ".pdf", ".svg")):
        raise UsageError(f"--plot {args.plot!r} must end in .png, .pdf or .svg")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise MissingBackendError("--plot needs matplotlib: pip install visualbert[plots]")
    if args.sweep and args.workload:
        raise UsageError("--sweep has batches of its own; leave --workload out")
    for name in ("torch", REFERENCE):
        if importlib.util.find_spec(name) is None:
            get_backend(REFERENCE)  # says how to install it


def _workloads(args: argparse.Namespace) -> list[Workload]:
    device = DEVICES[args.device]
    if args.sweep:
        return list(SWEEP)
    names = _listed(args.workload, "workload", list(WORKLOADS)) or device.workloads
    batch = args.batch or device.batch
    return [
        x if x.batch == 1 else x._replace(batch=max(1, x.batch * batch // 16))
        for x in (WORKLOADS[name] for name in names)
    ]


def _implementations(args: argparse.Namespace) -> list[Implementation]:
    """What was asked for and the device can do, the reference first."""
    device = DEVICES[args.device]
    dtypes = _listed(args.dtype, "dtype", DTYPES) or device.dtypes
    backends = _listed(args.backend, "backend", BACKENDS) or BACKENDS
    able = [x for x in IMPLEMENTATIONS if args.device in x.devices]
    first = next(x for x in able if (x.backend, x.dtype) == (REFERENCE, device.reference))
    chosen = [x for x in able if x.dtype in dtypes and x.backend in (*backends, REFERENCE)]
    if not any(x.backend != REFERENCE for x in chosen):
        raise UsageError(
            f"nothing of --backend {','.join(backends)} and --dtype {','.join(dtypes)} runs on "
            f"{args.device}"
        )
    return [first, *(x for x in chosen if x != first)]


def _listed(text: str | None, option: str, known: Sequence[str]) -> list[str]:
    """The comma-separated names of an option."""
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"--{option} {name!r} is not one of {', '.join(known)}{hint}")
    return names
