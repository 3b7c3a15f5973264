"""What pictures made with other extensions say, in our fields."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_infotext import paste, read, write

from sag_pag.settings import PARAMETERS, Settings
from sag_pag.webui.migration import migrate

START = "Steps: 20, Sampler: Euler a, CFG scale: 6, Seed: 1, Size: 1024x1024, "


def migrated(line: str) -> Settings:
    """The controls after pasting."""
    fields = read(START + line)
    fields.update(migrate(fields).fields)
    return paste(write(fields), Settings(sag_scale=2.5, pag_blocks="input.4", rescale=0.5, pag_end=0.3))


def notes(line: str) -> str:
    return " ".join(migrate(read(START + line)).notes)


@pytest.mark.parametrize(("line", "expected"), [
    ("SAG Guidance Scale: 0.75, SAG Mask Threshold: 1", Settings(sag_enabled=True)),
    ("SAG Guidance Scale: 1.2, SAG Mask Threshold: 1.5",
     Settings(sag_enabled=True, sag_scale=1.2, sag_threshold=1.5)),
    ("sag_enabled: True, sag_scale: 0.5, sag_blur_sigma: 1.3, sag_threshold: 0.9",
     Settings(sag_enabled=True, sag_scale=0.5, sag_blur_sigma=1.3, sag_threshold=0.9)),
    ("PerturbedAttentionGuidance_enabled: True, PerturbedAttentionGuidance_scale: 2.5",
     Settings(pag_enabled=True, pag_scale=2.5)),
    ("pagi_enabled: True, pagi_scale: 4, pagi_attenuation: 0, pagi_start_step: 0, pagi_end_step: 1",
     Settings(pag_enabled=True, pag_scale=4.0)),
    ("pag_enabled: True, pag_scale: 3, pag_rescale: 0.3, pag_rescale_mode: partial, pag_adaptive_scale: 0, "
     "pag_block: output, pag_block_id: 5, pag_block_list: , Version: f2",
     Settings(pag_enabled=True, pag_blocks="output.5", rescale=0.3, rescale_mode="partial")),
    ('pag_enabled: True, pag_scale: 2, pag_block: middle, pag_block_id: 0, pag_block_list: "d2.2-9, u0.4"',
     Settings(pag_enabled=True, pag_scale=2.0, pag_blocks="d2.2-9, u0.4")),
    ("pag_enabled: True, pag_scale: 2, pag_rescale: 0.2, pag_rescale_mode: snf",
     Settings(pag_enabled=True, pag_scale=2.0, rescale=1.0, rescale_mode="snf")),
    ("pag_enabled: True, pag_scale: 2, pag_hr_override: True, pag_hr_scale: 1.5, pag_hr_rescale: 0, "
     "pag_hr_rescale_mode: full, pag_hr_adaptive_scale: 0",
     Settings(pag_enabled=True, pag_scale=2.0, hires_own_scales=True, hires_pag_scale=1.5)),
    ("seg_enabled: True, seg_scale: 3, seg_rescale: 0, seg_rescale_mode: full, seg_blur_sigma: -1, seg_block: middle, "
     "seg_block_id: 0, seg_block_list: , Version: f2",
     Settings(pag_enabled=True, pag_perturbation="blurred queries")),
    ('seg_enabled: True, seg_scale: 2, seg_rescale: 0.3, seg_blur_sigma: 9.5, seg_block_list: "m0, u0.0-5"',
     Settings(pag_enabled=True, pag_scale=2.0, pag_perturbation="blurred queries", pag_query_blur=9.5, rescale=0.3,
              pag_blocks="m0, u0.0-5")),
    ("seg_enabled: True, seg_scale: 3, seg_blur_sigma: 9999", Settings(pag_enabled=True,
                                                                     pag_perturbation="blurred queries")),
    ("seg_enabled: True, seg_scale: 2, seg_hr_override: True, seg_hr_scale: 1.5",
     Settings(pag_enabled=True, pag_scale=2.0, pag_perturbation="blurred queries", hires_own_scales=True,
              hires_pag_scale=1.5)),
    ("Steer: pag", Settings(pag_enabled=True)),
    ("Steer: pag scale=4.5 blocks=output%201%2C%20down%207.0%2C%20mid", Settings(
        pag_enabled=True, pag_scale=4.5, pag_blocks="output.1, input.7.0, middle")),
    ("Steer: seg", Settings(pag_enabled=True, pag_perturbation="blurred queries")),
    ("Steer: seg scale=2.5 blur_sigma=9.5 blocks=middle%200.1", Settings(
        pag_enabled=True, pag_scale=2.5, pag_perturbation="blurred queries", pag_query_blur=9.5,
        pag_blocks="middle.1")),
    ("Steer: pag scale=2.0; sag scale=0.7 blur_sigma=1.2 threshold=0.9", Settings(
        sag_enabled=True, sag_scale=0.7, sag_blur_sigma=1.2, sag_threshold=0.9, pag_enabled=True, pag_scale=2.0)),
    ("pag_enabled: True, pag_scale: 2, pag_hr_override: False", Settings(pag_enabled=True, pag_scale=2.0)),
    ("sag_enabled: True, sag_scale: 0.6, sag_blur_sigma: 1, pag_enabled: True, pag_scale: 2, pag_hr_override: True, "
     "pag_hr_scale: 1",
     Settings(sag_enabled=True, sag_scale=0.6, pag_enabled=True, pag_scale=2.0, hires_own_scales=True,
              hires_pag_scale=1.0, hires_sag_scale=0.6)),
])  # fmt: skip
def test_what_means_the_same_is_taken_over_without_a_note(line: str, expected: Settings) -> None:
    on = [p for p in PARAMETERS.values() if p.feature == "both" or getattr(expected, f"{p.feature}_enabled")]
    result = migrated(line)
    assert {p.name: getattr(result, p.name) for p in on} == {p.name: getattr(expected, p.name) for p in on}
    assert (result.sag_enabled, result.pag_enabled) == (expected.sag_enabled, expected.pag_enabled)
    assert notes(line) == ""
    assert migrate(read(START + line)).message.endswith("were read from the text.")


@pytest.mark.parametrize(("line", "expected", "note"), [
    ("sag_enabled: True, sag_scale: 0.5, sag_blur_sigma: 2, Version: f1.0.0v2-v1.10.1RC-latest-2502-g630cf49b",
     {"sag_scale": 0.5, "sag_blur_sigma": 2.0}, "wider here"),
    ("PAG Active: True, PAG SANF: True, PAG Scale: 1, PAG Start Step: 0, PAG End Step: 2048, Version: v1.10.1",
     {"pag_scale": 1.0, "pag_blocks": "middle.0", "rescale": 0.0, "rescale_mode": "full"}, "saliency fusion"),
    ("PAG Active: True, PAG Scale: 1, Version: v1.9.3", {"pag_scale": 1.0}, "output layer"),
    ("PAG Active: True, PAG Scale: 2, PAG Start Step: 4, PAG End Step: 150", {"pag_start": 0.0}, "range of steps"),
    ("PAG Active: True, PAG Scale: 2, PAG End Step: 10", {"pag_end": 1.0}, "range of steps"),
    ("PAG Active: True, PAG Scale: 2, CFG Interval Enable: True", {"pag_scale": 2.0}, "CFG schedule"),
    ("SAG Guidance Scale: -1, SAG Mask Threshold: 1", {"sag_enabled": False}, "SAG was left off"),
    ("SAG Guidance Scale: much", {"sag_scale": 0.75}, "no number"),
    ("sag_enabled: True, sag_scale: 1, sag_threshold: 3.5, sag_blur_sigma: 1", {"sag_threshold": 1.0}, "3.5"),
    ("pagi_enabled: True, pagi_scale: 30", {"pag_enabled": False}, "PAG was left off"),
    ("pagi_enabled: True, pagi_scale: 3, pagi_attenuation: 5", {"pag_fade": False}, "attenuation"),
    ("pagi_enabled: True, pagi_scale: 3, pagi_start_step: 0.15, pagi_end_step: 0.6", {"pag_end": 1.0}, "0.15 to 0.6"),
    ("pag_enabled: True, pag_scale: 3, pag_block: middle, pag_block_id: 1", {"pag_enabled": False}, "no block middle"),
    ("pag_enabled: True, pag_scale: 3, pag_block_list: x9", {"pag_enabled": False}, "x9"),
    ("pag_enabled: True, pag_scale: 3, pag_adaptive_scale: 0.1", {"pag_fade": False, "pag_scale": 3.0}, "Fade"),
    ("pag_enabled: True, pag_scale: 3, pag_rescale_mode: odd", {"rescale_mode": "full"}, "odd"),
    ("pag_enabled: True, pag_scale: 3, pag_sigma_start: 5.42, pag_sigma_end: 0.28", {"pag_start": 0.0}, "sigmas"),
    ("pag_enabled: True, pag_scale: 3, pag_hr_override: True, pag_hr_scale: 2, pag_hr_rescale: 0.5, pag_hr_cfg: 4",
     {"hires_pag_scale": 2.0, "rescale": 0.0}, "hires pass (4)"),
    ("seg_enabled: True, seg_scale: 3, seg_blur_sigma: 0.25", {"pag_query_blur": 100.0}, "seg_blur_sigma 0.25"),
    ("seg_enabled: True, seg_scale: 3, seg_hr_override: True, seg_hr_scale: 2, seg_hr_blur_sigma: 4",
     {"hires_pag_scale": 2.0, "pag_query_blur": 100.0}, "Rescale and blur"),
    ("pag_enabled: True, pag_scale: 2, seg_enabled: True, seg_scale: 3", {"pag_perturbation": "identity"}, "as well"),
    ("Steer: fdg; pag scale=2.0; nag", {"pag_scale": 2.0}, "Steer's FDG, NAG were left out."),
    ("Steer: ag compare=Noise; sag blur_sigma=1.0", {"sag_scale": 0.5, "sag_blur_sigma": 1.0}, "AG was left out"),
    ("Steer: sag", {"sag_blur_sigma": 2.0}, "wider here"),
    ("Steer: sag scale=-1.0", {"sag_enabled": False}, "SAG was left off"),
    ("Steer: pag end=0.4", {"pag_end": 1.0}, "0 to 0.4"),
    ("Steer: pag blocks=output", {"pag_enabled": False}, "no block output"),
    ("Steer: seg scale=30", {"pag_enabled": False}, "Steer's seg scale 30 is not possible"),
    ("Steer: seg; pag scale=2.0", {"pag_scale": 2.0, "pag_perturbation": "identity"}, "Steer's SEG was on as well"),
    ("seg_enabled: True, seg_blur_sigma: 2, seg_scale: 3.5, seg_block: middle, seg_block_id: 0, seg_start_step: 0, "
     "seg_end_step: 0.5", {"pag_scale": 3.5, "pag_query_blur": 2.0, "pag_perturbation": "blurred queries"},
     "not the queries: the same settings steer otherwise. Its range of steps (0 to 0.5 of them)"),
    ("pag_enabled: True, pag_scale: 3, pagi_enabled: True, pagi_scale: 1", {"pag_scale": 3.0}, "was on as well"),
    ("sag_enabled: True, sag_blur_sigma: 1, pagi_enabled: True", {"sag_scale": 0.5, "pag_scale": 3.0}, "both work"),
    ("sag_enabled: True, sag_blur_sigma: 1, pag_enabled: True, pag_rescale: 0.5", {"rescale": 0.5}, "for PAG alone"),
])  # fmt: skip
def test_what_means_something_else_is_said(line: str, expected: dict[str, object], note: str) -> None:
    result = migrated(line)
    for name, value in expected.items():
        assert getattr(result, name) == value
    assert note in notes(line)
    assert note in migrate(read(START + line)).message


@given(adaptive=st.floats(0.18, 1.0), scale=st.floats(0.0, 20.0), timestep=st.integers(0, 999))
def test_the_adaptive_scale_is_exactly_a_fade(adaptive: float, scale: float, timestep: int) -> None:
    reference = max(0.0, scale - scale * adaptive**4 * (1000 - timestep))
    fields = {"pag_enabled": "True", "pag_scale": str(scale), "pag_adaptive_scale": str(adaptive)}
    migration = migrate(fields)
    assert migration.notes == ()
    written = migration.fields
    value = {p.name: p.parse(written[p.infotext]) for p in PARAMETERS.values() if p.infotext in written}
    progress, end = (999 - timestep) / 1000, float(value.get("pag_end", 1.0))
    scale_here = float(value["pag_scale"])
    faded = scale_here * (end - progress) / end if progress <= end and end > 0 else scale_here * (progress == end == 0)
    assert faded == pytest.approx(reference, abs=1e-9)


def test_what_has_no_part_here_is_none_of_ours() -> None:
    assert migrate(read(START + "Steer: fdg; ag compare=Noise")).message == ""
    together = migrate(read(START + "Steer: sag blur_sigma=1.0; pag; chg"))
    assert together.notes == ("Steer's CHG was left out.",)
    assert together.message.startswith("Guidance settings of Steer's SAG and Steer's PAG were read from the text.")


def test_ours_win() -> None:
    both = "PAG: True, PAG scale: 2.5, PAG Active: True, PAG Scale: 7, sag_enabled: True, sag_scale: 0.4"
    result = migrated(both)
    assert (result.pag_scale, result.pag_blocks) == (2.5, "middle")
    assert (result.sag_enabled, result.sag_scale) == (True, 0.4)
    assert migrated("PAG: True, PAG scale: 2.5, PAG Active: True").pag_scale == 2.5
    assert migrate(read(START + "PAG: True, PAG scale: 2.5, PAG Active: True, PAG Scale: 7")).message == ""
    shared = migrated("SAG: True, SAG scale: 1, pag_enabled: True, pag_scale: 2, pag_rescale: 0.7")
    assert (shared.sag_scale, shared.pag_scale, shared.rescale) == (1.0, 2.0, 0.0)


@pytest.mark.parametrize("line", [
    "", "Version: v1.10.1", "PAG Active: False, PAG Scale: 3", "pag_enabled: False, pag_scale: 3",
    "sag_enabled: False", "pagi_enabled: False, pagi_scale: 1", "pag_scale: 3",
])
def test_what_is_off_stays_off(line: str) -> None:
    migration = migrate(read(START + line))
    assert (migration.fields, migration.sources, migration.notes, migration.message) == ({}, (), (), "")
    assert not migrated(line).enabled


KEYS = (
    "SAG Guidance Scale", "SAG Mask Threshold", "sag_enabled", "sag_scale", "sag_blur_sigma", "sag_threshold",
    "PAG Active", "PAG Scale", "PAG SANF", "PAG Start Step", "PAG End Step", "pagi_enabled", "pagi_scale",
    "pagi_attenuation", "pagi_start_step", "pag_enabled", "pag_scale", "pag_rescale", "pag_rescale_mode",
    "pag_adaptive_scale", "pag_block", "pag_block_id", "pag_block_list", "pag_hr_override", "pag_hr_scale", "Steps",
    "pag_sigma_start", "seg_enabled", "seg_start_step", "seg_blur_sigma", "Steer",
    "PerturbedAttentionGuidance_enabled", "PerturbedAttentionGuidance_scale", "PAG", "SAG scale",
)
VALUES = st.sampled_from(
    ["True", "False", "", "nan", "inf", "1e999", "-1", "0", "1e300", "0.5", "3", "snf", "middle", "m0",
     "pag", "seg; ;sag", "pag =; seg scale", "sag scale=nan", "seg blur_sigma=-1 blocks=%", "pag blocks=down"]
)


@given(fields=st.dictionaries(st.sampled_from(KEYS), VALUES | st.text(max_size=8)))
def test_nothing_that_is_written_breaks_pasting(fields: dict[str, str]) -> None:
    """Whatever stands there, the fields that come out are ones that we accept."""
    for key, text in migrate(fields).fields.items():
        (parameter,) = (p for p in PARAMETERS.values() if p.infotext == key)
        parameter.parse(text)
