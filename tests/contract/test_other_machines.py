"""Pictures that another machine has made are put into the batch beside ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from double import Host
from PIL import Image


@pytest.mark.parametrize("settings", [{"pag_scale": 3}, {"sag_scale": 1, "sag_show": True}], ids=str)
def test_they_do_not_get_our_claim(host: Host, settings: dict[str, Any]) -> None:
    """stable-diffusion-webui-distributed has every script see the pictures of its workers after the master's own."""
    texts: dict[int, str] = {}
    own = host.script.postprocess_image

    def with_others(p: Any, pp: Any, *args: Any) -> None:
        own(p, pp, *args)
        texts[p.batch_index] = host.processing.create_infotext(p)
        if p.batch_index == 1:
            for index in (2, 3):
                p.batch_index = index
                own(p, SimpleNamespace(image=Image.new("RGB", (64, 48))), *args)
                texts[index] = host.processing.create_infotext(p)

    host.script.postprocess_image = with_others
    host.generate(settings, batch_size=2)
    assert ["AG: True" in texts[index] for index in range(4)] == [True, True, False, False]
    assert host.swallowed() == []


def test_what_sag_saw_keeps_the_text_of_its_own_picture(host: Host) -> None:
    """The batch's size grows by the workers' pictures once all batches are made."""
    own, own_batch = host.script.postprocess_image, host.script.postprocess_batch

    def numbered(p: Any, pp: Any, *args: Any) -> None:
        own(p, pp, *args)
        p.extra_generation_params["Picture"] = f"{p.iteration}.{p.batch_index}"

    def grown(p: Any, *args: Any, **kwargs: Any) -> None:
        own_batch(p, *args, **kwargs)
        if p.iteration == 1:
            p.batch_size = 5

    host.script.postprocess_image, host.script.postprocess_batch = numbered, grown
    p = host.processing_for({"sag_scale": 1, "sag_show": True}, batch_size=2, n_iter=2)
    made = host.processing.process_images(p)
    sheets = [text for text in made.infotexts if "SAG sheet" in text]
    assert [text.split("Picture: ")[1][:3] for text in sheets] == ["0.0", "0.1", "1.0", "1.1"]
