"""Refinement end to end: all survivors and biases move together until the sparse network's features match the dense one's.

Small augmented batches of the calibration samples, Adam under a one-cycle schedule (`adam.py`), the step one ONNX graph that
works on parameters and gradients where they lie (`distill.py`).  Held-out samples decide which state is kept; perhaps the first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np

from relrep_onnx.adam import Buffers, one_cycle
from relrep_onnx.augment import FLIP, Augmenter, possible
from relrep_onnx.cache import Cache
from relrep_onnx.data import Samples
from relrep_onnx.distill import Distillation, opened, showing, step, traced
from relrep_onnx.results import Epoch, Refinement
from relrep_onnx.runtime import Bound, RuntimeOptions, Session
from relrep_onnx.types import Array, ConfigError, Feeds, FloatArray, Progress
from relrep_onnx.verify import compare_outputs

BATCH: Final = 64
RATE: Final = 0.025
"""The peak, relative to the size of what moves."""
CLIP: Final = 3.0
"""A gradient longer than so many times the usual one is shortened to that."""
MEMORY: Final = 0.9
"""How slowly the usual length of the gradient changes."""
DIVERGED: Final = 10.0
"""A loss above so many times the first one counts as divergence."""
RISEN: Final = 1.2
"""An epoch whose mean loss is above so many times the first one's does too: the peak leads away from a good start."""
COPIES: Final = 3
"""The step holds each tensor of the sparse network, its gradient, and the dense network's; about."""
TRIAL: Final = 0.06
"""Each trial of an augmentation takes about this share of the steps,"""
FEWEST: Final = 32
"""but at least so many, on at least so many samples."""
MARGIN: Final = 0.95
"""Less augmentation must be better by this factor."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to refine; `augment` None means to find out by short trials which kinds help."""

    epochs: int
    augment: tuple[str, ...] | None
    seed: int
    memory: int
    runtime: RuntimeOptions
    finished: Cache | None = None
    """Where the state after each epoch goes, and is gone on from,"""
    key: str = ""
    """under all that the run depends on."""


class Stepper:
    """The compiled steps, one for each shape of batch; batches that would need too much memory run in parts."""

    def __init__(self, d: Distillation, buffers: Buffers, recipe: Recipe) -> None:
        self._d, self._buffers, self._runtime = d, buffers, recipe.runtime
        self._most = max(1, recipe.memory // max(1, COPIES * d.sample_bytes))
        self._known: dict[object, tuple[Bound, FloatArray]] = {}

    def run(self, feeds: Feeds) -> float:
        """The loss of a batch; fills the gradients, which are zero where the mask is."""
        gradients, parts = self._buffers.gradients, self._parts(feeds)
        losses = [self._part(parts[0])]
        if len(parts) > 1:
            total = gradients.copy()
            for part in parts[1:]:
                losses.append(self._part(part))
                total += gradients
            np.divide(total, len(parts), out=gradients)
        gradients *= self._buffers.mask
        return sum(losses) / len(losses)

    def _parts(self, feeds: Feeds) -> list[Feeds]:
        sizes = {array.shape[:1] for array in feeds.values()}
        count = sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 1
        pieces = math.ceil(count / self._most)
        if pieces < 2:
            return [feeds]
        return [{name: array[rows] for name, array in feeds.items()} for rows in np.array_split(np.arange(count), pieces)]

    def _part(self, feeds: Feeds) -> float:
        key = tuple((name, array.dtype.str, array.shape) for name, array in feeds.items())
        if key not in self._known:
            self._known[key] = self._compiled(feeds)
        bound, loss = self._known[key]
        bound.run(feeds)
        return float(loss)

    def _compiled(self, feeds: Feeds) -> tuple[Bound, FloatArray]:
        values, gradients = (self._buffers.views(flat) for flat in (self._buffers.values, self._buffers.gradients))
        built = step(self._d, traced(self._d.sparse, {**feeds, **values}, self._runtime))
        session = opened(built.model, self._runtime, "the refinement step")
        loss = np.zeros((), np.float32)
        outputs = dict(zip(built.gradients, gradients.values(), strict=True))
        return Bound(session, values, {built.loss: loss, **outputs}), loss


class Held:
    """Held-out samples: what the dense model makes of them, at block ends and outputs, and how far the sparse one is from it."""

    def __init__(self, d: Distillation, batches: Iterable[Feeds], runtime: RuntimeOptions) -> None:
        dense = opened(showing(d.dense, d.aims), runtime, "the dense model's features")
        self._dense = [(feeds, dense.run(feeds, d.aims)) for feeds in batches]
        self._sparse = opened(showing(d.sparse, d.aims), runtime, "the sparse model's features")
        self._groups = [names for names in (d.ends, d.outputs) if names]
        self._aims = d.aims

    def error(self, values: Feeds) -> float:
        """Relative L2: the root of the mean of the loss's parts; infinite where it is no number.

        Outputs alone would tell little: softmax puts most of the error of a few dozen samples into two or three of them.
        """
        fidelity = compare_outputs(self._aims, self._dense, _Fed(self._sparse, values))
        square = {output.output: output.relative_l2**2 for output in fidelity.outputs}
        error = math.sqrt(fmean(fmean(square[name] for name in names) for names in self._groups))
        return error if math.isfinite(error) else math.inf


@dataclass(frozen=True, eq=False)
class _Fed:
    """A model whose parameters are inputs, together with their values."""

    session: Session
    values: Feeds

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs once."""
        return self.session.run({**feeds, **self.values}, outputs)


class Loop:
    """One run from the start to the end of its schedule; `best` is the state that held-out samples like most so far."""

    def __init__(self, buffers: Buffers, stepper: Stepper, held: Held, samples: Samples, kinds: Sequence[str], seed: int) -> None:
        self._buffers, self._stepper, self._held, self._samples = buffers, stepper, held, samples
        self._augmenter = Augmenter(kinds, samples.image_axes)
        self._rng = np.random.default_rng(seed)
        self._peak, self._usual, self._first = RATE, 0.0, 0.0
        self.steps = self.restarts = 0
        self.history = [Epoch(0, math.nan, held.error(buffers.views(buffers.values)))]
        self.best, self.best_values = self.history[0], buffers.values.copy()

    def epoch(self, total: int) -> None:
        """All samples once, of a schedule of `total` steps; then the held-out samples."""
        losses = []
        for feeds in self._samples.shuffled(BATCH, self._rng):
            losses.append(self._step(self._augmenter.apply(feeds, self._rng), one_cycle(self.steps / total)))
            self.steps += 1
        error = self._held.error(self._buffers.views(self._buffers.values))
        self.history.append(Epoch(len(self.history), float(np.mean(losses)), error))
        if error < self.best.error:
            self.best, self.best_values = self.history[-1], self._buffers.values.copy()
        if self.history[-1].loss > RISEN * self.history[1].loss:
            self._back()

    def _step(self, feeds: Feeds, share: float) -> float:
        """One step at a share of the peak rate; a step that diverges goes back to the best state at half the peak."""
        buffers = self._buffers
        loss = self._stepper.run(feeds)
        length = float(np.linalg.norm(buffers.gradients))
        self._first = self._first or loss
        if not (math.isfinite(length) and loss <= DIVERGED * self._first):
            self._back()
            return loss
        self._usual = MEMORY * self._usual + (1 - MEMORY) * length if self._usual else length
        if length > CLIP * self._usual:
            buffers.gradients *= CLIP * self._usual / length
        buffers.step(self._peak * share)
        return loss

    def _back(self) -> None:
        """To the best state, and on at half the peak."""
        self._buffers.restart(self.best_values)
        self._peak /= 2
        self.restarts += 1

    def note(self) -> str:
        """How it goes, for whoever watches."""
        last = self.history[-1]
        return f"loss {last.loss:.4g}, " * (last.number > 0) + f"held-out error {last.error:.4g}, best {self.best.error:.4g}"

    def state(self) -> dict[str, Array]:
        """Everything that a resumed run needs, as arrays."""
        b = self._buffers
        numbers = [self._peak, self._usual, self._first, self.steps, self.restarts, b.count]
        return {
            "numbers": np.array(numbers, np.float64),
            "history": np.array([(e.number, e.loss, e.error) for e in self.history], np.float64),
            "random": np.frombuffer(json.dumps(self._rng.bit_generator.state).encode(), np.uint8),
            "best": self.best_values,
            **{name: getattr(b, name) for name in ("values", "mean", "square")},
        }

    def resume(self, state: Feeds) -> None:
        """Goes on from a state."""
        b = self._buffers
        self._peak, self._usual, self._first = (float(v) for v in state["numbers"][:3])
        self.steps, self.restarts, b.count = (int(v) for v in state["numbers"][3:])
        self.history = [Epoch(int(n), loss, error) for n, loss, error in state["history"].tolist()]
        self.best = min(self.history, key=lambda e: e.error)
        self.best_values = state["best"]
        self._rng.bit_generator.state = json.loads(state["random"].tobytes())
        for name in ("values", "mean", "square"):
            getattr(b, name)[...] = state[name]


def refine(
    d: Distillation, values: Feeds, samples: Samples, held: Held, recipe: Recipe, progress: Progress
) -> tuple[dict[str, FloatArray], Refinement]:
    """Refines parameters.

    Args:
        d: what moves, and towards what.
        values: the parameters at the start, by tensor; zeros of weights stay zeros.
        samples: to learn from.
        held: decides.
        recipe: how.
        progress: told of the steps, with the losses as a note.

    Returns:
        The best state's values, and an account.

    Raises:
        ConfigError: an augmentation does not fit the inputs.
        CalibrationError: a step fails in ONNX Runtime.
    """
    fits = fitting(samples)
    if unfit := [kind for kind in recipe.augment or () if kind not in fits]:
        raise ConfigError(f"--augment {unfit[0]} does not fit the model's inputs; {', '.join(fits) or 'none'} would")
    buffers = Buffers(values, [p.tensor for p in d.parameters if p.is_weight], scales(d, values))
    start, stepper = buffers.values.copy(), Stepper(d, buffers, recipe)
    total = recipe.epochs * samples.shuffled_count(BATCH)
    began = time.monotonic()

    def loop(kinds: Sequence[str], learned: Samples = samples) -> Loop:
        buffers.restart(start)
        return Loop(buffers, stepper, held, learned, kinds, recipe.seed)

    saved = None if recipe.finished is None else recipe.finished.get(recipe.key)
    trials: dict[str, float] = {}
    kinds: Sequence[str] | None = recipe.augment
    if saved is not None:
        kinds, trials = json.loads(saved["chosen"].tobytes())
    run, interrupted = loop(()), False
    try:
        if kinds is None:
            few = trial_samples(samples, recipe.epochs)
            kinds, trials = _tried(lambda option: loop(option, few), options(samples), recipe.epochs, few, progress)
        run = loop(kinds)
        if saved is not None:
            run.resume(saved)
        while len(run.history) <= recipe.epochs:
            progress("refine", len(run.history) - 1, recipe.epochs, run.note())
            run.epoch(total)
            if recipe.finished is not None:
                chosen = np.frombuffer(json.dumps((kinds, trials)).encode(), np.uint8)
                recipe.finished.put(recipe.key, {**run.state(), "chosen": chosen})
    except KeyboardInterrupt:
        interrupted = True
    progress("refine", len(run.history) - 1, recipe.epochs)
    best = dict(zip(values, (view.copy() for view in buffers.views(run.best_values).values()), strict=True))
    account = Refinement(
        epochs=recipe.epochs,
        steps=run.steps,
        augment=tuple(kinds or ()),
        trials=trials,
        ends=d.ends,
        outputs=d.outputs,
        walls=tuple(f"{wall.node}: {wall.reason}" for wall in d.walls),
        history=tuple(run.history),
        kept=run.best.number,
        restarts=run.restarts,
        interrupted=interrupted,
        seconds=time.monotonic() - began,
    )
    return best, account


def scales(d: Distillation, values: Feeds) -> dict[str, float]:
    """The size of each parameter, which its rate is relative to: the root mean square of a weight's survivors, or of a bias.

    A bias that is smaller than its layer's weights takes their size, for it may have been zero or not there at all.
    """
    sizes = {}
    for p in d.parameters:
        value = values[p.tensor].astype(np.float64)
        moving = value[value != 0] if p.is_weight else value
        sizes[p.tensor] = float(np.sqrt(np.mean(moving**2))) if moving.size else 0.0
    of_layer = {p.layer: sizes[p.tensor] for p in d.parameters if p.is_weight}
    return {p.tensor: max(sizes[p.tensor], of_layer.get(p.layer, 0.0)) for p in d.parameters}


def fitting(samples: Samples) -> tuple[str, ...]:
    """The kinds of augmentation that can be applied."""
    return possible(next(samples.shuffled(2, np.random.default_rng(0))), samples.image_axes)


def options(samples: Samples) -> list[tuple[str, ...]]:
    """What the trials try, the most augmentation first: all that can be applied, the same without flips, nothing."""
    kinds = fitting(samples)
    return list(dict.fromkeys([kinds, tuple(k for k in kinds if k != FLIP), ()]))


def trial_samples(samples: Samples, epochs: int) -> Samples:
    """So few that a trial sees each as often as the whole run would: what augmentation gains shows late, in overfitting."""
    steps = max(FEWEST, TRIAL * epochs * samples.shuffled_count(BATCH))
    return samples.split(max(FEWEST, round(steps * BATCH / epochs)))[0]


def _tried(
    loop: Callable[[Sequence[str]], Loop], tried: Sequence[tuple[str, ...]], epochs: int, samples: Samples, progress: Progress
) -> tuple[tuple[str, ...], dict[str, float]]:
    """The first option that no later one beats by the margin, and the held-out error of each option's trial."""
    errors: dict[tuple[str, ...], float] = {}
    total = epochs * samples.shuffled_count(BATCH)
    for number, option in enumerate(tried):
        progress("augment", number, len(tried))
        trial = loop(option)
        for _ in range(epochs):
            trial.epoch(total)
        errors[option] = trial.best.error
    progress("augment", len(tried), len(tried))
    best = tried[0]
    for option in tried[1:]:
        if errors[option] < MARGIN * errors[best]:
            best = option
    return best, {",".join(option) or "none": error for option, error in errors.items()}
