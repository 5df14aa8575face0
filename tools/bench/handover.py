"""Hands exports of the shipped sample to other runtimes and says what they make of them: `python -m tools.bench.handover`.

A sparse model is made from the sample, exported, and given to every runtime that is installed here; each answers the test images'
first ones.  Columns: how far its outputs are from the sparse model's in ONNX Runtime, and the bytes of the runtime's own file.

    pip install openvino                    # reads ONNX itself
    pip install pnnx ncnn                   # pnnx converts; brings PyTorch

A second table gives what Vela, the compiler of Arm's Ethos-U, makes of the dense and of the sparse sample, by way of onnx2tf.
onnx2tf needs an older NumPy, so both are programs of other environments: `--onnx2tf PATH --vela PATH`.

A tool that is missing is a row that says so.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
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


VELA_HEADER: Final = ("sample", "weights, KiB", "encoded by Vela, KiB", "flash, KiB")
VELA_LINES: Final = ("Original Weights Size", "NPU Encoded Weights Size", "Total Off-chip Flash used")


def vela(model: Path, folder: Path, samples: Array, onnx2tf: str, compiler: str) -> list[str]:
    """The figures of Vela's report, for Ethos-U55 with 128 MACs; onnx2tf quantizes with these samples, NCHW.

    It rewrites its input file, so it gets a copy.
    """
    shutil.copy(model, folder / "copy.onnx")
    np.save(folder / "samples.npy", samples.transpose(0, 2, 3, 1))
    command = [onnx2tf, "-i", "copy.onnx", "-o", "tflite", "-oiqt", "-cind", "image", "samples.npy", "[[[[0.0]]]]", "[[[[1.0]]]]"]
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # this environment's packages
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=others)
    quantized = "tflite/copy_full_integer_quant.tflite"
    command = [compiler, "--accelerator-config", "ethos-u55-128", "--output-dir", "out", "--verbose-weights", quantized]
    text = subprocess.run(command, check=True, capture_output=True, cwd=folder, env=others, text=True).stdout
    found = [re.search(rf"{line} +([0-9.]+) KiB", text) for line in VELA_LINES]
    return [match[1] if match else "not reported" for match in found]


def vela_rows(
    models: Mapping[str, Path], folder: Path, samples: Array, onnx2tf: str | None, compiler: str | None
) -> list[list[str]]:
    """A row per model, or why not."""
    if onnx2tf is None or compiler is None:
        return [["onnx2tf or vela is not installed", "", "", ""]]
    rows = []
    for number, (name, path) in enumerate(models.items()):
        place = folder / f"vela{number}"
        place.mkdir()
        try:
            rows.append([name, *vela(path, place, samples, onnx2tf, compiler)])
        except (OSError, subprocess.CalledProcessError) as error:
            rows.append([name, f"failed: {type(error).__name__}", "", ""])
    return rows


RUNTIMES: Final[Mapping[str, Callable[[Path, Array], tuple[Array, int | None]]]] = {"openvino": openvino, "ncnn": ncnn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the sparse model here")
    parser.add_argument("--onnx2tf", default=shutil.which("onnx2tf"), metavar="PATH")
    parser.add_argument("--vela", default=shutil.which("vela"), metavar="PATH")
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
        models = {"dense": task.model, "90 %": sparse}
        compiled = vela_rows(models, Path(folder), task.calibration[0], options.onnx2tf, options.vela)
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    print(f"{SAMPLES} test images of the sample at 90 %; {versions}\n\n{markdown_table(HEADER, rows)}")
    print(f"\n{markdown_table(VELA_HEADER, compiled)}")


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
