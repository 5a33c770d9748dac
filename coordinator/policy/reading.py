"""When a prompt would have been read, by worker: predicted TTFT with the prefixes that workers hold.

Mooncake's conductor (FAST'25, algorithm 1): a worker uses what it holds of the prompt itself, or fetches more from the
worker that holds most, where that is worth it; what is fetched stays, so that prefixes spread to where load sends their
requests. Fetching is worth it where the other holds more than `fetch_ratio` times as much, and copying the difference
takes less than computing it. A fetch runs while the prompt waits in the queue: only what it takes longer is waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.policy.holding_up import held_up_s
from coordinator.policy.pairing import is_any, least

if TYPE_CHECKING:
    from contracts.latency import TransferModel
    from coordinator.policy.fleet_view import Counts, Flags, FleetView, Seconds
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.question import Question

#: So many different lengths of held prefixes are looked at for each group of workers; where there are more, a worker
#: counts as holding the next smaller of these.
_MAX_LENGTHS = 32
#: So many holders are looked at one by one.
_FEW_HOLDERS = 8


class Link(NamedTuple):
    """How KV travels between workers, and in which portions it is known."""

    transfer: TransferModel
    #: Of workers whose costs do not tell.
    kv_token_bytes: int
    block_tokens: int


class Source(NamedTuple):
    """Who holds most of the prompt, and could give it away at that time soonest."""

    row: int
    blocks: int
    wait_s: float


class Way(NamedTuple):
    """How a worker gets a prompt read: alone, or with a fetch."""

    read_s: float
    held_blocks: int
    #: 0 without a fetch.
    fetch_s: float
    #: 0: nothing is fetched.
    source_blocks: int

    @property
    def cached_blocks(self) -> int:
        """Leading ones that need not be computed."""
        return self.source_blocks or self.held_blocks


class Reading(NamedTuple):
    """What is expected on one worker."""

    queue_s: float
    #: Of that, for which the worker would not wait if its prompts were taken at once.
    held_up_s: float
    #: A fetch, as far as it takes longer than the queue.
    fetch_wait_s: float
    read_s: float
    #: What it adds to the worker's work: less than it takes alone where others' prompts fill the steps.
    work_s: float
    #: Of the prompt, computed in its last step.
    last_tokens: int
    way: Way

    @property
    def reach_s(self) -> float:
        return self.queue_s + self.fetch_wait_s + self.read_s


class Prompt:
    """One question's prompt: each way to read it is priced once. `fetch_ratio` None: nothing is fetched."""

    def __init__(
        self, question: Question, view: FleetView, outlook: Outlook, link: Link, fetch_ratio: float | None
    ) -> None:
        self._question = question
        self._view = view
        self._outlook = outlook
        self._link = link
        self._fetch_ratio = fetch_ratio if question.held_lengths else None
        self._ways: dict[tuple[int, int], Way] = {}
        self._read_s: dict[tuple[int, int], float] = {}
        #: By class of KV.
        self._sources: dict[int, Source | None] = {}
        self._step_extra_s: Seconds | None = None
        self._held_up_s = held_up_s(question, view, outlook)

    def reach_s(self) -> Seconds:
        """By row: seconds from now to the first token."""
        question, outlook = self._question, self._outlook
        queue_s = outlook.queue_s(question.rank, question.now_s)
        if self._held_up_s is not None:
            queue_s = np.maximum(queue_s, self._held_up_s)
        if len(outlook.read_groups) == 1 and not outlook.any_mixed and (holders := self._few_holders()) is not None:
            return self._reach_s_alike(queue_s, holders)
        lengths = self._lengths()
        num_lengths, num_groups = len(lengths), len(outlook.read_groups)
        codes: Counts = outlook.read_group
        if question.held is not None:
            # The last one that is not above what is held.
            places = np.array(lengths[1:], question.held.dtype).searchsorted(question.held, "right")
            codes = places if num_groups == 1 else codes * num_lengths + places
        present = range(num_lengths) if num_groups == 1 else set(codes.tolist())
        # Lists first: setting an element of an array takes ten times as long.
        read_s, fetch_s, cached_blocks = ([0.0] * (num_groups * num_lengths) for _ in range(3))
        for code in present:
            way = self.way(code // num_lengths, lengths[code % num_lengths])
            read_s[code], fetch_s[code], cached_blocks[code] = way.read_s, way.fetch_s, way.cached_blocks
        begin_s = np.maximum(queue_s, np.array(fetch_s).take(codes)) if any(fetch_s) else queue_s
        reach_s: Seconds = begin_s + outlook.company_s(queue_s, question.now_s)
        reach_s += np.array(read_s).take(codes)
        if not outlook.any_mixed:
            return reach_s
        cached_tokens = np.array(cached_blocks).take(codes) * self._link.block_tokens
        return reach_s + self._extra_s(question.item.prompt_tokens - cached_tokens)

    def _few_holders(self) -> list[tuple[int, int]] | None:
        """Rows that hold a part of the prompt, and how much; None: too many to look at one by one."""
        held = self._question.held
        if held is None:
            return []
        rows = held.nonzero()[0]
        return list(zip(rows.tolist(), held[rows].tolist(), strict=True)) if len(rows) <= _FEW_HOLDERS else None

    def _reach_s_alike(self, queue_s: Seconds, holders: list[tuple[int, int]]) -> Seconds:
        """Of workers of one group, none of them mixed: all but the holders need the same."""
        company_s = self._outlook.company_s(queue_s, self._question.now_s)
        way = self.way(0, 0)
        reach_s: Seconds = np.maximum(queue_s, way.fetch_s) if way.fetch_s else queue_s.copy()
        reach_s += company_s
        reach_s += way.read_s
        for row, blocks in holders:
            way = self.way(0, blocks)
            reach_s[row] = max(queue_s.item(row), way.fetch_s) + company_s.item(row) + way.read_s
        return reach_s

    def at(self, row: int) -> Reading:
        """What is expected on one worker."""
        question, outlook = self._question, self._outlook
        queue_s = max(0.0, outlook.prefill_free_s.item(question.rank, row) - question.now_s)
        held_up_s = 0.0
        if self._held_up_s is not None:
            held_up_s = max(0.0, self._held_up_s.item(row) - queue_s)
            queue_s += held_up_s
        group = outlook.read_group.item(row)
        way = self.way(group, question.held_by(row))
        table = outlook.tables.kinds[outlook.read_groups[group].kind]
        cached_tokens = way.cached_blocks * self._link.block_tokens
        new_tokens = question.item.prompt_tokens - cached_tokens
        extra_s = self._extra_s(new_tokens).item(row) if outlook.any_mixed and self._view.is_mixed.item(row) else 0.0
        company_s = outlook.company_at_s(row, queue_s, question.now_s)
        work_s = min(way.read_s, table.share_s(new_tokens, cached_tokens)) if queue_s else way.read_s
        return Reading(
            queue_s=queue_s,
            held_up_s=held_up_s,
            fetch_wait_s=max(0.0, way.fetch_s - queue_s),
            read_s=way.read_s + extra_s + company_s,
            work_s=work_s + extra_s,
            last_tokens=(new_tokens - 1) % table.max_batch_tokens + 1,
            way=way,
        )

    def way(self, group: int, held_blocks: int) -> Way:
        """On a worker of this group that holds so much."""
        key = group, held_blocks
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = self._find_way(group, held_blocks)
        return way

    def kv_token_bytes(self, group: int) -> int:
        """What workers of this group hold for a token."""
        kind = self._outlook.tables.kinds[self._outlook.read_groups[group].kind]
        return kind.costs.kv_token_bytes or self._link.kv_token_bytes

    def source(self, kv_class: int) -> Source | None:
        """None: nobody holds anything."""
        if kv_class not in self._sources:
            self._sources[kv_class] = self._find_source(kv_class)
        return self._sources[kv_class]

    # --- inside -----------------------------------------------------------------------------------

    def _lengths(self) -> tuple[int, ...]:
        lengths = (0, *self._question.held_lengths)
        if len(lengths) <= _MAX_LENGTHS:
            return lengths
        return tuple(lengths[index * (len(lengths) - 1) // (_MAX_LENGTHS - 1)] for index in range(_MAX_LENGTHS))

    def _find_way(self, group: int, held_blocks: int) -> Way:
        kind, kv_class = self._outlook.read_groups[group]
        alone_s = self._price(kind, held_blocks)
        # Nobody holds more than the last of the lengths.
        if self._fetch_ratio is not None and self._question.held_lengths[-1] > self._fetch_ratio * held_blocks:
            source = self.source(kv_class)
            if source is not None and source.blocks > self._fetch_ratio * held_blocks:
                num_bytes = (source.blocks - held_blocks) * self._link.block_tokens * self.kv_token_bytes(group)
                fetch_s = source.wait_s + self._link.transfer.transfer_s(num_bytes, 1)
                read_s = self._price(kind, source.blocks)
                if fetch_s < alone_s - read_s:
                    return Way(read_s, held_blocks, fetch_s, source.blocks)
        return Way(alone_s, held_blocks, 0.0, 0)

    def _price(self, kind: int, held_blocks: int) -> float:
        """Without a fetch."""
        key = kind, held_blocks
        read_s = self._read_s.get(key)
        if read_s is None:
            cached_tokens = held_blocks * self._link.block_tokens
            new_tokens = self._question.item.prompt_tokens - cached_tokens
            read_s = self._read_s[key] = self._outlook.tables.kinds[kind].prompt_s(new_tokens, cached_tokens)
        return read_s

    def _find_source(self, kv_class: int) -> Source | None:
        """Of those that hold most, the one whose planned fetches are over first; then the smallest id."""
        question, view = self._question, self._view
        if question.held is None:
            return None
        may = view.readers_of_class[kv_class]
        if question.usable is not None:
            may = may & question.usable
        if question.item.avoid:
            may = may & ~view.rows_of(question.item.avoid)
        most_blocks = question.held_lengths[-1]
        hold_most = (question.held == most_blocks) & may
        if is_any(hold_most):
            return self._source_of(hold_most, most_blocks)
        held = question.held * may
        blocks = int(held.max())
        if not blocks:
            return None
        return self._source_of(held == blocks, blocks)

    def _source_of(self, rows: Flags, blocks: int) -> Source:
        """The best of these, which hold so much."""
        row = least(self._outlook.source_free_s, rows)
        return Source(row, blocks, max(0.0, self._outlook.source_free_s.item(row) - self._question.now_s))

    def _extra_s(self, new_tokens: Seconds | int) -> Seconds:
        """What the answers of mixed workers add to the steps that read the prompt."""
        outlook, view = self._outlook, self._view
        if self._step_extra_s is None:
            self._step_extra_s = outlook.step_extra_s(outlook.decoding_at(self._question.now_s)) * view.is_mixed
        extra: Seconds = np.ceil(new_tokens / outlook.budget_tokens) * self._step_extra_s
        return extra
