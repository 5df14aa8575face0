"""The command line as users meet it: what works, and one clear sentence with the right exit code for what does not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_info, threadpool_limits

import relrep_onnx
from relrep_onnx import kernels
from relrep_onnx.cli import main
from relrep_onnx.config import Config
from relrep_onnx.graph import Graph, find_layers
from relrep_onnx.report.schema import schema
from relrep_onnx.runtime import symbolic_shapes
from relrep_onnx.types import Selection
from tests.test_pipeline import FASHION, SAMPLES, inputs, small_net

CALIB = str(SAMPLES / "fashion_calib.npz")
NORMALIZE = ["--mean", "0.286", "--std", "0.353"]


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and data of every broken kind."""
    folder = tmp_path_factory.mktemp("place")
    onnx.save(small_net(), folder / "net.onnx")
    x = inputs(64)
    np.savez(folder / "ok.npz", x=x)
    np.savez(folder / "named.npz", first=x, second=x)
    np.savez(folder / "few.npz", x=x[:2])
    np.savez(folder / "empty.npz", x=x[:0])
    np.savez(folder / "rank.npz", x=x[:, 0, 0])
    np.savez(folder / "dims.npz", x=x[:, :5])
    np.savez(folder / "ints.npz", x=np.zeros((64, 8, 6, 6), np.int64))
    np.savez(folder / "objects.npz", x=np.array([{}, {}], object))
    bad = x.copy()
    bad[7, 0, 0, 0] = np.nan
    np.savez(folder / "nan.npz", x=bad)
    np.save(folder / "ok.npy", x)
    np.save(folder / "same.npy", np.ones_like(x))
    (folder / "cut.npz").write_bytes((folder / "ok.npz").read_bytes()[:900])
    (folder / "text.npz").write_text("not an archive")
    (folder / "net.ort").write_bytes(bytes([40, 0, 0, 0]) + b"ORTM" + bytes([7] * 60))
    (folder / "text.onnx").write_text("not a model")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes((folder / "net.onnx").read_bytes()[:2000])
    (folder / "data.csv").write_text("1,2,3")
    (folder / "hollow").mkdir()
    (folder / "config.json").write_text('{"sparsity": 0.5, "speed": 9}')
    (folder / "types.json").write_text('{"sparsity": "much"}')
    (folder / "broken.json").write_text("{")
    unknown = small_net()
    unknown.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(unknown, folder / "unknown_op.onnx")
    external = small_net()
    onnx.save(external, folder / "external.onnx", save_as_external_data=True, location="gone.data", size_threshold=16)
    (folder / "gone.data").unlink()
    activations = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"], name="product")],
        "no_weights",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4, 4])],
    )
    onnx.save(helper.make_model(activations, opset_imports=[helper.make_opsetid("", 17)]), folder / "no_weights.onnx")
    tokens = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["g"]), helper.make_node("MatMul", ["g", "w"], ["out"])],
        "tokens",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "T"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", "T", 16])],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("table", (9, 8)), ("w", (8, 16)))],
    )
    onnx.save(helper.make_model(tokens, opset_imports=[helper.make_opsetid("", 17)]), folder / "tokens.onnx")
    onnx.save(small_net(), folder / "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=16)
    for name in ("old.onnx", "copy.onnx"):  # what a run wrote, and a copy without its data, which the next run would remove
        location = "old.onnx.0123456789ab.data"
        onnx.save(small_net(), folder / name, save_as_external_data=True, location=location, size_threshold=16)
        (folder / location).rename(folder / "held")
    (folder / "held").rename(folder / location)
    (folder / "all").mkdir()
    np.savez(folder / "all" / "ok.npz", x=x)
    (folder / "seed.json").write_text('{"seed": 1}')
    (folder / "link.onnx").symlink_to(folder / "net.onnx")
    (folder / "swept" / "picked").mkdir(parents=True)
    onnx.save(small_net(), folder / "swept" / "picked" / "model.onnx")
    return folder


# OPT and TOK stand for whole commands.
OPT = "optimize {}/net.onnx {}/o.onnx --calib {}/ok.npz"
TOK = "optimize {}/tokens.onnx {}/o.onnx --calib random --min-size 8"
# name of the case: (arguments with {} for the folder, exit code, what the message must say)
BAD: dict[str, tuple[str, int, str]] = {
    "no command": ("prune", 2, "No such command"),
    "missing model": ("inspect {}/none.onnx", 2, "does not exist"),
    "model is a folder": ("inspect {}/hollow", 2, "is a directory"),
    "model is text": ("inspect {}/text.onnx", 1, "is not an ONNX model"),
    "model is an export": ("inspect {}/net.ort", 1, "an .ort file; give the .onnx it was made from"),
    "model is empty": ("inspect {}/empty.onnx", 1, "is not an ONNX model"),
    "model is cut": ("inspect {}/cut.onnx", 1, "is not an ONNX model"),
    "external data missing": ("inspect {}/external.onnx", 1, "external data 'gone.data'"),
    "unknown operator": ("optimize {}/unknown_op.onnx {}/o.onnx --calib {}/ok.npz", 1, "NoSuchOperator"),
    "nothing to prune": ("optimize {}/no_weights.onnx {}/o.onnx --calib random", 1, "nothing to prune"),
    "all too small": ("OPT --min-size 9999", 1, "fewer than the minimum of 9999"),
    "no calib": ("optimize {}/net.onnx {}/o.onnx", 2, "Missing option '--calib'"),
    "no output": ("optimize {}/net.onnx --calib {}/ok.npz", 2, "give an OUTPUT file"),
    "no such pattern": ("OPT --pattern 4:2", 2, "the pattern is '4:2'; give unstructured, N:M with N < M <= 32"),
    "pattern allows less": ("OPT --pattern 2:4 --sparsity 0.7", 1, "this pattern: they allow 0 to 0.5; give a"),
    "pattern fits nothing": ("OPT --pattern 3:32", 1, "the pattern 3:32 needs 32 input channels; it has 8"),
    "drop and sparsity": ("OPT --max-drop 0.1 --sparsity 0.5", 2, "--max-drop looks for the sparsity itself; leave --sp"),
    "no such drop": ("OPT --max-drop top5:1%", 2, "--max-drop is 'top5:1%'; give a relative L2 error such as 0.1"),
    "drop without metric": ("OPT --max-drop eval:0.1", 2, "needs --eval, the metric it is about"),
    "drop too small": ("OPT --max-drop 1e-9 --allocate uniform", 1, "no sparsity stays under --max-drop 1e-9"),
    "drop too fine": ("OPT --max-drop top1:0.1%", 2, "deciding samples resolve"),
    "no such augmentation": ("OPT --refine 1 --augment cutout", 2, "--augment is 'cutout'; give 'auto', 'none', or some of crop"),
    "resume from a file": ("OPT --resume {}/text.npz", 2, "is a file"),
    "refine another model": ("refine {}/net.onnx {}/tokens.onnx {}/o.onnx --calib {}/ok.npz", 1, "different inputs or outputs"),
    "refine in place of itself": ("refine {}/net.onnx {}/net.onnx {}/net.onnx --calib {}/ok.npz", 2, "is the input"),
    "no output to refine": ("refine {}/net.onnx {}/net.onnx --calib {}/ok.npz", 2, "give an OUTPUT file"),
    "refine with no such metric": ("refine {}/net.onnx {}/net.onnx {}/o.onnx --calib {}/ok.npz --eval nosuch:f", 2, "--eval"),
    "two outputs": ("optimize {}/net.onnx {}/a.onnx -o {}/b.onnx --calib {}/ok.npz", 2, "two outputs"),
    "output is input": ("optimize {}/net.onnx {}/net.onnx --calib {}/ok.npz", 2, "is the input"),
    "in place elsewhere": ("optimize {}/net.onnx {}/o.onnx --in-place --calib {}/ok.npz", 2, "cannot apply together"),
    "output folder missing": ("optimize {}/net.onnx {}/none/o.onnx --calib {}/ok.npz", 2, "does not exist"),
    "output is a folder": ("optimize {}/net.onnx {}/hollow --calib {}/ok.npz", 2, "is a folder; give a file name"),
    "data missing": ("optimize {}/net.onnx {}/o.onnx --calib {}/none.npz", 1, "none.npz"),
    "data of unknown kind": ("optimize {}/net.onnx {}/o.onnx --calib {}/data.csv", 1, "data.csv"),
    "data folder empty": ("optimize {}/net.onnx {}/o.onnx --calib {}/hollow", 1, "hollow"),
    "data cut": ("optimize {}/net.onnx {}/o.onnx --calib {}/cut.npz", 1, "cut.npz"),
    "data is text": ("optimize {}/net.onnx {}/o.onnx --calib {}/text.npz", 1, "text.npz"),
    "data pickled": ("optimize {}/net.onnx {}/o.onnx --calib {}/objects.npz", 1, "pickle"),
    "data empty": ("optimize {}/net.onnx {}/o.onnx --calib {}/empty.npz", 1, "empty.npz"),
    "too few samples": ("optimize {}/net.onnx {}/o.onnx --calib {}/few.npz", 1, "few.npz"),
    "wrong rank": ("optimize {}/net.onnx {}/o.onnx --calib {}/rank.npz", 1, "'x'"),
    "wrong channels": ("optimize {}/net.onnx {}/o.onnx --calib {}/dims.npz", 1, "'x'"),
    "wrong type": ("optimize {}/net.onnx {}/o.onnx --calib {}/ints.npz", 1, "int64"),
    "NaN": ("optimize {}/net.onnx {}/o.onnx --calib {}/nan.npz", 1, "sample 7"),
    "ambiguous names": ("optimize {}/net.onnx {}/o.onnx --calib {}/named.npz", 1, "--calib-key"),
    "unknown key": ("optimize {}/net.onnx {}/o.onnx --calib {}/named.npz --calib-key third", 1, "third"),
    "images asked of floats": ("OPT --mean 0.5", 2, "cannot apply"),
    "range without random": ("OPT --random-range 0,9", 2, "cannot apply"),
    "random without shape": ("TOK --random-range 0,8", 1, "--input-shape"),
    "random without range": ("TOK --input-shape ids:1,4", 1, "--random-range"),
    "shape of no input": ("inspect {}/net.onnx --input-shape z:1,2", 2, "no input is called 'z'"),
    "shape of other rank": ("inspect {}/net.onnx --input-shape x:1,2", 2, "rank 4"),
    "shape without numbers": ("inspect {}/net.onnx --input-shape x:a,b", 2, "not a list of numbers"),
    "shape without name": ("inspect {}/net.onnx --input-shape 1,2", 2, "NAME:1,3,224,224"),
    "sparsity over one": ("OPT --sparsity 1.5", 2, "0<=x<=1"),
    "sparsity in percent": ("OPT --sparsity 95", 2, "for 95 % give 0.95"),
    "augmentation of nothing": ("OPT --augment crop", 2, "--augment crop cannot apply without --refine"),
    "layer twice": ("OPT --layer-sparsity first=0.1 --layer-sparsity first=0.2", 2, "--layer-sparsity names 'first' twice"),
    "holdout is calib": ("OPT --holdout {}/ok.npy", 2, "--holdout gives the samples of --calib again"),
    "constant samples": ("optimize {}/net.onnx {}/o.onnx --calib {}/same.npy", 1, "all 64 samples are the same"),
    "constant holdout": ("OPT --holdout {}/same.npy", 1, "all 64 samples are the same"),
    "size gate": ("OPT --max-bytes 5", 3, "are above --max-bytes 5; nothing was written"),
    "comparison too fine": ("compare {}/net.onnx {}/net.onnx --data {}/ok.npz --min-agreement 0.9999", 2, "samples (--data), or"),
    "sparsity a word": ("OPT --sparsity most", 2, "not a valid float"),
    "unknown allocator": ("OPT --allocate magic", 2, "rr-curve"),
    "unknown repair": ("OPT --repair magic", 2, "variance"),
    "unknown budget": ("OPT --budget joules", 2, "macs"),
    "bounds swapped": (
        "OPT --min-layer-sparsity 0.9 --max-layer-sparsity 0.1", 2, "swap them",
    ),
    "impossible budget": (
        "OPT --min-size 64 --sparsity 0.9 --max-layer-sparsity 0.5", 1, "they allow 0 to 0.5",
    ),
    "layer unknown": ("OPT --layer-sparsity nine=0.5", 2, "'nine'"),
    "layer without value": ("OPT --layer-sparsity first", 2, "NAME=0.3"),
    "layer over one": ("OPT --layer-sparsity first=3", 2, "0<=x<=1"),
    "exclude matches nothing": ("inspect {}/net.onnx --nodes-to-exclude secnd", 2, "near names: 'second'"),
    "exclude no regex": ("inspect {}/net.onnx --nodes-to-exclude (", 2, "no valid regular expression"),
    "operator unknown": ("inspect {}/net.onnx --op-types Convolution", 2, "near names: 'Conv'"),
    "provider unknown": ("OPT --providers Warp", 1, "available: "),
    "op library missing": ("OPT --custom-op-library {}/x.so", 1, "x.so"),
    "batch size zero": ("OPT --batch-size 0", 2, "1<=x"),
    "memory without end": ("OPT --max-memory inf", 2, "800M"),
    "json of a dry run": ("OPT --dry-run --json {}/r.json", 2, "--json cannot apply to --dry-run"),
    "settings in no folder": ("OPT --save-config {}/none/c.json", 2, "its folder does not exist"),
    "memory a word": ("OPT --max-memory lots", 2, "800M"),
    "form unknown": ("OPT --to zip", 2, "no form is called 'zip'; known: onnx, compact, int8"),
    "form not last": ("OPT --to ort+int8", 2, "ort last"),
    "values without compact": ("OPT --to int8 --values int8", 2, "--values int8 cannot apply to --to int8"),
    "ort by another name": ("OPT --to ort", 2, "rename the output"),
    "runtime unknown": ("OPT --for abacus", 2, "tensorrt"),
    "runtime leaves nothing": ("OPT --for tensorrt", 1, "2:4 does not pay at 8 channels"),
    "export over its input": ("export {}/net.onnx {}/net.onnx --to compact", 2, "would replace MODEL"),
    "export nowhere": ("export {}/net.onnx --to compact", 2, "give one OUTPUT"),
    "export int8 without data": ("export {}/net.onnx {}/o.onnx --to int8", 2, "give samples with --calib"),
    "export in no folder": ("export {}/net.onnx {}/none/deep --to onnx,compact", 2, "does not exist"),
    "export off": ("export {}/net.onnx {}/o.onnx --to int8 --calib {}/ok.npz --max-error 1e-9", 3, "moves the outputs by"),
    "export of tokens": ("export {}/tokens.onnx {}/o.onnx --to compact", 1, "--input-shape"),
    "metric gate without metric": ("OPT --min-metric 0.5", 2, "--min-metric needs --eval"),
    "metric not importable": ("OPT --eval nothing:here", 2, "cannot import 'nothing'"),
    "metric without colon": ("OPT --eval json", 2, "module:function"),
    "metric missing": ("OPT --eval json:none", 2, "has no 'none'"),
    "gate too fine": ("OPT --min-agreement 0.9999", 2, "finer than 16"),
    "gate missed": ("OPT --max-error 0.0001", 3, "--max-error"),
    "compare gate missed": ("compare {}/net.onnx {}/sparse.onnx --data {}/ok.npz --max-error 0", 3, "--max-error"),
    "compare unrelated": ("compare {}/net.onnx {}/tokens.onnx --data {}/ok.npz", 1, "different inputs"),
    "config unknown key": ("OPT --config {}/config.json", 2, "unknown key 'speed'"),
    "config wrong type": ("OPT --config {}/types.json", 2, "'sparsity' has the wrong type"),
    "config no JSON": ("OPT --config {}/broken.json", 2, "is not JSON"),
    "dense is the output": ("refine {}/net.onnx {}/sparse.onnx {}/net.onnx --calib {}/ok.npz", 2, "would replace DENSE"),
    "dense is sparse, in place": ("refine {}/net.onnx {}/net.onnx --in-place --calib {}/ok.npz", 2, "would replace DENSE"),
    "output is the data": ("optimize {}/net.onnx {}/ok.npz --calib {}/ok.npz", 2, "would replace --calib"),
    "output is the holdout": ("optimize {}/net.onnx {}/ok.npy --calib {}/ok.npz --holdout {}/ok.npy", 2, "replace --holdout"),
    "output is among the data": ("export {}/net.onnx {}/all/ok.npz --calib {}/all", 2, "would replace --calib"),
    "output is the settings": ("OPT -o {}/seed.json --config {}/seed.json", 2, "two outputs"),
    "export is the settings": ("export {}/net.onnx {}/seed.json --config {}/seed.json", 2, "would replace --config"),
    "output is a link to the input": ("optimize {}/net.onnx {}/link.onnx --calib {}/ok.npz", 2, "is the input"),
    "output is the input's data file": ("optimize {}/ext.onnx {}/ext.data --calib {}/ok.npz", 2, "would replace MODEL"),
    "in place of a data file": ("optimize {}/ext.onnx {}/ext.data --in-place --calib {}/ok.npz", 2, "cannot apply together"),
    "data of the output are the input's": ("optimize {}/copy.onnx {}/old.onnx --calib {}/ok.npz", 2, "the file beside OUTPUT"),
    "json is the data": ("OPT --json {}/ok.npz", 2, "--json '"),
    "json is the input behind dots": ("OPT --json {}/all/../net.onnx", 2, "would replace MODEL"),
    "json is a data file": ("analyze {}/ext.onnx --calib {}/ok.npz --json {}/ext.data", 2, "would replace MODEL"),
    "json is the output": ("OPT --json {}/all/../o.onnx", 2, "OUTPUT and --json would both write"),
    "json in place": ("optimize {}/net.onnx --in-place --calib {}/ok.npz --json {}/net.onnx", 2, "both write"),
    "settings over the model": ("OPT --save-config {}/net.onnx", 2, "--save-config '"),
    "settings over the settings": ("OPT --config {}/seed.json --save-config {}/seed.json", 2, "would replace --config"),
    "settings over a library": ("OPT --custom-op-library {}/net.onnx --save-config {}/net.onnx", 2, "would replace"),
    "report is the json": ("OPT --json {}/r.json --report {}/r.json", 2, "--json and --report would both write"),
    "comparison over its data": ("compare {}/net.onnx {}/net.onnx --data {}/ok.npz --json {}/ok.npz", 2, "would replace --data"),
    "times over a model": ("benchmark {}/net.onnx {}/ext.onnx --json {}/ext.data", 2, "would replace DENSE SPARSE..."),
    "sweep of what it picked": ("sweep {}/swept/picked/model.onnx {}/swept --calib {}/ok.npz", 2, "would replace MODEL"),
    "sweep writes it already": ("sweep {}/net.onnx {}/swept --calib {}/ok.npz --json {}/swept/table.json", 2, "both write"),
    "output is a device": ("optimize {}/net.onnx /dev/null --calib {}/ok.npz", 2, "is not a regular file"),
    "json is a device": ("OPT --json /dev/null", 2, "is not a regular file"),
    "threads without end": ("OPT --threads 99999999999", 2, "0<=x<=1024"),
    "samples without end": ("OPT --num-samples 99999999999999999999999", 2, "1<=x<=1000000000"),
    "epochs without end": ("refine {}/net.onnx {}/net.onnx {}/o.onnx --calib {}/ok.npz --epochs 9999999999", 2, "x<=1000000000"),
    "more numbers than addresses": (
        "TOK --random-range 0,8 --input-shape ids:999999999,999999999", 1, "64 of [999999999, 999999999] do not fit into memory",
    ),
    "a range beyond floats": ("optimize {}/net.onnx {}/o.onnx --calib random --random-range -1e308,1e308", 2, "random_range is"),
    "negative batch": ("benchmark {}/net.onnx --batch -1", 2, "-1 is not between 1 and 1000000000"),
    "batch without end": ("benchmark {}/net.onnx --batch 9999999999999999999999", 2, "is not between 1 and"),
    "batch beyond memory": ("benchmark {}/net.onnx --batch 1000000000", 2, "does not fit into memory"),
    "threads of no machine": ("benchmark {}/net.onnx --threads 99999999999", 2, "is not between 0 and 1024"),
    "rounds without end": ("benchmark {}/net.onnx --rounds 99999999999999999999999", 2, "1<=x<=1000000000"),
    "the same as no number": ("benchmark {}/net.onnx --require-same nan", 2, "'nan' is not a number"),
    "shape of no input to time": ("benchmark {}/net.onnx --input-shape z:1,2", 2, "--input-shape names 'z'; the inputs are 'x'"),
    "negative shape to time": ("benchmark {}/net.onnx --input-shape x:1,3,-8,8", 2, "-8 is not between 1 and"),
    "negative shape": ("inspect {}/net.onnx --input-shape x:1,3,-8,8", 2, "-8 is not between 1 and"),
    "shape without end": ("inspect {}/net.onnx --input-shape x:1,3,99999999999999999999,8", 2, "is not between 1 and"),
    "plot of unknown kind": ("analyze {}/net.onnx --calib {}/nan.npz --plot {}/p.xyz", 2, "must end in .png, .svg, .pdf"),
    "json in no folder": ("analyze {}/net.onnx --calib {}/ok.npz --json {}/none/a.json", 2, "cannot write"),
}  # fmt: skip


def test_an_export_says_that_its_samples_are_made_up(place: Path, tmp_path: Path) -> None:
    result = run("export", place / "net.onnx", tmp_path / "o.onnx", "--to", "int8", "--calib", "random")
    assert result.exit_code == 0, result.output
    assert "RANDOM calibration data" in result.output


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_sentence_and_a_code(case: str, place: Path) -> None:
    arguments, code, message = BAD[case]
    if "sparse.onnx" in arguments:
        assert run("optimize", place / "net.onnx", place / "sparse.onnx", "--calib", place / "ok.npz").exit_code == 0
    before = contents(place)
    result = run(*arguments.replace("OPT", OPT).replace("TOK", TOK).replace("{}", str(place)).split())
    text = " ".join(result.output.split())
    assert result.exit_code == code, text
    assert message in text
    assert "Traceback" not in text
    assert contents(place) == before
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 40


def test_optimize_reports_and_writes_json(place: Path, tmp_path: Path) -> None:
    target, report = tmp_path / "o.onnx", tmp_path / "r.json"
    result = run("optimize", place / "net.onnx", "-o", target, "--calib", place / "ok.npy", "--sparsity", "0.5", "--json", report)
    assert result.exit_code == 0, result.output
    assert "50.00% of the prunable weights" in result.output
    assert "fewer than the minimum" in result.output
    values = json.loads(report.read_text())
    assert values["schema_version"] == 1
    assert values["config"]["sparsity"] == 0.5
    assert values["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert {layer["layer"]["name"] for layer in values["layers"]} == {"first", "second"}
    assert values["provenance"]["model_sha256"]
    onnx.checker.check_model(target)


def test_export_writes_forms_and_json(place: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    result = run(
        "export", place / "net.onnx", tmp_path / "out", "--to", "onnx,int8+ort", "--target", "arm",
        "--calib", place / "ok.npz", "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"net.onnx", "net.int8+ort.ort", "net.int8+ort.required_operators_and_types.config"}
    assert "also wrote" in result.output
    values = json.loads(report.read_text())
    assert [e["form"] for e in values["exports"]] == ["onnx", "int8+ort"]
    assert values["exports"][1]["fidelity"]["outputs"][0]["relative_l2"] < 0.3


@pytest.mark.skipif(not kernels.available(), reason="the sparse kernels were not built: no compiler at install")
def test_a_file_for_the_kernels_from_the_command_line(place: Path, tmp_path: Path) -> None:
    settings = ("--calib", place / "ok.npz", "--for", "ort-kernels", "--tune", "--save-config", tmp_path / "c.json")
    result = run("optimize", place / "net.onnx", tmp_path / "o.onnx", *settings)
    assert result.exit_code == 0, result.output
    config = Config.load(tmp_path / "c.json")
    assert (config.pattern, config.budget, config.forms, config.tune) == ("unstructured", "macs", ("sparse-ort",), True)
    assert "layers run sparse: measured on this machine" in " ".join(result.output.split())
    assert "note: for ort-kernels" in result.output
    onnx.checker.check_model(tmp_path / "o.onnx", full_check=True)


def test_optimize_for_a_runtime(place: Path, tmp_path: Path) -> None:
    saved = tmp_path / "c.json"
    result = run(
        "optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", place / "ok.npz", "--for", "ort-web", "--sparsity", "0.9",
        "--save-config", saved,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = Config.load(saved)
    assert (config.runtime, config.forms, config.values) == ("ort-web", ("compact",), "int8")
    assert "note: for ort-web" in result.output
    assert (tmp_path / "o.onnx").stat().st_size < (place / "net.onnx").stat().st_size


@pytest.mark.parametrize(
    ("saved", "arguments", "settles"),
    [
        ({"runtime": "tensorrt"}, [], {"pattern": "2:4", "runtime": "tensorrt"}),
        (json.loads(Config(seed=7).to_json()), ["--for", "tensorrt"], {"pattern": "2:4", "runtime": "tensorrt", "seed": 7}),
        ({"forms": ["compact"]}, ["--for", "ort-mobile"], {"forms": ["int8+ort"], "target": "arm"}),
        ({"repair": "none"}, ["--effort", "low", "--pattern", "1:4"], {"pattern": "1:4", "repair": "variance"}),
    ],
)
def test_the_command_line_wins_over_a_file(
    saved: dict[str, Any], arguments: list[str], settles: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(saved))
    files: list[str | Path] = ["--config", tmp_path / "c.json", "--save-config", tmp_path / "s.json"]
    run("optimize", place / "net.onnx", "--dry-run", "--calib", place / "ok.npz", *files, *arguments)
    told = json.loads((tmp_path / "s.json").read_text())
    assert {name: told[name] for name in settles} == settles


def test_another_form_for_a_runtime(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "o.onnx"
    result = run("optimize", place / "net.onnx", target, "--calib", place / "ok.npz", "--for", "ort-mobile", "--to", "compact")
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(target, full_check=True)


def test_quiet_says_nothing(place: Path, tmp_path: Path) -> None:
    result = run("optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", place / "ok.npz", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "o.onnx").exists()


def test_threads_hold_for_matrix_products_too(place: Path, tmp_path: Path) -> None:
    def products() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2):
        assert products() == {2}
        arguments = ("optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", place / "ok.npz", "--quiet")
        assert run(*arguments).exit_code == 0
        assert products() == {2}
        assert run(*arguments, "--threads", "1").exit_code == 0
        assert products() == {1}


def test_plain_progress_goes_to_stderr(place: Path, tmp_path: Path) -> None:
    result = run("optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", place / "ok.npz")
    assert "calibrate 0/2" in result.stderr
    assert "repair 2/2" in result.stderr
    assert "calibrate" not in result.stdout.split("calibration samples")[0]


def test_dry_run_writes_nothing(place: Path, tmp_path: Path) -> None:
    result = run("optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", place / "ok.npz", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 layers, 32 calibration samples: about" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "nonsense"], "no form is called 'nonsense'"),
        (["--eval", "nosuch:f"], "cannot import 'nosuch'"),
        (["--min-agreement", "0.999"], "finer than 16 samples resolve"),
        (["--max-drop", "top1:1%"], "finer than 16 deciding samples resolve"),
        (["--nodes-to-exclude", "first", "--layer-sparsity", "first=0.3"], "layer 'first' cannot have a sparsity of its own"),
    ],
)
def test_dry_run_refuses_what_a_run_would(place: Path, tmp_path: Path, options: list[str], says: str) -> None:
    result = run("optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", place / "ok.npz", "--dry-run", *options)
    assert (result.exit_code, says in result.output) == (2, True), result.output
    missing = run("optimize", place / "net.onnx", tmp_path / "no" / "o.onnx", "--calib", place / "ok.npz", "--dry-run")
    assert missing.exit_code in (1, 2), missing.output


def test_settings_round_trip_through_a_file(place: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    first = run(
        "optimize", place / "net.onnx", tmp_path / "a.onnx", "--calib", place / "ok.npz", "--sparsity", "0.6",
        "--allocate", "erk", "--layer-sparsity", "first=0.5", "--threads", "1", "--save-config", saved,
    )  # fmt: skip
    assert first.exit_code == 0, first.output
    config = Config.load(saved)
    assert (config.sparsity, config.allocate, config.layer_sparsity) == (0.6, "erk", {"first": 0.5})
    second = run("optimize", place / "net.onnx", tmp_path / "b.onnx", "--calib", place / "ok.npz", "--config", saved)
    assert second.exit_code == 0, second.output
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    third = run(
        "optimize", place / "net.onnx", tmp_path / "c.onnx", "--calib", place / "ok.npz", "--config", saved, "--sparsity", "0.4"
    )
    assert third.exit_code == 0, third.output
    assert (tmp_path / "c.onnx").read_bytes() != (tmp_path / "b.onnx").read_bytes()


def test_analyze_plots_curves(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    picture = tmp_path / "rr.png"
    result = run("analyze", place / "net.onnx", "--calib", place / "ok.npz", "--plot", picture, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    layers = json.loads((tmp_path / "a.json").read_text())["layers"]
    assert all(len(layer["curve"]["rr"]) == len(layer["curve"]["sparsity"]) for layer in layers)
    assert "SNR dB" in result.output


def test_a_picture_without_matplotlib_is_refused_first(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relrep_onnx.commands.options.find_spec", lambda name: None)
    result = run("analyze", place / "net.onnx", "--calib", place / "nan.npz", "--plot", tmp_path / "rr.png")
    assert result.exit_code == 2, result.output
    assert "--plot needs matplotlib" in result.output


def test_inspect_counts_macs(place: Path) -> None:
    result = run("inspect", place / "net.onnx")
    assert result.exit_code == 0, result.output
    assert f"{16 * 16 * 9 * 36:,}" in result.output


def test_inspect_as_json(place: Path, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    result = run("inspect", place / "net.onnx", "--json", tmp_path / "i.json")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "i.json").read_text())
    jsonschema.validate(told, schema())
    first = told["layers"][0]
    assert (first["layer"]["name"], first["macs"]) == ("first", 16 * 8 * 9 * 36)
    refused = run("inspect", place / "net.onnx", "--json", place / "net.onnx")
    assert (refused.exit_code, "would replace MODEL" in refused.output) == (2, True)


def test_compare_writes_a_report(place: Path, tmp_path: Path) -> None:
    result = run("compare", place / "net.onnx", place / "net.onnx", "--data", place / "ok.npz", "--report", tmp_path / "r.md")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r.md").read_text().startswith("# net.onnx: compare")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "relrep_onnx", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Commands:" in done.stdout
    assert "..." not in done.stdout.partition("Commands:")[2], "no description is cut"


def test_inspect_asks_the_mobile_checker(place: Path) -> None:
    result = run("inspect", place / "net.onnx", "--mobile")
    assert result.exit_code == 0, result.output
    assert "\\x" not in result.output
    assert "NNAPI or CoreML" in result.output


def test_compare_of_a_model_with_itself(place: Path) -> None:
    result = run("compare", place / "net.onnx", place / "net.onnx", "--data", place / "ok.npz", "--max-error", "0")
    assert result.exit_code == 0, result.output
    assert "100.00%" in result.output


def test_random_data_is_named_in_the_report(place: Path, tmp_path: Path) -> None:
    result = run("optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", "random")
    assert result.exit_code == 0, result.output
    assert "RANDOM calibration data" in " ".join(result.output.split())


def test_images_of_the_sample_through_the_command(tmp_path: Path) -> None:
    result = run(
        "optimize", FASHION, tmp_path / "o.onnx", "--calib", CALIB, *NORMALIZE, "--num-samples", "96", "--budget", "macs"
    )
    assert result.exit_code == 0, result.output
    assert "80.0% of their MACs" in " ".join(result.output.split())


@pytest.mark.parametrize("command", ["inspect", "analyze", "optimize", "refine", "compare"])
def test_help_names_every_option(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    for parameter in main.commands[command].params:
        for option in parameter.opts:
            assert not option.startswith("--") or option in result.output


def test_help_shows_defaults() -> None:
    text = " ".join(run("optimize", "--help").output.split())
    defaults = Config()
    for value in (
        defaults.goal,
        defaults.pattern,
        defaults.allocate,
        defaults.repair,
        defaults.batch_size,
        defaults.positions,
        defaults.min_size,
    ):
        assert f"[default: {value}" in text


def test_version() -> None:
    assert run("--version").output == f"relrep-onnx, version {relrep_onnx.__version__}\n"


def test_installed_command_exits_with_the_code(place: Path) -> None:
    command = [sys.executable, "-c", "from relrep_onnx.cli import main; main()", "inspect", str(place / "text.onnx")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["onnxruntime.tools", "onnxruntime_tools"])
def test_symbolic_shapes_with_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sympy", reason="the ort-tools extra is not installed")
    pytest.importorskip(package, reason="the ort-tools extra is not installed")
    real = importlib.import_module

    def only(name: str) -> ModuleType:
        if not name.startswith(package):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", only)
    inferred = symbolic_shapes(small_net())
    assert inferred is not None
    assert {"c1", "c2", "p"} <= {value.name for value in inferred.graph.value_info}


def test_symbolic_shapes_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert symbolic_shapes(small_net()) is None


def test_refine_reports_what_it_did(place: Path, tmp_path: Path) -> None:
    sparse, better, state = tmp_path / "s.onnx", tmp_path / "b.onnx", tmp_path / "state"
    made = run("optimize", place / "net.onnx", sparse, "--calib", place / "ok.npz", "--sparsity", "0.7", "--repair", "none")
    assert made.exit_code == 0, made.output
    command: list[str | Path] = [
        "refine",
        place / "net.onnx",
        sparse,
        better,
        "--calib",
        place / "ok.npz",
        "--epochs",
        "12",
        "--resume",
        state,
    ]
    result = run(*command, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "refinement moved the relative L2 of block ends and outputs from" in text
    assert "aimed at" in text
    told = json.loads((tmp_path / "r.json").read_text())
    history = told["refinement"]["history"]
    assert len(history) == 13
    assert history[0]["loss"] is None
    assert told["after"]["outputs"][0]["relative_l2"] < told["before"]["outputs"][0]["relative_l2"]
    first = better.read_bytes()
    better.unlink()
    assert run(*command).exit_code == 0  # from the finished state: nothing is left to do
    assert better.read_bytes() == first


@pytest.mark.parametrize("command", ["optimize", "refine", "export"])
def test_the_size_of_the_file_is_a_gate(command: str, place: Path, tmp_path: Path) -> None:
    models = {"refine": [place / "net.onnx", place / "net.onnx"]}.get(command, [place / "net.onnx"])
    rest = {"optimize": ["--min-size", "64"], "refine": ["--epochs", "1"]}.get(command, [])
    target = tmp_path / "o.onnx"
    target.write_text("old")
    arguments: list[str | Path] = [command, *models, target, "--calib", place / "ok.npz", *rest]
    result = run(*arguments, "--max-bytes", "1KB")
    assert result.exit_code == 3, result.output
    assert "bytes are above --max-bytes 1,024" in " ".join(result.output.split())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    assert run(*arguments, "--max-bytes", "1MB").exit_code == 0
    assert target.stat().st_size < 1 << 20


def test_external_data_counts_as_size(place: Path, tmp_path: Path) -> None:
    onnx.save(small_net(), tmp_path / "in.onnx", save_as_external_data=True, location="w.data", size_threshold=16)
    arguments: list[str | Path] = ["export", tmp_path / "in.onnx", tmp_path / "o.onnx"]
    data = (tmp_path / "w.data").stat().st_size
    assert run(*arguments, "--max-bytes", str(data)).exit_code == 3
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "w.data"}
    assert run(*arguments, "--max-bytes", str(data + 8192)).exit_code == 0


def test_an_export_is_held_against_all_files_of_its_input(place: Path, tmp_path: Path) -> None:
    result = run("export", place / "ext.onnx", tmp_path / "o.onnx")
    assert result.exit_code == 0, result.output
    assert "100.5% of its input" in " ".join(result.output.split())  # the name of the data file has become longer


def test_inspect_lists_how_far_gradients_come(place: Path) -> None:
    result = run("inspect", place / "net.onnx", "--gradients", "--min-size", "1")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    layers = len(find_layers(Graph(onnx.load(place / "net.onnx")), Selection(min_size=1))[0])
    assert f"gradients of the outputs reach {layers} of {layers} layers" in text


def test_effort_sets_what_is_not_said(place: Path, tmp_path: Path) -> None:
    low: list[str | Path] = ["optimize", place / "net.onnx", tmp_path / "o.onnx", "--calib", place / "ok.npz", "--effort", "low"]
    assert run(*low, "--save-config", tmp_path / "low.json").exit_code == 0
    assert run(*low, "--repair", "bias", "--save-config", tmp_path / "bias.json").exit_code == 0
    told, said = (json.loads((tmp_path / name).read_text()) for name in ("low.json", "bias.json"))
    assert (told["repair"], told["num_samples"], told["refine"]) == ("variance", 128, 0)
    assert (said["repair"], said["num_samples"]) == ("bias", 128)
