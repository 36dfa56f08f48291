"""Writing the embedded benchmark: a folder of images, annotations and five tasks over them.

The same seed, split and number of images give the same bytes (PNG's with the same Pillow). A folder
is written whole or not at all, and a scene's files do not depend on how many others there are.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from visualbert.checkpoint.write import finish_commits, replace_files
from visualbert.errors import UsageError
from visualbert.scenes import tasks
from visualbert.scenes.draw import HEIGHT, SPLITS, WIDTH, Scene, make_scene, paint
from visualbert.scenes.questions import ANSWERS

RECORD = "scenes.json"
FORMAT = 1  # of the folder, and of what is drawn for a seed
FEWEST = 4  # images: NLVR2's statements are about two pairs
MOST = 1_000_000
_COMPRESSION = 3  # of 9: a third of the time of zlib's default, and no larger
_BYTES = 280_000  # an image, about
_ABOUT = "scenes of handwritten digits"
_LICENCE = {"id": 1, "name": "Apache License 2.0", "url": "http://www.apache.org/licenses/"}
_SUBJECT = {"data_type": "mscoco", "task_type": "Open-Ended"}
_INFO = {
    "description": f"visualbert: {_ABOUT}",
    "url": "https://archive.ics.uci.edu/dataset/80",
    "version": str(FORMAT),
    "year": 1998,
    "contributor": "UCI digits, as scikit-learn has them",
    "date_created": "1998-07-01 00:00:00",
}


def make_scenes(
    folder: str | os.PathLike,
    images: int,
    seed: int,
    split: str = "train",
    force: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, int]:
    """Write a benchmark of `images` scenes and return how much of each it holds.

    Args:
        folder: made where it does not exist; docs/scenes.md lists what is written.
        images: how many, at least 4: four make a set of NLVR2's, and the rest has no statements.
        seed: 0 or greater. Another seed gives other scenes.
        split: `train` or `test`, which share no handwriting.
        force: replace a benchmark that is there; other files of the folder stay.
        progress: called with the number of images painted since the last call.

    Raises:
        UsageError: a number or a split that makes no sense, or a folder that holds something.
        CheckpointError: the folder cannot be written; what it held is untouched.
    """
    folder = Path(folder)
    _check(folder, images, seed, split, force)
    scenes: list[Scene] = []  # known when they are painted
    counts = {"images": images}
    record = {"format": FORMAT, "images": images, "seed": seed, "split": split}
    writers = {
        "images": lambda path: scenes.extend(_paint_all(path, images, seed, split, progress)),
        "annotations": lambda path: _write_coco(path, scenes, split),
        "vqa": lambda path: counts.update(questions=_write_vqa(path, scenes, split)),
        "nlvr2": lambda path: counts.update(statements=_write_nlvr2(path, scenes, split)),
        "vcr": lambda path: counts.update(problems=_write_vcr(path, scenes, split)),
        "flickr30k": lambda path: counts.update(sentences=_write_flickr(path, scenes, split)),
        RECORD: lambda path: path.write_text(json.dumps(record, indent=2) + "\n", "utf-8"),
    }
    replace_files(folder, writers, size=images * _BYTES)
    return counts


def _check(folder: Path, images: int, seed: int, split: str, force: bool) -> None:
    if split not in SPLITS:
        raise UsageError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    for name, value, least, most in (("images", images, FEWEST, MOST), ("seed", seed, 0, 2**63)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            limit = f"from {least} to {most:,}" if name == "images" else f"of at least {least}"
            raise UsageError(f"{name}={value!r} is not a whole number {limit}")
    finish_commits(folder)
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    if not (folder / RECORD).is_file():
        raise UsageError(f"{folder} holds something that is no benchmark; choose another folder")
    if not force:
        raise UsageError(
            f"{folder} holds a benchmark already; choose another folder, or replace it with "
            "force=True"
        )


def _paint_all(
    path: Path, images: int, seed: int, split: str, progress: Callable[[int], object]
) -> Iterator[Scene]:
    """Make every scene and write its image."""

    def draw(number: int) -> Scene:
        scene = make_scene(number, seed, split)
        name = tasks.image_name(split, number)
        paint(scene).save(path / name, "PNG", compress_level=_COMPRESSION)
        return scene

    path.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy, Pillow and zlib let go of the lock
        try:
            for scene in pool.map(draw, range(images)):
                progress(1)
                yield scene
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write lines and return their number."""
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(f"{line}\n")
            count += 1
    return count


def _write_list(path: Path, head: tasks.Record, name: str, items: Iterable[tasks.Record]) -> int:
    """Write a JSON object whose last entry is a list that need not fit into memory."""
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(f"{_dump(head)[:-1]}, {_dump(name)}: [")
        for count, item in enumerate(items, 1):
            file.write(f"{',' * (count > 1)}\n{_dump(item)}")
        file.write("\n]}\n")
    return count


def _write_coco(path: Path, scenes: list[Scene], split: str) -> None:
    path.mkdir()
    images = [
        {
            "id": scene.number,
            "file_name": tasks.image_name(split, scene.number),
            "width": WIDTH,
            "height": HEIGHT,
            "license": _LICENCE["id"],
        }
        for scene in scenes
    ]
    head = {"info": _INFO, "licenses": [_LICENCE], "images": images}
    digits = [{"id": n + 1, "name": str(n), "supercategory": "digit"} for n in range(10)]
    for name, more, records in (
        ("captions", {}, tasks.coco_captions),
        ("instances", {"categories": digits}, tasks.coco_instances),
    ):
        found = (record for scene in scenes for record in records(scene))
        _write_list(path / f"{name}_{split}.json", {**head, **more}, "annotations", found)


def _write_vqa(path: Path, scenes: list[Scene], split: str) -> int:
    path.mkdir()
    head = {"info": _INFO, "license": _LICENCE, "data_subtype": split, **_SUBJECT}
    for at, (file, name) in enumerate(
        (
            (f"v2_OpenEnded_mscoco_{split}_questions.json", "questions"),
            (f"v2_mscoco_{split}_annotations.json", "annotations"),
        )
    ):
        found = (pair[at] for scene in scenes for pair in tasks.vqa_records(scene))
        count = _write_list(path / file, head, name, found)
    _write_lines(path / "answers_vqa.txt", ANSWERS)
    return count


def _write_nlvr2(path: Path, scenes: list[Scene], split: str) -> int:
    """The statements, and the images under NLVR2's names."""
    (path / "images").mkdir(parents=True)
    for scene in scenes[: len(scenes) // 4 * 4]:
        source = path.parent / "images" / tasks.image_name(split, scene.number)
        target = path / "images" / tasks.nlvr2_image(scene)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)
    sets = (scenes[n : n + 4] for n in range(0, len(scenes) - 3, 4))
    found = (record for four in sets for record in tasks.nlvr2_records(four))
    return _write_lines(path / f"{split}.json", map(_dump, found))


def _write_vcr(path: Path, scenes: list[Scene], split: str) -> int:
    (path / "metadata").mkdir(parents=True)
    for scene in scenes:
        name = Path(tasks.image_name(split, scene.number)).with_suffix(".json")
        _write_lines(path / "metadata" / name, [_dump(tasks.vcr_metadata(scene))])
    found = (record for scene in scenes for record in tasks.vcr_records(scene))
    return _write_lines(path / f"{split}.jsonl", map(_dump, found))


def _write_flickr(path: Path, scenes: list[Scene], split: str) -> int:
    for name in ("Sentences", "Annotations"):
        (path / name).mkdir(parents=True)
    sentences = 0
    for scene in scenes:
        text, xml = tasks.flickr_records(scene)
        sentences += _write_lines(path / "Sentences" / f"{scene.number}.txt", text.splitlines())
        _write_lines(path / "Annotations" / f"{scene.number}.xml", xml.splitlines())
    _write_lines(path / f"{split}.txt", (str(scene.number) for scene in scenes))
    return sentences
