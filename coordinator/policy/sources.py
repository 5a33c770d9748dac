"""From whom a prompt's beginning could be copied, and when that is worth it.

Whoever holds a part of it may give it: workers of any role, and stores. Of those that hold most it is the one whose
planned fetches are over first; of equal ones a store, which gives away nothing that an answer or a prompt needs, then a
decode worker; then the smallest id.

**What it must save.** A copy is made where it is clearly cheaper than computing the same (`is_cheaper`).

**Replication.** What another worker that reads prompts holds already becomes one copy more of it, and fills a pool that
could hold something else. Two rules bound that, and that alone: the ratio of Mooncake (FAST'25, algorithm 1: such a
source must hold more than `fetch_ratio` times as much as the reader), and the budget (`replica_share` of a reader's KV
memory a minute, see `may_copy`). Neither keeps anybody from fetching what no other reader of prompts holds: the answer
of a conversation's last turn stands at the decode worker and in a store, and is a small part of the next turn's prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.policy.pairing import is_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from contracts.latency import TransferModel
    from coordinator.policy.fleet_view import Flags, FleetView
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.pair_links import PairLinks
    from coordinator.policy.question import HeldBlocks, Question
    from coordinator.policy.settings import ConductorSettings

#: Of what computing takes: what a copy may take at most, its messages included. Predictions of both are rough.
_CLEARLY_CHEAPER = 0.8
#: Asking, confirming: beside the bytes.
_MESSAGES_S = 0.001
#: In which the budget of copies is new.
REPLICA_WINDOW_S = 60.0
#: So many are put in order one by one.
_FEW = 8
#: Of equal ones so many are told apart by their ways to the readers, where ways differ.
_MAX_ALIKE = 4


class Link(NamedTuple):
    """How KV travels between workers, and in which portions it is known."""

    transfer: TransferModel
    #: Of workers whose costs do not tell.
    kv_token_bytes: int
    block_tokens: int
    #: None: the way between any two takes the same.
    pairs: PairLinks | None = None


class FetchRules(NamedTuple):
    """As operators chose."""

    #: Of what another worker that reads prompts holds.
    ratio: float
    #: Of a worker's KV memory: what it may copy of that within `REPLICA_WINDOW_S`.
    replica_share: float


class Source(NamedTuple):
    """Who could give so many leading blocks away, in so long."""

    row: int
    blocks: int
    wait_s: float
    #: It reads prompts itself: a copy of what it holds is one more among those that do.
    is_reader: bool


def rules_of(settings: ConductorSettings) -> FetchRules:
    return FetchRules(settings.fetch_ratio, settings.replica_share)


def is_cheaper(copy_s: float, compute_s: float) -> bool:
    """Whether copying is clearly cheaper than computing the same."""
    return copy_s + _MESSAGES_S < _CLEARLY_CHEAPER * compute_s


class Sources:
    """Of one question's prompt, by class of KV: looked for once, and no further than needed."""

    def __init__(self, question: Question, view: FleetView, outlook: Outlook, link: Link, rules: FetchRules) -> None:
        self._question = question
        self._view = view
        self._outlook = outlook
        self.pairs = link.pairs
        self._rules = rules
        self._first: dict[int, tuple[Source, ...]] = {}
        self._second: dict[int, tuple[Source, ...]] = {}
        self._held: dict[int, HeldBlocks] = {}
        self._most_read: dict[int, int] = {}

    def first(self, kv_class: int) -> tuple[Source, ...]:
        """Of those that hold most: the best that reads prompts, and the best that does not (where ways differ some of
        these)."""
        found = self._first.get(kv_class)
        if found is None:
            held, blocks = self._held_of(kv_class), self._question.held_lengths[-1]
            rows = (held == blocks).nonzero()[0]
            if not len(rows) and np.count_nonzero(held):
                # Who holds most cannot give it to these.
                blocks = int(held.max())
                rows = (held == blocks).nonzero()[0]
            found = self._first[kv_class] = self._best(rows, blocks)
        return found

    def second(self, kv_class: int) -> tuple[Source, ...]:
        """Where those all read prompts, the best of the others, which hold less; and the other way round."""
        found = self._second.get(kv_class)
        if found is None:
            found = self._second[kv_class] = self._find_second(kv_class)
        return found

    def most_read(self, kv_class: int) -> int:
        """Leading blocks that the worker holds most of that reads prompts."""
        most = self._most_read.get(kv_class)
        if most is None:
            held = self._held_of(kv_class) * self._view.can_read
            most = self._most_read[kv_class] = int(held.max()) if np.count_nonzero(held) else 0
        return most

    def replica_blocks(self, kv_class: int, source: Source, held_blocks: int) -> int:
        """What a worker that holds so much would copy of what another that reads prompts holds."""
        return max(0, min(source.blocks, self.most_read(kv_class)) - held_blocks)

    def allows(self, kv_class: int, source: Source, held_blocks: int, may_copy: bool) -> bool:
        """Whether the rules about replication let a worker that holds so much fetch from there. `may_copy`: its budget
        is not used up."""
        if source.blocks <= held_blocks or (source.is_reader and source.blocks <= self._rules.ratio * held_blocks):
            return False
        return may_copy or not self.replica_blocks(kv_class, source, held_blocks)

    def may_copy(self) -> Flags | None:
        """By row: whether its budget of copies is not used up. None: nobody's is. Pure.

        A budget is a virtual clock: each copy moves it on by the time in which so much is granted, and it may go ahead
        of the present by the window.
        """
        if self._rules.replica_share <= 0:
            return np.zeros(len(self._view.infos), np.bool_)
        until_s = self._question.now_s + REPLICA_WINDOW_S
        # Nearly always so.
        if self._outlook.copies.latest_s < until_s:
            return None
        allowed: Flags = self._outlook.replica_free_s < until_s
        return None if is_all(allowed) else allowed

    def replica_s(self, row: int, num_tokens: int) -> float:
        """By how much a copy of so many tokens moves on the row's clock."""
        if not num_tokens:
            return 0.0
        return num_tokens * REPLICA_WINDOW_S / (self._rules.replica_share * self._outlook.total_tokens.item(row))

    # --- inside -----------------------------------------------------------------------------------

    def _held_of(self, kv_class: int) -> HeldBlocks:
        """By row: blocks that this class's readers could fetch."""
        held = self._held.get(kv_class)
        if held is None:
            question, view = self._question, self._view
            held = question.held
            if held is None:
                held = np.zeros(len(view.infos), np.int32)
            if len(view.holders_of_class) > 1:
                held = held * view.holders_of_class[kv_class]
            if question.usable is not None:
                held = held * question.usable
            if question.item.avoid:
                held = held * ~view.rows_of(question.item.avoid)
            self._held[kv_class] = held
        return held

    def _find_second(self, kv_class: int) -> tuple[Source, ...]:
        first = self.first(kv_class)
        sorts = {source.is_reader for source in first}
        if len(sorts) != 1 or (True in sorts and not self._question.is_kept):
            return ()
        view = self._view
        held = self._held_of(kv_class) * (view.keeps if True in sorts else view.can_read)
        if not np.count_nonzero(held):
            return ()
        blocks = int(held.max())
        return self._best((held == blocks).nonzero()[0], blocks)

    def _best(self, rows: NDArray[np.intp], blocks: int) -> tuple[Source, ...]:
        """Of these, which hold so much."""
        view, free_s, now_s = self._view, self._outlook.source_free_s, self._question.now_s
        if len(rows) == 1:
            row = rows.item()
            return (Source(row, blocks, max(0.0, free_s.item(row) - now_s), view.can_read.item(row)),)
        if len(rows) > _FEW:
            # Stable: equal ones stay in order of their ids.
            rows = rows[np.lexsort((view.source_rank[rows], np.maximum(free_s[rows] - now_s, 0.0)))]
            read = view.can_read[rows]
            rows = np.concatenate((rows[~read][:_MAX_ALIKE], rows[read][:_MAX_ALIKE]))
        found = [
            Source(row, blocks, max(0.0, free_s.item(row) - now_s), view.can_read.item(row)) for row in rows.tolist()
        ]
        found.sort(key=lambda source: (source.is_reader, source.wait_s, view.source_rank.item(source.row), source.row))
        most = 1 if self.pairs is None else _MAX_ALIKE
        num_others = sum(not source.is_reader for source in found)
        return (*found[: min(most, num_others)], *found[num_others : num_others + most])
