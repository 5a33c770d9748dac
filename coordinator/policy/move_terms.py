"""Words for moves of requests between workers: rules, what was decided, what was tried lately."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from coordinator.policy.virtual_usage import UsageRules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.ids import WorkerId
    from contracts.messages import MoveMode

#: Why requests move, the most urgent first; see `coordinator.policy.migration_pairs`.
Purpose = Literal["draining", "memory", "priority", "defragment", "balance", "prompts"]
PURPOSES: tuple[Purpose, ...] = ("draining", "memory", "priority", "defragment", "balance", "prompts")

#: Why a request that should move does not: nobody else could go on with it; those are full, or have as many moves as
#: they may, or had one the other way just now; all are fuller than they may be; it would gain nothing; there is nothing
#: to move; moving all that may be moved would not make the room.
NoMove = Literal["no_peer", "no_room", "busy", "cooldown", "not_free", "no_gain", "nothing_to_move", "not_enough"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRules:
    """Raises ValueError for thresholds between which everything would move to and fro."""

    usage: UsageRules = field(default_factory=UsageRules)
    #: For each answer: below the one a worker gives answers away, above the other it may be given some. Nobody is left
    #: with less than the former.
    low_tokens: float = 128.0
    high_tokens: float = 512.0
    purposes: frozenset[Purpose] = frozenset(PURPOSES)
    #: Moves that a worker takes part in, each way; of one that drains; and of all workers.
    max_moving: int = 2
    max_moving_draining: int = 4
    max_moving_total: int = 32
    #: After a move from one worker to another none goes the other way for so long, unless memory runs out or it drains.
    cooldown_s: float = 10.0
    #: A pair of which one refused is left alone for so long.
    retry_after_s: float = 2.0
    #: What a waiting prompt must be predicted to gain, and in how many goes between two workers at a time.
    prompt_gain_s: float = 0.5
    max_prompts: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.low_tokens < self.high_tokens:
            raise ValueError(
                f"low_tokens ({self.low_tokens:g}) must be at least 0 and below high_tokens ({self.high_tokens:g})"
            )
        if not 1 <= self.max_moving <= self.max_moving_draining:
            raise ValueError(
                f"max_moving ({self.max_moving}) must be at least 1 and at most max_moving_draining "
                f"({self.max_moving_draining})"
            )


class MovePair(NamedTuple):
    """Requests are to move between two rows of the view."""

    source: int
    destination: int
    purpose: Purpose
    max_requests: int
    #: Those that run, those that wait (for their prompts to be read, or preempted).
    running: bool
    waiting: bool
    #: Only priorities of at most this one; None: any.
    max_priority: int | None
    #: What those that are chosen may take there, all together (None: anything); and what is to come free here by
    #: running ones leaving, 0 where the quickest are to leave.
    max_blocks: int | None
    need_blocks: int
    #: "tokens" where the two understand KV differently.
    mode: MoveMode
    #: Expected of all of them together: what they take there, and how long reading them takes.
    num_blocks: int
    reading_s: float
    #: With the numbers it rests on.
    reason: str

    @property
    def are_prompts(self) -> bool:
        """That nobody has begun to read: they hold nothing where they are, and are gone after a message."""
        return self.waiting and (self.purpose == "defragment" or not self.num_blocks)


class Pairing(NamedTuple):
    moves: tuple[MovePair, ...]
    #: Workers that should have given something away (once for each purpose) and do not, by why.
    not_moved: Mapping[NoMove, int]


class MoveHistory:
    """What was moved or refused lately. Not thread-safe."""

    def __init__(self, *, max_remembered: int = 256) -> None:
        """Of each worker so many others, the latest."""
        self._max_remembered = max_remembered
        #: Givers by taker, and takers by giver, with the time; the latest last.
        self._givers: dict[WorkerId, dict[WorkerId, float]] = {}
        self._refusers: dict[WorkerId, dict[WorkerId, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._givers or self._refusers)

    def moved(self, source: WorkerId, destination: WorkerId, now_s: float) -> None:
        self._note(self._givers, destination, source, now_s)

    def refused(self, source: WorkerId, destination: WorkerId, now_s: float) -> None:
        self._note(self._refusers, source, destination, now_s)

    def forget(self, worker_id: WorkerId) -> None:
        """Its life is over: the next one is another worker."""
        for book in (self._givers, self._refusers):
            book.pop(worker_id, None)
            for others in book.values():
                others.pop(worker_id, None)

    def cooling(self, source: WorkerId, now_s: float, rules: MoveRules) -> list[WorkerId]:
        """Those that had something moved to `source` within the cooldown."""
        return _since(self._givers.get(source), now_s - rules.cooldown_s)

    def refusing(self, source: WorkerId, now_s: float, rules: MoveRules) -> list[WorkerId]:
        """Those to which something could not be moved from `source` just now."""
        return _since(self._refusers.get(source), now_s - rules.retry_after_s)

    def _note(
        self, book: dict[WorkerId, dict[WorkerId, float]], worker_id: WorkerId, other: WorkerId, now_s: float
    ) -> None:
        others = book.setdefault(worker_id, {})
        others.pop(other, None)
        others[other] = now_s
        if len(others) > self._max_remembered:
            del others[next(iter(others))]


def _since(others: Mapping[WorkerId, float] | None, oldest_s: float) -> list[WorkerId]:
    return [] if others is None else [other for other, at_s in others.items() if at_s > oldest_s]
