"""What models return: an ordered mapping with attribute access, the same type in every framework.

Only keys that were computed are present, `loss` first. Each framework's package registers the type
as a pytree, so that it survives `jax.jit`, `tf.function`, Keras `predict`, `torch.compile` and
`torch.export`.
"""

from collections.abc import Iterable
from typing import Any

# In this order. B batch, T text, V regions, S = T + V, N heads, H hidden, L labels, W words.
KEYS = (
    "loss",  # ()
    "prediction_logits",  # (B, S, W)
    "seq_relationship_logits",  # (B, 2); index 1 = the caption matches the image
    "logits",  # (B, L), (B, choices) or (B, phrases, V)
    "last_hidden_state",  # (B, S, H)
    "pooler_output",  # (B, H)
    "hidden_states",  # layers + 1 of (B, S, H), the embeddings first
    "attentions",  # layers of (B, N, S, S), after softmax
)


class ModelOutput(dict):
    """A dict whose values are also attributes and, in order, items of a tuple.

    `outputs["logits"]`, `outputs.logits` and `outputs[0]` work. An attribute in `KEYS` that this
    call did not compute is None; any other raises AttributeError.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in KEYS:
            return None
        raise AttributeError(f"{type(self).__name__} has no {name!r}; present: {', '.join(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """The values that are present, in the order of `KEYS`."""
        return tuple(self.values())


def model_output(return_dict: bool | None = None, **values: Any) -> Any:
    """A ModelOutput, or its tuple where `return_dict` is False, of those `values` that are not
    None, in the order of `KEYS`.
    """
    output = ModelOutput()
    for key in KEYS:
        if values.get(key) is not None:
            output[key] = values[key]
    return output.to_tuple() if return_dict is False else output


def flatten(output: ModelOutput) -> tuple[list[Any], tuple[str, ...]]:
    """Children and keys, for pytree registries."""
    return list(output.values()), tuple(output)


def unflatten(keys: Iterable[str], children: Iterable[Any]) -> ModelOutput:
    """The inverse of `flatten`."""
    return ModelOutput(zip(keys, children, strict=True))
