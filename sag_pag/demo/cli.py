"""The command line: ``python -m sag_pag.demo [grid|page] [options]``."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sag_pag.demo import grid
from sag_pag.demo.arguments import (
    Parser,
    add_steps,
    add_weights,
    check_writable,
    loaded,
    parsed,
    running,
    say,
    whole,
    working_parser,
)
from sag_pag.demo.captions import parse
from sag_pag.demo.model import CFG_SCALE, OWN_DEFAULTS, load
from sag_pag.demo.progress import Progress
from sag_pag.demo.sampling import SAMPLERS, parse_seeds
from sag_pag.settings import PARAMETERS, Settings

PROGRAM = "python -m sag_pag.demo"
FEW_THREADS = 1
"""So small a batch of so small a model gains little from more, and loses a lot on a busy machine."""
HOST_ONLY = (
    "sag_enabled", "pag_enabled", "hires_pass", "hires_own_scales", "hires_sag_scale", "hires_pag_scale", "sag_show",
)


def _seeds(text: str) -> list[int]:
    try:
        return parse_seeds(text, most=64)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _cfg(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= 30:
        raise argparse.ArgumentTypeError(f"{text!r} is no CFG scale from 0 to 30")
    return scale


def run_grid(arguments: Sequence[str]) -> None:
    """The default command: one picture that shows what the guidances do."""
    about = "Writes a grid: the same seeds without guidance, with SAG, PAG and both, without and with CFG."
    parser = working_parser(PROGRAM, about, threads=FEW_THREADS)
    parser.epilog = f"Other commands: {', '.join(name for name in COMMANDS if name != 'grid')}; each has --help."
    parser.add_argument("--prompt", action="append", help="a caption like 'big red star on green'; repeatable")
    parser.add_argument("--seeds", type=_seeds, default=[1, 2, 3, 4, 5, 6], help="like 1-4,9 (default: 1-6)")
    cfg_help = "CFG scale of the lower half (default: %(default)s)"
    parser.add_argument("--cfg", type=_cfg, default=CFG_SCALE, help=cfg_help)
    add_steps(parser)
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="euler")
    parser.add_argument("--output", type=Path, default=Path("sag-pag-demo.png"), help="where to write the picture")
    add_weights(parser)
    for name, parameter in PARAMETERS.items():
        if name not in HOST_ONLY:
            flag = "--" + name.replace("_", "-")
            if parameter.kind == "bool":
                parser.add_argument(flag, action="store_const", const="true", help=parameter.help)
            else:
                default = OWN_DEFAULTS.get(name, parameter.default)
                choices = f"{parameter.allowed}. " if parameter.choices else ""
                parser.add_argument(flag, metavar="VALUE", help=f"{choices}{parameter.help} (default: {default})")
    options = parsed(parser, arguments)
    model = loaded(parser, options.weights, load)
    prompts = options.prompt or grid.CAPTIONS
    captions = [prompts[index % len(prompts)] for index in range(len(options.seeds))]
    given = {name: getattr(options, name) for name in PARAMETERS if getattr(options, name, None) is not None}
    try:
        for caption in prompts:
            parse(caption)
        values = {name: PARAMETERS[name].parse(text) for name, text in given.items()}
        settings = Settings().with_values({**OWN_DEFAULTS, **values})
        grid.check_settings(model, settings)
    except ValueError as error:
        parser.error(str(error))
    if len(options.prompt or ()) > len(options.seeds):
        parser.error(f"{len(options.prompt)} prompts for {len(options.seeds)} seeds; each picture has one")
    check_writable(parser, options.output)
    if options.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"{options.output.name!r} is no picture's name; end it in .png, .jpg or .webp")
    began = time.perf_counter()
    total = options.steps * len(grid.VARIANTS) * (2 if options.cfg != 1 else 1)
    with Progress("sampling", total) as bar:
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            bar.update(done)

        rows = grid.make_rows(
            model, captions, seeds=options.seeds, settings=settings, cfg=options.cfg, steps=options.steps,
            sampler=options.sampler, on_step=on_step,
        )  # fmt: skip
    grid.draw_grid(rows, captions, seeds=options.seeds).save(options.output)
    say(f"{options.output.resolve()} ({time.perf_counter() - began:.1f} s)")
    for line in grid.cost_lines(rows):
        say(line)


def run_page(arguments: Sequence[str]) -> None:
    """The panel in a browser."""
    about = "Serves a page with the WebUI's panel before the demo model, until it is stopped."
    parser = working_parser(f"{PROGRAM} page", about, threads=FEW_THREADS)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: %(default)s)")
    parser.add_argument(
        "--port", type=whole(0, 65535), default=7865, help="0 takes any free one (default: %(default)s)"
    )
    add_weights(parser)
    options = parsed(parser, arguments)
    model = loaded(parser, options.weights, load)
    try:
        page = importlib.import_module("sag_pag.demo.page")
    except ImportError as error:
        parser.error(f"the page needs gradio 3.41.2 and what goes with it ({error}): see requirements-demo.txt")
    try:
        page.serve(model, host=options.host, port=options.port, on_ready=lambda url: say(f"{url} (Ctrl+C stops it)"))
    except OSError as error:
        parser.error(f"can't serve at {options.host}, port {options.port}: {error.strerror or error}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "grid": run_grid,
    "page": run_page,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; the grid if none is named."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in COMMANDS and not given[0].startswith("-"):
        Parser(prog=PROGRAM).error(f"unknown command {given[0]!r}; known are {', '.join(COMMANDS)}")
    command = given.pop(0) if given and given[0] in COMMANDS else "grid"
    with running(f"{PROGRAM} {command}"):
        COMMANDS[command](given)
