"""Controls, metadata fields, and being loaded once more by "Reload UI"."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from double import SCRIPT_FILES, TITLE, Host

from sag_pag.settings import PARAMETERS, Settings
from sag_pag.webui.texts import CHOICES


def controls(host: Host, *, is_img2img: bool = False) -> list[Any]:
    host.script.is_img2img = is_img2img
    made: list[Any] = host.script.ui(is_img2img)
    return made


def test_controls_are_in_positional_order_with_the_defaults(host: Host) -> None:
    made = controls(host)
    assert [control.value for control in made] == list(Settings().values())
    for control, parameter in zip(made, PARAMETERS.values(), strict=True):
        assert control.label == parameter.label
        assert parameter.name in control.elem_id
        if parameter.kind == "float":
            about = control.kwargs
            assert (about["minimum"], about["maximum"], about["step"]) == (
                parameter.minimum, parameter.maximum, parameter.step
            )
        if parameter.kind == "choice":
            assert control.kwargs["choices"] == [(CHOICES.get(choice, choice), choice) for choice in parameter.choices]


def test_ids_are_told_apart(host: Host) -> None:
    gradio = sys.modules["gradio"]
    gradio.made.clear()
    for is_img2img in (False, True):
        controls(host, is_img2img=is_img2img)
    ids = [block.elem_id for block in gradio.made if block.elem_id]
    assert len(ids) == len(set(ids))
    assert any("txt2img" in text for text in ids)
    assert any("img2img" in text for text in ids)


def test_help_is_shown_for_every_parameter(host: Host) -> None:
    gradio = sys.modules["gradio"]
    gradio.made.clear()
    controls(host)
    shown = [block.kwargs.get("info") for block in gradio.made] + [block.value for block in gradio.made]
    for parameter in PARAMETERS.values():
        assert parameter.help in shown


def test_an_older_webui_without_the_accordion(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sag_pag.webui.script.InputAccordion", None)
    made = controls(host)
    assert [control.value for control in made] == list(Settings().values())
    assert {type(made[0]).__name__, type(made[7]).__name__} == {"Checkbox"}


def test_the_script_is_always_on_in_both_tabs(host: Host) -> None:
    for is_img2img in (False, True):
        runner = host.scripts.ScriptRunner(is_img2img=is_img2img)
        assert runner.find(TITLE) in runner.alwayson_scripts
        assert runner.defaults[runner.find(TITLE).args_from :] == list(Settings().values())


def test_reloading_the_ui_does_not_double_anything(host: Host) -> None:
    expected = host.generate({"sag_scale": 1, "pag_scale": 3})
    counts = {kind: len(registered) for kind, registered in host.script_callbacks.callbacks.items()}
    for _ in range(2):
        host.scripts.load_scripts(*SCRIPT_FILES)
        host.script_callbacks.run("before_ui")
        host.txt2img = host.scripts.ScriptRunner()
    assert {kind: len(registered) for kind, registered in host.script_callbacks.callbacks.items()} == counts
    assert max(counts.values()) == 1
    assert torch.equal(host.generate({"sag_scale": 1, "pag_scale": 3})[0], expected[0])
    assert [d.script_class.__name__ for d in host.scripts.scripts_data].count("GuidanceScript") == 1


def test_reloading_while_a_guided_run_was_cut_short(host: Host) -> None:
    def fail(step: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        host.generate({"pag_scale": 3}, callback=fail)
    host.scripts.load_scripts(*SCRIPT_FILES)
    assert torch.equal(host.generate({})[0], host.plain()[0])


def pasted(host: Host, infotext: str) -> list[Any]:
    """The script's arguments after "Read generation parameters"; the controls stand at odd values before.

    The API's ``infotext`` field asks the same functions. What they leave of the text is for others.
    """
    fields = dict(part.split(": ", 1) for part in infotext.splitlines()[-1].split(", ") if ": " in part)
    before = dict(fields)
    host.script_callbacks.run("infotext_pasted", infotext, fields)
    assert fields == before
    standing = [True, 4.0, 2.0, 3.0, "input.1", 0.3, 0.4, True, 9.0, "input.1", 0.3, 0.4, True,
                0.9, "snf", "hires pass", True, 4.0, 9.0, True, "swapped tokens", 5.0, 0.4, 4, 5]  # fmt: skip
    values = []
    for (control, read), odd in zip(host.script.infotext_fields, standing, strict=True):
        value = read(fields)
        assert value is None or type(value) is type(control.value)
        values.append(odd if value is None else value)
    return values


def test_what_a_pasted_text_says_and_can_not_be(host: Host) -> None:
    """Left out and said, so that it does not stand in a control and refuse every picture."""
    args = pasted(host, "a cat\nSteps: 4, PAG: True, PAG scale: 40, PAG end: 0.5")
    settings = Settings.from_list(args)
    assert (settings.pag_enabled, settings.pag_scale, settings.pag_end) == (True, 3.0, 0.5)


@pytest.mark.parametrize(("disregarded", "expected"), [
    ((), {"pag_enabled": True, "pag_scale": 4.0, "pag_fade": False, "sag_enabled": False, "rescale": 0.0}),
    (("PAG scale",), {"pag_enabled": True, "pag_scale": 9.0, "pag_fade": False, "sag_enabled": False}),
    (("PAG", "SAG"), {"pag_enabled": True, "pag_scale": 4.0, "pag_fade": True, "sag_enabled": True, "rescale": 0.9}),
    (("PAG", "PAG scale", "Seed"), {"pag_enabled": True, "pag_scale": 9.0, "sag_enabled": False}),
])
def test_fields_that_are_to_be_disregarded_stay_as_they_are(
    host: Host, disregarded: tuple[str, ...], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The WebUI has taken them out of the text by then."""
    monkeypatch.setattr(host.shared.opts, "infotext_skip_pasting", list(disregarded), raising=False)
    fields = {"Steps": "4", "PAG": "True", "PAG scale": "4"}
    kept = ", ".join(f"{key}: {value}" for key, value in fields.items() if key not in disregarded)
    settings = Settings.from_list(pasted(host, f"a cat\n{kept}"))
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("settings", [
    {}, {"sag_scale": 1.25}, {"pag_scale": 3}, {"pag_scale": 2.05, "pag_fade": True, "pag_blocks": "output.0-1"},
    {"sag_scale": 0.1 + 0.2, "sag_threshold": 0.95, "sag_block": "output.0", "sag_end": 0.9, "pag_scale": 1},
    {"sag_scale": 1, "rescale": 0.7, "rescale_mode": "partial"}, {"sag_scale": 0}, {"sag_blur_sigma": 2},
])
def test_a_pasted_picture_comes_out_again(host: Host, settings: dict[str, Any]) -> None:
    p = host.processing_for(settings)
    result = host.processing.process_images(p)
    values = pasted(host, result.infotexts[0])
    assert torch.equal(host.generate(*values)[0], result.latents[0])


def test_metadata_of_an_unguided_picture(host: Host) -> None:
    p = host.processing_for({"sag_enabled": False, "pag_enabled": False, "pag_scale": 9})
    plain = host.processing.create_infotext(host.processing.Processing())
    assert host.processing.process_images(p).infotexts == [plain]


def test_fields_that_are_sent_between_tabs(host: Host) -> None:
    """The same functions in both tabs: the WebUI compares them."""
    controls(host)
    readers = [read for _, read in host.script.infotext_fields]
    assert readers == host.script.paste_field_names
    controls(host)
    assert all(a is b for a, b in zip(readers, host.script.paste_field_names, strict=True))


def test_names_of_the_arguments(host: Host) -> None:
    """Programs that pass arguments by name look for the names like this; None is what they were not given."""
    names = inspect.getfullargspec(host.script.process).args
    assert names == ["self", "p", *PARAMETERS]
    given = {"pag_scale": 2.5, "pag_blocks": "input.1"}
    expected = host.generate(given)[0]
    assert torch.equal(host.generate(*(given.get(name) for name in names[2:]))[0], expected)
    assert torch.equal(host.generate(*(None for _ in names[2:]))[0], host.plain()[0])
    assert len(set(host.script.paste_field_names)) == len(PARAMETERS)
