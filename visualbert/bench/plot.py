"""The figures of `visualbert bench`: speed by workload, and cost against real tokens."""

from collections.abc import Sequence
from typing import Any

from visualbert.bench.run import Result
from visualbert.bench.sweep import Point, Sweep
from visualbert.bench.workloads import REFERENCE
from visualbert.explain.style import INK, MARK, PALE, SHADE, SIZES, style

_GREEN = "#009e73"  # of Okabe and Ito's palette too
COLOURS = {"pt": SHADE, "tf": _GREEN, "flax": MARK, REFERENCE: PALE}
NAMES = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax", REFERENCE: "transformers"}
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "D", "int8": "^"}
_WIDTH, _ROW, _EDGES = 6.5, 0.16, 0.95  # inches


def ratios_figure(results: Sequence[Result]) -> Any:
    """Speed relative to transformers of every implementation on every workload: medians and ranges
    on a logarithmic axis.

    Returns:
        a `matplotlib.figure.Figure` for `save_picture`.

    Raises:
        MissingBackendError: matplotlib is not installed.
    """
    bars = [[row for row in result.rows[1:] if not row.failed] for result in results]
    height = _EDGES + _ROW * sum(len(rows) + 1 for rows in bars)
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, height))
        axes = figure.add_axes((0.14, 0.4 / height, 0.83, 1 - _EDGES / height))
        y, middles = 0.0, []
        for result, rows in zip(results, bars, strict=True):
            middles.append(y + (len(rows) - 1) / 2)
            for row in rows:
                _draw_range(axes, y, result.ratio(row), row.implementation)
                y += 1
            y += 1
            axes.axhline(y - 1, color=PALE, linewidth=0.3)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set(xscale="log", ylim=(y - 1, -1), xlabel=_axis(results))
        axes.set_yticks(middles, [result.workload.name for result in results])
        _plain_ticks(axes)
        shown = [row.implementation for rows in bars for row in rows]
        _legend(figure, {(x.backend, x.dtype) for x in shown})
    return figure


def _axis(results: Sequence[Result]) -> str:
    kinds = {result.rows[0].implementation.dtype for result in results}
    return f"speed relative to transformers in {', '.join(sorted(kinds))} (median and range)"


def _draw_range(axes: Any, y: float, ratio: Any, implementation: Any) -> None:
    colour = COLOURS.get(implementation.backend, INK)
    axes.plot([ratio.low, ratio.high], [y, y], color=colour, linewidth=1.2)
    axes.plot(
        ratio.median, y, MARKERS[implementation.dtype], color=colour, markersize=4, linestyle="none"
    )
    axes.annotate(
        f"{ratio.median:.2f}", (ratio.high, y), (4, 0), textcoords="offset points", va="center",
        fontsize=SIZES["small"],
    )  # fmt: skip


def _plain_ticks(axes: Any) -> None:
    """1, 2, 4 … and not powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), high * 1.15)
    axes.xaxis.set_major_locator(LogLocator(2))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2.5, width=0.6)


def _legend(figure: Any, shown: set[tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    order = list(NAMES), list(MARKERS)
    handles = [
        Line2D([], [], color=COLOURS[backend], marker=MARKERS[dtype], markersize=4, linewidth=1.2,
               label=f"{NAMES[backend]}, {dtype}")
        for backend in order[0]
        for dtype in order[1]
        if (backend, dtype) in shown
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=SIZES["small"],
        bbox_to_anchor=(0.5, 1), handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip


def sweep_figure(sweep: Sweep) -> Any:
    """Milliseconds against real tokens, a panel for each implementation: full dots are the second
    call with a shape, circles the first.

    Returns:
        a `matplotlib.figure.Figure` for `save_picture`.

    Raises:
        MissingBackendError: matplotlib is not installed.
    """
    names = [row.implementation.name for row in sweep.rows]
    names = [name for name in names if any(name in point.second for point in sweep.points)]
    count = -(-len(names) // 2)
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, 1.9 * count + 0.3), layout="constrained")
        panels = figure.subplots(count, 2, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(panels.flat, names, strict=False):
            _draw_points(axes, name, [p for p in sweep.points if name in p.second])
        figure.legend(
            *panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2,
            frameon=False, fontsize=SIZES["small"],
        )  # fmt: skip
        figure.supxlabel("real tokens and regions in a batch", fontsize=SIZES["text"])
        figure.supylabel("ms", fontsize=SIZES["text"])
    return figure


def _draw_points(axes: Any, name: str, points: Sequence[Point]) -> None:
    colour = COLOURS.get(name.partition(" ")[0], INK)
    tokens = [p.tokens for p in points]
    first, second = [1000 * p.first[name] for p in points], [1000 * p.second[name] for p in points]
    axes.vlines(tokens, second, first, color=colour, linewidth=0.4)
    axes.scatter(tokens, first, 14, facecolor="white", edgecolor=colour, label="first call")
    axes.scatter(tokens, second, 10, color=colour, label="second call")
    axes.set(xscale="log", yscale="log")
    axes.set_title(name, fontsize=SIZES["text"])
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:,.10g}")
