"""MMF's model archives: a tar, gzipped or not, with one weight file and a YAML configuration.

An archive is read once from front to back, so that gzip's checksum is compared too, and only by
what ustar, GNU and PAX headers need for plain files. Nothing is unpacked under a name that the
archive chooses: the weights go to an anonymous temporary file, which the system removes with the
process. An archive with a link, an absolute path or a way out of its folder is refused whole, and
so is one that unpacks to far more than weights could. Sources: POSIX pax, GNU tar, RFC 1952.
"""

import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import yaml

from visualbert.checkpoint.mapped import broken, open_file
from visualbert.errors import CheckpointError, ConfigError

WEIGHTS = (".pth", ".ckpt", ".pt", ".th", ".bin")
CONFIGS = (".yaml", ".yml")
_GZIP = b"\x1f\x8b"
_BLOCK = 512
_CHUNK = 1 << 20
_PIECE = 1 << 16
_MOST_MEMBERS = 10_000
_MOST_STREAMS = 100_000  # gzip streams, one behind the other
_MOST_YAML = 1 << 17
_MOST_HEADER = 1 << 16  # of PAX records and of long names
_LEAST_PACKED = 50  # weights never shrink this much
_FREE = 1 << 24

# Types of members: plain files, folders, and headers of the one that follows.
_FILES, _FOLDER = (b"0", b"\0", b"7"), b"5"
_LONG_NAME, _RECORDS, _GLOBAL = b"L", b"x", b"g"


class Archive(NamedTuple):
    """What a model archive holds."""

    name: str  # of the weight file
    weights: BinaryIO
    config: dict[str, Any] | None


class _Member(NamedTuple):
    name: str
    size: int
    folder: bool


def is_archive(head: bytes) -> bool:
    """Whether a file that starts with `head` (512 bytes) is a tar, gzipped or not."""
    return head[:2] == _GZIP or head[257:262] == b"ustar"


def open_archive(path: Path) -> Archive:
    """The weight file and the configuration in an archive.

    Raises:
        CheckpointError: it is damaged, dangerous, or holds no weights, or more than one file of
            them.
        ConfigError: its YAML is not readable.
    """
    with open_file(path) as file:
        try:
            return _read(path, _Stream(path, file))
        except (CheckpointError, ConfigError):
            raise
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise broken(path, "tar archive", error) from None


class _Stream:
    """The unpacked bytes of an archive, from front to back."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        self._gzip, self._streams, self._waiting = zlib.decompressobj(31), 1, b""
        self.left = _LEAST_PACKED * path.stat().st_size + _FREE

    def chunks(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes.

        Raises:
            EOFError: there are fewer.
            CheckpointError: there are more than weights could be.
        """
        while size:
            data = self._some(min(size, _CHUNK))
            if not data:
                raise EOFError("it ends too early")
            size -= len(data)
            yield data

    def read(self, size: int) -> bytes:
        """As `chunks`, in one piece."""
        return b"".join(self.chunks(size))

    def drain(self) -> None:
        """Read to the end of the file, where the checksum of gzip stands."""
        while self._some(_CHUNK):
            pass

    def _some(self, most: int) -> bytes:
        data = self._unpack(most) if self._packed else self._file.read(most)
        self.left -= len(data)
        self.check(0)
        return data

    def check(self, size: int) -> None:
        """Refuse what says that `size` bytes are still to come, if no weights are that large."""
        if size > self.left:
            raise CheckpointError(
                f"{self._path}: unpacks to more than weights could; it is refused as an archive "
                "bomb"
            )

    def _unpack(self, most: int) -> bytes:
        data = b""
        while not data:
            self._waiting = self._waiting or self._file.read(_PIECE)
            if not self._waiting and self._gzip.eof:
                return b""
            if not self._waiting:
                raise EOFError("it ends within a gzip stream")
            if self._gzip.eof:
                self._waiting = self._waiting.lstrip(b"\0")  # padding between and behind streams
                self._gzip = zlib.decompressobj(31) if self._waiting else self._gzip
                self._streams += 1
                if self._streams > _MOST_STREAMS:
                    raise ValueError("it is made of too many gzip streams")
                continue
            data = self._gzip.decompress(self._waiting, most)
            self._waiting = self._gzip.unconsumed_tail or self._gzip.unused_data
        return data


def _read(path: Path, stream: _Stream) -> Archive:
    weights, name, config = None, "", None
    for member in _members(path, stream):
        suffix = Path(member.name).suffix.lower()
        hidden = member.folder or Path(member.name).name.startswith("._")
        if suffix in WEIGHTS and not hidden:
            if weights is not None:
                raise CheckpointError(
                    f"{path}: holds two weight files, {name!r} and {member.name!r}; unpack it and "
                    "name one"
                )
            weights, name = _extract(path, stream, member), member.name
        elif suffix in CONFIGS and not hidden and config is None:
            if member.size > _MOST_YAML:
                raise ConfigError(_too_long(f"{path}: {member.name}"))
            config = parse_yaml(f"{path}: {member.name}", stream.read(member.size))
        else:
            for _ in stream.chunks(member.size):
                pass
    if weights is None:
        raise CheckpointError(
            f"{path}: holds no weights; looked for a file ending in {', '.join(WEIGHTS)}"
        )
    return Archive(name, weights, config)


def _members(path: Path, stream: _Stream) -> Iterator[_Member]:
    """Every file and folder; who asks for the next has read this one's bytes."""
    records: dict[bytes, bytes] = {}
    for _ in range(_MOST_MEMBERS):
        header = stream.read(_BLOCK)
        if not header.strip(b"\0"):
            stream.drain()
            return
        kind, size = _type_and_size(header)
        if kind in (_LONG_NAME, _RECORDS, _GLOBAL):
            if size > _MOST_HEADER:
                raise ValueError(f"it has a header of {size} bytes")
            body = stream.read(size)
            if kind == _LONG_NAME:
                records[b"path"] = body.rstrip(b"\0")
            elif kind == _RECORDS:
                records |= _pax(body)
        else:
            name = records.get(b"path") or _name(header)
            if b"size" in records:
                size = _octal(b"%o" % int(records[b"size"]))
            sparse = any(key.startswith(b"GNU.sparse.") for key in records)
            yield _check_member(path, kind, name.decode(errors="replace"), size, sparse, stream)
            records = {}
        stream.read(-size % _BLOCK)
    raise CheckpointError(f"{path}: holds more than {_MOST_MEMBERS} members, as no model archive")


def _type_and_size(header: bytes) -> tuple[bytes, int]:
    recorded = _octal(header[148:156])
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != recorded:
        raise ValueError("a header's checksum does not match")
    return header[156:157], _octal(header[124:136])


def _octal(field: bytes) -> int:
    """A number as ustar has it, or GNU's of 256 values a byte."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise ValueError("a size is no number from 0 up")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(body: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" that follow one another."""
    found: dict[bytes, bytes] = {}
    while body.rstrip(b"\0"):
        digits, space, _ = body[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = body[len(digits) + 1 : length].partition(b"=")
        if not space or not equals or value[-1:] != b"\n" or length > len(body):
            raise ValueError("a PAX record is broken")
        found[key], body = value[:-1], body[length:]
    return found


def _check_member(
    path: Path, kind: bytes, name: str, size: int, sparse: bool, stream: _Stream
) -> _Member:
    parts = name.replace("\\", "/").split("/")
    where = f"{path}: refused, because its member {name[:200]!r}"
    if not name.isprintable():
        raise CheckpointError(f"{where} has a name that cannot be shown")
    if parts[0] == "" or ".." in parts or name[1:2] == ":":
        raise CheckpointError(f"{where} would lie outside the archive's folder")
    if kind not in (*_FILES, _FOLDER):
        raise CheckpointError(f"{where} is a link or a device, which no model archive needs")
    if sparse:
        raise CheckpointError(f"{where} is sparse, which no model archive needs")
    stream.check(size)
    folder = kind == _FOLDER or name.endswith("/")
    return _Member(name, size, folder)


def _extract(path: Path, stream: _Stream, member: _Member) -> BinaryIO:
    """The member's bytes in a temporary file without a name."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if member.size > free:
        raise CheckpointError(
            f"{path}: unpacking needs {member.size / 1e6:.1f} MB in {tempfile.gettempdir()}, which "
            f"has {free / 1e6:.1f} MB left; set TMPDIR to a larger disk"
        )
    target = tempfile.TemporaryFile()  # noqa: SIM115 (held open by what is mapped)
    for data in stream.chunks(member.size):
        target.write(data)
    target.flush()
    target.seek(0)
    return target  # type: ignore[return-value]


class _Plain(yaml.SafeLoader):
    """YAML without merge keys, which double with every level, and with numbers of 64 bits.

    As MMF's own reader (OmegaConf's loader) it takes 1e-12 for a number, which YAML 1.1 does not.
    """

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys (<<) are not read")

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > 63:
            raise yaml.YAMLError("a number is longer than 64 bits")
        return value


_Plain.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"), list("-+0123456789")
)
_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; no tag makes an object.

    Raises:
        ConfigError: it is none.
    """
    try:
        with open_file(path) as file:
            return parse_yaml(str(path), file.read(_MOST_YAML + 1))
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def _too_long(label: str) -> str:
    return f"{label}: a YAML file of more than {_MOST_YAML >> 10} KiB is not a configuration"


def parse_yaml(label: str, text: bytes) -> dict[str, Any]:
    """As `read_yaml`, of a text."""
    if len(text) > _MOST_YAML:
        raise ConfigError(_too_long(label))
    try:
        found = yaml.load(text, Loader=_Plain)
    except Exception as error:  # PyYAML raises whatever a tag on the wrong value makes it trip over
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{label}: not readable as plain YAML: {reason}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{label}: expected a YAML mapping, found a {type(found).__name__}")
    return found
