"""Failpoints and rare paths: how a test makes production code go where it seldom goes, and knows that it did.

A `Failpoint` is a place where production code may do something that it is always allowed to do and seldom does:
refuse, be late, ask once more. It never breaks a promise. A `RarePath` only counts that it was reached. Both are
module constants beside the code they stand in, named `room.what_happens`; a test that arms them sees by the counts
which of them never ran. Unarmed, each is one look at one attribute.

What makes a failpoint legal: it may fire every time it is passed without a wrong token, and with a chance below one
every request still ends as it would have, or with the refusal that is its meaning. So it may not do what is counted
against a request (lose a stream that it is served on), nor more than the others bear in a row (skip heartbeats).

(FoundationDB, SIGMOD'21, section 4: `BUGGIFY` and coverage macros.)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Generator, Iterable


class Failpoints:
    """What is armed in one run: which failpoints fire, and how often each place was reached.

    Each point in `chances` fires by itself with its own chance; drawing is from `rng` and in program order, so that
    one seed on a virtual loop always fires at the same places. Raises ValueError for a name that is no failpoint's,
    and for a chance that is none.
    """

    def __init__(self, rng: random.Random, chances: dict[str, float]) -> None:
        unknown = sorted(chances.keys() - FAILPOINTS.keys())
        if unknown:
            raise ValueError(f"no failpoint is named {unknown[0]!r}; there are {', '.join(sorted(FAILPOINTS))}")
        for name, chance in chances.items():
            if not 0.0 <= chance <= 1.0:
                raise ValueError(f"the chance of {name} must be in [0, 1], not {chance}")
        self._rng = rng
        self._chances = chances
        #: Firings of failpoints and passings of rare paths, by name.
        self.counts: Counter[str] = Counter()

    def rest(self) -> None:
        """No failpoint fires any more; rare paths go on being counted."""
        self._chances = {}

    def fires(self, name: str) -> bool:
        chance = self._chances.get(name, 0.0)
        if chance <= 0.0 or self._rng.random() >= chance:
            return False
        self.counts[name] += 1
        return True

    def between(self, low: float, high: float) -> float:
        return self._rng.uniform(low, high)


class Failpoint:
    """A place that may fail on purpose; made once, at import, with a name of its own (else ValueError)."""

    def __init__(self, name: str, meaning: str) -> None:
        _check_new(name)
        self.name = name
        self.meaning = meaning
        FAILPOINTS[name] = self

    def __repr__(self) -> str:
        return f"<Failpoint {self.name}>"

    def fires(self) -> bool:
        """False unless armed."""
        return _State.armed is not None and _State.armed.fires(self.name)

    async def delay(self, longest_s: float) -> None:
        """Returns at once unless armed and firing, else after up to `longest_s` on the loop's clock."""
        armed = _State.armed
        if armed is not None and armed.fires(self.name):
            await asyncio.sleep(armed.between(0.0, longest_s))


class RarePath:
    """A place that is seldom reached; made once, at import, with a name of its own (else ValueError)."""

    def __init__(self, name: str, meaning: str) -> None:
        _check_new(name)
        self.name = name
        self.meaning = meaning
        RARE_PATHS[name] = self

    def __repr__(self) -> str:
        return f"<RarePath {self.name}>"

    def reached(self) -> None:
        """Counts, where somebody counts."""
        if _State.armed is not None:
            _State.armed.counts[self.name] += 1


#: All that were made, by name.
FAILPOINTS: dict[str, Failpoint] = {}
RARE_PATHS: dict[str, RarePath] = {}


def _check_new(name: str) -> None:
    """Both kinds are counted in one book."""
    if name in FAILPOINTS or name in RARE_PATHS:
        raise ValueError(f"two failpoints or rare paths are named {name}")


class _State:
    """One process is armed as a whole: the programs of a simulation share it as they share the loop."""

    armed: Failpoints | None = None


@contextmanager
def armed(failpoints: Failpoints) -> Generator[Failpoints, None, None]:
    """Arms for the time of the `with` block; raises RuntimeError where something is armed already."""
    if _State.armed is not None:
        raise RuntimeError("failpoints are armed already")
    _State.armed = failpoints
    try:
        yield failpoints
    finally:
        _State.armed = None


def never_reached(counts: Counter[str], names: Iterable[str] | None = None) -> list[str]:
    """The names, by default of all failpoints and rare paths, that `counts` does not know."""
    wanted = names if names is not None else (*FAILPOINTS, *RARE_PATHS)
    return sorted(name for name in wanted if not counts[name])
