"""The drawn pictures: repeatable, anti-aliased, and showing what their captions say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lab import data
from lab.data import Scenes, caption_ids, draw_scenes, render
from sag_pag.demo.captions import COLOURS, SHAPES, describe, parse


def scenes(count: int, seed: int = 0) -> Scenes:
    return draw_scenes(count, torch.Generator().manual_seed(seed))


def plain(shape: str, colour: str, ground: str) -> Scenes:
    """One upright medium object in the middle, without tints."""
    return Scenes(
        two=torch.tensor([False]),
        shape=torch.tensor([[SHAPES.index(shape), 0]]),
        colour=torch.tensor([[COLOURS.index(colour), 0, COLOURS.index(ground)]]),
        size=torch.tensor([[1, 1]]),
        centre=torch.full((1, 2, 2), 0.5),
        radius=torch.full((1, 2), 0.25),
        angle=torch.zeros(1, 2),
        tint=torch.zeros(1, 3, 3),
        light=torch.zeros(1),
    )


def test_same_seed_same_pictures() -> None:
    first, again, other = render(scenes(6)), render(scenes(6)), render(scenes(6, seed=1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (6, 3, 64, 64)
    assert first.min() >= 0
    assert first.max() <= 1


def test_redrawn_pictures_show_the_same_otherwise() -> None:
    first = scenes(3000)
    other = data.redrawn(first, torch.Generator().manual_seed(1))
    assert torch.equal(caption_ids(first), caption_ids(other))
    for a, b in zip(render(first), render(other), strict=True):
        assert not torch.equal(a, b)
    for name in ("centre", "radius", "angle", "tint", "light"):
        mine, theirs = getattr(first, name).flatten(), getattr(other, name).flatten()
        assert (mine != theirs).all()
        assert theirs.mean() == pytest.approx(mine.mean().item(), abs=0.1 * mine.std().item())
        assert theirs.std() == pytest.approx(mine.std().item(), rel=0.05)


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    batch = scenes(8)
    single = Scenes(**{name: getattr(batch, name)[3:4] for name in batch.__dataclass_fields__})
    torch.testing.assert_close(render(single)[0], render(batch)[3])


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_covers_what_it_should(shape: str) -> None:
    """The white part of a white shape on black, against a brute-force count of its area at four times the size."""
    picture = plain(shape, "white", "black")
    small, large = render(picture)[0].mean(0), render(picture, size=256)[0].mean(0)
    cover = (small > 0.5).double().mean().item()
    assert cover == pytest.approx((large > 0.5).double().mean().item(), rel=0.06)
    assert 0.04 < cover < 0.20
    edge = ((small > 0.25) & (small < 0.65)).double().mean()
    assert edge > 0.005  # neither aliased nor absent
    middle = small[32, 32]
    assert middle < 0.3 if shape == "ring" else middle > 0.5 or shape == "moon"
    border = torch.cat((small[0], small[-1], small[:, 0], small[:, -1]))
    assert border.max() < 0.3


def test_all_shapes_differ() -> None:
    pictures = torch.cat([render(plain(shape, "white", "black")) for shape in SHAPES])
    distances = torch.cdist(pictures.flatten(1), pictures.flatten(1)) + 99 * torch.eye(len(SHAPES))
    assert distances.min() > 8


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_the_named_ones(colour: str) -> None:
    ground = "white" if colour == "black" else "black"
    picture = render(plain("square", colour, ground))[0]
    distance = (picture[:, 28:36, 28:36].mean((1, 2)) - data.PALETTE).norm(dim=1)
    assert COLOURS[int(distance.argmin())] == colour
    distance = (picture[:, :, :4].mean((1, 2)) - data.PALETTE).norm(dim=1)
    assert COLOURS[int(distance.argmin())] == ground


def test_light_and_second_objects() -> None:
    one = plain("star", "red", "green")
    below = replace(one, light=torch.full((1,), math.pi / 2))
    two = replace(one, two=torch.tensor([True]), centre=torch.tensor([[[0.25, 0.5], [0.75, 0.5]]]))
    top, bottom = render(below)[0, :, 2].mean(), render(below)[0, :, -3].mean()
    assert bottom > top + 0.1
    assert render(one)[0, :, 2].mean() == pytest.approx(render(one)[0, :, -3].mean().item(), abs=0.02)
    assert (render(two) - render(one)).abs().mean() > 0.02


def test_objects_stand_out_and_stay_inside() -> None:
    many = scenes(2000)
    assert (many.colour[:, :2] != many.colour[:, 2:]).all()
    counted = torch.stack((torch.ones_like(many.two), many.two), dim=1)
    edge = many.centre - many.radius[..., None], many.centre + many.radius[..., None]
    assert edge[0][counted].min() > -0.02
    assert edge[1][counted].max() < 1.02
    gap = (many.centre[:, 1, 0] - many.centre[:, 0, 0] - many.radius.sum(dim=1))[many.two]
    assert gap.min() > -0.07
    assert many.two.double().mean().item() == pytest.approx(data.TWO_OBJECTS, abs=0.04)


def test_captions_tell_what_is_there() -> None:
    many = scenes(500)
    for index, ids in enumerate(caption_ids(many).tolist()):
        caption = describe(ids)
        assert parse(caption) == ids
        assert SHAPES[int(many.shape[index, 0])] in caption
        assert caption.endswith(COLOURS[int(many.colour[index, 2])])
        assert (" and " in caption) == bool(many.two[index])
    complete = caption_ids(many)
    left_out = caption_ids(many, torch.Generator().manual_seed(1))
    assert ((left_out == complete) | (left_out == 0)).all()
    assert (left_out != complete).any()
