"""What commands share: errors of one line, arguments that are checked, weights that are loaded or refused."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from safetensors import SafetensorError

from sag_pag.demo.model import WEIGHTS
from sag_pag.demo.schedule import TIMESTEPS


class Parser(argparse.ArgumentParser):
    """Wrong arguments get one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def say(line: str) -> None:
    """A line of the command's own output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def whole(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parsed(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return parsed


def working_parser(program: str, description: str, *, threads: int | None = None) -> Parser:
    """The parser of a command that computes: it can be told how many threads to use."""
    parser = Parser(prog=program, description=description)
    shown = threads or "all cores"
    parser.add_argument("--threads", type=whole(1, 1024), default=threads, help=f"CPU threads (default: {shown})")
    return parser


def parsed(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a :func:`working_parser`, after its threads are set."""
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def add_weights(parser: Parser) -> None:
    """``--weights``."""
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the model, as training writes them")


def add_steps(parser: Parser) -> None:
    """``--steps`` of sampling."""
    parser.add_argument("--steps", type=whole(1, TIMESTEPS), default=20, help="sampling steps (default: %(default)s)")


Loaded = TypeVar("Loaded")


def loaded(parser: Parser, path: Path, load_from: Callable[[Path], Loaded]) -> Loaded:
    """What a weights file holds; other files are refused."""
    if not path.is_file():
        parser.error(f"there are no weights at {path}")
    try:
        return load_from(path)
    except (SafetensorError, RuntimeError) as error:
        parser.error(f"{path} holds other weights, or none: {str(error).splitlines()[0]}")


def check_writable(parser: Parser, path: Path) -> None:
    """Before any work: is there a folder for this file, and may it be written?"""
    if not path.parent.is_dir():
        parser.error(f"there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        parser.error(f"can't write to {path}")


@contextmanager
def running(program: str) -> Iterator[None]:
    """Around a command: what the system refuses is told in one line, as is Ctrl+C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        yield
    except OSError as error:
        Parser(prog=program).error(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        sys.exit(130)
