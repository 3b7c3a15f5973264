"""Every text of the panel that is not a parameter's own label or help.

Each is shown as a text of its own, never joined to another, so that the WebUI's localisation files can translate it.
"""

PANEL = "Self-Attention & Perturbed-Attention Guidance"
BOTH = "Both: contrast and hires. fix"

OFF = "off"
PER_STEP = "per guided step"
PER_PICTURE = "for this picture"
COST_HELP = "Computing, compared with the same picture without guidance; hires. fix is not counted"
NOT_USABLE = "a setting can't be used"

NO_MODEL = "No model is loaded yet."
CHOOSE_MANY = "U-Net blocks to perturb"
CHOOSE_ONE = "U-Net block to read"
MAP_HELP = "Click to choose, shift-click for a range. From left to right as the U-Net runs, lower is coarser."
MAP_HELP_ONE = "Click to choose. From left to right as the U-Net runs, lower is coarser."
RESOLUTION = "resolution"
HEADS = "heads"
ALONE = "cost alone"
TRANSFORMERS = "Transformer blocks"

SEEN = "What SAG saw: in orange what it blurs, and below how much attention each place got (bright is much)"
PERCENT = "{:.0%} of the way"

PRESET = "Preset"
PRESET_HELP = "Sets all controls below; the sentence under it says when to use it."
PRESET_NAME = "Name of the preset"
SAVE = "Save the panel's values as a preset of your own"
RENAME = "Rename the chosen preset"
DELETE = "Delete the chosen preset"
READ_AGAIN = "Read the presets again"
YES = "Do it"
NO = "Leave everything as it is"
ASK_SAVE = "A name that you have used already gets the new values."
ASK_RENAME = "The new name?"
ASK_DELETE = "Delete this preset?"
SAVED = "Saved as"
RENAMED = "Renamed to"
DELETED = "Deleted:"
