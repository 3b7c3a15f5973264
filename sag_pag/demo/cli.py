"""The command line: ``python -m sag_pag.demo [grid|page|train|train-classifier|evaluate] [options]``."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sag_pag.demo import classifier, evaluate, grid, points, report, train
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
from sag_pag.demo.model import OWN_DEFAULTS, load
from sag_pag.demo.progress import Progress
from sag_pag.demo.sampling import SAMPLERS, parse_seeds
from sag_pag.pages import around
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


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu, cuda or cuda:1")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no {text!r} on this machine")
    return text


def run_grid(arguments: Sequence[str]) -> None:
    """The default command: one picture that shows what the guidances do."""
    about = "Writes a grid: the same seeds without guidance, with SAG, PAG and both, without and with CFG."
    parser = working_parser(PROGRAM, about, threads=FEW_THREADS)
    parser.epilog = f"Other commands: {', '.join(name for name in COMMANDS if name != 'grid')}; each has --help."
    parser.add_argument("--prompt", action="append", help="a caption like 'big red star on green'; repeatable")
    parser.add_argument("--seeds", type=_seeds, default=[1, 2, 3, 4, 5, 6], help="like 1-4,9 (default: 1-6)")
    parser.add_argument("--cfg", type=_cfg, default=3.0, help="CFG scale of the lower half (default: 3)")
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
                parser.add_argument(flag, metavar="VALUE", help=f"{parameter.help} (default: {default})")
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


def run_train(arguments: Sequence[str]) -> None:
    """Training of the shipped model."""
    about = "Trains the demo model on freshly drawn pictures; goes on where it was stopped."
    parser = working_parser(f"{PROGRAM} train", about)
    parser.add_argument("--out", type=Path, default=Path("demo-training"), help="checkpoint, weights and loss curve")
    defaults = train.TrainSettings(out=Path())
    for name in ("steps", "batch", "seed", "autoencoder_steps"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), help="(default: %(default)s)"
        )
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="(default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--held-out", type=int, default=defaults.held_out, help=argparse.SUPPRESS)
    options = parsed(parser, arguments)
    names = ("out", "steps", "batch", "seed", "autoencoder_steps", "learning_rate", "device", "held_out")
    given = {name: getattr(options, name) for name in names}
    try:
        path = train.train(train.TrainSettings(**given, bf16=not options.float32))
    except train.TrainError as error:
        parser.error(str(error))
    say(str(path.resolve()))


def run_train_classifier(arguments: Sequence[str]) -> None:
    """Training of the judge."""
    about = "Trains the classifier whose features and answers `evaluate` uses."
    parser = working_parser(f"{PROGRAM} train-classifier", about)
    parser.add_argument("--out", type=Path, default=Path("demo-training/classifier.safetensors"))
    parser.add_argument("--steps", type=whole(1, 10**6), default=2000, help="(default: %(default)s)")
    options = parsed(parser, arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(parser, options.out)
    model = classifier.train_classifier(steps=options.steps)
    classifier.save_classifier(model, options.out)
    say(f"{options.out.resolve()}; accuracy by slot: {', '.join(f'{x:.3f}' for x in classifier.accuracy(model))}")


def run_evaluate(arguments: Sequence[str]) -> None:
    """The proof: Fréchet distance, precision, recall, caption agreement."""
    about = "Measures what guidance does to many samples; goes on where it was stopped."
    parser = working_parser(f"{PROGRAM} evaluate", about)
    parser.epilog = (
        "The default set takes about half an hour of one core; on two cores run it twice at once with --threads 1, as"
        " --part 1/2 and --part 2/2, which takes half of that, and then once more without --part for the results."
    )
    parser.add_argument("--out", type=Path, default=Path("demo-evaluation"), help="features, CSV, table and plots")
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument(
        "--sweep", action="append", choices=(points.DEFAULT, *points.SWEEPS),
        help="instead of the default set; repeatable",
    )  # fmt: skip
    measured.add_argument("--all", action="store_true", help=f"the default set and every sweep but {points.CHOSEN}")
    parser.add_argument("--mode", action="append", choices=points.MODES, help="sweeps in this mode only; repeatable")
    parser.add_argument("--groups", type=whole(2, 1000), default=10, help="groups of seeds (default: 10)")
    parser.add_argument("--first-group", type=whole(0, 1000), default=0, help="others are other seeds (default: 0)")
    parser.add_argument("--group-size", type=whole(2, 1000), default=50, help="samples a group (default: 50)")
    add_steps(parser)
    parser.add_argument("--no-plots", action="store_true", help="without matplotlib")
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16: twice the time")
    parser.add_argument("--docs", type=Path, help="a page with marks to write the tables between, as the project's has")
    parser.add_argument("--part", default="1/1", help="2/4: make the second quarter of the samples only, no results")
    add_weights(parser)
    parser.add_argument(
        "--classifier", type=Path, default=classifier.WEIGHTS, help="the judge, as `train-classifier` writes it"
    )
    options = parsed(parser, arguments)
    part, _, parts = options.part.partition("/")
    if not part.isdecimal() or not parts.isdecimal() or not 1 <= int(part) <= int(parts):
        parser.error(f"{options.part!r} is no part; write it like 2/4")
    if parts != "1" and options.docs:
        parser.error("a part has no results: say --docs without --part, when all parts are done")
    names = points.ON_FIRST_SEEDS if options.all else options.sweep or (points.DEFAULT,)
    try:
        size = evaluate.Size(groups=options.groups, group=options.group_size, first=options.first_group)
        for name in names if options.docs else ():
            around(options.docs, *report.marks(name))
    except ValueError as error:
        parser.error(str(error))
    if parts == "1" and not options.no_plots and not report.can_plot():
        parser.error("the plots need matplotlib: install it, or say --no-plots")
    judge = evaluate.Evaluation(
        loaded(parser, options.weights, load), loaded(parser, options.classifier, classifier.load_classifier),
        out=options.out / "samples", size=size, bf16=not options.float32,
    )  # fmt: skip
    wanted = {
        name: points.sweep_points(name, modes=options.mode or (), steps=options.steps)
        for name in names
        if name != points.DEFAULT
    }
    if points.DEFAULT in names:
        wanted = {points.DEFAULT: points.default_points(options.steps), **wanted}
    judge.make_all([point for sweep in wanted.values() for point in sweep], part=int(part), parts=int(parts))
    if int(parts) == 1:
        for path in report.write_all(judge, wanted, out=options.out, plots=not options.no_plots, docs=options.docs):
            say(str(path.resolve()))


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
    "train": run_train,
    "train-classifier": run_train_classifier,
    "evaluate": run_evaluate,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; the grid if none is named."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in COMMANDS and not given[0].startswith("-"):
        Parser(prog=PROGRAM).error(f"unknown command {given[0]!r}; known are {', '.join(COMMANDS)}")
    command = given.pop(0) if given and given[0] in COMMANDS else "grid"
    with running(f"{PROGRAM} {command}"):
        COMMANDS[command](given)
