"""`visualbert scenes`: the embedded benchmark."""

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "scenes",
        help="write the embedded benchmark",
        description="Scenes of real handwritten digits, and five tasks over them in the published "
        "tasks' file formats.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser(
        "make",
        help="write a folder of images, annotations and tasks",
        description="Write images, COCO annotations, and the tasks of VQA v2, NLVR2, VCR, "
        "Flickr30K Entities and COCO captions over them. The same numbers give the same bytes.",
    )
    make.add_argument("folder", metavar="DIR", help="where to write it")
    make.add_argument("--images", type=int, required=True, metavar="N", help="how many, at least 4")
    make.add_argument("--seed", type=int, default=0, metavar="S", help="0 where not given")
    make.add_argument(
        "--split",
        choices=("train", "test"),
        default="train",
        help="whose handwriting: test scenes show none that train scenes show",
    )
    make.add_argument("--force", action="store_true", help="replace a benchmark that is there")
    make.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder and say what it holds."""
    from visualbert.cli.common import count_progress
    from visualbert.errors import UsageError
    from visualbert.scenes.make import make_scenes

    wanted = {"images": args.images, "seed": args.seed, "split": args.split, "force": args.force}
    try:
        with count_progress(f"painting {args.folder}", args.images) as progress:
            counts = make_scenes(args.folder, **wanted, progress=progress)
    except UsageError as error:
        raise UsageError(str(error).replace("with force=True", "with --force")) from None
    held = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    print(f"wrote {args.folder}: {held} ({args.split}, seed {args.seed})")
    return 0
