"""Region features come out of every format as they went in, by image id, without the rest of the
file being read, also when several threads ask; what is not features is one sentence that names file
and image, and nothing in a file is run.
"""

import base64
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from visualbert import InputError, MissingBackendError
from visualbert.inputs.features import (
    open_features,
    with_spatial,
    write_features,
)
from visualbert.inputs.regions import Regions

WIDTH = 20
DETECTOR = "butd-r101-spatial"
IDS = ("COCO_val2014_000000000042", "COCO_val2014_000000000133", "COCO_val2014_000000000285")


def made(seed, count=5, provenance=""):
    """Regions of random numbers; the seed decides the image's size, too."""
    rng = np.random.default_rng(seed)
    return Regions(
        rng.standard_normal((count, WIDTH), np.float32),
        boxes=rng.random((count, 4), np.float32) * 200,
        scores=rng.random(count, np.float32),
        classes=rng.integers(0, 1600, count),
        image_size=(640 + seed, 480 + seed),
        provenance=provenance,
    )


ITEMS = {name: made(seed, 5) for seed, name in enumerate(IDS)}


def same(found, expected, but=()):
    """Every part that is not in `but` is equal; those in `but` are unknown."""
    for name in ("features", "boxes", "scores", "classes", "image_size"):
        value, want = getattr(found, name), getattr(expected, name)
        if name in but:
            assert value is None, name
        elif isinstance(want, np.ndarray):
            assert value.dtype == want.dtype and np.array_equal(value, want), name
        else:
            assert value == want, name


def info_of(r):
    """What MMF's extraction keeps in <id>_info.npy."""
    probabilities = np.full((len(r), 1600), 1e-4, np.float32)
    probabilities[np.arange(len(r)), r.classes] = r.scores
    return {
        "bbox": r.boxes,
        "num_boxes": len(r),
        "objects": r.classes,
        "cls_prob": probabilities,
        "image_width": r.image_size[0],
        "image_height": np.int64(r.image_size[1]),
    }


def save_plain(path):
    path.mkdir()
    for name, r in ITEMS.items():
        np.save(path / f"{name}.npy", r.features)


def save_with_info(path):
    save_plain(path)
    for name, r in ITEMS.items():
        np.save(path / f"{name}_info.npy", info_of(r))


def save_detectron(path):
    """features/bbox/... in one pickled dictionary."""
    path.mkdir()
    for name, r in ITEMS.items():
        np.save(path / f"{name}.npy", {"features": r.features, **info_of(r)})


def save_pythia(path):
    """image_feat/image_bboxes in one pickled dictionary."""
    path.mkdir()
    for name, r in ITEMS.items():
        item = {"image_feat": r.features, "image_bboxes": r.boxes, "image_text": ["stop"]}
        np.save(path / f"{name}.npy", item)


def save_nested(path):
    """info/feature in one pickled dictionary."""
    path.mkdir()
    for name, r in ITEMS.items():
        np.save(path / f"{name}.npy", {"info": info_of(r), "feature": r.features})


def save_npz(path):
    path.mkdir()
    for name, r in ITEMS.items():
        np.savez_compressed(path / f"{name}.npz", features=r.features, **info_of(r))


def coded(*arrays):
    return [base64.b64encode(np.ascontiguousarray(a).tobytes()).decode() for a in arrays]


BUTD = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
OBJ36 = (
    *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features"),
)


def butd_line(name, r):
    return [name, *r.image_size, len(r), *coded(r.boxes, r.features)]


def obj36_line(name, r):
    width, height = r.image_size
    arrays = coded(r.classes, r.scores, r.classes, r.scores)
    return [name, height, width, *arrays, len(r), *coded(r.boxes, r.features)]


def save_table(path, line, *header):
    lines = [header] * bool(header) + [line(name, r) for name, r in ITEMS.items()]
    path.write_text("".join("\t".join(map(str, fields)) + "\n" for fields in lines))


def save_lxmert_hdf5(path, **storage):
    """Equally many regions in each image, and a JSON list that says which."""
    with h5py.File(path, "w") as file:
        for name, part in {
            "features": "features",
            "boxes": "boxes",
            "objects_id": "classes",
            "objects_conf": "scores",
        }.items():
            rows = np.stack([getattr(r, part) for r in ITEMS.values()])
            file.create_dataset(name, data=rows, **storage)
    sizes = {name: r.image_size for name, r in ITEMS.items()}
    listed = [{"img_id": n, "img_w": w, "img_h": h} for n, (w, h) in sizes.items()]
    path.with_suffix(".json").write_text(json.dumps(listed))


def save_chunked_hdf5(path):
    save_lxmert_hdf5(path, compression="gzip", chunks=True)


def save_ban_hdf5(path):
    """All regions one after another, `pos_boxes`, and a pickled dictionary of rows."""
    ends = np.cumsum([0, *map(len, ITEMS.values())])
    size = [np.tile(r.image_size, (len(r), 2)) for r in ITEMS.values()]
    boxes = np.concatenate([r.boxes for r in ITEMS.values()])
    corners = boxes / np.concatenate(size)
    with h5py.File(path, "w") as file:
        file["image_features"] = np.concatenate([r.features for r in ITEMS.values()])
        file["image_bb"] = boxes
        file["spatial_features"] = np.hstack([corners, corners[:, 2:] - corners[:, :2]])
        file["pos_boxes"] = np.stack([ends[:-1], ends[1:]], 1).astype("int32")
    rows = {name: row for row, name in enumerate(ITEMS)}
    path.with_name(path.stem + "_imgid2idx.pkl").write_bytes(pickle.dumps(rows))


def save_group_hdf5(path):
    with h5py.File(path, "w") as file:
        for name, r in ITEMS.items():
            parts = {"features": r.features, "boxes": r.boxes, "obj_id": r.classes}
            parts |= {"obj_conf": r.scores, "img_w": r.image_size[0], "img_h": r.image_size[1]}
            for part, value in parts.items():
                file[f"{name}/{part}"] = value


def save_lmdb(path, items=None, subdir=True, protocol=None):
    items = items or {n: {"features": r.features, **info_of(r)} for n, r in ITEMS.items()}
    with (
        lmdb.open(str(path), map_size=1 << 28, subdir=subdir) as file,
        file.begin(write=True) as put,
    ):
        for name, item in items.items():
            data = item if isinstance(item, bytes) else pickle.dumps(item, protocol)
            put.put(name.encode(), data)
        put.put(b"keys", pickle.dumps([name.encode() for name in items]))


def save_torch(path, archive=True):
    value = {
        f"{name}.npz": tuple(map(torch.from_numpy, (r.features, r.boxes, r.scores)))
        for name, r in ITEMS.items()
    }
    torch.save(value, path, _use_new_zipfile_serialization=archive)


def save_ours(path):
    write_features(path, ITEMS.items())


# How each format is written, and what it does not hold.
NOT_IN_PLAIN = ("boxes", "scores", "classes", "image_size")
FORMATS = {
    "npy": (save_plain, NOT_IN_PLAIN),
    "npy with info": (save_with_info, ()),
    "npy features/bbox": (save_detectron, ()),
    "npy image_feat": (save_pythia, ("scores", "classes", "image_size")),
    "npy info/feature": (save_nested, ()),
    "npz": (save_npz, ()),
    "tsv butd": (lambda path: save_table(path, butd_line), ("scores", "classes")),
    "tsv butd header": (lambda path: save_table(path, butd_line, *BUTD), ("scores", "classes")),
    "tsv lxmert": (lambda path: save_table(path, obj36_line), ()),
    "tsv lxmert header": (lambda path: save_table(path, obj36_line, *OBJ36), ()),
    "hdf5 lxmert": (save_lxmert_hdf5, ()),
    "hdf5 chunked": (save_chunked_hdf5, ()),
    "hdf5 ban": (save_ban_hdf5, ("scores", "classes")),
    "hdf5 groups": (save_group_hdf5, ()),
    "lmdb": (save_lmdb, ()),
    "lmdb file": (lambda path: save_lmdb(path, subdir=False), ()),
    "lmdb protocol 2": (lambda path: save_lmdb(path, protocol=2), ()),
    "lmdb protocol 5": (lambda path: save_lmdb(path, protocol=5), ()),
    "torch": (save_torch, ("classes", "image_size")),
    "torch stream": (lambda path: save_torch(path, False), ("classes", "image_size")),
    "ours": (save_ours, ()),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every format once, under a name that says nothing."""
    folder = tmp_path_factory.mktemp("features")
    paths = {form: folder / f"{number}.bin" for number, form in enumerate(FORMATS)}
    for form, (save, _) in FORMATS.items():
        save(paths[form])
    return paths


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_back_what_went_in(files, form):
    _, but = FORMATS[form]
    with open_features(files[form], provenance=DETECTOR) as store:
        assert len(store) == len(ITEMS) and sorted(store) == sorted(ITEMS)
        for name, regions in ITEMS.items():
            assert name in store
            same(store[name], regions, but)
            assert store[name].provenance == DETECTOR
        assert "COCO_val2014_000000000043" not in store and ["a"] not in store
        assert dict(store.items()).keys() == ITEMS.keys()
        copy = pickle.loads(pickle.dumps(store))
        kept = store[IDS[0]].features
    same(copy[IDS[1]], ITEMS[IDS[1]], but)
    assert np.array_equal(kept, ITEMS[IDS[0]].features)  # also when the store has been closed
    with pytest.raises(InputError) as caught:
        store[IDS[0]]
    assert str(caught.value) == f"{files[form]}: it has been closed"


@pytest.mark.parametrize("form", FORMATS)
def test_threads_read_at_once(files, form):
    order = random.Random(0).choices(IDS, k=200)
    with open_features(files[form]) as store, ThreadPoolExecutor(8) as threads:
        for name, found in zip(order, threads.map(store.__getitem__, order), strict=True):
            assert np.array_equal(found.features, ITEMS[name].features)


@pytest.mark.parametrize("form", FORMATS)
def test_an_unknown_id_names_near_ones(files, form):
    with pytest.raises(InputError) as caught:
        open_features(files[form])["COCO_val2014_000000000043"]
    assert str(caught.value).startswith(
        f"{files[form]}: no image 'COCO_val2014_000000000043'; it has 3 images, among them "
        f"'{IDS[0]}'"
    )
    with pytest.raises(InputError) as caught:
        open_features(files[form])["dog.gif"]
    assert f"no image 'dog.gif'; it has 3 images, the first is '{IDS[0]}'" in str(caught.value)


def test_ids_are_found_as_others_spell_them(tmp_path):
    save_lmdb(tmp_path / "a", {"42": {"features": ITEMS[IDS[0]].features}})
    store = open_features(tmp_path / "a")
    for name in (
        42,
        "42",
        "val2014/COCO_val2014_000000000042.npy",
        "COCO_val2014_000000000042.jpg",
    ):
        assert name in store
        same(store[name], ITEMS[IDS[0]], NOT_IN_PLAIN)
    assert "0042" in store and "COCO_val2014_000000000420" not in store and 43 not in store


def test_the_original_folder_of_vqa_features(tmp_path):
    """detectron_fix_100/fc6/vqa/<split>/<image_name>.npy."""
    folder = tmp_path / "detectron_fix_100" / "fc6" / "vqa"
    (folder / "val2014").mkdir(parents=True)
    np.save(folder / "val2014" / f"{IDS[0]}.npy", ITEMS[IDS[0]].features)
    store = open_features(folder)
    assert list(store) == [f"val2014/{IDS[0]}"]
    for name in (f"val2014/{IDS[0]}", f"val2014/{IDS[0]}.npy", IDS[0]):
        same(store[name], ITEMS[IDS[0]], NOT_IN_PLAIN)


def test_nlvr2_keys_end_in_npz(tmp_path):
    name = "dev-850-0-img1.png"
    np.savez(tmp_path / f"{name}.npz", features=ITEMS[IDS[0]].features)
    store = open_features(tmp_path)
    assert list(store) == [name]
    same(store[f"{name}.npz"], ITEMS[IDS[0]], NOT_IN_PLAIN)


@pytest.mark.parametrize("shape", [(2, 3, WIDTH), (1, 2, 3, WIDTH)])
def test_a_grid_is_flattened(tmp_path, shape):
    grid = np.arange(6 * WIDTH, dtype=np.float32).reshape(shape)
    np.save(tmp_path / "1.npy", grid)
    same(open_features(tmp_path)["1"], Regions(grid.reshape(6, WIDTH)))
    same(open_features(tmp_path / "1.npy")["1"], Regions(grid.reshape(6, WIDTH)))


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_numbers_become_float32(tmp_path, dtype, order):
    rows = np.arange(3 * WIDTH).reshape(3, WIDTH)
    np.save(tmp_path / "1.npy", np.array(rows, dtype, order=order))
    np.save(tmp_path / "2.npy", {"features": np.array(rows, dtype, order=order)})
    np.savez(tmp_path / "3.npz", np.array(rows, dtype, order=order))
    store = open_features(tmp_path)
    for name in "123":
        same(store[name], Regions(rows.astype(np.float32)))


def test_pickles_of_python_2(tmp_path):
    """Its arrays are text, its modules are numpy's old ones, and its ints may be long."""
    data = ITEMS[IDS[0]].features.astype("<f4").tobytes()
    stream = (
        b"\x80\x02}q\x01U\x08featuresq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87R(K\x01K\x05K\x14\x86cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(data).to_bytes(4, "little")
        + data
        + b"tbsU\x07image_w\x8a\x02\x80\x02sU\x07image_hI480\ns."
    )
    save_lmdb(tmp_path / "a", {"1": stream})
    found = open_features(tmp_path / "a")["1"]
    assert np.array_equal(found.features, ITEMS[IDS[0]].features)
    assert found.image_size == (640, 480)


@pytest.mark.parametrize("form", ["npy", "tsv butd", "hdf5 chunked", "lmdb", "ours"])
def test_a_forked_process_reads_on(files, form):
    """As the workers of torch's DataLoader do."""
    with open_features(files[form]) as store:
        same(store[IDS[0]], ITEMS[IDS[0]], FORMATS[form][1])
        worker = multiprocessing.get_context("fork").Process(target=read_all, args=(store, form))
        worker.start()
        worker.join(60)
        assert worker.exitcode == 0
        same(store[IDS[1]], ITEMS[IDS[1]], FORMATS[form][1])


def read_all(store, form):
    for name, regions in ITEMS.items():
        same(store[name], regions, FORMATS[form][1])


class TestTables:
    def test_the_last_of_equal_ids_counts(self, tmp_path):
        path = tmp_path / "a.tsv"
        lines = [butd_line("7", ITEMS[IDS[0]]), butd_line("7", ITEMS[IDS[1]])]
        path.write_text("\n".join("\t".join(map(str, fields)) for fields in lines))
        store = open_features(path)
        assert list(store) == ["7"]
        same(store[7], ITEMS[IDS[1]], ("scores", "classes"))

    def test_the_index_is_kept_and_follows_the_table(self, tmp_path):
        path, index = tmp_path / "a.tsv", tmp_path / "a.tsv.index.json"
        save_table(path, butd_line)
        same(open_features(path, index=index)[IDS[1]], ITEMS[IDS[1]], ("scores", "classes"))
        kept = json.loads(index.read_text())
        assert list(kept["places"]) == list(IDS)
        kept["places"] = {"other": kept["places"][IDS[2]]}
        index.write_text(json.dumps(kept))
        store = open_features(path, index=index)
        assert list(store) == ["other"]  # it was not scanned
        same(store["other"], ITEMS[IDS[2]], ("scores", "classes"))
        save_table(path, obj36_line)
        assert list(open_features(path, index=index)) == list(IDS)
        index.write_text("{")
        assert list(open_features(path, index=index)) == list(IDS)
        assert sorted(os.listdir(tmp_path)) == ["a.tsv", "a.tsv.index.json"]


class TestOurs:
    def test_any_library_reads_it(self, files):
        arrays = load_file(files["ours"])
        assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == {
            "features": ((15, WIDTH), "float32"),
            "boxes": ((15, 4), "float32"),
            "scores": ((15,), "float32"),
            "classes": ((15,), "int32"),
            "offsets": ((4,), "int64"),
            "image_sizes": ((3, 2), "int32"),
            "parts": ((3,), "uint8"),
            "ids": (arrays["ids"].shape, "uint8"),
        }
        assert arrays["offsets"].tolist() == [0, 5, 10, 15]
        assert json.loads(arrays["ids"].tobytes()) == list(IDS)

    def test_images_may_lack_parts_and_differ_in_length(self, tmp_path):
        items = {
            "a": Regions(np.ones((2, 3))),
            "é/ü\n": Regions(np.ones((0, 3)), boxes=np.ones((0, 4)), provenance=""),
            "c": Regions(np.ones((4, 3)), scores=np.ones(4), image_size=(1, 2)),
        }
        write_features(tmp_path / "new" / "a.safetensors", items.items())
        store = open_features(tmp_path / "new" / "a.safetensors")
        assert list(store) == list(items)
        for name, regions in items.items():
            same(store[name], regions)

    def test_any_format_turns_into_it_with_its_detector(self, files, tmp_path):
        with open_features(files["tsv lxmert"], provenance=DETECTOR) as store:
            write_features(tmp_path / "a", store.items())
        store = open_features(tmp_path / "a", provenance="other")
        assert store.provenance == store[IDS[0]].provenance == DETECTOR
        for name, regions in ITEMS.items():
            same(store[name], regions)

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (("a", made(1)), "image 'a' comes twice"),
            (
                ("b", Regions(np.ones((2, 3)))),
                "image 'b' has features of the width 3 from an unknown detector, those before it "
                "of the width 20 from an unknown detector; one file holds one kind",
            ),
            (
                ("b", made(1, provenance=DETECTOR)),
                "image 'b' has features of the width 20 from butd-r101-spatial, those before it "
                "of the width 20 from an unknown detector; one file holds one kind",
            ),
            (
                ("b", Regions(np.full((2, WIDTH), np.nan))),
                "image 'b': a feature of region 0 is NaN or infinite",
            ),
            (
                ("b", Regions(np.ones((2, WIDTH)), classes=np.array([1, 1 << 40]))),
                "image 'b': its classes do not fit into int32",
            ),
        ],
    )
    def test_what_does_not_fit_leaves_the_old_file(self, tmp_path, second, message):
        path = tmp_path / "a"
        save_ours(path)
        before = path.read_bytes()
        with pytest.raises(InputError) as caught:
            write_features(path, [("a", made(0)), second])
        assert str(caught.value) == message
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]

    def test_nothing_and_nowhere(self, tmp_path):
        with pytest.raises(InputError) as caught:
            write_features(tmp_path / "a", [])
        assert str(caught.value) == "there are no images to write"
        assert os.listdir(tmp_path) == []
        with pytest.raises(InputError) as caught:
            write_features(tmp_path, ITEMS.items())
        assert str(caught.value) == (
            f"{tmp_path}: a folder; give the file to write, such as {tmp_path}/features.safetensors"
        )

    def test_equal_images_give_equal_files(self, tmp_path):
        for name in "ab":
            save_ours(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# A sparse file of several gigabytes, one image of which is read; prints the growth of the process.
PEAK = """
import resource, sys
import h5py
from visualbert.inputs.features import open_features
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = open_features(sys.argv[1])
regions = store[sys.argv[2]]
print(regions.features.shape[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak(path, name):
    """The megabytes that a process takes to open a file and to read an image."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, path, name], capture_output=True, text=True, check=True
    )
    width, kilobytes = map(int, done.stdout.split())
    assert width == 2048
    return kilobytes / 1024


class TestLarge:
    def test_hdf5(self, tmp_path):
        images = 20_000
        with h5py.File(tmp_path / "a.h5", "w") as file:
            features = file.create_dataset("features", (images, 36, 2048), "f4")
            features[images - 1] = 1
        (tmp_path / "a.json").write_text(json.dumps([f"i{n}" for n in range(images)]))
        assert os.path.getsize(tmp_path / "a.h5") > 5e9
        assert peak(tmp_path / "a.h5", f"i{images - 1}") < 40

    def test_ours(self, tmp_path):
        """Larger than the machine's memory may be; the header of a small file, stretched."""
        images, path = 2_000, tmp_path / "a"
        regions = Regions(np.ones((1, 2048)))
        write_features(path, ((f"i{n}", regions) for n in range(images)))
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        head, each = json.loads(data[8 : 8 + length]), 360
        rows = {"features": 8192, "boxes": 16, "scores": 4, "classes": 4}
        ends, tail = [0], data[8 + length + head["offsets"]["data_offsets"][0] :]
        tail = (np.arange(images + 1, dtype=np.int64) * each).tobytes() + tail[8 * (images + 1) :]
        for name, entry in head.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            size = images * each * rows[name] if name in rows else end - start
            if name in rows:
                entry["shape"][0] = images * each
            entry["data_offsets"] = [ends[-1], ends[-1] + size]
            ends.append(ends[-1] + size)
        with open(path, "wb") as file:
            file.write(data[:8] + json.dumps(head).encode().ljust(length))
            file.seek(8 + length + head["offsets"]["data_offsets"][0])
            file.write(tail)
        assert os.path.getsize(path) > 5e9
        assert peak(path, f"i{images - 1}") < 40

    @pytest.mark.slow
    def test_a_table(self, tmp_path):
        """The lines before the one that is read have holes of 40 MB for features."""
        path = tmp_path / "a.tsv"
        regions = Regions(np.ones((2, 2048)), boxes=np.ones((2, 4)), image_size=(3, 4))
        with open(path, "wb") as file:
            for number in range(30):
                file.write(f"{number}\t3\t4\t2\t".encode())
                file.seek(40_000_000, os.SEEK_CUR)
                file.write(b"\t\n")
            file.write("\t".join(map(str, butd_line("last", regions))).encode())
        assert os.path.getsize(path) > 1.2e9
        assert peak(path, "last") < 150  # a few lines


class Runs:
    """What a hostile pickle asks for."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def nested(depth):
    """A stream of tuples in tuples, then used as a key."""
    return b"\x80\x02}" + b"N" + b"\x85" * depth + b"Ns."


HOSTILE = {
    "system": (
        lambda w: pickle.dumps({"features": Runs(os.system, (f"touch {w}",))}),
        "posix.system",
    ),
    "eval": (lambda w: pickle.dumps(Runs(eval, (f"open({str(w)!r}, 'w')",))), "builtins.eval"),
    "open": (lambda w: pickle.dumps([Runs(open, (str(w), "w"))]), "open"),
    "tofile": (
        lambda w: b"cnumpy\nndarray.tofile\n(S'" + str(w).encode() + b"'\ntR.",
        "numpy.ndarray.tofile",
    ),
    "numpy's own": (lambda w: b"cnumpy\nsave\n(S'" + str(w).encode() + b"'\nI1\ntR.", "numpy.save"),
    "getattr": (lambda w: pickle.dumps(Runs(getattr, ([], "append"))), "builtins.getattr"),
    "class": (lambda w: pickle.dumps(Path(w)), "pathlib"),
    "type of an array": (lambda w: pickle.dumps(np.zeros(2, "M8[s]")), "arrays of the type M8"),
    "record": (lambda w: pickle.dumps(np.zeros(2, [("a", "f4")])), "arrays of the type V4"),
    "memo": (lambda w: b"\x80\x02Nr\xff\xff\xff\x7f.", None),
    "deep": (lambda w: nested(60_000), "cannot be a key"),
    "cut": (lambda w: pickle.dumps({"features": np.zeros((3, 4))})[:-30], "not a whole pickle"),
    "many": (lambda w: b"\x80\x02" + b"N0" * 200_000 + b"N.", "too many parts"),
}


def shaped(shape, dtype="f4", data=b"\0" * 8):
    """An array whose state does not fit together."""
    return pickle.dumps(
        Runs(
            np._core.multiarray._reconstruct,
            (np.ndarray, (0,), b"b"),
            (1, shape, np.dtype(dtype), False, data),
        )
    )


HOSTILE |= {
    "shape": (lambda w: shaped((1 << 30, 1 << 30)), "has 8 bytes, expected"),
    "negative": (lambda w: shaped((-1, -2)), "an impossible shape"),
    "objects": (lambda w: shaped((1 << 30,), "O", []), "does not have 1073741824 values"),
}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    @pytest.mark.parametrize("carrier", ["npy", "lmdb", "hdf5"])
    def test_pickles_do_not_run(self, tmp_path, name, carrier):
        make, reason = HOSTILE[name]
        witness = tmp_path / "witness"
        message = outcome(plant(tmp_path, carrier, make(witness)), "1")
        assert isinstance(message, str) and not witness.exists()
        if carrier == "hdf5":
            assert message.startswith(f"{tmp_path / 'a_imgid2idx.pkl'}: ")
        else:
            assert message.startswith(f"{tmp_path / 'a'}: image '1': ")
        assert reason is None or reason in message or (carrier, name) == ("hdf5", "many")

    def test_globals_are_refused_by_their_name(self, tmp_path):
        save_lmdb(tmp_path / "a", {"1": pickle.dumps(Runs(os.system, ("true",)))})
        with pytest.raises(InputError) as caught:
            open_features(tmp_path / "a")["1"]
        assert str(caught.value) == (
            f"{tmp_path / 'a'}: image '1': refused: its pickle asks for posix.system, and only "
            "arrays, dictionaries, lists, text and numbers are read (such a file can run code when "
            "it is loaded)"
        )

    @pytest.mark.parametrize(
        "name", ["../a", "b/../../a", "/etc/a", "..", "a\0b", "C:/a", "b\\..\\a"]
    )
    def test_ids_stay_in_the_folder(self, tmp_path, name):
        (tmp_path / "in").mkdir()
        for place in ("a", "in/a"):
            np.save(tmp_path / f"{place}.npy", ITEMS[IDS[0]].features)
        with pytest.raises(InputError) as caught:
            open_features(tmp_path / "in")[name]
        assert str(caught.value) == (
            f"{tmp_path / 'in'}: the image id {name!r} leads out of the folder"
        )

    @pytest.mark.parametrize("form", FORMATS)
    def test_a_file_cut_short_is_one_sentence(self, files, form, tmp_path):
        """Wherever the cut is, an image is right or refused."""
        source = files[form]
        small = [source.with_suffix(".json"), source.with_name(f"{source.stem}_imgid2idx.pkl")]
        for share in (0.2, 0.5, 0.9, 0.999):
            folder = tmp_path / str(share)
            folder.mkdir()
            for other in filter(Path.exists, small):
                (folder / other.name).write_bytes(other.read_bytes())
            cut(source, folder / source.name, share)
            found = {name: outcome(folder / source.name, name) for name in ITEMS}
            for name, regions in found.items():
                if isinstance(regions, str):
                    assert regions.startswith(str(folder / source.name))
                else:
                    assert np.array_equal(regions.features, ITEMS[name].features)
            assert share == 0.999 or any(isinstance(regions, str) for regions in found.values())


def outcome(path, name):
    """The regions of an image, or what the error says."""
    try:
        return open_features(path)[name]
    except InputError as error:
        return str(error)


def plant(folder, carrier, data):
    """A file of a format that has pickles in it, with this one in the place of an image's."""
    path = folder / "a"
    if carrier == "npy":
        path.mkdir()
        np.save(path / "1.npy", {})
        head = (path / "1.npy").read_bytes()[:128]
        (path / "1.npy").write_bytes(head + data)
    elif carrier == "lmdb":
        save_lmdb(path, {"1": data})
    else:
        save_lxmert_hdf5(path)
        path.with_suffix(".json").unlink()
        (folder / "a_imgid2idx.pkl").write_bytes(data)
    return path


def cut(source, target, share):
    if source.is_dir():
        target.mkdir()
        for inner in source.iterdir():
            if inner.name != "lock.mdb":
                cut(inner, target / inner.name, share)
    else:
        data = source.read_bytes()
        target.write_bytes(data[: int(len(data) * share)])


def one_line(fields):
    return "\t".join(map(str, fields)) + "\n"


GOOD = butd_line("7", ITEMS[IDS[0]])
BAD_LINES = {
    "base64": ([*GOOD[:5], GOOD[5][:-1]], "its features are no whole base64 (Incorrect padding)"),
    "bytes": (
        [*GOOD[:5], GOOD[5][:-4]],
        "its features have 399 bytes, which are not 5 rows of type float32",
    ),
    "boxes": (
        [*GOOD[:4], *coded(np.zeros((4, 4), np.float32)), GOOD[5]],
        "its boxes have 64 bytes, which are not 5 rows of 4 of type float32",
    ),
    "count": ([*GOOD[:3], "x", *GOOD[4:]], "its num_boxes is b'x', expected a number"),
    "size": (["7", 0, *GOOD[2:]], "the image's size is 0 x 480, expected pixels"),
    "columns": (
        GOOD[:5],
        "its line has 5 columns, expected 6; the file is cut short or damaged",
    ),
    "nan": (
        [*GOOD[:5], *coded(np.array([[1, 2], [3, np.inf]] + [[0, 0]] * 3, np.float32))],
        "a feature of region 1 is NaN or infinite",
    ),
}

BAD_RECORDS = {
    "boxes": (
        {"features": np.ones((3, 2)), "bbox": np.ones((2, 4))},
        "boxes has shape (2, 4), expected (3, 4) for 3 regions",
    ),
    "none": (
        {"image": 1, "bbox": 2},
        "holds no features under any of features, feature, image_feat, image_feature, "
        "image_features; it holds bbox, image",
    ),
    "text": ({"features": "abc"}, "its features are no array of numbers but str"),
    "objects": (
        {"features": np.array([None, {}])},
        "its features are no array of numbers but object",
    ),
    "axis": (np.ones(4), "its features have the shape (4,), expected (regions, width)"),
    "width": (
        np.ones((4, 0)),
        "its features have the shape (4, 0), expected (regions, width)",
    ),
    "nan": (np.array([[1, 2], [np.nan, 1]]), "a feature of region 1 is NaN or infinite"),
    "size": (
        {"features": np.ones((3, 2)), "image_width": "wide", "image_height": 3},
        "the image's size is 'wide' x 3, expected pixels",
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("name", BAD_LINES)
    def test_lines(self, tmp_path, name):
        fields, message = BAD_LINES[name]
        path = tmp_path / "a.tsv"
        path.write_text(one_line(butd_line("6", ITEMS[IDS[1]])) + one_line(fields))
        store = open_features(path)
        same(store["6"], ITEMS[IDS[1]], ("scores", "classes"))
        with pytest.raises(InputError) as caught:
            store["7"]
        assert str(caught.value) == f"{path}: image '7': {message}"

    @pytest.mark.parametrize("name", BAD_RECORDS)
    def test_records(self, tmp_path, name):
        record, message = BAD_RECORDS[name]
        np.save(tmp_path / "7.npy", record)
        with pytest.raises(InputError) as caught:
            open_features(tmp_path)["7"]
        assert str(caught.value) == f"{tmp_path}: image '7': {message}"

    def test_large_finite_features_are_numbers(self, tmp_path):
        large = np.full((2, 3), 3e38, np.float32)
        np.save(tmp_path / "7.npy", large)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(open_features(tmp_path)["7"].features, large)

    def test_arrays_cut_short(self, tmp_path):
        np.save(tmp_path / "7.npy", ITEMS[IDS[0]].features)
        data = (tmp_path / "7.npy").read_bytes()
        (tmp_path / "7.npy").write_bytes(data[:-4])
        with pytest.raises(InputError) as caught:
            open_features(tmp_path)["7"]
        assert str(caught.value) == (
            f"{tmp_path}: image '7': it is cut short: its array of shape (5, 20) takes 400 bytes "
            "and it has 396"
        )

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "no format of features that is known; read are"),
            (b"\x1f\x8b\x08" + bytes(50), "no format of features that is known; read are"),
            (b"a,b\n1,2\n", "no format of features that is known; read are"),
            (b"a\tb\tc\n", "a table of 3 columns without a header; those of bottom-up-attention"),
            (b"image_id\tboxes\tfeatures\n", "its header has no column num_boxes"),
            (b"image_id\tnum_boxes\tfeatures\n", "a table without a line"),
            (b"\x89HDF\r\n\x1a\n" + bytes(90), "not a whole HDF5 file ("),
            (bytes(16) + bytes.fromhex("dec0efbe") + bytes(90), "not a whole LMDB file;"),
        ],
    )
    def test_unknown_files(self, tmp_path, data, message):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InputError) as caught:
            open_features(tmp_path / "a")
        assert str(caught.value).startswith(f"{tmp_path / 'a'}: {message}")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError) as caught:
            open_features(tmp_path / "a")
        assert str(caught.value) == f"{tmp_path / 'a'}: no such file or folder"
        with pytest.raises(InputError) as caught:
            open_features(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path}: a folder without features; looked for .npy and .npz files in it and "
            "below; pass the path of a file of another format"
        )
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError) as caught:
            open_features(tmp_path / "pipe")
        assert str(caught.value) == (
            f"{tmp_path / 'pipe'}: neither a file nor a folder, so there is nothing to read"
        )

    def test_weights_are_not_features(self, tmp_path):
        from safetensors.numpy import save_file

        save_file({"a": np.ones(3)}, tmp_path / "a")
        with pytest.raises(InputError) as caught:
            open_features(tmp_path / "a")
        assert str(caught.value) == (
            f"{tmp_path / 'a'}: a safetensors file, but not of features; those are written by "
            "visualbert.inputs.features.write_features"
        )

    def test_torch_pickles_of_arrays_say_the_way_out(self, tmp_path):
        torch.save({"7": (np.ones((3, 2)), np.ones((3, 4)))}, tmp_path / "a")
        with pytest.raises(InputError) as caught:
            open_features(tmp_path / "a")["7"]
        assert str(caught.value) == (
            f"{tmp_path / 'a'}: image '7': its features are a numpy array inside torch's pickle, "
            "which is not read; load the file with torch.load and write it with "
            "visualbert.inputs.features.write_features"
        )

    def test_hdf5_without_its_index(self, tmp_path):
        path = tmp_path / "a.h5"
        save_lxmert_hdf5(path)
        index = (tmp_path / "a.json").rename(tmp_path / "images.json")
        with pytest.raises(InputError) as caught:
            open_features(path)
        assert str(caught.value) == (
            f"{path}: which image is in which row is told by a file beside it, and there is none "
            "called a_imgid2idx.pkl, a.json; pass index="
        )
        same(open_features(path, index=index)[IDS[2]], ITEMS[IDS[2]])
        index.write_text(json.dumps([*IDS, "x"]))
        with pytest.raises(InputError) as caught:
            open_features(path, index=index)
        assert str(caught.value) == f"{index}: puts image 'x' beyond the 3 rows of {path}"

    @pytest.mark.parametrize(("library", "form"), [("h5py", "hdf5 ban"), ("lmdb", "lmdb")])
    def test_missing_libraries(self, files, monkeypatch, library, form):
        monkeypatch.setitem(sys.modules, library, None)
        kind = "HDF5" if library == "h5py" else "LMDB"
        with pytest.raises(MissingBackendError) as caught:
            open_features(files[form])
        assert str(caught.value) == (
            f"{files[form]}: {kind} files need {library}: pip install visualbert[features]"
        )

    def test_ids_of_other_types(self, files):
        with pytest.raises(InputError) as caught:
            open_features(files["ours"])[1.5]
        assert str(caught.value) == "an image id is text or a number, got float"


def test_places_of_regions_as_six_numbers():
    regions = Regions(
        [[1, 2], [3, 4]], boxes=[[0, 0, 100, 50], [50, 25, 75, 50]], image_size=(200, 100)
    )
    found = with_spatial(regions)
    np.testing.assert_allclose(
        found.features,
        [[1, 2, 0, 0, 0.5, 0.5, 0.5, 0.5], [3, 4, 0.25, 0.25, 0.375, 0.5, 0.125, 0.25]],
    )
    for part in ("boxes", "image_size"):
        with pytest.raises(InputError) as caught:
            with_spatial(dataclasses.replace(regions, **{part: None}))
        assert str(caught.value) == (
            f"the places of regions need their {part}, which are not known"
        )


def test_what_is_written_is_pairs(tmp_path):
    path = tmp_path / "a.safetensors"
    write_features(path, {"a": Regions([[1.0]]), "b": Regions([[2.0], [3.0]])})
    with open_features(path) as store:
        assert {image: regions.features.tolist() for image, regions in store.items()} == {
            "a": [[1]],
            "b": [[2], [3]],
        }
    for items, got in [
        (["ab"], "str"),
        ([("a", np.zeros((1, 2)))], "('str', 'ndarray')"),
        ([("a", 1, 2)], "tuple"),
    ]:
        with pytest.raises(InputError) as caught:
            write_features(path, items)
        assert str(caught.value) == (
            f"items must be pairs of an image's id and its Regions, got {got}"
        )
