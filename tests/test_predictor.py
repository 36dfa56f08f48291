"""A predictor gives what its model gives, for every input, option and shape, with few compilations;
what it refuses, it refuses in the model's words; and it leaves the model as it was.
"""

import functools
import threading

import numpy as np
import pytest
from native_helpers import ANSWERS, BODY, CHOICE, DROPOUT, PHRASES, PRETRAINING, tiny_config
from packing_helpers import (
    CASES,
    EXACT,
    HEADS,
    INDEX,
    B,
    T,
    V,
    about_two_images,
    build,
    call,
    each_backend,
    error,
    filled,
    flax_later,
    gradients,
    make_batch,
    plan,
    real,
    rows,
)
from tiny import make_model

from visualbert import InputError, VisualBertConfig, get_backend
from visualbert.buckets import EXACT as KEPT
from visualbert.buckets import SLACK, Buckets, Shape
from visualbert.inputs.contract import check_batch
from visualbert.schema import ARCHITECTURES

HIDDEN, ATTENTIONS = {"output_hidden_states": True}, {"output_attentions": True}
ONE_LAYER = {"num_hidden_layers": 1, "packing": "inference"}


@functools.cache
def model(backend, architecture, late=False, dtype="float64", **changes):
    return build(backend, architecture, late, dtype, **{**ONE_LAYER, **changes})


@functools.cache
def predictor(backend, architecture, late=False, dtype="float64", **options):
    return get_backend(backend).predictor(model(backend, architecture, late, dtype), **options)


def expected(backend, architecture, batch, late=False, **options):
    """What the model gives with the padding; for Flax, where a call that is not compiled as a whole
    takes its time, what the same model gives in PyTorch.
    """
    backend = "pt" if backend == "flax" else backend
    return call(backend, model(backend, architecture, late, packing="never"), batch, **options)


def without_labels(batch):
    return {k: x for k, x in batch.items() if "labels" not in k}


def smaller(batch, size, text, regions):
    """The first examples, tokens and regions of a body's batch; those that are shown come first."""
    sizes = {"input_ids": text, "token_type_ids": text, "attention_mask": text}
    cut = {k: x[:size, : sizes.get(k, regions)] for k, x in batch.items()}
    assert cut["attention_mask"].any(1).all()
    return cut


class TestEquality:
    @rows(
        "architecture, case, late",
        *((head, case, case == "left") for head in ARCHITECTURES for case in HEADS),
        *((BODY, case, False) for case in CASES if case not in HEADS),
        tf=[(BODY, case, case == "left") for case in CASES]
        + [(x, "left", True) for x in ARCHITECTURES],
        flax=[(CHOICE, "left", True), (PHRASES, "right", False)],
    )
    def test_every_input(self, backend, architecture, case, late):
        batch = without_labels(make_batch(architecture, case))
        found = predictor(backend, architecture, late)(batch)
        known = expected(backend, architecture, batch, late)
        assert all(isinstance(x, np.ndarray) for x in found.values())
        assert far_apart(found, known, batch) < EXACT

    @rows(
        "late, options", (False, HIDDEN), (True, HIDDEN), (True, ATTENTIONS), flax=[(True, HIDDEN)]
    )
    def test_every_option(self, backend, late, options):
        batch = make_batch(BODY, "right")
        found = predictor(backend, BODY, late, **options)(batch)
        known = expected(backend, BODY, batch, late, **options)
        assert found.keys() == known.keys() and {"hidden_states.1", "attentions.0"} & found.keys()
        assert far_apart(found, known, batch) < EXACT

    @each_backend
    def test_every_size(self, backend):
        """Larger and smaller than before, one example, no padding, the first size again."""
        batch = {k: x for k, x in make_batch(BODY, "right").items() if "image" not in k}
        whole = predictor(backend, BODY)
        full = {k: np.ones_like(x) for k, x in batch.items() if "mask" in k}
        sizes = [(4, 16, 10), (3, 9, 7), (1, 7, 5), (1, 16, 10), (4, 8, 1), (4, 16, 10)]
        for size in sizes[: 2 if backend == "flax" else None]:
            given = smaller(batch, *size)
            found, known = whole(given), expected(backend, BODY, given)
            assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in known.items()}
            assert far_apart(found, known, given) < EXACT
        if backend != "flax":
            for given in ({**batch, **full}, {k: x for k, x in batch.items() if "mask" not in k}):
                assert error(whole(given), expected(backend, BODY, given)) < EXACT

    @each_backend
    def test_labels(self, backend):
        batch = make_batch(ANSWERS, "right")
        found = predictor(backend, ANSWERS)(batch)
        assert error(found, expected(backend, ANSWERS, batch)) < EXACT and "loss" in found

    @flax_later
    def test_what_else_a_batch_may_carry(self, backend):
        for what, (architecture, batch) in unusual_batches().items():
            found = predictor(backend, architecture)(batch)
            known = expected(backend, architecture, batch)
            assert far_apart(found, known, batch) < EXACT, what

    @each_backend
    def test_attentions_that_the_configuration_asks_for(self, backend):
        batch = make_batch(BODY, "right")
        asking = model(backend, BODY, output_attentions=True)
        found = get_backend(backend).predictor(asking)(batch)
        known = expected(backend, BODY, batch, output_attentions=True)
        assert found.keys() == known.keys() and error(found, known) < EXACT

    @rows("dtype, tolerance", ("float32", 1e-5), ("bfloat16", 0.2), flax=[("float32", 1e-5)])
    def test_other_types(self, backend, dtype, tolerance):
        batch = make_batch(BODY, "right")
        found = predictor(backend, BODY, True, dtype)(batch)
        assert str(found["last_hidden_state"].dtype) == dtype
        packing = plan(batch)
        known = expected(backend, BODY, batch, True)
        assert error(real(found, packing), real(known, packing)) < tolerance

    @each_backend
    def test_integers_of_any_type(self, backend):
        batch = {k: x for k, x in make_batch(BODY, "right").items() if "image" not in k}
        whole = predictor(backend, BODY)
        known = whole(batch)
        before = getattr(whole, "compilations", None)
        for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
            given = {k: x.astype(kind) if x.dtype.kind == "i" else x for k, x in batch.items()}
            assert error(whole(given), known) == 0, kind
        for kind in ("bool", "float32"):
            given = {k: x.astype(kind) if "mask" in k else x for k, x in batch.items()}
            assert error(whole(given), known) == 0, kind
        assert getattr(whole, "compilations", None) == before


class TestShapes:
    """How many programs are compiled."""

    @staticmethod
    def ragged(rng, shape):
        batch, text, regions = shape
        masks = (filled(rng.integers(2, n + 1, batch), n) for n in (text, regions))
        text_mask, visual_mask = masks
        return {
            "input_ids": rng.integers(1, 113, (batch, text)),
            "attention_mask": text_mask,
            "visual_embeds": rng.standard_normal((batch, regions, 20)).astype(np.float32),
            "visual_attention_mask": visual_mask,
        }

    @staticmethod
    def key(fitted):
        arrays = {k: x for k, x in fitted.inputs.items() if k != "packing"}
        packing = fitted.inputs.get("packing")
        rows = None if packing is None else packing.source.shape
        return rows, *((k, x.shape, x.dtype) for k, x in sorted(arrays.items()))

    @pytest.mark.parametrize(
        ("sizes", "most"),
        [
            (lambda rng: (16, 24, 100), 8),
            (lambda rng: (16, rng.integers(12, 25), rng.integers(60, 101)), 12),
            (lambda rng: (1, rng.integers(4, 41), rng.integers(10, 101)), 6),
            (lambda rng: (rng.integers(1, 33), rng.integers(4, 41), rng.integers(10, 101)), 26),
        ],
        ids=["one size", "padded to the longest", "single questions", "any size"],
    )
    def test_buckets(self, sizes, most):
        """Questions, tokens and regions of 100 ragged batches, and the most shapes they take."""
        config = VisualBertConfig(visual_embedding_dim=20)
        for seed in range(3):
            rng, shapes = np.random.default_rng(seed), set()
            buckets = Buckets(BODY, config, packs=True)
            for _ in range(100):
                batch = check_batch(config, BODY, self.ragged(rng, sizes(rng)))
                shapes.add(self.key(buckets.fit(batch)))
            assert len(shapes) <= most, f"{len(shapes)} shapes"

    @pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
    @pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
    def test_a_shape_costs_little_more_than_one_of_its_own(self, packs, late):
        """And what is packed is what there is to see."""
        config = VisualBertConfig(visual_embedding_dim=20, bypass_transformer=late)
        buckets, rng, costs = Buckets(BODY, config, packs=packs), np.random.default_rng(0), []
        for _ in range(60):
            size = rng.integers((1, 4, 10), (33, 41, 101))
            batch = check_batch(config, BODY, self.ragged(rng, size))
            found = [x.fit(batch) for x in (buckets, Buckets(BODY, config, packs=packs))]
            shapes = [Shape(x.after, rows_of(x)) for x in found]
            costs.append([buckets._cost(shape) for shape in shapes])
            packing = found[0].inputs.get("packing")
            assert packs or packing is None
            if packing is not None:
                visible = plan(found[0].inputs, allow_empty=True).places >= 0
                assert ((packing.places >= 0) == visible).all()
                sources = np.sort(packing.source[packing.source >= 0])
                assert (sources == np.flatnonzero(visible)).all()
        shared, own = np.array(costs).T
        assert (shared <= SLACK * own).all() and (shared > 1.05 * own).any()

    def test_the_first_shapes_without_padding_are_kept(self):
        config, rng = VisualBertConfig(visual_embedding_dim=20), np.random.default_rng(0)
        buckets = Buckets(BODY, config, packs=True)
        for number in range(1, KEPT + 3):
            batch = self.ragged(rng, (number, 9, 5))
            batch |= {k: np.ones_like(x) for k, x in batch.items() if "mask" in k}
            fitted = buckets.fit(check_batch(config, BODY, batch))
            exact = fitted.inputs["input_ids"].shape == (number, 9)
            assert exact is (number <= KEPT)
            assert ("attention_mask" in fitted.inputs) is not exact

    @pytest.mark.parametrize("backend", ["tf", "flax"])
    def test_one_for_batches_that_look_alike(self, backend):
        run = get_backend(backend).predictor(model(backend, BODY))
        rng = np.random.default_rng(0)
        for _ in range(4):
            batch = self.ragged(rng, (3, 9, 5))
            batch |= {k: np.ones_like(x) for k, x in batch.items() if "mask" in k}
            assert error(run(batch), expected(backend, BODY, batch)) < EXACT
            del batch["attention_mask"]
            assert error(run(batch), expected(backend, BODY, batch)) < EXACT
        assert run.compilations == 1

    def test_tensorflow_traces_twice_for_a_kind_of_batch(self):
        """With sizes that change one after the other, too; packed, and without padding."""
        run = get_backend("tf").predictor(model("tf", BODY))
        rng = np.random.default_rng(0)
        sizes = [(1, 9, 5), (2, 9, 5), (4, 9, 5), (4, 12, 5), (4, 12, 8), (1, 12, 8)]
        sizes += rng.integers((1, 2, 2), (7, 37, 20), (40, 3)).tolist()
        for size in sizes:
            batch = self.ragged(rng, size)
            assert far_apart(run(batch), expected("tf", BODY, batch), batch) < EXACT
            full = {k: np.ones_like(x) if "mask" in k else x for k, x in batch.items()}
            assert error(run(full), expected("tf", BODY, full)) < EXACT
            run({k: x for k, x in batch.items() if "mask" not in k})
        assert run.compilations <= 6, run.compilations
        assert run.run.experimental_get_tracing_count() == run.compilations

    def test_flax_compiles_as_often_as_there_are_shapes(self):
        run, seen = get_backend("flax").predictor(model("flax", BODY)), set()
        buckets = Buckets(BODY, run.config, packs=True)
        rng = np.random.default_rng(0)
        for size in ((4, 16, 10), (3, 20, 12), (4, 9, 31), (4, 32, 16), (4, 16, 10)):
            batch = self.ragged(rng, size)
            seen.add(self.key(buckets.fit(check_batch(run.config, BODY, batch))))
            run(batch)
        assert run.compilations == len(seen) <= 2


def rows_of(fitted):
    packing = fitted.inputs.get("packing")
    plans = [] if packing is None else [x for x in (packing, packing.text) if x is not None]
    return tuple(x.source.shape for x in plans)


def unusual_batches():
    """Batches that carry more, or less, than tokens, regions and what describes them."""
    left, right = make_batch(BODY, "left"), make_batch(BODY, "right")
    longer = np.concatenate([right["image_text_alignment"]] * 2, 1)
    shown = np.arange(B) != 1
    some_text = {**right, "attention_mask": right["attention_mask"] * shown[:, None]}
    phrases = without_labels(make_batch(PHRASES, "right"))
    both = np.array([[0, 16], [17, 1], [1, 0], [16, 17]])  # positions of text and of regions
    choices = {**make_batch(CHOICE, "left"), "image_index": np.array([1, 0])}
    return {
        "plan": (BODY, {**left, "packing": plan(left)}),
        "images": (BODY, about_two_images(BODY)[0]),
        "images of choices": (CHOICE, without_labels(choices)),
        "positions": (BODY, {**right, "positions": both}),
        "phrases in regions": (PHRASES, {**phrases, "region_to_phrase_position": both}),
        "longer alignment": (BODY, {**right, "image_text_alignment": longer}),
        "an example without text": (BODY, some_text),
        "labels": (ANSWERS, make_batch(ANSWERS, "holes")),
    }


def far_apart(found, known, batch):
    """The largest difference at what is real."""
    assert found.keys() == known.keys()
    if "positions" not in batch:
        packing = plan({k: x for k, x in batch.items() if k != "packing"}, allow_empty=True)
        found, known = real(found, packing), real(known, packing)
    return error(found, known)


@pytest.mark.parametrize(("architecture", "case"), [(x, c) for x in ARCHITECTURES for c in HEADS])
@pytest.mark.parametrize("options", [HIDDEN, ATTENTIONS], ids=["hidden", "attentions"])
@pytest.mark.parametrize("late", [False, True])
def test_batches_in_buckets_give_the_same(architecture, case, options, late):
    """What is filled up, run, and cut back; in PyTorch, since nothing has to be compiled there."""
    batch = without_labels(make_batch(architecture, case))
    run = build("pt", architecture, late)
    config = run.config.replace(packing="inference")
    buckets = Buckets(architecture, config, packs=options is HIDDEN)
    fitted = buckets.fit(check_batch(run.config, architecture, batch))
    assert fitted.inputs["attention_mask"].shape[-1] == 32 and fitted.after != fitted.before
    assert ("packing" in fitted.inputs) is (options is HIDDEN)
    found = buckets.cut(call("pt", run, fitted.inputs, **options), fitted)
    known = call("pt", run, batch, **options)
    assert far_apart(found, known, batch) < EXACT


@pytest.mark.parametrize("what", unusual_batches())
def test_unusual_batches_in_buckets_give_the_same(what):
    architecture, batch = unusual_batches()[what]
    run = build("pt", architecture)
    buckets = Buckets(architecture, run.config.replace(packing="inference"), packs=True)
    fitted = buckets.fit(check_batch(run.config, architecture, batch))
    found = buckets.cut(call("pt", run, fitted.inputs), fitted)
    assert far_apart(found, call("pt", run, batch), batch) < EXACT


@pytest.mark.parametrize("shared", [True, False], ids=["shared images", "images"])
def test_batches_that_share_shapes_give_the_same(shared):
    run, rng = build("pt", BODY), np.random.default_rng(0)
    buckets = Buckets(BODY, run.config.replace(packing="inference"), packs=True)
    for _ in range(60):
        batch = TestShapes.ragged(rng, rng.integers((1, 2, 2), (40, 37, 20)))
        if shared:
            count = len(batch["input_ids"])
            batch["image_index"] = rng.integers(0, min(3, count), count)
            batch |= {name: x[:3] for name, x in batch.items() if name.startswith("visual_")}
        fitted = buckets.fit(check_batch(run.config, BODY, batch))
        found = buckets.cut(call("pt", run, fitted.inputs), fitted)
        assert far_apart(found, call("pt", run, batch), batch) < EXACT
    assert sum(map(len, buckets.known.values())) < 40


class TestModel:
    """What a predictor does to its model, and the model to it."""

    @each_backend
    def test_is_left_as_it_was(self, backend):
        chosen, batch = get_backend(backend), make_batch(ANSWERS, "right")
        trained = make_model(backend, ANSWERS, tiny_config(**ONE_LAYER, **DROPOUT), "float64")
        variables = chosen.variables(trained)
        handles, before = list(map(id, variables.values())), values(chosen, trained)
        if backend != "tf":
            trained.train()
        run = chosen.predictor(trained)
        first, second = run(batch)["logits"], run(batch)["logits"]
        assert np.array_equal(first, second)  # in evaluation mode
        assert error({"logits": first}, expected(backend, ANSWERS, batch)) < EXACT
        assert list(map(id, chosen.variables(trained).values())) == handles
        after = values(chosen, trained)
        assert all(np.array_equal(x, before[k]) for k, x in after.items())
        assert backend != "pt" or trained.training
        assert backend != "flax" or not trained.dropout.deterministic

    @flax_later
    def test_can_be_trained_on(self, backend):
        batch = make_batch(ANSWERS, "right")
        known = gradients(backend, model(backend, ANSWERS, packing="never"), batch)
        found = gradients(backend, model(backend, ANSWERS), batch, packing=plan(batch))
        predictor(backend, ANSWERS)(batch)
        again = gradients(backend, model(backend, ANSWERS), batch, packing=plan(batch))
        for k, x in known.items():
            assert np.abs(found[k] - x).max() < EXACT and np.abs(again[k] - x).max() < EXACT

    @each_backend
    def test_weights_are_those_of_the_moment(self, backend):
        """TensorFlow's functions read the model's variables; the others keep what they took."""
        chosen, batch = get_backend(backend), make_batch(ANSWERS, "right")
        dtype = "float32" if backend == "pt" else "float64"  # which PyTorch lays out anew
        changed = make_model(backend, ANSWERS, tiny_config(**ONE_LAYER), dtype)
        run = chosen.predictor(changed)
        before = run(batch)
        for variable in chosen.variables(changed).values():
            chosen.push(variable, chosen.pull(variable) * 1.25)
        tolerance = 1e-5 if backend == "pt" else EXACT
        now = chosen.predictor(changed)(batch)
        assert error(now, before) > 0.01
        assert error(run(batch), now if backend == "tf" else before) < tolerance
        if backend != "flax":
            assert error(now, call(backend, changed, batch)) < tolerance

    def test_torch_weights_that_an_optimizer_changes(self):
        torch = pytest.importorskip("torch")
        batch = make_batch(ANSWERS, "right")
        for dtype in ("float32", "float64"):
            trained = make_model("pt", ANSWERS, tiny_config(**ONE_LAYER), dtype)
            run = get_backend("pt").predictor(trained)
            before = run(batch)
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
            trained(**batch).loss.backward()
            optimizer.step()
            assert error(run(batch), before) == 0
            assert error(get_backend("pt").predictor(trained)(batch), before) > 0.01

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_torch_tensors_in_place_of_arrays(self, dtype):
        torch = pytest.importorskip("torch")
        batch = make_batch(ANSWERS, "right")
        run = predictor("pt", ANSWERS, False, dtype)
        tensors = {name: torch.as_tensor(x) for name, x in batch.items()}
        kind = getattr(torch, dtype)
        tensors["visual_embeds"] = tensors["visual_embeds"].to(kind).requires_grad_()
        batch["visual_embeds"] = tensors["visual_embeds"].detach().float().numpy()
        assert error(run(tensors), run(batch)) == 0

    def test_torch_lays_weights_out(self):
        """In float32, one product for query, key and value where all positions need them."""
        pytest.importorskip("torch")
        from visualbert.pt import predictor as module

        if not module.has_layout(module.torch.float32):
            pytest.skip("oneDNN has no layout for this CPU")
        given = build("pt", BODY, dtype="float32")
        twin = module.prepacked(given)
        kinds = [type(x) for x in twin.modules()]
        assert module.Linear not in kinds and module.PrepackedLinear in kinds
        joint = twin.encoder.layer[0].attention.self.joint
        assert joint.bias.shape == (72,) and given.encoder.layer[0].attention.self.joint is None

    @each_backend
    def test_threads(self, backend):
        run = predictor(backend, ANSWERS)
        batches = [make_batch(ANSWERS, "right"), make_batch(ANSWERS, "right")]
        batches[1]["input_ids"] = batches[1]["input_ids"][::-1].copy()
        known = [run(x)["logits"] for x in batches]
        assert np.abs(known[0] - known[1]).max() > 0.01
        wrong = []

        def work(number):
            for _ in range(15):
                found = run(batches[number])["logits"]
                if not np.abs(found - known[number]).max() < EXACT:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def values(backend, model):
    return {k: backend.pull(x).copy() for k, x in backend.variables(model).items()}


WRONG = {
    "ids beyond the vocabulary": {"input_ids": np.full((B, T), 113)},
    "text that is not there": {"input_ids": None},
    "a mask of another length": {"attention_mask": np.ones((B, T - 1), int)},
    "a mask without a batch": {"attention_mask": np.ones(T, int)},
    "a mask of twos": {"visual_attention_mask": np.full((B, V), 2)},
    "features of another width": {"visual_embeds": np.zeros((B, V, 7))},
    "a list": {"token_type_ids": [[0] * T] * B},
    "words": {"token_type_ids": np.full((B, T), "a")},
    "images that are not there": {"image_index": INDEX + 4},
    "regions that are not there": {"visual_embeds": None},
    "no example": {k: np.zeros((0, T), int) for k in ("input_ids", "attention_mask")},
    "positions beyond the end": {"positions": np.full((B, 1), T + V)},
}


class TestErrors:
    @staticmethod
    def refused_alike(backend, architecture, fault):
        batch = {**make_batch(architecture, "right"), **fault}
        with pytest.raises(InputError) as of_model:
            expected(backend, architecture, batch)
        with pytest.raises(InputError) as of_predictor:
            predictor(backend, architecture)(batch)
        assert str(of_predictor.value) == str(of_model.value)

    @each_backend
    @pytest.mark.parametrize("fault", WRONG)
    def test_in_the_words_of_the_model(self, backend, fault):
        self.refused_alike(backend, BODY, WRONG[fault])

    @each_backend
    def test_of_heads(self, backend):
        faults = {
            CHOICE: {"input_ids": np.ones((B, T), int)},
            ANSWERS: {"attention_mask": filled([1, 2, 2, 2], T)},
            PRETRAINING: {"labels": np.zeros((B, T + 1), int)},
            PHRASES: {"region_to_phrase_position": np.full((B, 2), T + V)},
        }
        for architecture, fault in faults.items():
            self.refused_alike(backend, architecture, fault)

    @each_backend
    def test_unknown_names(self, backend):
        batch = make_batch(BODY, "right")
        sentences = {
            "input_idz": "VisualBertModel takes no input 'input_idz'; did you mean 'input_ids'?",
            "labels": "VisualBertModel takes no input 'labels'",
        }
        for name, sentence in sentences.items():
            with pytest.raises(InputError) as error:
                predictor(backend, BODY)({**batch, name: batch["input_ids"]})
            assert str(error.value) == sentence

    @each_backend
    def test_plans_of_another_batch(self, backend):
        batch = make_batch(BODY, "right")
        packing = plan(batch)
        wrong = packing._replace(places=packing.places[:3])
        with pytest.raises(InputError) as error:
            predictor(backend, BODY)({**batch, "packing": wrong})
        assert str(error.value) == (
            "packing.places has shape (3, 26), expected (batch, text + regions) with batch = 4 as "
            "in this batch, from whose masks it has to be planned"
        )
