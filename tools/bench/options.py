"""Parts of a command line that several benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def names(known: Sequence[str]) -> type[argparse.Action]:
    """An action that splits a comma-separated list and checks each name."""

    class Names(argparse.Action):
        def __call__(
            self, parser: argparse.ArgumentParser, space: argparse.Namespace, values: object, _: str | None = None
        ) -> None:
            chosen = str(values).split(",")
            unknown = [name for name in chosen if name not in known]
            if unknown:
                parser.error(f"{self.dest}: {unknown[0]!r} is none of {', '.join(known)}")
            setattr(space, self.dest, chosen)

    return Names


def fractions(text: str) -> list[float]:
    """The type of a comma-separated list of sparsities."""
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError("sparsities are fractions such as 0.8,0.9")
    return values
