"""The words that choose a point: conditions and one goal, joined by `&`, as in `error<0.05 & agreement>=99% & size min`.

    condition   NAME < NUMBER, also <=, >, >=; a number may end in % or in k, M, G (of 1024)
    goal        NAME min, or NAME max
A figure that a point does not have meets no condition.  Among equal points the first one is taken.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from relrep_onnx.results import Figures, Point
from relrep_onnx.types import ConfigError, VerificationError

NAMES: Final = tuple(field.name for field in dataclasses.fields(Figures))
COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
UNITS: Final = {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30}
CONDITION: Final = re.compile(r"(\w+)\s*(<=?|>=?)\s*([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)\s*(%|[kMG](?=B?$))?B?", re.ASCII)
GOAL: Final = re.compile(r"(\w+)\s+(min|max)", re.ASCII)
EXAMPLE: Final = "such as 'error<0.05 & size min'"


@dataclass(frozen=True)
class Condition:
    """One comparison of a figure with a number."""

    name: str
    comparison: str
    value: float

    def holds(self, figures: Figures) -> bool:
        """Whether a point meets it."""
        value = getattr(figures, self.name)
        return value is not None and COMPARISONS[self.comparison](value, self.value)

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.value:.10g}"


@dataclass(frozen=True)
class Pick:
    """Conditions that the point must meet, and the figure that decides among those that do."""

    conditions: tuple[Condition, ...]
    goal: str
    largest: bool

    @classmethod
    def parse(cls, text: str) -> Pick:
        """Reads the words.

        Raises:
            ConfigError: naming the part that cannot be read.
        """
        conditions, goals = [], []
        for part in (part.strip() for part in text.split("&")):
            if found := GOAL.fullmatch(part):
                goals.append((found[1], found[2] == "max"))
            elif found := CONDITION.fullmatch(part):
                conditions.append(Condition(found[1], found[2], _number(found[3], found[4] or "", text)))
            else:
                raise ConfigError(f"--pick: cannot read {part!r} in {text!r}; give NAME<NUMBER or NAME min, {EXAMPLE}")
        if len(goals) != 1:
            raise ConfigError(f"--pick {text!r} has {len(goals)} goals; give one NAME min or NAME max, {EXAMPLE}")
        picked = cls(tuple(conditions), *goals[0])
        if unknown := [name for name in picked.names if name not in NAMES]:
            raise ConfigError(f"--pick: no figure is called {unknown[0]!r}; there are {', '.join(NAMES)}")
        return picked

    @property
    def names(self) -> tuple[str, ...]:
        """The figures it asks for."""
        return (*(condition.name for condition in self.conditions), self.goal)

    def choose(self, points: Iterable[Point]) -> Point:
        """The best point that meets all conditions.

        Raises:
            VerificationError: none does; the message names the condition that fewest points meet.
        """
        done = [(point, point.figures) for point in points if point.figures is not None]
        fit = [(point, figures) for point, figures in done if all(c.holds(figures) for c in self.conditions)]
        valued = [(value, point) for point, figures in fit if (value := getattr(figures, self.goal)) is not None]
        if valued:
            return (max if self.largest else min)(valued, key=lambda pair: pair[0])[1]
        if fit or not self.conditions:
            raise VerificationError(f"--pick: no point has a figure {self.goal!r}; nothing was picked")
        met = {str(c): sum(c.holds(figures) for _, figures in done) for c in self.conditions}
        hardest = min(met, key=lambda name: met[name])
        raise VerificationError(
            f"--pick: none of {len(done)} points meets all conditions ({hardest}: {met[hardest]} points); nothing was picked"
        )


def _number(text: str, unit: str, whole: str) -> float:
    try:
        return float(text) / 100 if unit == "%" else float(text) * UNITS[unit]
    except ValueError as error:
        raise ConfigError(f"--pick: {text!r} in {whole!r} is no number; give one, {EXAMPLE}") from error
