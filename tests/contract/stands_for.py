"""For each double of an extension: which real ones it stands for, as rows of the table of ``docs/neighbours.md``.

What holds for a double has to hold for these. ``needs`` is the mechanism without which a picture beside either goes
wrong, ``says`` what the picture's text has to say beside either, ``calls`` the rows of a PAG step's calls.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stand:
    """What a double stands for, by the names of rows, and in which way it is like those."""

    does: str
    rows: tuple[str, ...] = ()
    needs: str = ""
    says: str = ""
    calls: str = ""


STANDS_FOR = {
    "counter": Stand(
        "counts attentions to tell the prompt's call from the other", needs="state",
        rows=("NegPiP, unequal lengths", "NegPiP, batching off"),
    ),
    "hook": Stand(
        "hooks that note what the rows of a call are", needs="looking",
        rows=("incantations, SEG", "incantations, S-CFG"),
    ),
    "generator": Stand(
        "draws from a random.Random of its own", needs="state",
        rows=("HyperTile (built in)", "HyperTile, batching off"),
    ),
    "reference": Stand(
        "encodes and draws noise in its first call, and keeps what it has encoded", needs="encoding",
        rows=("ControlNet, reference_only",),
    ),
    "ControlNet": Stand(
        "runs a model of its own on the call's rows, and keeps by row what it makes in its first call", calls="2+1",
        rows=("ControlNet", "ControlNet, shuffle", "ControlNet, InstantID", "ControlNet, inpaint_only"),
    ),
    "cached steps": Stand(
        "skips blocks in every other call", says="did not run in every step", rows=("DeepCache standalone",),
    ),
    "tiles": Stand(
        "several tiles in one call", calls="12",
        rows=("Tiled Diffusion, four at a time", "Mixture of Diffusers, four at a time"),
    ),
}
