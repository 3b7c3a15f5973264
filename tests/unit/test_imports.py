"""Imports point one way, and only the glue knows the host."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sag_pag"
LEVELS = {
    "settings": 0, "guidance": 0, "patching": 0, "blocks": 0, "pages": 0, "presets": 1, "migration": 1, "attention": 1,
    "branch": 2, "session": 3, "cost": 4,
}
"""A module imports from lower levels only. Above all of them: ``webui``, ``demo`` and tools of the repository's own."""
TOP = ("webui", "demo", "benchmark", "readme")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CORE = [name for name in MODULES if not set(name.split(".")[1:2]) & set(TOP)]


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


def test_every_module_has_its_place() -> None:
    assert {name.split(".")[1] for name in MODULES if "." in name} <= {*LEVELS, *TOP}


@pytest.mark.parametrize("name", CORE)
def test_core_imports_only_what_is_below(name: str) -> None:
    if name == "sag_pag":
        assert not any(other.startswith("sag_pag") for other in imported(MODULES[name]))
        return
    own = LEVELS[name.split(".")[1]]
    for other in imported(MODULES[name]):
        if other.startswith("sag_pag."):
            assert LEVELS.get(other.split(".")[1], 99) < own, f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[1:2] == ["demo"]])
def test_the_demo_does_not_need_the_webui(name: str) -> None:
    for other in imported(MODULES[name]):
        assert other.split(".")[0] != "modules", f"{name} imports {other}"
        if other.startswith("sag_pag.webui."):
            assert other.removeprefix("sag_pag.webui.") in ("panel", "texts"), f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in CORE])
def test_the_panel_and_the_demo_are_all_that_does_without_the_webui(name: str) -> None:
    uses_host = any(other.split(".")[0] == "modules" for other in imported(MODULES[name]))
    assert not uses_host or (name.startswith("sag_pag.webui.") and name != "sag_pag.webui.panel")


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[1:2] == ["webui"]])
def test_the_glue_does_not_know_the_demo(name: str) -> None:
    assert not any(other.startswith("sag_pag.demo") for other in imported(MODULES[name]))


def test_the_core_can_be_imported_without_webui_and_gradio() -> None:
    program = """
import importlib, sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modules", "gradio", "ldm", "sgm", "k_diffusion", "launch"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Nowhere())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    outside = [name for name in MODULES if name.split(".")[1:2] not in (["webui"], ["demo"])]
    command = [sys.executable, "-c", program, *outside]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
