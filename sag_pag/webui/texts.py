"""Every text of the panel that is not a parameter's own label or help, nor a preset's.

Each is shown as a text of its own, never joined to another, so that the WebUI's localisation files can translate it.
They are in ``localizations``; what is not translated is in ``UNTRANSLATED``.
"""

from __future__ import annotations

from sag_pag.settings import Feature, Parameter

PANEL = "Self-Attention & Perturbed-Attention Guidance"
MORE = "More"
BOTH = "For both: softer contrast"
BOTH_AND_HIRES = "For both: softer contrast, hires. fix"

OFF = "off"
PER_STEP = "per guided step"
PER_PICTURE = "for this picture"
COST_HELP = "Computing, compared with the same picture without guidance; other extensions are not counted"
NOT_COUNTING = "not counting"
"""Before the names of the other extensions that are on."""
NOT_USABLE = "a setting can't be used"
ENDS_FIRST = "This ends before it starts: move Start down or End up."
PLOT_DECIDES = "the X/Y/Z plot decides"

NO_MODEL = "No model is loaded yet."
STANDS_IN = "The loaded model has none of these: the block on the map stands in for them."
CHOOSE_MANY = "Blocks to perturb"
CHOOSE_ONE = "Block to look at"
MAP_HELP = "Click to choose, shift-click for a range. From left to right as the model runs, lower is coarser."
MAP_HELP_ONE = "Click to choose. From left to right as the model runs, lower is coarser."
HALVES = {"input": "input", "output": "output", "joint": "joint blocks"}
NO_ATTENTION = "has no self-attention, so it can't be chosen"
RESOLUTION = "resolution"
HEADS = "heads"
ALONE = "cost alone"
TRANSFORMERS = "Transformer blocks"

CHOICES = {
    "full": "CFG and guidance together",
    "partial": "the guidance alone",
    "snf": "at each place the stronger of both",
    "identity": "attention off (PAG)",
    "blurred queries": "blurred attention (SEG)",
    "swapped tokens": "swapped places (SSG)",
}
"""What the panel calls the values of choices that have no plain name."""

TERMS = {
    "sag_blur_sigma": "The sigma of a Gaussian blur, in latent pixels",
    "pag_query_blur": "The sigma of a Gaussian blur of the queries, in tokens",
}
"""What those who know the field call a control's value, for its tooltip."""

SEEN_MASK = "Orange: what SAG blurs"
SEEN_ATTENTION = "Bright: what gets much attention"
SEEN = "SAG sheet: mask and attention"
"""Added to the infotext of the picture that the sheet belongs to."""
PERCENT = "{:.0%} of the way"
PASSES = {"first pass": "first pass: ", "hires pass": "hires pass: ", None: ""}
"""Before the share of the way, where a picture has several passes."""

PRESET = "Preset"
PRESET_HELP = "Sets all controls below; the sentence under it says when to use it."
CHANGED = "Changed since: what is set below counts."
FOLDED = "Switched off since: folding a part switches it off, unfolding it on."
PRESET_NAME = "Name of the preset"
SAVE = "Save the panel's values as a preset of your own"
RENAME = "Rename the chosen preset"
DELETE = "Delete the chosen preset"
READ_AGAIN = "Read the presets again"
YES = "Do it"
NO = "Leave everything as it is"
ASK_SAVE = "Type a name, then ✔. A name that you have used already gets the new values."
ASK_RENAME = "Type the new name, then ✔."
ASK_DELETE = "Delete this preset?"
SAVED = "Saved as"
RENAMED = "Renamed to"
DELETED = "Deleted:"
NEEDS_NAME = "A preset needs a name."
UNSEEN = "The name holds a character that can't be seen, such as a line break."
CHOOSE_OWN = "Choose a preset of your own first."

AXIS_GROUPS: dict[Feature, str] = {"sag": "SAG", "pag": "PAG", "both": "SAG/PAG"}
TICK = "✔."
UNTRANSLATED = (
    CHOOSE_ONE, SEEN_MASK, SEEN_ATTENTION, SEEN, PERCENT, *PASSES.values(), READ_AGAIN, TICK, *AXIS_GROUPS.values(),
)
"""Said to screen readers alone, drawn into a picture, joined to other texts, or never seen: the WebUI translates none
of these."""


def axis_label(parameter: Parameter) -> str:
    """A parameter's name in the X/Y/Z plot's list of axes, such as ``[PAG] Scale``."""
    group = AXIS_GROUPS[parameter.feature]
    label = "Enable" if parameter.name.endswith("_enabled") else parameter.label.removeprefix(f"{group} ")
    return f"[{group}] {label[0].upper()}{label[1:]}"


def parts(text: str) -> list[str]:
    """``text`` without its ticks: the WebUI translates no text with an emoji in it."""
    return [part.strip() for part in text.split(TICK)]
