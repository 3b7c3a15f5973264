"""The user's presets: what is kept, what is refused, and what becomes of a file that is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sag_pag.settings import PARAMETERS, SWAPPED, Settings, Value
from sag_pag.webui import presets
from sag_pag.webui.presets import BUILT_IN, Preset, PresetError, PresetStore, checked_name

STRONG = Settings(pag_enabled=True, pag_scale=4.5, pag_blocks="middle, output.3", rescale=0.2)
GOOD = {"name": "good", "values": {"pag_enabled": True, "pag_scale": 4.5}}


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> PresetStore:
    return PresetStore(tmp_path / "presets.json")


def own(store: PresetStore) -> dict[str, Settings]:
    return {preset.name: preset.settings() for preset in store.all() if not preset.built_in}


def files(store: PresetStore) -> list[str]:
    return sorted(path.name for path in store.path.parent.iterdir() if path.suffix != ".lock")


def test_built_in_presets() -> None:
    assert len({preset.name.casefold() for preset in BUILT_IN}) == len(BUILT_IN)
    for preset in BUILT_IN:
        assert checked_name(preset.name) == preset.name
        assert preset.description.endswith(".")
        assert preset.name == "Off" or "Rests on " in preset.description
        preset.settings().check_order()
        assert set(preset.values) <= set(PARAMETERS)
    by_name = {preset.name: preset.settings() for preset in BUILT_IN}
    assert by_name["Off"] == Settings()
    assert by_name["SD 1.5"] == Settings(pag_enabled=True, pag_scale=3.0, pag_blocks="middle")
    assert by_name["Few steps (Lightning, Turbo, LCM)"].pag_scale <= 0.5
    assert by_name["No prompt, or repair"].pag_scale == 5.0
    assert by_name["Detail (SAG)"] == Settings(sag_enabled=True, sag_scale=0.75, sag_threshold=1.0)


@pytest.mark.parametrize(("name", "shown", "others"), [
    ("Off", {}, set()),
    ("Off", {"pag_scale": 0.5, "sag_block": "output.3", "rescale": 1.0}, set()),  # nothing is on: it is still off
    ("Off", {"pag_enabled": True}, {"pag_enabled"}),
    ("Off", {"pag_enabled": True, "pag_scale": 0.5, "sag_scale": 1.0}, {"pag_enabled", "pag_scale"}),
    ("SDXL", {"pag_enabled": True, "pag_scale": 2.5, "pag_swap": 0.3}, set()),
    ("SDXL", {"pag_enabled": True, "pag_scale": 2.5, "pag_perturbation": SWAPPED}, {"pag_perturbation"}),
    ("SDXL", {"pag_scale": 2.5}, {"pag_enabled"}),
    ("SDXL", {"pag_scale": 2.0}, {"pag_enabled", "pag_scale"}),
])
def test_what_is_no_longer_as_in_the_preset(name: str, shown: dict[str, Value], others: set[str]) -> None:
    preset = next(preset for preset in BUILT_IN if preset.name == name)
    wanted = dict(zip(PARAMETERS, preset.settings().values(), strict=True))
    plain = dict(zip(PARAMETERS, Settings().values(), strict=True))
    assert preset.differences({**plain, **shown}) == {other: wanted[other] for other in others}


def test_save_rename_delete_and_a_new_start(store: PresetStore) -> None:
    assert store.all() == list(BUILT_IN)
    assert files(store) == []
    store.save("  Mine ", STRONG)
    store.save("Ähre 🌾", Settings())
    assert own(PresetStore(store.path)) == {"Mine": STRONG, "Ähre 🌾": Settings()}
    store.save("mine", Settings(sag_enabled=True))  # the same name
    assert own(store) == {"mine": Settings(sag_enabled=True), "Ähre 🌾": Settings()}
    store.rename("mine", "Mine")
    store.rename("Mine", "Other")
    assert list(own(PresetStore(store.path))) == ["Other", "Ähre 🌾"]
    store.delete("Other")
    store.delete("Ähre 🌾")
    assert own(PresetStore(store.path)) == {}
    assert files(store) == ["presets.json"]
    assert store.problem is None


def test_all_of_a_kind_of_settings_come_back(store: PresetStore) -> None:
    settings = Settings(
        sag_enabled=True, sag_scale=0.1 + 0.2, pag_enabled=True, pag_fade=True, rescale_mode="snf",
        hires_pass="hires pass", hires_own_scales=True, hires_pag_scale=1.0,
    )
    assert store.save("all", settings).settings() == settings
    assert store.get("ALL").settings() == settings
    assert set(store.get("all").values) == set(PARAMETERS)


def test_two_stores_of_one_file_see_each_other(store: PresetStore) -> None:
    """As two browser tabs, or txt2img and img2img, do."""
    other = PresetStore(store.path)
    store.save("a", STRONG)
    other.save("b", STRONG)
    store.rename("b", "c")
    assert set(own(other)) == set(own(store)) == {"a", "c"}


@pytest.mark.parametrize(("name", "said"), [
    ("", "needs a name"), ("   ", "needs a name"), (None, "needs a name"), ("x" * 61, "61 characters"),
    ("a\nb", "can't be seen"), ("a\u200bb", "can't be seen"), ("\u202eevil", "can't be seen"), ("SDXL", "built in"),
    (" sdxl ", "built in"), ("OFF", "built in"),
])  # fmt: skip
def test_bad_names(store: PresetStore, name: Any, said: str) -> None:
    store.save("mine", STRONG)
    with pytest.raises(PresetError, match=said):
        store.save(name, STRONG)
    with pytest.raises(PresetError, match=said):
        store.rename("mine", name)
    assert own(store) == {"mine": STRONG}


@given(name=st.text())
def test_any_name_is_taken_or_refused(name: str) -> None:
    try:
        taken = checked_name(name)
    except PresetError:
        return
    assert 1 <= len(taken) <= 60
    assert taken == taken.strip()
    assert taken.isprintable()
    assert checked_name(taken) == taken
    assert checked_name("x" * 60)


def test_what_can_not_be_done(store: PresetStore) -> None:
    store.save("a", STRONG)
    store.save("b", STRONG)
    for work, said in (
        (lambda: store.rename("a", "B"), "already"), (lambda: store.rename("Off", "x"), "built in"),
        (lambda: store.delete("SDXL"), "built in"), (lambda: store.delete("z"), "no preset"),
        (lambda: store.delete(""), "Choose"), (lambda: store.get("z"), "no preset"),
    ):
        with pytest.raises(PresetError, match=said):
            work()
    assert set(own(store)) == {"a", "b"}


def test_a_file_that_an_editor_has_marked_as_utf_8(store: PresetStore) -> None:
    """Windows' own editors put a byte order mark before it."""
    store.save("mine", STRONG)
    store.path.write_bytes(b"\xef\xbb\xbf" + store.path.read_bytes())
    assert own(store) == {"mine": STRONG}
    assert files(store) == ["presets.json"]


BROKEN = [
    b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[]", b'{"presets": {}}', b'{"presets": [], "more": 1}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_put_aside(store: PresetStore, content: bytes) -> None:
    (store.path.parent / "presets.broken-1.json").write_bytes(b"from before")
    store.path.write_bytes(content)
    assert own(store) == {}
    aside = store.path.with_name("presets.broken-2.json")
    assert aside.read_bytes() == content
    assert aside.name in str(store.problem)
    assert store.path.with_name("presets.broken-1.json").read_bytes() == b"from before"
    store.save("new", STRONG)
    assert own(store) == {"new": STRONG}
    assert files(store) == ["presets.broken-1.json", "presets.broken-2.json", "presets.json"]
    assert aside.name in str(store.problem), "still to be told"


@pytest.mark.parametrize(("entry", "said"), [
    (7, "an entry"), ({"name": "x"}, "an entry"), ({**GOOD, "name": "x", "more": 1}, "an entry"),
    ({"name": "x", "values": []}, "an entry"), ({"name": 3, "values": {}}, "needs a name"),
    ({"name": "SDXL", "values": {}}, "built in"), ({"name": "GOOD", "values": {}}, "two of the name"),
    ({"name": "x", "values": {"pag_scal": 3}}, "pag_scal"), ({"name": "x", "values": {"pag_scale": 99}}, "0 to 20"),
    ({"name": "x", "values": {"pag_scale": "3"}}, "0 to 20"), ({"name": "x", "values": {"pag_enabled": 1}}, "true"),
    ({"name": "x", "values": {"sag_scale": float("nan")}}, "0 to 5"), ({"name": "x", "values": {"cfg": 7}}, "cfg"),
    ({"name": "x", "values": {"pag_enabled": True, "pag_start": 0.9, "pag_end": 0.1}}, "pag_start"),
])  # fmt: skip
def test_one_bad_preset_does_not_lose_the_good_ones(store: PresetStore, entry: Any, said: str) -> None:
    content = json.dumps({"presets": [GOOD, entry]})
    store.path.write_text(content, encoding="utf-8")
    assert own(store) == {"good": Settings(pag_enabled=True, pag_scale=4.5)}
    assert store.path.with_name("presets.broken-1.json").read_text(encoding="utf-8") == content
    assert said in str(store.problem)
    assert "1 good one kept" in str(store.problem)
    assert own(PresetStore(store.path)) == {"good": Settings(pag_enabled=True, pag_scale=4.5)}
    assert files(store) == ["presets.broken-1.json", "presets.json"], "put aside once"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(
    store: PresetStore, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save("old", STRONG)
    before = store.path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(PresetError, match="disk full"):
            store.save("new", STRONG)
    assert store.path.read_bytes() == before
    assert files(store) == ["presets.json"]


def test_nothing_is_lost_if_the_broken_file_can_not_be_put_aside(
    store: PresetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps({"presets": [GOOD, 7]})
    store.path.write_text(content, encoding="utf-8")

    def fail(*_: Any) -> None:
        raise OSError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(presets, "_write_new", fail)
        for work in (store.all, lambda: store.save("new", STRONG), lambda: store.delete("good")):
            with pytest.raises(PresetError, match="read-only"):
                work()
    assert store.path.read_text(encoding="utf-8") == content


def test_a_file_that_can_not_be_read_is_left_alone(store: PresetStore) -> None:
    store.path.mkdir()
    with pytest.raises(PresetError, match="can't be read"):
        store.all()
    with pytest.raises(PresetError, match="can't be read"):
        store.save("x", STRONG)
    assert store.path.is_dir()


def test_the_file_is_replaced_not_written_into(store: PresetStore) -> None:
    """Who reads while it is written sees the old file or the new one."""
    store.save("a", STRONG)
    before = store.path.stat().st_ino
    with store.path.open("rb") as old:
        store.save("b", STRONG)
        assert store.path.stat().st_ino != before
        assert [entry["name"] for entry in json.loads(old.read())["presets"]] == ["a"]


def test_many_threads_at_once(store: PresetStore) -> None:
    start, failed = threading.Barrier(8), []

    def work(number: int) -> None:
        try:
            start.wait()
            for turn in range(6):
                store.save(f"{number}-{turn}", STRONG)
                assert f"{number}-{turn}" in own(store)
                if turn % 2:
                    store.rename(f"{number}-{turn}", f"{number}-{turn}-renamed")
                else:
                    store.delete(f"{number}-{turn}")
        except Exception as error:  # noqa: BLE001 - a thread's exception reaches nobody
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert set(own(store)) == {f"{number}-{turn}-renamed" for number in range(8) for turn in (1, 3, 5)}
    assert files(store) == ["presets.json"]


def test_many_processes_at_once(store: PresetStore) -> None:
    """Two WebUIs of one folder."""
    program = f"""
import sys
from pathlib import Path
from sag_pag.settings import Settings
from sag_pag.webui.presets import PresetStore

store = PresetStore(Path({str(store.path)!r}))
for turn in range(10):
    store.save(f"{{sys.argv[1]}}-{{turn}}", Settings())
"""
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen([*command, str(number)], cwd=REPOSITORY) for number in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert set(own(store)) == {f"{number}-{turn}" for number in range(3) for turn in range(10)}


def test_looking_writes_nothing(store: PresetStore) -> None:
    """For the HTTP route: the good ones, what is wrong, and no path of this machine."""
    store.path.write_text(json.dumps({"presets": [GOOD, 7]}), encoding="utf-8")
    before = store.path.read_bytes()
    presets_found, problem = store.look()
    assert [preset.name for preset in presets_found if not preset.built_in] == ["good"]
    assert "preset 2" in str(problem)
    assert str(store.path.parent) not in str(problem)
    assert store.path.read_bytes() == before
    assert files(store) == ["presets.json"]
    store.all()
    assert store.look()[1] == store.problem
    assert str(store.path.parent) not in str(store.problem)


def test_a_broken_file_is_put_aside_once_by_many_threads(store: PresetStore) -> None:
    store.path.write_text(json.dumps({"presets": [GOOD, 7]}), encoding="utf-8")
    seen: list[list[Preset]] = []
    threads = [threading.Thread(target=lambda: seen.append(store.all())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found) for found in seen] == [len(BUILT_IN) + 1] * 8
    assert files(store) == ["presets.broken-1.json", "presets.json"]


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["name", "values", "presets", "pag_scale", "pag_enabled", "sag_block"]), inner, max_size=3
    ), max_leaves=12,
)


@given(content=st.fixed_dictionaries({"presets": st.lists(values, max_size=3)}) | values)
def test_whatever_stands_in_the_file_it_can_be_read_and_used(
    content: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = PresetStore(tmp_path_factory.mktemp("any") / "presets.json")
    store.path.write_text(json.dumps(content), encoding="utf-8")
    for preset in store.all():
        preset.settings()
    store.save("new", STRONG)
    again = PresetStore(store.path)
    assert own(again) == own(store)
    assert again.problem is None
