"""Between other tools: what they make of a sparse model, what becomes of their models here, and a transformer encoder.

docs/toolchains.md names the versions this was run with.  A tool that is not installed skips its tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from relrep_onnx import Config, ModelError, export_model, optimize, refine
from relrep_onnx.graph import Graph
from relrep_onnx.types import Array, Feeds
from tests.encoder import HEADS, WIDTH, encoder, sentences
from tests.models import convnet, random, run

LEAST: Final = 200
"""Elements of the smallest weight that is pruned here."""
CONFIG: Final = Config(sparsity=0.6, min_size=LEAST, allocate="rr-curve", repair="variance", threads=1)
SYMPY: Final = "sympy is not installed, and this part of ONNX Runtime imports it"
Tool = Callable[[Path, Path, Feeds], None]
"""From the file of one model to the file of another; the samples are for those that calibrate."""


def onnxslim(source: Path, target: Path, _: Feeds) -> None:
    onnx.save(pytest.importorskip("onnxslim", reason="onnxslim is not installed").slim(str(source)), target)


def onnxsim(source: Path, target: Path, _: Feeds) -> None:
    model, same = pytest.importorskip("onnxsim", reason="onnxsim is not installed").simplify(str(source))
    assert same
    onnx.save(model, target)


def float16(source: Path, target: Path, _: Feeds) -> None:
    """Cast stays as it is: by default its outputs are renamed float16 while it goes on making float32, which does not load."""
    converter = pytest.importorskip("onnxconverter_common", reason="onnxconverter-common is not installed").float16
    blocked = [*converter.DEFAULT_OP_BLOCK_LIST, "Cast"]
    onnx.save(converter.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked), target)


def pre_process(source: Path, target: Path, _: Feeds) -> None:
    """Without symbolic shapes, which it does not find for the encoder."""
    pytest.importorskip("sympy", reason=SYMPY)
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)


def optimize_model(source: Path, target: Path, _: Feeds) -> None:
    """Fuses attention, normalization and Gelu of the encoder; `opt_level` 0, for others need torch."""
    pytest.importorskip("sympy", reason=SYMPY)
    from onnxruntime.transformers.optimizer import optimize_model as fuse

    fuse(str(source), model_type="bert", num_heads=HEADS, hidden_size=WIDTH, opt_level=0).save_model_to_file(str(target))


class Reader:
    """What ONNX Runtime calls a CalibrationDataReader."""

    def __init__(self, samples: Feeds) -> None:
        self._batches = iter([{name: array[i : i + 16] for name, array in samples.items()} for i in range(0, 64, 16)])

    def get_next(self) -> Feeds | None:
        return next(self._batches, None)


def quantize(source: Path, target: Path, samples: Feeds, kind: str = "QInt8") -> None:
    """Layers only: with the sum that adds the attention mask quantized as well, scores would share the mask's scale."""
    from onnxruntime.quantization import QuantType, quantize_static

    quantize_static(
        str(source),
        str(target),
        Reader(samples),
        activation_type=QuantType[kind],
        weight_type=QuantType[kind],
        per_channel=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
    )


TOOLS: Final[Mapping[str, Tool]] = {
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "float16": float16,
    "quant_pre_process": pre_process,
    "optimize_model": optimize_model,
    "quantize_static": quantize,
}
MOVES: Final[Mapping[str, float]] = {"float16": 2e-3, "quantize_static": 0.1}
"""How far a tool may move the outputs, in relative L2; others only change the order of sums."""
EXACT: Final = 1e-5


def apply(tool: Tool, source: Path, target: Path, samples: Feeds) -> ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        tool(source, target, samples)
    return onnx.load(target)


def matrices(model: ModelProto) -> list[Array]:
    """All stored weights of two axes or more, quantized ones without their zero point."""
    stored = {name: numpy_helper.to_array(tensor) for name, tensor in Graph(model).tensors.items()}
    found = []
    for name, array in stored.items():
        if array.ndim < 2 or array.size < LEAST or array.dtype.kind not in "fiu" or array.dtype == np.int64:
            continue
        if array.dtype.kind != "f":
            point = stored[name.replace("_quantized", "_zero_point")].astype(np.int32)
            axis = next(i for i, size in enumerate(array.shape) if point.size in (1, size))
            array = array.astype(np.int32) - point.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        found.append(array)
    return found


def zeros(model: ModelProto) -> int:
    return sum(int((array == 0).sum()) for array in matrices(model))


def weights(model: ModelProto) -> int:
    return sum(array.size for array in matrices(model))


def moved(reference: ModelProto, model: ModelProto, samples: Feeds) -> float:
    (a,), (b,) = (run(m, samples).values() for m in (reference, model))
    return float(np.linalg.norm(b.astype(np.float64) - a) / np.linalg.norm(a))


@dataclass(frozen=True, eq=False)
class Scene:
    """A dense model, the same one pruned, their files, and samples."""

    folder: Path
    dense: ModelProto
    sparse: ModelProto
    samples: dict[str, Array]
    zeros: int


SCENES: Final[Mapping[str, Callable[[], tuple[ModelProto, dict[str, Array]]]]] = {
    "convnet": lambda: (convnet(), {"x": random(3, 64, 3, 8, 8)}),
    "encoder": lambda: (encoder(), sentences(64)),
    "encoder-decomposed": lambda: (encoder(decomposed=True), sentences(64)),
}


@pytest.fixture(scope="module", params=SCENES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("tools")
    dense, samples = SCENES[request.param]()
    onnx.save(dense, folder / "dense.onnx")
    result = optimize(folder / "dense.onnx", folder / "sparse.onnx", samples, CONFIG)
    return Scene(folder, dense, result.model, samples, sum(report.zeros for report in result.layers))


@pytest.mark.parametrize("tool", TOOLS)
def test_zeros_survive(scene: Scene, tool: str, tmp_path: Path) -> None:
    assert zeros(scene.dense) == 0
    assert zeros(scene.sparse) == scene.zeros > 0.4 * weights(scene.sparse)
    model = apply(TOOLS[tool], scene.folder / "sparse.onnx", tmp_path / "out.onnx", scene.samples)
    assert weights(model) == weights(scene.sparse)
    assert zeros(model) >= scene.zeros
    if tool not in MOVES:
        assert zeros(model) == scene.zeros
    assert moved(scene.sparse, model, scene.samples) <= MOVES.get(tool, EXACT)


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "quantize_static"])
def test_what_tools_wrote_is_pruned(scene: Scene, tool: str, tmp_path: Path) -> None:
    before = apply(TOOLS[tool], scene.folder / "dense.onnx", tmp_path / "in.onnx", scene.samples)
    result = optimize(tmp_path / "in.onnx", None, scene.samples, CONFIG)
    pruned = sum(report.layer.size for report in result.layers)
    assert zeros(result.model) == round(0.6 * pruned)
    assert [node.op_type for node in before.graph.node if "Attention" in node.op_type] == [
        skipped.op for skipped in result.skipped if "Attention" in skipped.op
    ]
    assert moved(scene.dense, result.model, scene.samples) < 0.3


def test_quantized_models_are_refused(scene: Scene, tmp_path: Path) -> None:
    apply(quantize, scene.folder / "dense.onnx", tmp_path / "in.onnx", scene.samples)
    with pytest.raises(ModelError, match="quantized weight"):
        optimize(tmp_path / "in.onnx", None, scene.samples, CONFIG)


def test_unsigned_weights_hide_their_zeros(scene: Scene, tmp_path: Path) -> None:
    """Why docs/toolchains.md asks for QInt8: the value is still 0, the byte is the zero point of its channel."""

    def unsigned(source: Path, target: Path, samples: Feeds) -> None:
        quantize(source, target, samples, "QUInt8")

    model = apply(unsigned, scene.folder / "sparse.onnx", tmp_path / "out.onnx", scene.samples)
    stored = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    bytes_ = [array for array in stored if array.dtype == np.uint8 and array.size >= LEAST]
    assert sum(array.size for array in bytes_) >= scene.zeros
    assert sum(int((array == 0).sum()) for array in bytes_) < 0.2 * scene.zeros <= zeros(model)


def test_tools_unfold_a_packed_file(tmp_path: Path) -> None:
    """Why exports come last: simplifiers fold the constants that `compact` unpacks, and the file is as large as before."""
    samples = random(3, 96, 3, 8, 8)
    sparse = optimize(convnet(), None, samples, CONFIG).model
    (exported,) = export_model(sparse, tmp_path / "in.onnx", samples, Config(forms=("compact",), threads=1))
    assert "CumSum" in {node.op_type for node in onnx.load(exported.output).graph.node}
    model = apply(onnxslim, tmp_path / "in.onnx", tmp_path / "out.onnx", {"x": samples})
    assert "CumSum" not in {node.op_type for node in model.graph.node}
    assert zeros(model) == zeros(sparse)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_encoder_goes_through(decomposed: bool) -> None:
    dense, samples = encoder(decomposed=decomposed), sentences(128)
    onnx.checker.check_model(dense, full_check=True)
    config = Config(sparsity=0.7, allocate="rr-curve", threads=1)
    result = optimize(dense, None, samples, config)
    projections = [node.name for node in dense.graph.node if node.op_type == "MatMul" and "onnx::" in node.input[1]]
    assert [report.layer.name for report in result.layers] == [*projections, "/pooler/dense/Gemm_0"]
    products = [node.name for node in dense.graph.node if node.op_type == "MatMul" and "onnx::" not in node.input[1]]
    reasons = {skipped.node: skipped.reason for skipped in result.skipped}
    assert len(products) == 4
    assert all("computed at run time" in reasons.pop(name) for name in products)
    assert "fewer than the minimum" in reasons.pop("/classifier/Gemm")
    assert "Gather" in reasons.popitem()[0]
    assert not reasons
    assert sum(report.zeros for report in result.layers) == round(0.7 * sum(report.layer.size for report in result.layers))
    assert result.fidelity.relative_l2 < 0.5 * optimize(dense, None, samples, replace(config, repair="none")).fidelity.relative_l2


def test_an_encoder_is_refined() -> None:
    dense, samples = encoder(1), sentences(256)
    sparse = optimize(dense, None, samples, CONFIG).model
    result = refine(dense, sparse, None, samples, replace(CONFIG, refine=15))
    assert not result.refinement.walls
    assert result.after.relative_l2 < 0.8 * result.before.relative_l2
    assert zeros(result.model) == zeros(sparse)
