"""Cost against real tokens: batches of many sizes, none of which a model has seen before.

Each implementation stays in a process of its own; they take turns at every batch. The first call is
told apart from the second, so that a cliff at new shapes shows.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from visualbert.bench.inputs import make_inputs
from visualbert.bench.operations import real_tokens
from visualbert.bench.run import Different, Progress, Row, Settings, Worker, compare, surviving
from visualbert.bench.workloads import TOLERANCE, WORKLOADS, Implementation, Workload
from visualbert.config import VisualBertConfig


@dataclass
class Point:
    """One batch.

    Args:
        workload: its sizes.
        tokens: word pieces and regions that are no padding.
        padded: the same with padding.
        first, second: seconds of the first and of the second call, by implementation.
    """

    workload: Workload
    tokens: int
    padded: int
    first: dict[str, float] = field(default_factory=dict)
    second: dict[str, float] = field(default_factory=dict)


@dataclass
class Sweep:
    """Every batch, and a row for each implementation that says whether it could go on."""

    rows: list[Row]
    points: list[Point] = field(default_factory=list)


def run_sweep(
    chosen: Sequence[Implementation],
    workloads: Sequence[Workload],
    settings: Settings,
    progress: Progress,
) -> Sweep:
    """Time the implementations, the first of which is the reference, on every workload.

    Raises:
        Different: one in float32 gives other numbers than a reference in float32.
        BenchmarkError: the reference cannot run.
    """
    config = VisualBertConfig(**settings.size)
    found = Sweep([Row(implementation) for implementation in chosen])
    with ExitStack() as running:
        workers = {}
        for row in found.rows:
            progress(f"sweep: starting {row.implementation.name}")
            worker = settings.start("sweep", row.implementation, WORKLOADS["single"])
            running.callback(worker.close)
            with surviving(row, found.rows[0], "the sweep"):
                worker.hear()
                workers[row.implementation.name] = worker
        for number, workload in enumerate(workloads):
            progress(f"sweep: {number + 1} of {len(workloads)}, {workload.name}")
            tokens, _ = real_tokens(workload, make_inputs(workload, config))
            padded = workload.batch * (workload.text.padded + workload.regions.padded)
            found.points.append(Point(workload, tokens, padded))
            _visit(found, workers)
    return found


def _visit(found: Sweep, workers: Mapping[str, Worker]) -> None:
    """Let everyone take its turn at the last point."""
    point, reference = found.points[-1], found.rows[0]
    truth: Any = None
    for row in found.rows:
        if row.failed:
            continue
        name = row.implementation.name
        with surviving(row, reference, point.workload.name):
            seconds = workers[name].ask(point.workload)
            point.first[name], point.second[name] = seconds["first"], seconds["second"]
            if reference.implementation.dtype == row.implementation.dtype == "float32":
                truth = workers[name].outputs() if row is reference else truth
                _check(name, point, workers[name].outputs(), truth)


def _check(name: str, point: Point, found: Any, truth: Any) -> None:
    array, error = compare(found, truth, relative=False)
    if not error <= TOLERANCE:
        raise Different(
            f"{name} on {point.workload.name}: {array} differs from transformers by {error:.1e}, "
            f"expected at most {TOLERANCE:.1e}"
        )
