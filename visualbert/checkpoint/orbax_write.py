"""Orbax's folder written with tensorstore alone: what `StandardCheckpointer` writes for a model.

Orbax itself wants every array in memory at once and imports JAX; here memory holds a group of them
that fits 64 MiB, or one that does not. Source: orbax.checkpoint, _src/metadata/tree.py and
_src/serialization/tensorstore_utils.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visualbert.checkpoint.flax_files import _to_flax
from visualbert.checkpoint.mapped import need
from visualbert.checkpoint.tensors import Tensors, transpose
from visualbert.schema import Kind, Param

_GROUP = 1 << 26  # bytes that are committed together
_DICT_KEY = 2  # what Orbax calls the key of a dictionary
_LAYOUT = {
    "use_ocdbt": True,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
}
_CHECKPOINT = {
    "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler."
    "StandardCheckpointHandler",
    "metrics": {},
    "performance_metrics": {},
    "custom_metadata": {},
}


def write_orbax(
    path: Path, tensors: Tensors, params: Sequence[Param], progress: Callable[[int], object]
) -> None:
    """Write what Orbax's `StandardCheckpointer` writes for the model's nested dictionary."""
    tensorstore = need("tensorstore", path, "flax")
    path.mkdir()
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    transaction, held = tensorstore.Transaction(), 0
    for param in params:
        array = tensors.read(param.name)
        array = transpose(array) if param.kind is Kind.LINEAR else np.ascontiguousarray(array)
        if held and held + array.nbytes > _GROUP:
            transaction.commit_sync()
            transaction, held = tensorstore.Transaction(), 0
        spec = _spec(path, _to_flax(param), array)
        store = tensorstore.open(spec, context=context, transaction=transaction).result()
        store.write(array).result()
        held += array.nbytes
        progress(array.nbytes)
        del array, store
    transaction.commit_sync()
    tree = dict(_entry(_to_flax(param).split(".")) for param in params)
    _write_json(path / "_METADATA", {"tree_metadata": tree, **_LAYOUT})
    _write_json(path / "_CHECKPOINT_METADATA", _CHECKPOINT)


def _spec(path: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """One array in one chunk, as Orbax stores it."""
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{path.absolute()}/"},
            "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000},
            "path": name + "/",
        },
        "dtype": array.dtype.name,
        "metadata": {
            "shape": array.shape,
            "chunks": [max(size, 1) for size in array.shape],
            "compressor": {"id": "zstd", "level": 1},
        },
        "store_data_equal_to_fill_value": True,
        "create": True,
    }


def _entry(keys: list[str]) -> tuple[str, dict[str, Any]]:
    """What _METADATA says about the array at `keys`."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    path = [{"key": key, "key_type": _DICT_KEY} for key in keys]
    return str(tuple(keys)), {"key_metadata": path, "value_metadata": value}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
