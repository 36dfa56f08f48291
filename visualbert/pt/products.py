"""Products of linear layers in float32 on a CPU, by oneDNN.

PyTorch gives them to MKL, which is slower on AMD's processors. Gradients are products of
the same kind. What looks into a product, as compilers and transformations do, gets
PyTorch's own; so does everyone where `torch.backends.mkldnn.enabled` is false.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PLAIN = (Tensor, nn.Parameter, type(None))  # no subclass, which may stand for something else


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, (…, in) to (…, out), as `torch.nn.functional.linear`."""
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if seen or not _serves(x, weight, bias):
        return F.linear(x, weight, bias)
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Linear.apply(x, weight, bias)
    return multiply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # M in, M out
        return (
            linear(grad, weight.t()) if needs_x else None,
            linear(grads.t(), rows.t()) if needs_weight else None,
            grads.sum(0) if needs_bias else None,
        )


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's product can stand for PyTorch's."""
    return (
        all(type(given) in _PLAIN for given in (x, weight, bias))
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.dim() > 1
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch.autograd.forward_ad._current_level < 0
        and _has_product()
    )


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = ""
) -> Tensor:
    """oneDNN's product, and the activation after it; `weight` may lie in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, activation, [], algorithm
    )


@cache
def _has_product() -> bool:
    """Whether there is such a product on this CPU, and it is right: the operation is private."""
    x, weight = (torch.arange(8.0 * n, device="cpu").reshape(n, 8) % 5 for n in (3, 6))
    cases = (x, weight, torch.arange(6.0, device="cpu")), (x.t(), weight.t()[:3].t(), None)
    try:
        with torch.no_grad():
            return all(torch.equal(multiply(*case), F.linear(*case)) for case in cases)
    except (AttributeError, RuntimeError):
        return False
