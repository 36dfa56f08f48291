"""oneDNN's products in PyTorch on a CPU: values, gradients and gradients of gradients are those of
`torch.nn.functional.linear`, and whatever looks into a product finds PyTorch's own.
"""

import io

import pytest
import torch
from native_helpers import ANSWERS, PRETRAINING, batch, tiny_config
from tiny import make_model
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visualbert.pt import products
from visualbert.pt.modeling import Linear
from visualbert.pt.products import linear

needs_product = pytest.mark.skipif(
    not products._has_product(), reason="this PyTorch has no such product"
)
SHAPES = {
    "rows": (5, 8),
    "one row": (1, 8),
    "batch": (2, 3, 8),
    "choices": (2, 3, 4, 8),
}


@pytest.fixture
def multiplied(monkeypatch):
    """The shapes that oneDNN multiplies."""
    found, multiply = [], products.multiply
    monkeypatch.setattr(
        products, "multiply", lambda x, *rest: found.append(x.shape) or multiply(x, *rest)
    )
    return found


def made(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def error(found, expected):
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))


def twice(product, x, weight, bias):
    """Values, gradients, and the gradients of their squares."""
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    value = product(x, weight, bias)
    first = torch.autograd.grad(value.sin().mean(), given, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    return [value, *first, *second]


@needs_product
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("turned", [True, False], ids=["strided", "contiguous"])
def test_values_and_gradients(shape, biased, turned, multiplied):
    x, weight, bias = made(SHAPES[shape], (6, 8), (6,))
    bias = bias if biased else None
    if turned:
        x = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        weight = weight.detach().t().contiguous().t().requires_grad_()
    found, expected = twice(linear, x, weight, bias), twice(F.linear, x, weight, bias)
    assert error(found, expected) < 1e-5
    assert len(multiplied) >= 3  # forward, and both gradients
    assert error(twice(linear, x, weight * 1.01, bias), expected) > 1e-4


@needs_product
def test_only_what_needs_a_gradient_gets_one(multiplied):
    x, weight, bias = made((5, 8), (6, 8), (6,))
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None
    assert len(multiplied) == 2
    assert linear(x.detach(), weight.detach()).grad_fn is None
    with torch.no_grad():
        assert linear(x, weight).grad_fn is None
    with torch.inference_mode():
        assert linear(x, weight).is_inference()


def as_function(x, weight, bias):
    return torch.func.grad(lambda w: linear(x, w, bias).sin().sum())(weight)


def as_batch(x, weight, bias):
    return torch.func.vmap(lambda row: linear(row[None], weight, bias))(x)


def dual(x, weight, bias):
    with torch.autograd.forward_ad.dual_level():
        made = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(linear(made, weight, bias)).tangent


def in_bfloat16(x, weight, bias):
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    return found.float()


def traced(x, weight, bias):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(linear, (x, weight, bias), check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)(x, weight, bias)


def counted(x, weight, bias):
    with FlopCounterMode(display=False) as counter:
        found = linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 5 * 8 * 6
    return found


def switched_off(x, weight, bias):
    with torch.backends.mkldnn.flags(enabled=False):
        return linear(x, weight, bias)


def compiled(x, weight, bias):
    return torch.compile(linear, fullgraph=True, backend="eager")(x, weight, bias)


def one_dimension(x, weight, bias):
    return linear(x[0], weight, bias)


def no_rows(x, weight, bias):
    return linear(x[:0], weight, bias)


def of_a_subclass(x, weight, bias):
    class Mine(torch.Tensor):
        pass

    return linear(x.detach().as_subclass(Mine), weight, bias).as_subclass(torch.Tensor)


def symbolically(x, weight, bias):
    layer = Linear(8, 6)
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return torch.fx.symbolic_trace(layer)(x)


WATCHED = {
    as_function: lambda x, w, b: torch.func.grad(lambda w: F.linear(x, w, b).sin().sum())(w),
    as_batch: lambda x, w, b: F.linear(x, w, b)[:, None],
    dual: lambda x, w, b: F.linear(torch.ones_like(x), w),
    in_bfloat16: lambda x, w, b: F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).float(),
    traced: F.linear,
    counted: F.linear,
    switched_off: F.linear,
    compiled: F.linear,
    one_dimension: lambda x, w, b: F.linear(x[0], w, b),
    no_rows: lambda x, w, b: F.linear(x[:0], w, b),
    of_a_subclass: F.linear,
    symbolically: F.linear,
}


@pytest.mark.parametrize("way", WATCHED, ids=lambda way: way.__name__)
def test_what_looks_into_a_product_finds_pytorchs(way, multiplied):
    given = made((5, 8), (6, 8), (6,))
    found, expected = way(*given), WATCHED[way](*given)
    assert found.shape == expected.shape and torch.equal(found, expected)
    assert not multiplied


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_pytorchs(dtype, multiplied):
    given = made((5, 8), (6, 8), (6,), dtype=dtype)
    assert torch.equal(linear(*given), F.linear(*given))
    assert not multiplied


@needs_product
@pytest.mark.parametrize("architecture", [ANSWERS, PRETRAINING])
def test_models_use_it_and_learn_the_same(architecture, multiplied):
    model = make_model("pt", architecture, tiny_config())
    inputs = {name: torch.as_tensor(x) for name, x in batch(architecture).items()}
    found = {}
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            model.zero_grad()
            model(**inputs).loss.backward()
        found[enabled] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        count = len(multiplied)
        multiplied.clear()
        linears = sum(isinstance(module, nn.Linear) for module in model.modules())
        assert (count > 2 * linears) is enabled
    assert error(found[True], found[False]) < 1e-5
