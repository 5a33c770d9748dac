"""The dispatch policies worker by worker: slow, plain, and the model that those in columns are compared with.

Only what a policy is about: where a request goes. Sequential prices instead of tables, loops instead of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from contracts.latency import StepWork

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.latency import LatencyModel, TransferModel
    from contracts.messages import DispatchItem, WorkerInfo
    from coordinator.policy import DispatchLimits


@dataclass(slots=True, kw_only=True)
class Row:
    """A live worker, as its last report and the placements since then tell it."""

    info: WorkerInfo
    prefill_load_tokens: int = 0
    decode_load_tokens: int = 0
    waiting_requests: int = 0
    #: Leading blocks of the prompt in question.
    held_blocks: int = 0
    #: Seconds until it has read what it was given, and until its planned fetches from it are over.
    queue_s: float = 0.0
    source_wait_s: float = 0.0
    #: Share of its time for which prompts came lately.
    busy_share: float = 0.0
    #: Its budget of copies is not used up.
    may_copy: bool = True

    @property
    def reads(self) -> bool:
        return self.info.role in ("prefill", "mixed")

    def can_hold(self, prompt_tokens: int) -> bool:
        """Whether the prompt and one token of an answer fit into all its blocks and into its context."""
        needed = self.info.identity.layout.blocks_for(prompt_tokens + 1)
        return prompt_tokens < self.info.max_context_tokens and needed <= self.info.total_blocks

    def understands(self, other: Row) -> bool:
        return self.info.identity.mismatch(other.info.identity) is None

    def book(self, item: DispatchItem) -> None:
        """Its prompt is read here."""
        self.prefill_load_tokens += item.prompt_tokens
        self.waiting_requests += 1


class Pair(NamedTuple):
    reader: str
    writer: str


class Fetch(NamedTuple):
    source: str
    blocks: int


class Ttft(NamedTuple):
    seconds: float
    fetch: Fetch | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    latency: LatencyModel
    max_batch_tokens: int
    transfer: TransferModel
    kv_token_bytes: int
    block_tokens: int
    #: By source and reader: by which power of two a transfer takes longer.
    powers: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    def read_s(self, num_tokens: int, held_blocks: int) -> float:
        seconds, position = 0.0, held_blocks * self.block_tokens
        while position < num_tokens:
            chunk = min(self.max_batch_tokens, num_tokens - position)
            seconds += self.latency.step_s(StepWork(chunk, chunk * position + 0.5 * chunk * (chunk + 1), 1))
            position += chunk
        return seconds


# --- least loaded -------------------------------------------------------------------------------------


def least_loaded(item: DispatchItem, rows: Sequence[Row], limits: DispatchLimits) -> Pair | str:
    """A pair of worker ids, or the word for why there is none."""
    rows = [row for row in rows if row.info.role != "store"]
    usable = [row for row in rows if row.can_hold(item.prompt_tokens)]
    if rows and not usable:
        return "too_long"
    readers = [row for row in usable if row.reads]
    if not readers:
        return "no_prefill"
    open_readers = [row for row in readers if row.waiting_requests < limits.max_waiting_requests]
    if not open_readers:
        return "full"
    in_order = sorted(
        open_readers,
        key=lambda row: (row.info.worker_id in item.avoid, row.prefill_load_tokens, row.info.worker_id),
    )
    return _fewest_avoided(item, in_order, usable) or "no_decode"


def _fewest_avoided(item: DispatchItem, readers: Sequence[Row], usable: Sequence[Row]) -> Pair | None:
    """The first reader that has a writer, both not avoided; else the pair with the fewest avoided."""
    best: Pair | None = None
    fewest = 3
    for reader in readers:
        writer = _least_loaded_writer(item, reader, usable)
        if writer is None:
            continue
        pair = Pair(reader.info.worker_id, writer.info.worker_id)
        num_avoided = sum(worker_id in item.avoid for worker_id in pair)
        if num_avoided < fewest:
            best, fewest = pair, num_avoided
        if not fewest:
            break
    return best


def _least_loaded_writer(item: DispatchItem, reader: Row, usable: Sequence[Row]) -> Row | None:
    whole_tokens = item.prompt_tokens + item.max_tokens
    if reader.info.role == "mixed":
        return reader
    writers = [row for row in usable if row.info.role == "decode" and reader.understands(row)]

    def preference(row: Row) -> tuple[bool, bool, int, str]:
        is_avoided = row.info.worker_id in item.avoid
        too_small = row.info.max_context_tokens < whole_tokens
        return (is_avoided, too_small, row.decode_load_tokens, row.info.worker_id)

    return min(writers, key=preference, default=None)


# --- shortest time to the first token -----------------------------------------------------------------


def ttfts(
    item: DispatchItem, rows: Sequence[Row], prices: Prices, limits: DispatchLimits, fetch_ratio: float | None
) -> dict[str, Ttft]:
    """Of each worker that could read the prompt. Mooncake's algorithm 1, with fetches that run during the queue."""
    found: dict[str, Ttft] = {}
    for row in rows:
        may_read = row.reads and row.can_hold(item.prompt_tokens)
        if not may_read or row.waiting_requests >= limits.max_waiting_requests:
            continue
        has_writer = row.info.role == "mixed" or any(
            other.info.role == "decode" and other.understands(row) and other.can_hold(item.prompt_tokens)
            for other in rows
        )
        if has_writer:
            found[row.info.worker_id] = _ttft(item, row, rows, prices, fetch_ratio)
    return found


def _ttft(item: DispatchItem, row: Row, rows: Sequence[Row], prices: Prices, fetch_ratio: float | None) -> Ttft:
    alone_s = prices.read_s(item.prompt_tokens, row.held_blocks)
    # Prompts that come while this one waits fill its last step, half of it on average.
    full_step_s = prices.latency.step_s(StepWork(prices.max_batch_tokens, 0.0, 1))
    company_s = min(row.busy_share * row.queue_s, full_step_s / 2)
    alone = Ttft(item.waited_s + row.queue_s + company_s + alone_s, None)
    best = None
    if fetch_ratio is not None:
        first, second = _sources(row, rows, 4 if any(prices.powers.values()) else 1)
        best = _fastest(row, rows, first, prices, fetch_ratio, item.prompt_tokens)
        if best is None or best.source.source_wait_s > 0:
            others = _fastest(row, rows, second, prices, fetch_ratio, item.prompt_tokens)
            if others is not None and (best is None or others.total_s < best.total_s):
                best = others
    if best is None:
        return alone
    seconds = item.waited_s + max(row.queue_s, best.fetch_s) + company_s + best.rest_s
    return Ttft(seconds, Fetch(best.source.info.worker_id, best.source.held_blocks))


class _Copy(NamedTuple):
    source: Row
    fetch_s: float
    rest_s: float

    @property
    def total_s(self) -> float:
        return self.fetch_s + self.rest_s


def _sources(row: Row, rows: Sequence[Row], most_alike: int) -> tuple[list[Row], list[Row]]:
    """Of those that hold most, the best (so many) that read prompts and the best that do not; where there is none of
    one sort, its best among those that hold less."""

    def best(some: Sequence[Row]) -> list[Row]:
        ranks = {"store": 0, "decode": 1, "prefill": 2, "mixed": 2}
        most = max((each.held_blocks for each in some), default=0)
        alike = [each for each in some if each.held_blocks == most > 0]
        return sorted(alike, key=lambda each: (each.source_wait_s, ranks[each.info.role], each.info.worker_id))[
            :most_alike
        ]

    alike = [other for other in rows if other.understands(row)]
    readers = best([other for other in alike if other.reads])
    others = best([other for other in alike if not other.reads])
    found = sorted([*others, *readers], key=lambda each: -each.held_blocks)
    first = [each for each in found if each.held_blocks == found[0].held_blocks]
    return first, found[len(first) :]


def _fastest(
    row: Row, rows: Sequence[Row], sources: Sequence[Row], prices: Prices, fetch_ratio: float, num_tokens: int
) -> _Copy | None:
    found: _Copy | None = None
    alone_s = prices.read_s(num_tokens, row.held_blocks)
    for source in sources:
        most_read = max((each.held_blocks for each in rows if each.reads and each.understands(row)), default=0)
        is_replica = min(most_read, source.held_blocks) > row.held_blocks
        too_little = source.reads and source.held_blocks <= fetch_ratio * row.held_blocks
        if source.held_blocks <= row.held_blocks or too_little or (is_replica and not row.may_copy):
            continue
        num_bytes = (source.held_blocks - row.held_blocks) * prices.block_tokens * prices.kv_token_bytes
        longer = 2.0 ** prices.powers.get((source.info.worker_id, row.info.worker_id), 0)
        copy = _Copy(
            source,
            source.source_wait_s + prices.transfer.transfer_s(num_bytes, 1) * longer,
            prices.read_s(num_tokens, source.held_blocks),
        )
        if copy.fetch_s + 0.001 < 0.8 * (alone_s - copy.rest_s) and (found is None or copy.total_s < found.total_s):
            found = copy
    return found
