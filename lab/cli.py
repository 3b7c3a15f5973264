"""The command line: ``python -m lab COMMAND [options]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lab import card, classifier, evaluate, points, readme, report, results, train
from lab.benchmark import timing
from lab.benchmark.steps import CONFIGS
from lab.degraded import draw_degraded
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
from sag_pag.demo.model import load

PROGRAM = "python -m lab"
KEPT = Path(__file__).parents[1] / "docs" / "demo-evaluation"


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu, cuda or cuda:1")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no {text!r} on this machine")
    return text


def _add_no_plots(parser: Parser) -> None:
    parser.add_argument("--no-plots", action="store_true", help="without matplotlib")


def _check_plots(parser: Parser, options: argparse.Namespace) -> None:
    if not options.no_plots and not report.can_plot():
        parser.error("the plots need matplotlib: install it, or say --no-plots")


def run_train(arguments: Sequence[str]) -> None:
    """Train the model that the demo ships with."""
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
    """Train the classifier that judges pictures in `evaluate`."""
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
    """Measure what guidance does to many pictures: Fréchet distance, precision, recall, captions."""
    about = "Measures what guidance does to many samples; goes on where it was stopped."
    parser = working_parser(f"{PROGRAM} evaluate", about)
    parser.epilog = (
        "The default set takes about half an hour of one core; on two cores run it twice at once with --threads 1, as"
        " --part 1/2 and --part 2/2, which takes half of that, and then once more without --part for the results."
    )
    out = "samples, CSV, tables and plots (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("demo-evaluation"), help=out)
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument(
        "--sweep", action="append", choices=(points.DEFAULT, *points.SWEEPS),
        help="instead of the default set; repeatable",
    )  # fmt: skip
    measured.add_argument("--all", action="store_true", help="the default set and every sweep on the first seeds")
    parser.add_argument("--mode", action="append", choices=points.MODES, help="sweeps in this mode only; repeatable")
    parser.add_argument("--groups", type=whole(2, 1000), default=10, help="groups of seeds (default: 10)")
    parser.add_argument("--first-group", type=whole(0, 1000), default=0, help="others are other seeds (default: 0)")
    parser.add_argument("--group-size", type=whole(2, 1000), default=50, help="samples a group (default: 50)")
    add_steps(parser)
    _add_no_plots(parser)
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16: twice the time")
    parser.add_argument("--part", default="1/1", help="2/4: make the second quarter of the samples only, no results")
    add_weights(parser)
    parser.add_argument(
        "--classifier", type=Path, default=classifier.WEIGHTS, help="the judge, as `train-classifier` writes it"
    )
    options = parsed(parser, arguments)
    part, _, parts = options.part.partition("/")
    if not part.isdecimal() or not parts.isdecimal() or not 1 <= int(part) <= int(parts):
        parser.error(f"{options.part!r} is no part; write it like 2/4")
    names = points.ON_FIRST_SEEDS if options.all else options.sweep or (points.DEFAULT,)
    try:
        size = evaluate.Size(groups=options.groups, group=options.group_size, first=options.first_group)
    except ValueError as error:
        parser.error(str(error))
    if parts == "1":
        _check_plots(parser, options)
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
        for path in report.write_all(judge, wanted, out=options.out, plots=not options.no_plots):
            say(str(path.resolve()))


def run_tables(arguments: Sequence[str]) -> None:
    """Make tables and plots of measurements that were kept as CSV files."""
    parser = Parser(prog=f"{PROGRAM} tables", description=run_tables.__doc__)
    parser.add_argument("--data", type=Path, default=KEPT, help="the CSV files' folder (default: the project's own)")
    parser.add_argument("--out", type=Path, default=Path("demo-tables"), help="(default: %(default)s)")
    _add_no_plots(parser)
    options = parser.parse_args(arguments)
    _check_plots(parser, options)
    try:
        sweeps = [results.read_csv(path) for path in sorted(options.data.glob("*.csv"))]
    except ValueError as error:
        parser.error(str(error))
    if not sweeps:
        parser.error(f"there are no CSV files in {options.data}")
    options.out.mkdir(parents=True, exist_ok=True)
    for sweep in sweeps:
        for path in report.write_tables(sweep, out=options.out, plots=not options.no_plots):
            say(str(path.resolve()))


def run_degraded(arguments: Sequence[str]) -> None:
    """Draw what guidance leads away from."""
    about = "Draws what the model predicts under noise, and the worse predictions that guidance leads away from."
    parser = working_parser(f"{PROGRAM} degraded", about)
    parser.add_argument("--output", type=Path, default=Path("degraded.png"), help="(default: %(default)s)")
    add_weights(parser)
    options = parsed(parser, arguments)
    check_writable(parser, options.output)
    draw_degraded(loaded(parser, options.weights, load)).save(options.output)
    say(str(options.output.resolve()))


def run_benchmark(arguments: Sequence[str]) -> None:
    """Time a step without guidance, with PAG, SAG and both, and diffusers' own."""
    parser = working_parser(f"{PROGRAM} benchmark", str(timing.__doc__).split("\n")[0])
    parser.add_argument("--layout", choices=CONFIGS, nargs="+", default=["sd1"], help="which U-Nets; sd1 if not given")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="full: as the model is used")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=whole(1, 10**6), default=10, help="how often each method is timed")
    parser.add_argument("--batch", type=whole(1, 1000), default=1, help="images at a time")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parsed(parser, arguments)
    if options.json:
        check_writable(parser, options.json)
    about = timing.describe(options.device) | {
        "dtype": options.dtype, "size": options.size, "batch": options.batch, "steps": options.steps
    }
    measured = {}
    for layout in options.layout:
        rows = timing.measure(
            layout, small=options.size == "small", device=options.device, dtype=getattr(torch, options.dtype),
            rounds=options.steps, batch=options.batch,
        )  # fmt: skip
        measured[layout] = [asdict(row) for row in rows]
        heading = ", ".join(f"{key} {value}" for key, value in about.items())
        say(f"{layout}: {heading}\n\n{timing.table(rows)}\n")
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({**about, "results": measured}, indent=2) + "\n", encoding="utf-8")


def run_card(arguments: Sequence[str]) -> None:
    """Write the model card's table anew from the weights file."""
    Parser(prog=f"{PROGRAM} card", description=run_card.__doc__).parse_args(arguments)
    card.write_table()
    say(str(card.CARD))


def run_readme(arguments: Sequence[str]) -> None:
    """Write the reference page's table of parameters anew from their definition."""
    Parser(prog=f"{PROGRAM} readme", description=run_readme.__doc__).parse_args(arguments)
    readme.write_table()
    say(str(readme.PAGE))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": run_train,
    "train-classifier": run_train_classifier,
    "evaluate": run_evaluate,
    "tables": run_tables,
    "degraded": run_degraded,
    "benchmark": run_benchmark,
    "card": run_card,
    "readme": run_readme,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        prog=PROGRAM, description="Trains the demo model and measures what guidance does to it, and what it costs.",
        usage="%(prog)s COMMAND [options]", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    lines = [f"  {name:<18}{str(command.__doc__).splitlines()[0]}" for name, command in COMMANDS.items()]
    parser.epilog = "\n".join(["commands (each has a --help of its own):", *lines])
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(given[:1]).command
    with running(f"{PROGRAM} {command}"):
        COMMANDS[command](given[1:])
