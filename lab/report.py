"""The results of ``evaluate`` as Markdown tables and as plots."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.evaluate import Evaluation
from lab.metrics import Change, Estimate
from lab.points import MIX, PARTS, Point, axis_title
from lab.results import Floor, Result, Setup, Sweep, write_csv


def _share(estimate: Estimate) -> str:
    if estimate.value != estimate.value:
        return ""
    return f"{100 * estimate.value:.1f} ± {100 * estimate.margin:.1f} %"


def changed(change: Change | None) -> str:
    """As the pages have it: "-22 % (-28 to -16)"; empty for nothing."""
    if change is None:
        return ""
    return f"{100 * change.value:+.0f} % ({100 * change.low:+.0f} to {100 * change.high:+.0f})"


def markdown_table(results: Sequence[Result]) -> str:
    """The results as a table for the docs, one row a point."""
    head = (
        "mode", "guidance", "Fréchet distance", "change", "precision", "recall", "caption seen", "sizes off",
        "shapes off", "two objects", "GFLOP",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for result in results:
        cells = (
            result.point.mode,
            result.point.label,
            f"{result.frechet.value:.2f} ± {result.frechet.margin:.2f}",
            changed(result.change),
            _share(result.precision),
            _share(result.recall),
            _share(result.agreement),
            _share(result.sizes_off),
            _share(result.shapes_off),
            _share(result.two_objects),
            f"{result.gigaflops:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_ALONE = {"sag": "against SAG alone", "pag": "against PAG alone", "cfg": "against CFG alone at the same scale"}


def combined_table(results: Sequence[Result]) -> str:
    """Mixes against their parts, where that has been measured; empty without such a point."""
    measured = [part for part in PARTS if any(part in result.against for result in results)]
    if not measured:
        return ""
    heads = ["mode", "guidance", *(_ALONE[part] for part in measured)]
    lines = ["", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for result in results:
        if result.against:
            cells = [result.point.mode, result.point.label, *(changed(result.against.get(part)) for part in measured)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def footnote(setup: Setup, floor: Floor) -> str:
    """How the numbers of a table were made, and what drawn pictures get."""
    return (
        f"{setup.samples} samples a line, in {setup.groups} groups of seeds, {setup.first_group} to "
        f"{setup.first_group + setup.groups - 1}; intervals of 95 %; computed in {setup.computed_in}. The Fréchet "
        f"distance is from {setup.drawn} drawn pictures of {setup.drawn_of}, precision and recall are against "
        f"{setup.samples} of any. "
        f"{setup.samples} other drawn pictures get a Fréchet distance of {floor.frechet}, and of {floor.decoded} after "
        f"the autoencoder, which is what a perfect U-Net would get; precision {_share(floor.precision)}, recall "
        f"{_share(floor.recall)}, sizes off {_share(floor.sizes_off)}, shapes off {_share(floor.shapes_off)}, two "
        f"objects in {_share(floor.two_objects)}.\n"
    )


def write_tables(sweep: Sweep, *, out: Path, plots: bool = True) -> list[Path]:
    """A Markdown table and a plot; returns what was written."""
    results, floor = sweep.results, sweep.floor
    page = out / f"{sweep.name}.md"
    parts = (markdown_table(results), combined_table(results), "\n", footnote(results[0].setup, floor))
    page.write_text("".join(parts), encoding="utf-8")
    if not plots:
        return [page]
    plot = out / f"{sweep.name}.png"
    plot_sweep(results, plot, floor=floor.decoded.value)
    return [page, plot]


def write_all(
    judge: Evaluation, wanted: Mapping[str, Sequence[Point]], *, out: Path, plots: bool = True
) -> list[Path]:
    """A CSV, a Markdown table and a plot for each sweep; returns what was written."""
    written = []
    firsts = {points[0].mixed: points[0] for points in wanted.values()}
    floors = {mixed: judge.floor(first) for mixed, first in firsts.items()}
    for name, points in wanted.items():
        sweep = Sweep([judge.result(point) for point in points], floors[points[0].mixed])
        write_csv(sweep, out / f"{name}.csv")
        written += [out / f"{name}.csv", *write_tables(sweep, out=out, plots=plots)]
    return written


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_sweep(results: Sequence[Result], path: Path, *, floor: float) -> None:
    """What is gained, by the sweep's value, by its ways of guiding or by cost; one panel a mode. Needs matplotlib."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    by_mode: dict[str, list[Result]] = {}
    for result in results:
        by_mode.setdefault(result.point.mode, []).append(result)
    rows, columns, heights = 1, len(by_mode), [4.0]
    draw, width, ratios = _plot_values, 5.6, "y"
    if results[0].point.sweep == MIX:
        draw, width, heights = _plot_mixes, 8.5, [5.5]
    elif results[0].point.sweep == "cost":
        draw, width, heights = _plot_costs, 7.5, [5.5]
    elif any(result.point.x is None for result in results):
        rows, columns, heights = len(by_mode), 1, [1.1 + 0.25 * len(chosen) for chosen in by_mode.values()]
        draw, width, ratios = _plot_ways, 8.5, "x"
    figure, _ = pyplot.subplots(
        rows, columns, figsize=(width * columns, sum(heights)), height_ratios=heights, layout="constrained",
        sharex=ratios == "x", sharey=ratios == "y",
    )  # fmt: skip
    for (mode, chosen), panel in zip(by_mode.items(), figure.axes, strict=True):
        panel.set_title(mode)
        draw(panel, chosen, floor / chosen[0].frechet.value)
    wide = max(1 + result.change.high for result in results if result.change) > 4
    titled = figure.axes[-1 if ratios == "x" else 0]
    about = [*(["log scale"] if wide else []), *([] if draw is _plot_mixes else ["95 % intervals"])]
    getattr(titled, f"set_{ratios}label")("relative Fréchet distance" + (f"\n({', '.join(about)})" if about else ""))
    if wide:  # of all panels, which share this axis
        getattr(titled, f"set_{ratios}scale")("log")
        ticker, axis = importlib.import_module("matplotlib.ticker"), getattr(titled, f"{ratios}axis")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4 * columns))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ratio(change: Change) -> tuple[float, list[list[float]]]:
    """The Fréchet distance, times the baseline's, and how far below and above the ends of its interval are."""
    return 1 + change.value, [[change.value - change.low], [change.high - change.value]]


def _draw_limits(line: Callable[..., object], results: Sequence[Result], *, floor: float | None) -> None:
    """Lines across for the baseline and, if it is given, for the best that can be."""
    baseline = results[0].point.label
    line(1, color="black", linestyle="--", label="no guidance" if baseline == "none" else baseline)
    if floor is not None:
        line(floor, color="grey", linestyle=":", label="a perfect U-Net")


def _plot_costs(axes: Any, results: Sequence[Result], floor: float) -> None:
    """Over what it takes: a colour for each method, a marker for each way to guide less often. The floor is far off."""
    del floor
    unguided, guided = results[0].gigaflops, [result for result in results if result.change is not None]
    named = [result.point.label.partition(", ")[::2] for result in guided]
    colours = {method: f"C{index}" for index, method in enumerate(dict.fromkeys(method for method, _ in named))}
    markers = dict(zip(dict.fromkeys(when for _, when in named), "os^vDXP<>", strict=False))
    _draw_limits(axes.axhline, results, floor=None)
    for result, (method, when) in zip(guided, named, strict=True):
        assert result.change is not None
        beside = 0.006 * (list(markers).index(when) - len(markers) / 2)  # equal costs would hide one another
        cost, (value, ends) = result.gigaflops / unguided + beside, _ratio(result.change)
        axes.errorbar(cost, value, yerr=ends, capsize=2, color=colours[method], alpha=0.25)
        axes.plot(cost, value, markers[when], color=colours[method])
    for method, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=method)
    for when, marker in markers.items():
        label = when.replace("every 1", "all steps").replace("every", "one step in")
        label = label if "step" in label else f"{label} of the steps"
        axes.plot([], [], marker, color="grey", label=label, linestyle="none")
    axes.set_xlabel("work, times that without guidance")


def _plot_mixes(axes: Any, results: Sequence[Result], floor: float) -> None:
    """Over the share of the caption that is seen: a line for each method and scale, along CFG's scale."""
    del floor
    lines: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        method, _, rest = result.point.label.partition(" ")
        lines.setdefault((method, rest.partition(",")[0]), []).append(result)
    methods = list(dict.fromkeys(method for method, _ in lines))
    for method, scale in lines:
        ordered = sorted(lines[method, scale], key=lambda result: result.point.recipe.cfg)
        seen = [100 * result.agreement.value for result in ordered]
        ratios = [1 + result.change.value if result.change else 1.0 for result in ordered]
        scales = [other for name, other in lines if name == method]
        colour = f"C{methods.index(method) - 1}" if method != "CFG" else "black"
        strength = (scales.index(scale) + 1) / len(scales)
        axes.plot(seen, ratios, "o-", color=colour, alpha=strength, markersize=4, label=f"{method} {scale}")
        for result, x, y in zip(ordered, seen, ratios, strict=True):
            cfg = f"{result.point.recipe.cfg:g}"
            axes.annotate(cfg, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel("caption seen, % (the numbers are CFG's scale)")


def _plot_values(axes: Any, results: Sequence[Result], floor: float) -> None:
    """Over the sweep's value."""
    _draw_limits(axes.axhline, results, floor=floor)
    curve = [(result.point.x, result.change) for result in results if result.change is not None]
    for x, change in curve:
        value, ends = _ratio(change)
        axes.errorbar(x, value, yerr=ends, fmt="o", capsize=3, color="C0")
    axes.plot([x for x, _ in curve], [1 + change.value for _, change in curve], color="C0")
    axes.set_xlabel(axis_title(results[0].point.sweep))


def _plot_ways(axes: Any, results: Sequence[Result], floor: float) -> None:
    """A line for each way of guiding."""
    _draw_limits(axes.axvline, results, floor=floor)
    ways = [(result.point.label, result.change) for result in results if result.change is not None]
    for place, (_, change) in enumerate(ways):
        value, ends = _ratio(change)
        axes.errorbar(value, place, xerr=ends, fmt="o", capsize=3, color="C0")
    axes.set_yticks(range(len(ways)), [label for label, _ in ways])
    axes.set_ylim(len(ways) - 0.5, -0.5)
