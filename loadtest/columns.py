"""Records of requests as columns: what figures are computed from, and what a report keeps of every request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from loadtest.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loadtest.record import RequestRecord

#: In columns of whole numbers: not known.
UNKNOWN = -1
#: Times are kept to the microsecond, far below what a client can tell.
_TIME_DECIMALS = 6
#: A report keeps so many different texts of one column; of a server that puts a number into each error it would
#: keep one for each request.
_MAX_TEXTS = 1000
_MORE_TEXTS = "(more of other wording)"

#: Of these nothing is known but that they are.
LEFT_OUT = (Outcome.INTERRUPTED, Outcome.UNSENT)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class TextColumn(msgspec.Struct, frozen=True, eq=False):
    """Text that repeats: row `i` says `values[codes[i]]`, or nothing where its code is UNKNOWN."""

    values: tuple[str, ...]
    codes: Ints

    def __getitem__(self, row: int) -> str:
        code = int(self.codes[row])
        return "" if code == UNKNOWN else self.values[code]

    def equals(self, *texts: str) -> Bools:
        """Rows that say one of these."""
        return np.isin(self.codes, [code for code, value in enumerate(self.values) if value in texts])

    def counts(self, rows: Bools) -> dict[str, int]:
        """Of the chosen rows, the texts that occur, in the order of `values`."""
        codes = self.codes[rows]
        counts = np.bincount(codes[codes != UNKNOWN], minlength=len(self.values))
        return {value: int(count) for value, count in zip(self.values, counts, strict=True) if count}


class RequestColumns(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One row for each record, in the order given. Times as in `RequestRecord`, NaN where it did not come so far."""

    index: Ints
    item: Ints
    turn: Ints
    part: Ints
    slo_class: TextColumn
    is_warmup: Bools
    outcome: TextColumn
    detail: TextColumn
    finish_reason: TextColumn
    prompt_tokens: Ints
    output_tokens: Ints
    cancel_after_tokens: Ints
    due_s: Floats
    taken_s: Floats
    sent_s: Floats
    connect_s: Floats
    headers_s: Floats
    first_token_s: Floats
    second_token_s: Floats
    last_token_s: Floats
    end_s: Floats
    #: The longest wait between two chunks of the answer.
    longest_gap_s: Floats
    num_chunks: Ints
    answered_tokens: Ints
    usage_prompt_tokens: Ints
    usage_output_tokens: Ints
    usage_cached_tokens: Ints
    status: Ints
    retry_after_s: Floats
    num_retries: Ints
    num_stale_connections: Ints
    num_moves: Ints
    num_replays: Ints
    #: By the name that the server gives the phase.
    server_phases_ms: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def is_finished(self) -> Bools:
        return self.outcome.equals(Outcome.FINISHED)

    @property
    def is_counted(self) -> Bools:
        """Those that the figures are of: no warm-up, and not cut off by the end of the run."""
        return ~self.is_warmup & ~self.outcome.equals(*LEFT_OUT)

    @property
    def ttft_s(self) -> Floats:
        """From when it was due; NaN without a token."""
        return _span(self.due_s, self.first_token_s)

    @property
    def tpot_s(self) -> Floats:
        """(last token - first token) / (tokens - 1), also of answers that ended early; NaN with fewer than two tokens,
        or where all came in one chunk.
        """
        several = (self.num_chunks > 1) & (self.answered_tokens > 1)
        span_s = _span(self.first_token_s, self.last_token_s)
        return np.where(several, span_s / np.maximum(self.answered_tokens - 1, 1), np.nan)

    @property
    def e2e_s(self) -> Floats:
        """From when it was due to the last token; NaN without one."""
        return _span(self.due_s, self.last_token_s)

    @property
    def lag_s(self) -> Floats:
        """How late the client took it up, for the first time; NaN where it never did."""
        return _span(self.due_s, self.taken_s)


def columns_of(records: Sequence[RequestRecord]) -> RequestColumns:
    phases = sorted({name for record in records for name in record.server_phases_ms or ()})
    return RequestColumns(
        index=_ints(record.index for record in records),
        item=_ints(record.item for record in records),
        turn=_ints(record.turn for record in records),
        part=_ints(record.part for record in records),
        slo_class=_texts(record.slo_class for record in records),
        is_warmup=np.array([record.is_warmup for record in records], np.bool_),
        outcome=_texts(record.outcome.value for record in records),
        detail=_texts(record.detail or None for record in records),
        finish_reason=_texts(record.finish_reason for record in records),
        prompt_tokens=_ints(record.prompt_tokens for record in records),
        output_tokens=_ints(record.output_tokens for record in records),
        cancel_after_tokens=_ints(record.cancel_after_tokens for record in records),
        due_s=_times(record.due_s for record in records),
        taken_s=_times(record.taken_s for record in records),
        sent_s=_times(record.sent_s for record in records),
        connect_s=_times(record.connect_s for record in records),
        headers_s=_times(record.headers_s for record in records),
        first_token_s=_times(record.chunk_s[0] if record.chunk_s else math.nan for record in records),
        second_token_s=_times(record.chunk_s[1] if len(record.chunk_s) > 1 else math.nan for record in records),
        last_token_s=_times(record.chunk_s[-1] if record.chunk_s else math.nan for record in records),
        end_s=_times(record.end_s for record in records),
        longest_gap_s=_longest_gaps(records),
        num_chunks=_ints(len(record.chunk_s) for record in records),
        answered_tokens=_ints(record.answered_tokens for record in records),
        usage_prompt_tokens=_ints(record.usage_prompt_tokens for record in records),
        usage_output_tokens=_ints(record.usage_output_tokens for record in records),
        usage_cached_tokens=_ints(record.usage_cached_tokens for record in records),
        status=_ints(record.status for record in records),
        retry_after_s=_times(math.nan if record.retry_after_s is None else record.retry_after_s for record in records),
        num_retries=_ints(record.num_retries for record in records),
        num_stale_connections=_ints(record.num_stale_connections for record in records),
        num_moves=_ints(record.num_moves for record in records),
        num_replays=_ints(record.num_replays for record in records),
        server_phases_ms={
            name: np.array([(record.server_phases_ms or {}).get(name, math.nan) for record in records], np.float64)
            for name in phases
        },
    )


def token_gaps_s(records: Iterable[RequestRecord]) -> Floats:
    """Waits between chunks that carry tokens, of all answers together."""
    gaps_s, is_inner, _ = _gaps([record for record in records if len(record.chunk_s) > 1])
    return gaps_s[is_inner]


def _longest_gaps(records: Sequence[RequestRecord]) -> Floats:
    several = [row for row, record in enumerate(records) if len(record.chunk_s) > 1]
    gaps_s, is_inner, starts = _gaps([records[row] for row in several])
    longest_s: Floats = np.full(len(records), np.nan, np.float64)
    if several:
        longest_s[several] = np.maximum.reduceat(np.where(is_inner, gaps_s, -np.inf), starts)
    return longest_s.round(_TIME_DECIMALS)


def _gaps(records: Sequence[RequestRecord]) -> tuple[Floats, Bools, Ints]:
    """From each chunk to the next, of all answers in a row; whether that is of the same answer; where each begins."""
    if not records:
        return np.empty(0), np.empty(0, np.bool_), np.empty(0, np.int64)
    chunk_s = np.concatenate([np.asarray(record.chunk_s) for record in records])
    starts = np.cumsum([0, *(len(record.chunk_s) for record in records[:-1])])
    gaps_s = np.diff(chunk_s, append=np.inf)
    is_inner = np.ones(len(gaps_s), np.bool_)
    is_inner[starts[1:] - 1] = False
    is_inner[-1] = False
    return gaps_s, is_inner, starts


def _span(start_s: Floats, end_s: Floats) -> Floats:
    # To the nanosecond: 1.3 - 1.0 is then exactly 0.3, and meets a target of 300 ms.
    return (end_s - start_s).round(9)


def _times(values: Iterable[float]) -> Floats:
    return np.fromiter(values, np.float64).round(_TIME_DECIMALS)


def _ints(values: Iterable[int | None]) -> Ints:
    return np.fromiter((UNKNOWN if value is None else value for value in values), np.int64)


def _texts(texts: Iterable[str | None]) -> TextColumn:
    codes: dict[str, int] = {}

    def code(text: str | None) -> int:
        if text is None:
            return UNKNOWN
        if text not in codes and len(codes) >= _MAX_TEXTS:
            text = _MORE_TEXTS
        return codes.setdefault(text, len(codes))

    rows = np.fromiter(map(code, texts), np.int64)
    return TextColumn(tuple(codes), rows)
