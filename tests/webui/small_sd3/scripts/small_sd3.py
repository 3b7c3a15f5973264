"""A test extension: makes the WebUI build its SD3 parts small, with the tiny CLIP's tokenizer and none for T5.

The WebUI reads the transformer's sizes from the checkpoint; those of text encoders and autoencoder are in its code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT_WIDTH = 64
"""Of each of the two CLIP text encoders."""
_CLIP = {"hidden_size": TEXT_WIDTH, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
AUTOENCODER_CHANNELS = 32


class TinyClip:
    """Stands for the tokenizer's class, and reads that of the tiny CLIP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def from_pretrained(self, _name: str) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(str(self.folder))


class NoT5:
    """Stands for T5's tokenizer, whose class and object it is: each text is an end and padding."""

    @classmethod
    def from_pretrained(cls, _name: str) -> NoT5:
        return cls()

    def __call__(self, *_: Any, **__: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, 0]}

    def get_vocab(self) -> dict[str, int]:
        return {"</s>": 1}


def shrink(clip_folder: Path) -> None:
    """Makes everything that is built from now on small."""
    from modules.models.sd3 import other_impls, sd3_cond, sd3_impls

    for config in (sd3_cond.CLIPL_CONFIG, sd3_cond.CLIPG_CONFIG):
        config.update(_CLIP)
    for module in (sd3_cond, other_impls):
        module.CLIPTokenizer, module.T5TokenizerFast = TinyClip(clip_folder), NoT5
    for half in (sd3_impls.VAEEncoder, sd3_impls.VAEDecoder):
        channels, *others = half.__init__.__defaults__
        half.__init__.__defaults__ = (min(channels, AUTOENCODER_CHANNELS), *others)


if __name__ != "__main__" and __name__ != "small_sd3":  # the WebUI runs its scripts under names of their own
    from modules import shared

    shrink(Path(shared.cmd_opts.ckpt_dir) / "clip-tiny")
