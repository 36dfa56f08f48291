"""The limit: how fast this machine multiplies matrices at the model's shapes.

Every linear layer of the model is multiplied once with as many rows as the batch has real tokens,
each with weights of its own, as they come from memory in a model too. For each shape the quickest
of the ways below counts.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from visualbert.config import VisualBertConfig

Product = Callable[[], Any]


def plain(x: Any, weight: Any) -> Product:
    """`torch.mm`, the weight as `nn.Linear` keeps it."""
    import torch

    return lambda: torch.mm(x, weight.t())


def packed(x: Any, weight: Any) -> Product:
    """oneDNN's product with a weight that was packed for the matrix unit before."""
    import torch

    kept: Any = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, kept, None, "none", [], "")


def integer(x: Any, weight: Any) -> Product:
    """`torch._int_mm`, which sums in int32."""
    import torch

    return lambda: torch._int_mm(x, weight.t())


def quantized(x: Any, weight: Any) -> Product:
    """oneDNN's int8 product, from unsigned bytes to float32."""
    import torch

    kept: Any = torch.ops.onednn.qlinear_prepack(weight, list(x.shape))
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    rows = x.view(torch.uint8)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, kept, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def ways(device: str, dtype: str) -> tuple[Callable[[Any, Any], Product], ...]:
    """What is tried."""
    if dtype == "int8":
        return integer, quantized
    return (plain,) if device == "cuda" else (plain, packed)


def shapes(
    config: VisualBertConfig, tokens: int, regions: int
) -> Iterator[tuple[int, int, int, int]]:
    """(rows, in, out, how often) of the model's linear layers."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    yield tokens, hidden, 3 * hidden, layers  # query, key and value
    yield tokens, hidden, hidden, layers
    yield tokens, hidden, inner, layers
    yield tokens, inner, hidden, layers
    yield regions, config.visual_embedding_dim, hidden, 1


class Limit:
    """The products of one batch; a call gives operations a second."""

    def __init__(
        self, config: VisualBertConfig, tokens: int, regions: int, device: str, dtype: str
    ) -> None:
        self.device = device
        self.products: list[list[list[Product]]] = []  # by shape, way and layer
        self.operations = 0
        for rows, inward, outward, count in shapes(config, tokens, regions):
            x = _random(rows, inward, device, dtype)
            weights = [_random(outward, inward, device, dtype) for _ in range(count)]
            made = [_made(way, x, weights) for way in ways(device, dtype)]
            self.products.append([products for products in made if products])
            self.operations += 2 * rows * inward * outward * count
        if not all(self.products):
            raise RuntimeError(f"PyTorch multiplies no {dtype} matrices on this machine")

    def __call__(self) -> float:
        import torch

        with torch.inference_mode():
            seconds = sum(min(map(self.timed, way)) for way in self.products)
        return self.operations / seconds

    def timed(self, products: list[Product]) -> float:
        """Seconds for all, one behind the other."""
        self.wait()
        start = time.perf_counter()
        for product in products:
            product()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def _random(rows: int, columns: int, device: str, dtype: str) -> Any:
    import torch

    if dtype == "int8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    return torch.randn(rows, columns, device=device).to(getattr(torch, dtype))


def _made(way: Callable[[Any, Any], Product], x: Any, weights: list[Any]) -> list[Product]:
    """The products in one way; none where this machine cannot do it so."""
    try:
        made = [way(x, weight) for weight in weights]
        made[0]()
    except (RuntimeError, AttributeError):
        return []
    return made
