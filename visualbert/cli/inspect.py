"""`visualbert inspect`: what a checkpoint is, and what is wrong with it."""

import argparse
from typing import Any

from visualbert.errors import CheckpointError


def register(commands: Any) -> None:
    """Add the command to the parser."""
    from visualbert.cli.common import add_source

    parser = commands.add_parser(
        "inspect",
        help="show configuration, architecture, tensors and defects",
        description="Show what a checkpoint is and what is wrong with it. Exits 1 if something is.",
    )
    add_source(parser)
    parser.add_argument(
        "--schema", action="store_true", help="list every parameter and its name in each framework"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if the checkpoint has a defect."""
    from rich.markup import escape

    from visualbert.cli.common import choose_architecture, console, notes_of, open_any, worded
    from visualbert.schema import parameters

    checkpoint = open_any(args)
    architecture = choose_architecture(checkpoint, args.architecture)
    config = checkpoint.config
    out = console()
    out.print(f"[bold]{escape(worded(checkpoint.label))}[/bold]  {architecture}", soft_wrap=True)
    out.print(f"read as: {checkpoint.family.title} ({checkpoint.format})")
    out.print(_config_line(config))
    out.print(_kinds(architecture, config))
    if args.schema:
        out.print(_schema(parameters(architecture, config), config))
    out.print(_file_line(checkpoint.tensors))
    for note, names in notes_of(checkpoint, args.architecture).items():
        out.print(worded(f"{note}: {', '.join(names)}"), soft_wrap=True, markup=False)
    if checkpoint.aside is not None:
        out.print(f"beside the model: {_file_line(checkpoint.aside)}", soft_wrap=True)
    defects = find_defects(checkpoint, architecture)
    for defect in defects:
        out.print(f"[bold red]wrong[/bold red]  {escape(worded(defect))}", soft_wrap=True)
    if not defects:
        out.print("nothing is wrong with it")
    return 1 if defects else 0


def find_defects(checkpoint: Any, architecture: str) -> list[str]:
    """Every defect in one sentence: tensors that do not fit, values that are no numbers, damage."""
    import numpy as np

    from visualbert.checkpoint.match import check_ties, match
    from visualbert.checkpoint.tensors import DTYPES
    from visualbert.cli.common import counted, verify_checksum

    tensors = checkpoint.tensors
    defects = []
    try:
        check_ties(tensors, match(tensors, architecture, checkpoint.config))
    except CheckpointError as error:
        defects.append(str(error))
    try:
        verify_checksum(checkpoint)
    except CheckpointError as error:
        defects.append(str(error))
    for name, spec in tensors.specs.items():
        if spec.dtype in DTYPES:
            values = tensors.read(name)
            bad = values.size - int(np.isfinite(values).sum())
            if bad:
                are = "is" if bad == 1 else "are"
                defects.append(f"{name} holds {counted(bad, 'value')} that {are} not finite")
    return defects


def _config_line(config: Any) -> str:
    from visualbert.cli.common import counted

    fusion = ", late fusion" if config.bypass_transformer else ""
    return (
        f"{counted(config.num_hidden_layers, 'layer')}, hidden {config.hidden_size}, "
        f"{counted(config.num_attention_heads, 'head')}, feed-forward {config.intermediate_size}, "
        f"{counted(config.vocab_size, 'word')}, "
        f"{counted(config.max_position_embeddings, 'position')}, region features "
        f"{config.visual_embedding_dim} wide, {counted(config.num_labels, 'label')}{fusion}"
    )


def _kinds(architecture: str, config: Any) -> Any:
    import math

    from visualbert.cli.common import table
    from visualbert.schema import Kind, parameters

    made = table("kind", "tensors", "parameters", right=("tensors", "parameters"))
    params = parameters(architecture, config)
    for kind in Kind:
        sizes = [math.prod(p.shape(config)) for p in params if p.kind is kind]
        made.add_row(kind.value, str(len(sizes)), f"{sum(sizes):,}")
    total = sum(math.prod(p.shape(config)) for p in params)
    made.add_row("[bold]all[/bold]", str(len(params)), f"[bold]{total:,}[/bold]")
    return made


def _file_line(tensors: Any) -> str:
    from collections import Counter

    from visualbert.checkpoint.tensors import total_bytes
    from visualbert.cli.common import counted, megabytes

    counts = Counter(spec.dtype for spec in tensors.specs.values())
    types = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    tensors_of = counted(len(tensors.specs), "tensor")
    return f"stored: {tensors_of} ({types}), {megabytes(total_bytes(tensors))}"


def _schema(params: Any, config: Any) -> Any:
    from visualbert.cli.common import table

    spelling = {
        "embedding": ("weight", "embeddings", "embedding"),
        "linear": ("weight", "kernel (transposed)", "kernel (transposed)"),
        "bias": ("bias", "bias", "bias"),
        "scale": ("weight", "gamma", "scale"),
        "shift": ("bias", "beta", "bias"),
    }
    made = table("parameter", "shape", "kind", "tf", "flax")
    for p in params:
        _, tf, flax = spelling[p.kind.value]
        shape = f"{p.symbols} = {', '.join(map(str, p.shape(config)))}"
        made.add_row(p.name, shape, p.kind.value, tf, flax)
    return made
