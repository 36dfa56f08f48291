"""Implementations side by side: each in a process of its own, one batch a turn, A B C A B C ….

A slow spell of the machine so hits all of them; the ratios, turn by turn, are what to keep. Before
anything is timed the outputs are compared with those of transformers in float32.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visualbert.bench.inputs import make_inputs
from visualbert.bench.operations import real_tokens, useful_operations
from visualbert.bench.worker import Job, to_json
from visualbert.bench.workloads import DEVICES, REFERENCE, TOLERANCE, Implementation, Workload
from visualbert.checkpoint.initial import InitialValues
from visualbert.checkpoint.write import write_folder
from visualbert.config import VisualBertConfig
from visualbert.errors import VisualBertError

LIMIT = "products"  # in place of a backend: the machine's matrix products
LENIENCE = 4  # times what transformers is off by in a type, for another in that type
Progress = Callable[[str], object]
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_TRACEBACK_FILTERING": "off"}
_PAUSE = 0.01  # seconds between turns, for the threads of the one before to go to sleep


class BenchmarkError(VisualBertError, RuntimeError):
    """What everything is compared with cannot run here."""


class Different(Exception):
    """An implementation gives other numbers than transformers."""


class Broken(Exception):
    """A worker ended, or cannot do its work; the text says why."""


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Args:
        folder: where checkpoints and outputs go.
        size: fields of the configuration.
        device: "cpu" or "cuda".
        threads: processors for each implementation; all where None.
        runs: turns.
    """

    folder: Path
    size: Mapping[str, Any]
    device: str = "cpu"
    threads: int | None = None
    runs: int = 5

    def checkpoint(self, architecture: str) -> Path:
        """The folder of random weights, written when it is first asked for."""
        folder = self.folder / architecture
        if not folder.exists():
            config = VisualBertConfig(**self.size, architectures=(architecture,))
            folder.mkdir()
            write_folder(folder, InitialValues(architecture, config), config)
        return folder

    def start(self, role: str, implementation: Implementation, workload: Workload) -> "Worker":
        """A worker for an implementation."""
        return Worker(self.job(role, implementation, workload))

    def job(self, role: str, implementation: Implementation, workload: Workload) -> Job:
        """What a worker is told."""
        return Job(
            role,
            implementation.backend,
            implementation.dtype,
            str(self.checkpoint(workload.architecture)),
            workload,
            out=str(self.folder / f"{implementation.name}.npz"),
            options=implementation.options,
            device=self.device,
            threads=self.threads,
            calls=DEVICES[self.device].calls_of(workload),
        )


class Worker:
    """A process that plays a role (`worker.ROLES`)."""

    def __init__(self, job: Job) -> None:
        self.out = job.out
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "visualbert.bench.worker", to_json(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env={**os.environ, **_QUIET, "TMPDIR": str(Path(job.out).parent)},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )

    def hear(self) -> Any:
        """The next answer.

        Raises:
            Broken: there is none.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"failed": self.last_words()}
        if "failed" in found:
            raise Broken(found["failed"])
        return found["answer"]

    def ask(self, what: Any) -> Any:
        """The answer to `what`."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(what), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Broken(self.last_words()) from None
        return self.hear()

    def last_words(self) -> str:
        """The last line on standard error of a process that ended, and its status."""
        status = self.process.wait()
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr if line.strip()]
        return f"it ended with status {status}" + (f": {lines[-1]}" if lines else "")

    def outputs(self) -> dict[str, np.ndarray]:
        """What it left to be compared."""
        with np.load(self.out) as arrays:
            return {name: np.asarray(x, np.float32) for name, x in arrays.items()}

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


class Spread(NamedTuple):
    """Median and range."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of figures taken in turn."""
    return Spread(statistics.median(values), min(values), max(values))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """theirs / ours, turn by turn: above 1, ours is the quicker."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


@dataclass
class Row:
    """What was measured of an implementation on a workload.

    Args:
        implementation: which.
        seconds: of a batch, turn by turn; of `load`, to the first answer.
        memory: most that was held at a time, bytes.
        error: largest difference from transformers in float32 (see `compare`).
        agreement: share of examples whose highest output is the same.
        figures: what else `load` measures, turn by turn.
        failed: why it could not run.
    """

    implementation: Implementation
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    error: float | None = None
    agreement: float | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)
    failed: str = ""


@dataclass
class Result:
    """What was measured of a workload.

    Args:
        workload: which.
        tokens: word pieces and regions that are no padding.
        operations: useful ones (`operations.useful_operations`).
        rows: one for each implementation, the reference first.
        rates: operations a second of the machine's matrix products (`limit`), turn by turn, by
            type.
        device: the accelerator's name.
        size: bytes of the checkpoint's file.
    """

    workload: Workload
    tokens: int
    operations: int
    rows: list[Row]
    rates: dict[str, list[float]] = field(default_factory=dict)
    device: str = ""
    size: int = 0

    def ratio(self, row: Row) -> Spread:
        """Speed relative to the reference."""
        return paired(row.seconds, self.rows[0].seconds)

    def share(self, row: Row) -> Spread | None:
        """Of the limit: useful operations a second by those of the matrix products."""
        rates = self.rates.get(row.implementation.dtype)
        if not rates:
            return None
        return spread([self.operations / s / r for s, r in zip(row.seconds, rates, strict=True)])


def measure(
    workload: Workload, chosen: Sequence[Implementation], settings: Settings, progress: Progress
) -> Result:
    """Compare and time the implementations, the first of which is the reference.

    Raises:
        Different: one gives other numbers; nothing was timed.
        BenchmarkError: the reference cannot run.
    """
    config = VisualBertConfig(**settings.size)
    inputs = make_inputs(workload, config)
    result = Result(
        workload,
        real_tokens(workload, inputs)[0],
        useful_operations(workload, config, inputs),
        [Row(implementation) for implementation in chosen],
        size=(settings.checkpoint(workload.architecture) / "model.safetensors").stat().st_size,
    )
    take = _time_loads if workload.kind == "load" else _time_batches
    take(result, settings, progress)
    return result


def _time_batches(result: Result, settings: Settings, progress: Progress) -> None:
    workload, rows = result.workload, result.rows
    with ExitStack() as running:
        truth = _truth(result, settings, progress)
        workers = {}
        for row in rows:
            progress(f"{workload.name}: starting {row.implementation.name}")
            worker = settings.start("turns", row.implementation, workload)
            running.callback(worker.close)
            with surviving(row, rows[0], workload.name):
                worker.hear()
                truth = worker.outputs() if truth is None else truth
                _compare(row, worker.outputs(), truth, result)
                workers[row.implementation.name] = worker
        limits = {}
        for dtype in dict.fromkeys(row.implementation.dtype for row in rows if not row.failed):
            progress(f"{workload.name}: starting matrix products in {dtype}")
            limit = settings.start("limit", Implementation(LIMIT, dtype, ()), workload)
            running.callback(limit.close)
            with suppress(Broken):
                result.device = limit.hear()
                limits[dtype], result.rates[dtype] = limit, []
        for turn in range(settings.runs):
            progress(f"{workload.name}: turn {turn + 1} of {settings.runs}")
            _take_turn(result, workers, limits)
        for row in rows:
            if not row.failed:
                with surviving(row, rows[0], workload.name):
                    row.memory = workers[row.implementation.name].ask("memory")


def _take_turn(result: Result, workers: Mapping[str, Worker], limits: Mapping[str, Worker]) -> None:
    for row in result.rows:
        if not row.failed:
            with surviving(row, result.rows[0], result.workload.name):
                row.seconds.append(workers[row.implementation.name].ask("go"))
            time.sleep(_PAUSE)
    for dtype in list(limits):
        try:
            result.rates[dtype].append(limits[dtype].ask("go"))
        except Broken:
            del limits[dtype], result.rates[dtype]
        time.sleep(_PAUSE)


def _truth(result: Result, settings: Settings, progress: Progress) -> dict[str, np.ndarray] | None:
    """The outputs of transformers in float32; None where these are the reference's own."""
    reference = result.rows[0].implementation
    if reference.dtype == "float32":
        return None
    exact = reference._replace(dtype="float32")
    progress(f"{result.workload.name}: {exact.name}, to compare with")
    with closing(settings.start("turns", exact, result.workload)) as worker:
        try:
            worker.hear()
            return worker.outputs()
        except Broken as error:
            raise _unmeasurable(exact, result.workload.name, error) from None


def _time_loads(result: Result, settings: Settings, progress: Progress) -> None:
    """In fresh processes; the first turn is to compare, and brings the file into the disk's
    cache.
    """
    rows, workload, truth = result.rows, result.workload, None
    for turn in range(settings.runs + 1):
        for row in rows:
            if row.failed:
                continue
            progress(f"load: turn {turn} of {settings.runs}, {row.implementation.name}")
            with surviving(row, rows[0], workload.name):
                found, outputs = _load_once(row, workload, settings)
                if turn == 0:
                    truth = outputs if truth is None else truth
                    _compare(row, outputs, truth, result)
                    continue
                row.seconds.append(found.pop("answer"))
                for name, value in found.items():
                    row.figures.setdefault(name, []).append(value)
    for row in rows:
        memory = [x for x in row.figures.pop("memory", []) if x is not None]
        row.memory = int(statistics.median(memory)) if memory else None


def _load_once(row: Row, workload: Workload, settings: Settings) -> tuple[dict[str, Any], Any]:
    """Figures of a load and, for ours, of its parts; and the first answer."""
    with closing(settings.start("first", row.implementation, workload)) as worker:
        found, outputs = worker.hear(), worker.outputs()
    if row.implementation.backend != REFERENCE:
        with closing(settings.start("parts", row.implementation, workload)) as worker:
            found |= worker.hear()
    return found, outputs


@contextmanager
def surviving(row: Row, reference: Row, where: str) -> Iterator[None]:
    """A worker that breaks is a row that says why; without the reference there is no result."""
    try:
        yield
    except Broken as error:
        if row is reference:
            raise _unmeasurable(row.implementation, where, error) from None
        row.failed = str(error)


def _unmeasurable(implementation: Implementation, where: str, error: Broken) -> BenchmarkError:
    return BenchmarkError(
        f"{implementation.name}, with which all is compared, cannot run {where}: {error}"
    )


def _compare(
    row: Row, found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], result: Result
) -> None:
    """Note how far a row is from the truth, and refuse to time one that gives other numbers."""
    relative = result.workload.kind == "step"
    name, row.error = compare(found, truth, relative)
    if not relative:
        row.agreement = agreement(found, truth)
    most = _tolerance(row, result.rows[0])
    if not row.error <= most:
        way = " of its largest value" if relative else ""
        raise Different(
            f"{row.implementation.name} on {result.workload.name}: {name} differs from "
            f"transformers by {row.error:.1e}{way}, expected at most {most:.1e}; nothing was timed"
        )


def _tolerance(row: Row, reference: Row) -> float:
    """In float32 `TOLERANCE`; in another type a multiple of what transformers itself is off by in
    that type, where it is the reference.
    """
    dtype = row.implementation.dtype
    if dtype == "float32":
        return TOLERANCE
    same = reference.implementation.dtype == dtype and row is not reference
    return LENIENCE * (reference.error or 0.0) if same else float("inf")


def compare(
    found: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], relative: bool
) -> tuple[str, float]:
    """The array, of those that both have, that differs most, and by how much; infinitely where it
    has another shape or is not a number.

    Args:
        found: outputs by name.
        want: those of transformers.
        relative: by the largest value of each array, as losses and gradients are compared.
    """
    errors = {"nothing": float("inf")} if not found.keys() & want.keys() else {}
    for name in sorted(found.keys() & want.keys()):
        x, y = found[name], want[name]
        error = float(np.abs(x - y).max()) if x.shape == y.shape else float("inf")
        errors[name] = float("inf") if np.isnan(error) else error
        if relative:
            errors[name] /= float(np.abs(y).max())
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]


def agreement(found: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> float:
    """The share of examples whose highest logit is the same."""
    best = [outputs["logits"].argmax(-1) for outputs in (found, want)]
    return float((best[0] == best[1]).mean())
