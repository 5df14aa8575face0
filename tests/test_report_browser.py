"""The page in a real browser: it renders, nothing goes to the console, tables sort, nothing foreign runs.

The browser runs a page around the report, which asks it and writes the answers where `--dump-dom` shows them.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from relrep_onnx import report
from relrep_onnx.report.document import Cell, Chart, Code, Document, Section, Series, row, table
from relrep_onnx.report.html import page
from relrep_onnx.report.parts import numbers, texts

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

NAMES = ("b", "a", "none", "a rather long name of a layer / with / several / parts / that / must / not / widen / the / page" * 3)
VALUES = (9.0, 10.0, None, -1.0)

ASK = """
const frame = document.querySelector("iframe"), inside = frame.contentDocument, answers = {};
const heads = [...inside.querySelectorAll("thead th")];
const first = () => [...inside.querySelectorAll("tbody th")].map((th) => th.textContent);
answers.order = [first()];
for (const column of [1, 1, 1, 0]) {
  const button = heads[column].querySelector("button");
  button.focus();
  answers.focused = inside.activeElement === button;
  button.click();
  answers.order.push(first());
  (answers.sorted ??= []).push(heads.map((head) => head.getAttribute("aria-sort")));
}
const line = inside.querySelector(".series[data-name='a']");
line.dispatchEvent(new PointerEvent("pointerenter"));
answers.pointed = [...inside.querySelectorAll("tr.pointed th")].map((th) => th.textContent);
answers.said = inside.querySelector("figure output").textContent;
frame.contentWindow.dispatchEvent(new Event("beforeprint"));
answers.opened = inside.querySelector("details").open;
frame.contentWindow.dispatchEvent(new Event("afterprint"));
answers.closed = !inside.querySelector("details").open;
answers.overflow = inside.documentElement.scrollWidth - frame.clientWidth;
const foreign = inside.createElement("script");
foreign.textContent = "window.foreign = true";
inside.body.append(foreign);
answers.foreign = frame.contentWindow.foreign ?? null;
const output = document.createElement("pre");
output.id = "answers";
output.textContent = JSON.stringify(answers);
document.body.append(output);
"""


def document() -> Document:
    """A small report with a table, a chart and a detail."""
    cells = [Cell("-" if v is None else f"{v:g}", v, bar=None if v is None else abs(v) / 10) for v in VALUES]
    part = table("numbers", texts("name") + numbers("value"), [row(name, cell) for name, cell in zip(NAMES, cells, strict=True)])
    lines = tuple(Series(name, ((0.0, i), (1.0, i + 1.0))) for i, name in enumerate(NAMES))
    chart = Chart("Lines", "x", "y", "They rise.", lines)
    return Document("optimize", "model.onnx", "All is well.", (Section("Numbers", (part,), (chart, Code("more", "x"))),), None)


def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What the browser writes on its standard output, and its log."""
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=2000", *options, path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("browser") / "around.html"
    frame = f'<iframe width="390" height="800" srcdoc="{html.escape(page(document()))}"></iframe>'
    path.write_text(f'<!DOCTYPE html><body>{frame}<script>addEventListener("load", () => {{{ASK}}});</script>', encoding="utf-8")
    done = browse(path, "--dump-dom")
    found = re.search(r'<pre id="answers">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    assert re.search("CONSOLE.*Content Security Policy", done.stderr), "the log tells what the console says"
    return dict(json.loads(html.unescape(found[1])))


def test_tables_sort_by_number_and_by_name(answers: dict[str, Any]) -> None:
    b, a, none, long = NAMES
    assert answers["order"] == [
        [b, a, none, long],
        [long, b, a, none],
        [a, b, long, none],
        [b, a, none, long],
        [a, long, b, none],
    ]
    assert answers["sorted"] == [["none", "ascending"], ["none", "descending"], ["none", "none"], ["ascending", "none"]]
    assert answers["focused"]


def test_lines_answer_to_their_rows(answers: dict[str, Any]) -> None:
    assert answers["pointed"] == ["a"]
    assert answers["said"] == "a"


def test_details_open_for_the_printer(answers: dict[str, Any]) -> None:
    assert answers["opened"]
    assert answers["closed"]


def test_a_phone_shows_it_whole(answers: dict[str, Any]) -> None:
    assert answers["overflow"] <= 0


def test_foreign_scripts_do_not_run(answers: dict[str, Any]) -> None:
    assert answers["foreign"] is None


@pytest.mark.parametrize("dark", [False, True])
def test_it_renders_in_light_and_dark_without_a_word_to_the_console(dark: bool, tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image", reason="the images extra is not installed")
    path, picture = tmp_path / "report.html", tmp_path / "report.png"
    report.write(document(), path)
    done = browse(
        path, f"--screenshot={picture}", "--window-size=800,900", f"--blink-settings=preferredColorScheme={int(not dark)}"
    )
    assert "CONSOLE" not in done.stderr
    with images.open(picture) as image:
        grey = image.convert("L")
        assert (grey.getpixel((2, 2)) < 60) is dark
        low, high = grey.getextrema()
        assert high - low > 150, "ink on paper"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50, "lines in their colours"
