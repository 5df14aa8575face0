"""The README's Python example runs, and its commands exist."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from relrep_onnx.cli import main

ROOT = Path(__file__).parents[1]


def test_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 4
    assert result.failed == 0


def test_commands_and_options_exist() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for command, options in re.findall(r"^ *relrep-onnx (\w+)([^#|&\n]*)", text, flags=re.MULTILINE):
        known = {option for parameter in main.commands[command].params for option in parameter.opts}
        assert set(re.findall(r" (--[a-z-]+)", options)) <= known, (command, options)


def test_links_point_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
