"""MMF's model archives: a tar, gzipped or not, with one weight file and a YAML configuration.

Nothing is unpacked under a name that the archive chooses: the weights go to an anonymous temporary
file, which the system removes with the process. An archive with a link, an absolute path or a way
out of its folder is refused whole, and so is one that unpacks to far more than weights could.
"""

import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import yaml

from visualbert.errors import CheckpointError, ConfigError

WEIGHTS = (".pth", ".ckpt", ".pt", ".th", ".bin")
CONFIGS = (".yaml", ".yml")
_MOST_MEMBERS = 10_000
_MOST_YAML = 1 << 18
_LEAST_PACKED = 200  # weights never shrink this much
_FREE = 1 << 24


class Archive(NamedTuple):
    """What a model archive holds."""

    name: str  # of the weight file
    weights: BinaryIO
    config: dict[str, Any] | None


def is_archive(head: bytes) -> bool:
    """Whether a file that starts with `head` (512 bytes) is a tar, gzipped or not."""
    return head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar"


def open_archive(path: Path) -> Archive:
    """The weight file and the configuration in an archive.

    Raises:
        CheckpointError: it is damaged, dangerous, or holds no weights, or more than one file of
            them.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            return _read(path, archive)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, CheckpointError):
            raise
        words = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path}: not a whole tar archive ({words}); fetch or write it again"
        ) from None


def _read(path: Path, archive: tarfile.TarFile) -> Archive:
    limit = _LEAST_PACKED * path.stat().st_size + _FREE
    weights, name, config, total = None, "", None, 0
    for count, member in enumerate(archive):
        total += member.size
        _check_member(path, member)
        if count >= _MOST_MEMBERS or total > limit:
            raise CheckpointError(
                f"{path}: unpacks to more than weights could; it is refused as an archive bomb"
            )
        suffix = Path(member.name).suffix.lower()
        if not member.isfile() or Path(member.name).name.startswith("._"):
            continue
        if suffix in WEIGHTS:
            if weights is not None:
                raise CheckpointError(
                    f"{path}: holds two weight files, {name!r} and {member.name!r}; unpack it and "
                    "name one"
                )
            weights, name = _extract(path, archive, member), member.name
        elif suffix in CONFIGS and config is None:
            content = archive.extractfile(member)
            assert content is not None
            config = parse_yaml(f"{path}: {member.name}", content.read(_MOST_YAML + 1))
    if weights is None:
        raise CheckpointError(
            f"{path}: holds no weights; looked for a file ending in {', '.join(WEIGHTS)}"
        )
    return Archive(name, weights, config)


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    name = member.name.replace("\\", "/")
    where = f"{path}: refused, because its member {member.name[:200]!r}"
    if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
        raise CheckpointError(f"{where} would lie outside the archive's folder")
    if not (member.isfile() or member.isdir()):
        raise CheckpointError(f"{where} is a link or a device, which no model archive needs")
    if member.size < 0 or member.issparse():
        raise CheckpointError(f"{where} has an impossible size")


def _extract(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    """The member's bytes in a temporary file without a name."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if member.size > free:
        raise CheckpointError(
            f"{path}: unpacking needs {member.size / 1e6:.1f} MB in {tempfile.gettempdir()}, which "
            f"has {free / 1e6:.1f} MB left; set TMPDIR to a larger disk"
        )
    source = archive.extractfile(member)
    assert source is not None
    target = tempfile.TemporaryFile()  # noqa: SIM115 (held open by what is mapped)
    shutil.copyfileobj(source, target, 1 << 20)
    if target.tell() != member.size:
        raise EOFError(f"{member.name} is cut short")
    target.flush()
    os.lseek(target.fileno(), 0, os.SEEK_SET)
    target.seek(0)
    return target  # type: ignore[return-value]


class _Plain(yaml.SafeLoader):
    """YAML without merge keys, which double with every level."""

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys (<<) are not read")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; no tag makes an object.

    Raises:
        ConfigError: it is none.
    """
    try:
        with open(path, "rb") as file:
            return parse_yaml(str(path), file.read(_MOST_YAML + 1))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_yaml(label: str, text: bytes) -> dict[str, Any]:
    """As `read_yaml`, of a text."""
    if len(text) > _MOST_YAML:
        raise ConfigError(f"{label}: a YAML file of more than 256 KiB is not a configuration")
    try:
        found = yaml.load(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{label}: not readable as plain YAML: {reason}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{label}: expected a YAML mapping, found a {type(found).__name__}")
    return found
