"""Which heads find what a phrase names: the figure of `entity_grounding`."""

from typing import Any

import numpy as np

from visualbert.explain.entities import EntityGrounding
from visualbert.explain.style import EDGE, INK, MARK, PALE_MARK, SIZES, clean, cut, style

_HEADS = 4.6, 3.1  # inches


def heads_figure(result: EntityGrounding, title: str = "") -> Any:
    """Entity-grounding accuracy by layer, every head a dot: the paper's Fig. 3.

    A dot's area is the head's mean attention to regions; heads that give less than a fifth are
    light. The dotted line is the baseline, the dashed one what no head can surpass.

    Returns:
        a `matplotlib.figure.Figure` for `save_picture`.

    Raises:
        MissingBackendError: matplotlib is not installed.
    """
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=_HEADS)
        axes = figure.add_axes((0.115, 0.135, 0.86, 0.65))
        _draw_heads(axes, result)
        for name, value, line in (
            (f"most confident detection: {100 * result.baseline:.1f} %", result.baseline, ":"),
            (f"entities with a region: {100 * result.bound:.1f} %", result.bound, "--"),
        ):
            if not np.isnan(value):
                axes.axhline(100 * value, color=INK, linewidth=1, linestyle=line, zorder=1)
                axes.plot([], [], color=INK, linewidth=1, linestyle=line, label=name)
        figure.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0.94), ncols=2, frameon=False,
            fontsize=SIZES["small"], handletextpad=0.4, columnspacing=1.2,
        )  # fmt: skip
        title = cut(clean(title), _HEADS[0] - 2 * EDGE)
        figure.text(0.5, 0.985, title, ha="center", va="top")
    return figure


def _draw_heads(axes: Any, result: EntityGrounding) -> None:
    layers, heads = result.accuracy.shape
    spread = (np.arange(heads) - (heads - 1) / 2) * (0.62 / max(heads - 1, 1))
    where = np.arange(1, layers + 1)[:, None] + spread  # as the paper counts them
    for light, colour, face in ((False, MARK, MARK), (True, PALE_MARK, "none")):
        chosen = (result.light == light) & ~np.isnan(result.accuracy)
        axes.scatter(
            where[chosen],
            100 * result.accuracy[chosen],
            s=6 + 54 * result.mass[chosen],
            facecolor=face,
            edgecolor=colour if light else "white",
            linewidth=0.9 if light else 0.4,
            zorder=2 if light else 3,
            clip_on=False,
            label="a head that gives them under 20 %"
            if light
            else "a head; area: attention to regions",
        )
    for layer in np.flatnonzero(np.isnan(result.accuracy).all(1)):
        axes.axvspan(layer + 0.6, layer + 1.4, color="#eeeeee", linewidth=0, zorder=0)
    _mark_best(axes, result, where)
    top = np.nanmax([np.nanmax(result.accuracy), result.baseline, result.bound])
    axes.set(
        xlim=(0.4, layers + 0.6),
        ylim=(0, min(104, 100 * top * 1.15 + 4)),
        xticks=np.arange(1, layers + 1),
        xlabel="layer",
        ylabel=f"right, % of {result.count} entities",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2.5, width=0.6)


def _mark_best(axes: Any, result: EntityGrounding, where: np.ndarray) -> None:
    layer, head = result.best
    value = 100 * result.accuracy[layer, head]
    right = layer < result.accuracy.shape[0] / 2
    axes.plot(where[layer, head], value, "o", ms=9, mfc="none", mec=INK, mew=0.8, clip_on=False)
    axes.annotate(
        f"layer {layer + 1}, head {head + 1}: {value:.1f} %",
        (where[layer, head], value),
        (7 if right else -7, 5),
        textcoords="offset points",
        ha="left" if right else "right",
        fontsize=SIZES["small"],
        zorder=4,
    )
