"""What goes wrong around a run: signals, full disks, no memory, a damaged cache, bad samples.  What was there before stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, helper, numpy_helper

from relrep_onnx import CalibrationError, analyze, compare, optimize, refinement, steps
from relrep_onnx.cli import main
from relrep_onnx.types import Array, Layer, RepairedLayer
from tests.test_pipeline import SMALL, inputs, small_net

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")
MEGABYTE = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, samples, and an old output that must stay."""
    onnx.save(small_net(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", inputs())
    (tmp_path / "out.onnx").write_bytes(b"the old output")
    return tmp_path


def command(place: Path, *more: str) -> list[str]:
    return [
        "optimize", str(place / "net.onnx"), str(place / "out.onnx"), "--calib", str(place / "x.npy"), "--min-size", "64",
        "--allocate", "uniform", "--threads", "1", *more,
    ]  # fmt: skip


def assert_as_before(place: Path, *also: str) -> None:
    assert (place / "out.onnx").read_bytes() == b"the old output"
    assert {p.name for p in place.iterdir()} == {"net.onnx", "x.npy", "out.onnx", *also}


# Runs the command in an interpreter of its own; FAULT happens when the sparse model is written and about to be verified.
CHILD = """
import os, signal, resource, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
from relrep_onnx import pipeline
from relrep_onnx.cli import main
compared = pipeline.compare_sessions
def at_the_worst_moment(*arguments):
    {fault}
    return compared(*arguments)
pipeline.compare_sessions = at_the_worst_moment
main(sys.argv[1:])
"""


def child(place: Path, fault: str, *more: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", CHILD.format(fault=fault), *command(place, *more)]
    return subprocess.run(program, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "code", "says"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM")])
def test_signals_end_a_run_cleanly(place: Path, name: str, code: int, says: str) -> None:
    done = child(place, f"os.kill(os.getpid(), signal.{name})")
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(f"Error: {says}")
    assert "Traceback" not in done.stderr
    assert_as_before(place)


def test_sigterm_is_no_failure_of_the_metric(place: Path) -> None:
    (place / "ending.py").write_text("import os, signal\ndef ends(session): os.kill(os.getpid(), signal.SIGTERM)\n")
    program = [sys.executable, "-m", "relrep_onnx", *command(place, "--eval", "ending:ends")]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=place)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "Error: ended by SIGTERM; unfinished output was discarded")
    (place / "ending.py").unlink()
    shutil.rmtree(place / "__pycache__", ignore_errors=True)
    assert_as_before(place)


REFINED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from relrep_onnx import refinement
from relrep_onnx.cli import main
whole = refinement.Loop.epoch
def interrupted_in_the_third(self, total):
    if len(self.history) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    whole(self, total)
refinement.Loop.epoch = interrupted_in_the_third
main(sys.argv[1:])
"""


def test_ctrl_c_in_refinement_writes_the_best_so_far_and_says_so(place: Path) -> None:
    arguments = command(place, "--refine", "20", "--augment", "none", "--repair", "none", "--json", str(place / "r.json"))
    done = subprocess.run([sys.executable, "-c", REFINED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == f"Error: interrupted; {place / 'out.onnx'} holds the best state so far"
    assert "refine 0/20, held-out error" in done.stderr
    assert "refine 20/20" not in done.stderr
    assert "2 of 20 epochs (interrupted)" in done.stdout
    onnx.checker.check_model(onnx.load(place / "out.onnx"))
    assert json.loads((place / "r.json").read_text())["refinement"]["interrupted"]
    arguments = ["sweep", str(place / "net.onnx"), str(place / "points"), *command(place)[3:], "--sparsity", "0.5,0.6"]
    (place / "c.json").write_text('{"refine": 20, "augment": "none"}')
    arguments += ["--config", str(place / "c.json"), "--repair", "none"]
    done = subprocess.run([sys.executable, "-c", REFINED, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "Error: interrupted; unfinished output was discarded")


def test_ctrl_c_in_a_sweep_of_processes_is_one_sentence(place: Path) -> None:
    """A terminal sends it to all: the processes leave it to the one that started them, while they start up too."""
    folder = place / "points"
    start = "import signal; signal.signal(2, signal.default_int_handler); from relrep_onnx.cli import main; main()"
    arguments = ["sweep", str(place / "net.onnx"), str(folder), *command(place)[3:], "--sparsity", "0.5:0.9:0.01", "--jobs", "2"]
    run = [sys.executable, "-c", start, *arguments]
    child = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stderr is not None
    said = [next(line for line in child.stderr if line.startswith("sweep 0/"))]
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)
    said += child.communicate(timeout=60)[1].splitlines()
    assert child.returncode == 130
    assert said[-1] == "Error: interrupted; unfinished output was discarded"
    assert not [line for line in said if "Traceback" in line or "KeyboardInterrupt" in line]


def test_a_signal_handler_is_put_back(place: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert CliRunner().invoke(main, ["inspect", str(place / "net.onnx")]).exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_a_kill_the_next_run_cleans_up(place: Path) -> None:
    assert child(place, "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    assert (place / "out.onnx").read_bytes() == b"the old output"
    assert [p for p in place.iterdir() if p.name.endswith(".tmp")], "the killed run leaves its temporary file"
    assert CliRunner().invoke(main, command(place)).exit_code == 0
    onnx.checker.check_model(onnx.load(place / "out.onnx"))
    assert {p.name for p in place.iterdir()} == {"net.onnx", "x.npy", "out.onnx"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def filled(disk: Path, left: int) -> None:
    room = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - left))


def test_a_full_disk_keeps_the_old_output(place: Path, small_disk: Path) -> None:
    (small_disk / "out.onnx").write_bytes(b"the old output")
    filled(small_disk, 4096)
    arguments = command(place)
    arguments[2] = str(small_disk / "out.onnx")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert isinstance(done.exception, SystemExit)
    assert (small_disk / "out.onnx").read_bytes() == b"the old output"
    assert {p.name for p in small_disk.iterdir()} == {"out.onnx", "ballast"}


def test_a_full_disk_for_waiting_activations(place: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(small_disk, 8192)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    done = CliRunner().invoke(main, command(place, "--max-memory", "1"))
    assert done.exit_code == 1
    assert "no room for waiting activations" in done.stderr
    assert_as_before(place, "disk")


def test_a_full_disk_for_the_cache_and_the_finished_layers_is_no_error(place: Path, small_disk: Path) -> None:
    filled(small_disk, 4096)
    done = CliRunner().invoke(main, command(place, "--cache-dir", str(small_disk / "a"), "--resume", str(small_disk / "b")))
    assert done.exit_code == 0, done.output


def test_a_file_size_limit_keeps_the_old_output(place: Path) -> None:
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    program = CHILD.format(fault="pass").replace("compared =", f"{limit}\ncompared =")
    done = subprocess.run([sys.executable, "-c", program, *command(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert_as_before(place)


def test_a_memory_limit_ends_with_a_sentence(place: Path) -> None:
    x = np.random.default_rng(0).standard_normal((96, 8, 6, 6)).astype(np.float32)
    np.save(place / "x.npy", np.repeat(x, 100, axis=0))
    used = "int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()"
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({used} + {8 * MEGABYTE},) * 2)"
    program = CHILD.format(fault="pass").replace("compared =", f"{limit}\ncompared =")
    done = subprocess.run([sys.executable, "-c", program, *command(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert_as_before(place)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(place: Path) -> None:
    place.chmod(0o500)
    try:
        done = CliRunner().invoke(main, command(place))
    finally:
        place.chmod(0o700)
    assert done.exit_code == 1
    assert "cannot write" in done.stderr
    assert_as_before(place)


def test_a_target_that_cannot_be_written(place: Path) -> None:
    arguments = command(place)
    arguments[2] = "/proc/out.onnx"  # even root cannot
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "cannot write '/proc/out.onnx'" in done.stderr


def test_a_damaged_cache_is_rebuilt(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = optimize(place / "net.onnx", None, inputs(), SMALL, cache_dir=folder).model.SerializeToString()
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    for number, path in enumerate(sorted(folder.iterdir())):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if number % 2 else content[:100])
    assert optimize(place / "net.onnx", None, inputs(), SMALL, cache_dir=folder).model.SerializeToString() == first
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


def test_two_processes_share_a_cache_and_a_resume_folder(place: Path) -> None:
    programs = []
    for name in ("a.onnx", "b.onnx"):
        arguments = command(place, "--cache-dir", str(place / "cache"), "--resume", str(place / "state"))
        arguments[2] = str(place / name)
        code = "import sys; from relrep_onnx.cli import main; main(sys.argv[1:])"
        program = [sys.executable, "-c", code, *arguments]
        programs.append(subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL))
    for running in programs:
        said = running.communicate()[1]
        assert running.returncode == 0, said
    assert (place / "a.onnx").read_bytes() == (place / "b.onnx").read_bytes()


class Killed(BaseException):
    """Stands for a kill between two layers."""


def test_a_run_goes_on_from_the_last_finished_layer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = optimize(place / "net.onnx", None, inputs(), SMALL).model.SerializeToString()
    put, calls = steps.Finished.put, 0

    def dies(self: steps.Finished, layer: Layer, repaired: RepairedLayer) -> None:
        nonlocal calls
        put(self, layer, repaired)
        calls += 1
        if calls == 2:
            raise Killed

    state = place / "state"
    monkeypatch.setattr(steps.Finished, "put", dies)
    with pytest.raises(Killed):
        optimize(place / "net.onnx", None, inputs(), SMALL, resume=state)
    finished: list[str] = []
    monkeypatch.setattr(steps.Finished, "put", lambda self, layer, repaired: finished.append(layer.name))
    resumed = optimize(place / "net.onnx", None, inputs(), SMALL, resume=state)
    assert resumed.model.SerializeToString() == plain
    everything: list[str] = []
    monkeypatch.setattr(steps.Finished, "put", lambda self, layer, repaired: everything.append(layer.name))
    optimize(place / "net.onnx", None, inputs(), SMALL, resume=place / "other")
    assert len(finished) == len(everything) - 2
    assert finished == everything[2:]


def test_a_run_goes_on_from_the_last_epoch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = replace(SMALL, refine=4, augment="none"), place / "state"
    plain = optimize(place / "net.onnx", None, inputs(), config).model.SerializeToString()
    whole, epochs = refinement.Loop.epoch, 0

    def counted(self: refinement.Loop, total: int) -> None:
        nonlocal epochs
        whole(self, total)
        epochs += 1

    def dies(self: refinement.Loop, total: int) -> None:
        if len(self.history) == 3:
            raise Killed
        whole(self, total)

    monkeypatch.setattr(refinement.Loop, "epoch", dies)
    with pytest.raises(Killed):
        optimize(place / "net.onnx", None, inputs(), config, resume=state)
    monkeypatch.setattr(refinement.Loop, "epoch", counted)
    assert optimize(place / "net.onnx", None, inputs(), config, resume=state).model.SerializeToString() == plain
    assert epochs == 2


def test_a_finished_layer_of_other_settings_is_not_taken(place: Path) -> None:
    state = place / "state"
    optimize(place / "net.onnx", None, inputs(), SMALL, resume=state)
    for other in (replace(SMALL, sparsity=0.5), replace(SMALL, repair="variance"), replace(SMALL, pattern="2:4", sparsity=None)):
        resumed = optimize(place / "net.onnx", None, inputs(), other, resume=state)
        assert resumed.model.SerializeToString() == optimize(place / "net.onnx", None, inputs(), other).model.SerializeToString()


def test_damaged_layers_are_made_again(place: Path) -> None:
    state = place / "state"
    first = optimize(place / "net.onnx", None, inputs(), SMALL, resume=state).model.SerializeToString()
    for path in state.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert optimize(place / "net.onnx", None, inputs(), SMALL, resume=state).model.SerializeToString() == first


def picky() -> ModelProto:
    """The small network with a division by a sample's first value, and a Reshape that fails where its second one is 1."""
    model = small_net()
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            if name == "x":
                node.input[slot] = "scaled"
    tensors = {"zero": np.array([0]), "one": np.array([1]), "axes": np.array([1]), "tail": np.array([8, 6, 6])}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in tensors.items())
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("Slice", ["rows", "zero", "one", "axes"], ["first"]),
        helper.make_node("Div", ["rows", "first"], ["quotient"]),
        helper.make_node("Reshape", ["quotient", "shape"], ["scaled"]),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 288]), "flat"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 8, 6, 6]), "shape"))
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return model


def with_bad() -> Array:
    """Samples of which 5 and 70 make the network divide by zero."""
    x = inputs()
    x[:, 0, 0, 0] = 1 + np.abs(x[:, 0, 0, 0])
    x[[5, 70], 0, 0, 0] = 0
    return x


@pytest.mark.parametrize("run", [analyze, lambda *a: optimize(a[0], None, *a[1:])], ids=["analyze", "optimize"])
def test_a_sample_that_fails_in_the_middle_is_named(run: Callable[..., object], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", with_bad())
    with pytest.raises(CalibrationError, match=r"x\.npy, sample 5: .*NaN or infinity; leave it out, or give --skip-bad-samples"):
        run(picky(), tmp_path / "x.npy", SMALL)


def test_bad_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    x = with_bad()
    np.save(tmp_path / "bad.npy", x)
    np.save(tmp_path / "good.npy", np.delete(x, [5, 70], axis=0))
    skipping = replace(SMALL, skip_bad_samples=True)
    result = optimize(picky(), None, tmp_path / "bad.npy", skipping)
    assert [text.split(":")[0] for text in result.provenance.left_out] == [f"{tmp_path}/bad.npy, sample {n}" for n in (5, 70)]
    assert "2 bad samples or files were left out" in " ".join(result.notes)
    expected = optimize(picky(), None, tmp_path / "good.npy", SMALL)
    assert result.model.SerializeToString() == expected.model.SerializeToString()


def test_files_and_rows_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    x = inputs()
    x[7, 0, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", x[:50])
    np.save(tmp_path / "b.npy", x[50:, :5])  # five channels, not eight
    np.save(tmp_path / "c.npy", x[50:])
    (tmp_path / "d.npz").write_bytes(b"no archive")
    config = replace(SMALL, skip_bad_samples=True)
    result = analyze(small_net(), tmp_path, config)
    named = [Path(text.split(":")[0]).name for text in result.provenance.left_out]
    assert named == ["a.npy, sample 7", *(f"b.npy, sample {n}" for n in range(46)), "d.npz"]
    assert result.provenance.calibration_samples == 95 - 32
    assert "48 bad samples" in " ".join(result.notes)
    assert "and 43 more" in " ".join(result.notes)
    assert compare(small_net(), small_net(), tmp_path, config).samples == 95


def test_when_all_are_bad_the_first_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", inputs()[:, :5])
    with pytest.raises(CalibrationError, match=r"no sample is left; .*x\.npy, sample 0: "):
        analyze(small_net(), tmp_path / "x.npy", replace(SMALL, skip_bad_samples=True))
    x = with_bad()
    x[:, 0, 0, 0] = 0
    with pytest.raises(CalibrationError, match=r"no sample is left; .*the given data, sample 0: .*NaN or infinity"):
        analyze(picky(), x, replace(SMALL, skip_bad_samples=True))


def test_without_bad_samples_nothing_changes() -> None:
    skipping = optimize(small_net(), None, inputs(), replace(SMALL, skip_bad_samples=True))
    assert skipping.provenance.left_out == ()
    assert skipping.model.SerializeToString() == optimize(small_net(), None, inputs(), SMALL).model.SerializeToString()
