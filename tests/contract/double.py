"""The double of the WebUI with the extension loaded into it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

REPOSITORY = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake")
SCRIPT_FILES = (FAKE / "modules/xyz_grid.py", REPOSITORY / "scripts/sag_pag_script.py")
TITLE = "Self-Attention & Perturbed-Attention Guidance"
OURS = ("modules", "gradio", "sag_pag.webui", "sag_pag.hosts")
MODULES = ("shared", "scripts", "processing", "script_callbacks", "errors", "sd_models", "sd_samplers", "sd_unet")
ROOTS = ("modules", "gradio", "sag_pag")


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """The instance attributes and the hooks of every module of a model."""
    found = {}
    for name, module in model.named_modules():
        hooks = {
            f"{key}:{len(value)}" for key, value in vars(module).items() if key.endswith("_hooks") and value
        }
        found[name] = set(vars(module)) | hooks
    return found


_CHECKPOINTS: dict[str, Any] = {}
"""They take long to make, and every test shows that it has left them as they were."""


class Host:
    """The double's modules, its checkpoints and the usual ways to start a generation."""

    def __init__(self) -> None:
        for name in MODULES:
            setattr(self, name, import_module(f"modules.{name}"))
        self._made: dict[str, tuple[Any, dict[str, set[str]]]] = {}
        self.scripts.load_scripts(*SCRIPT_FILES)
        self.script_callbacks.run("before_ui")
        self.txt2img = self.scripts.ScriptRunner()
        self.script = self.txt2img.find(TITLE)
        self.use("sd1")


    def checkpoint(self, kind: str) -> Any:
        """A checkpoint, as if just read from disk."""
        if kind not in _CHECKPOINTS:
            _CHECKPOINTS[kind] = self.sd_models.StableDiffusion(kind)
        model = _CHECKPOINTS[kind]
        if kind not in self._made:
            model.reset()
            self._made[kind] = model, attributes(model)
        return model

    def use(self, kind: str) -> Any:
        """Loads a checkpoint."""
        self.shared.sd_model = self.checkpoint(kind)
        return self.shared.sd_model

    @property
    def calls(self) -> list[int]:
        """The rows of each U-Net call of the loaded checkpoint so far."""
        calls: list[int] = self.shared.sd_model.calls
        return calls

    def processing_for(self, *args: Any, **fields: Any) -> Any:
        """A generation with the script's arguments ``args``."""
        p = self.processing.Processing(**fields)
        p.scripts, p.script_args = self.txt2img, tuple(self.txt2img.arguments({TITLE: list(args)}))
        return p

    def generate(self, *args: Any, **fields: Any) -> list[Tensor]:
        """The latents of a generation with the script's arguments ``args``."""
        latents: list[Tensor] = self.processing.process_images(self.processing_for(*args, **fields)).latents
        return latents

    @contextmanager
    def without_extension(self) -> Iterator[None]:
        """A WebUI that never had the extension."""
        saved = {kind: list(registered) for kind, registered in self.script_callbacks.callbacks.items()}
        self.script_callbacks.clear()
        try:
            yield
        finally:
            for kind, registered in saved.items():
                self.script_callbacks.callbacks[kind][:] = registered

    def plain(self, **fields: Any) -> list[Tensor]:
        """The latents of a generation without the extension."""
        with self.without_extension():
            latents: list[Tensor] = self.processing.process_images(self.processing.Processing(**fields)).latents
        return latents

    def rows(self, work: Callable[[], Any]) -> list[int]:
        """The rows of each U-Net call that ``work`` makes."""
        before = len(self.calls)
        work()
        return self.calls[before:]

    def assert_clean(self) -> None:
        """Nothing is left on any checkpoint."""
        for model, before in self._made.values():
            if attributes(model) != before:
                _CHECKPOINTS.clear()
                pytest.fail("something is left on a checkpoint")

    def swallowed(self) -> list[Exception]:
        """What the host has caught and forgotten; the test knows of it."""
        errors: list[Exception] = list(self.errors.swallowed)
        self.errors.swallowed.clear()
        return errors


def forget_modules() -> dict[str, Any]:
    """Takes the double, and what is imported on top of it, out of ``sys.modules``; gives back what was there."""
    names = [name for name in sys.modules if name.startswith(OURS) and name.split(".")[0] in ROOTS]
    for name in names:
        package, _, last = name.rpartition(".")
        if package in sys.modules:
            vars(sys.modules[package]).pop(last, None)  # else "from package import module" finds it there
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def running(*, prepare: Callable[[], None] = lambda: None) -> Iterator[Host]:
    """A freshly started WebUI. At the end nothing may be left on a model, nor be swallowed unseen.

    ``prepare`` may change the double's modules before the extension is loaded.
    """
    standing = forget_modules()
    sys.path.insert(0, str(FAKE))
    try:
        prepare()
        host = Host()
        yield host
        host.assert_clean()
        assert host.swallowed() == []
    finally:
        sys.path.remove(str(FAKE))
        forget_modules()
        sys.modules.update(standing)
