"""What the engine leaves as it found it on Stability's own U-Net class: the host's rows, and every module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from ldm_cases import Case, engine_step, make_inputs, reference_step, relative_error, webui_cond
from ldm_host import Host, float64_inference, make_unet
from torch import Tensor, nn

from sag_pag.demo.layers import fused_forward
from sag_pag.engine.attention import MapCapture
from sag_pag.engine.branch import Branch, denoise_with_branch
from sag_pag.engine.calls import APART, JOINED
from sag_pag.engine.topology import UNetTopology

pytestmark = pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")
CASES = [
    Case("PAG", perturb=("middle",)),
    Case("PAG, own call", perturb=("input.4", "output.2"), own_call=True),
    Case("SAG", read="middle"),
    Case("both", perturb=("middle", "output.1"), read="input.5"),
    Case("both, own call", perturb=("input.4",), read="output.4", own_call=True),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class ProvokedError(MemoryError):
    """Raised by a module in the middle of a call."""


@pytest.fixture(autouse=True)
def _float64_attention() -> Iterator[None]:
    with float64_inference():
        yield


@pytest.fixture
def unet() -> nn.Module:
    """A U-Net of the test's own."""
    return make_unet("sd1")


def everything(unet: nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every module, with the content of the hooks' dicts, for comparison by identity."""
    result = {}
    for name, module in unet.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items()}
        hooks = {key: list(value.items()) for key, value in vars(module).items() if isinstance(value, dict)}
        result[name] = {"class": type(module), "attributes": attributes, "hooks": hooks}
    return result


def denoise(host: Host, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """The host's rows without and with the engine, and the perturbed ones."""
    inputs, topology = make_inputs(case, host), UNetTopology(host.unet)
    x, levels = torch.cat([inputs.x] * 2), torch.full((4,), inputs.level, dtype=torch.float64)
    cond = webui_cond(torch.cat([inputs.conds, inputs.unconds]))
    out, worse = denoise_with_branch(host, x, levels, cond=cond, branch=Branch(
        topology, lambda tokens: (tokens, tokens), rows=range(2 if case.perturb else 0),
        perturbed=topology.resolve(", ".join(case.perturb)),
        capture=MapCapture([2, 3], (x.shape[2], x.shape[3])) if case.read else None,
        read=topology.resolve(case.read)[0] if case.read else None, manner=APART if case.own_call else JOINED,
    ))
    return host(x, levels, cond=cond), out, worse


@pytest.mark.parametrize("sampler", ["sigma", "timestep"])
@named
def test_the_hosts_rows_stay(case: Case, sampler: Any, unet: nn.Module) -> None:
    """To the last bit where the host's batch is the same; larger batches may round otherwise."""
    plain, out, _ = denoise(Host(unet, sampler), case)
    if case.own_call or not case.perturb:
        assert torch.equal(out, plain)
    else:
        assert relative_error(out, plain) < 1e-12


@named
def test_nothing_is_left_after_success(case: Case, unet: nn.Module) -> None:
    before = everything(unet)
    engine_step(case, Host(unet, "sigma"))
    assert everything(unet) == before


@pytest.mark.parametrize("call", [1, 2, 3], ids=lambda call: f"call {call}")
@pytest.mark.parametrize("path", [
    "input_blocks.4.1.transformer_blocks.0.attn1.to_v",
    "middle_block.1.transformer_blocks.0.attn1.to_out.0", "out.2",
])
@named
def test_nothing_is_left_after_an_exception(case: Case, path: str, call: int, unet: nn.Module) -> None:
    """The ``call``-th time that a module runs in the step, in whichever U-Net call that is; the next step is right."""
    host = Host(unet, "timestep")
    expected = engine_step(case, host)
    ran = itertools.count(1)  # what extensions count with themselves is put back around calls of ours

    def provoke(*_: object) -> None:
        if next(ran) == call:
            raise ProvokedError

    hook = unet.get_submodule(path).register_forward_pre_hook(provoke)
    before = everything(unet)
    try:
        engine_step(case, host)
    except ProvokedError:
        assert next(ran) == call + 1
    else:
        assert next(ran) <= call, "the exception was swallowed"
    assert everything(unet) == before
    hook.remove()
    again = engine_step(case, host)
    assert torch.equal(again.guided, expected.guided)


@pytest.mark.parametrize("own_call", [False, True], ids=["in the host's call", "own call"])
def test_another_extensions_forward_is_used_and_given_back(own_call: bool, unet: nn.Module) -> None:
    """As HyperTile's, on the instance of the perturbed and the read attention."""
    seen = Mock()

    def wrapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def other(*args: Any, **kwargs: Any) -> Tensor:
            seen(len(args[0]))
            return 1.25 * forward(*args, **kwargs)

        return other

    case = Case("theirs", perturb=("middle",), read="output.3", own_call=own_call)
    for path in ("middle_block.1.transformer_blocks.0.attn1", "output_blocks.3.1.transformer_blocks.0.attn1"):
        attention = unet.get_submodule(path)
        attention.forward = wrapped(attention.forward)  # type: ignore[method-assign]
    before = everything(unet)
    plain, out, worse = denoise(Host(unet, "timestep"), case)
    assert relative_error(out, plain) < 1e-12
    assert worse is not None
    assert relative_error(worse, out[:2]) > 1e-3
    # the perturbed rows skip their attention in the middle block, not in the output block
    runs = [made.args[0] for made in seen.call_args_list]
    assert runs == [4, 4, 2, 4, 4] if own_call else [4, 6, 4, 4]
    assert everything(unet) == before


def test_an_optimised_class_forward_is_used_and_left(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the WebUI's attention optimisations, on the class."""
    attention = type(unet.get_submodule("middle_block.1.transformer_blocks.0.attn1"))

    def forward(self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return fused_forward(self, x, context)

    case = Case("both", perturb=("middle",), read="input.5")
    slow = reference_step(case, Host(unet, "timestep"))
    monkeypatch.setattr(attention, "forward", forward)
    assert relative_error(engine_step(case, Host(unet, "timestep")).guided, slow.guided) < 1e-10
    assert attention.forward is forward


@pytest.mark.parametrize("own_call", [False, True], ids=["in the host's call", "own call"])
@pytest.mark.parametrize("path", ["input_blocks.2", "input_blocks.5.1.transformer_blocks.0", "output_blocks.7"])
def test_a_block_that_tells_rows_apart_gets_the_hosts_rows(path: str, own_call: bool, unet: nn.Module) -> None:
    """As in ControlNet's reference modes, which keep features for each row of the first call."""
    module, seen = unet.get_submodule(path), Mock()
    forward = module.forward

    def theirs(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen(len(x))
        return forward(x, *args, **kwargs)

    module.forward = theirs  # type: ignore[method-assign]
    case = replace(CASES[0], own_call=own_call)
    host = Host(unet, "timestep")
    engine, reference = engine_step(case, host), reference_step(case, host)
    assert relative_error(engine.guided, reference.guided) < 1e-10
    assert seen.call_args_list[:3] == [call(4)] * 3


def scaled_by(factor: float) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A forward pre-hook that scales its module's input in place."""
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].mul_(factor)

    return hook


@pytest.mark.parametrize("own_call", [False, True], ids=["in the host's call", "own call"])
def test_features_changed_in_place_on_the_way(own_call: bool, unet: nn.Module) -> None:
    """Other extensions scale the skip connection that they are handed; it must not be scaled twice."""
    unet.get_submodule("input_blocks.5").register_forward_pre_hook(scaled_by(1.5))
    unet.get_submodule("middle_block").register_forward_pre_hook(scaled_by(0.5))
    case = Case("in place", perturb=("middle",), read="output.0", own_call=own_call)
    host = Host(unet, "timestep")
    assert relative_error(engine_step(case, host).guided, reference_step(case, host).guided) < 1e-10
