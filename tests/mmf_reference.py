"""MMF's classifier of two layers in numpy, on last hidden states (mmf/models/visual_bert.py)."""

import math

import numpy as np

REASONING = "VisualBertForVisualReasoning"


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, values, name):
    return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]


def layer_norm(x, values, name, eps=1e-12):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return normal * values[f"{name}.weight"] + values[f"{name}.bias"]


def mmf_logits(states, mask, architecture, values, activation=gelu, norm=layer_norm, back=2):
    """MMF's `classifier(dropout(pooled))` from the last hidden states, one example at a time."""
    rows = []
    for state, real in zip(states, mask, strict=True):
        tokens = state[: len(real)][real == 1]
        if architecture == REASONING:
            x = np.tanh(linear(tokens[0], values, "visual_bert.pooler.dense"))
        else:
            x = tokens[-back]
        x = norm(
            activation(linear(x, values, "cls.transform.dense")), values, "cls.transform.LayerNorm"
        )
        rows.append(linear(x, values, "cls.decoder"))
    return np.stack(rows)
