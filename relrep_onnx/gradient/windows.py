"""How convolutions and pools walk over their input, with explicit pads: along each axis, position o reads o s - begin + d k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
from onnx import NodeProto

from relrep_onnx.gradient.tape import Tape
from relrep_onnx.graph.index import attribute, ints
from relrep_onnx.types import FloatArray

LONGEST = 1.2
"""Flat slices may make products longer by this factor."""


@dataclass(frozen=True)
class Windows:
    """One entry per spatial axis.

    `ends` is what the last window needs behind the input: negative where it stops short of the end, and with `ceil_mode` more
    than the declared pad `behind`.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    behind: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, node: NodeProto, x: Sequence[int], y: Sequence[int], kernel: Sequence[int] = ()) -> Windows:
        """The windows of a Conv or a pool that turns shape x into shape y."""
        kernel = tuple(kernel) or ints(node, "kernel_shape", ())
        count = len(kernel)
        strides, dilations = ints(node, "strides", (1,) * count), ints(node, "dilations", (1,) * count)
        reach = _reach(y[2:], strides, dilations, kernel)
        mode = attribute(node, "auto_pad", b"NOTSET")
        pads = (0,) * 2 * count if mode == b"VALID" else ints(node, "pads", (0,) * 2 * count)
        begins, behind = pads[:count], pads[count:]
        if mode in (b"SAME_UPPER", b"SAME_LOWER"):
            total = [max(0, r - i) for r, i in zip(reach, x[2:], strict=True)]
            begins = tuple((n + (mode == b"SAME_LOWER")) // 2 for n in total)
            behind = tuple(n - b for n, b in zip(total, begins, strict=True))
        ends = tuple(r - i - b for r, i, b in zip(reach, x[2:], begins, strict=True))
        return cls(kernel, strides, dilations, begins, ends, behind, tuple(x[2:]), tuple(y[2:]))

    @classmethod
    def behind_transposed(cls, node: NodeProto, x: Sequence[int], y: Sequence[int], kernel: Sequence[int]) -> Windows:
        """The windows of the convolution that leads from a ConvTranspose's output, of shape y, back to its input."""
        count = len(kernel)
        strides, dilations = ints(node, "strides", (1,) * count), ints(node, "dilations", (1,) * count)
        extra = ints(node, "output_padding", (0,) * count)
        reach = _reach(x[2:], strides, dilations, kernel)
        mode = attribute(node, "auto_pad", b"NOTSET")
        begins = ints(node, "pads", (0,) * 2 * count)[:count]
        if mode in (b"SAME_UPPER", b"SAME_LOWER") or ints(node, "output_shape", ()):
            total = [max(0, r + e - o) for r, e, o in zip(reach, extra, y[2:], strict=True)]
            begins = tuple((n + (mode != b"SAME_UPPER")) // 2 for n in total)
        ends = tuple(r - o - b for r, o, b in zip(reach, y[2:], begins, strict=True))
        return cls(tuple(kernel), strides, dilations, begins, ends, ends, tuple(y[2:]), tuple(x[2:]))

    @property
    def is_whole(self) -> bool:
        """One position each, all of them read: the input itself."""
        return self.inputs == self.outputs and all(k == s == 1 for k, s in zip(self.kernel, self.strides, strict=True))

    def back(self, t: Tape, g: str, weight: str, shape: Sequence[int], group: int, like: str) -> str:
        """From outputs to inputs: g [batch, out, *outputs] through weight [out, in / group, *kernel], whose shape is given.

        With stride 1 that is a convolution with the kernel turned around, which ONNX Runtime does faster than a ConvTranspose.
        """
        reach = [d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True)]
        pads = [r - p for r, p in zip(reach * 2, (*self.begins, *self.ends), strict=True)]
        if all(s == 1 for s in self.strides) and min(pads) >= 0:
            turned = self._turned(t, weight, shape, group)
            return t.op("Conv", g, turned, dilations=list(self.dilations), pads=pads, group=group)
        spread = t.op(
            "ConvTranspose", g, weight, strides=list(self.strides), dilations=list(self.dilations), group=group
        )  # reaches from the first window's begin to the last one's end
        return t.pad(spread, [0, 0, *(-b for b in self.begins)], [0, 0, *(-e for e in self.ends)], like)

    def _turned(self, t: Tape, weight: str, shape: Sequence[int], group: int) -> str:
        """[out, in / group, *kernel] as [in, out / group, *kernel turned around]."""
        rows, inner, *kernel = shape
        count = len(kernel)
        if group == 1:
            weight = t.transpose(weight, [1, 0, *range(2, 2 + count)])
        elif inner > 1 or rows > group:
            parted = t.reshape(weight, (group, rows // group, inner, *kernel))
            weight = t.reshape(t.transpose(parted, [0, 2, 1, *range(3, 3 + count)]), (group * inner, rows // group, *kernel))
        if all(k == 1 for k in kernel):
            return weight
        lowest = int(np.iinfo(np.int64).min)
        return t.slice(weight, [-1] * count, [lowest] * count, list(range(2, 2 + count)), [-1] * count)

    def flat(
        self, t: Tape, x: str, g: str, lead: tuple[Sequence[int], Sequence[int]], folded: int, like: str
    ) -> tuple[str, list[str]]:
        """The output's gradient and, for each position of the kernel in row-major order, what it multiplies.

        Args:
            t: the tape.
            x: [.., .., *inputs], seen as [*lead[0], *inputs].
            g: [.., .., *outputs], seen as [*lead[1], *outputs].
            lead: leading axes of what the kernel reads, and of the gradient; one flat axis follows.
            folded: samples that the flat axis runs over.
            like: a forward tensor of their dtype.
        """
        padded = t.pad(x, [0, 0, *self.begins], [0, 0, *self.ends], like)
        sides = [i + b + e for i, b, e in zip(self.inputs, self.begins, self.ends, strict=True)]
        offsets = [[d * k for d, k in zip(self.dilations, p, strict=True)] for p in product(*map(range, self.kernel))]
        if folded == 1 and self._is_long(sides):
            # With stride 1 a position of the kernel reads the flat input at a distance: one long slice in place of many short
            # ones.  The gradient gets zeros where the slice runs over the ends of rows.
            strides = [math.prod(sides[i + 1 :]) for i in range(len(sides))]
            length = 1 + sum((o - 1) * s for o, s in zip(self.outputs, strides, strict=True))
            ends = [0, 0, 0, *(s - o for s, o in zip(sides[1:], self.outputs[1:], strict=True))]
            wide = t.reshape(t.pad(g, [0] * len(ends), ends, like), (*lead[1], self.outputs[0] * strides[0]))
            row = t.reshape(padded, (*lead[0], math.prod(sides)))
            starts = [sum(o * s for o, s in zip(offset, strides, strict=True)) for offset in offsets]
            axis = len(lead[0])
            return t.slice(wide, [0], [length], [axis], [1]), [t.slice(row, [a], [a + length], [axis], [1]) for a in starts]
        length, axes = folded * math.prod(self.outputs), list(range(2, 2 + len(self.kernel)))
        reads = []
        for offset in offsets:
            ends = [a + (o - 1) * s + 1 for a, o, s in zip(offset, self.outputs, self.strides, strict=True)]
            tap = padded if self.is_whole else t.slice(padded, offset, ends, axes, self.strides)
            reads.append(t.reshape(tap, (*lead[0], length)))
        return t.reshape(g, (*lead[1], length)), reads

    def _is_long(self, sides: Sequence[int]) -> bool:
        """Whether flat slices pay: stride 1, a kernel of several positions, and rows much longer than what they are padded by."""
        padding = math.prod(sides[1:]) / math.prod(self.outputs[1:])
        return all(s == 1 for s in self.strides) and not self.is_whole and padding <= LONGEST

    def counts(self, *, include_pads: bool) -> FloatArray:
        """How many elements each window averages over, float64[1, 1, *outputs]."""
        along: list[FloatArray] = []
        for i in range(len(self.kernel)):
            places = np.arange(self.outputs[i])[:, None] * self.strides[i] - self.begins[i]
            places = places + self.dilations[i] * np.arange(self.kernel[i])
            low, high = (-self.begins[i], self.inputs[i] + self.behind[i]) if include_pads else (0, self.inputs[i])
            along.append(((places >= low) & (places < high)).sum(axis=1).astype(np.float64))
        together: FloatArray = reduce(np.multiply.outer, along)
        return together.reshape(1, 1, *self.outputs)


def _reach(outputs: Sequence[int], strides: Sequence[int], dilations: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """How many elements lie between the first window's begin and the last one's end."""
    return [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(outputs, strides, dilations, kernel, strict=True)]
