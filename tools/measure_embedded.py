"""How often the package's own checkpoint answers right, from pixels, by type of question.

Scenes of the test split hold only handwriting that training never saw. Each framework answers the
same questions about the same regions; the last column says how many answers differ from PyTorch's.

    python tools/measure_embedded.py [--scenes 1000] [--seed 77] [--backends pt,tf,flax]
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def look(number: int, seed: int) -> tuple[Any, list[Any]]:
    """The regions of a test scene, found in its pixels, and the questions about it."""
    from visualbert.regions import get_extractor
    from visualbert.scenes.draw import make_scene, paint
    from visualbert.scenes.questions import questions

    scene = make_scene(number, seed, "test")
    return get_extractor()(paint(scene)), list(questions(scene))


def answers(backend: str, seen: list[tuple[Any, list[Any]]]) -> Iterator[str]:
    """What the model answers, question by question."""
    import visualbert

    pipeline = visualbert.pipeline("vqa", backend=backend)
    items = ((q.text, regions) for regions, asked in seen for q in asked)
    for batch in pipeline.stream(items, top=1, batch_size=64):
        yield from (found.answer for found in batch)


def main() -> None:
    """Look, ask, count, print."""
    from visualbert.cli.common import console, table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--backends", default="pt,tf,flax")
    args = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        numbers = range(args.scenes)
        seen = list(pool.map(look, numbers, [args.seed] * args.scenes, chunksize=20))
    asked = [question for _, questions in seen for question in questions]
    names = args.backends.split(",")
    found = {name: list(answers(name, seen)) for name in names}
    made = table("question", "asked", *names, right=("asked", *names))
    for kind in (*dict.fromkeys(q.kind for q in asked), "all"):
        rows = [n for n, q in enumerate(asked) if kind in (q.kind, "all")]
        right = {
            name: Counter(found[name][n] == asked[n].answer for n in rows)[True] for name in names
        }
        made.add_row(kind, str(len(rows)), *(f"{right[n] / len(rows):.1%}" for n in names))
    differing = [
        str(sum(a != b for a, b in zip(found[n], found[names[0]], strict=True))) for n in names
    ]
    made.add_row(f"answers unlike {names[0]}'s", "", *differing)
    console().print(made)


if __name__ == "__main__":
    main()
