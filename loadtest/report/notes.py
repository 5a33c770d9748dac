"""What a reader of figures must know before trusting them, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.metrics import LoadMetrics
    from loadtest.report.document import RateResult
    from workload.goodput import GoodputSearch

#: Of fewer values the 99th percentile is little more than the largest.
_FEW_VALUES = 500
#: Requests that go on for so long after the last arrival, relative to the time of arrivals, say that the server did
#: not keep up.
_LONG_TAIL = 0.2
#: Beyond this share of cached prompt tokens it was mostly the cache that was measured.
_MOSTLY_CACHED = 0.5


def notes_on(metrics: LoadMetrics) -> tuple[str, ...]:
    """None where everything went as planned."""
    return tuple(_notes(metrics))


def _notes(metrics: LoadMetrics) -> Iterator[str]:
    answers = metrics.answers
    if metrics.num_interrupted or metrics.num_unsent:
        yield (
            f"{metrics.num_interrupted:,} requests were interrupted and {metrics.num_unsent:,} never sent, because the "
            "run was cut short; they are in no figure"
        )
    if metrics.num_given_up:
        yield (
            f"{metrics.num_given_up:,} of {metrics.num_requests:,} requests were given up, since whether the rate is "
            "good was decided: attainment counts them as missed, TTFT with how long they had waited, so that it is a "
            "lower bound"
        )
    if failed := sum(error.count for error in metrics.errors):
        yield (
            f"{failed:,} of {metrics.num_requests:,} requests failed: latency percentiles leave out what these did not "
            "reach, and look better than what clients saw. Attainment counts them as missed"
        )
    if answers.num_without_usage:
        yield (
            f"{answers.num_without_usage:,} answers came without usage: their tokens are as counted in the chunks, or "
            "one for each chunk"
        )
    if answers.num_shorter or answers.num_longer:
        yield f"{answers.num_shorter:,} answers were shorter than asked for, {answers.num_longer:,} longer"
    if answers.num_other_prompt:
        yield (
            f"the server counts other prompt lengths than planned, of {answers.num_other_prompt:,} requests; its sum "
            f"is {answers.prompt_tokens_ratio:.3f} of ours"
        )
    if abs(metrics.tokens_per_chunk - 1) > 0.005:
        yield f"{metrics.tokens_per_chunk:.2f} tokens came in a chunk: ITL is the wait between chunks, not tokens"
    if answers.num_in_one_chunk:
        yield (
            f"{answers.num_in_one_chunk:,} answers of several tokens came in one chunk: they have no TPOT, and count "
            "as meeting its target"
        )
    if answers.num_retried:
        yield (
            f"{answers.num_retried:,} requests were sent again after Retry-After; their latencies count from when they "
            "were first due"
        )
    if answers.num_stale:
        yield (
            f"{answers.num_stale:,} requests were sent again because the server had closed the kept connection; they "
            "count as what became of them then"
        )
    if metrics.cached_prompt_share > _MOSTLY_CACHED:
        yield (
            f"the server had {metrics.cached_prompt_share:.0%} of the prompt tokens in its cache: where the workload "
            "shares no prefixes, an earlier run of the same seed left them there; give another --seed"
        )
    if metrics.tail_s > _LONG_TAIL * metrics.offered_s and metrics.tail_s > 1:
        yield (
            f"requests went on for {metrics.tail_s:,.1f} s after the last was due, {metrics.offered_s:,.1f} s after "
            f"the first{over_parts(metrics)}: throughput is over both; in a longer run queues would have grown "
            "further, or there were long answers"
        )
    if 0 < metrics.ttft.count < _FEW_VALUES:
        yield f"p99 of {metrics.ttft.count:,} values is little more than the largest of them"


def over_parts(metrics: LoadMetrics) -> str:
    """Behind times that are sums over the parts of a run."""
    return f" (sums over {metrics.num_parts} parts)" if metrics.num_parts > 1 else ""


def notes_on_rates(rates: Sequence[RateResult]) -> tuple[str, ...]:
    """Of the rates that one server was tried at."""
    return tuple(_notes_on_rates(rates))


def _notes_on_rates(rates: Sequence[RateResult]) -> Iterator[str]:
    others = [each for each in rates if not each.is_as_planned]
    if others:
        shown = ", ".join(f"{each.offered_rps:,.3f} for {each.rate_rps:,.3f}" for each in (others[0], *others[1:][-1:]))
        yield (
            f"the rates tried, and a goodput found among them, are those that the workload was scaled to; "
            f"requests/s that were really offered: {shown}. Turns of a chat wait for the answers before them, and few "
            "requests keep no rate exactly"
        )
    if any(each.num_given_up for each in rates):
        yield 'a TTFT p99 with ">" is a lower bound: requests were given up at that rate'


def ttft_mark(p99_ms: float, num_given_up: int) -> str:
    """To stand before a TTFT p99: whether it is a lower bound."""
    return "> " if num_given_up and p99_ms == p99_ms else ""


def search_result(search: GoodputSearch) -> str:
    """How a search for goodput ended."""
    runs = f"{len(search.points)} runs"
    if search.goodput_rps == 0:
        return f"no rate: even {search.missed_rps:,.3f} requests/s miss {search.target:.0%} attainment ({runs})"
    found = f"{search.goodput_rps:,.3f} requests/s with attainment >= {search.target:.0%}"
    if search.missed_rps == float("inf"):
        return f"at least {found}: the highest rate that was tried ({runs})"
    return f"{found}; {search.missed_rps:,.3f} miss it ({runs})"
