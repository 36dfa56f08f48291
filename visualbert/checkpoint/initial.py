"""Initial values, drawn once in numpy so that every framework starts from the same tensors.

BERT's scheme: normal with `initializer_range` for tables and weights, zero biases, unit LayerNorm.
Each tensor has a generator of its own, seeded by its name, so a body is the same under every head.
"""

import zlib

import numpy as np

from visualbert.checkpoint.tensors import Spec
from visualbert.config import VisualBertConfig
from visualbert.errors import UsageError
from visualbert.schema import COPIED, PREFIX, Kind, parameters

_CONSTANTS = {Kind.BIAS: 0.0, Kind.SHIFT: 0.0, Kind.SCALE: 1.0}


class InitialValues:
    """`Tensors` of a model that was never trained, float32.

    With `config.special_visual_initialize` the visual segment and position tables are copies of the
    text tables (the original's `special_intialize`).

    Raises:
        UsageError: the seed is not a whole number from 0 up.
    """

    def __init__(self, architecture: str, config: VisualBertConfig, seed: int = 0) -> None:
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
            raise UsageError(f"seed={seed!r} must be an integer from 0 up")
        self.label = f"initial values, seed {seed}"
        self._config = config
        self._seed = seed
        self._params = {p.name: p for p in parameters(architecture, config)}
        self.specs = {n: Spec(p.shape(config), "float32") for n, p in self._params.items()}

    def read(self, name: str) -> np.ndarray:
        param = self._params[name]
        shape = param.shape(self._config)
        if param.kind in _CONSTANTS:
            return np.full(shape, _CONSTANTS[param.kind], np.float32)
        short = name.removeprefix(PREFIX)
        if self._config.special_visual_initialize:
            short = COPIED.get(short, short)
        generator = np.random.default_rng([self._seed, zlib.crc32(short.encode())])
        array = generator.standard_normal(shape, dtype=np.float32)
        array *= self._config.initializer_range
        return array
