"""Writes the reference in docs/api.md from the docstrings of what `relrep_onnx` exports: `python tools/reference.py`.

Everything up to the marker is written by hand and stays.  What a setting of `Config` does is the help of its option.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "api.md"
MARKER: Final = "<!-- From here on written by `python tools/reference.py`. -->\n"

sys.path.insert(0, str(ROOT))
import click  # noqa: E402

import relrep_onnx  # noqa: E402
from relrep_onnx.cli import main as commands  # noqa: E402


def reference() -> str:
    """The generated part: functions, then dataclasses, then errors, in the order of `__all__`."""
    named = {name: getattr(relrep_onnx, name) for name in relrep_onnx.__all__ if not name.startswith("__")}
    functions = [_function(name, value) for name, value in named.items() if inspect.isfunction(value)]
    classes = [_dataclass(name, value) for name, value in named.items() if dataclasses.is_dataclass(value)]
    errors = [_error(name, value) for name, value in named.items() if inspect.isclass(value) and issubclass(value, Exception)]
    return "\n".join(["## Functions\n", *functions, "## Settings and results\n", *classes, "## Errors\n", *errors])


def _function(name: str, function: Callable[..., Any]) -> str:
    text = re.sub(r"<function .*?>", "...", str(inspect.signature(function)).replace("graphs.", ""))
    arguments, _, result = text.rpartition(" -> ")
    lines = [f"    {part}," for part in _split(re.sub(r"'([^']*)'", r"\1", arguments)[1:-1])]
    shown = "\n".join([f"def {name}(", *lines, f") -> {result.strip(chr(39))}"])
    return f"### `{name}`\n\n```python\n{shown}\n```\n\n{_markdown(inspect.getdoc(function) or '')}\n"


def _split(arguments: str) -> Iterator[str]:
    """Arguments of a signature; commas within brackets do not part them."""
    depth, part = 0, ""
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            yield part.strip()
            part = ""
        else:
            part += letter
    yield part.strip()


def _dataclass(name: str, kind: Any) -> str:
    helps = _helps() if name == "Config" else {}
    rows = [f"| `{f.name}` | `{_type(f)}` | {_default(f)} | {helps.get(f.name, '')} |" for f in dataclasses.fields(kind)]
    table = ["| field | type | default | what |", "|---|---|---|---|", *rows]
    if not helps:
        table = ["| field | type |", "|---|---|", *(f"| `{f.name}` | `{_type(f)}` |" for f in dataclasses.fields(kind))]
    methods = [
        f"- `{key}`: {_first_line(value)}"
        for key, value in inspect.getmembers(kind)
        if not key.startswith("_") and (isinstance(value, property) or inspect.isroutine(value)) and _first_line(value)
    ]
    return "\n".join([f"### `{name}`\n", f"{_markdown(inspect.getdoc(kind) or '')}\n", *table, "", *methods, ""])


def _helps() -> dict[str, str]:
    """What each setting's option says of it, those of `optimize` first, and what there is to choose from."""
    said: dict[str, str] = {}
    for command in ("optimize", *commands.commands):
        for option in commands.commands[command].params:
            if isinstance(option, click.Option) and option.help and option.name:
                choices = f" One of {', '.join(option.type.choices)}." if isinstance(option.type, click.Choice) else ""
                said.setdefault(
                    option.name, re.sub(r"\s*\[default[^]]*\]", "", option.help).strip().replace("|", "\\|") + choices
                )
    return said


def _type(field: dataclasses.Field[Any]) -> str:
    return str(field.type).replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "`{}`" if field.default_factory is not dataclasses.MISSING else ""
    return f"`{field.default!r}`"


def _first_line(value: Any) -> str:
    return (inspect.getdoc(value) or "").split("\n", 1)[0]


def _error(name: str, kind: type[Exception]) -> str:
    bases = ", ".join(base.__name__ for base in kind.__bases__)
    return f"- `{name}` ({bases}): {' '.join((inspect.getdoc(kind) or '').split())}"


def _markdown(docstring: str) -> str:
    """Sections of a Google docstring as lists."""
    lines: list[str] = []
    for line in docstring.splitlines():
        if line in ("Args:", "Raises:", "Returns:"):
            lines.append(f"{line}\n")
        elif entry := re.match(r"    (\w+): (.*)", line):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            lines.append(f"  {line.strip()}" if line.startswith("        ") else line.strip())
    return "\n".join(lines)


def main() -> None:
    """Rewrites the page below its marker."""
    written, found, _ = PAGE.read_text(encoding="utf-8").partition(MARKER)
    if not found:
        raise SystemExit(f"{PAGE} has lost its marker: {MARKER}")
    PAGE.write_text(f"{written}{MARKER}\n{reference()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
