"""The Flax models do what NNX users expect: jit, grad, vmap, remat, Optax, export, precision."""

import copy
import pickle
import re

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")

# ruff: noqa: E402
import jax.numpy as jnp
from jax import export
from native_helpers import (
    ANSWERS,
    BODY,
    CHOICE,
    DROPOUT,
    PRETRAINING,
    SIZES,
    B,
    C,
    L,
    S,
    batch,
    difference,
    largest,
    numbers,
    tiny_config,
    with_masked_row,
)
from tiny import REST

import visualbert
from visualbert.outputs import ModelOutput
from visualbert.schema import ARCHITECTURES

LOW = {"bfloat16": 0.25, "float16": 0.05}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
# Compilation takes most of the time here: of what needs it, one architecture is enough at first.
LATER = [
    pytest.param(x, marks=pytest.mark.slow if x == PRETRAINING else REST)
    for x in ARCHITECTURES
    if x != ANSWERS
]
first_architecture = pytest.mark.parametrize("architecture", [ANSWERS, *LATER])
first_head = pytest.mark.parametrize("architecture", [ANSWERS, *LATER[1:]])


def build(architecture, seed=0, rngs=None, dtype=None, param_dtype="float32", **changes):
    """A model in evaluation mode."""
    cls = getattr(visualbert, "Flax" + architecture)
    options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    model = cls(tiny_config(**changes), seed=seed, **options)
    model.eval()
    return model


def arrays(inputs):
    return jax.tree.map(jnp.asarray, inputs)


def call(model, inputs):
    return model(**inputs)


def loss(model, inputs):
    return model(**inputs).loss


def values(tree):
    return jax.tree.leaves(tree)


class TestJit:
    @each_architecture
    def test_nnx_jit_equals_eager(self, architecture):
        model, other = build(architecture), build(architecture, seed=1)
        inputs = batch(architecture)
        found = nnx.jit(call)(model, inputs)
        assert type(found) is ModelOutput
        assert difference(found, model(**inputs)) < 1e-4
        assert difference(found, other(**inputs)) > 0.1

    @first_architecture
    def test_jax_jit_of_the_parts_with_optional_outputs(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        asked = {"output_hidden_states": True, "output_attentions": True}
        structure, state = nnx.split(model)
        compiled = jax.jit(lambda state, inputs: nnx.merge(structure, state)(**inputs, **asked))
        found = compiled(state, inputs)
        assert difference(found, model(**inputs, **asked)) < 1e-4
        rows = B * C if architecture == CHOICE else B
        assert [x.shape for x in found.hidden_states] == [(rows, S, 24)] * 3
        assert [x.shape for x in found.attentions] == [(rows, 3, S, S)] * 2

    def test_an_output_goes_in_and_comes_out(self):
        output = build(ANSWERS)(**batch(ANSWERS))
        found = jax.jit(lambda output: jax.tree.map(lambda x: 2 * x, output))(output)
        assert type(found) is ModelOutput
        assert list(found) == list(output)
        leaves = jax.tree_util.tree_leaves_with_path(found)
        paths = [jax.tree_util.keystr(path) for path, _ in leaves]
        assert paths == ["['loss']", "['logits']"]
        assert found.attentions is None

    @each_architecture
    def test_shapes_without_computing(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        found = nnx.eval_shape(call, model, arrays(inputs))
        expected = model(**inputs)
        assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in expected.items()}

    @each_architecture
    @pytest.mark.parametrize("seed", [None, 0])
    def test_a_model_without_memory(self, architecture, seed):
        cls = getattr(visualbert, "Flax" + architecture)
        abstract = nnx.eval_shape(lambda: cls(tiny_config(), seed=seed))
        expected = nnx.state(build(architecture), nnx.Param)
        found = nnx.state(abstract, nnx.Param)
        assert [x.shape for x in values(found)] == [x.shape for x in values(expected)]
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in values(found))

    @first_architecture
    def test_vmap_over_a_batch(self, architecture):
        model, inputs = build(architecture), arrays(batch(architecture, labels=False))
        one = jax.vmap(lambda x: model(**jax.tree.map(lambda v: v[None], x)))
        found = jax.jit(one)(inputs)
        found = {name: x.reshape(-1, *x.shape[2:]) for name, x in found.items()}
        assert difference(found, model(**inputs)) < 1e-4


class TestExport:
    @each_architecture
    def test_a_program_without_sizes(self, architecture):
        model, inputs = build(architecture), arrays(batch(architecture))
        found = exported(model, symbolic(architecture)).call(inputs)
        assert type(found) is ModelOutput
        assert difference(found, model(**inputs)) < 1e-4

    @first_architecture
    def test_one_program_for_all_sizes(self, architecture):
        model = build(architecture)
        program = exported(model, symbolic(architecture))
        for sizes in SIZES[1:]:
            inputs = arrays(batch(architecture, *sizes))
            assert difference(program.call(inputs), nnx.jit(call)(model, inputs)) < 1e-4

    def test_without_masks(self):
        model, names = build(ANSWERS), ("input_ids", "visual_embeds")
        specs = {name: spec for name, spec in symbolic(ANSWERS).items() if name in names}
        inputs = arrays({name: batch(ANSWERS)[name] for name in names})
        assert difference(exported(model, specs).call(inputs), model(**inputs)) < 1e-4


def exported(model, specs):
    """The program as it comes back from bytes."""
    structure, state = nnx.split(model)
    program = export.export(jax.jit(lambda inputs: nnx.merge(structure, state)(**inputs)))(specs)
    return export.deserialize(program.serialize())


def symbolic(architecture):
    """Shapes of `batch`'s inputs with batch, text and regions as symbols."""
    free = export.symbolic_shape("b, t, v", constraints=["t >= 2", "t <= 36"])
    named = dict(zip(SIZES[0], free, strict=True)) | {SIZES[0][1] + SIZES[0][2]: free[1] + free[2]}
    inputs = arrays(batch(architecture, *SIZES[0]))
    return {
        name: jax.ShapeDtypeStruct([named.get(n, n) for n in x.shape], x.dtype)
        for name, x in inputs.items()
    }


class TestGradients:
    @first_head
    def test_every_way_gives_the_same_gradients(self, architecture):
        model, inputs = build(architecture), arrays(batch(architecture))
        expected = values(nnx.grad(loss)(model, inputs))
        structure, params, rest = nnx.split(model, nnx.Param, ...)

        def functional(params):
            return loss(nnx.merge(structure, params, rest), inputs)

        assert largest(values(jax.jit(jax.grad(functional))(params)), expected) < 1e-4
        other = nnx.grad(loss)(model, batch(architecture, seed=1))
        assert largest(values(other), expected) > 1e-3

    @first_head
    def test_checkpointing_changes_no_gradient(self, architecture):
        model, inputs = build(architecture), arrays(batch(architecture))
        expected = values(nnx.grad(loss)(model, inputs))
        model.gradient_checkpointing_enable()
        assert largest(values(nnx.grad(loss)(model, inputs)), expected) < 1e-5
        structure, params, rest = nnx.split(model, nnx.Param, ...)

        def functional(params):
            return loss(nnx.merge(structure, params, rest), inputs)

        assert largest(values(jax.grad(functional)(params)), expected) < 1e-5

    def test_checkpointing_computes_twice(self):
        def activations(checkpointing):
            model = build(ANSWERS)
            if checkpointing:
                model.gradient_checkpointing_enable()
            structure, params, rest = nnx.split(model, nnx.Param, ...)
            inputs = batch(ANSWERS)
            program = jax.make_jaxpr(
                jax.grad(lambda params: loss(nnx.merge(structure, params, rest), inputs))
            )(params)
            return len(re.findall(r"\berfc?\b", str(program)))

        assert (activations(False), activations(True)) == (2, 4)

    @pytest.mark.parametrize(
        "jit", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "jit"]
    )
    def test_dropout_is_the_same_with_checkpoints(self, jit):
        inputs = arrays(batch(ANSWERS))

        def run(checkpointing):
            model = build(ANSWERS, rngs=nnx.Rngs(dropout=1), **DROPOUT)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            step = nnx.value_and_grad(loss)
            step = nnx.jit(step) if jit else step
            # The second step has to draw other masks, the same with and without checkpoints.
            return [*values(step(model, inputs)), *values(step(model, inputs))]

        expected = run(checkpointing=False)
        assert largest(run(checkpointing=True), expected) < 1e-4
        half = len(expected) // 2
        assert largest(expected[:half], expected[half:]) > 1e-2

    def test_dropout_in_the_functional_style(self):
        """NNX forbids to count a stream of an outer trace: `copy=True` makes it an inner one."""
        model, inputs = build(ANSWERS, **DROPOUT), batch(ANSWERS)
        model.train()
        structure, params, rest = nnx.split(model, nnx.Param, ...)
        expected = values(nnx.grad(loss)(model, inputs))
        model.gradient_checkpointing_enable()
        structure, *_ = nnx.split(model, nnx.Param, ...)
        _, _, rest = nnx.split(build(ANSWERS, **DROPOUT), nnx.Param, ...)

        def functional(params):
            merged = nnx.merge(structure, params, rest, copy=True)
            return loss(merged, inputs)

        assert largest(values(jax.grad(functional)(params)), expected) < 1e-4


def losses_of(model, inputs, steps):
    """The loss before each step of Adam, in training mode."""
    optax = pytest.importorskip("optax")
    model.train()
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model, inputs)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


class TestTraining:
    @first_head
    def test_optax_makes_the_loss_fall(self, architecture):
        losses = losses_of(build(architecture), arrays(batch(architecture)), 6)
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize(
        "dtype",
        [pytest.param("bfloat16", marks=pytest.mark.slow), pytest.param("float16", marks=REST)],
    )
    def test_optax_in_mixed_precision_with_dropout_and_checkpoints(self, dtype):
        model, inputs = build(ANSWERS, dtype=dtype, **DROPOUT), arrays(batch(ANSWERS, 8))
        model.gradient_checkpointing_enable()
        before, *_ = losses_of(model, inputs, 12)
        model.eval()
        assert float(loss(model, inputs)) < 0.7 * before

    def test_dropout_follows_the_streams_and_the_mode(self):
        inputs = arrays(batch(ANSWERS))

        def logits(model):
            return numbers(model(**inputs).logits)

        models = [build(ANSWERS, rngs=nnx.Rngs(dropout=seed), **DROPOUT) for seed in (1, 1, 2)]
        quiet = logits(models[0])
        assert all((logits(model) == quiet).all() for model in models)
        for model in models:
            model.train()
        first, same, other = map(logits, models)
        assert (first == same).all()
        assert np.abs(first - other).max() > 1e-2
        assert np.abs(first - logits(models[0])).max() > 1e-2
        nnx.reseed(models[0], dropout=7)
        nnx.reseed(models[2], dropout=7)
        assert (logits(models[0]) == logits(models[2])).all()
        models[0].eval()
        assert (logits(models[0]) == quiet).all()

    @pytest.mark.parametrize("rngs", [None, 0, 1])
    def test_every_kind_of_streams_will_do(self, rngs):
        model = build(ANSWERS, rngs=None if rngs is None else nnx.Rngs(rngs), **DROPOUT)
        expected = model(**batch(ANSWERS))
        model.train()
        assert difference(model(**batch(ANSWERS)), expected) > 1e-2


class TestPrecision:
    @pytest.mark.parametrize(
        ("dtype", "stored", "architecture"),
        [(x, "float32", a) for x in LOW for a in ARCHITECTURES]
        + [(x, x, a) for x in LOW for a in (BODY, PRETRAINING)],
    )
    def test_low_precision_stays_close(self, dtype, stored, architecture):
        model, inputs = build(architecture), batch(architecture)
        low = build(architecture, dtype=dtype, param_dtype=stored)
        found = low(**inputs)
        assert 1e-5 < difference(found, model(**inputs)) < LOW[dtype]
        assert {x.dtype.name for x in values(nnx.state(low, nnx.Param))} == {stored}
        assert {x.dtype.name for k, x in found.items() if k != "loss"} == {dtype}
        assert found.loss is None or found.loss.dtype == jnp.float32

    @pytest.mark.parametrize("dtype", LOW)
    @first_architecture
    def test_low_precision_under_jit(self, architecture, dtype):
        """JAX's fused attention in float16 runs eagerly and does not compile for CPUs."""
        model, inputs = build(architecture, dtype=dtype), batch(architecture)
        found = nnx.jit(call)(model, inputs)
        assert difference(found, build(architecture)(**inputs)) < LOW[dtype]

    @first_architecture
    def test_float64(self, architecture):
        inputs = batch(architecture)
        expected = build(architecture)(**inputs)
        with jax.enable_x64(True):
            found = build(architecture, param_dtype="float64")(**inputs)
        assert {x.dtype.name for x in found.values()} == {"float64"}
        assert 0 < difference(found, expected) < 1e-4

    @pytest.mark.parametrize("dtype", ["float32", *LOW])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_a_row_that_shows_nothing_is_finite(self, dtype, attention):
        inputs = with_masked_row()
        model = build(BODY, param_dtype=dtype, attn_implementation=attention)
        found = model(**inputs)
        assert all(jnp.isfinite(x).all() for x in found.values())
        if dtype != "float16":  # its lowest number does not swallow a score
            assert difference(found, build(BODY)(**inputs)) < 0.25
            probs = model(**inputs, output_attentions=True).attentions[0]
            assert np.abs(numbers(probs)[1] - 1 / S).max() < 1e-3


class TestModule:
    @each_architecture
    def test_numpy_inputs(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        assert difference(model(**inputs), model(**arrays(inputs))) == 0

    @each_architecture
    def test_a_state_carries_everything(self, architecture):
        model, other = build(architecture), build(architecture, seed=1)
        inputs = batch(architecture)
        assert difference(other(**inputs), model(**inputs)) > 0.1
        nnx.update(other, nnx.state(model))
        assert difference(other(**inputs), model(**inputs)) == 0
        structure, state = nnx.split(model)
        assert nnx.split(other)[0] == structure
        assert difference(nnx.merge(structure, state)(**inputs), model(**inputs)) == 0

    @pytest.mark.parametrize("architecture", [BODY, PRETRAINING])
    def test_copies_and_pickles(self, architecture):
        model, inputs = build(architecture), batch(architecture)
        for again in (nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert again.config == model.config
            assert difference(again(**inputs), model(**inputs)) == 0

    def test_logits_for_every_label(self):
        assert build(ANSWERS)(**batch(ANSWERS)).logits.shape == (B, L)
