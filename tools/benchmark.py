"""Speed and memory against transformers' VisualBertModel on this machine.

Each implementation lives in a process of its own and does one batch when it is its turn: A B C A B
C …, so that a slow spell of the machine hits all of them. Before anything is timed the outputs are
compared. Loading is measured in fresh processes, also in turn, with the file in the disk cache.
Absolute times mean little on a shared machine; the ratios to transformers are what to keep.

    python tools/benchmark.py [--runs 9] [--batch 8] [--text 20] [--regions 36] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = "transformers"
IMPLEMENTATIONS = (REFERENCE, "pt", "tf", "flax")
HOW = {
    REFERENCE: "eager",
    "pt": "eager",
    "tf": "tf.function",
    "flax": "nnx.jit",
}
BASE = {"visual_embedding_dim": 2048}


def make_inputs(batch: int, text: int, regions: int) -> dict[str, np.ndarray]:
    """A full batch: no padding, every mask given."""
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(1000, 30000, (batch, text)),
        "attention_mask": np.ones((batch, text), np.int64),
        "token_type_ids": np.zeros((batch, text), np.int64),
        "visual_embeds": rng.standard_normal((batch, regions, 2048)).astype(np.float32),
        "visual_attention_mask": np.ones((batch, regions), np.int64),
        "visual_token_type_ids": np.zeros((batch, regions), np.int64),
    }


def import_framework(name: str) -> None:
    """What a program has imported before it loads a model."""
    if name == "tf":
        import visualbert.tf
    elif name == "flax":
        import visualbert.flax
    elif name == REFERENCE:
        from transformers import VisualBertModel  # noqa: F401
    else:
        import visualbert.pt  # noqa: F401


def load_model(name: str, folder: str) -> Any:
    """The model as a user of `name` loads it."""
    if name == REFERENCE:
        from transformers import VisualBertModel

        return VisualBertModel.from_pretrained(folder).eval()
    from visualbert import load

    return load(folder, name)


def make_call(name: str, model: Any, inputs: dict[str, np.ndarray]) -> Any:
    """A function that runs one batch to the end and gives the last hidden state."""
    if name in (REFERENCE, "pt"):
        import torch

        tensors = {key: torch.as_tensor(x) for key, x in inputs.items()}

        def torch_call() -> np.ndarray:
            with torch.inference_mode():
                return model(**tensors).last_hidden_state.numpy()

        return torch_call
    if name == "tf":
        import tensorflow as tf

        arrays = {key: tf.constant(x) for key, x in inputs.items()}
        function = tf.function(lambda batch: model(**batch).last_hidden_state)
        return lambda: function(arrays).numpy()
    import jax.numpy as jnp
    from flax import nnx

    batch = {key: jnp.asarray(x) for key, x in inputs.items()}
    run = nnx.jit(lambda model, batch: model(**batch).last_hidden_state)
    return lambda: np.asarray(run(model, batch))


def worker(name: str, folder: str, sizes: list[int]) -> None:
    """Load, answer the first line with the output's file, then time one batch a line."""
    call = make_call(name, load_model(name, folder), make_inputs(*sizes))
    path = Path(folder) / f"{name}.npy"
    np.save(path, call())
    call()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)


def measure_load(name: str, folder: str, sizes: list[int]) -> None:
    """Print seconds to load, seconds to the first output, and peak memory above the start in
    bytes.
    """
    import_framework(name)
    inputs = make_inputs(*sizes)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    start = time.perf_counter()
    model = load_model(name, folder)
    loaded = time.perf_counter() - start
    peak = _status("VmHWM") - before
    start_first = time.perf_counter()
    make_first(name, model, inputs)()
    first = loaded + time.perf_counter() - start_first
    print(json.dumps([loaded, first, peak]), flush=True)


def measure_parts(name: str, folder: str, sizes: list[int]) -> None:
    """Print what no load can do without where weights lie transposed: the seconds to make the
    layers without values, and to copy the file's bytes to fresh memory.
    """
    import_framework(name)
    from visualbert import VisualBertConfig, get_backend

    backend, config = get_backend(name), VisualBertConfig.from_pretrained(folder)
    start = time.perf_counter()
    model = backend.create("VisualBertModel", config)
    made = time.perf_counter() - start
    start = time.perf_counter()
    copy = np.array(np.memmap(Path(folder) / "model.safetensors"))
    copied = time.perf_counter() - start
    print(json.dumps([made, copied]), flush=True)
    del model, copy


def make_first(name: str, model: Any, inputs: dict[str, np.ndarray]) -> Any:
    """The quickest way to one output: compiling a `tf.function` takes longer than one batch, and
    Flax's operations one by one take longer to compile than all together.
    """
    if name == "tf":
        return lambda: np.asarray(model(**inputs).last_hidden_state)
    return make_call(name, model, inputs)


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def start(role: str, name: str, folder: str, sizes: list[int]) -> subprocess.Popen[str]:
    """A process that plays `role` for the implementation `name`."""
    arguments = [sys.executable, __file__, "--role", role, name, folder, *map(str, sizes)]
    return subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def time_batches(folder: str, sizes: list[int], runs: int) -> dict[str, list[float]]:
    """Seconds of each batch, by implementation, taken in turn."""
    workers = {name: start("worker", name, folder, sizes) for name in IMPLEMENTATIONS}
    for name, process in workers.items():
        if _line(process) != "ready":
            sys.exit(f"{name} did not start")
    want = np.load(Path(folder) / f"{REFERENCE}.npy")
    for name in IMPLEMENTATIONS[1:]:
        error = np.abs(np.load(Path(folder) / f"{name}.npy") - want).max()
        print(f"{name}: largest difference from transformers {error:.1e}")
        if error > 1e-4:
            sys.exit(f"{name} gives other numbers; nothing was timed")
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(runs):
        for name, process in workers.items():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[name].append(float(_line(process)))
    for process in workers.values():
        process.kill()
    return seconds


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def time_fresh(
    role: str, names: Sequence[str], folder: str, sizes: list[int], runs: int
) -> dict[str, list[list[float]]]:
    """What fresh processes that play `role` print, by implementation, taken in turn."""
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            process = start(role, name, folder, sizes)
            found[name].append(json.loads(_line(process)))
            process.wait()
    return found


def paired(a: Sequence[float], b: Sequence[float]) -> str:
    """Median and range of b / a, turn by turn: above 1, a is the faster."""
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


def report(batches: Any, loads: Any, parts: Any, file_bytes: int) -> None:
    """Print the tables."""
    from visualbert.cli.common import console, table

    out = console()
    made = table("", "how", "ms a batch", "speed / transformers", right=("ms a batch",))
    for name in IMPLEMENTATIONS:
        median = statistics.median(batches[name]) * 1000
        made.add_row(name, HOW[name], f"{median:.0f}", paired(batches[name], batches[REFERENCE]))
    out.print(made)
    made = table(
        "", "load, s", "speed / transformers", "load to first output, s", "speed / transformers",
        "peak / file",
    )  # fmt: skip
    for name in IMPLEMENTATIONS:
        columns = list(zip(*loads[name], strict=True))
        reference = list(zip(*loads[REFERENCE], strict=True))
        made.add_row(
            name,
            f"{statistics.median(columns[0]):.2f}",
            paired(columns[0], reference[0]),
            f"{statistics.median(columns[1]):.2f}",
            paired(columns[1], reference[1]),
            f"{statistics.median(columns[2]) / file_bytes:.2f}",
        )
    out.print(made)
    made = table("parts of a load", "the layers alone, s", "the file's bytes copied once, s")
    for name, rows in parts.items():
        made.add_row(
            name, *(f"{statistics.median(column):.2f}" for column in zip(*rows, strict=True))
        )
    out.print(made)


def main() -> None:
    """Make a base-size checkpoint, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--text", type=int, default=20)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    sizes = [args.batch, args.text, args.regions]
    from visualbert import VisualBertConfig
    from visualbert.checkpoint.initial import InitialValues
    from visualbert.checkpoint.write import write_folder

    with tempfile.TemporaryDirectory(prefix="visualbert-bench-") as folder:
        config = VisualBertConfig(**BASE, architectures=("VisualBertModel",))
        write_folder(folder, InitialValues("VisualBertModel", config), config)
        file_bytes = (Path(folder) / "model.safetensors").stat().st_size
        packages = ("torch", "tensorflow_cpu", "jax", "flax", "transformers")
        versions = ", ".join(f"{p} {version(p)}" for p in packages)
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(versions)
        print(f"batch {args.batch} × ({args.text} tokens + {args.regions} regions), float32, base")
        batches = time_batches(folder, sizes, args.runs)
        loads = time_fresh("load", IMPLEMENTATIONS, folder, sizes, min(args.runs, 5))
        parts = time_fresh("parts", ("tf", "flax"), folder, sizes, min(args.runs, 5))
    report(batches, loads, parts, file_bytes)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"batches": batches, "loads": loads, "parts": parts}, indent=2)
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        role, name, folder, *numbers = sys.argv[2:]
        roles = {"worker": worker, "load": measure_load, "parts": measure_parts}
        roles[role](name, folder, [int(n) for n in numbers])
    else:
        main()
