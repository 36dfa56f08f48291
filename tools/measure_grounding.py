"""The paper's entity-grounding measure (its Fig. 3) of the package's own model, on test scenes.

Entities are what questions name by digit or colour: "what digit is red", "is there a blue 7". Each
stands at its last word; a head is right where that word's strongest region, attention to words left
out, overlaps the thing by at least one half.

    python tools/measure_grounding.py [--scenes 300] [--seed 77] [--figure heads.png]
"""

import argparse
from collections.abc import Iterator

KINDS = ("digit", "colour", "exists")  # of questions that name one thing


def annotated(scenes: int, seed: int) -> Iterator:
    """Every question that names something that is there, with the boxes it may mean."""
    import visualbert
    from visualbert.explain import Annotated
    from visualbert.scenes.draw import COLOURS, make_scene, paint
    from visualbert.scenes.questions import NUMBERS, questions

    pipeline = visualbert.pipeline("vqa", backend="pt")
    names = {*COLOURS, *NUMBERS}
    for number in range(scenes):
        scene = make_scene(number, seed, "test")
        asked = [q for q in questions(scene) if q.kind in KINDS and q.about]
        if not asked:
            continue
        regions = pipeline.look(paint(scene))
        for question in asked:
            (found,) = pipeline.ask([question.text], [regions], attentions=True)
            place = [end - 1 for word, _, end in found.words if word in names][-1]
            yield Annotated(
                attentions=found.attentions,
                positions=[place],
                boxes=regions.boxes,
                gold=[[thing.box for thing in question.about]],
                text_length=found.words[-1][2],
                scores=regions.scores,
            )


def main() -> None:
    """Measure, print, draw."""
    from visualbert.explain import entity_grounding, heads_figure, save_picture

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--figure", metavar="FILE")
    args = parser.parse_args()
    result = entity_grounding(annotated(args.scenes, args.seed))
    print(result.table())
    if args.figure:
        save_picture(heads_figure(result, "the package's own model, test scenes"), args.figure)
        print(args.figure)


if __name__ == "__main__":
    main()
