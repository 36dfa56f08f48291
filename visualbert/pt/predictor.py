"""Calling a PyTorch model many times: query, key and value in one product; on a CPU weights laid
out once for the matrix unit, the activation inside of the product; on a GPU small batches as CUDA
graphs.

The model itself is not changed. A predictor keeps the weights of the moment it was made.
"""

import copy
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visualbert.backend import flatten_outputs
from visualbert.buckets import Buckets, Fitted
from visualbert.inputs.contract import check_batch
from visualbert.packing import plan_batch
from visualbert.pt.convert import from_numpy, to_numpy
from visualbert.pt.modeling import Intermediate, Linear, choose
from visualbert.pt.products import multiply
from visualbert.pt.quantized import QuantizedLinear

GRAPH_POSITIONS = 512  # a larger batch keeps a GPU busy without a graph
GRAPHS = 16
_WARM_UP = 3  # calls before a recording, as PyTorch's documentation has it
_RECORDING = threading.Lock()  # a process may record one call at a time

Call = Callable[[dict[str, Any]], dict[str, Tensor]]


class Predictor:
    """See `visualbert.backend.Backend.predictor`.

    It may be called from several threads. It computes in the model's own type: `torch.autocast`
    does not reach it.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.architecture, self.config, self.device = model.architecture, model.config, model.device
        attentions = choose(options.get("output_attentions"), self.config.output_attentions)
        self.packs = self.config.packing != "never" and not attentions
        self.buckets = Buckets(self.architecture, self.config, packs=False)
        twin = prepacked(model)
        self.step = twin.body().row_step()
        for part in {twin, twin.body()}:  # plans are made here, before anything is on a GPU
            part.config = dataclasses.replace(self.config, packing="never")

        def run(tensors: dict[str, Any]) -> dict[str, Tensor]:
            return dict(flatten_outputs(twin(**tensors, **options)))

        self.run: Call = run
        on_gpu = self.device.type == "cuda"
        self.graphs = Graphs(run, CudaRecorder(self.device)) if on_gpu else None

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        given = {name: to_numpy(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        batch = check_batch(self.config, self.architecture, given)
        small = "packing" not in batch and count_positions(batch) <= GRAPH_POSITIONS
        call = self.graphs if small else None
        fitted = self.planned(batch) if call is None else self.buckets.fit(batch)
        arrays = fitted.inputs.items()
        tensors = {n: from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in arrays}
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            found = as_arrays(self.run(tensors)) if call is None else call(tensors)
        return self.buckets.cut(found, fitted)

    def planned(self, batch: Mapping[str, Any]) -> Fitted:
        """A batch with a packing where one saves work."""
        late = self.config.bypass_transformer
        found = plan_batch(batch, late_fusion=late, step=self.step) if self.packs else batch
        return Fitted(dict(found), {}, {})


def count_positions(batch: Mapping[str, np.ndarray]) -> int:
    """Of text and regions, in all examples."""
    text, regions = batch.get("input_ids"), batch.get("visual_embeds")
    *examples, length = batch["inputs_embeds"].shape[:-1] if text is None else text.shape
    return math.prod(examples) * (length + (0 if regions is None else regions.shape[-2]))


def as_arrays(outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Outputs in numpy."""
    return {name: to_numpy(x) for name, x in outputs.items()}


class PrepackedLinear(nn.Module):
    """Linear layers of one input as one product, in oneDNN's own layout, and the exact gelu after
    it where there is one.
    """

    def __init__(self, *layers: Linear, gelu: bool = False) -> None:
        super().__init__()
        whole = joined(*layers) if len(layers) > 1 else layers[0]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole.weight.detach(), None)
        self.bias = whole.bias.detach().clone()
        self.activation = ("gelu", "none") if gelu else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias, *self.activation)


def joined(*layers: Linear) -> Linear:
    """Linear layers of one input as one."""
    made = Linear(layers[0].in_features, sum(x.out_features for x in layers), device="meta")
    made.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))
    made.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]))
    return made


@cache
def has_layout(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout of its own on this CPU, and a product that is right in it."""
    layer = Linear(8, 8, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.arange(64).reshape(8, 8) % 5)
    layer.bias.fill_(1)
    x = torch.arange(24).reshape(3, 8).to(dtype) % 3
    try:
        return torch.equal(PrepackedLinear(layer)(x), F.linear(x, layer.weight, layer.bias))
    except (AttributeError, RuntimeError):  # the operations are private, and not for every type
        return False


def prepacked(model: Any) -> Any:
    """A copy of `model` with one product for query, key and value, where all positions need all
    three, and with linear layers laid out for the matrix unit, where there is a layout.
    """
    lays_out = model.device.type == "cpu" and has_layout(model.dtype)
    linears = [layer for layer in model.modules() if lays_out and type(layer) is Linear]
    copied_later: dict[int, Any] = {id(p): p for layer in linears for p in layer.parameters()}
    twin = copy.deepcopy(model, copied_later).eval()
    body = twin.body()
    last = [body.encoder.layer[-1], getattr(body, "additional_layer", None)]  # few positions query
    for layer in (x for x in body.encoder.layer if x not in last):
        _join(layer.attention.self, PrepackedLinear if lays_out else joined)
    if lays_out:
        _lay_out(twin)
    return twin


def _join(attention: Any, join: Callable[..., nn.Module]) -> None:
    """Replace three products by one."""
    parts = attention.query, attention.key, attention.value
    attention.joint = (QuantizedLinear.of if type(parts[0]) is QuantizedLinear else join)(*parts)
    attention.query = attention.key = attention.value = None


def _lay_out(module: nn.Module) -> None:
    """Replace every linear layer below."""
    for name, child in module.named_children():
        if type(child) is Linear:
            setattr(module, name, PrepackedLinear(child))
        elif (
            isinstance(child, Intermediate)
            and child.hidden_act == "gelu"
            and type(child.dense) is Linear
        ):
            setattr(module, name, PrepackedLinear(child.dense, gelu=True))
        else:
            _lay_out(child)


class Recording(NamedTuple):
    """A call that can be made again on other values: write `inputs`, replay, read `outputs`."""

    inputs: dict[str, Tensor]
    replay: Callable[[], Any]
    outputs: dict[str, Tensor]


class CudaRecorder:
    """Records calls as CUDA graphs, which share one pool of memory: nothing may use two at a time.

    PyTorch's documentation, "CUDA Graphs", says what holds for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Call, tensors: Mapping[str, Tensor]) -> Recording:
        """A recording of `run` for tensors of these shapes.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """
        current = torch.cuda.current_stream(self.stream.device)
        inputs = {n: x.to(self.stream.device, copy=True) for n, x in tensors.items()}
        for mask in (x for n, x in inputs.items() if n.endswith("attention_mask")):
            mask.zero_()  # one that hides nothing would be dropped, though not in the recording
        self.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.stream(self.stream):
            for _ in range(_WARM_UP):
                run(inputs)
            with torch.cuda.graph(
                graph,
                pool=self.pool,
                stream=self.stream,
                capture_error_mode="thread_local",  # other threads may work meanwhile
            ):
                outputs = run(inputs)
        current.wait_stream(self.stream)
        return Recording(inputs, graph.replay, outputs)


class Graphs:
    """Calls that are recorded by the shapes and types of their inputs when these come for the
    second time, `GRAPHS` of them at most, one at a time; all others are run as they are, and all
    once a recording has failed.

    Args:
        run: what is recorded.
        record: gives a `Recording` for `run` and tensors, on whatever device.
    """

    def __init__(
        self, run: Call, record: Callable[[Call, Mapping[str, Tensor]], Recording]
    ) -> None:
        self.run, self.record = run, record
        self.seen: set[Any] = set()
        self.recordings: dict[Any, Recording] = {}
        self.open = True
        self.lock = threading.Lock()

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        key = tuple((name, x.shape, x.dtype) for name, x in sorted(tensors.items()))
        with self.lock:
            if key in self.seen and key not in self.recordings and self.open:
                self._add(key, tensors)
            recording = self.recordings.get(key)
            if recording is None:
                found = as_arrays(self.run(tensors))
                self.seen |= {key} if self.open else set()
                return found
            for name, x in tensors.items():
                recording.inputs[name].copy_(x)
            recording.replay()
            copies = {n: x.to("cpu", copy=True) for n, x in recording.outputs.items()}
        return as_arrays(copies)

    def _add(self, key: Any, tensors: Mapping[str, Tensor]) -> None:
        try:
            self.recordings[key] = self.record(self.run, tensors)
            self.open = len(self.recordings) < GRAPHS
        except RuntimeError as error:
            self.open = False
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(
                f"a CUDA graph could not be recorded ({reason}); small batches of other shapes are "
                "run without one, which is slower and gives the same",
                RuntimeWarning,
                stacklevel=4,
            )
