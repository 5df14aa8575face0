"""Names from a model do nothing, whatever command shows them: on terminals, in pages, Markdown, tables, pictures and errors."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import onnx
import pytest
from click.testing import CliRunner, Result
from markdown_it import MarkdownIt
from onnx import ModelProto

from relrep_onnx.cli import main
from relrep_onnx.config import Config
from relrep_onnx.escape import clean
from relrep_onnx.report.plot import _label
from relrep_onnx.results import Point, Provenance, Sweep
from relrep_onnx.sweeps.tables import rows, to_csv, to_markdown
from tests.test_pipeline import small_net
from tests.test_report import Page

EVIL: Final = (
    "_\x1b[2J\x1b]0;title\x07\r\n\t\x9b31m\u202e\u2028</td></title></style><script>alert(1)</script><img src=x onerror=alert(1)>"
    "|`a`[red]b[/red]*c*[d](javascript:e) https://f.test @g $\\frac{h}$ =1+1 & 'i' \""
)
"""Something for every face: sequences for terminals, line breaks, markup of HTML, Markdown, rich and TeX."""
FILE: Final = EVIL.replace("/", "%")
CONTROLS: Final = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]")
"""What rich itself sends to a terminal: colours, the cursor, lines."""

RANDOM: Final = "--calib random --num-samples 16"
PLAIN: Final = f"{RANDOM} --sparsity 0.5 --min-size 64 --allocate uniform"


def evil_net() -> ModelProto:
    """The small network with such names for its nodes, tensors, dimensions, inputs and outputs, and itself in such a file."""
    model = small_net()
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.name or number}{EVIL}"
        node.input[:] = [name + EVIL for name in node.input]
        node.output[:] = [name + EVIL for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name += EVIL
    for value in (*model.graph.input, *model.graph.output):
        value.name += EVIL
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = f"N{EVIL}"
    model.graph.name = model.producer_name = model.doc_string = EVIL
    model.metadata_props.add(key=EVIL, value=EVIL)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that model, and a sparse one made of it."""
    folder = tmp_path_factory.mktemp("names")
    onnx.save(evil_net(), folder / f"{FILE}.onnx")
    done = run(
        "optimize NET SPARSE --calib random --num-samples 16 --sparsity 0.5 --min-size 64 --allocate uniform", folder, folder
    )
    assert done.exit_code == 0, done.output
    return folder


def run(command: str, place: Path, folder: Path, *, terminal: bool = False) -> Result:
    """A command, in which NET and SPARSE are models in `place`, OUT one in `folder`, and @ is that folder."""
    paths = {"NET": place / f"{FILE}.onnx", "SPARSE": place / f"sparse{FILE}.onnx", "OUT": folder / f"out{FILE}.onnx"}
    words = [str(paths.get(word, word.replace("@", str(folder)))) for word in command.split()]
    environment = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"} if terminal else {}
    return CliRunner(env=environment).invoke(main, words)


def harmless(text: str) -> bool:
    return text.isprintable()


def check_file(path: Path) -> None:
    """That a page, a table or a picture holds the names, as text."""
    text = path.read_text(encoding="utf-8")
    assert all(map(harmless, text.split("\n")))
    assert path.stem != "report" or "alert(1)" in text
    if path.suffix == ".html":
        names = [name for name, _ in Page(text).elements]
        assert names.count("script") == names.count("style") == 1
        assert not {"img", "td onerror"} & set(names)
        assert not [key for _, attributes in Page(text).elements for key in attributes if key.startswith("on")]
    elif path.suffix == ".md":
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
        inner = [child for token in tokens for child in token.children or ()]
        assert {token.content for token in inner if token.type == "html_inline"} <= {"<!-- -->"}
        active = {"html_block", "link_open", "image", "em_open", "s_open", "code_inline"}
        assert not active & {token.type for token in (*tokens, *inner)}
        rows = [line for line in text.split("\n") if line.startswith("|") and set(line) - set("|-: ")]
        assert len(rows) == sum(token.type == "tr_open" for token in tokens)
    elif path.suffix == ".svg":
        assert not {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()} & {"script", "img", "a"}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("inspect NET", 0),
        ("inspect NET --gradients", 0),
        ("inspect SPARSE", 0),
        (f"analyze NET {RANDOM} --min-size 64 --plot @/p.svg --json @/report.json", 0),
        (f"analyze NET {RANDOM} --min-size 64 --report @/report.html", 0),
        (f"optimize NET OUT {PLAIN} --to onnx,compact --report @/report.html", 0),
        (f"optimize NET OUT {PLAIN} --refine 1 --report @/report.md", 0),
        (f"optimize NET OUT {PLAIN} --max-error 1e-9", 3),
        (f"optimize NET OUT {PLAIN} --dry-run", 0),
        (f"refine NET SPARSE OUT {RANDOM} --epochs 1 --report @/report.md", 0),
        ("export SPARSE OUT --to compact", 0),
        (f"sweep NET @/s {RANDOM} --min-size 64 --sparsity 0.4,0.9 --pattern 2:4 --allocate uniform --report @/report.md", 0),
        ("benchmark NET SPARSE --rounds 2 --profile --report @/report.html", 0),
        ("benchmark NET SPARSE --rounds 2 --report @/report.md --require-same 1e-9", 3),
        ("compare NET SPARSE --data random", 0),
        ("compare NET SPARSE --data random --max-error 1e-9", 3),
        (f"optimize NET OUT {RANDOM} --min-size 99999", 1),
        (f"optimize NET OUT {RANDOM} --nodes-to-exclude nobody", 2),
    ],
)
def test_commands(command: str, code: int, terminal: bool, place: Path, tmp_path: Path) -> None:
    done = run(command, place, tmp_path, terminal=terminal)
    assert done.exit_code == code, done.output
    assert harmless(CONTROLS.sub("", done.output)), done.output
    assert ("\x1b[" in done.output) <= terminal
    for path in tmp_path.rglob("*"):
        if path.suffix in (".html", ".md", ".csv", ".svg", ".json"):
            check_file(path)


def broken(kind: str) -> ModelProto:
    """That model with a fault in it."""
    model = evil_net()
    nodes = model.graph.node
    match kind:
        case "missing":
            nodes[1].input[0] = f"nothing{EVIL}"
        case "cycle":
            nodes[0].input[0] = nodes[-1].output[0]
        case "unknown operator":
            nodes[1].op_type = f"Relu{EVIL}"
        case "same names":
            nodes[1].name = nodes[0].name
        case "short tensor":
            model.graph.initializer[0].raw_data = b""
        case "shape":
            model.graph.initializer[-1].dims[:] = [7, 16]
    return model


@pytest.mark.parametrize("kind", ["missing", "cycle", "unknown operator", "same names", "short tensor", "shape"])
def test_errors(kind: str, tmp_path: Path) -> None:
    onnx.save(broken(kind), tmp_path / f"{FILE}.onnx")
    for command in (f"optimize NET OUT {PLAIN}", "benchmark NET NET", "export NET OUT --to compact"):
        done = run(command, tmp_path, tmp_path)
        assert done.exit_code == 1, done.output
        assert all(map(harmless, done.output.split("\n")))
        assert "alert(1)" in done.output


def test_tables_of_a_sweep() -> None:
    point = Point("a", 0.5, "2:4", "uniform", "none", None, f"failed: {EVIL}")
    about = Provenance("m", "", "d", "", False, 1, (), {})
    found = Sweep(Config(), about, ("size",), (point,), None, None)
    ((*_, failure),) = list(csv.reader(io.StringIO(to_csv(found))))[1:]
    assert failure == f"failed: {clean(EVIL)}"
    table = MarkdownIt("commonmark").enable("table").parse(to_markdown(found))
    cells = [token for token in table if token.type == "inline"]
    assert len(cells) == 2 * len(rows(found)[0])
    assert {child.type for child in cells[-1].children or ()} <= {"text", "text_special", "html_inline"}
    assert "".join(child.content for child in cells[-1].children or () if child.type != "html_inline") == f"failed: {clean(EVIL)}"


@pytest.mark.parametrize("name", ["_starts", "costs $\\frac{$", EVIL])
def test_legends_of_pictures(name: str, place: Path, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    axes = figure.Figure().subplots()
    axes.plot([0, 1], [0, 1], label=_label(name))
    (shown,) = axes.legend().get_texts()
    axes.figure.savefig(tmp_path / "p.png")
    assert shown.get_text().strip() == clean(name)[-28:].replace("$", "\\$")
