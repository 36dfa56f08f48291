"""How far each type is from float32: accuracy, the share of equal first choices, and the logits.

Two models: the package's own checkpoint on questions about scenes that training never saw, and one
of base size, drawn at random, on random inputs. The reference is the first framework in float32.

    python tools/measure_precision.py [--scenes 500] [--seed 77] [--examples 256]
        [--backends pt,tf,flax] [--dtypes float32,bfloat16,float16,int8]
    python tools/measure_precision.py --products    the speed of PyTorch's int8 products instead
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from measure_embedded import look

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
COLUMNS = ("accuracy", "same first choice", "worst logit", "mean logit")
DTYPES = ("float32", "bfloat16", "float16", "int8")
BATCH = 32
ANSWERS, FEATURES, TEXT, REGIONS = 3129, 2048, 20, 36  # of the random model: VQA 2.0's

Arrays = Mapping[str, object]


class Task(NamedTuple):
    """A checkpoint, batches for it, and the right labels where there are any."""

    name: str
    source: str
    batches: Sequence[Arrays]
    right: np.ndarray | None


class Agreement(NamedTuple):
    """How (N, L) logits compare with a reference."""

    top1: float  # share of equal first choices
    worst: float  # largest difference of a logit
    mean: float


def compare(logits: np.ndarray, reference: np.ndarray) -> Agreement:
    """How `logits` (N, L) agree with `reference`."""
    error = np.abs(logits - reference)
    same = logits.argmax(1) == reference.argmax(1)
    return Agreement(float(same.mean()), float(error.max()), float(error.mean()))


def run(backend: str, dtype: str, task: Task) -> np.ndarray:
    """(N, L) logits in float64."""
    import visualbert

    model = visualbert.load(task.source, backend, dtype=dtype)
    predict = visualbert.get_backend(backend).predictor(model)
    return np.concatenate([predict(x)["logits"].astype(np.float64) for x in task.batches])


def embedded_task(scenes: int, seed: int) -> Task:
    """Questions about scenes with handwriting that training never saw, from their pixels."""
    import visualbert
    from visualbert.answering import embedded

    with ProcessPoolExecutor(os.cpu_count()) as pool:
        seen = list(pool.map(look, range(scenes), [seed] * scenes, chunksize=20))
    asked = [(q, regions) for regions, questions in seen for q in questions]
    pipeline = visualbert.pipeline("vqa")
    batches = []
    for at in range(0, len(asked), BATCH):
        questions, regions = zip(*asked[at : at + BATCH], strict=True)
        batches.append(dict(pipeline.processor([q.text for q in questions], regions=regions)))
    right = np.array([pipeline.answers.index(q.answer) for q, _ in asked])
    return Task(f"own checkpoint, {len(asked)} questions", str(embedded()), batches, right)


def random_task(examples: int, seed: int, folder: str) -> Task:
    """A model of base size with initial weights, saved to `folder`, and random inputs."""
    import visualbert

    config = visualbert.VisualBertConfig(visual_embedding_dim=FEATURES, num_labels=ANSWERS)
    visualbert.VisualBertForQuestionAnswering(config, seed=seed).save_pretrained(folder)
    rng = np.random.default_rng(seed)
    batches = [
        {
            "input_ids": rng.integers(1, config.vocab_size, (BATCH, TEXT)),
            "visual_embeds": rng.standard_normal((BATCH, REGIONS, FEATURES)).astype(np.float32),
        }
        for _ in range(0, examples, BATCH)
    ]
    return Task(f"base size, random, {len(batches) * BATCH} examples", folder, batches, None)


def rows(
    task: Task, reference: np.ndarray, backends: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """What is printed of each framework and type."""
    for backend, dtype in itertools.product(backends, dtypes):
        if dtype == "int8" and backend != "pt":
            continue
        logits = run(backend, dtype, task)
        top1, worst, mean = compare(logits, reference)
        right = "" if task.right is None else f"{(logits.argmax(1) == task.right).mean():.2%}"
        yield backend, dtype, right, f"{top1:.2%}", f"{worst:.1e}", f"{mean:.1e}"


def linear_dynamic(layer: Any) -> Callable[[Any], Any]:
    """PyTorch's older way, which is deprecated: one scale for all activations."""
    import torch

    weight = layer.weight
    scale = weight.abs().amax(1).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    rounded = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
    packed: Any = torch.ops.quantized.linear_prepack(rounded, layer.bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def torchao(layer: Any) -> Callable[[Any], Any]:
    """torchao's dynamic int8, where it is installed."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = torch.nn.Sequential(layer)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def int_mm(layer: Any) -> Callable[[Any], Any]:
    """`torch._int_mm` between the roundings of `QuantizedLinear`."""
    import torch

    scale = layer.weight.abs().amax(1) / 127
    weight = (layer.weight / scale[:, None]).round().to(torch.int8).t().contiguous()

    def call(x: Any) -> Any:
        largest = x.abs().amax(1, keepdim=True)
        rounded = (x * (127 / largest)).round_().to(torch.int8)
        product = torch._int_mm(rounded, weight).float().mul_(scale / 127)
        return torch.addcmul(layer.bias, product, largest)

    return call


def onednn(layer: Any) -> Callable[[Any], Any]:
    """`QuantizedLinear`."""
    from visualbert.pt.quantized import QuantizedLinear

    return QuantizedLinear.of(layer)


def packed(layer: Any) -> Callable[[Any], Any]:
    """float32 as a predictor computes it."""
    from visualbert.pt.predictor import PrepackedLinear

    return PrepackedLinear(layer)


WAYS: Mapping[str, Callable[[Any], Callable[[Any], Any]]] = {
    "float32": lambda layer: layer,
    "float32, packed": packed,
    "torchao": torchao,
    "linear_dynamic": linear_dynamic,
    "_int_mm": int_mm,
    "QuantizedLinear": onednn,
}
SHAPES = tuple(
    (rows, *shape)
    for rows in (56, 1120)
    for shape in ((768, 768), (768, 3072), (3072, 768), (2048, 768))
)


def rates(rows: int, inner: int, outer: int) -> dict[str, str]:
    """Of each way to multiply, thousands of millions of operations in a second of this thread's
    processor time: the first quartile of twenty rounds.
    """
    import torch

    x, calls = torch.randn(rows, inner), {}
    for name, make in WAYS.items():
        with contextlib.suppress(ImportError, AttributeError, RuntimeError):
            calls[name] = make(torch.nn.Linear(inner, outer))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(20), calls.items()):
        start = time.thread_time()
        call(x)
        times[name].append(time.thread_time() - start)
    operations = 2 * rows * inner * outer
    return {name: f"{operations / sorted(t)[5] / 1e9:.0f}" for name, t in times.items()}


def print_products() -> None:
    """The table of `WAYS` and `SHAPES`."""
    import torch

    from visualbert.cli.common import console, table

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        found = {f"{m} × {k} → {n}": rates(m, k, n) for m, k, n in SHAPES}
    made = table("GOP/s, one thread", *found, right=tuple(found))
    for way in WAYS:
        made.add_row(way, *(rate.get(way, "–") for rate in found.values()))
    console().print(made)


def main() -> None:
    """Measure, print."""
    from visualbert.cli.common import console, table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--backends", default="pt,tf,flax")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--products", action="store_true")
    args = parser.parse_args()
    if args.products:
        print_products()
        return
    backends, dtypes = args.backends.split(","), args.dtypes.split(",")
    with tempfile.TemporaryDirectory() as folder:
        for task in (
            embedded_task(args.scenes, args.seed),
            random_task(args.examples, args.seed, folder),
        ):
            reference = run(backends[0], "float32", task)
            made = table("", "type", *COLUMNS, right=COLUMNS)
            for row in rows(task, reference, backends, dtypes):
                made.add_row(*row)
            console().print(f"{task.name}; standard deviation of the logits {reference.std():.2f}")
            console().print(made)


if __name__ == "__main__":
    main()
