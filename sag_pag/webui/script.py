"""The always-on script and its registration with the WebUI."""

from __future__ import annotations

import inspect
from typing import Any

from modules import script_callbacks, scripts

from sag_pag import hosts
from sag_pag.engine.blocks import Topology
from sag_pag.hosts.interface import NoModelError, UnguidableModelError
from sag_pag.settings import PARAMETERS, SettingError, Settings
from sag_pag.webui import record, texts, xyz
from sag_pag.webui.infotext import FIELDS, on_infotext_pasted
from sag_pag.webui.panel import Panel, Surroundings
from sag_pag.webui.sampling import VIEWS, Sampling
from sag_pag.webui.seen import show

try:
    from modules.ui_components import InputAccordion
except ImportError:  # before WebUI 1.7
    InputAccordion = None

SAMPLING = Sampling(hosts.current())

_SHOWN = "sag_pag_shown"
"""Attribute of a processing object: by picture number the sheets of what SAG saw, until they are in the gallery."""

_EVERYWHERE = {"width": "width", "height": "height", "steps": "steps"}
_AROUND = {
    "txt2img": {
        **_EVERYWHERE, "hr-checkbox": "hires", "hr_scale": "hires_scale", "hr_resize_x": "hires_width",
        "hr_resize_y": "hires_height", "hires_steps": "hires_steps", "denoising_strength": "hires_denoising",
    },
    "img2img": {**_EVERYWHERE, "denoising_strength": "denoising"},
}
"""For each tab, what the WebUI calls the controls of ``Surroundings``."""
_CFG_SCALES = {
    "txt2img": {"cfg_scale": "cfg_scale", "hr_cfg": "hires_cfg_scale"}, "img2img": {"cfg_scale": "cfg_scale"},
}
"""What it calls the scales of CFG that say how many rows there are; not every host has one for the hires pass."""


def _controls_around(tab: str) -> dict[str, str]:
    scales = hosts.current().cfg_scales_that_save_rows()
    return {**_AROUND[tab], **{name: what for name, what in _CFG_SCALES[tab].items() if name in scales}}


class GuidanceScript(scripts.Script):  # type: ignore[misc]
    """Hands each generation's settings to the guidance. Holds the panel while the user interface is made."""

    def __init__(self) -> None:
        super().__init__()
        self._panel: Panel | None = None
        self._around: dict[str, Any] = {}

    def title(self) -> str:
        return texts.PANEL

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        model, hires = model_in_memory, not is_img2img
        panel = self._panel = Panel(self.elem_id, switch=InputAccordion, model=model, hires=hires)
        readers = list(FIELDS.values())
        self.infotext_fields = list(zip(panel.controls, readers, strict=True))
        self.paste_field_names = readers
        self._connect()
        return panel.controls

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """Picks up the controls that the panel's costs depend on, whichever side is made first."""
        tab = "img2img" if self.is_img2img else "txt2img"
        name = str(kwargs.get("elem_id")).removeprefix(f"{tab}_")
        if name in _controls_around(tab):
            self._around[name] = component
            self._connect()

    def _connect(self) -> None:
        wanted = _controls_around("img2img" if self.is_img2img else "txt2img")
        if self._panel is not None and self._around.keys() == wanted.keys():
            self._panel.connect(Surroundings(**{wanted[name]: found for name, found in self._around.items()}))
            self._panel, self._around = None, {}

    def process(self, p: Any, *args: Any) -> None:
        """Before the first batch. Other programs read the arguments' names here: see below."""
        for name in (VIEWS, _SHOWN):
            vars(p).pop(name, None)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Right before the batch is sampled, and before its metadata is written for the first time."""
        settings = read_settings(args)
        if isinstance(settings, Settings) and not settings.enabled:
            SAMPLING.forget(p)
            record.clear(p)
        else:
            SAMPLING.prepare(p, settings)

    def on_mask_blend(self, p: Any, mba: Any, *args: Any) -> None:
        """In every step of inpainting, among the scripts that may change how the picture is blended."""
        SAMPLING.on_mask_blend(p, mba)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Right after the batch was sampled."""
        SAMPLING.end_batch(p)

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        """Sees to the picture's metadata, and draws what SAG saw of it, if that is to be shown."""
        pictures = SAMPLING.pictures(p)
        if pictures is not None and p.batch_index >= pictures:
            record.clear(p)  # made by another machine, which has its own text: nobody here knows what it did
            return
        SAMPLING.write_record(p)
        if p.script_args and p.script_args[0]:
            return  # a script such as SD upscale puts its pictures together itself and takes every one for a tile
        views = [(at, view.attention[p.batch_index], view.mask[p.batch_index]) for at, view in vars(p).get(VIEWS, ())]
        if views:
            # not the batch's size of now: that may have grown by pictures of other machines
            number = p.iteration * (pictures or p.batch_size) + p.batch_index
            setattr(p, _SHOWN, {**vars(p).get(_SHOWN, {}), number: show(pp.image, views)})

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """Adds what was drawn to the gallery, and to what the API gives, with the infotext of the pictures."""
        shown = vars(p).pop(_SHOWN, {})
        vars(p).pop(VIEWS, None)
        SAMPLING.forget(p)
        if not shown or not processed.infotexts:  # ADetailer asks with a copy of ``p`` and no pictures
            return
        own = processed.infotexts[processed.index_of_first_image :] or processed.infotexts
        added = [(sheet, f"{own[min(number, len(own) - 1)]}, {texts.SEEN}") for number, sheet in shown.items()]
        # The host's own extra pictures, such as masks, have no infotext: ours would move up to them.
        missing = len(processed.images) - len(processed.infotexts)
        processed.infotexts.extend([own[-1]] * missing + [text for _, text in added])
        processed.images.extend(sheet for sheet, _ in added)


def _named_arguments() -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter(name, kind) for name in ("self", "p")]
    return inspect.Signature([*own, *(inspect.Parameter(name, kind, default=None) for name in PARAMETERS)])


GuidanceScript.process.__signature__ = _named_arguments()  # type: ignore[attr-defined]


def model_in_memory() -> Topology | str:
    """The loaded model's self-attentions, or why there are none."""
    try:
        return hosts.current().topology()
    except NoModelError:
        return texts.NO_MODEL
    except UnguidableModelError as error:
        return str(error)


def read_settings(args: tuple[Any, ...]) -> Settings | SettingError:
    """The settings that ``args`` hold, or what is wrong with them."""
    try:
        settings = Settings.from_list(args)
        settings.check_order()
    except SettingError as error:
        return error
    return settings


def add_routes(demo: Any, app: Any) -> None:
    """Adds our HTTP routes to the WebUI's. Imported late: only a server that has started needs them."""
    from sag_pag.webui import routes

    routes.add_routes(demo, app)


def register() -> None:
    """Registers all callbacks and axes. The WebUI forgets them on every "Reload UI" and runs the script file again."""
    script_callbacks.on_cfg_denoiser(SAMPLING.on_cfg_denoiser)
    script_callbacks.on_cfg_denoised(SAMPLING.on_cfg_denoised)
    script_callbacks.on_cfg_after_cfg(SAMPLING.on_cfg_after_cfg)
    script_callbacks.on_infotext_pasted(on_infotext_pasted)
    script_callbacks.on_app_started(add_routes)
    script_callbacks.on_script_unloaded(SAMPLING.give_back)
    for kind in hosts.current().generations():
        SAMPLING.replace_in(kind)
    xyz.register_axes()
