"""Extra rows with a shared prefix give what a U-Net with identity attentions gives, call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_pag.demo.unet import UNetKwargs, UNetModel, redraw_
from sag_pag.engine.attention import MapCapture, unchanged_inputs
from sag_pag.engine.branch import Branch, denoise_with_branch
from sag_pag.engine.calls import APART, JOINED, REPEATED, Manner
from sag_pag.engine.perturbations import Place, swapped_tokens
from sag_pag.engine.rows import take_rows
from sag_pag.engine.topology import UNetTopology
from sag_pag.neighbours.invisible import Invisible
from sag_pag.settings import Settings

DEEP = UNetKwargs(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(2, 1), context_dim=8, num_heads=2, transformer_depth=(1, 3),
)
ROWS = 4
PERTURBED = ["input.1", "input.3.2", "middle", "middle.1", "middle.0, middle.2", "input.3.1, output.2", "output.3",
             "input.1, middle, output.0-3"]  # fmt: skip


class Identity(nn.Module):
    def __init__(self, original: Any) -> None:
        super().__init__()
        self.to_v, self.to_out = original.to_v, original.to_out

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        out: Tensor = self.to_out(self.to_v(x))
        return out


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return redraw_(UNetModel(**DEEP), seed=1, gain=1.5).requires_grad_(False)


class Denoise:
    """Counts what it is called with."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.rows: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        self.rows.append(len(x))
        out: Tensor = self.unet(x, sigma, context=cond["text"][0])
        return out


def inputs() -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, 4, 8, 6, generator=generator)
    context = torch.randn(ROWS, 5, 8, generator=generator)
    return x, torch.tensor([700.0, 500.0, 700.0, 500.0]), {"text": [context], "name": "kept"}


def perturbed_alone(unet: nn.Module, topology: UNetTopology, text: str, rows: range) -> Tensor:
    x, sigma, cond = inputs()
    sites = topology.resolve(text)
    try:
        for site in sites:
            site.transformer_block.attn1 = Identity(site.attention)
        out: Tensor = unet(x[rows.start : rows.stop], sigma[rows.start : rows.stop],
                           context=cond["text"][0][rows.start : rows.stop])  # fmt: skip
        return out
    finally:
        for site in sites:
            site.transformer_block.attn1 = site.attention


@pytest.mark.parametrize("own_call", [False, True], ids=["extra rows", "own call"])
def test_what_goes_into_a_block_changed_in_place(unet: nn.Module, own_call: bool) -> None:
    """The skip connection with it. A call of ours goes on from what was there, not from what has become of it."""
    def halve(_: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].mul_(0.5)

    topology, rows = UNetTopology(unet), range(1, 3)
    x, sigma, cond = inputs()
    handle = unet.get_submodule("middle_block").register_forward_pre_hook(halve)
    try:
        out, perturbed = denoise_with_branch(Denoise(unet), x, sigma, cond=cond, branch=Branch(
            topology, unchanged_inputs, rows=rows, perturbed=topology.resolve("middle"),
            manner=APART if own_call else JOINED,
        ))  # fmt: skip
        expected = perturbed_alone(unet, topology, "middle", rows)
        torch.testing.assert_close(out, unet(x, sigma, context=cond["text"][0]), rtol=1e-4, atol=5e-5)
    finally:
        handle.remove()
    torch.testing.assert_close(perturbed, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("own_call", [False, True], ids=["extra rows", "own call"])
@pytest.mark.parametrize(("text", "rows"), [
    *((text, range(1, 3)) for text in PERTURBED), ("middle", range(2)), ("middle.1", range(4)), ("output.3", range(1)),
])
def test_perturbed_rows(unet: nn.Module, text: str, own_call: bool, rows: range) -> None:
    topology, denoise = UNetTopology(unet), Denoise(unet)
    x, sigma, cond = inputs()
    out, perturbed = denoise_with_branch(denoise, x, sigma, cond=cond, branch=Branch(
        topology, unchanged_inputs, rows=rows, perturbed=topology.resolve(text), manner=APART if own_call else JOINED,
    ))  # fmt: skip
    assert denoise.rows == ([ROWS, len(rows)] if own_call else [ROWS + len(rows)])
    assert perturbed is not None
    torch.testing.assert_close(out, unet(x, sigma, context=cond["text"][0]), rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(perturbed, perturbed_alone(unet, topology, text, rows), rtol=1e-4, atol=5e-5)
    assert not torch.allclose(perturbed, out[rows.start : rows.stop], atol=1e-3)


class Blurred(Identity):
    """Every query is the mean of all."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.original = original

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        a = self.original
        split = [f(x).unflatten(-1, (a.heads, -1)).transpose(1, 2) for f in (a.to_q, a.to_k, a.to_v)]
        query = split[0].mean(dim=2, keepdim=True).expand_as(split[0])
        weights = (query @ split[1].mT / query.shape[-1] ** 0.5).softmax(-1)
        out: Tensor = self.to_out((weights @ split[2]).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("manner", [JOINED, APART, REPEATED], ids=["joined", "apart", "repeated"])
@pytest.mark.parametrize("text", ["input.1", "middle.1", "middle, output.2"])
def test_blurred_queries_in_place(
    unet: nn.Module, text: str, manner: Manner, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology, rows = UNetTopology(unet), [2, 0]
    x, sigma, cond = inputs()
    settings = Settings(pag_enabled=True, pag_perturbation="blurred queries")
    out, perturbed = denoise_with_branch(Denoise(unet), x, sigma, cond=cond, branch=Branch(
        topology, unchanged_inputs, rows=rows, perturbed=topology.resolve(text), manner=manner, watch=manner.watch(),
        settings=settings,
    ))  # fmt: skip
    plain = unet(x, sigma, context=cond["text"][0])
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=5e-5)
    monkeypatch.setattr("test_branch.Identity", Blurred)
    expected = torch.cat([perturbed_alone(unet, topology, text, range(row, row + 1)) for row in rows])
    assert perturbed is not None
    torch.testing.assert_close(perturbed, expected, rtol=1e-4, atol=5e-5)
    assert not torch.allclose(perturbed, plain[rows], atol=1e-3)


@pytest.mark.parametrize("manner", [JOINED, APART, REPEATED], ids=["joined", "apart", "repeated"])
@pytest.mark.parametrize("text", ["input.1", "middle.1", "middle, output.2"])
@pytest.mark.parametrize("read", ["", "input.1", "middle.1", "output.3"])
def test_swapped_tokens_in_place(unet: nn.Module, text: str, read: str, manner: Manner) -> None:
    """They are the transformer block's input, so that they are in the residual too."""
    topology, rows = UNetTopology(unet), [2, 0]
    x, sigma, cond = inputs()
    settings = Settings(pag_enabled=True, pag_perturbation="swapped tokens", pag_swap=0.3)
    capture = MapCapture([3, 2], (8, 6)) if read else None
    out, perturbed = denoise_with_branch(Denoise(unet), x, sigma, cond=cond, branch=Branch(
        topology, unchanged_inputs, rows=rows, perturbed=topology.resolve(text), manner=manner, watch=manner.watch(),
        settings=settings, capture=capture, read=topology.resolve(read)[0] if read else None,
    ))  # fmt: skip
    plain = unet(x, sigma, context=cond["text"][0])
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=5e-5)
    place = Place(topology.sites[0].attention, (1, 1), unchanged_inputs)
    hooks = [
        site.transformer_block.register_forward_pre_hook(
            lambda _, args: (swapped_tokens(place, args[0], settings), *args[1:])
        )
        for site in topology.resolve(text)
    ]
    expected = unet(x[rows], sigma[rows], context=cond["text"][0][rows])
    for hook in hooks:
        hook.remove()
    assert perturbed is not None
    torch.testing.assert_close(perturbed, expected, rtol=1e-4, atol=5e-5)
    assert not torch.allclose(perturbed, plain[rows], atol=1e-3)
    if capture is not None:
        assert capture.received is not None
        torch.testing.assert_close(capture.received.mean(dim=1), torch.ones(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("perturb", "own_call"), [("", False), ("input.1", False), ("middle.1", False), ("middle.1", True)]
)
@pytest.mark.parametrize("read", ["input.1", "input.3.2", "middle.0", "middle.1", "middle.2", "output.0.1", "output.3"])
def test_reading_a_map_on_the_way(unet: nn.Module, read: str, perturb: str, own_call: bool) -> None:
    """Before, at and after the first perturbed attention: always the map of the host's own rows."""
    topology, denoise = UNetTopology(unet), Denoise(unet)
    x, sigma, cond = inputs()
    site, = topology.resolve(read)
    captures = [MapCapture([3, 2], (8, 6)), MapCapture([3, 2], (8, 6))]
    for capture, text in zip(captures, ["", perturb], strict=True):
        sites = topology.resolve(text)
        denoise_with_branch(denoise, x, sigma, cond=cond, branch=Branch(
            topology, unchanged_inputs, rows=range(2 if sites else 0), perturbed=sites,
            manner=APART if own_call else JOINED, capture=capture, read=site,
        ))  # fmt: skip
    alone, together = captures
    assert alone.received is not None
    assert together.received is not None
    assert together.size == alone.size == ((8, 6) if read in ("input.1", "output.3") else (4, 3))
    torch.testing.assert_close(together.received, alone.received, rtol=1e-4, atol=1e-5)


def test_noise_of_another_extension_is_the_same_in_both_calls(unet: nn.Module) -> None:
    """With a single token identity attention changes nothing: what differs would be the noise."""
    topology = UNetTopology(unet)
    x, sigma, cond = inputs()
    x = x[:, :, :1, :1]
    handle = unet.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    torch.manual_seed(1)
    alone = Denoise(unet)(x, sigma, cond=cond)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    out, perturbed = denoise_with_branch(Denoise(unet), x, sigma, cond=cond, branch=Branch(
        topology, unchanged_inputs, rows=range(2), perturbed=topology.resolve("middle"), manner=REPEATED,
        watch=Invisible(),
    ))
    assert torch.equal(out, alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert perturbed is not None
    torch.testing.assert_close(perturbed, out[:2], rtol=0, atol=1e-3)
    torch.manual_seed(2)
    assert (Denoise(unet)(x, sigma, cond=cond) - alone).abs().max() > 0.01, "the noise must matter"
    handle.remove()


@pytest.mark.parametrize("own_call", [False, True])
@pytest.mark.parametrize("text", ["input.1", "middle.1", "output.3"])
def test_nothing_is_left_when_the_model_raises(unet: nn.Module, text: str, own_call: bool) -> None:
    topology = UNetTopology(unet)
    before = [dict(vars(module)) for module in unet.modules()]
    x, sigma, cond = inputs()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    branch = Branch(
        topology, unchanged_inputs, rows=range(2), perturbed=topology.resolve(text),
        manner=APART if own_call else JOINED, capture=MapCapture([3], (8, 6)), read=topology.resolve("output.0.0")[0],
    )
    handle = unet.get_submodule("output_blocks.3").register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        denoise_with_branch(Denoise(unet), x, sigma, cond=cond, branch=branch)
    handle.remove()
    assert [dict(vars(module)) for module in unet.modules()] == before


@pytest.mark.parametrize("own_call", [False, True])
def test_an_attention_that_does_not_run_is_an_error(unet: nn.Module, own_call: bool) -> None:
    """A block that another extension skips would leave the perturbed rows as they are: guidance of zero."""
    topology = UNetTopology(unet)
    x, sigma, cond = inputs()
    block = topology.resolve("middle.1")[0].transformer_block
    block.forward = lambda x, context=None: x  # type: ignore[method-assign]
    branch = Branch(
        topology, unchanged_inputs, rows=range(2), perturbed=topology.resolve("middle"),
        manner=APART if own_call else JOINED,
    )
    try:
        with pytest.raises(RuntimeError, match=r"middle\.1"):
            denoise_with_branch(Denoise(unet), x, sigma, cond=cond, branch=branch)
    finally:
        del block.forward


def test_the_prefix_is_as_large_as_possible(unet: nn.Module) -> None:
    topology = UNetTopology(unet)
    site = topology.resolve("middle.1")[0]
    middle: Any = unet.get_submodule("middle_block")
    expected = [*unet.get_submodule("input_blocks").children(), middle[0], middle[1].transformer_blocks[0]]
    assert topology.prefix(site) == expected
    assert topology.prefix(topology.resolve("input.1")[0])[-1] is unet.get_submodule("input_blocks.1.0")


class OfRows:
    """A host's own value that knows what it is for some rows."""

    def take_rows(self, rows: Sequence[int], *, total: int) -> str:
        return f"{list(rows)} of {total}"


def test_rows_of_conds() -> None:
    """Only batches of that many rows are cut: a single row is for all, and what is longer is no batch."""
    rows, more = torch.arange(4), torch.arange(7)
    cond = {"a": [rows, (rows,)], "b": more, "one": rows[:1], "c": None, "d": "text", "own": OfRows()}
    for wanted in ([1, 2], [0, 1, 2, 3, 1, 2], [3, 0]):
        taken = take_rows(cond, wanted, total=4)
        assert [t.tolist() for t in (taken["a"][0], taken["a"][1][0])] == [wanted] * 2
        assert (taken["c"], taken["d"], taken["own"]) == (None, "text", f"{wanted} of 4")
        assert taken["b"] is more
        assert taken["one"].tolist() == [0]
