"""The drawn pictures: one or two shaded objects on a background, 64x64, with their captions.

Everything is a signed distance evaluated for a whole batch at once, so edges are anti-aliased and a thousand pictures
take about a second on one core. A picture depends on the generator's seed only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sag_pag.demo.autoencoder import SIZE
from sag_pag.demo.captions import COLOURS, SHAPES, SIZES, SLOTS, VOCABULARY

PALETTE = torch.tensor(
    [
        (0.85, 0.12, 0.12),  # red
        (0.98, 0.55, 0.08),  # orange
        (0.97, 0.87, 0.15),  # yellow
        (0.15, 0.62, 0.22),  # green
        (0.12, 0.32, 0.85),  # blue
        (0.52, 0.18, 0.68),  # purple
        (0.95, 0.95, 0.95),  # white
        (0.10, 0.10, 0.11),  # black
    ]
)
"""RGB of the colours, in the order of their names."""

_RADII = torch.tensor([[(0.14, 0.19), (0.22, 0.29), (0.32, 0.39)], [(0.11, 0.13), (0.15, 0.17), (0.19, 0.22)]])
"""Radius range in picture widths by number of objects and by small, medium, big."""

TWO_OBJECTS = 0.35
NAMED_SIZE = 0.6
"""Share of the small and big objects whose caption says so."""
FORGOTTEN = 0.04
"""Share of the other words that a caption leaves out."""


@dataclass(frozen=True)
class Scenes:
    """What ``B`` pictures show. Second objects count only where ``two`` is true; lengths are in picture widths."""

    two: Tensor
    """``(B,)`` bool."""
    shape: Tensor
    """``(B, 2)`` index into SHAPES."""
    colour: Tensor
    """``(B, 3)`` index into COLOURS: left object, right object, background."""
    size: Tensor
    """``(B, 2)`` 0 small, 1 medium, 2 big."""
    centre: Tensor
    """``(B, 2, 2)`` x and y."""
    radius: Tensor
    """``(B, 2)``."""
    angle: Tensor
    """``(B, 2)`` radians."""
    tint: Tensor
    """``(B, 3, 3)`` offset to the RGB of left object, right object, background."""
    light: Tensor
    """``(B,)`` the direction in radians in which the background gets lighter."""

    def __len__(self) -> int:
        return len(self.two)


_Uniform = Callable[..., Tensor]
"""Random numbers from 0 to 1, ``(B, *shape)``."""


def _uniform(count: int, generator: torch.Generator) -> _Uniform:
    return lambda *shape: torch.rand(count, *shape, generator=generator)


def _places(two: Tensor, size: Tensor, uniform: _Uniform) -> dict[str, Tensor]:
    """Where objects are, and how big exactly."""
    low, high = _RADII[two.long()[:, None], size].unbind(-1)
    radius = low + (high - low) * uniform(2)
    single = radius[:, :1, None] + 0.04 + (0.92 - 2 * radius[:, :1, None]) * uniform(1, 2)
    x = torch.tensor([0.26, 0.74]) + 0.05 * (2 * uniform(2) - 1)
    pair = torch.stack((x, radius + 0.04 + (0.92 - 2 * radius) * uniform(2)), dim=-1)
    return {"centre": torch.where(two[:, None, None], pair, single), "radius": radius}


def _looks(uniform: _Uniform) -> dict[str, Tensor]:
    """How objects are turned, tinted and lit."""
    return {
        "angle": 0.4 * (2 * uniform(2) - 1),
        "tint": 0.05 * (2 * uniform(3, 3) - 1),
        "light": 2 * math.pi * uniform(),
    }


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Draw what ``count`` pictures show; no two parts of a picture that touch have the same colour."""
    uniform = _uniform(count, generator)

    def choice(options: int, *shape: int) -> Tensor:
        return torch.randint(options, (count, *shape), generator=generator)

    two = uniform() < TWO_OBJECTS
    size = choice(3, 2)
    places = _places(two, size, uniform)
    ground = choice(len(COLOURS))
    objects = (ground[:, None] + 1 + choice(len(COLOURS) - 1, 2)) % len(COLOURS)
    return Scenes(
        two=two,
        shape=choice(len(SHAPES), 2),
        colour=torch.cat((objects, ground[:, None]), dim=1),
        size=size,
        **places,
        **_looks(uniform),
    )


def redrawn(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Other pictures of the same complete captions: the same objects elsewhere, turned, tinted and lit otherwise."""
    uniform = _uniform(len(scenes), generator)
    return replace(scenes, **_places(scenes.two, scenes.size, uniform), **_looks(uniform))


def caption_ids(scenes: Scenes, generator: torch.Generator | None = None) -> Tensor:
    """``(B, 7)`` word ids. With a generator captions leave words out as people do; without, only medium sizes."""
    count = len(scenes)
    first = {word: index for index, word in enumerate(VOCABULARY)}
    size = torch.tensor([first[SIZES[0]], 0, first[SIZES[1]]])[scenes.size]
    colour = scenes.colour + first[COLOURS[0]]
    shape = scenes.shape + first[SHAPES[0]]
    ids = torch.stack(
        (size[:, 0], colour[:, 0], shape[:, 0], size[:, 1], colour[:, 1], shape[:, 1], colour[:, 2]), dim=1
    )
    ids[:, 3:6] *= scenes.two[:, None]
    if generator is not None:
        kept = torch.tensor([NAMED_SIZE if slot is SIZES else 1 - FORGOTTEN for slot in SLOTS])
        ids *= torch.rand(count, len(SLOTS), generator=generator) < kept
    return ids


def _polygon(x: Tensor, y: Tensor, sides: int, inradius: float) -> Tensor:
    turns = [2 * math.pi * k / sides + math.pi / 2 for k in range(sides)]
    return torch.stack([x * math.cos(a) + y * math.sin(a) for a in turns]).amax(dim=0) - inradius


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into one half of one point, which has a single straight edge."""
    sector = 2 * math.pi / 5
    turn = torch.atan2(x, -y)
    folded = (turn - sector * torch.round(turn / sector)).abs()
    r = torch.hypot(x, y)
    tip, notch = (1.08, 0.0), (0.46 * math.cos(sector / 2), 0.46 * math.sin(sector / 2))
    dx, dy = notch[0] - tip[0], notch[1] - tip[1]
    return ((r * folded.cos() - tip[0]) * dy - (r * folded.sin() - tip[1]) * dx) / math.hypot(dx, dy)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square standing on its corner with half a disc on each upper side."""
    y = y - 0.08
    half = 0.56
    u, v = (x + y) / math.sqrt(2), (x - y) / math.sqrt(2)
    discs = torch.minimum(torch.hypot(u + half, v), torch.hypot(u, v - half)) - half
    return torch.minimum(torch.maximum(u.abs(), v.abs()) - half, discs)


def _distance(shape: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (in radii, negative inside) to a shape of about unit radius; y points down."""
    name = SHAPES[shape]
    r = torch.hypot(x, y)
    if name == "disc":
        return r - 0.95
    if name == "ring":
        return (r - 0.74).abs() - 0.23
    if name == "square":
        return _box(x, y, 0.8, 0.8)
    if name == "triangle":
        return _polygon(x, y - 0.1, 3, 0.56)
    if name == "star":
        return _star(x, y)
    if name == "cross":
        return torch.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))
    if name == "heart":
        return _heart(x, y)
    return torch.maximum(r - 0.98, 0.78 - torch.hypot(x - 0.42, y + 0.22))


def _object_distance(scenes: Scenes, index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distance in picture widths to one object, and how far along the light (upper left to lower right) a point is."""
    radius = scenes.radius[:, index, None, None]
    dx = (x - scenes.centre[:, index, 0, None, None]) / radius
    dy = (y - scenes.centre[:, index, 1, None, None]) / radius
    cos, sin = scenes.angle[:, index].cos()[:, None, None], scenes.angle[:, index].sin()[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance = torch.empty_like(u)
    for shape in range(len(SHAPES)):
        rows = (scenes.shape[:, index] == shape).nonzero()[:, 0]
        distance[rows] = _distance(shape, u[rows], v[rows])
    return distance * radius, (dx + dy) / math.sqrt(2)


def render(scenes: Scenes, size: int = SIZE) -> Tensor:
    """Draw the scenes: ``(B, 3, size, size)`` RGB in 0 to 1."""
    steps = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    y, x = y[None], x[None]
    rgb = PALETTE[scenes.colour] + scenes.tint

    direction = scenes.light[:, None, None]
    along = (x - 0.5) * direction.cos() + (y - 0.5) * direction.sin()
    picture = rgb[:, 2, :, None, None] + (0.16 * along)[:, None]

    for index in (1, 0):
        present = scenes.two if index else torch.ones_like(scenes.two)
        shadow, _ = _object_distance(scenes, index, x - 0.025, y - 0.035)
        shade = 0.45 * ((0.03 - shadow) / 0.06).clamp(0, 1) * present[:, None, None]
        picture = picture * (1 - shade[:, None])
        distance, lit = _object_distance(scenes, index, x, y)
        inside = (0.5 - distance * size).clamp(0, 1) * present[:, None, None]
        rim = ((distance + 0.03) / 0.03).clamp(0, 1)
        paint = rgb[:, index, :, None, None] - (0.13 * lit + 0.1 * rim)[:, None]
        picture = torch.lerp(picture, paint, inside[:, None])
    return picture.clamp(0, 1)
