"""Faults of a network, one rule each: which hosts it is about, and what it does to messages and pulls there.

Connections are TCP's: what is lost breaks its connection, which both ends notice after `BROKEN_AFTER_S`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rpc.memory import BROKEN_AFTER_S

if TYPE_CHECKING:
    import random

#: Every host.
ANY = "*"


@dataclass(frozen=True, slots=True)
class Link:
    """What goes from one host to another; `ANY` stands for every host."""

    source: str
    target: str

    def covers(self, source: str, target: str) -> bool:
        return self.source in (ANY, source) and self.target in (ANY, target)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True, slots=True)
class Between:
    """What goes between two hosts, in either direction."""

    one: str
    other: str

    def covers(self, source: str, target: str) -> bool:
        return Link(self.one, self.other).covers(source, target) or Link(self.other, self.one).covers(source, target)

    def __str__(self) -> str:
        return f"{self.one} <-> {self.other}"


Scope = Link | Between


@dataclass(slots=True, kw_only=True)
class Trip:
    """One message, or one pull, that sets out now; rules make it worse."""

    #: Of a pull: the holder's and the reader's host.
    source: str
    target: str
    num_bytes: int
    is_pull: bool
    now_s: float
    delay_s: float
    outcome: Literal["arrives", "lost", "reset"] = "arrives"
    #: As in `rpc.memory.Fate`.
    repeat_after_s: float | None = None
    #: As in `kvtransfer.memory.PullFate`.
    heeds_stop: bool = True
    #: Of a pull that does not arrive: what share of its blocks and its time comes before it breaks.
    landed_share: float = 0.0


class Rule(ABC):
    """Lasts from `FaultyNetwork.add` to `remove`. `rng` is always the rule's own stream."""

    scope: Scope

    @abstractmethod
    def affect(self, trip: Trip, rng: random.Random) -> None:
        """Makes a trip within the scope worse."""

    def blocks(self) -> bool:
        """Whether nothing passes: pulls under way stand still."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """What it does, for event logs: the scope is said by others."""


@dataclass(eq=False, slots=True)
class Partition(Rule):
    """Messages are lost, pulls stand still. Over a `Link`: one way only, which stops pulls as well."""

    scope: Scope

    def affect(self, trip: Trip, rng: random.Random) -> None:
        if not trip.is_pull:
            trip.outcome = "lost"

    def blocks(self) -> bool:
        return True

    def describe(self) -> str:
        return "partitioned"


@dataclass(eq=False, slots=True)
class Clog(Rule):
    """Nothing arrives before virtual second `until_s`; what would wait too long for its connection is lost."""

    scope: Scope
    until_s: float

    def affect(self, trip: Trip, rng: random.Random) -> None:
        if trip.is_pull:
            return
        left_s = self.until_s - trip.now_s
        if left_s >= BROKEN_AFTER_S:
            trip.outcome = "lost"
        trip.delay_s = max(trip.delay_s, left_s)

    def blocks(self) -> bool:
        return True

    def describe(self) -> str:
        return f"clogged until {self.until_s:.6f}"


@dataclass(eq=False, slots=True)
class SlowLink(Rule):
    """`bytes_per_s` from each source to each target: what is sent later waits for what was sent before.

    Messages wait for messages and pulls for pulls: on a real link the many connections share it fairly.
    """

    scope: Scope
    bytes_per_s: float
    added_s: float = 0.0
    #: When all that was sent so far is through, by source, target and kind.
    _free_s: dict[tuple[str, str, bool], float] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.added_s < 0:
            raise ValueError(f"a slow link of {self.bytes_per_s} bytes/s and {self.added_s} s more")

    def affect(self, trip: Trip, rng: random.Random) -> None:
        key = trip.source, trip.target, trip.is_pull
        free_s = max(trip.now_s, self._free_s.get(key, 0.0)) + trip.num_bytes / self.bytes_per_s
        self._free_s[key] = free_s
        trip.delay_s += free_s - trip.now_s + self.added_s

    def describe(self) -> str:
        return f"slow: {self.bytes_per_s / 1e6:g} MB/s and {self.added_s * 1e3:g} ms more"


@dataclass(eq=False, slots=True)
class Loss(Rule):
    """Each message, and each pull somewhere in its midst, is lost with this chance."""

    scope: Scope
    chance: float

    def __post_init__(self) -> None:
        _check_chance(self.chance)

    def affect(self, trip: Trip, rng: random.Random) -> None:
        if rng.random() < self.chance:
            trip.outcome = "lost"
            trip.landed_share = rng.random() if trip.is_pull else 0.0

    def describe(self) -> str:
        return f"loses {_percent(self.chance)}"


@dataclass(eq=False, slots=True)
class Resets(Rule):
    """Each message resets its connection, and each pull ends in its midst, with this chance."""

    scope: Scope
    chance: float

    def __post_init__(self) -> None:
        _check_chance(self.chance)

    def affect(self, trip: Trip, rng: random.Random) -> None:
        if rng.random() < self.chance:
            trip.outcome = "reset"
            trip.landed_share = rng.random() if trip.is_pull else 0.0

    def describe(self) -> str:
        return f"resets {_percent(self.chance)}"


@dataclass(eq=False, slots=True)
class Duplication(Rule):
    """Each request of a unary call arrives once more with this chance, up to `within_s` later. Nothing else does."""

    scope: Scope
    chance: float
    within_s: float

    def __post_init__(self) -> None:
        _check_chance(self.chance)
        _check_within(self.within_s)

    def affect(self, trip: Trip, rng: random.Random) -> None:
        if not trip.is_pull and rng.random() < self.chance:
            trip.repeat_after_s = rng.uniform(0.0, self.within_s)

    def describe(self) -> str:
        return f"repeats {_percent(self.chance)} within {self.within_s * 1e3:g} ms"


@dataclass(eq=False, slots=True)
class Reordering(Rule):
    """Each message and pull is up to `within_s` late with this chance, so that calls overtake each other."""

    scope: Scope
    chance: float
    within_s: float

    def __post_init__(self) -> None:
        _check_chance(self.chance)
        _check_within(self.within_s)

    def affect(self, trip: Trip, rng: random.Random) -> None:
        if rng.random() < self.chance:
            trip.delay_s += rng.uniform(0.0, self.within_s)

    def describe(self) -> str:
        return f"delays {_percent(self.chance)} up to {self.within_s * 1e3:g} ms"


@dataclass(eq=False, slots=True)
class LatePulls(Rule):
    """Each pull is up to `within_s` late and hears of no stop, with this chance: it lands after its reader gave up."""

    scope: Scope
    chance: float
    within_s: float
    #: How many it has delayed so far.
    num_late: int = 0

    def __post_init__(self) -> None:
        _check_chance(self.chance)
        _check_within(self.within_s)

    def affect(self, trip: Trip, rng: random.Random) -> None:
        if trip.is_pull and rng.random() < self.chance:
            self.num_late += 1
            trip.heeds_stop = False
            trip.delay_s += rng.uniform(0.0, self.within_s)

    def describe(self) -> str:
        return f"{_percent(self.chance)} of pulls deaf and up to {self.within_s * 1e3:g} ms late"


def _check_chance(chance: float) -> None:
    if not 0.0 <= chance <= 1.0:
        raise ValueError(f"a chance lies in [0, 1], not at {chance}")


def _check_within(within_s: float) -> None:
    if not 0.0 <= within_s < float("inf"):
        raise ValueError(f"within_s must be finite and not negative: {within_s}")


def _percent(chance: float) -> str:
    return f"{chance * 100:g} %"
