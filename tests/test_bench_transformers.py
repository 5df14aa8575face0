"""The benchmark's transformers: they attend as they should, and what they compare is what they say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import onnx
import pytest

from relrep_onnx.inspection import inspect
from tests.models import run
from tools.bench import peer, transformer_networks, transformers
from tools.bench.transformer_networks import NETWORKS, Size
from tools.bench.transformers import Row

SMALL = Size(layers=2, width=32, heads=4, inner=64, tokens=12)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_valid_and_their_projections_are_found(name: str) -> None:
    network = NETWORKS[name]
    model = network.make(SMALL, 0)
    onnx.checker.check_model(model, full_check=True)
    first, *_ = transformers.stays(network, SMALL, model)
    assert first == f"{2 * network.projections} projections of 16,384 weights in all are pruned"
    untouched = Counter((s.op, s.reason) for s in inspect(model).skipped)
    assert untouched["MatMul", "no constant operand: the weight is computed at run time"] == 4
    assert untouched.total() - 4 == (2 if name == "encoder" else 0)  # its embeddings
    with pytest.raises(SystemExit, match="layers were found"):
        transformers.stays(network, Size(layers=3), model)


def test_padding_does_not_reach_what_is_kept() -> None:
    model, feed = transformer_networks.encoder(SMALL, 0), dict(transformer_networks.texts(SMALL, 8, 1))
    (before,) = run(model, feed).values()
    assert (np.diff(feed["attention_mask"]) <= 0).all()
    kept = feed["attention_mask"] == 1
    feed["input_ids"] = np.where(kept, feed["input_ids"], 5)
    (after,) = run(model, feed).values()
    np.testing.assert_allclose(after[kept], before[kept], atol=1e-5)
    assert np.abs(after[~kept] - before[~kept]).max() > 0.1


def test_the_decoder_looks_back_only() -> None:
    model, feed = transformer_networks.decoder(SMALL, 0), dict(transformer_networks.signals(SMALL, 8, 1))
    (before,) = run(model, feed).values()
    changed = feed["inputs_embeds"].copy()
    changed[:, 7] *= -1
    (after,) = run(model, {"inputs_embeds": changed}).values()
    np.testing.assert_allclose(after[:, :7], before[:, :7], atol=1e-5)
    assert (np.abs(after[:, 7:] - before[:, 7:]).max(axis=(0, 2)) > 1e-3).all()


def test_inputs_are_structured() -> None:
    (x,) = transformer_networks.signals(SMALL, 400, 3).values()
    neighbours = np.corrcoef(x[:, :-1].reshape(-1), x[:, 1:].reshape(-1))[0, 1]
    assert neighbours == pytest.approx(0.9, abs=0.01)
    ids = transformer_networks.texts(SMALL, 200, 3)["input_ids"]
    pairs = {(a, b) for row in ids for a, b in pairwise(row) if a and b}
    assert max(Counter(a for a, _ in pairs).values()) <= transformer_networks.SUCCESSORS


def test_methods_are_held_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "PACKAGE", "no_such_package_here")
    options = transformers.parse(["--models", "decoder", "--samples", "64", "--layers", "1", "--width", "32", "--heads", "4"])
    rows, found = transformers.measure(options)
    assert [(row.pattern, row.method) for row in rows] == [
        *(("unstructured", method) for method in transformers.OURS),
        *(("2:4", method) for method in transformers.OURS if "uniform" in method),
    ]
    assert {row.zeros for row in rows} == {0.5}
    for pattern in transformers.PATTERNS:
        errors = {row.method: row.error for row in rows if row.pattern == pattern}
        assert errors["reconstruct, uniform"] < errors["magnitude, uniform"] / 2
    lines = transformers.report(rows, found).splitlines()
    assert [line.split("|")[6].strip() for line in lines if "reconstruct" in line][1:] == ["1.00", "1.00"]
    assert len(lines) == 2 + len(rows) + 2
    assert lines[-1].startswith("- decoder: 4 projections of 12,288 weights in all are pruned; 2 x MatMul: no constant operand")


def test_errors_are_shown_as_multiples_of_the_default() -> None:
    cells = Row("encoder", "2:4", "x", 0.5, 0.3, 12.4).cells(0.1)
    assert cells == ["encoder", "2:4", "x", "50.0", "0.3000", "3.00", "12"]
    assert len(cells) == len(transformers.HEADER)
