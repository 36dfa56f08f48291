"""Region files read a second, by format, with the files in the disk cache.

Each format holds the same images, written the way its own programs write them. An image counts as
read when its features have been copied into a batch; every value is looked at on the way. The first
row is numpy's own reader of .npy files, for comparison. The last column, what one thread does in a
second that the processor really gave it, is what to compare on a machine that is shared.

    python tools/benchmark_features.py [--images 500] [--regions 36] [--width 2048] [--seconds 1]
"""

import argparse
import base64
import itertools
import json
import os
import pickle
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visualbert.inputs.features import open_features, write_features
from visualbert.inputs.regions import Regions

SIZE = (640, 480)


def make_regions(images: int, regions: int, width: int) -> Iterator[tuple[str, Regions]]:
    """Images whose ids are COCO's."""
    rng = np.random.default_rng(0)
    for number in range(images):
        yield (
            f"COCO_val2014_{number:012}",
            Regions(
                rng.standard_normal((regions, width), np.float32),
                boxes=rng.random((regions, 4), np.float32) * 400,
                scores=rng.random(regions, np.float32),
                classes=rng.integers(0, 1600, regions),
                image_size=SIZE,
            ),
        )


def _info(regions: Regions) -> dict[str, Any]:
    return {
        "bbox": regions.boxes,
        "num_boxes": len(regions),
        "objects": regions.classes,
        "image_width": SIZE[0],
        "image_height": SIZE[1],
    }


def write_npy(path: Path, items: Iterator[tuple[str, Regions]]) -> None:
    path.mkdir()
    for name, regions in items:
        np.save(path / f"{name}.npy", regions.features)


def write_npy_info(path: Path, items: Iterator[tuple[str, Regions]]) -> None:
    path.mkdir()
    for name, regions in items:
        np.save(path / f"{name}.npy", regions.features)
        np.save(path / f"{name}_info.npy", _info(regions))  # type: ignore[arg-type]


def write_npz(path: Path, items: Iterator[tuple[str, Regions]]) -> None:
    path.mkdir()
    for name, regions in items:
        np.savez(path / f"{name}.npz", features=regions.features, **_info(regions))


def write_tsv(path: Path, items: Iterator[tuple[str, Regions]]) -> None:
    with open(path, "w", encoding="ascii") as file:
        for name, regions in items:
            arrays = (regions.boxes, regions.features)
            fields = [name, *SIZE, len(regions), *(_base64(array) for array in arrays)]
            file.write("\t".join(map(str, fields)) + "\n")


def _base64(array: Any) -> str:
    return base64.b64encode(array.tobytes()).decode()


def write_hdf5(path: Path, items: Iterator[tuple[str, Regions]]) -> None:
    _hdf5(path, list(items), None)


def write_hdf5_chunks(path: Path, items: Iterator[tuple[str, Regions]]) -> None:
    _hdf5(path, list(items), 1)


def _hdf5(path: Path, items: list[tuple[str, Regions]], rows: int | None) -> None:
    import h5py

    shape = items[0][1].features.shape
    chunks = None if rows is None else (rows, *shape)
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", (len(items), *shape), "f4", chunks=chunks)
        boxes = file.create_dataset("boxes", (len(items), shape[0], 4), "f4")
        for row, (_, regions) in enumerate(items):
            features[row], boxes[row] = regions.features, regions.boxes
    listed = [{"img_id": name, "img_w": SIZE[0], "img_h": SIZE[1]} for name, _ in items]
    path.with_suffix(".json").write_text(json.dumps(listed))


def write_lmdb(path: Path, items: Iterator[tuple[str, Regions]]) -> None:
    import lmdb

    with lmdb.open(str(path), map_size=1 << 36) as made, made.begin(write=True) as put:
        names = []
        for name, regions in items:
            record = {"feature_path": name, "features": regions.features, **_info(regions)}
            put.put(name.encode(), pickle.dumps(record))
            names.append(name.encode())
        put.put(b"keys", pickle.dumps(names))


WRITERS: dict[str, Callable[[Path, Iterator[tuple[str, Regions]]], object]] = {
    ".npy": write_npy,
    ".npy with _info.npy": write_npy_info,
    ".npz": write_npz,
    "TSV": write_tsv,
    "HDF5": write_hdf5,
    "HDF5 in chunks": write_hdf5_chunks,
    "LMDB": write_lmdb,
    "safetensors (ours)": write_features,
}


class Rates(NamedTuple):
    """Images a second."""

    one: float  # thread
    two: float
    work: float  # a second of the processor, in one thread


def rates(read: Callable[[str], np.ndarray], names: list[str], seconds: float) -> Rates:
    """Images that are read into a batch, in random order."""
    for name in names:
        read(name)
    one, work = _rate(read, names, seconds)
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(_rate, read, names, seconds) for _ in range(2)]
        return Rates(one, sum(each.result()[0] for each in both), work)


def _rate(
    read: Callable[[str], np.ndarray], names: list[str], seconds: float
) -> tuple[float, float]:
    names = random.Random(0).sample(names, len(names))
    batch = np.zeros((8, *read(names[0]).shape), np.float32)
    start, work, done = time.perf_counter(), time.thread_time(), 0
    for name in itertools.cycle(names):
        batch[done % 8] = read(name)
        done += 1
        if done % 64 == 0 and time.perf_counter() - start > seconds:
            break
    return done / (time.perf_counter() - start), done / (time.thread_time() - work)


def _load(folder: Path, name: str) -> np.ndarray:
    return np.load(f"{folder}/{name}.npy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Region files read a second, by format")
    for name, default in {"images": 500, "regions": 36, "width": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    args = parser.parse_args()
    size = args.regions * args.width * 4
    names = [name for name, _ in make_regions(args.images, 1, 1)]
    print(f"{args.images} images of {args.regions} x {args.width} float32 ({size / 1e3:.0f} kB)")
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}\n")
    print(
        f"{'images a second':<24}{'1 thread':>10}{'2 threads':>11}{'GB/s':>7}{'a CPU second':>18}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for number, (form, write) in enumerate(WRITERS.items()):
            path = Path(folder, str(number))
            write(path, make_regions(args.images, args.regions, args.width))
            if number == 0:
                loaded = rates(partial(_load, path), names, args.seconds)
                report("np.load of .npy", loaded, size)
            with open_features(path) as store:
                found = rates(lambda name: store[name].features, names, args.seconds)
            report(form, found, size)


def report(form: str, found: Rates, size: int) -> None:
    best = max(found.one, found.two) * size / 1e9
    columns = f"{found.one:>10,.0f}{found.two:>11,.0f}{best:>7.2f}{found.work:>18,.0f}"
    print(f"{form:<24}{columns}", flush=True)


if __name__ == "__main__":
    main()
