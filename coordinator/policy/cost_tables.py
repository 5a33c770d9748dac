"""What steps cost, in a form that a decision over a thousand workers can look up.

A latency model answers about one step; a decision asks about every worker's next decode step and about a prompt at
every length of prefix that some worker holds. Decode steps of all batch sizes are therefore tabulated once for each
kind of worker, and a prompt is priced once for each distinct length, not for each worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from contracts.latency import StepWork

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from contracts.latency import LatencyModel
    from coordinator.costs import WorkerCosts
    from coordinator.policy.fleet_view import Counts, Seconds

#: Batches beyond this cost like one of so many.
MAX_DECODES = 1024
#: Of these every batch size is asked for; of larger ones some, what lies between is interpolated.
_ALL_UP_TO = 32
_GROWTH = 1.12
#: As arrays: what turns a number into one takes as long as an operation on some dozens of rows.
_HALF, _MOST, _ROW_SIZE = np.array(0.5), np.array(float(MAX_DECODES)), np.array(MAX_DECODES + 1)
#: A step whose attention is read off to learn what a query-key pair costs stands behind so many full steps.
_STEPS_BEHIND = 8


def _sampled_sizes() -> list[int]:
    sizes = list(range(1, _ALL_UP_TO + 1))
    while sizes[-1] < MAX_DECODES:
        sizes.append(min(MAX_DECODES, int(sizes[-1] * _GROWTH) + 1))
    return sizes


_SIZES = _sampled_sizes()
_ALL_SIZES = np.arange(MAX_DECODES + 1)


class CostTable:
    """Of one kind of worker. `costs` is what it was made of."""

    def __init__(self, costs: WorkerCosts) -> None:
        self.costs = costs
        latency, gap_s = costs.latency, costs.between_steps_s
        budget = self.max_batch_tokens = max(1, costs.max_batch_tokens)
        terms = [latency.decode_terms(size) for size in _SIZES]
        #: By batch size, `MAX_DECODES + 1` of them: a step that only decodes, without its context; one token of that.
        self.decode_base_s = _over_all_sizes([gap_s + term.base_s for term in terms])
        self.decode_context_s = _over_all_sizes([term.per_context_token_s for term in terms])
        #: The same for one worker at a time: looking numbers up in a list takes a third of the time.
        self._decode_terms: list[tuple[float, float]] = list(
            zip(self.decode_base_s.tolist(), self.decode_context_s.tolist(), strict=True)
        )
        self._gap_s = gap_s
        self._latency = latency
        #: A step full of prompt tokens, without their attention.
        self.full_step_s = gap_s + latency.step_s(StepWork(budget, 0.0, 1))
        pairs = float(_STEPS_BEHIND * budget * budget)
        behind_s = gap_s + latency.step_s(StepWork(budget, pairs, 1))
        #: Where steps are full: a prompt token, and one query-key pair of its attention.
        self.token_s = self.full_step_s / budget
        self.pair_s = max(0.0, behind_s - self.full_step_s) / pairs

    def decode_s(self, num_decodes: float, context_tokens: int, share: float) -> float:
        """A step that only decodes so many, at least one, which have this share of the context."""
        base_s, context_s = self._decode_terms[int(min(num_decodes, MAX_DECODES))]
        return base_s + context_s * context_tokens * share

    def prompt_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Reading the rest of a prompt, alone, in steps of at most the worker's budget.

        The cost of a full step grows with its position, close to linearly: of many only the first and the last are
        asked for.
        """
        budget = self.max_batch_tokens
        if 0 < new_tokens <= budget:
            return self._chunk_s(new_tokens, cached_tokens)
        num_full, rest = divmod(new_tokens, budget)
        seconds = self._chunk_s(rest, cached_tokens + num_full * budget) if rest else 0.0
        if num_full:
            first_s = self._chunk_s(budget, cached_tokens)
            last_s = self._chunk_s(budget, cached_tokens + (num_full - 1) * budget) if num_full > 1 else first_s
            seconds += 0.5 * num_full * (first_s + last_s)
        return seconds

    def share_s(self, new_tokens: int, cached_tokens: int) -> float:
        """What reading the rest of a prompt adds where others fill the steps."""
        pairs = new_tokens * cached_tokens + 0.5 * new_tokens * (new_tokens + 1)
        return new_tokens * self.token_s + pairs * self.pair_s

    def pending_s(self, num_tokens: int, num_pairs: float) -> float:
        """Reading so many prompt tokens of whatever prompts."""
        if num_tokens <= 0:
            return 0.0
        if num_tokens <= self.max_batch_tokens:
            return self._gap_s + self._latency.step_s(StepWork(num_tokens, num_pairs, 1))
        return num_tokens * self.token_s + num_pairs * self.pair_s

    def _chunk_s(self, num_tokens: int, position: int) -> float:
        pairs = num_tokens * position + 0.5 * num_tokens * (num_tokens + 1)
        return self._gap_s + self._latency.step_s(StepWork(num_tokens, pairs, 1))


def _beside_s(latency: LatencyModel, num_tokens: int) -> Seconds:
    """What a step with one chunk of so many tokens takes longer for decodes in it, without their context."""
    alone_s = latency.step_s(StepWork(num_tokens, 0.0, 1))
    return _over_all_sizes(
        [max(0.0, latency.step_s(StepWork(num_tokens, 0.0, 1, size)) - alone_s) for size in _SIZES], at_zero_s=0.0
    )


def _over_all_sizes(sampled_s: Sequence[float], at_zero_s: float | None = None) -> Seconds:
    first_s = sampled_s[0] if at_zero_s is None else at_zero_s
    seconds: Seconds = np.interp(_ALL_SIZES, [0, *_SIZES], [first_s, *sampled_s])
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostTables:
    """The tables of all kinds in a fleet, those for vectors stacked: `[kind, batch size]`."""

    kinds: tuple[CostTable, ...]
    decode_base_s: Seconds
    decode_context_s: Seconds
    #: What decodes add to a step with a full chunk; zeros where no worker is mixed.
    beside_s: Seconds

    def decode_step_s(self, kind: Counts, num_decodes: Seconds, context_tokens: Seconds) -> Seconds:
        """Of each worker: a step with so many decodes."""
        if len(self.kinds) == 1:
            # Clipping is what keeps larger batches within the table.
            places = (num_decodes + _HALF).astype(np.intp)
        else:
            # Of the table laid out flat: looking up by two indices takes twice as long.
            places = np.minimum(num_decodes + _HALF, _MOST).astype(np.intp)
            places += kind * _ROW_SIZE
        step_s: Seconds = self.decode_context_s.take(places, mode="clip")
        step_s *= context_tokens
        step_s += self.decode_base_s.take(places, mode="clip")
        return step_s


def stack(kinds: Iterable[CostTable], *, any_mixed: bool) -> CostTables:
    tables = tuple(kinds)
    size = MAX_DECODES + 1
    beside = [
        _beside_s(table.costs.latency, table.max_batch_tokens) if any_mixed else np.zeros(size) for table in tables
    ]
    empty = np.zeros((0, size))
    return CostTables(
        kinds=tables,
        decode_base_s=np.vstack([table.decode_base_s for table in tables]) if tables else empty,
        decode_context_s=np.vstack([table.decode_context_s for table in tables]) if tables else empty,
        beside_s=np.vstack(beside) if beside else empty,
    )
