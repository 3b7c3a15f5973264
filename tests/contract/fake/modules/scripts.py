"""Scripts, and the runner that gives each its slice of the arguments."""

from __future__ import annotations

import importlib.util
import inspect
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

from modules import errors, script_callbacks

AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data: list[ScriptClassData] = []


class MaskBlendArgs:
    def __init__(
        self, current_latent: Any, nmask: Any, init_latent: Any, mask: Any, blended_latent: Any, denoiser: Any = None,
        sigma: Any = None,
    ) -> None:
        self.current_latent, self.blended_latent = current_latent, blended_latent
        self.nmask, self.init_latent, self.mask = nmask, init_latent, mask
        self.denoiser, self.sigma, self.is_final_blend = denoiser, sigma, denoiser is None


class Script:
    args_from: int
    args_to: int
    is_img2img = False
    infotext_fields: Any = None
    paste_field_names: Any = None

    def title(self) -> str:
        raise NotImplementedError

    def show(self, is_img2img: bool) -> Any:
        return True

    def ui(self, is_img2img: bool) -> Any:
        return []

    def process(self, p: Any, *args: Any) -> None:
        pass

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def on_mask_blend(self, p: Any, mba: MaskBlendArgs, *args: Any) -> None:
        pass

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        pass

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        pass

    def elem_id(self, item_id: str) -> str:
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{item_id}"


class ScriptRunner:
    """The scripts of one tab with their controls' default values."""

    def __init__(self, *, is_img2img: bool = False) -> None:
        self.scripts: list[Script] = []
        self.alwayson_scripts: list[Script] = []
        self.infotext_fields: list[tuple[Any, Any]] = []
        self.defaults: list[Any] = [0]
        for data in scripts_data:
            script = data.script_class()
            script.is_img2img = is_img2img
            self.scripts.append(script)
            if script.show(is_img2img) is AlwaysVisible:
                self.alwayson_scripts.append(script)
            controls = script.ui(is_img2img)
            script.args_from = len(self.defaults)
            self.defaults += [control.value for control in controls]
            script.args_to = len(self.defaults)
            self.infotext_fields += script.infotext_fields or []

    def find(self, title: str) -> Script:
        return next(script for script in self.scripts if script.title().lower() == title.lower())

    def arguments(self, values: dict[str, list[Any]]) -> list[Any]:
        """All scripts' arguments: defaults, and over them ``values`` by title, cut to what the script has."""
        args = list(self.defaults)
        for title, given in values.items():
            script = self.find(title)
            for offset, value in enumerate(given[: script.args_to - script.args_from]):
                args[script.args_from + offset] = value
        return args

    def run_all(self, method: str, p: Any, *given: Any, **kwargs: Any) -> None:
        """Calls a method of every always-on script; what it raises is reported and forgotten."""
        for script in self.alwayson_scripts:
            try:
                getattr(script, method)(p, *given, *p.script_args[script.args_from : script.args_to], **kwargs)
            except Exception as error:  # noqa: BLE001 - as the host does
                errors.report(error)

    def on_mask_blend(self, p: Any, mba: MaskBlendArgs) -> None:
        """While an inpainted picture is put together with what is protected."""
        self.run_all("on_mask_blend", p, mba)


def load_module(path: Path) -> ModuleType:
    """Executes a script file anew; its module is named after the file."""
    spec = importlib.util.spec_from_file_location(path.name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_scripts(*paths: Path) -> None:
    """As at the start and on every "Reload UI": forgets all callbacks, executes all script files."""
    script_callbacks.run("script_unloaded")
    scripts_data.clear()
    script_callbacks.clear()
    for path in paths:
        module = load_module(path)
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, Script):
                scripts_data.append(ScriptClassData(value, str(path), str(path.parent), module))
