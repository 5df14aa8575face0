"""Reports: the same words and numbers on every face, nothing that a name could break, files whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from click.testing import Result as Run
from markdown_it import MarkdownIt
from rich.console import Console

from relrep_onnx import Config, analyze, cli, optimize, report
from relrep_onnx.benchmark import NodeTime, Plan, Setting, Timing
from relrep_onnx.escape import clean, plain
from relrep_onnx.report import parts, pictures, words
from relrep_onnx.report.document import Cell, Chart, Code, Document, Section, Sentences, Series, Table, row, section, table
from relrep_onnx.report.html import page
from relrep_onnx.report.markdown import item, markdown
from relrep_onnx.report.markup import Markup, tag
from relrep_onnx.report.schema import schema
from relrep_onnx.results import BenchmarkResult, Figures, Finding, ModelFile, Point, Result, Sweep, Trial, to_json
from relrep_onnx.types import ConfigError
from tests.test_pipeline import inputs, small_net

ROOT = Path(__file__).parents[1]
EVIL = (
    '</style><script>alert("1")</script><img src=x onerror=1> & `a` |*b*_c_[d](http://evil.test) '
    "www.evil.test @you\x1b[2J\u202e[red]"
)
"""A name that would do something on each face if it could."""


class Page(HTMLParser):
    """A strict reader: every element that opens closes in order; keeps the tables, the elements and the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")
        if tag == "table":
            self._rows, self._caption = [], ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert "svg" in self.open, tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.text += data
        if "caption" in self.open:
            self._caption += data
        elif "th" in self.open or "td" in self.open:
            self._rows[-1][-1] += data


def evil_net() -> onnx.ModelProto:
    """The small network with names that attack."""
    model = small_net()
    model.graph.node[0].name = EVIL
    model.graph.output[0].name = model.graph.node[-1].output[0] = f"y{EVIL}"
    return model


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with everything that a report can show: names that attack, a metric, exports, refinement, a search."""
    target = tmp_path_factory.mktemp("report") / "exports"
    config = Config(sparsity=0.7, min_size=80, positions=None, batch_size=16, refine=2, augment="none", forms=("onnx", "compact"))
    run = optimize(evil_net(), target, inputs(), config)
    found = Finding("error", 0.3, 0.7, 0.25, (Trial(0.7, 0.25), Trial(0.8, 0.4)))
    return replace(
        run, finding=found, metric_before=0.9, metric_after=0.8, config=replace(config, eval=f"m:{EVIL}"), notes=(EVIL,)
    )


@pytest.fixture(scope="module")
def documents(result: Result) -> dict[str, Document]:
    """A document of each kind that can become a file."""
    config = Config(sparsity=0.5, min_size=64, positions=None)
    timings = tuple(Timing(name, ms, (ms, ms), 1 / ms, (1, 1), 0.0) for name, ms in ((EVIL, 1.0), ("b.onnx", 2.0)))
    profiles = {EVIL: (NodeTime(EVIL, "Conv", 3.0),)}
    files = tuple(ModelFile(t.model, 10, 5, "00") for t in timings)
    benchmark = BenchmarkResult((Setting(1, 1, timings, profiles),), Plan(), files, EVIL, {"numpy": "2"})
    return {
        "optimize": report.of_result(result, f"relrep-onnx optimize '{EVIL}'\nb"),
        "analyze": report.of_analysis(analyze(evil_net(), inputs(), config), None),
        "benchmark": report.of_benchmark(benchmark, EVIL),
    }


KINDS = ("optimize", "analyze", "benchmark")


def tables(document: Document) -> list[Table]:
    return [p for s in document.sections for p in (*s.parts, *s.details) if isinstance(p, Table)]


def shown(part: Table) -> list[list[str]]:
    """The cells of a table as every face must show them."""
    return [[clean(cell.text) for cell in cells] for cells in part.rows]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_holds_every_table(kind: str, documents: dict[str, Document]) -> None:
    found = Page(page(documents[kind]))
    assert {clean(t.caption) for t in tables(documents[kind])} == found.tables.keys()
    for part in tables(documents[kind]):
        head, *rows = found.tables[clean(part.caption)]
        assert head == [column.title or "name" for column in part.columns]
        assert rows == shown(part)


@pytest.mark.parametrize("kind", KINDS)
def test_markdown_holds_every_table_and_nothing_active(kind: str, documents: dict[str, Document]) -> None:
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"]).parse(markdown(documents[kind]))
    inner = [child for token in tokens for child in token.children or ()]
    assert {t.content for t in inner if t.type == "html_inline"} <= {"<!-- -->"}
    assert {t.type for t in (*tokens, *inner)} & {"html_block", "link_open", "image", "em_open", "s_open", "code_inline"} == set()
    cells = iter(t for t, before in zip(tokens[1:], tokens, strict=False) if before.type == "td_open")
    read = ["".join(c.content for c in t.children or () if c.type != "html_inline") for t in cells]
    wanted = [cell.strip() for part in tables(documents[kind]) for cells_ in shown(part) for cell in cells_]
    assert read == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_terminal_holds_every_table_but_the_details(kind: str, documents: dict[str, Document]) -> None:
    out = Console(file=io.StringIO(), width=600, force_terminal=False)
    out.print(report.render(documents[kind]))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert clean(text.replace("\n", "")) == text.replace("\n", "")
    lines = text.splitlines()
    assert lines[0].rstrip() == clean(documents[kind].verdict)
    for part in (p for s in documents[kind].sections for p in s.parts if isinstance(p, Table)):
        for _, *cells in shown(part):
            assert any(all(cell in line for cell in cells) for line in lines), cells
    for chart in (p for s in documents[kind].sections for p in s.details if isinstance(p, Chart)):
        assert chart.says not in text


def drawn(document: Document, width: int) -> str:
    """What a terminal of this width shows."""
    out = Console(file=io.StringIO(), width=width)
    out.print(report.render(document))
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


LONG = "model/batch_normalization_1/FusedBatchNormV3;model/conv2d_1/BiasAdd/ReadVariableOp/resource;model/conv2d_1"


@pytest.mark.parametrize("name", ["/stage2/stage2.0/conv1/Conv", LONG])
def test_layers_can_be_read_at_any_width(name: str, result: Result) -> None:
    layers = tuple(replace(r, layer=replace(r.layer, name=f"{name}{n}")) for n, r in enumerate(result.layers))
    document = replace(report.of_result(result), verdict="", sections=section("Layers", parts.layers(layers)))
    at = {width: drawn(document, width) for width in (80, 200)}
    for width, text in at.items():
        lines = text.split("\n")[4:]
        assert max(map(len, lines)) <= width
        assert len([line for line in lines if line.startswith(name[:24])]) == len(layers)
        assert sum(bool(line.strip()) for line in lines) <= 8 + len(layers) * -(-len(LONG) // 32)
        first = "".join(line.split("  ")[0].strip() for line in lines)
        assert all(r.layer.name in first for r in layers), "the whole name, folded"
        assert "RR: Relative Repairability, residual / raw" in " ".join(text.split())
    assert re.search(r"no room here for op, (weights, )?MACs, SNR dB", " ".join(at[80].split()))
    assert "no room" not in at[200]


def test_tables_of_a_sweep_fit_and_failures_are_sentences(result: Result) -> None:
    figures = Figures(0.5, 0.5, 100, 100, 0.25, 0.9, None, 602_478, 478_454)
    good = Point("good", 0.5, "unstructured", "rr-curve", "reconstruct", figures)
    bad = replace(
        good, name="bad", figures=None, failure="a sparsity of 0.9 of the weights is not possible; give 0.5 or less " * 2
    )
    found = Sweep(result.config, result.provenance, ("error", "size"), (good, bad), None, None)
    text = drawn(report.of_sweep(found), 80)
    assert re.search(r"^unstructured +rr-curve +reconstruct +0.5 +0.25 +0.9000 +602478", text, re.MULTILINE)
    assert "failure" not in text
    assert f"bad: {bad.failure}".split() == text[text.index("bad: ") :].split()[: len(f"bad: {bad.failure}".split())]


def test_every_profile_says_whose_it_is(documents: dict[str, Document]) -> None:
    assert f"Time of every node, {clean(Path(EVIL).name)}, 1 thread, batch 1" in drawn(documents["benchmark"], 600)


def test_a_new_row_is_on_every_face(documents: dict[str, Document]) -> None:
    part = table("new", parts.texts("a") + parts.numbers("b"), [row("rowname", Cell("12.5 kB", 12_500))])
    document = replace(documents["optimize"], sections=(*documents["optimize"].sections, *section("News", part)))
    out = Console(file=io.StringIO(), width=200)
    out.print(report.render(document))
    for face in (page(document), markdown(document), out.file.getvalue()):  # type: ignore[attr-defined]
        assert "News" in face
        assert "rowname" in face
        assert "12.5 kB" in face


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_sound_and_alone(kind: str, documents: dict[str, Document]) -> None:
    text = page(documents[kind])
    found = Page(text)
    names = [name for name, _ in found.elements]
    assert names.count("script") == names.count("style") == names.count("h1") == names.count("main") == 1
    assert not {"img", "link", "iframe", "object", "image", "use", "form", "base"} & set(names)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in found.elements:
        assert not [a for a in attributes if a.startswith("on") or a in ("src", "style", "srcset", "xlink:href")]
        if name == "a":
            assert (attributes["href"] or "")[1:] in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if name == "th":
            assert attributes["scope"] in ("col", "row")
    assert names.count("caption") == names.count("thead") == names.count("table")
    for asset in ("page.css", "page.js"):
        content = (ROOT / "relrep_onnx" / "report" / asset).read_text(encoding="utf-8")
        assert re.search(r"https?:|url\(|@import|import\(|fetch|XMLHttp|</", content) is None
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in text
        assert content in text
    assert clean(EVIL) in found.text


def test_every_chart_says_what_it_shows(documents: dict[str, Document]) -> None:
    found = Page(page(documents["optimize"]))
    charts = [p for s in documents["optimize"].sections for p in s.details if isinstance(p, Chart)]
    assert len(charts) == 4
    lines = [a["points"] for name, a in found.elements if name == "polyline" and a["class"] == "line"]
    assert len(lines) == sum(len(chart.series) for chart in charts)
    assert [name for name, _ in found.elements].count("desc") == len(charts)
    assert all(chart.says in found.text for chart in charts)


def test_tiles_repeat_rows_of_the_table(result: Result) -> None:
    part = parts.before_after(result)
    assert [part.rows[i][0].text for i in part.highlights] == [
        "weights that are not zero",
        min((r for r in part.rows if r[2].text.endswith("B")), key=lambda r: r[2].value or 0)[0].text,
        "outputs, relative L2",
        "top-1 agreement",
        f"metric m:{EVIL}",
    ]


def test_lines_are_where_their_numbers_are() -> None:
    drawn = pictures.chart(Chart("t", "x", "y", "s", (Series("a", ((0.0, 0.0), (1.0, 10.0), (0.5, 5.0))),)))
    points = re.search(r'points="([^"]*)"', drawn)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points[1].split())
    assert (x0, x1) == (pictures.LEFT, pictures.WIDTH - pictures.RIGHT)
    assert (y0, y1) == (pictures.HEIGHT - pictures.BOTTOM, pictures.TOP)
    assert (x2, y2) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2))


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1e-9, 97.0], [1e-7, 3e-7], [0.0, 1.0, 2.0], [-5e9, 1e12], []])
def test_ticks_enclose_the_values(values: list[float]) -> None:
    ticks = pictures._ticks(values)
    labels = pictures._labels(ticks)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 8
    assert len(set(labels)) == len(ticks)
    assert [float(label) for label in labels] == pytest.approx(ticks)
    assert all(ticks[0] - 0.03 * step <= value <= ticks[-1] + 0.03 * step for value in values)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes() -> Iterator[dict[str, str]]:
    style = (ROOT / "relrep_onnx" / "report" / "page.css").read_text(encoding="utf-8")
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        yield {name: value if len(value) == 7 else value + value[1:] for name, value in re.findall(r"--(\w+): (#\w+)", block)}


def test_colours_can_be_told_apart() -> None:
    found = list(themes())
    assert len(found) == 3
    for theme in found:
        for ground in ("paper", "card"):
            assert min(contrast(theme[ink], theme[ground]) for ink in ("ink", "soft", "accent")) >= 4.5
            assert min(contrast(pictures.colour(i / 20), theme[ground]) for i in range(21)) >= 3
        assert contrast(theme["accent"], theme["ghost"]) >= 3


def test_markup_escapes_all_that_is_no_markup() -> None:
    assert tag("p", "<b>", Markup("<i>"), class_='"') == '<p class="&quot;">&lt;b&gt;<i></p>'
    assert tag("line", x1=0.1 + 0.2, hidden=True, y1=None, data_a_b="\x00") == '<line x1="0.3" hidden data-a-b="\\x00"/>'


ODD = ("1. a", "12) a", "- a", "+", "# a", "> a", "a\\", "~~a~~", "a|b", "    a", "***", "---", "=", "$a$", "&lt;", "-0.5")


@pytest.mark.parametrize("text", ODD)
def test_markdown_keeps_text(text: str) -> None:
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(item(text))
    assert [t.type.removesuffix("_open") for t in tokens[:4]] == ["bullet_list", "list_item", "paragraph", "inline"]
    assert len(tokens) == 7
    children = tokens[3].children or []
    assert {c.type for c in children} <= {"text", "text_special"}
    assert "".join(c.content for c in children) == text.strip()


def test_links_of_github_are_broken() -> None:
    assert plain("https://a.b www.c.d @e mailto:f") == ("https<!-- -->://a.b www<!-- -->.c.d @<!-- -->e mailto<!-- -->:f")


def test_code_keeps_its_fence() -> None:
    document = Document("k", "s", "v", (Section("t", (Code("c", "a\n```\n# b"),)),), None)
    fences = [t for t in MarkdownIt("commonmark").parse(markdown(document)) if t.type == "fence"]
    assert [t.content for t in fences] == ["a\n```\n# b\n"]


def test_sections_without_a_word_are_left_out() -> None:
    assert section("a", None, Sentences(()), table("t", parts.texts("x"), [])) == ()
    assert section("a", details=[Chart("t", "x", "y", "s", (Series("n", ()),))]) == ()
    assert len(section("a", Sentences(("b",)))) == 1


def test_repairability_in_one_sentence(documents: dict[str, Document]) -> None:
    analysis = documents["analyze"].data
    known = sorted(r.curve.rr_at(0.5) for r in analysis.layers)
    assert f"leaves {np.median(known):.0%} of" in documents["analyze"].verdict
    assert f"{known[0]:.0%} in " in documents["analyze"].verdict
    assert f"{known[-1]:.0%} in " in documents["analyze"].verdict
    assert "no damage" in words.repairability([], 0.5)


# JSON and its schema


def test_the_published_schema_is_the_types() -> None:
    published = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    assert published == schema(), "run: python -m relrep_onnx.report.schema > docs/report.schema.json"


@pytest.mark.parametrize(("kind", "name"), [("optimize", "Result"), ("analyze", "Analysis"), ("benchmark", "BenchmarkResult")])
def test_json_follows_the_schema(kind: str, name: str, documents: dict[str, Document]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    rules = {**schema(), "anyOf": [{"$ref": f"#/$defs/{name}"}]}
    validator = jsonschema.Draft202012Validator(rules)
    validator.check_schema(rules)
    values = json.loads(to_json(documents[kind].data))
    validator.validate(values)
    fields = set(rules["$defs"][name]["properties"])
    assert values.keys() - {"schema_version"} == fields
    for broken in ({**values, "schema_version": 0}, {**values, sorted(fields)[0]: 3.5}, {"schema_version": 1}):
        assert not validator.is_valid(broken)


# the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    onnx.save(small_net(), folder / "net.onnx")
    np.savez(folder / "ok.npz", x=inputs(64))
    return folder


def run(command: str, place: Path) -> Run:
    return CliRunner().invoke(cli.main, command.replace("{}", str(place)).split())


def test_optimize_writes_every_face(place: Path) -> None:
    command = "optimize {}/net.onnx {}/o.onnx --calib {}/ok.npz --sparsity 0.5 --allocate uniform --quiet"
    for suffix in ("html", "md", "json"):
        done = run(f"{command} --report {{}}/r.{suffix} --json {{}}/same.json", place)
        assert done.exit_code == 0, done.output
    shown_command = f"relrep-onnx {command} --report {{}}/r.html --json {{}}/same.json".replace("{}", str(place))
    assert shown_command in Page((place / "r.html").read_text()).text
    assert "50.0%" in (place / "r.md").read_text()
    one, other = (json.loads((place / name).read_text()) for name in ("r.json", "same.json"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("optimize {}/net.onnx {}/o.onnx --calib {}/ok.npz --report {}/r.pdf", 2, "its name must end in .html, .md, .json"),
        ("optimize {}/net.onnx {}/o.onnx --calib {}/ok.npz --report {}/none/r.html", 2, "its folder does not exist"),
        ("optimize {}/net.onnx {}/o.onnx --calib {}/ok.npz --report {}/kept.html --dry-run", 2, "--report cannot apply"),
        (
            "optimize {}/net.onnx {}/o.onnx --calib {}/ok.npz --report {}/s.json --save-config {}/s.json",
            2,
            "would both write",
        ),
        ("analyze {}/net.onnx --calib {}/ok.npz --json {}/net.onnx", 2, "would replace MODEL"),
        ("benchmark {}/net.onnx {}/net.onnx --json {}/net.onnx", 2, "would replace DENSE SPARSE"),
        ("optimize {}/net.onnx {}/o.onnx --calib {}/ok.npz --report {}/kept.html --max-error 1e-9", 3, "--max-error"),
    ],
)
def test_refusals_leave_everything_as_it_was(command: str, code: int, says: str, place: Path) -> None:
    (place / "kept.html").write_text("old")
    before = {path: path.read_bytes() for path in place.iterdir()}
    done = run(command, place)
    assert done.exit_code == code
    assert says in " ".join(done.output.split())
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_a_benchmark_that_misses_its_gate_still_reports_it(place: Path) -> None:
    other = small_net(seed=3)
    onnx.save(other, place / "other.onnx")
    done = run("benchmark {}/net.onnx {}/other.onnx --rounds 2 --require-same 1e-6 --quiet --report {}/b.html", place)
    assert done.exit_code == 3
    found = Page((place / "b.html").read_text())
    assert found.tables["the files"][1][1] == words.size((place / "net.onnx").stat().st_size)


def test_analyze_reports(place: Path) -> None:
    done = run("analyze {}/net.onnx --calib {}/ok.npz --min-size 64 --quiet --report {}/a.md", place)
    assert done.exit_code == 0, done.output
    assert "RR at some" not in (place / "a.md").read_text()
    assert "## Repairability against sparsity" in (place / "a.md").read_text()


def test_write_names_the_faces(tmp_path: Path) -> None:
    document = Document("k", "s", "v", (), None)
    with pytest.raises(ConfigError, match=r"must end in \.html, \.md, \.json"):
        report.write(document, tmp_path / "r.txt")
    (tmp_path / "r.html").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        report.write(document, tmp_path / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
