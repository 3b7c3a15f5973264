"""The model card's numbers, from the weights file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lab.pages import write_part
from sag_pag.demo.model import WEIGHTS, load, read_metadata

CARD = Path(__file__).parents[1] / "docs" / "demo-model-card.md"
BEGIN, END = "<!-- weights -->", "<!-- end of weights -->"
OTHERS = ("warmup", "decay", "ema", "caption_dropout")
PARTS = {
    "model": "U-Net",
    "cond_stage_model": "caption encoder",
    "first_stage_model": "autoencoder",
}


def weights_table(path: Path = WEIGHTS) -> str:
    """What the weights file holds and how it says it was made, as a Markdown table."""
    metadata = read_metadata(path)
    training = json.loads(metadata["training"])
    children = dict(load(path).named_children())
    counts = {name: sum(value.numel() for value in children[name].state_dict().values()) for name in PARTS}
    flags = {name: training[name] for name in ("batch", "learning_rate", "seed", "autoencoder_steps")}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
    options += "" if training["bf16"] else " --float32"
    runs = [*training["finished"], training["steps"]]
    commands = ", then ".join(f"`python -m lab train --steps {steps} {options}`" for steps in runs)
    rows = {
        "File": f"`{path.name}`, {path.stat().st_size:,} bytes, fp16 safetensors",
        "SHA-256": f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`",
        "Numbers in it": "; ".join(f"{label} {counts[name]:,}" for name, label in PARTS.items()),
        "Training": commands,
        "Steps taken": f"{training['step']:,} of {training['steps']:,}, {training['seconds'] / 60:.0f} minutes",
        "Other settings": ", ".join(f"{name} {training[name]}" for name in OTHERS),
        "Held-out loss": f"{metadata['held_out_loss']} (mean squared error of v on {training['held_out']} pictures)",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def write_table() -> None:
    """Replaces the table between the two marks in the model card."""
    write_part(CARD, BEGIN, END, weights_table())
