"""Attention on rows in which examples stand one behind the other, each attending to itself alone.

On a CPU every stretch goes through the attention of the model by itself, which is faster than any
mask; on a GPU PyTorch's variable-length flash attention takes all at once. What it needs to know is
worked out on the GPU, so that nothing waits for it and the shapes are known when compiling.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visualbert.packing import Packing, runs

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

_BUILT = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None
_WIDEST_HEAD = 256


class Stretches(NamedTuple):
    """What stands where in the rows, in place of a mask: `lengths` for a CPU, else `starts`."""

    lengths: list[int] | None
    starts: Tensor | None = None  # of each stretch, and the end of the last
    longest: int = 0


def make_stretches(packing: Packing, flash: bool) -> Stretches:
    """The stretches of a packing's rows."""
    examples, length = packing.places.shape
    if flash:
        return Stretches(None, starts_of(packing.source, examples, length), length)
    return Stretches(runs(packing.source.cpu().numpy(), length))


def starts_of(source: Tensor, examples: int, length: int) -> Tensor:
    """Where stretches of at most `length` begin, and where the last one ends, in int32.

    An example is one stretch. Empty places are cut where `length` divides their number in the row.
    As many stretches as there can be are given; those too many have no length.
    """
    rows, row_length = source.shape
    most = examples + rows * (row_length // length + 2)
    example = source.div(length, rounding_mode="floor").reshape(-1)  # R·K, -1 where empty
    place = torch.arange(rows * row_length, device=source.device)
    begins = (example < 0) & (place % row_length % length == 0)
    begins |= (example != example.roll(1)) | (place == 0)
    starts = place.new_full((most + 1,), rows * row_length)
    number = torch.where(begins, begins.cumsum(0) - 1, most)
    starts = starts.scatter(0, number, torch.where(begins, place, rows * row_length))
    return starts.to(torch.int32)


def attend_apart(
    attend: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, stretches: Stretches
) -> Tensor:
    """Attention of each stretch to itself, (R, K, N, D) as the arguments.

    Args:
        attend: attention of (1, length, N, D) without a mask, and its probabilities.
    """
    parts: Any = [x.reshape(-1, *x.shape[2:]) for x in (query, key, value)]  # R·K N D
    context: Any
    if stretches.lengths is None:
        starts, longest = stretches.starts, stretches.longest
        kernel: Any = varlen_attn
        context = kernel(*parts, starts, starts, longest, longest)
    else:
        pieces = zip(*(x.split(stretches.lengths) for x in parts), strict=True)
        context = torch.cat([attend(*(x[None] for x in piece), None)[0][0] for piece in pieces])
    return context.reshape(query.shape)


def flash_serves(device: torch.device, dtype: torch.dtype, head_size: int, dropout: float) -> bool:
    """Whether variable-length flash attention, which has no dropout, can serve such a model."""
    half = dtype in (torch.float16, torch.bfloat16)
    fits = head_size % 8 == 0 and head_size <= _WIDEST_HEAD
    if varlen_attn is None or not _BUILT or device.type != "cuda" or dropout or not (half and fits):
        return False
    return torch.cuda.get_device_properties(device).major >= 8
