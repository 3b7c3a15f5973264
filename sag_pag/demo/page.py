"""The page: ``python -m sag_pag.demo page``. The WebUI's own panel before the demo model, in gradio 3.41.2.

The page asks nothing of any other machine: no fonts, scripts or statistics from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from PIL import Image

from sag_pag.demo.autoencoder import FACTOR, SIZE
from sag_pag.demo.captions import COLOURS, SHAPES, SIZES, parse
from sag_pag.demo.grid import CAPTIONS, check_settings, to_image
from sag_pag.demo.model import CFG_SCALE, OWN_DEFAULTS, DemoModel
from sag_pag.demo.sampling import SAMPLERS, Recipe, parse_seeds, sample
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import PARAMETERS, Settings
from sag_pag.webui.panel import Panel, Surroundings
from sag_pag.webui.texts import PANEL as TITLE

MOST_SEEDS = 8
FIRST_CAPTION, FIRST_SEEDS = CAPTIONS[4], "5-7"
"""What the page begins with: the grid's column in which PAG makes a shape whole, and two seeds more."""
MOST_STEPS = 100
ZOOM = 6
"""Screen pixels a picture's pixel."""

_REPOSITORY = Path(__file__).parents[2]
_OWN = Path(__file__).parent
_PROGRESS = gr.Progress()
_ELSEWHERE = re.compile(r'<(?:link|meta|script)\b[^>]*"https?://[^>]*>(?:\s*</script>)?')

_ABOUT = f"""# {TITLE}
A model of one million parameters that knows drawn shapes, guided by the engine that the WebUI runs. Write a caption,
tick PAG or SAG in the panel, generate: the same seeds are made without and with guidance. (The panel is the
WebUI's own, but begins with the PAG scale that suits this model; its presets are for Stable Diffusion, too strong
here, and "Show what SAG sees" does nothing.)

Captions read like `big red star on green` or `yellow moon and small white ring on black`. Words:
{", ".join((*SIZES, *COLOURS, *SHAPES))}; `and` before a second object, `on` before the background.
"""


def elem_id(name: str) -> str:
    """The id that the WebUI gives the element in txt2img, so that the extension's own scripts find it."""
    title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", TITLE.lower()))
    return f"script_txt2img_{title}_{name}"


def build_page(model: DemoModel) -> gr.Blocks:
    """The page's components and what they do."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with gr.Blocks(title=TITLE, theme=theme, css=_style(), analytics_enabled=False) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column():
                caption = gr.Textbox(FIRST_CAPTION, label="Caption", max_lines=1, elem_id="demo_caption")
                gr.Examples([[text] for text in CAPTIONS], inputs=[caption], label="Captions to try")
                with gr.Row():
                    seeds = gr.Textbox(FIRST_SEEDS, label="Seeds", info="Like 1-4,9", max_lines=1, elem_id="demo_seeds")
                    sampler = gr.Dropdown(list(SAMPLERS), value="euler", label="Sampler", elem_id="demo_sampler")
                with gr.Row():
                    steps = gr.Slider(1, MOST_STEPS, value=20, step=1, label="Steps", elem_id="demo_steps")
                    cfg = gr.Slider(
                        1, 15, value=CFG_SCALE, step=0.5, label="CFG scale", info="1 is off", elem_id="demo_cfg"
                    )
                generate = gr.Button("Generate", variant="primary", elem_id="demo_generate")
                panel = Panel(elem_id, switch=None, model=lambda: UNetTopology(model.unet))
                side = gr.Number(8 * SIZE // FACTOR, visible=False)  # the panel reckons 8 pixels a latent pixel
                _suit(panel)
                panel.connect(Surroundings(width=side, height=side, steps=steps, cfg_scale=cfg))
            with gr.Column():
                message = gr.HTML(elem_id="demo_message")
                comparison = gr.HTML(elem_id="demo_comparison")
                gallery = gr.Gallery(
                    label="Pictures (choose one to compare it)", columns=2, object_fit="contain", height="auto",
                    allow_preview=False, elem_id="demo_gallery",
                )  # fmt: skip
        comparisons = gr.State([])
        _open(page, elem_id("panel"))

        def run(progress: gr.Progress = _PROGRESS, *given: Any) -> tuple[Any, Any, Any, Any]:
            """Make the pictures; what can't be done is said in the page and leaves the last pictures there."""
            try:
                return _generate(model, *given[:5], panel=given[5:], progress=progress)
            except ValueError as error:
                return _say(str(error), error=True), gr.update(), gr.update(), gr.update()

        def compare(made: list[str], event: gr.SelectData) -> str:
            """The comparison that a picture of the gallery is part of."""
            return made[int(event.index) // 2]

        outputs = [message, gallery, comparison, comparisons]
        for trigger in (generate.click, caption.submit):
            trigger(run, [caption, seeds, steps, cfg, sampler, *panel.controls], outputs, api_name=False)
        gallery.select(compare, [comparisons], [comparison], queue=False, api_name=False)
    page.queue(concurrency_count=1, api_open=False)
    return page


def _suit(panel: Panel) -> None:
    """Let the panel begin with what suits this model."""
    for name, control in zip(PARAMETERS, panel.controls, strict=True):
        control.value = OWN_DEFAULTS.get(name, control.value)


def _open(page: gr.Blocks, name: str) -> None:
    """Open an accordion: here the panel is what the page is about."""
    for block in page.blocks.values():
        if isinstance(block, gr.Accordion) and block.elem_id == name:
            block.open = True


def _generate(
    model: DemoModel,
    caption: str,
    seeds: str,
    steps: float,
    cfg: float,
    sampler: str,
    *,
    panel: Sequence[object],
    progress: Callable[..., Any],
) -> tuple[str, list[tuple[Image.Image, str]], str, list[str]]:
    """Message, gallery, first comparison and all comparisons. Raises ``ValueError`` for whatever can't be used."""
    parse(caption)
    chosen = parse_seeds(seeds, most=MOST_SEEDS)
    settings = Settings.from_list(panel)
    settings.check_order()
    check_settings(model, settings)
    if not isinstance(steps, (int, float)) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps: {steps!r} can't be used; allowed: a whole number from 1 to {MOST_STEPS}")
    if not isinstance(cfg, (int, float)) or not 0 <= cfg <= 30:
        raise ValueError(f"CFG scale: {cfg!r} can't be used; allowed: a number from 0 to 30")
    recipes = [Recipe(made, cfg=cfg, steps=int(steps), sampler=sampler) for made in (Settings(), settings)]
    total, ticks = 2 * int(steps), itertools.count(1)

    def on_step() -> None:
        progress((next(ticks), total), desc="sampling", unit="steps")

    pictures, seconds = [], []
    for recipe in recipes:
        began = time.perf_counter()
        latent = sample(model, [caption] * len(chosen), seeds=chosen, recipe=recipe, on_step=on_step)
        seconds.append(time.perf_counter() - began)
        pictures.append([to_image(picture, ZOOM) for picture in model.first_stage_model.decode(latent)])
    names = ("without guidance", f"with {guidance_name(settings)}")
    gallery, comparisons = [], []
    for seed, before, after in zip(chosen, *pictures, strict=True):
        labels = [f"seed {seed}, {name}" for name in names]
        gallery += [(before, labels[0]), (after, labels[1])]
        comparisons.append(comparison_html(before, after, labels=(labels[0], labels[1]), caption=caption))
    if settings.enabled:
        text = f"{names[0].capitalize()} {seconds[0]:.1f} s, {names[1]} {seconds[1]:.1f} s."
    else:
        text = "Guidance is off, so both are the same: tick PAG or SAG in the panel."
    return _say(text), gallery, comparisons[0], comparisons


def guidance_name(settings: Settings) -> str:
    """What is on, with its scale: "PAG 3 and SAG 0.75"."""
    pag = f"PAG {settings.pag_scale:g}" if settings.pag_enabled else ""
    sag = f"SAG {settings.sag_scale:g}" if settings.sag_enabled else ""
    return " and ".join(filter(None, (pag, sag))) or "guidance off"


def _say(text: str, *, error: bool = False) -> str:
    kind = 'class="demo-error" role="alert"' if error else 'role="status"'
    return f"<p {kind}>{html.escape(text)}</p>"


def comparison_html(before: Image.Image, after: Image.Image, *, labels: tuple[str, str], caption: str) -> str:
    """Two pictures on top of each other and a slider, reachable by keyboard, that says how much is seen of which."""
    first, second = (html.escape(label) for label in labels)
    about = html.escape(caption or "no caption")
    return f"""
<figure class="demo-compare" style="--share: 50%">
  <div class="demo-stack">
    <img class="demo-after" src="{_data_url(after)}" alt="{about}; {second}">
    <img class="demo-before" src="{_data_url(before)}" alt="{about}; {first}">
  </div>
  <input type="range" min="0" max="100" value="50" aria-label="Share of the picture {first}">
  <figcaption><span>{first}</span><span>{second}</span></figcaption>
</figure>"""


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def scripts() -> Iterator[Path]:
    """The page's own script, which stands in for the WebUI's, and then the extension's."""
    yield _OWN / "page.js"
    yield from sorted((_REPOSITORY / "javascript").glob("*.js"))


def _style() -> str:
    """The page's own style after the extension's."""
    sheets = (_REPOSITORY / "style.css", _OWN / "page.css")
    return "\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets if sheet.is_file())


def make_app(model: DemoModel) -> FastAPI:
    """The page as an application: gradio's, with the extension's scripts and without anything from elsewhere."""
    app = FastAPI(docs_url=None, redoc_url=None)
    served = {path.name: path for path in scripts()}

    def script(name: str) -> FileResponse:
        if name not in served:
            raise HTTPException(404)
        return FileResponse(served[name], media_type="text/javascript")

    async def only_from_here(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Response:
        response = await call_next(request)
        if request.url.path != "/" or request.method != "GET":
            return response
        body = b"".join([part async for part in response.body_iterator]).decode()
        tags = "".join(f'<script src="demo-scripts/{name}" defer></script>' for name in served)
        return HTMLResponse(_ELSEWHERE.sub("", body).replace("</head>", f"{tags}</head>", 1), response.status_code)

    app.get("/demo-scripts/{name}")(script)
    app.middleware("http")(only_from_here)
    return gr.mount_gradio_app(app, build_page(model), path="/")


def serve(model: DemoModel, *, host: str, port: int, on_ready: Callable[[str], object]) -> None:
    """Serve the page until it is stopped; ``on_ready`` gets its address. Raises ``OSError`` for a taken port."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # gradio's queue calls its own server, which a proxy for the way out cannot reach
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
        filter(None, (os.environ.get("NO_PROXY", os.environ.get("no_proxy")), "localhost,127.0.0.1", host))
    )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        app = make_app(model)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        shown = f"[{shown}]" if ":" in shown else shown
        on_ready(f"http://{shown}:{listening.getsockname()[1]}/")
        torch.set_grad_enabled(False)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
