"""The map of the U-Net's blocks as HTML: drawn here, made clickable by ``javascript/sag_pag.js``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from sag_pag.engine.cost import UNetCost
from sag_pag.engine.topology import AttentionSite
from sag_pag.webui import texts


def selection(sites: Iterable[AttentionSite]) -> str:
    """What a map needs to know of the chosen sites: their names, for ``data-chosen``."""
    return " ".join(site.name for site in sites)


def block_map(cost: UNetCost, text: str, *, many: bool) -> str:
    """The U: input blocks going down, the middle, output blocks going up. ``text`` names the chosen ones.

    Blocks without self-attention are there, but can't be chosen. ``many``: several can be chosen. The costs are those
    of a step with CFG.
    """
    topology = cost.topology
    chosen = selection(topology.resolve_known(text))
    by_block = {block: [site for site in topology.sites if site.block is block] for block in topology.blocks}
    levels = _levels(cost)
    narrow = _narrow(levels)
    cells, depths = [], []
    for column, sites in enumerate(by_block.values()):
        label = _label(column, len(topology.blocks))
        place = f'style="--column: {column + 2}; --level: {levels[column] + 2}; --narrow-column: {narrow[column] + 2}"'
        if not sites:
            name = f"{texts.INPUT_HALF if column < len(by_block) // 2 else texts.OUTPUT_HALF}.{label}"
            cells.append(
                f'<span class="sag-pag-cell sag-pag-empty" {place} data-name="{name}" aria-hidden="true">{label}</span>'
            )
            continue
        name = sites[0].block_name
        cells.append(_button(cost, sites, name, label, many=many, place=place))
        if len(sites) > 1:
            inner = "".join(_button(cost, [site], site.name, f".{site.depth}", many=many) for site in sites)
            depths.append(
                f'<div class="sag-pag-depths" data-block="{name}" role="group" aria-label="{name}" hidden>'
                f"<span>{texts.TRANSFORMERS}</span><b>{name}</b>{inner}</div>"
            )
    labels = "".join(
        f'<span class="sag-pag-level" style="--level: {level + 2}" aria-hidden="true">{escape(_size(size))}</span>'
        for level, size in sorted({(levels[i], cost.map_sizes[s[0]]) for i, s in enumerate(by_block.values()) if s})
    )
    halves = "".join(
        f'<span class="sag-pag-half sag-pag-{side}" style="--from: {start + 2}; --to: {end + 2}" aria-hidden="true">'
        f"{text}</span>"
        for text, side, start, end in (
            (texts.INPUT_HALF, "left", 0, len(by_block) // 2),
            (texts.OUTPUT_HALF, "right", len(by_block) // 2 + 1, len(by_block)),
        )
    )
    title, hint = (texts.CHOOSE_MANY, texts.MAP_HELP) if many else (texts.CHOOSE_ONE, texts.MAP_HELP_ONE)
    return (
        f'<div class="sag-pag-map" data-choose="{"many" if many else "one"}" data-chosen="{chosen}"'
        f' data-text="{escape(text)}">'
        f'<div class="sag-pag-u" role="group" aria-label="{title}" style="--columns: {len(by_block)}; '
        f'--narrow-columns: {max(narrow) + 1}">'
        f'{halves}{labels}{"".join(cells)}</div>{"".join(depths)}'
        f'<div class="sag-pag-about"><span class="sag-pag-hint">{hint}</span><span class="sag-pag-block" hidden>'
        f'<b data-field="name"></b><span><span>{texts.RESOLUTION}</span> <b data-field="size"></b></span>'
        f'<span><span>{texts.HEADS}</span> <b data-field="heads"></b></span><span><span>{texts.ALONE}</span> '
        f'<b data-field="cost"></b> <span>{texts.PER_STEP}</span></span></span>'
        f'<span class="sag-pag-none" hidden><b data-field="name"></b> <span>{texts.NO_ATTENTION}</span></span>'
        "</div></div>"
    )


def _narrow(levels: Sequence[int]) -> list[int]:
    """Each cell's column in a narrow window: a level's input blocks from the left, its output blocks to the right."""
    half = (len(levels) + 1) // 2
    columns = max(levels.count(level) for level in set(levels))
    left = [levels[:i].count(level) for i, level in enumerate(levels[:half])]
    right = [columns - levels[i:].count(level) for i, level in enumerate(levels[half:], half)]
    return left + right


def _levels(cost: UNetCost) -> list[int]:
    """How often the latent has been halved, for each block."""
    topology = cost.topology
    halvings = [any(type(layer).__name__ == "Downsample" for layer in block.children()) for block in topology.blocks]
    doublings = [any(type(layer).__name__ == "Upsample" for layer in block.children()) for block in topology.blocks]
    levels, level = [], 0
    for down, up in zip(halvings, doublings, strict=True):
        level += down
        levels.append(level)
        level -= up
    return levels


def _label(column: int, count: int) -> str:
    """Input blocks count up, output blocks too; the middle is in between."""
    inputs = (count - 1) // 2
    if column == inputs:
        return "M"
    return str(column if column < inputs else column - inputs - 1)


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}×{size[0]}"


def _button(
    cost: UNetCost, sites: Sequence[AttentionSite], name: str, label: str, *, many: bool, place: str = "",
) -> str:
    """A block or transformer block with what is to be known about it, for people who point and for screen readers."""
    ratio = f"≈ {cost.perturbing_alone(tuple(sites)) if many else cost.reading_alone(sites[0]):.2f}×"
    size, heads = _size(cost.map_sizes[sites[0]]), int(sites[0].attention.heads)  # type: ignore[arg-type]
    return (
        f'<button type="button" class="sag-pag-cell" {place} tabindex="-1" aria-pressed="false" '
        f'aria-label="{name}, {size}, {ratio}" data-sites="{selection(sites)}" data-name="{name}" data-size="{size}" '
        f'data-heads="{heads}" data-cost="{ratio}">{label}</button>'
    )
