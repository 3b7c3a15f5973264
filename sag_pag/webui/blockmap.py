"""The map of a network's blocks as HTML: drawn here, made clickable by ``javascript/sag_pag.js``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from sag_pag.engine.blocks import AttentionSite
from sag_pag.engine.model_cost import ModelCost
from sag_pag.webui import texts

_NARROW_LINE = 12
"""Blocks in a line of a narrow window, where a network has no levels."""


def selection(sites: Iterable[AttentionSite]) -> str:
    """What a map needs to know of the chosen sites: their names, for ``data-chosen``."""
    return " ".join(site.name for site in sites)


def block_map(cost: ModelCost, text: str, *, many: bool) -> str:
    """A U-Net's U: input blocks going down, the middle, output blocks going up. A transformer's blocks are in a line.

    ``text`` names the chosen ones.

    Blocks without self-attention are there, but can't be chosen. ``many``: several can be chosen. The costs are those
    of a step with CFG.
    """
    topology = cost.topology
    chosen = selection(topology.resolve_known(text))
    by_block = {block: [site for site in topology.sites if site.block is block] for block in topology.blocks}
    levels, names = topology.levels(), topology.labels()
    narrow = _narrow(levels)
    cells, depths = [], []
    for column, sites in enumerate(by_block.values()):
        label = names[column]
        place = (
            f'style="--column: {column + 2}; --level: {levels[column] + 2}; '
            f'--narrow-column: {narrow[column][0] + 2}; --narrow-level: {narrow[column][1] + 2}"'
        )
        if not sites:
            part = next((half.part for half in topology.halves() if half.first <= column <= half.last), "middle")
            name = part if part == "middle" else f"{part}.{label}"
            cells.append(
                f'<span class="sag-pag-cell sag-pag-empty" {place} data-name="{name}" aria-hidden="true">{label}</span>'
            )
            continue
        name = sites[0].block_name
        cells.append(_button(cost, sites, name, label, many=many, place=place))
        if len(sites) > 1:
            inner = "".join(_button(cost, [s], s.name, s.name.removeprefix(name), many=many) for s in sites)
            depths.append(
                f'<div class="sag-pag-depths" data-block="{name}" role="group" aria-label="{name}" hidden>'
                f"<span>{texts.TRANSFORMERS}</span><b>{name}</b>{inner}</div>"
            )
    labels = "".join(
        f'<span class="sag-pag-level" style="--level: {level + 2}" aria-hidden="true">{escape(_size(size))}</span>'
        for level, size in sorted({(levels[i], cost.map_sizes[s[0]]) for i, s in enumerate(by_block.values()) if s})
    )
    halves = "".join(
        f'<span class="sag-pag-half sag-pag-{half.side}" style="--from: {half.first + 2}; --to: {half.last + 3}" '
        f'aria-hidden="true">{texts.HALVES[half.part]}</span>'
        for half in topology.halves()
    )
    title, hint = (texts.CHOOSE_MANY, texts.MAP_HELP) if many else (texts.CHOOSE_ONE, texts.MAP_HELP_ONE)
    return (
        f'<div class="sag-pag-map" data-choose="{"many" if many else "one"}" data-chosen="{chosen}"'
        f' data-text="{escape(text)}">'
        f'<div class="sag-pag-u" role="group" aria-label="{title}" style="--columns: {len(by_block)}; '
        f'--narrow-columns: {max(narrow)[0] + 1}">'
        f'{halves}{labels}{"".join(cells)}</div>{"".join(depths)}'
        f'<div class="sag-pag-about"><span class="sag-pag-hint">{hint}</span><span class="sag-pag-block" hidden>'
        f'<b data-field="name"></b><span><span>{texts.RESOLUTION}</span> <b data-field="size"></b></span>'
        f'<span><span>{texts.HEADS}</span> <b data-field="heads"></b></span><span><span>{texts.ALONE}</span> '
        f'<b data-field="cost"></b> <span>{texts.PER_STEP}</span></span></span>'
        f'<span class="sag-pag-none" hidden><b data-field="name"></b> <span>{texts.NO_ATTENTION}</span></span>'
        "</div></div>"
    )


def _narrow(levels: Sequence[int]) -> list[tuple[int, int]]:
    """Each cell's column and row in a narrow window.

    A level's input blocks from the left, its output blocks up to the right; blocks that are all of one level in lines.
    """
    if len(set(levels)) == 1:
        return [(i % _NARROW_LINE, i // _NARROW_LINE) for i in range(len(levels))]
    half = (len(levels) + 1) // 2
    columns = max(levels.count(level) for level in set(levels))
    left = [levels[:i].count(level) for i, level in enumerate(levels[:half])]
    right = [columns - levels[i:].count(level) for i, level in enumerate(levels[half:], half)]
    return list(zip(left + right, levels, strict=True))


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}×{size[0]}"


def _button(
    cost: ModelCost, sites: Sequence[AttentionSite], name: str, label: str, *, many: bool, place: str = "",
) -> str:
    """A block or transformer block with what is to be known about it, for people who point and for screen readers."""
    ratio = f"≈ {cost.perturbing_alone(tuple(sites)) if many else cost.reading_alone(sites[0]):.2f}×"
    size, heads = _size(cost.map_sizes[sites[0]]), sites[0].heads
    return (
        f'<button type="button" class="sag-pag-cell" {place} tabindex="-1" aria-pressed="false" '
        f'aria-label="{name}, {size}, {ratio}" data-sites="{selection(sites)}" data-name="{name}" data-size="{size}" '
        f'data-heads="{heads}" data-cost="{ratio}">{label}</button>'
    )
