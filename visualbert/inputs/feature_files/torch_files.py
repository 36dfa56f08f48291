"""Features in a file of torch.save: a dictionary of image ids to (features, boxes, confidences), as
the original reads it for NLVR2. Tensors are mapped, not read.

Source: uclanlp's nlvr_dataset.py, which appends .npz to the ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visualbert.checkpoint import pickles
from visualbert.checkpoint.torch_files import TorchTensor, open_torch
from visualbert.errors import InputError
from visualbert.inputs.feature_files.records import regions_of
from visualbert.inputs.feature_files.store import FeatureStore
from visualbert.inputs.regions import Regions

_PARTS = ("features", "boxes", "scores")  # and more, which are not read
_STREAM = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


class TorchStore(FeatureStore):
    """A dictionary of tuples of tensors, or of dictionaries of tensors, by image id."""

    form = "PyTorch file"

    @staticmethod
    def recognises(path: Path, head: bytes) -> bool:
        length = int.from_bytes(head[26:28], "little")
        archive = head.startswith(b"PK\x03\x04") and b"/" in head[30 : 30 + length]
        return head.startswith(_STREAM) or archive

    def _open(self) -> None:
        self._opened = open_torch(self.path)
        value = self._opened.value
        if not isinstance(value, dict) or not value:
            raise InputError(
                f"{self.path}: expected a dictionary of features by image id, got "
                f"{type(value).__name__}"
            )
        self._names = {str(name).removesuffix(".npz"): name for name in value}

    def _find(self, name: str) -> Any:
        return self._names.get(name)

    def _read(self, place: Any) -> Regions:
        item = self._opened.value[place]
        parts = dict(zip(_PARTS, item, strict=False)) if isinstance(item, tuple | list) else item
        if not isinstance(parts, dict):
            parts = {"features": item}
        if parts.get("features") is pickles.INERT:
            raise InputError(
                "its features are a numpy array inside torch's pickle, which is not read; load the "
                "file with torch.load and write it with visualbert.inputs.features.write_features"
            )
        arrays = {
            name: self._opened.read(part) if isinstance(part, TorchTensor) else part
            for name, part in parts.items()
            if part is not pickles.INERT
        }
        return regions_of(arrays, self.provenance)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _close(self) -> None:
        self._opened.file.close()
