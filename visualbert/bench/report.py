"""What was measured, as tables and as JSON."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from visualbert.bench.run import Result, Row, Settings, Spread, paired, spread
from visualbert.bench.sweep import Sweep
from visualbert.bench.workloads import REFERENCE, Lengths, Workload
from visualbert.cli.common import table

_PACKAGES = (
    "visualbert", "torch", "tensorflow", "tensorflow_cpu", "keras", "jax", "flax", "transformers",
    "numpy",
)  # fmt: skip
_FAILED = "[dim]cannot run here[/dim]"
_FLAT = 200  # real tokens from which on the cost of one is compared
_LONG = 2  # times the second call, from which on a first call is counted


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures belong to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": settings.threads or cores,
        "device": settings.device,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        **{package: found for package in _PACKAGES if (found := _version(package))},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def show_machine(found: Mapping[str, Any], out: Any) -> None:
    """Print it, and what the tables mean."""
    packages = ", ".join(f"{name} {found[name]}" for name in _PACKAGES if name in found)
    out.print(
        f"{found['processor']}, {found['cores']} cores, {found['threads']} threads, load "
        f"{found['load']} before the start, {found['system']}, Python {found['python']}"
    )
    out.print(packages)
    out.print(
        "difference: the largest from transformers in float32, of outputs; of the loss and of "
        "gradients, by their largest value"
    )


def show_result(result: Result, out: Any) -> None:
    """Print the table of a workload."""
    out.print(f"\n[bold]{result.workload.name}[/bold]  {describe(result)}")
    out.print((_loads if result.workload.kind == "load" else _batches)(result))
    _show_failed(result.rows, out)


def describe(result: Result) -> str:
    """The batch in words."""
    workload = result.workload
    choices = f" × {workload.choices} choices" if workload.choices > 1 else ""
    doing = {"call": "", "step": ", one optimizer step", "load": ", from the file"}[workload.kind]
    return (
        f"{workload.architecture}{doing}: {workload.batch}{choices} × "
        f"({_lengths(workload.text)} tokens + {_lengths(workload.regions)} regions), "
        f"{result.tokens:,} real"
    )


def _lengths(lengths: Lengths) -> str:
    if lengths.low == lengths.high == lengths.padded:
        return str(lengths.padded)
    return f"{lengths.low}–{lengths.high} of {lengths.padded}"


def _batches(result: Result) -> Any:
    columns = ("ms", "speed / transformers", "of the limit", "peak memory", "difference", "top-1")
    made = table("", *columns, right=("ms", "peak memory", "difference", "top-1"))
    for row in result.rows:
        if row.failed:
            made.add_row(row.implementation.name, "", _FAILED)
            continue
        made.add_row(
            row.implementation.name,
            _number(1000 * spread(row.seconds).median),
            ranged(result.ratio(row)),
            _percent(result.share(row)),
            "" if row.memory is None else f"{row.memory / 1e6:,.0f} MB",
            f"{row.error:.1e}",
            "" if row.agreement is None else f"{row.agreement:.1%}",
        )
    for dtype, rates in result.rates.items():
        rate = f"{spread(rates).median / 1e9:,.0f} GFLOP/s"
        made.add_row(f"[dim]matrix products {dtype}[/dim]", "", "", f"[dim]{rate}[/dim]")
    return made


def _loads(result: Result) -> Any:
    made = table(
        "", "first answer, s", "speed / transformers", "load alone, s", "speed / transformers",
        "peak / file", "making layers, s", "copying the file, s", "difference",
        right=("difference",),
    )  # fmt: skip
    reference = result.rows[0]
    for row in result.rows:
        if row.failed:
            made.add_row(row.implementation.name, "", _FAILED)
            continue
        parts = (row.figures.get(name) for name in ("layers", "copy"))
        made.add_row(
            row.implementation.name,
            _number(spread(row.seconds).median),
            ranged(result.ratio(row)),
            _number(spread(row.figures["load"]).median),
            ranged(paired(row.figures["load"], reference.figures["load"])),
            "" if row.memory is None else f"{row.memory / result.size:.2f}",
            *("" if times is None else _number(spread(times).median) for times in parts),
            f"{row.error:.1e}",
        )
    return made


def _show_failed(rows: Sequence[Row], out: Any) -> None:
    from rich.markup import escape

    from visualbert.cli.common import worded

    for row in rows:
        if row.failed:
            reason = escape(" ".join(worded(row.failed).split()))
            out.print(f"{row.implementation.name} cannot run here: {reason}", soft_wrap=True)


def ranged(found: Spread) -> str:
    """1.23 (1.20–1.25)."""
    return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"


def _percent(found: Spread | None) -> str:
    return "" if found is None else f"{found.median:.0%} ({found.low:.0%}–{found.high:.0%})"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def show_sweep(sweep: Sweep, out: Any) -> None:
    """Print what a real token costs, and what a new shape does."""
    made = table("", "µs a real token", "speed / transformers", "long first calls", "the worst", "")
    reference = sweep.rows[0].implementation.name
    for row in sweep.rows:
        name = row.implementation.name
        points = [p for p in sweep.points if name in p.second]
        if row.failed or not points:
            made.add_row(name, "", _FAILED)
            continue
        large = [p for p in points if p.tokens >= _FLAT] or points
        costs = spread([1e6 * p.second[name] / p.tokens for p in large])
        news = {p.workload.name: p.first[name] / p.second[name] for p in points}
        worst = max(news, key=lambda x: news[x])
        made.add_row(
            name,
            f"{costs.median:.0f} ({costs.low:.0f}–{costs.high:.0f})",
            ranged(spread([p.second[reference] / p.second[name] for p in points])),
            str(sum(new > _LONG for new in news.values())),
            f"{news[worst]:.1f} times",
            worst,
        )
    out.print(
        f"\n{len(sweep.points)} batches; tokens from {_FLAT} in a batch on; a first call is long "
        f"if it takes more than {_LONG} times the second",
        soft_wrap=True,
    )
    out.print(made)
    _show_failed(sweep.rows, out)


def results_as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Every figure, turn by turn, and what the tables show."""
    workloads = {
        result.workload.name: {
            **_sizes(result.workload),
            "architecture": result.workload.architecture,
            "real_tokens": result.tokens,
            "useful_operations": result.operations,
            "file_bytes": result.size,
            "limit": result.rates,
            "rows": [_row(result, row) for row in result.rows],
        }
        for result in results
    }
    devices = [result.device for result in results if result.device]
    named = {"accelerator": devices[0]} if devices else {}
    return {**named, "reference": REFERENCE, "workloads": workloads}


def _sizes(workload: Workload) -> dict[str, Any]:
    return {
        "kind": workload.kind,
        "batch": workload.batch,
        "choices": workload.choices,
        "text": workload.text._asdict(),
        "regions": workload.regions._asdict(),
    }


def _row(result: Result, row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "backend": row.implementation.backend,
        "dtype": row.implementation.dtype,
    }
    if row.failed:
        return {**values, "failed": row.failed}
    share = result.share(row)
    return {
        **values,
        "seconds": row.seconds,
        "ratio": result.ratio(row)._asdict(),
        "share_of_limit": None if share is None else share._asdict(),
        "peak_memory": row.memory,
        "difference": row.error,
        "top1_agreement": row.agreement,
        **row.figures,
    }


def sweep_as_json(sweep: Sweep) -> dict[str, Any]:
    """Every point."""
    return {
        "failed": {row.implementation.name: row.failed for row in sweep.rows if row.failed},
        "points": [
            {
                "name": point.workload.name,
                **_sizes(point.workload),
                "real_tokens": point.tokens,
                "padded_tokens": point.padded,
                "first": point.first,
                "second": point.second,
            }
            for point in sweep.points
        ],
    }
