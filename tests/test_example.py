"""The example on transformers' VisualBERT page, with only the import changed."""

import numpy as np
import pytest
from tiny import make_model, tiny_config

transformers = pytest.importorskip("transformers")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "capital",
    "of",
    "france",
    "is",
    "paris",
    ".",
]


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    make_model("pt", "VisualBertForPreTraining", tiny_config()).save_pretrained(
        tmp_path / "coco-pre"
    )
    return tmp_path


def test_the_documented_example(checkpoint):
    import torch
    from transformers import BertTokenizer

    from visualbert import VisualBertModel

    def get_visual_embeddings(image):
        return torch.randn(10, 20, generator=torch.Generator().manual_seed(0))

    image = None
    tokenizer = BertTokenizer(str(checkpoint / "vocab.txt"))
    model = VisualBertModel.from_pretrained(checkpoint / "coco-pre")

    inputs = tokenizer("The capital of France is Paris.", return_tensors="pt")
    visual_embeds = get_visual_embeddings(image).unsqueeze(0)
    visual_token_type_ids = torch.ones(visual_embeds.shape[:-1], dtype=torch.long)
    visual_attention_mask = torch.ones(visual_embeds.shape[:-1], dtype=torch.float)

    inputs.update(
        {
            "visual_embeds": visual_embeds,
            "visual_token_type_ids": visual_token_type_ids,
            "visual_attention_mask": visual_attention_mask,
        }
    )

    outputs = model(**inputs)

    last_hidden_state = outputs.last_hidden_state
    theirs = transformers.VisualBertModel.from_pretrained(checkpoint / "coco-pre").eval()
    assert last_hidden_state.shape == (1, 19, 24)
    assert torch.allclose(last_hidden_state, theirs(**inputs).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "TF", "Flax"])
def test_the_same_example_in_every_framework(checkpoint, prefix):
    import visualbert

    tokenizer = transformers.BertTokenizer(str(checkpoint / "vocab.txt"))
    cls = getattr(visualbert, f"{prefix}VisualBertForPreTraining")
    model = cls.from_pretrained(checkpoint / "coco-pre")
    inputs = tokenizer("The capital of France is [MASK].", return_tensors="np")
    features = np.random.default_rng(0).standard_normal((1, 10, 20)).astype(np.float32)
    labels = tokenizer("The capital of France is Paris.", return_tensors="np")["input_ids"]
    outputs = model(
        **inputs, visual_embeds=features, labels=labels, sentence_image_labels=np.array([1])
    )
    assert outputs.prediction_logits.shape == (1, 19, 113)
    assert outputs.seq_relationship_logits.shape == (1, 2)
    assert float(outputs.loss) > 0
    assert outputs.hidden_states is None
    assert outputs["loss"] is outputs[0]
    with pytest.raises(AttributeError, match="has no 'last_hidden'"):
        outputs.last_hidden  # noqa: B018
