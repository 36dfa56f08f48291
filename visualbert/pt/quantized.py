"""Linear layers in int8 on a CPU, for inference; everything else stays in float32.

A weight is rounded once, with one scale for each output. Activations are rounded at every call,
with one scale for each position, so that what a position gives does not depend on what else is in
the batch. The product is oneDNN's (`torch.ops.onednn`), which PyTorch's compiler uses for quantized
models too; docs/precision.md compares it with the others.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from visualbert.errors import UsageError

# Added to a smaller number, it leaves that number, rounded, in the lowest bits of the sum.
_ROUNDING = 1.5 * 2**23
_ROWS = 64  # of a weight at a time: larger pieces leave holes in memory that stay
_SYMMETRIC = torch.zeros(1, dtype=torch.int32, device="cpu")  # a weight's zero points


def quantize(model: Any) -> Any:
    """Turn a model's linear layers into int8 ones, in place and one after the other; what else it
    has becomes float32, and it is fit for inference alone.

    Args:
        model: any model of `visualbert.pt`, in any floating type, on the CPU.

    Returns:
        The model.

    Raises:
        UsageError: it is not on the CPU, or this PyTorch has no int8 product there.
    """
    if isinstance(model, Quantized):
        return model
    if model.device.type != "cpu":
        raise UsageError(
            f"dtype='int8' is for the CPU, and the model is on {model.device}; use bfloat16 or "
            "float16 there"
        )
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        raise UsageError(
            "dtype='int8' needs a PyTorch with oneDNN, which this one is not; use bfloat16 or "
            "float32"
        )
    model.eval()
    _replace_linears(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False).data = parameter.data.float()
    for part in {model, model.body()}:
        part.__class__ = _quantized(type(part))  # type: ignore[arg-type]
    return model


def _replace_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantizedLinear.of(child))
        else:
            _replace_linears(child)


class QuantizedLinear(nn.Module):
    """`x @ weight.T + bias` with an int8 weight, (…, in) to (…, out) in float32.

    Args:
        weight: (out, in) in int8.
        scale: (out,), what each row of `weight` is multiplied by.
        bias: (out,).
    """

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self._pack(weight)

    @classmethod
    def of(cls, *layers: "nn.Linear | QuantizedLinear") -> "QuantizedLinear":
        """One layer with the outputs of `layers`, which have one input, behind each other."""
        parts = zip(*map(_rounded, layers), strict=True)
        return cls(*(torch.cat(part) for part in parts))

    @property
    def weight(self) -> Tensor:
        """(out, in) in int8; a copy, since the kernel has a layout of its own."""
        return self._packed.to_dense().t()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            _refuse("has no gradients")
        rows = x.reshape(-1, self.in_features).float()  # M in
        largest = rows.abs().amax(1, keepdim=True)  # M 1
        shifted = torch.addcmul(self._shift, rows, largest.reciprocal(), value=self._levels)
        rounded = shifted.view(torch.int32).to(torch.uint8)
        multiply = _multiply_traced if torch.compiler.is_compiling() else _multiply
        product = multiply(rounded, self._packed, self._step, self._offset)  # M out
        found = torch.addcmul(self.bias, product, largest)
        return found.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype=int8"

    def _pack(self, weight: Tensor) -> None:
        """Take `weight` over; called again where `scale` has changed."""
        self.out_features, self.in_features = weight.shape
        self._packed: Any = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self._levels = levels()
        zero = self._levels + 1
        self._shift = torch.full((self.in_features,), _ROUNDING + zero)
        self._step = self.scale / self._levels
        sums = torch.cat([rows.sum(1) for rows in weight.split(_ROWS)])
        self._offset = -zero * self._step * sums

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, shape = f"{prefix}weight", (self.out_features, self.in_features)
        rest = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        weight = state_dict.get(name, self.weight)
        if name not in state_dict:
            missing_keys.append(name)
        if weight.dtype != torch.int8 or weight.shape != shape:
            error_msgs.append(
                f"{name} is {weight.dtype} of shape {tuple(weight.shape)}, expected torch.int8 of "
                f"shape {shape}"
            )
        else:
            self._pack(weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack(self._packed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedLinear":
        memo[id(self._packed)] = self._packed  # nothing changes it
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class Quantized:
    """What a model whose linear layers are int8 does differently."""

    quantized = True

    def train(self, mode: bool = True) -> Any:
        """Refuse training mode.

        Raises:
            UsageError: `mode` is true.
        """
        if mode:
            _refuse("cannot be trained")
        return super().train(False)  # type: ignore[misc]

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """As `PreTrained.num_parameters`: int8 numbers count like others."""
        layers = [x for x in self.modules() if isinstance(x, QuantizedLinear)]  # type: ignore[attr-defined]
        others = super().num_parameters(exclude_embeddings=exclude_embeddings)  # type: ignore[misc]
        return others + sum(x.in_features * x.out_features for x in layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.zeros(1, device="cpu"))
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            _refuse("stays on the CPU, and in float32 where it is not int8", "there")
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__bases__[1],), self.__dict__


@cache
def _quantized(cls: Any) -> Any:
    """`cls` for a model whose linear layers are int8."""
    return type(cls.__name__, (Quantized, cls), {"__doc__": cls.__doc__, "__module__": __name__})


def _restored(cls: Any) -> Any:
    """A model of `_quantized(cls)` whose state is about to be set."""
    made = _quantized(cls)
    return made.__new__(made)


def _refuse(what: str, way: str = "for that") -> NoReturn:
    raise UsageError(f"a model in int8 {what}; load it in float32 {way}")


def _rounded(layer: "nn.Linear | QuantizedLinear") -> tuple[Tensor, Tensor, Tensor]:
    """Weight, scale and bias of a layer in int8."""
    if isinstance(layer, QuantizedLinear):
        return layer.weight, layer.scale, layer.bias
    pieces = [_rounded_rows(rows.float()) for rows in layer.weight.detach().split(_ROWS)]
    weight, scale = (torch.cat(piece) for piece in zip(*pieces, strict=True))
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().float()
    return weight, scale, bias


def _rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest, 1) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def _multiply(rows: Tensor, packed: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """(M, out) in float32: rows (M, in), in uint8, times a packed weight, times `step` (out,), plus
    `offset` (out,).
    """
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, packed, step, _SYMMETRIC, offset, 1.0, 0, torch.float32, "none", [], ""
    )


# PyTorch's compiler knows `onednn` only in graphs that it has frozen.
_multiply_traced = torch.library.custom_op("visualbert::int8_product", mutates_args=())(_multiply)
_multiply_traced.register_fake(
    lambda rows, packed, step, offset: step.new_empty(rows.shape[0], step.shape[0])
)


@cache
def levels() -> int:
    """The largest rounded activation: 127, or 63 where the kernel adds pairs of products in 16 bits
    (x86 without VNNI), which overflow with larger ones.
    """
    weight = torch.full((64, 64), 127, dtype=torch.int8)
    rows = torch.full((64, 64), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    exact = _multiply(rows, packed, torch.ones(64), torch.zeros(64)) == 255 * 127 * 64
    return 127 if exact.all() else 63
