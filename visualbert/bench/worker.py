"""One implementation in a process of its own: `python -m visualbert.bench.worker JOB`.

It does what it is told, a line of JSON on standard input at a time, and answers each with a line of
JSON on standard output, the first one when it is ready. It ends with its input, so nothing is left
behind by a parent that was killed.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from visualbert.backend import get_backend
from visualbert.bench import engines
from visualbert.bench.inputs import make_inputs
from visualbert.bench.limit import Limit
from visualbert.bench.operations import real_tokens
from visualbert.bench.workloads import Workload, read_workload
from visualbert.config import VisualBertConfig
from visualbert.errors import VisualBertError


@dataclass(frozen=True)
class Job:
    """What a worker is told when it starts.

    Args:
        role: a name in `ROLES`.
        backend, dtype, options: as in `workloads.Implementation`.
        folder: the checkpoint.
        workload: the batch.
        out: the `.npz` in which outputs are left to be compared.
        device: "cpu" or "cuda".
        threads: processors to be used; all where None.
        calls: batches in a turn.
    """

    role: str
    backend: str
    dtype: str
    folder: str
    workload: Workload
    out: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    calls: int = 1

    @property
    def config(self) -> VisualBertConfig:
        """The checkpoint's."""
        return VisualBertConfig.from_pretrained(self.folder)

    def load(self) -> Any:
        """The model."""
        return engines.load_model(
            self.backend, self.folder, self.workload, self.dtype, self.options, self.device
        )


def take_turns(job: Job, told: Iterator[Any]) -> Iterator[Any]:
    """Seconds of one batch, turn by turn; told "memory", the most that was held at a time.

    That is what the process holds for the model and the batch: beyond the imported framework, from
    the loaded model on. On CUDA it is what PyTorch has allocated.
    """
    inputs = make_inputs(job.workload, job.config)
    get_backend(job.backend)
    memory = Memory(job.device)
    model = job.load()
    memory.forget()
    run: Any
    if job.workload.kind == "step":
        run = engines.make_step(job.backend, model, job.workload, inputs)
        leave(job, run.check())
    else:
        run = engines.make_caller(job.backend, model, job.workload, job.dtype)(inputs)
        leave(job, run())
    del model
    run()
    yield "ready"
    for what in told:
        if what == "memory":
            yield memory.peak()
            continue
        if job.workload.kind == "call":
            run()
        yield timed(run, job.calls)


def answer_first(job: Job, told: Iterator[Any]) -> Iterator[Any]:
    """Seconds to load and to the first answer, and peak memory above the start in bytes."""
    inputs = make_inputs(job.workload, job.config)
    get_backend(job.backend)
    memory = Memory(job.device)
    memory.forget()
    start = time.perf_counter()
    model = job.load()
    loaded = time.perf_counter() - start
    found = engines.first_call(job.backend, model, job.workload, inputs)()
    answered = time.perf_counter() - start
    peak = memory.peak()
    leave(job, found)
    yield {"load": loaded, "answer": answered, "memory": peak}


def do_parts(job: Job, told: Iterator[Any]) -> Iterator[Any]:
    """What no load can do without where weights lie transposed: the seconds to make the layers
    without values, and to copy the file's bytes to fresh memory.
    """
    backend, config = get_backend(job.backend), job.config
    start = time.perf_counter()
    model = backend.create(job.workload.architecture, config)
    made = time.perf_counter() - start
    start = time.perf_counter()
    copy = np.array(np.memmap(Path(job.folder) / "model.safetensors"))
    copied = time.perf_counter() - start
    yield {"layers": made, "copy": copied}
    del model, copy


def multiply(job: Job, told: Iterator[Any]) -> Iterator[Any]:
    """Operations a second of the machine's matrix products, turn by turn."""
    inputs = make_inputs(job.workload, job.config)
    limit = Limit(job.config, *real_tokens(job.workload, inputs), job.device, job.dtype)
    limit()
    yield engines.accelerator(job.device)
    for _ in told:
        if job.workload.kind == "call":
            limit()
        yield float(np.mean([limit() for _ in range(job.calls)]))


def sweep(job: Job, told: Iterator[Any]) -> Iterator[Any]:
    """For each workload that it is told, seconds of the first call and of the second."""
    model, config = job.load(), job.config
    caller = engines.make_caller(job.backend, model, job.workload, job.dtype)
    caller(make_inputs(job.workload, config))()
    yield "ready"
    for values in told:
        call = caller(make_inputs(read_workload(values), config))
        answer = {"first": timed(call, 1), "second": timed(call, 1)}
        leave(job, call())
        yield answer


ROLES: dict[str, Callable[[Job, Iterator[Any]], Iterator[Any]]] = {
    "turns": take_turns,
    "first": answer_first,
    "parts": do_parts,
    "limit": multiply,
    "sweep": sweep,
}


def leave(job: Job, outputs: Mapping[str, Any]) -> None:
    """Outputs for the parent to compare, in float32, as numpy writes no bfloat16."""
    arrays: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in outputs.items()}
    with open(job.out, "wb") as file:
        np.savez(file, **arrays)


def timed(run: Callable[[], Any], calls: int) -> float:
    """Seconds of one of several calls; each waits for its result."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


class Memory:
    """The most memory that is held at a time beyond the level at the beginning, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = _status("VmRSS")

    def forget(self) -> None:
        """Count the peak from here on."""
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif self.before is not None:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        """None where the system does not tell."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        peak = _status("VmHWM")
        return None if peak is None or self.before is None else peak - self.before


def _status(key: str) -> int | None:
    """A number of this process's that Linux keeps."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def use_threads(count: int | None) -> None:
    """Compute on so many processors: the frameworks make a thread for each that they may use."""
    if count is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def main(text: str, answers: TextIO) -> None:
    """Play the role, and answer; what the package refuses is one sentence."""
    values = json.loads(text)
    job = Job(**values | {"workload": read_workload(values["workload"])})
    use_threads(job.threads)
    told = (json.loads(line) for line in sys.stdin)
    try:
        for answer in ROLES[job.role](job, told):
            print(json.dumps({"answer": answer}), file=answers, flush=True)
    except (VisualBertError, ImportError) as error:
        print(json.dumps({"failed": str(error)}), file=answers, flush=True)


def to_json(job: Job) -> str:
    """A job as `main` reads it."""
    return json.dumps(asdict(job) | {"workload": job.workload})


if __name__ == "__main__":
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    main(sys.argv[1], kept)
