"""Others change the same model, denoiser and tensors; all of it still works, and goes on working afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from double import Host
from naive import IdentityAttention, Naive, Wanted
from torch import Tensor, nn

BOTH = {"sag_scale": 1, "pag_scale": 3}
Forward = Callable[..., Any]


@pytest.fixture(params=["extra rows", "own call"])
def way(host: Host, request: pytest.FixtureRequest) -> str:
    host.shared.sd_model.lowvram = request.param == "own call"
    return str(request.param)


@pytest.fixture
def unet(host: Host) -> Iterator[nn.Module]:
    """The U-Net; what the test leaves on its modules is taken off."""
    model: nn.Module = host.shared.sd_model.model.diffusion_model
    yield model
    for module in model.modules():
        for name in ("forward", "_forward"):
            vars(module).pop(name, None)


def put_on(module: nn.Module, make: Callable[[Forward], Forward], name: str = "forward") -> Forward:
    replaced = make(getattr(module, name))
    setattr(module, name, replaced)
    return replaced


class Rows:
    """Notes the rows of each call. In a tensor: what an extension counts with itself is put back around our calls."""

    def __init__(self) -> None:
        self._noted = torch.zeros(100, dtype=torch.int)

    def append(self, rows: int) -> None:
        self._noted[int(self._noted.count_nonzero())] = rows

    def __eq__(self, other: object) -> bool:
        return self._noted[self._noted > 0].tolist() == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return str(self._noted[self._noted > 0].tolist())


def counting(rows: Any) -> Callable[[Forward], Forward]:
    """Notes the rows of each call."""
    def make(original: Forward) -> Forward:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows.append(len(x))
            return original(x, *args, **kwargs)

        return forward

    return make


def on_the_denoiser(make: Callable[[Forward], Forward]) -> Callable[[Any], None]:
    """A callback that replaces the denoiser's forward for good, the first time that it sees the denoiser."""
    def install(params: Any) -> None:
        inner = params.denoiser.inner_model
        if not hasattr(inner, "theirs"):
            inner.forward, inner.theirs = make(inner.forward), True

    return install


def halved(original: Forward) -> Forward:
    return lambda *args, **kwargs: original(*args, **kwargs) / 2


def guided_with_weights_halved(host: Host, layer: nn.Module) -> Tensor:
    """What must come out where an extension halves the output of the module that ends in this layer."""
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict({name: value / 2 for name, value in weights.items()})
    try:
        return host.generate(BOTH)[0]
    finally:
        layer.load_state_dict(weights)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("path", ["input_blocks.1.1", "middle_block.1", "output_blocks.2.1"])
def test_a_cross_attention_replaced(host: Host, unet: nn.Module, path: str) -> None:
    attention = unet.get_submodule(path + ".transformer_blocks.0.attn2")
    expected = guided_with_weights_halved(host, attention.get_submodule("to_out.0"))
    theirs = put_on(attention, halved)
    torch.testing.assert_close(host.generate(BOTH)[0], expected, rtol=1e-4, atol=1e-4)
    assert vars(attention)["forward"] is theirs


@pytest.mark.usefixtures("way")
def test_the_perturbed_attention_replaced(host: Host, unet: nn.Module) -> None:
    """The perturbed rows take identity attention all the same; the host's own rows go through theirs."""
    attention = unet.get_submodule("middle_block.1.transformer_blocks.0.attn1")
    rows = Rows()

    expected = host.generate({"pag_scale": 3})[0]
    theirs = put_on(attention, counting(rows))
    torch.testing.assert_close(host.generate({"pag_scale": 3})[0], expected, rtol=1e-4, atol=1e-4)
    assert rows == [2] * 7, "the host's rows, once more, and a try in the first step"
    assert vars(attention)["forward"] is theirs


@pytest.mark.usefixtures("way")
def test_a_longer_context(host: Host, unet: nn.Module) -> None:
    """Reference-only control: self-attention looks at another picture's tokens too; a perturbed row at its own only."""
    attention = unet.get_submodule("middle_block.1.transformer_blocks.0.attn1")
    seen: list[tuple[int, ...]] = []

    def with_reference(original: Forward) -> Forward:
        def forward(x: Tensor, context: Tensor | None = None, **kwargs: Any) -> Any:
            context = x if context is None else context
            seen.append(tuple(context.shape))
            return original(x, context=torch.cat([context, torch.ones_like(x)], dim=1), **kwargs)

        return forward

    block = unet.get_submodule("middle_block.1.transformer_blocks.0")
    put_on(attention, with_reference)
    reference = host.generate({"pag_scale": 3})[0]
    vars(attention).pop("forward")
    seen.clear()

    def hand_over(_: Forward) -> Forward:
        def forward(x: Tensor, context: Tensor | None = None) -> Tensor:
            h = block.norm1(x)  # type: ignore[operator]
            context_of_two = torch.cat([h, torch.ones_like(h)], dim=1)
            seen.append(tuple(context_of_two.shape))
            x = attention(h, context=context_of_two) + x
            x = block.attn2(block.norm2(x), context=context) + x  # type: ignore[operator]
            return block.ff(block.norm3(x)) + x  # type: ignore[operator,no-any-return]

        return forward

    put_on(block, hand_over)
    torch.testing.assert_close(host.generate({"pag_scale": 3})[0], reference, rtol=1e-4, atol=1e-4)
    assert {shape[1] for shape in seen} == {24}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["forward", "_forward"])
def test_blocks_that_tell_rows_apart(host: Host, unet: nn.Module, name: str) -> None:
    """An extension that has replaced single blocks gets the host's rows and no others."""
    block = unet.get_submodule("input_blocks.1")
    rows = Rows()

    expected = host.generate({"pag_scale": 3}, steps=2)[0]
    if name == "forward":
        put_on(block, counting(rows))
    else:
        block._forward = block.forward  # type: ignore[assignment]
    torch.testing.assert_close(host.generate({"pag_scale": 3}, steps=2)[0], expected, rtol=1e-4, atol=1e-4)
    if name == "forward":
        assert rows == [2] * 5, "a call and its repetition in each step, and a try in the first"


ROW_AWARE = [{"pag_scale": 3}, {"sag_scale": 1}, BOTH, {"pag_scale": 3, "pag_start": 0.5}, {**BOTH, "sag_end": 0.5}]


def everywhere(unet: nn.Module, name: str) -> list[nn.Module]:
    return [module for path, module in unet.named_modules() if path.endswith(name)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", ROW_AWARE, ids=str)
def test_features_remembered_for_the_rows_of_the_first_call(
    host: Host, unet: nn.Module, settings: dict[str, Any]
) -> None:
    """ControlNet's IP-Adapter: made once for all rows of a U-Net call, given to every cross-attention."""
    remembered: list[Tensor] = []

    def by_context(original: Forward) -> Forward:
        def forward(x: Tensor, context: Tensor, **kwargs: Any) -> Any:
            return original(x, context=context, **kwargs) + 3 * context.mean(dim=(1, 2))[:, None, None]

        return forward

    def by_memory(original: Forward) -> Forward:
        def forward(x: Tensor, context: Tensor, **kwargs: Any) -> Any:
            feature = remembered[0].view(len(x), -1).mean(dim=1)
            return original(x, context=context, **kwargs) + 3 * feature[:, None, None]

        return forward

    def remember(original: Forward) -> Forward:
        def forward(x: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> Any:
            if not remembered:
                remembered.append(context.mean(dim=(1, 2))[:, None].expand(-1, 12).contiguous())
            return original(x, timesteps, context=context, **kwargs)

        return forward

    for attention in everywhere(unet, "attn2"):
        put_on(attention, by_context)
    expected = host.generate(settings)[0]
    for attention in everywhere(unet, "attn2"):
        vars(attention).pop("forward")
        put_on(attention, by_memory)
    put_on(unet, remember)
    torch.testing.assert_close(host.generate(settings)[0], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, host.plain()[0], atol=1e-2)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", ROW_AWARE, ids=str)
def test_the_batch_split_into_halves(host: Host, unet: nn.Module, settings: dict[str, Any]) -> None:
    """Regional Prompter: the first half of the rows is taken for the prompt's, the second for the negative one's."""
    negative = host.shared.sd_model.encode("blurry")

    def by_context(original: Forward) -> Forward:
        def forward(x: Tensor, context: Tensor, **kwargs: Any) -> Any:
            is_prompt = (context - negative).abs().amax(dim=(1, 2)) > 0
            return original(x, context=context, **kwargs) + torch.where(is_prompt, 1.0, -1.0)[:, None, None]

        return forward

    def by_half(original: Forward) -> Forward:
        def forward(x: Tensor, **kwargs: Any) -> Any:
            first, second = original(x, **kwargs).chunk(2)
            return torch.cat([first + 1, second - 1])

        return forward

    for attention in everywhere(unet, "attn2"):
        put_on(attention, by_context)
    expected = host.generate(settings)[0]
    for attention in everywhere(unet, "attn2"):
        vars(attention).pop("forward")
        put_on(attention, by_half)
    torch.testing.assert_close(host.generate(settings)[0], expected, rtol=1e-4, atol=1e-4)


class Together(Naive):
    """Predicts all of the host's rows in one call, of which one is perturbed."""

    def predict(self, row: int, x: Tensor) -> Tensor:
        params = self.params
        cond = {"c_crossattn": [torch.cat([params.text_cond, params.text_uncond])], "c_concat": [params.image_cond]}
        every = torch.cat([params.x[:row], x, params.x[row + 1 :]])
        out: Tensor = params.denoiser.inner_model(every, params.sigma, cond=cond)
        return out[row : row + 1]


class IdentityInTheFirstRow(IdentityAttention):
    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.original = original

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat([super().forward(x[:1]), self.original(x, context=context)[1:]])


@pytest.mark.usefixtures("way")
def test_layers_put_into_the_blocks(host: Host, unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnimateDiff's motion modules mix the rows of a call, taken for two times as many frames: of the host's rows one
    is perturbed, and the others run beside it.
    """
    class MotionModule(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 2, "not the host's rows"
            return x + 0.5 * x.mean(dim=0, keepdim=True)

    block = unet.get_submodule("output_blocks.2")
    block.append(MotionModule())  # type: ignore[operator]
    monkeypatch.setattr("naive.IdentityAttention", IdentityInTheFirstRow)
    try:
        expected = naively(host, Together(host, Wanted(pag=3.0)))
        torch.testing.assert_close(host.generate({"pag_scale": 3})[0], expected, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(host.generate(BOTH)[0], expected, atol=1e-2)
    finally:
        del block[-1]  # type: ignore[operator]


def test_hypernetworks(host: Host) -> None:
    """They change what keys and values are made of, in the perturbed rows and in the map too."""
    loaded = host.shared.loaded_hypernetworks
    expected_plain = host.generate(BOTH)[0]
    loaded.append(lambda k, v: (k, v * 0))
    assert not torch.allclose(host.generate({"pag_scale": 3})[0], host.plain()[0], atol=1e-3)
    seen: list[int] = []

    def spy(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(k))
        return k, v

    loaded[:] = [spy]
    assert torch.equal(host.generate(BOTH)[0], expected_plain)
    assert seen
    loaded.clear()


@pytest.mark.parametrize("kind", ["x", "sigma", "text_cond", "text_uncond"])
def test_an_earlier_callback_changes_the_step(host: Host, kind: str) -> None:
    """The guidance is computed from what the host really hands to the U-Net."""
    def change(params: Any) -> None:
        setattr(params, kind, getattr(params, kind) * 0.9)

    host.script_callbacks.callbacks["cfg_denoiser"].append(change)
    after = host.generate(BOTH)[0]
    host.script_callbacks.callbacks["cfg_denoiser"].remove(change)
    host.script_callbacks.callbacks["cfg_denoiser"].insert(0, change)
    assert torch.equal(host.generate(BOTH)[0], after)


def test_a_callback_that_changes_the_output_in_place(host: Host) -> None:
    """What it does enters CFG but not the guidance, whichever callback comes first."""
    def change(params: Any) -> None:
        params.x *= 0.5

    denoised = host.script_callbacks.callbacks["cfg_denoised"]
    denoised.insert(0, change)
    before = host.generate(BOTH)[0]
    denoised.remove(change)
    denoised.append(change)
    assert torch.equal(host.generate(BOTH)[0], before)


def test_another_extension_on_the_denoiser(host: Host) -> None:
    """Put on the denoiser for good, before the first step."""
    expected = host.generate(BOTH)[0]
    calls = Rows()

    host.script_callbacks.callbacks["cfg_denoiser"].insert(0, on_the_denoiser(counting(calls)))
    torch.testing.assert_close(host.generate(BOTH)[0], expected, rtol=1e-4, atol=1e-4)
    assert calls == [2] * 10, "the host's rows, once more for each feature, and a try in the first step"


def test_another_extension_on_the_denoiser_after_ours(host: Host) -> None:
    """Its callback runs after ours, when the stand-in is already on; it stays on for the rest of the run."""
    expected = host.generate(BOTH)[0]
    calls = Rows()

    host.script_callbacks.callbacks["cfg_denoiser"].append(on_the_denoiser(counting(calls)))
    torch.testing.assert_close(host.generate(BOTH)[0], expected, rtol=1e-4, atol=1e-4)
    assert calls == [2] * 7, "in the first step the host's rows, in the others once more for each feature"


def naively(host: Host, guidance: Naive, install: Callable[[Any], None] = lambda _: None) -> Tensor:
    """The picture with the naive extension in place of ours, beside what ``install`` puts on the denoiser."""
    with host.without_extension(), guidance.registered():
        host.script_callbacks.callbacks["cfg_denoiser"].insert(0, install)
        latents: list[Tensor] = host.processing.process_images(host.processing.Processing()).latents
        host.script_callbacks.clear()
    return latents[0]


def in_tiles(*, tiles: int, at_once: int) -> Callable[[Any], None]:
    """Puts a denoiser on that calls the U-Net for so many strips of the picture, some at once."""
    def made(original: Forward) -> Forward:
        def forward(x: Tensor, sigma: Tensor, cond: Any) -> Any:
            strips, outs = list(x.chunk(tiles, dim=2)), list[Tensor]()
            for first in range(0, tiles, at_once):
                part = strips[first : first + at_once]
                conds = {
                    key: [torch.cat([c] * len(part)) for c in value] if isinstance(value, list) else value
                    for key, value in cond.items()
                }
                outs += original(torch.cat(part), sigma.repeat(len(part)), cond=conds).chunk(len(part))
            return torch.cat(outs, dim=2)

        return forward

    return on_the_denoiser(made)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", [{"sag_scale": 1}, {"pag_scale": 3}, BOTH])
@pytest.mark.parametrize(("tiles", "at_once"), [(2, 1), (4, 1), (4, 3), (4, 4)])
def test_a_denoiser_that_works_in_tiles(host: Host, settings: dict[str, Any], tiles: int, at_once: int) -> None:
    """One that nobody knows. A tile a call is a picture for PAG; no map of one may pass for that of the picture, and no
    call of several for one of the host's rows.
    """
    install = in_tiles(tiles=tiles, at_once=at_once)
    expected = naively(host, Naive(host, Wanted(pag=3.0)), install) if "sag_scale" not in settings else None
    host.script_callbacks.callbacks["cfg_denoiser"].insert(0, install)
    if expected is not None and at_once == 1:
        torch.testing.assert_close(host.generate(settings)[0], expected, rtol=1e-4, atol=1e-3)
    else:
        with pytest.raises(RuntimeError, match="another extension"):
            host.generate(settings)


def moving(moved: Any, *, of: str) -> Callable[..., None]:
    """A forward pre-hook as of a module of the WebUI."""
    def send_me_to_gpu(*_: Any) -> None:
        moved.append(1)

    send_me_to_gpu.__module__ = of
    return send_me_to_gpu


def test_hooks_on_the_unet(host: Host, unet: nn.Module) -> None:
    """Models that are moved in pieces need the hooks of every block to run."""
    paths = ["input_blocks.0", "input_blocks.1", "middle_block", "output_blocks.3"]
    ran = {path: Rows() for path in paths}
    handles = [
        unet.get_submodule(path).register_forward_pre_hook(moving(ran[path], of="modules.lowvram")) for path in paths
    ]
    host.generate({"pag_scale": 3}, steps=1)
    for handle in handles:
        handle.remove()
    assert all(rows == [1] for rows in ran.values())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", [{"sag_scale": 5, "sag_threshold": 3}, {"pag_scale": 20}], ids=str)
def test_noise_in_the_unet_is_no_guidance(host: Host, unet: nn.Module, settings: dict[str, Any]) -> None:
    """ControlNet's reference modes draw noise in every call. Where guidance has nothing to do, there must be none:
    SAG with an empty mask, PAG with a single token in the map (identity attention is attention there).
    """
    def noisy(original: Forward) -> Forward:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = original(x, *args, **kwargs)
            return out + torch.randn(out.shape)

        return forward

    def made(*args: Any) -> Tensor:
        torch.manual_seed(3)
        p = host.processing_for(*args)
        p.noise = lambda size: host.sd_models.seeded("small", 1, 4, 2, 2)
        latent: Tensor = host.processing.process_images(p).latents[0]
        return latent

    put_on(unet.get_submodule("input_blocks.1"), noisy)
    plain = made({})
    torch.testing.assert_close(made(settings), plain, rtol=1e-4, atol=2e-3)
    assert not torch.allclose(made({"sag_scale": 5, "sag_threshold": 0}), plain, atol=1e-2)


@pytest.mark.parametrize(("of", "times"), [("modules.lowvram", 5), ("other_extension", 9)])
def test_what_is_only_replayed_is_not_moved(host: Host, unet: nn.Module, of: str, times: int) -> None:
    """With ``--lowvram`` every block is moved to the GPU when it runs; PAG's own call does not run those before the
    perturbed one. Other extensions' hooks may be part of the computation: they see every call, and a try in the
    first step.
    """
    host.shared.sd_model.lowvram = True
    moved = Rows()
    paths = ("input_blocks.1", "middle_block", "output_blocks.3")  # the middle one and what follows run in both calls
    handles = [unet.get_submodule(path).register_forward_pre_hook(moving(moved, of=of)) for path in paths]
    host.generate({"pag_scale": 3}, steps=1)
    for handle in handles:
        handle.remove()
    assert moved == [1] * times
