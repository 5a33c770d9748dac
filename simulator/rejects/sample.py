"""Which of the refused requests are tried: some of every class and reason. Pure."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from simulator.rejects.summary import NO_CLASS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.rejects.rebuild import Asked

#: Of each class and reason at least so many are tried, where so many were refused and half of all that are tried
#: suffice for it.
LEAST_OF_KIND = 10


def kind_of(asked: Asked) -> tuple[str, str]:
    """Class and reason of a refused request."""
    return asked.last.slo_class or NO_CLASS, asked.last.outcome


def by_kind(refused: Sequence[Asked]) -> dict[tuple[str, str], list[Asked]]:
    """In order of the kinds' names."""
    kinds: dict[tuple[str, str], list[Asked]] = {}
    for each in refused:
        kinds.setdefault(kind_of(each), []).append(each)
    return dict(sorted(kinds.items()))


def draw(refused: Sequence[Asked], num_tried: int, seed: int) -> list[Asked]:
    """At most `num_tried`, drawn without putting back; all where there are no more. Not in order."""
    rng = random.Random(seed)
    kinds = list(by_kind(refused).values())
    numbers = numbers_to_try([len(kind) for kind in kinds], num_tried)
    return [each for kind, number in zip(kinds, numbers, strict=True) for each in rng.sample(kind, number)]


def numbers_to_try(sizes: Sequence[int], total: int) -> list[int]:
    """How many of each of several groups: in proportion to their `sizes` but for the smallest, which get more, and
    `total` together where there are so many. One of each comes first, of the largest if `total` is too small."""
    least = min(LEAST_OF_KIND, max(1, total // (2 * max(1, len(sizes)))))
    numbers = [0] * len(sizes)
    for _ in range(min(total, sum(sizes))):
        open_groups = [at for at, size in enumerate(sizes) if numbers[at] < size]
        wanting = [at for at in open_groups if numbers[at] < least]
        # Whoever has tried the smallest part of its own (Webster); while groups want their least, the emptiest.
        chosen = (
            min(wanting, key=lambda at: (numbers[at], -sizes[at]))
            if wanting
            else max(open_groups, key=lambda at: sizes[at] / (2 * numbers[at] + 1))
        )
        numbers[chosen] += 1
    return numbers
