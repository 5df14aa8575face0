"""The building plan: a room knows only the rooms below it, and outside libraries only where the plan says so."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest

PACKAGE: Final = Path(__file__).parents[1] / "relrep_onnx"

FLOORS: Final[dict[str, int]] = {
    "types": 0,
    "memory": 0,
    **dict.fromkeys(("moments", "masks", "swaps", "patches", "adam", "augment"), 1),
    **dict.fromkeys(("graph", "runtime", "files", "store", "escape", "kernels"), 1),
    **dict.fromkeys(("reconstruct", "data", "calibrate", "verify", "inspection", "gradient"), 2),
    **dict.fromkeys(("deployment", "benchmark", "cache"), 2),
    **dict.fromkeys(("config", "repair", "distill", "export"), 3),
    **dict.fromkeys(("score", "allocate", "results", "statistics", "damage", "screen"), 4),
    **dict.fromkeys(("job", "refinement"), 5),
    **dict.fromkeys(("steps", "exporting"), 6),
    "search": 7,
    "pipeline": 8,
    "estimate": 9,
    "sweeps": 10,
    "report": 11,
    "progress": 11,
    "__init__": 12,
    "commands": 13,
    "cli": 14,
    "__main__": 15,
}
"""A folder is one room; its own modules must import each other in an order without a circle."""

CALIBRATE: Final = {"types", "memory", "graph", "runtime", "moments", "patches", "store"}
CONFIG: Final = {"types", "augment", "data", "deployment", "masks", "runtime", "verify"}
LIBRARIES: Final = {
    # In export for the converters that come with it; only runtime opens sessions.
    "onnxruntime": {"runtime", "export"},
    # In runtime, damage, steps, search and job as the type that they pass on, and for its version.
    "onnx": {
        *("graph", "gradient", "kernels", "distill", "data", "results", "steps", "search", "runtime", "damage", "job"),
        *("export", "exporting", "report", "sweeps"),
    },
}
NUMERIC: Final = {"moments", "masks", "swaps", "patches", "adam", "augment", "reconstruct", "repair", "score", "allocate"}

MODULES: Final = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}

DESCRIBED: Final = ("graph", "data", "export", "sweeps", "report")
"""Rooms whose modules the document tells one by one."""
PATHS: Final = {f"{PACKAGE.name}.{name.removesuffix('.__init__')}" for name in MODULES}


def imported(tree: ast.Module) -> set[str]:
    """Every module an import statement names, inside functions and TYPE_CHECKING too; `from a import b` also as a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(inner)
            # `from relrep_onnx import report` names the package only to reach the room, and so on inside.
            if node.module != PACKAGE.name and not inner <= PATHS:
                names.add(node.module or "")
    return names


def known(name: str) -> str | None:
    """The module of this package that an imported name stands for: `graph.index`, `graph.__init__`, `types`."""
    head, *inside = name.split(".")
    if head != PACKAGE.name:
        return None
    for module in (".".join(inside), ".".join([*inside, "__init__"])):
        if module in MODULES:
            return module
    return "__init__" if len(inside) == 1 else None  # what the package's own face gives


def neighbours(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    return {target for name in imported(MODULES[module]) if (target := known(name)) is not None}


def room(module: str) -> str:
    return module.split(".")[0]


def libraries(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(MODULES[module])}


def test_every_room_has_its_floor() -> None:
    assert {room(module) for module in MODULES} == FLOORS.keys()


def test_the_document_shows_this_plan() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE)
    shown = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", names)}
    assert shown == FLOORS
    for module in MODULES:
        inside = module.partition(".")[2]
        if room(module) in DESCRIBED and inside != "__init__":
            assert f"`{inside}.py`" in text, f"docs/architecture.md says nothing of {module}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for target in neighbours(module) - {module}:
        if room(target) != room(module):
            assert FLOORS[room(target)] < FLOORS[room(module)], f"{module} imports {target}"


@pytest.mark.parametrize("folder", ["graph", "data", "export", "kernels", "sweeps", "report", "commands"])
def test_no_circles_inside_a_folder(folder: str) -> None:
    waiting = {m: {n for n in neighbours(m) if room(n) == folder} - {m} for m in MODULES if room(m) == folder}
    assert len(waiting) > 1
    while waiting:
        ready = {m for m, needs in waiting.items() if not needs & waiting.keys()}
        assert ready, f"a circle among {sorted(waiting)}"
        waiting = {m: needs for m, needs in waiting.items() if m not in ready}


@pytest.mark.parametrize(("module", "allowed"), [("calibrate", CALIBRATE), ("config", CONFIG)])
def test_rooms_with_few_neighbours(module: str, allowed: set[str]) -> None:
    assert {room(target) for target in neighbours(module)} <= allowed


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = {room(module) for module in MODULES if library in libraries(module)}
    assert users <= LIBRARIES[library]
    assert users, f"nobody imports {library}: is this test still looking?"


def test_numeric_rooms_know_no_model_format() -> None:
    for module in MODULES:
        if room(module) in NUMERIC:
            assert not libraries(module) & {"onnx", "onnxruntime"}, module
            assert {room(target) for target in neighbours(module)} <= {"types", *NUMERIC}


def test_the_eyes_are_open() -> None:
    inside = ast.parse("from relrep_onnx.graph import index\nfrom relrep_onnx.data import Samples")
    assert imported(inside) == {"relrep_onnx.graph.index", "relrep_onnx.data", "relrep_onnx.data.Samples"}
    tree = ast.parse("if TYPE_CHECKING:\n    import onnx.helper\ndef f():\n    from relrep_onnx import graph\n")
    assert imported(tree) == {"onnx.helper", "relrep_onnx.graph"}
    assert known("relrep_onnx.graph") == "graph.__init__"
    assert known("relrep_onnx.graph.index") == "graph.index"
    assert known("relrep_onnx") == "__init__"
    assert known("relrep_onnx.types.Layer") is None
    assert known("relrep_onnx.optimize") == "__init__"
    assert known("types") is None
    assert "graph.__init__" in neighbours("pipeline")
    assert "__init__" not in neighbours("pipeline")
