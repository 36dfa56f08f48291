"""Time and peak memory of `visualbert convert` and `inspect` for every pair of formats.

The checkpoint is base size with region features 2048 wide, 450 MB. A conversion is a process of its
own, timed from its start to its end; the measure is the copying of one .bin of that size, read and
written block by block and flushed, in turn with it: A B A B …. Before each run the source leaves
the disk cache, so that both read it from the disk; --warm leaves it there. Peak memory is Linux's
VmHWM, which counts mapped files too.

    python tools/benchmark_convert.py [--runs 5] [--from bin,…] [--to keras,…] [--json FILE]
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURE = "VisualBertForPreTraining"
MOST_MEMORY = 600  # MB
MOST_TIME = 1.5  # times the copying, from .bin to safetensors
TARGETS = {
    "safetensors": [],
    "sharded": ["--max-shard-size", "200MB"],
    "bin": ["--to", "bin"],
    "keras": ["--to", "keras"],
    "flax": ["--to", "flax"],
    "msgpack": ["--to", "msgpack"],
}
ORIGINAL = (  # what the original calls what this package calls otherwise
    ("visual_bert.", "bert."),
    ("embeddings.visual_token_type_embeddings", "embeddings.token_type_embeddings_visual"),
    ("embeddings.visual_position_embeddings", "embeddings.position_embeddings_visual"),
    ("embeddings.visual_projection", "embeddings.projection"),
)
MEASURED = """
import sys
from visualbert.cli import main
status = main(sys.argv[1:])
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(peak / 1024)
sys.exit(status)
"""


class Sources:
    """One checkpoint as the files of every family."""

    def __init__(self, folder: Path) -> None:
        from visualbert import VisualBertConfig
        from visualbert.checkpoint.initial import InitialValues

        self.folder = folder
        self.config = VisualBertConfig(visual_embedding_dim=2048, architectures=(ARCHITECTURE,))
        self._values = InitialValues(ARCHITECTURE, self.config)
        self._arrays: dict[str, np.ndarray] = {}

    def arrays(self, rename: tuple[tuple[str, str], ...] = (), lead: str = "") -> dict[str, Any]:
        """The tensors as torch's, under other names."""
        import torch

        if not self._arrays:
            self._arrays = {name: self._values.read(name) for name in self._values.specs}
        found = {}
        for name, array in self._arrays.items():
            for old, new in rename:
                name = name.replace(old, new)
            found[lead + name] = torch.from_numpy(array)
        return found

    def _torch(self, name: str, value: Any, **options: Any) -> Path:
        import torch

        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        torch.save(value, path, **options)
        return path

    def bin(self) -> Path:
        path = self._torch("bin/pytorch_model.bin", self.arrays())
        (path.parent / "config.json").write_text(self.config.to_json_string())
        return path.parent

    def older(self) -> Path:
        path = self._torch(
            "older/pytorch_model.bin", self.arrays(), _use_new_zipfile_serialization=False
        )
        (path.parent / "config.json").write_text(self.config.to_json_string())
        return path.parent

    def th(self) -> Path:
        state = {"model": self.arrays(ORIGINAL, "bert."), "epoch": 1}
        return self._torch("original.th", state)

    def mmf(self) -> Path:
        return self._torch("mmf.pth", {"model": self.arrays(ORIGINAL, "model.")})

    def tar(self) -> Path:
        path = self.folder / "mmf.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            archive.add(self.mmf(), "mmf/model.pth")
        return path

    def bert(self) -> Path:
        from safetensors.torch import save_file

        path = self.folder / "bert"
        path.mkdir()
        arrays = self.arrays((("visual_bert.", "bert."),))
        text = {name: array for name, array in arrays.items() if ".visual_" not in name}
        save_file(text, path / "model.safetensors", {"format": "pt"})
        fields = {k: v for k, v in self.config.to_dict().items() if "visual" not in k}
        config = {**fields, "model_type": "bert", "architectures": ["BertForPreTraining"]}
        (path / "config.json").write_text(json.dumps(config))
        return path

    def converted(self, name: str) -> Path:
        path = self.folder / f"from-{name}"
        _convert(self.folder / "bin", path, TARGETS[name])
        return path


FAMILIES = {"bin": "", "older": "", "th": "", "mmf": "", "tar": "", "bert": ""} | {
    name: name for name in TARGETS if name != "bin"
}


def _convert(source: Path, target: Path, options: list[str]) -> float:
    """Peak memory in MB of a conversion."""
    architecture = ["--architecture", ARCHITECTURE] if source.name == "bert" else []
    return _measure("convert", str(source), str(target), *options, *architecture)[1]


def _measure(*arguments: str) -> tuple[float, float]:
    """Seconds of a command in a process of its own, and its peak memory."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    return time.perf_counter() - start, float(done.stdout.splitlines()[-1])


def copy(source: Path, target: Path) -> float:
    """Seconds to read a file, write it and flush it."""
    start = time.perf_counter()
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
        block = memoryview(bytearray(1 << 20))
        while size := read.readinto(block):
            write.write(block[:size])
        os.fsync(write.fileno())
    return time.perf_counter() - start


def forget(path: Path) -> None:
    """Take a file or a folder out of the disk cache."""
    for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alternate(
    runs: int, measure: Callable[[], float], source: Path, other: Callable[[], tuple[float, float]]
) -> dict[str, Any]:
    """Medians of a copy and of what it is compared with, in turn."""
    copies, seconds, peaks = [], [], []
    for _ in range(runs):
        copies.append(measure())
        elapsed, peak = other()
        seconds.append(elapsed)
        peaks.append(peak)
    ratio = statistics.median(a / b for a, b in zip(seconds, copies, strict=True))
    return {
        "seconds": statistics.median(seconds),
        "copy": statistics.median(copies),
        "ratio": ratio,
        "peak": max(peaks),
    }


def measure_pair(
    source: Path, reference: Path, options: list[str] | None, runs: int, warm: bool
) -> dict[str, Any]:
    """A conversion with `options`, or an inspection, against the copying of `reference`."""
    scratch = reference.parent.parent / "scratch"

    def fresh(path: Path) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        os.sync()
        if not warm:
            forget(path)

    def copied() -> float:
        fresh(reference)
        return copy(reference, scratch / "copy")

    def run() -> tuple[float, float]:
        fresh(source)
        bert = ["--architecture", ARCHITECTURE] if source.name == "bert" else []
        if options is None:
            return _measure("inspect", str(source))
        return _measure("convert", str(source), str(scratch / "out"), *options, *bert)

    return alternate(runs, copied, source, run)


def parts(reference: Path, runs: int) -> str:
    """What a conversion does besides reading and writing, each alone, from the disk cache."""

    def timed(function: Callable[[], Any]) -> str:
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return f"{statistics.median(seconds):.2f} s"

    data = np.memmap(reference, mode="r").data
    begin = "import numpy, visualbert.cli.convert, visualbert.checkpoint.open"
    started = timed(lambda: subprocess.run([sys.executable, "-c", begin], check=True))
    digested = timed(lambda: hashlib.sha256(data).digest())
    summed = timed(lambda: zlib.crc32(data))
    copied = timed(lambda: copy(reference, reference.parent.parent / "copied"))
    return (
        f"alone, from the disk cache: starting Python with numpy and this package {started}, the "
        f"SHA-256 that is recorded {digested}, the CRC-32 that is compared {summed}, and copying "
        f"{copied}"
    )


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Ratio to the copying and peak memory, a row a source."""
    columns = [*TARGETS, "inspect"]
    lines = [f"{'from / to':<12}" + "".join(f"{name:>18}" for name in columns)]
    for family, row in results.items():
        cells = [
            f"{row[n]['ratio']:.2f}× {row[n]['peak']:4.0f} MB" if n in row else "" for n in columns
        ]
        lines.append(f"{family:<12}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    """Make the sources, measure every pair, print; 1 if a figure does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--from", dest="sources", default=",".join(FAMILIES))
    parser.add_argument("--to", default=",".join([*TARGETS, "inspect"]))
    parser.add_argument("--warm", action="store_true", help="leave sources in the disk cache")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="visualbert-convert-") as folder:
        sources = Sources(Path(folder))
        reference = sources.bin() / "pytorch_model.bin"
        megabytes = reference.stat().st_size / 1e6
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        alone = parts(reference, args.runs)
        for family in args.sources.split(","):
            made = FAMILIES[family]
            path = (
                sources.converted(made)
                if made
                else (reference.parent if family == "bin" else getattr(sources, family)())
            )
            results[family] = {
                to: measure_pair(path, reference, TARGETS.get(to), args.runs, args.warm)
                for to in args.to.split(",")
                if not (family == "bert" and to == "inspect")
            }
            print(table({family: results[family]}).splitlines()[1], flush=True)
            if path != reference.parent:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    cache = "in the disk cache" if args.warm else "on the disk"
    print(f"\n{alone}")
    print(f"\n{megabytes:.0f} MB {cache}; time relative to copying it, and peak memory")
    print(table(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    cells = [(a, b, cell) for a, row in results.items() for b, cell in row.items()]
    large = [f"{a} → {b}" for a, b, cell in cells if cell["peak"] >= MOST_MEMORY]
    slow = results.get("bin", {}).get("safetensors", {}).get("ratio", 0) >= MOST_TIME
    if large:
        print(f"more than {MOST_MEMORY} MB: {', '.join(large)}")
    if slow:
        print(f"bin → safetensors takes more than {MOST_TIME} times the copying")
    return 1 if large or slow else 0


if __name__ == "__main__":
    sys.exit(main())
