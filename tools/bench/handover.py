"""Hands exports of the shipped sample to other runtimes and says what they make of them: `python -m tools.bench.handover`.

A sparse model is made from the sample, exported, and given to every runtime that is installed here; each answers the test images'
first ones.  Columns: how far its outputs are from the sparse model's in ONNX Runtime, and the bytes of the runtime's own file.

    pip install openvino                    # reads ONNX itself
    pip install pnnx ncnn                   # pnnx converts; brings PyTorch

A tool that is missing is a row that says so.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

import relrep_onnx
from relrep_onnx import Config
from tools.bench.data import DATA, TASKS, Array, environment, infer, markdown_table, open_session
from tools.bench.exports import FORMS, sparse_model

SAMPLES: Final = 16
HEADER: Final = ("runtime", "version", "form", "L2 against sparse", "bytes")
SHAPE: Final = "[1,1,28,28]"


def openvino(model: Path, x: Array) -> tuple[Array, int | None]:
    """OpenVINO reads the file itself; float32 on the CPU."""
    core: Any = importlib.import_module("openvino").Core()
    compiled = core.compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(compiled(x).values())), None


def ncnn(model: Path, x: Array) -> tuple[Array, int | None]:
    """Converted by pnnx for one shape; ncnn answers image by image, float32."""
    library: Any = importlib.import_module("ncnn")
    pnnx: Any = importlib.import_module("pnnx")
    command = [getattr(pnnx, "EXEC_PATH", "pnnx"), str(model), f"inputshape={SHAPE}", "fp16=0"]
    subprocess.run(command, check=True, capture_output=True, cwd=model.parent)
    param, weights = (model.with_name(f"{model.stem}.ncnn.{end}") for end in ("param", "bin"))
    net = library.Net()
    for option in ("use_fp16_storage", "use_fp16_arithmetic", "use_fp16_packed"):
        setattr(net.opt, option, False)
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise RuntimeError("ncnn does not load what pnnx made of it")
    answers = []
    for image in x:
        extractor = net.create_extractor()
        extractor.input("in0", library.Mat(image))
        _, answer = extractor.extract("out0")
        answers.append(np.array(answer))
    return np.stack(answers), weights.stat().st_size


RUNTIMES: Final[Mapping[str, Callable[[Path, Array], tuple[Array, int | None]]]] = {"openvino": openvino, "ncnn": ncnn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the sparse model here")
    options = parser.parse_args()
    config, task = Config(threads=2), TASKS["fashion"](DATA, 1)
    x = task.test_x[:SAMPLES]
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        sparse = sparse_model(task, 0.9, options.keep or Path(folder), config)
        expected = infer(open_session(sparse, config.threads), x)
        for form, settings in FORMS.items():
            if "ort" in form:
                continue
            target = Path(folder) / f"export{len(rows)}.onnx"
            relrep_onnx.export_model(sparse, target, task.calibration[0], Config(threads=2, **settings))
            for name, run in RUNTIMES.items():
                rows.append([name, *answer(name, run, form, target, x, expected)])
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    print(f"{SAMPLES} test images of the sample at 90 %; {versions}\n\n{markdown_table(HEADER, rows)}")


def answer(
    name: str, run: Callable[[Path, Array], tuple[Array, int | None]], form: str, target: Path, x: Array, expected: Array
) -> list[str]:
    """The rest of a row."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ["not installed", form, "", ""]
    version = str(getattr(module, "__version__", "")).split("-")[0]
    try:
        given, size = run(target, x)
    except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        text = str(error).strip().splitlines()
        return [version, form, f"refuses it ({text[-1].strip()[:60] if text else type(error).__name__})", ""]
    gap = float(np.linalg.norm(given.reshape(expected.shape) - expected) / np.linalg.norm(expected))
    return [version, form, f"{gap:.1e}", "" if size is None else f"{size:,}"]


if __name__ == "__main__":
    main()
