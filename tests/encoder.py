"""A small transformer encoder with a classifier, in the operators and names that exporters of PyTorch write for such models."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, helper

from relrep_onnx.types import Array
from tests.models import OPSET, random, tensor, value

WORDS, PLACES, KINDS = 97, 24, 2
WIDTH, HEADS, INNER, CLASSES = 32, 4, 64, 5


@dataclass
class Writer:
    """A growing graph, a scope of node names at a time; each method gives the name of the tensor it writes."""

    decomposed: bool
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)

    def op(self, scope: str, op: str, *inputs: str, **attributes: object) -> str:
        """One node called `/scope/Op` or `/scope/Op_N`, its output called after it."""
        taken = sum(node.name.rsplit("_", 1)[0] == f"/{scope}/{op}" for node in self.nodes)
        name = f"/{scope}/{op}_{taken}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_output_0"], name=name, **attributes))  # type: ignore[arg-type]
        return f"{name}_output_0"

    def const(self, scope: str, value: object) -> str:
        """A Constant node: integers are int64, the rest float32."""
        array = np.asarray(value)
        return self.op(scope, "Constant", value=tensor(array.astype(np.int64 if array.dtype.kind == "i" else np.float32)))

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        """A stored random tensor."""
        self.tensors[name] = np.float32(scale) * random(len(self.tensors), *shape)
        return name

    def linear(self, scope: str, x: str, into: int, out: int) -> str:
        """MatMul with an anonymous transposed weight, then Add with the bias first."""
        product = self.op(scope, "MatMul", x, self.weight(f"onnx::MatMul_{len(self.tensors)}", into, out, scale=into**-0.5))
        return self.op(scope, "Add", self.weight(f"{scope.replace('/', '.')}.bias", out, scale=0.1), product)

    def norm(self, scope: str, x: str) -> str:
        """LayerNormalization, as one node or in the pieces that operator sets before 17 needed."""
        self.tensors[f"{scope}.weight"] = 1 + 0.1 * random(len(self.tensors), WIDTH)
        gain, shift = f"{scope}.weight", self.weight(f"{scope}.bias", WIDTH, scale=0.1)
        if not self.decomposed:
            return self.op(scope, "LayerNormalization", x, gain, shift, axis=-1, epsilon=1e-12)
        centred = self.op(scope, "Sub", x, self.op(scope, "ReduceMean", x, axes=[-1]))
        square = self.op(scope, "Pow", centred, self.const(scope, 2.0))
        variance = self.op(scope, "Add", self.op(scope, "ReduceMean", square, axes=[-1]), self.const(scope, 1e-12))
        scaled = self.op(scope, "Div", centred, self.op(scope, "Sqrt", variance))
        return self.op(scope, "Add", self.op(scope, "Mul", scaled, gain), shift)

    def size(self, scope: str, x: str, axis: int) -> str:
        """One size of a tensor as int64[1], the way traced code asks for it."""
        one = self.op(scope, "Gather", self.op(scope, "Shape", x), self.const(scope, axis), axis=0)
        return self.op(scope, "Unsqueeze", one, self.const(scope, [0]))

    def split(self, scope: str, x: str, order: list[int]) -> str:
        """[n, tokens, width] to [n, heads, tokens, width / heads], or its last two axes the other way round."""
        parts = [self.size(scope, x, 0), self.size(scope, x, 1), self.const(scope, [HEADS]), self.const(scope, [WIDTH // HEADS])]
        return self.op(scope, "Transpose", self.op(scope, "Reshape", x, self.op(scope, "Concat", *parts, axis=0)), perm=order)

    def attention(self, scope: str, x: str, mask: str) -> str:
        """Self-attention of all heads, its output projection included."""
        query, key, value_ = (self.linear(f"{scope}/self/{what}", x, WIDTH, WIDTH) for what in ("query", "key", "value"))
        own = f"{scope}/self"
        scores = self.op(own, "MatMul", self.split(own, query, [0, 2, 1, 3]), self.split(own, key, [0, 2, 3, 1]))
        scores = self.op(own, "Add", self.op(own, "Div", scores, self.const(own, (WIDTH / HEADS) ** 0.5)), mask)
        mixed = self.op(own, "MatMul", self.op(own, "Softmax", scores, axis=-1), self.split(own, value_, [0, 2, 1, 3]))
        mixed = self.op(own, "Transpose", mixed, perm=[0, 2, 1, 3])
        parts = [self.size(own, mixed, 0), self.size(own, mixed, 1), self.const(own, [WIDTH])]
        joined = self.op(own, "Reshape", mixed, self.op(own, "Concat", *parts, axis=0))
        return self.linear(f"{scope}/output/dense", joined, WIDTH, WIDTH)

    def gelu(self, scope: str, x: str) -> str:
        """x * (1 + erf(x / sqrt 2)) / 2 in five nodes."""
        error = self.op(scope, "Erf", self.op(scope, "Div", x, self.const(scope, 2**0.5)))
        return self.op(
            scope, "Mul", self.op(scope, "Mul", x, self.op(scope, "Add", error, self.const(scope, 1.0))), self.const(scope, 0.5)
        )

    def layer(self, scope: str, x: str, mask: str) -> str:
        """Attention and the two-layer network, each with its residual sum and norm."""
        attended = self.op(f"{scope}/attention/output", "Add", self.attention(f"{scope}/attention", x, mask), x)
        x = self.norm(f"{scope}/attention/output/LayerNorm", attended)
        inner = self.gelu(f"{scope}/intermediate", self.linear(f"{scope}/intermediate/dense", x, WIDTH, INNER))
        summed = self.op(f"{scope}/output", "Add", self.linear(f"{scope}/output/dense", inner, INNER, WIDTH), x)
        return self.norm(f"{scope}/output/LayerNorm", summed)

    def embeddings(self) -> str:
        """Words, places and kinds of tokens, looked up and summed."""
        scope = "embeddings"
        tables = [
            self.weight(f"{scope}.{name}.weight", rows, WIDTH)
            for name, rows in (("word_embeddings", WORDS), ("token_type_embeddings", KINDS), ("position_embeddings", PLACES))
        ]
        words, kinds = (
            self.op(f"{scope}/{what}", "Gather", table, ids)
            for what, table, ids in (("word", tables[0], "input_ids"), ("kind", tables[1], "token_type_ids"))
        )
        self.tensors[f"{scope}.position_ids"] = np.arange(PLACES)[None]
        ends = [self.const(scope, [0]), self.size(scope, "input_ids", 1), self.const(scope, [1]), self.const(scope, [1])]
        places = self.op(scope, "Gather", tables[2], self.op(scope, "Slice", f"{scope}.position_ids", *ends))
        return self.norm(f"{scope}/LayerNorm", self.op(scope, "Add", self.op(scope, "Add", words, kinds), places))

    def mask(self) -> str:
        """[n, tokens] of 1 and 0 to [n, 1, 1, tokens] of 0 and a large negative number."""
        scope = "mask"
        wide = self.op(
            scope, "Unsqueeze", self.op(scope, "Unsqueeze", "attention_mask", self.const(scope, [1])), self.const(scope, [2])
        )
        kept = self.op(scope, "Sub", self.const(scope, 1.0), self.op(scope, "Cast", wide, to=1))
        return self.op(scope, "Mul", kept, self.const(scope, -10000.0))


def encoder(layers: int = 2, *, decomposed: bool = False) -> ModelProto:
    """input_ids, attention_mask, token_type_ids int64[n, tokens] to logits float32[n, 5]."""
    w = Writer(decomposed)
    x, mask = w.embeddings(), w.mask()
    for number in range(layers):
        x = w.layer(f"encoder/layer.{number}", x, mask)
    first = w.op("pooler", "Gather", x, w.const("pooler", 0), axis=1)
    pooled = w.op(
        "pooler",
        "Tanh",
        w.op(
            "pooler/dense",
            "Gemm",
            first,
            w.weight("pooler.dense.weight", WIDTH, WIDTH, scale=0.2),
            w.weight("pooler.dense.bias", WIDTH),
            transB=1,
        ),
    )
    head = w.weight("classifier.weight", CLASSES, WIDTH, scale=0.2), w.weight("classifier.bias", CLASSES)
    w.nodes.append(helper.make_node("Gemm", [pooled, *head], ["logits"], name="/classifier/Gemm", transB=1))
    inputs = [
        value(name, ("batch_size", "sequence_length"), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    stored = [tensor(array, name) for name, array in w.tensors.items()]
    graph = helper.make_graph(w.nodes, "main_graph", inputs, [value("logits", ("batch_size", CLASSES))], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14 if decomposed else OPSET)], ir_version=8)


def sentences(count: int, seed: int = 0, tokens: int = 16) -> dict[str, Array]:
    """Token numbers with padding behind them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, tokens + 1, (count, 1))
    mask = (np.arange(tokens) < lengths).astype(np.int64)
    words = rng.integers(1, WORDS, (count, tokens)) * mask
    return {"input_ids": words, "attention_mask": mask, "token_type_ids": np.zeros_like(words)}
