"""Which points a sweep visits: every combination of the listed settings, in the order in which they are listed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Final

from relrep_onnx.config import Config
from relrep_onnx.job import check_methods
from relrep_onnx.types import ConfigError

MOST_POINTS: Final = 10_000


def parse_sparsities(text: str) -> tuple[float, ...]:
    """Reads `0.8`, `0.5:0.95:0.05` (both ends belong to it), or several of these with commas.

    Raises:
        ConfigError: none of these.
    """
    found: list[Decimal] = []
    for part in text.split(","):
        try:
            numbers = [Decimal(number) for number in part.split(":")]
        except InvalidOperation:
            numbers = []
        match numbers:
            case [value] if value.is_finite():
                found.append(value)
            case [first, last, step] if (
                all(n.is_finite() for n in numbers) and first <= last and step > 0 and (last - first) / step < MOST_POINTS
            ):
                found += [first + n * step for n in range(int((last - first) / step) + 1)]
            case _:
                raise ConfigError(f"the sparsities are {text!r}; give 0.8, a range such as 0.5:0.95:0.05, or several with commas")
    return tuple(map(float, found))


@dataclass(frozen=True)
class Grid:
    """The settings that a sweep combines; `relrep-onnx optimize --help` says what they mean."""

    sparsity: tuple[float, ...] = parse_sparsities("0.5:0.95:0.05")
    pattern: tuple[str, ...] = ("unstructured",)
    allocate: tuple[str, ...] = ("auto",)
    repair: tuple[str, ...] = ("reconstruct",)

    def configs(self, base: Config) -> dict[str, Config]:
        """The configuration of each point, by a name that can be a folder's.

        Raises:
            ConfigError: a setting that does not exist, or no points.
        """
        if base.max_drop is not None:
            raise ConfigError("max_drop looks for a sparsity itself; leave it out of a sweep")
        found = {}
        for pattern, allocate, repair, sparsity in product(self.pattern, self.allocate, self.repair, self.sparsity):
            config = replace(base, sparsity=sparsity, pattern=pattern, allocate=allocate, repair=repair)
            check_methods(config)
            found[f"{pattern.replace(':', '-')}_{allocate}_{repair}_{sparsity:.10g}"] = config
        if not 0 < len(found) <= MOST_POINTS:
            raise ConfigError(f"the sweep has {len(found):,} points; give between 1 and {MOST_POINTS:,}")
        return found
