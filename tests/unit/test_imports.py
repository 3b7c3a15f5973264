"""Imports point one way, and only hosts, neighbours and the WebUI's own part know a host."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "sag_pag"
MAY_IMPORT: dict[str, set[str]] = {
    "settings": set(),
    "guidance": set(),
    "engine": {"settings", "guidance"},
    "hosts": {"engine", "settings", "guidance"},
    "neighbours": {"engine", "settings", "guidance"},
    "webui": {"hosts", "neighbours", "engine", "settings", "guidance"},
    "demo": {"engine", "settings", "guidance"},
}
"""For each room of the package, the rooms that it may import from, beside itself."""
PANEL = {"sag_pag.webui", "sag_pag.webui.panel", "sag_pag.webui.texts"}
"""What the demo's page shows of the WebUI's part."""
KNOW_A_HOST = {"hosts", "neighbours", "webui"}
HOSTS_OWN = {"modules", "modules_forge", "backend", "ldm_patched", "ldm", "sgm", "k_diffusion", "launch"}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name: str) -> str:
    return [*name.split("."), ""][1]


def imported(path: Path) -> set[str]:
    """The full names of all modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return names


def test_every_module_has_its_room() -> None:
    assert {room(name) for name in MODULES} == {"", *MAY_IMPORT}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    allowed = MAY_IMPORT.get(room(name), set()) | {room(name)}
    for other in imported(MODULES[name]):
        if not other.startswith("sag_pag."):
            assert other.split(".")[0] != "lab", f"{name} imports {other}"
            continue
        from_the_panel = room(name) == "demo" and other in PANEL
        assert room(other) in allowed or from_the_panel, f"{name} imports {other}"


@pytest.mark.parametrize("name", MODULES)
def test_only_some_know_a_host(name: str) -> None:
    used = {other.split(".")[0] for other in imported(MODULES[name])} & HOSTS_OWN
    assert not used or room(name) in KNOW_A_HOST, f"{name} imports {used}"


@pytest.mark.parametrize("name", sorted(PANEL))
def test_the_panel_needs_no_webui(name: str) -> None:
    assert not any(other.split(".")[0] in HOSTS_OWN for other in imported(MODULES[name]))


def test_the_core_can_be_imported_without_webui_and_gradio() -> None:
    program = f"""
import importlib, sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted({*HOSTS_OWN, "gradio"})}:
            raise ImportError(name)

sys.meta_path.insert(0, Nowhere())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    outside = [name for name in MODULES if room(name) not in {*KNOW_A_HOST, "demo"}]
    command = [sys.executable, "-c", program, *outside]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
