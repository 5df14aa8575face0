"""Transformers in the operators that Optimum's exports have, with random weights of a seed, and samples for them.

An encoder (as BERT: ids and a mask in, norms behind the sums, products and sums apart, Gelu in five nodes) and a decoder (as
GPT-2: embeddings in, norms in front, `Gemm` on flattened tokens, query, key and value in one, causal mask).

No training: plain Gaussian weights on white inputs would be the one case that has nothing to repair, for neither do inputs
predict each other nor are some weights smaller than they should be.  So weights have what trained ones are known for: a spectrum
that falls, entries with heavy tails, channels of unequal scale, also in the norms.  Ids come from a Markov chain over a small
vocabulary whose embeddings are close to a subspace; embeddings for the decoder are AR(1) in time and correlated across channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tools.bench.data import Array
from tools.bench.networks import Builder

WORDS: Final = 512
PLACES: Final = 64
SUCCESSORS: Final = 8
"""How many ids may follow one."""

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
