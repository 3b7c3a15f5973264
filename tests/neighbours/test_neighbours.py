"""Every row of the table: null, tiny, off again, the picture's text, refusals. Writes ``docs/neighbours.csv``.

Where the map has one token identity attention is attention and an empty mask is none: guidance must do nothing there.
At a scale near 0 the picture must be the unguided one: what differs, our calls have done to the host's. A picture in a
batch must be the one that it is alone, as far as it is without guidance. What guidance costs is counted.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from beside import Beside
from client import ApiError, Generation
from fitted import fitted, write_lora
from installations import Installation
from neighbour_cases import CASES, COMMITS, CONTROLNET, Case
from neighbours_table import FILE, write_table
from real_hosts import LEVEL, NULL, OURS, PROBE, TINY, difference, started
from server import Server
from stands_for import STANDS_FOR, Stand

GUIDED = {"pag_enabled": True, "pag_scale": 3, "sag_enabled": True, "sag_scale": 0.75}

Start = Callable[[str], Server]


@pytest.fixture(scope="session")
def server_with(
    webui_installation: Installation, neighbours_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """A WebUI with one neighbour in it; the one before is stopped."""
    running: dict[str, Server] = {}
    stack = contextlib.ExitStack()

    def start(folder: str) -> Server:
        if folder not in running:
            stack.close()
            running.clear()
            data = tmp_path_factory.mktemp("neighbour")
            write_lora(data / "models/Lora")
            extensions = {**OURS, **PROBE}
            if folder:
                extensions[folder] = fitted(neighbours_folder / folder, data / "fitted")
            running[folder] = stack.enter_context(started(
                webui_installation, neighbours_folder, data, extensions=extensions,
                arguments=["--controlnet-dir", f"{neighbours_folder}-tiny"] if folder == CONTROLNET else [],
            ))
        return running[folder]

    with stack:
        yield start


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """A row; all tests of one run one after the other."""
    row: Case = request.param
    return row


def write(case: Case, row: dict[str, str]) -> None:
    """Puts it into the table."""
    write_table([{"neighbour": case.name, **row}], [case.name for case in CASES])


def test_beside(case: Case, server_with: Start) -> None:
    server = server_with(case.folder)
    beside = Beside(case, server)
    elsewhere = None if case.scripts else beside.made()
    with server.client.options(**case.options):
        stands = [stand for stand in STANDS_FOR.values() if case.name in stand.rows]
        elsewhere = elsewhere or beside.made(idle=True)
        beside.made()  # a neighbour's first picture may differ by itself
        off = beside.made()
        row = {"commit": COMMITS.get(case.folder, ""), "off": beside.rows()}
        assert not case.acts or difference(off, elsewhere) > 0
        for feature in ("pag", "sag"):
            if feature == case.refused:
                _refused(feature, beside)
                row |= dict.fromkeys((feature, f"{feature}_null", f"{feature}_tiny"), "refused")
                continue
            null, tiny = beside.made(NULL[feature]), beside.made(TINY[feature])
            row[feature] = beside.rows()
            row[f"{feature}_null"] = str(difference(null, off)) if feature in case.null else "–"
            row[f"{feature}_tiny"] = str(difference(tiny, off))
            assert f"{feature.upper()}: True" in tiny.infotext
            assert ("SAG/PAG note" in tiny.infotext) == case.noted
            assert feature not in case.null or difference(null, off) <= LEVEL
            assert difference(tiny, off) <= LEVEL
        assert difference(beside.made(), off) == 0
        row["together"] = _together(beside) if case.together else "–"
        for stand in stands:
            _is_like_its_double(stand, beside, off, row)
    write(case, row)


def test_cost(case: Case, server_with: Start) -> None:
    server = server_with(case.folder)
    beside = Beside(case, server)
    with server.client.options(**case.options):
        plain = beside.operations()
        features = [feature for feature in ("pag", "sag") if feature != case.refused]
        costs = {feature: beside.operations(TINY[feature]) / plain for feature in features}
    write(case, {f"{feature}_cost": f"{costs[feature]:.2f}" if feature in costs else "refused" for feature in TINY})
    assert all(costs[feature] <= most for feature, most in zip(TINY, case.most, strict=True) if feature in costs)


def _refused(feature: str, beside: Beside) -> None:
    """The answer names the neighbour and the way out; for the log it is no failure."""
    before = beside.server.log_mark()
    refused = beside.made(TINY[feature], expect=422)
    assert refused.body["body"]["neighbour"] in refused.body["detail"]
    assert "switch" in refused.body["detail"]
    assert "Traceback" not in beside.server.log(before)


def _is_like_its_double(stand: Stand, beside: Beside, off: Generation, row: dict[str, str]) -> None:
    """What is taken to be so of a double is so of the real extension."""
    assert row["pag"] == (stand.calls or row["pag"])
    assert stand.says in beside.made(TINY["pag"]).infotext
    if stand.needs:
        beside.server.client.call(f"/probe/without/{stand.needs}/1", {})
        try:
            wrong = [_is_wrong(beside, settings, off) for settings in (*NULL.values(), *TINY.values())]
        finally:
            beside.server.client.call(f"/probe/without/{stand.needs}/0", {})
        assert any(wrong)


def _is_wrong(beside: Beside, settings: dict[str, float], off: Generation) -> bool:
    """Whether a picture that should be as without guidance can't be had, is another or says that it is not guided."""
    try:
        made = beside.made(settings)
    except ApiError:
        return True
    return "not applied" in made.infotext or difference(made, off) > LEVEL


def _together(beside: Beside) -> str:
    """How far pictures of a batch are from those made alone, without guidance and with it."""
    guidance = {name: setting for name, setting in GUIDED.items() if not name.startswith(beside.case.refused or "-")}
    without, guided = beside.apart_and_together(), beside.apart_and_together(guidance)
    assert guided <= without + LEVEL
    return f"{without}, {guided}"


def _controlnet(server_with: Start, name: str) -> Beside:
    case = next(case for case in CASES if case.name == name)
    return Beside(case, server_with(CONTROLNET))


def test_what_a_reference_picture_leaves_in_the_model_costs_nothing(server_with: Start) -> None:
    beside = _controlnet(server_with, "ControlNet, reference_only")
    off = beside.made(idle=True)
    beside.made()
    assert difference(beside.made(TINY["pag"], idle=True), off) <= LEVEL
    assert beside.rows() == "3"


def test_beside_controlnet_pag_adds_what_it_adds_alone(server_with: Start) -> None:
    """Nothing of ControlNet's, nor what runs before the first perturbed attention, runs again for it."""
    beside = _controlnet(server_with, "ControlNet")
    added = [
        beside.operations(TINY["pag"], idle=idle) - beside.operations(idle=idle) for idle in (True, False)
    ]
    assert added[1] == pytest.approx(added[0], rel=0.01)


@pytest.mark.parametrize("name", ["ControlNet", "ControlNet, reference_only", "HyperTile (built in)"])
def test_blurred_queries_beside(server_with: Start, name: str) -> None:
    """One query is its own mean. A reference's tokens are keys too, which perturbed rows do without."""
    case = next(case for case in CASES if case.name == name)
    beside, blurred = Beside(case, server_with(case.folder)), {"pag_perturbation": "blurred queries"}
    with beside.server.client.options(**case.options):
        beside.made()
        off = beside.made()
        null, tiny = beside.made({**NULL["pag"], **blurred}), beside.made({**TINY["pag"], **blurred})
    assert "blurred queries" in tiny.infotext
    assert "SAG/PAG note" not in tiny.infotext
    assert difference(tiny, off) <= LEVEL
    assert "pag" not in case.null or difference(null, off) <= LEVEL


def test_every_double_stands_for_rows_of_the_table() -> None:
    assert {row for stand in STANDS_FOR.values() for row in stand.rows} <= {case.name for case in CASES}


def test_the_table_is_that_of_the_results() -> None:
    """What is shown in the docs is what the CSV holds."""
    from neighbours_table import PAGE, table

    with FILE.open(encoding="utf-8", newline="") as file:
        assert table(list(csv.DictReader(file))) in PAGE.read_text(encoding="utf-8")
