"""The always-on script and its registration with the WebUI."""

from __future__ import annotations

from typing import Any

from modules import script_callbacks, scripts

from sag_pag.session import check_blocks
from sag_pag.settings import PARAMETERS, SettingError, Settings
from sag_pag.webui import xyz
from sag_pag.webui.panel import TITLE, build_panel
from sag_pag.webui.pasting import on_infotext_pasted
from sag_pag.webui.runs import NOTE, Callbacks

try:
    from modules.ui_components import InputAccordion
except ImportError:  # before WebUI 1.7
    InputAccordion = None

CALLBACKS = Callbacks()


class GuidanceScript(scripts.Script):  # type: ignore[misc]
    """Hands each generation's settings to the guidance. Holds no state."""

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        components = build_panel(self.elem_id, switch=InputAccordion)
        keys = [parameter.infotext for parameter in PARAMETERS.values()]
        self.infotext_fields = list(zip(components, keys, strict=True))
        self.paste_field_names = keys
        return components

    def process(self, p: Any, *args: Any) -> None:
        """Writes the infotext; a picture's metadata says what was on."""
        for key in (NOTE, *(parameter.infotext for parameter in PARAMETERS.values())):
            p.extra_generation_params.pop(key, None)
        settings = read_settings(args)
        if isinstance(settings, Settings):
            p.extra_generation_params.update(settings.infotext())

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Right before the batch is sampled."""
        settings = read_settings(args)
        off = isinstance(settings, Settings) and not settings.enabled
        CALLBACKS.prepare(p, None if off else settings)


def read_settings(args: tuple[Any, ...]) -> Settings | SettingError:
    """The settings that ``args`` hold, or what is wrong with them."""
    try:
        settings = Settings.from_list(args)
        settings.check_order()
        check_blocks(settings, None)
    except SettingError as error:
        return error
    return settings


def add_routes(demo: Any, app: Any) -> None:
    """Adds our HTTP routes to the WebUI's. Imported late: only a server that has started needs them."""
    from sag_pag.webui import routes

    routes.add_routes(demo, app)


def register() -> None:
    """Registers all callbacks and axes. The WebUI forgets them on every "Reload UI" and runs the script file again."""
    script_callbacks.on_cfg_denoiser(CALLBACKS.on_cfg_denoiser)
    script_callbacks.on_cfg_denoised(CALLBACKS.on_cfg_denoised)
    script_callbacks.on_cfg_after_cfg(CALLBACKS.on_cfg_after_cfg)
    script_callbacks.on_infotext_pasted(on_infotext_pasted)
    script_callbacks.on_app_started(add_routes)
    xyz.register_axes()
