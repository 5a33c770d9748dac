"""The figures of a load test. Pure. Names and meanings are those of the simulator's where both have a figure.

Latencies count from when a request was due, not from when it was sent (no coordinated omission). A request attains its
SLO when it finished and both its TTFT and its TPOT are within the targets; whatever the server or the client failed at
counts as missed. A request that the plan cancels attains it when what came of the answer did; cancelled before its
first token it counts as missed once it had waited longer than its TTFT target, and says nothing before. A request that
a search gave up waiting for counts as missed, and in TTFT with how long it had waited: a lower bound. Turns of a chat
that could not be asked, since an earlier turn had failed, are failures. Requests that the end of the run cut off, or
that were never sent, are counted and left out of every other figure, like warm-up.

TPOT is (last token - first token) / (tokens - 1); an answer of one token has none and meets any target. ITL is the wait
between two chunks that carry tokens, over all answers together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from contracts.errors import ConfigError
from loadtest.columns import LEFT_OUT, UNKNOWN, Bools, columns_of, token_gaps_s
from loadtest.parts import offered
from loadtest.record import Outcome
from workload.figures import Attainment, LatencySummary, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.columns import Floats, Ints, RequestColumns
    from loadtest.record import RequestRecord
    from workload.slo import SloClass

#: Texts of one kind of failure that a report shows.
_MAX_EXAMPLES = 3

#: What a server, or the client's machine, failed at; that the client gave up waiting is its own decision.
_ERRORS = tuple(kind for kind in Outcome if kind.is_failure and kind is not Outcome.GIVEN_UP)

_TIMEOUTS = (Outcome.CONNECT_TIMEOUT, Outcome.FIRST_TOKEN_TIMEOUT, Outcome.TIMEOUT)

#: Standard normal quantile of a two-sided 95 %.
_Z95 = 1.959963984540054


class Interval(msgspec.Struct, frozen=True):
    """95 % confidence; NaN where nothing is known."""

    low: float
    high: float


class ErrorKind(msgspec.Struct, frozen=True, kw_only=True):
    """Failures of one kind: a value of `Outcome`."""

    kind: str
    count: int
    #: What the server or the system said, each once.
    examples: tuple[str, ...]


class AnswerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that were not quite what was planned."""

    #: Finished without `usage`: their tokens are those of the chunks, counted or taken as one each.
    num_without_usage: int
    #: Finished with fewer, or more, tokens than asked for.
    num_shorter: int
    num_longer: int
    #: The server counts another number of prompt tokens than planned; and theirs of ours, over all that say it.
    num_other_prompt: int
    prompt_tokens_ratio: float
    #: Answers of several tokens that came in one chunk: they have no TPOT, and count as meeting its target.
    num_in_one_chunk: int
    #: Sent again after `Retry-After`.
    num_retried: int
    #: Sent again because the server had closed a kept connection.
    num_stale: int
    #: For which a new connection was opened.
    num_connected: int


class Takeovers(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that other workers went on with, as the server says (Tandem does, with `--server-timeline`)."""

    #: Requests of which it says how often.
    num_told: int = 0
    #: Of these: moved while they were written, and how often all together.
    num_moved: int = 0
    num_moves: int = 0
    #: Taken up again after their worker was lost or failed.
    num_replayed: int = 0
    num_replays: int = 0


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """Of requests that finished and were sent once: what end-to-end time consists of. The means add up to its mean."""

    #: From when it was due to when the client took it up.
    send_lag: LatencySummary
    #: From there to the hand-over to a connection; next to nothing on a kept one.
    connect: LatencySummary
    #: From sending to the status line and headers.
    headers: LatencySummary
    #: From the headers to the first token.
    first_token: LatencySummary
    #: From the first token to the last.
    decode: LatencySummary


class LoadMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Over the measured requests: warm-up is only counted."""

    num_warmup: int
    #: Those that were due and came to an end, whatever end: every other figure is of these.
    num_requests: int
    num_finished: int
    #: By the plan, in mid-answer.
    num_cancelled: int
    #: Status 429.
    num_rejected: int
    num_timed_out: int
    #: By a search for goodput, that did not wait for them: missed, and no error of the server.
    num_given_up: int
    #: Of all other kinds.
    num_failed: int
    #: Cut off by the end of the run, and never sent: in no other figure.
    num_interrupted: int
    num_unsent: int
    #: All failures but those given up, the most frequent first.
    errors: tuple[ErrorKind, ...]
    answers: AnswerCounts
    #: Between which nothing was offered; the times that follow are sums over them.
    num_parts: int
    #: From the first due time to the last; the duration where all were due at once.
    offered_s: float
    #: From the first due time to the end of the last request.
    duration_s: float
    #: How long requests went on after the last one was due.
    tail_s: float
    offered_rps: float
    #: Rate at which requests were taken up, of that at which they were due: below 1 the client fell behind. NaN where
    #: the time was too short to tell.
    sending_rate_ratio: float
    finished_rps: float
    #: Requests a second, of those offered, that met both targets.
    goodput_rps: float
    #: Over all classes, each request against its own.
    attainment: Attainment
    #: Of the joint attainment, Wilson (1927), as if requests were independent.
    attainment_interval: Interval
    classes: tuple[Attainment, ...]
    #: With requests given up, as long as they had waited: then all its figures are lower bounds.
    ttft: LatencySummary
    #: Of finished requests, as `e2e`.
    tpot: LatencySummary
    itl: LatencySummary
    #: From the first chunk to the second: what a client sees of a handoff, where there is one.
    second_token: LatencySummary
    e2e: LatencySummary
    ttft_from_sending: LatencySummary
    send_lag: LatencySummary
    phases: Phases
    server_phases: dict[str, LatencySummary]
    #: Of finished requests, over the duration; as the server counts them where it does.
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    #: Chunks with tokens, of all requests.
    chunks_per_s: float
    #: Mean over the finished; NaN of none.
    tokens_per_chunk: float
    #: Of the prompt tokens of answers that say it, those that the server had at hand.
    cached_prompt_share: float
    takeovers: Takeovers = Takeovers()


def measure(
    records: Sequence[RequestRecord], slos: Sequence[SloClass], *, num_planned: int | None = None
) -> LoadMetrics:
    """Everything that one run tells; of `num_planned` requests, those without a record were not sent. Raises
    ConfigError for a class of request without an SLO.
    """
    columns, gaps_s = columns_of(records), token_gaps_s(filter(is_counted, records))
    return measure_columns(columns, gaps_s, slos, num_planned=num_planned)


def is_counted(record: RequestRecord) -> bool:
    """Whether its latencies are in the figures."""
    return not record.is_warmup and record.outcome not in LEFT_OUT


def measure_columns(
    columns: RequestColumns, gaps_s: Floats, slos: Sequence[SloClass], *, num_planned: int | None = None
) -> LoadMetrics:
    """As `measure`, with the waits between chunks of the counted requests."""
    measured = ~columns.is_warmup
    rows = columns.is_counted
    finished = rows & columns.is_finished
    met = attained(columns, slos)
    attainment = _attainment("all", slos[0] if len(slos) == 1 else None, met, rows)
    load = offered(columns, rows)
    duration_s = load.duration_s
    counts = columns.outcome.counts(measured)
    num_timed_out = sum(counts.get(kind, 0) for kind in _TIMEOUTS)
    num_rejected = counts.get(Outcome.REJECTED, 0)
    errors = _errors(columns, measured)
    chunks = int(columns.num_chunks[finished].sum())
    output_tokens = int(columns.answered_tokens[finished].sum())
    return LoadMetrics(
        num_warmup=int(columns.is_warmup.sum()),
        num_requests=int(rows.sum()),
        num_finished=counts.get(Outcome.FINISHED, 0),
        num_cancelled=counts.get(Outcome.CANCELLED, 0),
        num_rejected=num_rejected,
        num_timed_out=num_timed_out,
        num_given_up=counts.get(Outcome.GIVEN_UP, 0),
        num_failed=sum(error.count for error in errors) - num_rejected - num_timed_out,
        num_interrupted=counts.get(Outcome.INTERRUPTED, 0),
        num_unsent=counts.get(Outcome.UNSENT, 0) + (num_planned or len(columns)) - len(columns),
        errors=errors,
        answers=_answers(columns, rows, finished),
        **load._asdict(),
        finished_rps=_ratio(int(finished.sum()), duration_s),
        goodput_rps=load.offered_rps * attainment.joint,
        attainment=attainment,
        attainment_interval=wilson(attainment.joint, attainment.num_requests),
        classes=tuple(
            _attainment(slo.name, slo, met, rows & columns.slo_class.equals(slo.name))
            for slo in slos
            if slo.name in columns.slo_class.values
        ),
        ttft=summarise(_ttft_s(columns)[rows]),
        tpot=summarise(columns.tpot_s[finished]),
        itl=summarise(gaps_s),
        second_token=summarise((columns.second_token_s - columns.first_token_s)[rows]),
        e2e=summarise(columns.e2e_s[finished]),
        ttft_from_sending=summarise((columns.first_token_s - columns.sent_s)[rows]),
        send_lag=summarise(columns.lag_s[rows]),
        phases=Phases(**{name: summarise(spans_s) for name, spans_s in phase_spans_s(columns).items()}),
        server_phases={name: summarise(times[rows] / 1e3) for name, times in columns.server_phases_ms.items()},
        prompt_tokens_per_s=_ratio(int(_prompt_tokens(columns)[finished].sum()), duration_s),
        output_tokens_per_s=_ratio(output_tokens, duration_s),
        chunks_per_s=_ratio(int(columns.num_chunks[rows].sum()), duration_s),
        tokens_per_chunk=_ratio(output_tokens, chunks),
        cached_prompt_share=_cached_share(columns, rows),
        takeovers=_takeovers(columns, rows),
    )


class Attained(msgspec.Struct, frozen=True, eq=False):
    """For each row; requests that are not `judged` are in no attainment."""

    judged: Bools
    ttft: Bools
    tpot: Bools

    @property
    def both(self) -> Bools:
        return self.ttft & self.tpot


def attained(columns: RequestColumns, slos: Sequence[SloClass]) -> Attained:
    """Which requests met their targets. Raises ConfigError for a class of request without an SLO."""
    ttft_target_s, tpot_target_s = _targets(columns, slos)
    no_token = np.isnan(columns.first_token_s)
    cancelled = columns.outcome.equals(Outcome.CANCELLED)
    says_nothing = cancelled & no_token & (columns.end_s - columns.due_s <= ttft_target_s)
    served = columns.is_finished | cancelled
    return Attained(
        judged=columns.is_counted & ~says_nothing,
        ttft=served & (columns.ttft_s <= ttft_target_s),
        tpot=served & ~no_token & ~(columns.tpot_s > tpot_target_s),
    )


def is_failed(columns: RequestColumns) -> Bools:
    """By kind of end, warm-up included; those given up are not."""
    return columns.outcome.equals(*_ERRORS)


def wilson(share: float, count: float) -> Interval:
    """Of a share of `count` independent trials, 95 % (Wilson 1927: it stays within [0, 1], also at its ends)."""
    if not count:
        return Interval(math.nan, math.nan)
    z2 = _Z95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z95 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return Interval(max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def phase_spans_s(columns: RequestColumns) -> dict[str, Floats]:
    """Names of `Phases` -> seconds, of the requests that finished and were sent once."""
    once = (columns.num_retries == 0) & (columns.num_stale_connections == 0)
    chosen = ~columns.is_warmup & columns.is_finished & once
    spans_s = {
        "send_lag": columns.lag_s,
        "connect": columns.sent_s - columns.taken_s,
        "headers": columns.headers_s - columns.sent_s,
        "first_token": columns.first_token_s - columns.headers_s,
        "decode": columns.last_token_s - columns.first_token_s,
    }
    return {name: span_s[chosen] for name, span_s in spans_s.items()}


def _targets(columns: RequestColumns, slos: Sequence[SloClass]) -> tuple[Floats, Floats]:
    by_name = {slo.name: slo for slo in slos}
    missing = sorted(set(columns.slo_class.values) - set(by_name))
    if missing:
        raise ConfigError(f"no SLO is given for the class {missing[0]!r}; there are {', '.join(sorted(by_name))}")
    targets = [by_name[name] for name in columns.slo_class.values]
    codes = columns.slo_class.codes
    return (
        np.array([slo.ttft_ms / 1e3 for slo in targets], np.float64)[codes],
        np.array([slo.tpot_ms / 1e3 for slo in targets], np.float64)[codes],
    )


def _attainment(name: str, slo: SloClass | None, met: Attained, rows: Bools) -> Attainment:
    judged = rows & met.judged
    count = int(judged.sum())

    def share(chosen: Bools) -> float:
        return _ratio(int((chosen & judged).sum()), count)

    return Attainment(
        name=name,
        ttft_target_ms=None if slo is None else slo.ttft_ms,
        tpot_target_ms=None if slo is None else slo.tpot_ms,
        num_requests=count,
        joint=share(met.both),
        ttft_only=share(met.ttft),
        tpot_only=share(met.tpot),
    )


def _errors(columns: RequestColumns, rows: Bools) -> tuple[ErrorKind, ...]:
    kinds = [
        ErrorKind(
            kind=kind,
            count=count,
            examples=tuple(columns.detail.counts(rows & columns.outcome.equals(kind)))[:_MAX_EXAMPLES],
        )
        for kind, count in columns.outcome.counts(rows).items()
        if kind in _ERRORS
    ]
    return tuple(sorted(kinds, key=lambda each: (-each.count, each.kind)))


def _answers(columns: RequestColumns, rows: Bools, finished: Bools) -> AnswerCounts:
    said_prompt = rows & (columns.usage_prompt_tokens != UNKNOWN)
    planned, said = columns.prompt_tokens[said_prompt], columns.usage_prompt_tokens[said_prompt]

    def count(chosen: Bools) -> int:
        return int(chosen.sum())

    return AnswerCounts(
        num_without_usage=count(finished & (columns.usage_output_tokens == UNKNOWN)),
        num_shorter=count(finished & (columns.answered_tokens < columns.output_tokens)),
        num_longer=count(finished & (columns.answered_tokens > columns.output_tokens)),
        num_other_prompt=count(said != planned),
        prompt_tokens_ratio=_ratio(int(said.sum()), int(planned.sum())),
        num_in_one_chunk=count(finished & (columns.answered_tokens > 1) & (columns.num_chunks == 1)),
        num_retried=count(rows & (columns.num_retries > 0)),
        num_stale=count(rows & (columns.num_stale_connections > 0)),
        num_connected=count(rows & ~np.isnan(columns.connect_s)),
    )


def _takeovers(columns: RequestColumns, rows: Bools) -> Takeovers:
    # What is not known is below 0.
    moves, replays = (np.maximum(told[rows], 0) for told in (columns.num_moves, columns.num_replays))
    is_told = (columns.num_moves != UNKNOWN) | (columns.num_replays != UNKNOWN)
    return Takeovers(
        num_told=int((rows & is_told).sum()),
        num_moved=int((moves > 0).sum()),
        num_moves=int(moves.sum()),
        num_replayed=int((replays > 0).sum()),
        num_replays=int(replays.sum()),
    )


def _ttft_s(columns: RequestColumns) -> Floats:
    """Of a request that was given up before its first token, how long it had waited."""
    waits = columns.outcome.equals(Outcome.GIVEN_UP) & np.isnan(columns.first_token_s)
    return np.where(waits, columns.end_s - columns.due_s, columns.ttft_s)


def _prompt_tokens(columns: RequestColumns) -> Ints:
    said = columns.usage_prompt_tokens
    return np.where(said == UNKNOWN, columns.prompt_tokens, said)


def _cached_share(columns: RequestColumns, rows: Bools) -> float:
    known = rows & (columns.usage_cached_tokens != UNKNOWN)
    return _ratio(int(columns.usage_cached_tokens[known].sum()), int(_prompt_tokens(columns)[known].sum()))


def _ratio(value: float, of: float) -> float:
    return value / of if of else math.nan
