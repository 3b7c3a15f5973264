"""In a fork the guidance is the same as in AUTOMATIC1111's WebUI, whose double is held against a naive reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import FunctionType
from typing import Any

import pytest
import torch
from double import Host, running
from forks import MEMORY, Control, calc_cond_uncond_batch, forked
from torch import Tensor

KINDS = ("backend", "ldm_patched")
BOTH = {"sag_scale": 0.75, "pag_scale": 3.0}
PAG = {"pag_scale": 3.0}
SEG = {**PAG, "pag_perturbation": "blurred queries"}
NOTE = "SAG/PAG note"
MASK = torch.zeros(1, 4, 8, 6)
MASK[..., 2:5] = 1
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "PAG": ("sd1", PAG, {}),
    "SAG": ("sd1", {"sag_scale": 0.75}, {}),
    "both": ("sd1", BOTH, {}),
    "late blocks": ("sd1", {**BOTH, "pag_blocks": "output.1", "sag_block": "middle"}, {}),
    "blurred queries": ("sd1", SEG, {}),
    "swapped tokens": ("sd1", {**PAG, "pag_perturbation": "swapped tokens"}, {}),
    "a batch": ("sd1", BOTH, {"batch_size": 2}),
    "AND with weights": ("sd1", {**BOTH, "rescale": 0.5}, {"batch_size": 2, "prompt": "a AND b c :0.6 AND d :-0.3"}),
    "prompts of several lengths": ("sd1", BOTH, {"prompt": "a b c d e f g h i", "batch_size": 2}),
    "no CFG": ("sd1", PAG, {"cfg_scale": 1.0}),
    "v-prediction": ("sd1-v", BOTH, {}),
    "inpainting": ("inpainting", BOTH, {"nmask": MASK, "init_latent": torch.ones(1, 4, 8, 6)}),
    "SDXL": ("sdxl", {**BOTH, "pag_blocks": "middle.1"}, {"batch_size": 2}),
    "hires. fix": ("sd1", BOTH, {"enable_hr": True}),
}


@pytest.fixture(params=KINDS)
def fork(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A freshly started double of a fork with the extension in it."""
    with forked(request.param) as host:
        yield host


@cache
def expected(way: str) -> list[Tensor]:
    kind, settings, fields = WAYS[way]
    with running() as host:
        host.use(kind)
        return host.generate(settings, **fields)


def patcher(host: Host) -> Any:
    return host.shared.sd_model.forge_objects.unet


def memory(host: Host, free: float) -> None:
    import_module(MEMORY[host.shared.sd_model.fork]).FREE[0] = free


def assert_same(actual: list[Tensor], wanted: list[Tensor]) -> None:
    for a, e in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seam", KINDS)
def test_the_same_picture(seam: str, way: str) -> None:
    """In one call and, where memory is short, in several."""
    kind, settings, fields = WAYS[way]
    wanted = expected(way)
    with forked(seam) as fork:
        fork.use(kind)
        for free in (1e12, 0):
            memory(fork, free)
            off = fork.generate(**fields)
            actual = fork.generate(settings, **fields)
            assert_same(actual, wanted)
            assert not torch.allclose(actual[0], off[0], rtol=1e-3)
            for again, before in zip(fork.generate(**fields), off, strict=True):
                assert torch.equal(again, before)


def test_rows_of_the_calls(fork: Host) -> None:
    def rows(settings: Any, **fields: Any) -> list[int]:
        return fork.rows(lambda: fork.generate(settings, steps=1, **fields))

    assert rows(BOTH) == [3, 1]
    assert rows(BOTH, cfg_scale=1.0) == [2, 1]
    assert rows(PAG, batch_size=2, prompt="a AND b") == [10]
    assert rows({"pag_scale": 0.0}) == [2]
    memory(fork, 0)
    assert rows(BOTH) == [1, 1, 1, 1]
    memory(fork, 5)  # enough for the host's rows, not for ours among them
    assert rows(PAG, batch_size=2, prompt="a") == [4, 2]
    assert rows(PAG) == [3]


def test_nothing_outlives_a_step(fork: Host) -> None:
    options = patcher(fork).model_options
    mine: list[Any] = [lambda *given: given]
    options["conditioning_modifiers"] = mine
    before = dict(options)
    seen = []
    fork.generate(BOTH, callback=lambda _: seen.append(dict(options)))
    assert seen
    assert all(found == before for found in seen)
    assert options["conditioning_modifiers"] is mine


@pytest.mark.parametrize("when", [1, 2, 3])
def test_after_an_exception(fork: Host, when: int) -> None:
    off = fork.generate()
    model = fork.shared.sd_model
    start = len(model.calls)

    def fail() -> None:
        if len(model.calls) - start == when:
            raise ArithmeticError

    model.before_call = fail
    with pytest.raises(ArithmeticError):
        fork.generate(BOTH)
    model.before_call = lambda: None
    assert list(patcher(fork).model_options) == ["transformer_options"]
    assert torch.equal(fork.generate()[0], off[0])


@pytest.mark.parametrize("of_the_host", [True, False])
def test_a_wrapper_that_is_there_already(fork: Host, of_the_host: bool) -> None:
    """It stands around our calls too, with what their rows are. Another extension's gets the rows that it knows."""
    plain, calls = fork.generate(BOTH), []

    def theirs(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        calls.append(args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    names = {**theirs.__globals__, "__name__": "modules_forge.wrappers"}
    wrapper = FunctionType(theirs.__code__, names, "wrapper", None, theirs.__closure__) if of_the_host else theirs
    patcher(fork).model_options["model_function_wrapper"] = wrapper
    made: list[Tensor] = []
    rows = fork.rows(lambda: made.extend(fork.generate(BOTH)))
    torch.testing.assert_close(made[0], plain[0], rtol=1e-4, atol=1e-4)
    assert rows == ([3, 1] * 3 if of_the_host else [2] * 10)
    assert calls == ([[1, 0, 0], [1]] * 3 if of_the_host else [[1, 0]] * 3), "what theirs notes is put back"
    assert patcher(fork).model_options["model_function_wrapper"] is wrapper


def test_samplers_that_replace_the_functions_after_cfg(fork: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CFG++ does: what is added to their list would be lost."""
    wanted, seen = fork.generate(BOTH), []

    def own(args: dict[str, Any]) -> Tensor:
        seen.append(1)
        return args["denoised"]  # type: ignore[no-any-return]

    denoiser = fork.sd_samplers.CFGDenoiser
    forward = denoiser.forward
    monkeypatch.setattr(denoiser, "forward", lambda *args, **kwargs: forward(
        *args, **kwargs, model_options={"sampler_post_cfg_function": [own]}
    ))
    assert torch.equal(fork.generate(BOTH)[0], wanted[0])
    assert len(seen) == 3


def test_control_is_asked_once_a_picture(fork: Host) -> None:
    """What it gave goes to our rows of the same picture; SAG's picture gets its own."""
    without = fork.generate(BOTH)
    control = patcher(fork).controlnet = Control()
    together = fork.generate(BOTH)
    assert control.pictures == [2, 1] * 3
    assert not torch.allclose(together[0], without[0], rtol=1e-3)
    memory(fork, 0)
    assert_same(fork.generate(BOTH), together)
    told = control.transformer_options["cond_or_uncond"]  # type: ignore[attr-defined]
    assert told == [0]  # the host's last call, not SAG's
    memory(fork, 1e12)
    fork.generate(PAG)
    assert control.pictures[-3:] == [2] * 3


@pytest.mark.parametrize("free", [1e12, 0])
@pytest.mark.parametrize("settings", [PAG, BOTH, SEG], ids=["PAG", "both", "SEG"])
def test_an_attention_that_others_have_replaced(fork: Host, settings: Any, free: float) -> None:
    """The replacement sees the host's rows, with options that are of these; a fork's own SAG works so."""
    memory(fork, free)
    wanted, seen = fork.generate(settings), []

    def replacement(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        seen.append((options["block"], options["block_index"], options["cond_or_uncond"]))
        assert len(q) == len(options["cond_or_uncond"])
        assert options["attn_precision"] == "as the block says"
        q, k, v = (part.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for part in (q, k, v))
        attention = (q @ k.mT * options["dim_head"] ** -0.5).softmax(-1)
        return (attention @ v).transpose(1, 2).flatten(2)

    patcher(fork).model_options["transformer_options"]["patches_replace"] = {"attn1": {("middle", 0, 0): replacement}}
    assert_same(fork.generate(settings), wanted)
    assert {place[:2] for place in seen} == {(("middle", 0), 0)}
    assert [0, 0] not in [chunks for *_, chunks in seen]
    own_call = [2, 1] if free else [1, 1, 1]
    assert fork.rows(lambda: fork.generate(PAG, steps=1)) == own_call


def test_blurred_queries_do_nothing_where_nobody_asks_for_them(fork: Host) -> None:
    """A replacement in which each token sees its own value alone."""
    replaced = {"attn1": {("middle", 0, 0): lambda _q, _k, v, _o: v}}
    patcher(fork).model_options["transformer_options"]["patches_replace"] = replaced
    assert_same(fork.generate({**SEG, "pag_scale": 20.0}), fork.generate({}))


def test_the_forks_own_pag_beside_ours(fork: Host) -> None:
    """It makes calls of its own through the same options, after the step's: both are added."""
    def own(args: dict[str, Any]) -> Tensor:
        options = dict(args["model_options"])
        identity = {"attn1": {("middle", 0, 0): lambda _q, _k, v, _o: v}}
        options["transformer_options"] = {**options["transformer_options"], "patches_replace": identity}
        perturbed, _ = calc_cond_uncond_batch(args["model"], args["cond"], None, args["input"], args["sigma"], options)
        return args["denoised"] + 2.0 * (args["cond_denoised"] - perturbed)  # type: ignore[no-any-return]

    wanted = fork.generate({"pag_scale": 5.0})
    patcher(fork).model_options["sampler_post_cfg_function"] = [own]
    assert_same(fork.generate({"pag_scale": 3.0}), wanted)


def test_modifiers_that_call_the_model_themselves(fork: Host) -> None:
    """Forge's reference preprocessors do, before the step's own calls."""
    wanted = fork.generate(BOTH)

    def modifier(model: Any, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, *others: Any) -> Any:
        calc_cond_uncond_batch(model, cond, uncond, x * 0.5, sigma, others[1])
        return model, x, sigma, uncond, cond, *others

    patcher(fork).model_options["conditioning_modifiers"] = [modifier]
    assert torch.equal(fork.generate(BOTH)[0], wanted[0])


class MultiDiffusion:
    """The forks' own, known by its name: cuts rows of ``(rows, channels, 8, 6)`` into tiles, some to a call."""

    def __init__(self, height: int, *, at_once: int) -> None:
        self.tile_height, self.tile_width, self.at_once = height, 6, at_once
        self.h = self.w = 0  # not known before the first call

    def __call__(self, apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        tiles, done = list(args["input"].split(self.tile_height, dim=2)), list[Tensor]()
        while tiles:
            part, tiles = tiles[: self.at_once], tiles[self.at_once :]
            c = {key: torch.cat([value] * len(part)) if isinstance(value, Tensor) else value
                 for key, value in args["c"].items()}
            out = apply_model(torch.cat(part), args["timestep"].repeat(len(part)), **c)
            done += out.chunk(len(part))
        return torch.cat(done, dim=2)


def test_tiles(fork: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAG works in each, however many make a call; SAG, which needs the whole picture, is refused by name."""
    monkeypatch.setattr("forks.check_options", lambda *_: None)  # nobody tells the options of tiles

    def made(settings: Any, height: int, at_once: int) -> list[Tensor]:
        patcher(fork).model_options["model_function_wrapper"] = MultiDiffusion(height, at_once=at_once)
        return fork.generate(settings)

    off, one, two = made({}, 4, 1), made(PAG, 4, 1), made(PAG, 4, 2)
    assert_same(two, one)
    assert not torch.allclose(one[0], off[0], rtol=1e-3)
    assert fork.rows(lambda: made(PAG, 4, 2)) == [6] * 3
    with pytest.raises(ValueError, match="beside MultiDiffusion Integrated here: switch SAG off"):
        made(BOTH, 4, 2)
    whole = made(BOTH, 8, 2)
    del patcher(fork).model_options["model_function_wrapper"]
    assert torch.equal(whole[0], fork.generate(BOTH)[0])


@pytest.mark.parametrize(("limit", "reason"), [("area", "areas"), ("mask", "areas"), ("timestep_start", "part of the")])
def test_prompts_with_limits_are_noted(fork: Host, limit: str, reason: str) -> None:
    off = fork.generate()
    patcher(fork).limits[limit] = 1
    p = fork.processing_for(BOTH)
    result = fork.processing.process_images(p)
    assert torch.equal(result.latents[0], off[0])
    assert reason in p.extra_generation_params[NOTE]


def test_a_model_without_a_unet_is_noted(fork: Host) -> None:
    off = fork.generate()
    patcher(fork).model.diffusion_model, unet = torch.nn.Linear(1, 1), patcher(fork).model.diffusion_model
    calls = patcher(fork).model.apply_model
    patcher(fork).model.apply_model = lambda *args, **kwargs: calls(*args, **kwargs)
    p = fork.processing_for(BOTH)
    record = []
    try:
        fork.processing.process_images(p)
    except TypeError as error:  # the model itself can't run; what is asked here is what was said before
        record.append(error)
    patcher(fork).model.diffusion_model = unet
    assert "has no U-Net of the Stable Diffusion kind" in p.extra_generation_params[NOTE]
    assert "PAG" not in p.extra_generation_params
    assert torch.equal(fork.generate()[0], off[0])


def test_the_panel_knows_of_the_row_that_no_cfg_saves(fork: Host) -> None:
    from sag_pag.webui import script

    assert "cfg_scale" in script._controls_around("img2img").values()


REFUSED = {
    "backwards": ({"pag_start": 0.5, "pag_end": 0.4}, "PAG start: &quot;0.5&quot; can&#x27;t be used;"),
    "no such block": ({"pag_blocks": "output.9"}, "Blocks to perturb: &quot;output.9&quot; can&#x27;t be used;"),
    "a plot's cell": (None, "PAG scale: &quot;30.0&quot; can&#x27;t be used;"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_reaches_the_page(
    fork: Host, settings: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the thread of the page's generations drops what they raise; a host that keeps it tells by itself."""
    thread = import_module("modules_forge.main_thread")

    def generate() -> Any:
        if settings is None:
            p = fork.processing_for()
            return fork.txt2img.find("X/Y/Z plot").run(p, {"[PAG] Scale": ["30"]})
        return fork.generate(settings)

    *nothing, told = thread.loop(thread.Task(generate))
    assert nothing == [None, "", ""]
    assert told.startswith(f"<div class='error'>Guidance: {said}")
    assert thread.loop(thread.Task(fork.generate)) is not None
    with pytest.raises(Exception, match="can't be used"):  # as the API does, in its own thread
        generate()
    monkeypatch.setattr(thread, "last_exception", None, raising=False)
    assert thread.loop(thread.Task(generate)) is None
