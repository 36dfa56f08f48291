"""The table of parameters against transformers' own classes, and the initial values drawn from
it.
"""

import numpy as np
import pytest
from tiny import tiny_config

from visualbert.checkpoint.initial import InitialValues
from visualbert.errors import ConfigError
from visualbert.schema import ARCHITECTURES, Kind, parameters


@pytest.mark.parametrize("late_fusion", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_is_transformers_state(architecture, late_fusion):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(bypass_transformer=late_fusion)
    theirs = transformers.VisualBertConfig.from_dict(config.to_dict())
    model = getattr(transformers, architecture)(theirs)
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {p.name: p.shape(config) for p in parameters(architecture, config)} == want


def test_published_sizes():
    from visualbert import VisualBertConfig

    config = VisualBertConfig(visual_embedding_dim=2048)
    count = sum(int(np.prod(p.shape(config))) for p in parameters("VisualBertModel", config))
    assert count == 111_450_624  # the backbone of the published VQA models


def test_unknown_architecture():
    with pytest.raises(
        ConfigError, match="unknown architecture 'VisualBertForVqa'; expected one of"
    ):
        parameters("VisualBertForVqa", tiny_config())


def test_initial_values_follow_bert():
    config = tiny_config(hidden_size=96, vocab_size=500)
    values = InitialValues("VisualBertForPreTraining", config)
    for p in parameters("VisualBertForPreTraining", config):
        array = values.read(p.name)
        assert array.shape == p.shape(config)
        if p.kind in (Kind.BIAS, Kind.SHIFT):
            assert not array.any()
        elif p.kind is Kind.SCALE:
            assert (array == 1).all()
        elif array.size > 5000:
            assert array.std() == pytest.approx(config.initializer_range, rel=0.05)


@pytest.mark.parametrize("special", [True, False])
def test_visual_tables_start_as_text_tables(special):
    values = InitialValues("VisualBertModel", tiny_config(special_visual_initialize=special))
    for name in ("token_type_embeddings", "position_embeddings"):
        text = values.read(f"embeddings.{name}.weight")
        visual = values.read(f"embeddings.visual_{name}.weight")
        assert np.array_equal(text, visual) == special


def test_a_body_is_the_same_under_every_head():
    config = tiny_config()
    body = InitialValues("VisualBertModel", config, seed=3)
    for architecture in ARCHITECTURES[1:]:
        head = InitialValues(architecture, config, seed=3)
        for name in body.specs:
            assert np.array_equal(body.read(name), head.read("visual_bert." + name))
    assert not np.array_equal(
        body.read("pooler.dense.weight"),
        InitialValues("VisualBertModel", config, seed=4).read("pooler.dense.weight"),
    )
