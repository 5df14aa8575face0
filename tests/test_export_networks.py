"""Every export of a pruned convolutional network and of a pruned transformer: it loads and computes the same, or is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto

from relrep_onnx import Config, optimize
from relrep_onnx.cli import main
from relrep_onnx.types import Array
from tests.encoder import encoder, sentences
from tests.models import convnet, random

NETWORKS: Final[Mapping[str, Callable[[], tuple[ModelProto, dict[str, Array]]]]] = {
    "convnet": lambda: (convnet(), {"x": random(3, 128, 3, 8, 8)}),
    "encoder": lambda: (encoder(1), sentences(128)),
}
EXACT: Final = 1e-5
FORMS: Final[Mapping[str, float]] = {
    "onnx": EXACT,
    "compact": EXACT,
    "compact --values float16": 1e-3,
    "compact --values int8": 0.03,
    "int8": 0.05,
    "int8 --target arm": 0.05,
    "int8+compact": 0.05,
    "int8+ort --target arm": 0.05,
    "ort": EXACT,
    "compact+ort": EXACT,
    "sparse-initializer": EXACT,
    "sparse-ort": EXACT,
    "sparse-ort --values int8": 0.05,
}
"""What `--to` is given, and how far it may move the outputs in relative L2."""


@dataclass(frozen=True, eq=False)
class Place:
    """A folder with a pruned network and its samples, samples that nobody calibrated with, and the dense outputs there."""

    folder: Path
    unseen: dict[str, Array]
    expected: Array

    def export(self, target: Path, form: str, *gates: str) -> Result:
        """One call of the command line."""
        given = [self.folder / "sparse.onnx", target, "--calib", self.folder / "samples.npz", "--to", *form.split(), *gates]
        return CliRunner().invoke(main, ["export", *map(str, given), "--threads", "1", "--quiet"])


def outputs(path: Path, feeds: Any) -> Array:
    """The first output in a plain session."""
    output: Array = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return output.astype(np.float64)


@pytest.fixture(scope="module", params=NETWORKS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    dense, samples = NETWORKS[request.param]()
    learn, unseen = ({name: array[part] for name, array in samples.items()} for part in (slice(96), slice(96, None)))
    config = Config(sparsity=0.8, min_size=200, repair="variance", allocate="erk", threads=1)
    onnx.save(optimize(dense, None, learn, config).model, folder / "sparse.onnx")
    np.savez(folder / "samples.npz", **learn)  # type: ignore[arg-type]
    return Place(folder, unseen, outputs(folder / "sparse.onnx", unseen))


@pytest.mark.parametrize("form", FORMS)
def test_the_file_loads_and_computes(place: Place, form: str, tmp_path: Path) -> None:
    target = tmp_path / f"out{'.ort' if form.split()[0].endswith('ort') and 'sparse' not in form else '.onnx'}"
    told = place.export(target, form, "--max-error", str(FORMS[form]))
    assert told.exit_code == 0, told.output
    gap = np.linalg.norm(outputs(target, place.unseen) - place.expected) / np.linalg.norm(place.expected)
    assert gap <= 1.5 * FORMS[form]


@pytest.mark.parametrize(
    ("form", "gate"),
    [
        ("compact", "--max-bytes 1KB"),
        ("int8", "--max-error 1e-9"),
        ("int8+compact", "--max-error 1e-9"),
        ("int8+compact", "--max-bytes 1KB"),
        ("sparse-ort --values int8", "--max-error 1e-9"),
    ],
)
def test_a_gate_that_is_missed_leaves_what_was_there(place: Place, form: str, gate: str, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    target.write_text("old")
    told = place.export(target, form, *gate.split())
    assert told.exit_code == 3, told.output
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
