"""The short form of `tools/fuzz.py`: every file that ever failed, some more, and what the fuzzer itself can see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from relrep_onnx.cli import main
from tools import fuzz, hostile_bases

FAILED: Final = {
    ("model", 54): "a weight behind three thousand nodes, deeper than Python recurses",
    ("model", 184): "a control character in an operator's type",
    ("model", 212): "a location that is no UTF-8",
    ("model", 243): "ONNX's version converter raises errors of its shape inference",
    ("model", 246): "a cast to an unknown type",
    ("model", 285): "weights beyond float32's range, with NumPy's warnings",
    ("model", 436): "a node without outputs that reads a weight",
    ("model", 504): "weights near float32's limit: no eigenvalues",
    ("model", 630): "a residual sum without an output",
    ("model", 672): "a negative variance in a BatchNormalization",
    ("model", 727): "a sparse output that is declared dense",
    ("model", 340): "three thousand Identity nodes in a chain took for ever",
    ("model", 20_020): "a BatchNormalization with too few inputs",
    ("model", 1468): "numbers too small for a quotient",
    ("model", 2952): "inputs too small for float32: no eigenvalues",
    ("model", 20489): "a stride of 0",
    ("model", 22631): "a cast of signalling NaNs warned",
    ("model", 23140): "text that is not UTF-8, copied",
    ("model", 23541): "fewer strides than axes",
    ("model", 26817): "infinite activations warned before the error",
    ("model", 29119): "the name of an external tensor is not UTF-8",
}
"""What was wrong with each of these; the seed makes the same file for as long as `tools/hostile*.py` stay as they are."""
MORE: Final = [
    *(("model", seed) for seed in range(20_000, 20_120)),
    *(("data", seed) for seed in (*range(20_000, 20_060), *range(40_000, 40_040))),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[fuzz.Pool]:
    with fuzz.Pool() as pool:
        yield pool


@pytest.mark.skipif(os.name == "nt", reason="the worker's limits are of POSIX")
def test_hostile_files_end_with_a_sentence(pool: fuzz.Pool) -> None:
    pytest.importorskip("PIL", reason="the images extra is not installed")
    outcomes = [pool.run(kind, seed) for kind, seed in [*FAILED, *MORE]]
    assert [o for o in outcomes if o.findings] == []
    assert all(o.codes for o in outcomes)
    assert {0, 1} <= {o.codes[-1] for o in outcomes}, "some must go through, or nothing behind the door is tested"


@pytest.mark.parametrize("base", hostile_bases.BASES)
def test_undamaged_models_open(base: object, tmp_path: Path) -> None:
    import numpy as np

    assert callable(base)
    (tmp_path / "m.onnx").write_bytes(base(np.random.default_rng(0)).SerializeToString())
    assert fuzz.command("inspect", tmp_path / "m.onnx") == (0, "", "")


@pytest.mark.skipif(os.name == "nt", reason="inotify is of Linux")
def test_the_watch_sees_who_reads(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    watch = fuzz.Watch()
    with watch.on(secret):
        assert not watch.seen()
        secret.read_bytes()
        assert watch.seen()
        assert not watch.seen()


def failing(error: BaseException | None, text: str = "") -> click.Command:
    def body() -> None:
        click.echo(text, err=True, nl=False)
        if error is not None:
            raise error

    return click.Command("broken", callback=body)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (failing(KeyError("no such layer")), "traceback"),
        (failing(SystemExit(7)), "exit code 7"),
        (failing(SystemExit(1)), "exit code 1 and []"),
        (failing(None, "Error: but it went on\n"), "exit code 0 and"),
        (failing(click.ClickException("a\nb"), "RuntimeWarning: overflow\n"), "more than one sentence"),
        (failing(click.ClickException("evil \x07")), "control characters"),
        (failing(click.ClickException("n" * 3000)), "a message of"),
    ],
)
def test_the_judge_sees_what_is_wrong(body: click.Command, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main.commands, "broken", body)
    assert problem in fuzz.command("broken")[1]


@pytest.mark.skipif(os.name == "nt", reason="the worker's limits are of POSIX")
def test_a_worker_that_dies_is_replaced(pool: fuzz.Pool) -> None:
    pool.run("model", 0)
    before = pool.started
    assert pool.process is not None
    pool.process.kill()
    pool.process.wait()
    assert pool.run("model", 1).codes == (-9,)
    assert pool.run("model", 1).codes[0] in (0, 1)
    assert pool.started == before + 1
