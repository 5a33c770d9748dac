"""Changes to workloads: faster, a part, again and again, shorter. Streams in, streams out, always by arrival."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workload.checks import require_not_negative, require_positive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from workload.request import WorkloadRequest


def mean_rate_rps(requests: Sequence[WorkloadRequest]) -> float:
    """Gaps over the time from the first arrival to the last. Raises ValueError without two different arrivals."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    if span_s <= 0:
        raise ValueError(f"a rate needs arrivals at two different times, got {len(requests)} requests")
    return (len(requests) - 1) / span_s


def at_speed(requests: Iterable[WorkloadRequest], speed: float) -> Iterator[WorkloadRequest]:
    """The same requests in 1/`speed` of the time: the pattern stays, the rate is `speed` times as high."""
    require_positive(speed=speed)
    return (request._replace(arrival_s=request.arrival_s / speed) for request in requests)


def at_rate(requests: Sequence[WorkloadRequest], rate_rps: float) -> Iterator[WorkloadRequest]:
    """The same requests, closer together or farther apart, so that `mean_rate_rps` is `rate_rps`."""
    require_positive(rate_rps=rate_rps)
    return at_speed(requests, rate_rps / mean_rate_rps(requests))


def window(requests: Iterable[WorkloadRequest], from_s: float, to_s: float) -> Iterator[WorkloadRequest]:
    """Those that arrive from `from_s` on and before `to_s`, their arrivals counted from `from_s`."""
    require_not_negative(from_s=from_s)
    if not to_s > from_s:
        raise ValueError(f"a window must end after it begins, got {from_s} s to {to_s} s")
    return _window(requests, from_s, to_s)


def _window(requests: Iterable[WorkloadRequest], from_s: float, to_s: float) -> Iterator[WorkloadRequest]:
    for request in requests:
        if request.arrival_s >= to_s:
            return
        if request.arrival_s >= from_s:
            yield request._replace(arrival_s=request.arrival_s - from_s)


def repeat(
    requests: Sequence[WorkloadRequest], duration_s: float, *, fresh_prefixes: bool
) -> Iterator[WorkloadRequest]:
    """The workload again and again, until `duration_s`. A round is one mean gap longer than its last arrival.

    `fresh_prefixes`: each round has hash ids of its own, as other users asking other things would; a cache then
    sees the reuse of one round. Otherwise the same users come back with the same prompts, and from the second
    round on a large enough cache hits everything. Raises ValueError without two different arrivals.
    """
    require_positive(duration_s=duration_s)
    gap_s = 1.0 / mean_rate_rps(requests)
    round_s = requests[-1].arrival_s + gap_s
    num_ids = max((hash_id for request in requests for hash_id in request.hash_ids), default=-1) + 1
    return _repeat(requests, duration_s, round_s, num_ids if fresh_prefixes else 0)


def _repeat(
    requests: Sequence[WorkloadRequest], duration_s: float, round_s: float, ids_a_round: int
) -> Iterator[WorkloadRequest]:
    start_s, first_id = 0.0, 0
    while True:
        for request in requests:
            arrival_s = start_s + request.arrival_s
            if arrival_s >= duration_s:
                return
            hash_ids = tuple(hash_id + first_id for hash_id in request.hash_ids) if first_id else request.hash_ids
            yield request._replace(arrival_s=arrival_s, hash_ids=hash_ids)
        start_s += round_s
        first_id += ids_a_round


class ContextClip:
    """Makes requests fit a context limit, and counts what it did.

    The answer keeps its length where it can (it is cut to the limit less one token), and the prompt gives way: its end
    is cut off, so that shared prefixes stay shared.
    """

    def __init__(self, max_context_tokens: int) -> None:
        if max_context_tokens < 2:
            raise ValueError(f"max_context_tokens must be >= 2, got {max_context_tokens}")
        self._limit = max_context_tokens
        self.num_clipped = 0
        self.clipped_prompt_tokens = 0
        self.clipped_output_tokens = 0

    def apply(self, requests: Iterable[WorkloadRequest]) -> Iterator[WorkloadRequest]:
        """The counts grow as the stream is read."""
        return map(self._clip, requests)

    def _clip(self, request: WorkloadRequest) -> WorkloadRequest:
        if request.prompt_tokens + request.output_tokens <= self._limit:
            return request
        output_tokens = min(request.output_tokens, self._limit - 1)
        prompt_tokens = min(request.prompt_tokens, self._limit - output_tokens)
        self.num_clipped += 1
        self.clipped_prompt_tokens += request.prompt_tokens - prompt_tokens
        self.clipped_output_tokens += request.output_tokens - output_tokens
        blocks = -(-prompt_tokens // request.hash_block_tokens) if request.hash_ids else 0
        return request._replace(
            prompt_tokens=prompt_tokens, output_tokens=output_tokens, hash_ids=request.hash_ids[:blocks]
        )
