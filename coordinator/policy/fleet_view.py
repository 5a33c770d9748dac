"""What dispatch looks at: the live workers and stores in columns, one row each, in order of worker id.

Columns, because a decision looks at every worker: over a thousand rows, numpy is a hundred times faster than objects.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from contracts.ids import WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import DispatchItem, MemberRole, WorkerInfo

    Flags = NDArray[np.bool_]
    Counts = NDArray[np.int64]
    Seconds = NDArray[np.float64]
    #: Token and sequence counts that are expectations.
    Expected = NDArray[np.float64]

ScalarT = TypeVar("ScalarT", bound=np.generic)

#: A worker's or a request's figure beyond this counts as this much: sums of many still fit into a column.
LARGEST_COUNT = 2**40

#: As `FleetView.source_rank`.
_SOURCE_RANK: dict[MemberRole, int] = {"store": 0, "decode": 1, "prefill": 2, "mixed": 2}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetView:
    """Live workers, as their last heartbeats and the placements since then tell them. Columns are read-only.

    Stores have rows too, for prefixes may come from them; nothing is ever placed there, and no prompt fits into one.

    Rows stand in order of worker id, so the first of several equal rows is the one with the smallest id.
    """

    infos: tuple[WorkerInfo, ...]

    # --- fixed for a worker's life ---
    #: Prefill and mixed workers.
    can_read: Flags
    is_mixed: Flags
    #: Decode workers: they continue prompts that others have read.
    is_writer: Flags
    #: Equal numbers: KV means the same (`KvIdentity`).
    kv_class: Counts
    #: Workers of whatever role: all but stores. Decode workers and stores: they hold prefixes and read no prompts.
    computes: Flags
    keeps: Flags
    #: By class: prefill and mixed workers; decode workers; all members, which may hold prefixes.
    readers_of_class: tuple[Flags, ...]
    writers_of_class: tuple[Flags, ...]
    holders_of_class: tuple[Flags, ...]
    #: Of several that hold the same, who gives it away first: a store, a decode worker, the others.
    source_rank: Counts
    #: Longest prompt that fits together with one token of an answer.
    max_prompt_tokens: Counts
    max_context_tokens: Counts
    #: The smallest of each among workers: most requests are below, and need not be compared with every row.
    least_prompt_tokens: int
    least_context_tokens: int
    #: Marks all, stores too: who reads and who writes is told elsewhere.
    everybody: Flags

    # --- changing with heartbeats and placements ---
    #: Prompt tokens not yet computed.
    prefill_load_tokens: Counts
    #: Context tokens held, or (prompt and allowed output) placed here.
    decode_load_tokens: Counts
    #: Requests accepted or placed here, not yet computing.
    waiting_requests: Counts
    #: Tokens of KV beyond what is used, virtually (`coordinator.policy.virtual_usage`), or placed here: below 0 where
    #: more is wanted than there is. Answers that run or were placed here.
    unclaimed_tokens: Counts
    num_answers: Counts

    def fits(self, item: DispatchItem) -> Flags:
        """Marks the workers that can hold the prompt and one token of an answer: `everybody` where all can."""
        if item.prompt_tokens <= self.least_prompt_tokens:
            return self.everybody
        return self.max_prompt_tokens >= item.prompt_tokens

    def rows_of(self, worker_ids: Iterable[WorkerId]) -> Flags:
        """Marks the rows of these workers. Ids of workers that are not here mean nothing."""
        marked = np.zeros(len(self.infos), np.bool_)
        for worker_id in worker_ids:
            row, is_here = find_row(worker_id, self.infos)
            if is_here:
                marked[row] = True
        return marked


def find_row(worker_id: WorkerId, infos: Sequence[WorkerInfo]) -> tuple[int, bool]:
    """The worker's row among these, in order of worker id, and whether it is there; else the row it would get."""
    row = bisect_left(infos, worker_id, key=_worker_id)
    return row, row < len(infos) and infos[row].worker_id == worker_id


def count_of(figure: int) -> int:
    """What a worker or a request tells, as far as a column can hold it."""
    # Asked for several times with each heartbeat: `min` and `max` take four times as long.
    if 0 <= figure <= LARGEST_COUNT:
        return figure
    return 0 if figure < 0 else LARGEST_COUNT


def prefill_tokens(item: DispatchItem) -> int:
    """What placing the request adds to its prefill worker's load."""
    return min(item.prompt_tokens, LARGEST_COUNT)


def decode_tokens(item: DispatchItem) -> int:
    """What placing the request adds to its decode worker's load: prompt and allowed output."""
    return min(item.prompt_tokens + item.max_tokens, LARGEST_COUNT)


def view_of(
    infos: Sequence[WorkerInfo],
    *,
    prefill_load_tokens: Counts,
    decode_load_tokens: Counts,
    waiting_requests: Counts,
    unclaimed_tokens: Counts,
    num_answers: Counts,
) -> FleetView:
    """A view of these workers, in order of worker id. It shows the columns that are given as they change later."""
    classes: dict[KvIdentity, int] = {}
    kv_class = _counts(classes.setdefault(info.identity, len(classes)) for info in infos)
    can_read = _flags(info.role in ("prefill", "mixed") for info in infos)
    is_writer = _flags(info.role == "decode" for info in infos)
    computes = _flags(info.role != "store" for info in infos)
    max_prompt_tokens = _counts(_max_prompt_tokens(info) for info in infos)
    max_context_tokens = _counts(0 if info.role == "store" else info.max_context_tokens for info in infos)
    return FleetView(
        infos=tuple(infos),
        can_read=can_read,
        is_mixed=_flags(info.role == "mixed" for info in infos),
        is_writer=is_writer,
        kv_class=kv_class,
        computes=computes,
        keeps=_read_only(~can_read),
        readers_of_class=tuple(_read_only(can_read & (kv_class == number)) for number in classes.values()),
        writers_of_class=tuple(_read_only(is_writer & (kv_class == number)) for number in classes.values()),
        holders_of_class=tuple(_read_only(kv_class == number) for number in classes.values()),
        source_rank=_counts(_SOURCE_RANK[info.role] for info in infos),
        max_prompt_tokens=max_prompt_tokens,
        max_context_tokens=max_context_tokens,
        least_prompt_tokens=min(max_prompt_tokens[computes].tolist(), default=0),
        least_context_tokens=min(max_context_tokens[computes].tolist(), default=0),
        everybody=_flags(True for _ in infos),
        prefill_load_tokens=_read_only(prefill_load_tokens),
        decode_load_tokens=_read_only(decode_load_tokens),
        waiting_requests=_read_only(waiting_requests),
        unclaimed_tokens=_read_only(unclaimed_tokens),
        num_answers=_read_only(num_answers),
    )


def _max_prompt_tokens(info: WorkerInfo) -> int:
    if info.role == "store":
        return -1
    return min(info.max_context_tokens, info.total_blocks * info.identity.layout.block_tokens) - 1


def _worker_id(info: WorkerInfo) -> WorkerId:
    return info.worker_id


def _flags(values: Iterable[bool]) -> Flags:
    return _read_only(np.fromiter(values, np.bool_))


def _counts(values: Iterable[int]) -> Counts:
    return _read_only(np.fromiter((min(value, LARGEST_COUNT) for value in values), np.int64))


def _read_only(column: NDArray[ScalarT]) -> NDArray[ScalarT]:
    window = column.view()
    window.flags.writeable = False
    return window
