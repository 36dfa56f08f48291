"""One batch, and one training step, as users of each framework run them.

What a caller has ready before it calls lies ready before the clock starts: for transformers and for
training steps, tensors on the model's device; for our predictors, numpy arrays. Features are in the
model's type. On a GPU our model too is called with tensors that lie there, except for a single
question, whose arrays come from the host.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visualbert.backend import from_native, get_backend, native_name
from visualbert.bench.workloads import CHECKED, REFERENCE, TRAINING, Workload
from visualbert.checkpoint.tensors import cast
from visualbert.config import VisualBertConfig
from visualbert.errors import UsageError
from visualbert.packing import plan_packing
from visualbert.schema import parameters

LEARNING_RATE = 1e-5
Arrays = Mapping[str, np.ndarray]
Call = Callable[[], dict[str, np.ndarray]]


class Step(Protocol):
    """A model and its optimizer; a call is one update and gives the loss."""

    def __call__(self) -> float: ...

    def check(self) -> dict[str, np.ndarray]:
        """`loss`, and the gradients of `CHECKED` in the canonical layout, with dropout off."""
        ...


def load_model(
    backend: str,
    folder: str,
    workload: Workload,
    dtype: str,
    options: Mapping[str, Any],
    device: str,
) -> Any:
    """The model as a user of `backend` loads it."""
    if device != "cpu":
        _check_device(device)
    if backend == REFERENCE:
        theirs: Any = get_backend(REFERENCE)
        return theirs.load(Path(folder), workload.architecture, dtype).to(device)
    from visualbert import load

    training = TRAINING if workload.kind == "step" else {}
    model = load(folder, backend, dtype=dtype, **{**training, **options})
    return model.to(device) if backend == "pt" else model


def _check_device(device: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"--device {device}: PyTorch finds no such device here; leave it out")


def accelerator(device: str) -> str:
    """Its name; none for a CPU."""
    if device == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name()


def make_caller(
    backend: str, model: Any, workload: Workload, dtype: str
) -> Callable[[Arrays], Call]:
    """Makes of a batch the call that runs it to the end and gives its outputs."""
    if backend == REFERENCE:
        return lambda inputs: torch_call(model, reference_inputs(model, workload, inputs))
    if backend == "pt" and model.device.type == "cuda" and workload.batch > 1:
        return lambda inputs: torch_call(model, torch_inputs(model, inputs))
    run = get_backend(backend).predictor(model)
    wide = "float32" if dtype == "int8" else dtype

    def caller(inputs: Arrays) -> Call:
        ready = {k: x if x.dtype.kind == "i" else cast(x, wide) for k, x in inputs.items()}
        return lambda: run(ready)

    return caller


def first_call(backend: str, model: Any, workload: Workload, inputs: Arrays) -> Call:
    """The quickest way to one output: compiling a `tf.function` takes longer than one batch, and
    Flax's operations one by one take longer to compile than all together.
    """
    if backend in (REFERENCE, "flax"):
        return make_caller(backend, model, workload, "float32")(inputs)
    return lambda: get_backend(backend).call(model, inputs)


def reference_inputs(model: Any, workload: Workload, inputs: Arrays) -> dict[str, Any]:
    """The batch as transformers takes it."""
    from visualbert.pt.transformers import adapt

    return torch_inputs(model, adapt(workload.architecture, model.config, inputs))


def torch_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors on the model's device, in its type where they are of floating point."""
    import torch

    tensors = {name: torch.as_tensor(x) for name, x in inputs.items()}
    return {
        name: x.to(model.device, model.dtype if x.is_floating_point() else None)
        for name, x in tensors.items()
    }


def torch_call(model: Any, inputs: Mapping[str, Any]) -> Call:
    """A model of transformers' or ours on tensors."""
    import torch

    def call() -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = model(**inputs)
        return {"logits": found.logits.float().cpu().numpy()}

    return call


def make_step(backend: str, model: Any, workload: Workload, inputs: Arrays) -> Step:
    """A training step on the batch."""
    if backend == REFERENCE:
        return TorchStep(model, workload, reference_inputs(model, workload, inputs))
    if backend == "pt":
        return TorchStep(model, workload, torch_inputs(model, inputs))
    if backend == "tf":
        return TensorFlowStep(model, workload, inputs)
    return FlaxStep(model, workload, inputs)


def checked_gradients(
    backend: str, workload: Workload, config: VisualBertConfig, found: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The gradients of `CHECKED`, from those of every variable by its native name."""
    home = get_backend(backend)
    return {
        f"gradient {p.name}": from_native(home, p, np.asarray(found[native_name(home, p)]))
        for p in parameters(workload.architecture, config)
        if p.name in CHECKED
    }


class TorchStep:
    """PyTorch, transformers' model and ours alike."""

    def __init__(self, model: Any, workload: Workload, inputs: Mapping[str, Any]) -> None:
        import torch

        self.model, self.workload, self.inputs = model, workload, inputs
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def check(self) -> dict[str, np.ndarray]:
        self.model.eval()
        loss = self.backward()
        config = VisualBertConfig.from_dict(self.model.config.to_dict())
        found = {
            name: p.grad.float().cpu()
            for name, p in self.model.named_parameters()
            if name in CHECKED
        }
        self.model.train()
        gradients = checked_gradients("pt", self.workload, config, found)
        return {"loss": np.asarray(loss.item()), **gradients}

    def backward(self) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**self.inputs).loss
        loss.backward()
        return loss

    def __call__(self) -> float:
        loss = self.backward()
        self.optimizer.step()
        return loss.item()


class TensorFlowStep:
    """A `tf.function` with Keras's AdamW."""

    def __init__(self, model: Any, workload: Workload, inputs: Arrays) -> None:
        import keras
        import tensorflow as tf

        self.model, self.workload, self.inputs = model, workload, inputs
        self.ready = {name: tf.constant(x) for name, x in inputs.items()}
        self.optimizer = keras.optimizers.AdamW(LEARNING_RATE)
        self.optimizer.build(model.trainable_variables)
        self.backward = tf.function(self._backward)
        self.update = tf.function(self._update)

    def _backward(self, inputs: Any, training: bool = False) -> Any:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.model(**inputs, training=training).loss
        return loss, tape.gradient(
            loss,
            [v.value for v in self.model.trainable_variables],
            unconnected_gradients="zero",
        )

    def _update(self, inputs: Any) -> Any:
        loss, gradients = self._backward(inputs, training=True)
        self.optimizer.apply(gradients)
        return loss

    def check(self) -> dict[str, np.ndarray]:
        import tensorflow as tf

        loss, gradients = self.backward(self.planned())
        names = get_backend("tf").variables(self.model)  # in the order of the variables
        found = {k: tf.convert_to_tensor(x) for k, x in zip(names, gradients, strict=True)}
        checked = checked_gradients("tf", self.workload, self.model.config, found)
        return {"loss": loss.numpy(), **checked}

    def planned(self) -> dict[str, Any]:
        return {**self.ready, **plan(self.workload, self.inputs)}

    def __call__(self) -> float:
        return float(self.update(self.planned()))


class FlaxStep:
    """A `jax.jit` with optax's AdamW; what is updated is given away to be written over."""

    def __init__(self, model: Any, workload: Workload, inputs: Arrays) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        self.model, self.workload, self.inputs = model, workload, inputs
        self.ready = {name: jnp.asarray(x) for name, x in inputs.items()}
        self.optimizer = optax.adamw(LEARNING_RATE)
        self.backward = jax.jit(self._backward, static_argnums=0)
        self.update = jax.jit(self._update, static_argnums=0, donate_argnums=(1, 2, 3))
        self.state: Any = None

    def split(self) -> Any:
        """The model's graph, parameters, and the state of its dropouts."""
        from flax import nnx

        return nnx.split(self.model, nnx.Param, ...)

    def _backward(self, graph: Any, params: Any, rest: Any, inputs: Any) -> Any:
        import jax
        from flax import nnx

        def loss_of(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            loss = model(**inputs).loss
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    def _update(self, graph: Any, params: Any, rest: Any, state: Any, inputs: Any) -> Any:
        import optax

        (loss, rest), gradients = self._backward(graph, params, rest, inputs)
        updates, state = self.optimizer.update(gradients, state, params)
        return loss, optax.apply_updates(params, updates), rest, state

    def check(self) -> dict[str, np.ndarray]:
        from flax import nnx

        self.model.eval()
        (loss, _), gradients = self.backward(*self.split(), self.planned())
        found = {
            ".".join(map(str, path)): leaf.get_value()
            for path, leaf in nnx.to_flat_state(gradients)
        }
        checked = checked_gradients("flax", self.workload, self.model.config, found)
        return {"loss": np.asarray(loss), **checked}

    def planned(self) -> dict[str, Any]:
        return {**self.ready, **plan(self.workload, self.inputs)}

    def __call__(self) -> float:
        if self.state is None:
            self.model.train()
            graph, params, rest = self.split()
            self.state = graph, (params, rest, self.optimizer.init(params))
            self.model = None
        graph, state = self.state
        loss, *state = self.update(graph, *state, self.planned())
        self.state = graph, state
        return float(loss)


def plan(workload: Workload, inputs: Arrays) -> dict[str, Any]:
    """The packing of the batch, for a model whose masks are traced."""
    pretraining = workload.architecture == "VisualBertForPreTraining"
    packing = plan_packing(
        inputs["attention_mask"],
        inputs["visual_attention_mask"],
        labels=inputs["labels"] if pretraining else None,
    )
    return {"packing": packing}
