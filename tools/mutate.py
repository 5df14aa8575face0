"""Mutation tests of the numeric rooms: `python tools/mutate.py [ROOM ...] [--count 60] [--seed 0] [--only NUMBER]`.

One small fault at a time is put into a room, and the room's own tests must notice.  A mutant lives in the memory of a forked
process, which imports it in place of the room: no file is written, and nothing heavy is imported twice.  The faults: other
comparisons, arithmetic, logic and numbers, turned conditions, functions for their opposites, calls and statements left out.
Constants and tables of a module are choices rather than computations and stay as they are; so do types, messages and decorators.

A time-out counts as noticed.  Hypothesis draws from fixed seeds and does not shrink.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final, TypeVar, cast

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
import onnx  # noqa: F401  heavy, so imported before the forks; ONNX Runtime has threads, and cannot be
import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = "relrep_onnx"
TESTS: Final = {
    "masks": ("test_masks",),
    "moments": ("test_moments", "test_reconstruct"),
    "swaps": ("test_swaps",),
    "patches": ("test_operators", "test_stages"),
    "reconstruct": ("test_reconstruct",),
    "repair": ("test_repair", "test_reconstruct"),
    "score": ("test_score",),
    "allocate": ("test_allocate",),
    "damage": ("test_damage",),
}
_PAIRS: Final = (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or)),
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr)),
)
OPERATORS: Final[dict[type, type]] = {
    **{a: b for pair in _PAIRS for a, b in (pair, pair[::-1])},
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
_OPPOSITES: Final = (
    *(("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"), ("zeros", "ones"), ("floor", "ceil")),
    *(("zeros_like", "ones_like"), ("left", "right")),
)
WORDS: Final = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
TRANSPARENT: Final = frozenset({"copy", "deepcopy", "clip", "abs", "rint", "round", "sqrt", "sort", "nan_to_num"})
"""Calls that can be left out: what they are given goes on as it is."""

Node = TypeVar("Node", bound=ast.AST)


class Fault(ast.NodeTransformer):
    """Puts fault number `wanted` into a tree, and counts all there are."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.count, self.what = wanted, 0, ""

    def _offer(self, node: Node, *faults: ast.AST) -> Node:
        chosen: ast.AST = node
        for fault in faults:
            if self.count == self.wanted:
                line = getattr(node, "lineno", 0)
                self.what = f"{line}: {ast.unparse(node)}  ->  {ast.unparse(fault) if not isinstance(fault, ast.Pass) else '-'}"
                chosen = ast.copy_location(fault, node)
            self.count += 1
        return cast("Node", chosen)

    def visit_Module(self, node: ast.Module) -> ast.AST:
        node.body = [self.visit(n) if isinstance(n, ast.FunctionDef | ast.ClassDef) else n for n in node.body]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [self.visit(n) for n in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(n) for n in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.value = self.visit(node.value) if node.value else None
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._offer(node, ast.Pass())

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if isinstance(value, bool):
            return self._offer(node, ast.Constant(not value))
        if isinstance(value, int | float):
            return self._offer(node, ast.Constant(value + 1 if isinstance(value, int) or value == 0 else value * 2))
        return self._offer(node, ast.Constant(WORDS[value])) if value in WORDS else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        swapped = [[OPERATORS[type(op)]() if i == at else op for i, op in enumerate(node.ops)] for at in range(len(node.ops))]
        return self._offer(node, *(ast.Compare(node.left, ops, node.comparators) for ops in swapped))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = OPERATORS.get(type(node.op))
        return self._offer(node, ast.BinOp(node.left, other(), node.right)) if other else node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, ast.BoolOp(OPERATORS[type(node.op)](), node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if not isinstance(node.operand, ast.Constant):  # of -1 only the sign matters: NumPy takes -2 for it
            self.generic_visit(node)
        return self._offer(node, node.operand)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        faults: list[ast.AST] = []
        if name in WORDS:
            func = ast.Attribute(node.func.value, WORDS[name], ast.Load()) if isinstance(node.func, ast.Attribute) else None
            faults.append(ast.Call(func or ast.Name(WORDS[name], ast.Load()), node.args, node.keywords))
        if name in TRANSPARENT:
            method = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") not in ("np", "copy", "math")
            faults.append(cast("ast.Attribute", node.func).value if method else node.args[0])
        return self._offer(node, *faults)

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.test = self._offer(node.test, ast.UnaryOp(ast.Not(), node.test))
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, node.body, node.orelse)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value), ast.Pass())

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, ast.Pass()) if isinstance(node.value, ast.Call) else node

    def visit_Break(self, node: ast.Break) -> ast.AST:
        return self._offer(node, ast.Pass())


class Mutated(MetaPathFinder, Loader):
    """Gives one module another body."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


class Fixed:
    """A plugin of pytest: Hypothesis draws the same each time, and stops at the first failure."""

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile("fixed", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
        settings.load_profile("fixed")


def _test(room: str, code: CodeType) -> int:
    """The exit code of the room's tests in this process, quietly."""
    sink = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(sink, stream)
    sys.path.insert(0, str(ROOT))
    sys.meta_path.insert(0, Mutated(f"{PACKAGE}.{room}", code))
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS[room]]
    quick = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    return int(pytest.main([*quick, *files], plugins=[Fixed()]))


def passes(room: str, code: CodeType, seconds: float) -> bool:
    """Whether the room's tests pass with this code, within so much time."""
    child = os.fork()
    if child == 0:
        result = 1
        try:
            os.setsid()
            result = _test(room, code)
        finally:
            os._exit(result)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def mutants(room: str, count: int, seed: int, only: int | None) -> tuple[int, list[tuple[int, str, CodeType]]]:
    """How many faults a room could have; and of those that are tried the number, what it is, and the code."""
    path = ROOT / PACKAGE / f"{room}.py"
    source = path.read_text(encoding="utf-8")
    census = Fault()
    census.visit(ast.parse(source))
    chosen = sorted(random.Random(f"{room} {seed}").sample(range(census.count), min(count, census.count)))
    found = []
    for number in chosen if only is None else [only]:
        fault = Fault(number)
        tree = ast.fix_missing_locations(fault.visit(ast.parse(source)))
        found.append((number, fault.what, compile(tree, str(path), "exec")))
    return census.count, found


def judge(room: str, count: int, seed: int, only: int | None) -> str:
    """Prints the mutants of a room that survive; the row of the table."""
    total, chosen = mutants(room, count, seed, only)
    path = ROOT / PACKAGE / f"{room}.py"
    started = time.monotonic()
    if not passes(room, compile(path.read_text(encoding="utf-8"), str(path), "exec"), 600):
        sys.exit(f"the tests of {room} fail without any fault; put them right first")
    patience = 5 + 3 * (time.monotonic() - started)
    killed = 0
    for number, what, code in chosen:
        if passes(room, code, patience):
            print(f"{room} survived #{number}, line {what}", flush=True)
        else:
            killed += 1
    return f"| {room} | {total} | {len(chosen)} | {killed} | {killed / len(chosen):.0%} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(TESTS)}; all if none is given")
    parser.add_argument("--count", type=int, default=60, help="mutants of each room, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one mutant, by its number")
    options = parser.parse_args(arguments)
    rows = [judge(room, options.count, options.seed, options.only) for room in options.rooms or TESTS]
    print("| room | possible | tried | killed | score |", "|---|---|---|---|---|", *rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
