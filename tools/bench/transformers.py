"""What pruning does to transformers: `python -m tools.bench.transformers`.

Two networks in the operators that Optimum's exports have, with random weights of a seed: an encoder (as BERT: ids and a mask in,
12 layers, norms behind the sums, products and sums apart, Gelu in five nodes) and a decoder (as GPT-2: embeddings in, 4 layers,
norms in front, `Gemm` on flattened tokens, query, key and value in one, causal mask).  Each is pruned by half, unstructured and
2:4, by magnitude alone, by this package, and by the peer, on the same samples; the table has the relative L2 of the outputs on
samples that none of them saw, and how many times that of the default it is; below it stands what was found in each network.

No training: plain Gaussian weights on white inputs would be the one case that has nothing to repair, for neither do inputs
predict each other nor are some weights smaller than they should be.  So weights have what trained ones are known for: a spectrum
that falls, entries with heavy tails, channels of unequal scale, also in the norms.  Ids come from a Markov chain over a small
vocabulary whose embeddings are close to a subspace; embeddings for the decoder are AR(1) in time and correlated across channels.
Figures compare methods on these, and say nothing on the accuracy of a trained model.

    python -m tools.bench.transformers --json transformers.json
    python -m tools.bench.transformers --models decoder --samples 64
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from relrep_onnx import Config, optimize
from relrep_onnx.graph import Graph, count_zeros, find_layers
from relrep_onnx.inspection import inspect
from relrep_onnx.types import Selection
from tools.bench import peer
from tools.bench.data import Array, environment, markdown_table, open_session, write_json
from tools.bench.networks import Builder
from tools.bench.options import names

WORDS: Final = 512
PLACES: Final = 64
SUCCESSORS: Final = 8
"""How many ids may follow one."""
MAGNITUDE: Final = {"repair": "none"}
OURS: Final[Mapping[str, Mapping[str, Any]]] = {
    "magnitude, uniform": {**MAGNITUDE, "allocate": "uniform"},
    "magnitude, global": {**MAGNITUDE, "allocate": "global"},
    "reconstruct, uniform": {"allocate": "uniform"},
    "reconstruct, auto": {},
}
PATTERNS: Final[Mapping[str, tuple[int, int] | None]] = {"unstructured": None, "2:4": (2, 4)}
"""Names, and what the peer calls them."""
HEADER: Final = ("model", "pattern", "method", "zeros %", "error", "of the default's", "s")

Feed = Mapping[str, Array]


@dataclass(frozen=True)
class Size:
    """Of a network: layers, width, heads, inner width, tokens of a sample."""

    layers: int
    width: int = 384
    heads: int = 12
    inner: int = 1536
    tokens: int = 32


@dataclass
class Stack(Builder):
    """A growing transformer."""

    size: Size = Size(1)

    def put(self, value: Array, kind: type[np.generic] = np.float32) -> str:
        """A stored tensor."""
        name = f"w{len(self.tensors)}"
        self.tensors[name] = np.asarray(value, kind)
        return name

    def _random(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, len(self.tensors)])

    def matrix(self, into: int, out: int, gain: float = 1.0) -> str:
        """A weight[into, out] as the module's docstring says."""
        rng, rank = self._random(), max(1, min(into, out) // 4)
        spectrum = np.arange(1, rank + 1) ** -0.5
        smooth = (rng.normal(size=(into, rank)) * spectrum) @ rng.normal(size=(rank, out))
        rough = rng.standard_t(4, (into, out)) * rng.lognormal(0, 0.4, (into, 1))
        weight = smooth / smooth.std() + rough / rough.std()
        return self.put(weight * gain / (weight.std() * into**0.5))

    def vector(self, length: int) -> str:
        """A bias."""
        return self.put(0.1 * self._random().normal(size=length))

    def norm(self, x: str) -> str:
        """LayerNormalization."""
        gains = self.put(self._random().lognormal(0, 0.4, self.size.width))
        return self.add("LayerNormalization", x, gains, self.vector(self.size.width), axis=-1, epsilon=1e-5)

    def linear(self, x: str, into: int, out: int, gain: float = 1.0) -> str:
        """A product, and a sum with the bias in front."""
        return self.add("Add", self.vector(out), self.add("MatMul", x, self.matrix(into, out, gain)))

    def flat_linear(self, x: str, into: int, out: int, gain: float = 1.0) -> str:
        """All tokens as rows, Gemm, and back."""
        rows = self.add("Reshape", x, self.put(np.array([-1, into]), np.int64))
        product = self.add("Gemm", rows, self.matrix(into, out, gain), self.vector(out))
        ends = self.add("Slice", self.add("Shape", x), *(self.put(np.array([n]), np.int64) for n in (0, 2)))
        return self.add("Reshape", product, self.add("Concat", ends, self.put(np.array([out]), np.int64), axis=0))

    def heads(self, x: str, order: Sequence[int] = (0, 2, 1, 3)) -> str:
        """[n, tokens, width] to [n, heads, tokens, width / heads], or its last two axes the other way round."""
        shape = np.array([0, -1, self.size.heads, self.size.width // self.size.heads])
        return self.add("Transpose", self.add("Reshape", x, self.put(shape, np.int64)), perm=list(order))

    def attend(self, query: str, key: str, value: str, masked: Callable[[str], str]) -> str:
        """Softmax attention: both of its products are of activations."""
        scale = self.put(np.array((self.size.width // self.size.heads) ** 0.5))
        scores = self.add("Div", self.add("MatMul", self.heads(query), self.heads(key, (0, 2, 3, 1))), scale)
        mixed = self.add("MatMul", self.add("Softmax", masked(scores), axis=-1), self.heads(value))
        shape = self.put(np.array([0, -1, self.size.width]), np.int64)
        return self.add("Reshape", self.add("Transpose", mixed, perm=[0, 2, 1, 3]), shape)

    def finished(self, inputs: Mapping[str, tuple[int, Sequence[str | int]]], output: str, opset: int) -> ModelProto:
        """The network with its one output, float32[n, tokens, width]."""
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", "tokens", self.size.width])
        x = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        stored = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "transformer", x, [y], stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def encoder(size: Size, seed: int) -> ModelProto:
    """input_ids and attention_mask int64[n, tokens] to float32[n, tokens, width], operator set 17."""
    b, width, inner = Stack(seed, size=size), size.width, size.inner
    words = correlated(np.random.default_rng([seed, 1]), (WORDS, width))
    length = b.add("Slice", b.add("Shape", "input_ids"), *(b.put(np.array([n]), np.int64) for n in (1, 2)))
    zero = b.put(np.array([0]), np.int64)
    places = b.add("Slice", b.put(0.3 * np.random.default_rng([seed, 2]).normal(size=(PLACES, width))), zero, length, zero)
    x = b.norm(b.add("Add", b.add("Gather", b.put(words), "input_ids"), places))
    wide = b.add("Unsqueeze", "attention_mask", b.put(np.array([1, 2]), np.int64))
    kept = b.add("Sub", b.put(np.array(1.0)), b.add("Cast", wide, to=TensorProto.FLOAT))
    mask = b.add("Mul", kept, b.put(np.array(-1e4)))
    for _ in range(size.layers):
        query, key, value = (b.linear(x, width, width) for _ in range(3))
        mixed = b.attend(query, key, value, lambda scores: b.add("Add", scores, mask))
        x = b.norm(b.add("Add", b.linear(mixed, width, width), x))
        h = b.linear(x, width, inner)
        error = b.add("Erf", b.add("Div", h, b.put(np.array(2**0.5))))
        gelu = b.add("Mul", b.add("Mul", h, b.add("Add", error, b.put(np.array(1.0)))), b.put(np.array(0.5)))
        x = b.norm(b.add("Add", b.linear(gelu, inner, width), x))
    ids = (TensorProto.INT64, ("n", "tokens"))
    return b.finished({"input_ids": ids, "attention_mask": ids}, x, 17)


def decoder(size: Size, seed: int) -> ModelProto:
    """inputs_embeds float32[n, tokens, width] to the same shape, operator set 20."""
    b, width, inner = Stack(seed, size=size), size.width, size.inner
    x = "inputs_embeds"
    zero, one = (b.put(np.array(n), np.int64) for n in (0, 1))
    steps = b.add("Range", zero, b.add("Gather", b.add("Shape", x), one), one)
    rows = b.add("Unsqueeze", steps, b.put(np.array([1]), np.int64))
    past = b.add("LessOrEqual", steps, rows)
    lowest = b.put(np.array(np.finfo(np.float32).min))
    for _ in range(size.layers):
        mixed = b.flat_linear(b.norm(x), width, 3 * width)
        query, key, value = (f"{mixed}_{name}" for name in "qkv")
        thirds = b.put(np.full(3, width), np.int64)
        b.nodes.append(helper.make_node("Split", [mixed, thirds], [query, key, value], name=f"{mixed}_split", axis=2))
        attended = b.attend(query, key, value, lambda scores: b.add("Where", past, scores, lowest))
        x = b.add("Add", x, b.flat_linear(attended, width, width))
        h = b.add("Gelu", b.flat_linear(b.norm(x), width, inner), approximate="tanh")
        x = b.add("Add", x, b.flat_linear(h, inner, width))
    return b.finished({"inputs_embeds": (TensorProto.FLOAT, ("n", "tokens", width))}, b.norm(x), 20)


def correlated(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Vectors along the last axis close to a subspace of an eighth of its dimensions, of variance about 1."""
    inner = max(1, shape[-1] // 8)
    basis = np.random.default_rng(shape[-1]).normal(size=(inner, shape[-1])) / inner**0.5
    return np.asarray(rng.normal(size=(*shape[:-1], inner)) @ basis + 0.2 * rng.normal(size=shape))


def texts(size: Size, count: int, seed: int) -> Feed:
    """Walks of a Markov chain (the same for every seed), of unequal length."""
    chain = np.random.default_rng(0).integers(1, WORDS, (WORDS, SUCCESSORS))
    shares = 1 / np.arange(1, SUCCESSORS + 1)
    rng = np.random.default_rng(seed)
    ids = np.empty((count, size.tokens), np.int64)
    ids[:, 0] = rng.integers(1, WORDS, count)
    for step in range(1, size.tokens):
        ids[:, step] = chain[ids[:, step - 1], rng.choice(SUCCESSORS, count, p=shares / shares.sum())]
    mask = (np.arange(size.tokens) < rng.integers(size.tokens // 2, size.tokens + 1, (count, 1))).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}


def signals(size: Size, count: int, seed: int) -> Feed:
    """AR(1) sequences, x[t] = 0.9 x[t - 1] + noise."""
    noise = correlated(np.random.default_rng(seed), (count, size.tokens, size.width))
    for step in range(1, size.tokens):
        noise[:, step] = 0.9 * noise[:, step - 1] + (1 - 0.9**2) ** 0.5 * noise[:, step]
    return {"inputs_embeds": noise.astype(np.float32)}


@dataclass(frozen=True)
class Network:
    """How a model is made, and its samples; `projections` of each layer are what can be pruned."""

    make: Callable[[Size, int], ModelProto]
    samples: Callable[[Size, int, int], Feed]
    size: Size
    projections: int


NETWORKS: Final[Mapping[str, Network]] = {
    "encoder": Network(encoder, texts, Size(12), 6),
    "decoder": Network(decoder, signals, Size(4), 4),
}


@dataclass(frozen=True)
class Row:
    """One method on one model: the share of zeros in what can be pruned, and the relative L2 of the outputs on unseen samples."""

    model: str
    pattern: str
    method: str
    zeros: float
    error: float
    seconds: float

    def cells(self, best: float) -> list[str]:
        """A row of the table; `best` is the error of the default."""
        ratio = f"{self.error / best:.2f}"
        return [
            *(self.model, self.pattern, self.method, f"{100 * self.zeros:.1f}", f"{self.error:.4f}"),
            *(ratio, f"{self.seconds:.0f}"),
        ]


@dataclass(frozen=True)
class Question:
    """One model and what it is asked with."""

    name: str
    model: ModelProto
    path: Path
    calibration: Feed
    unseen: Feed
    options: argparse.Namespace

    def row(self, pattern: str, method: str, sparse: ModelProto, seconds: float) -> Row:
        """Judges one result."""
        layers, _ = find_layers(Graph(self.model), Selection())
        zeros = sum(count_zeros(Graph(sparse), layers).values()) / sum(layer.size for layer in layers)
        dense, moved = (open_session(model, self.options.threads).run(None, self.unseen)[0] for model in (self.model, sparse))
        error = float(np.linalg.norm(moved - dense) / np.linalg.norm(dense))
        print(f"{self.name} {pattern} {method}: {error:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return Row(self.name, pattern, method, zeros, error, seconds)

    def answers(self, pattern: str) -> list[Row]:
        """Every method."""
        rows = []
        for method, settings in OURS.items():
            if pattern != "unstructured" and "uniform" not in method:
                continue  # all layers are full: there is nothing to allocate
            started = time.perf_counter()
            config = Config(
                **{"sparsity": 0.5, "pattern": pattern, "threads": self.options.threads, "seed": self.options.seed, **settings}
            )
            sparse = optimize(self.path, None, self.calibration, config).model
            rows.append(self.row(pattern, method, sparse, time.perf_counter() - started))
        if peer.available():
            sparse, seconds = peer.prune(self.path, self.calibration, 0.5, 32, PATTERNS[pattern])
            rows.append(self.row(pattern, peer.PEER, sparse, seconds))
        return rows


def stays(network: Network, size: Size, model: ModelProto) -> list[str]:
    """Sentences on what was found: all projections, and no product of activations.

    Raises:
        SystemExit: the package finds something else.
    """
    found = inspect(model)
    if len(found.layers) != network.projections * size.layers:
        raise SystemExit(f"{len(found.layers)} layers were found; there are {network.projections * size.layers} projections")
    reasons = Counter(f"{skipped.op}: {skipped.reason}" for skipped in found.skipped)
    weights = sum(facts.layer.size for facts in found.layers)
    return [
        f"{len(found.layers)} projections of {weights:,} weights in all are pruned",
        *(f"{count} x {reason}" for reason, count in reasons.items()),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action=names(list(NETWORKS)), default=list(NETWORKS), metavar="A,B")
    parser.add_argument("--patterns", action=names(list(PATTERNS)), default=list(PATTERNS), metavar="A,B")
    parser.add_argument("--samples", type=int, default=256, help="for calibration; an eighth decides and verifies")
    parser.add_argument("--layers", type=int, help="instead of 12 and 4")
    parser.add_argument("--width", type=int, default=384, help="inner width is four times that")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, list[str]]]:
    """All rows, and what stayed of each model."""
    rows, found = [], {}
    for name in options.models:
        network = NETWORKS[name]
        size = dataclasses.replace(
            network.size,
            layers=options.layers or network.size.layers,
            width=options.width,
            inner=4 * options.width,
            heads=options.heads,
        )
        model = network.make(size, options.seed)
        found[name] = stays(network, size, model)
        samples, unseen = (network.samples(size, options.samples, options.seed + n) for n in (1, 2))
        with tempfile.TemporaryDirectory(prefix="relrep-bench-") as folder:
            path = Path(folder) / "dense.onnx"
            onnx.save(model, path)
            question = Question(name, model, path, samples, unseen, options)
            rows += [row for pattern in options.patterns for row in question.answers(pattern)]
    return rows, found


def report(rows: Sequence[Row], found: Mapping[str, Sequence[str]]) -> str:
    """The table, and what stayed."""
    best = {(row.model, row.pattern): row.error for row in rows if row.method.startswith("reconstruct")}  # the last: the default
    table = markdown_table(HEADER, [row.cells(best[row.model, row.pattern]) for row in rows])
    return "\n".join([table, "", *(f"- {name}: {'; '.join(sentences)}" for name, sentences in found.items())])


def main() -> None:
    options = parse()
    rows, found = measure(options)
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    settings = f"{options.samples} samples, as many unseen, seed {options.seed}, {options.threads} threads"
    print(f"{settings}; {versions}; {peer.describe()}\n\n{report(rows, found)}")
    if options.json:
        document = {"settings": settings, "environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]}
        write_json(options.json, document)


if __name__ == "__main__":
    main()
