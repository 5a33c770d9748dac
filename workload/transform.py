"""Changes to workloads: faster, a part, again and again, shorter. Streams in, streams out, always by arrival."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar, cast

from workload.chats import Chat, ChatTurn
from workload.checks import require_not_negative, require_positive
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_Item = TypeVar("_Item", WorkloadRequest, Chat, WorkloadRequest | Chat)


def mean_rate_rps(requests: Sequence[WorkloadRequest]) -> float:
    """Gaps over the time from the first arrival to the last. Raises ValueError without two different arrivals."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    if span_s <= 0:
        raise ValueError(f"a rate needs arrivals at two different times, got {len(requests)} requests")
    return (len(requests) - 1) / span_s


def at_speed(items: Iterable[_Item], speed: float) -> Iterator[_Item]:
    """The same items in 1/`speed` of the time: the pattern stays, the rate is `speed` times as high.

    How long chats think stays too: people do not think faster because more of them come.
    """
    require_positive(speed=speed)
    return (item._replace(arrival_s=item.arrival_s / speed) for item in items)


def at_rate(requests: Sequence[WorkloadRequest], rate_rps: float) -> Iterator[WorkloadRequest]:
    """The same requests, closer together or farther apart, so that `mean_rate_rps` is `rate_rps`."""
    require_positive(rate_rps=rate_rps)
    return at_speed(requests, rate_rps / mean_rate_rps(requests))


def spread_ties(requests: Sequence[WorkloadRequest]) -> Iterator[WorkloadRequest]:
    """Requests of one time, spread evenly from it to the next time that occurs; the last ones as far as those before.

    Some traces round their times (Mooncake's to 3 s). Scaled to a small cluster such a tick is a burst that nobody
    sent: ten requests at once, and then nothing for half a minute.
    """
    ticks = [(arrival_s, list(group)) for arrival_s, group in groupby(requests, attrgetter("arrival_s"))]
    gap_s = 0.0
    for place, (arrival_s, group) in enumerate(ticks):
        if place + 1 < len(ticks):
            gap_s = ticks[place + 1][0] - arrival_s
        for number, request in enumerate(group):
            yield request._replace(arrival_s=arrival_s + gap_s * number / len(group))


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


def scaled_block_tokens(block_tokens: int, factor: float) -> int:
    """Tokens of a hash block of scaled prompts. Raises ValueError, with the nearest good factor, where not whole."""
    exact = block_tokens * factor
    whole = max(1, round(exact))
    if abs(exact - whole) > 1e-6:
        raise ValueError(
            f"{factor:g} of a block of {block_tokens} tokens is {exact:g} tokens, which is no whole number; "
            f"the nearest factor that works is {whole / block_tokens:.10g}"
        )
    return whole


def scaled_lengths(items: Iterable[_Item], factor: float) -> Iterator[_Item]:
    """Prompts and answers `factor` times as long, rounded, and of one token at least.

    Hash blocks are scaled too, so that two prompts which shared leading blocks share the same ones: what is shared and
    what is not stays exactly as it was. A scaled chat has lengths only: words are made up. Raises ValueError for a
    factor that is not above 0 and at most 1, and as `scaled_block_tokens`.
    """
    if not 0 < factor <= 1:
        raise ValueError(f"the factor must be above 0 and at most 1, got {factor:g}")
    return (_scaled(item, factor) for item in items)


def _scaled(item: _Item, factor: float) -> _Item:
    if isinstance(item, Chat):
        turns = tuple(
            ChatTurn(_tokens(turn.new_tokens, factor), _tokens(turn.output_tokens, factor), turn.think_s)
            for turn in item.turns
        )
        system_prompt_tokens = item.system_prompt_tokens and _tokens(item.system_prompt_tokens, factor)
        return item._replace(turns=turns, system_prompt_tokens=system_prompt_tokens)
    output_tokens = _tokens(item.output_tokens, factor)
    if not item.hash_ids:
        return item._replace(prompt_tokens=_tokens(item.prompt_tokens, factor), output_tokens=output_tokens)
    block_tokens = scaled_block_tokens(item.hash_block_tokens, factor)
    full = len(item.hash_ids) - 1
    tail = _tokens(item.prompt_tokens - full * item.hash_block_tokens, factor)
    return item._replace(
        prompt_tokens=full * block_tokens + tail, output_tokens=output_tokens, hash_block_tokens=block_tokens
    )


def _tokens(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


class ContextClip:
    """Makes requests and chats fit a context limit, and counts what it did.

    The answer keeps its length where it can (it is cut to the limit less one token), and the prompt gives way: its end
    is cut off, so that shared prefixes stay shared. A chat ends before the first turn that would not fit; its first
    turn is cut as a request is, with words made up where it had some. System prompts are never cut.
    """

    def __init__(self, max_context_tokens: int) -> None:
        if max_context_tokens < 2:
            raise ValueError(f"max_context_tokens must be >= 2, got {max_context_tokens}")
        self._limit = max_context_tokens
        self.num_clipped = 0
        #: Of chats: those that did not fit, and all turns after them.
        self.num_dropped_turns = 0
        self.clipped_prompt_tokens = 0
        self.clipped_output_tokens = 0

    def apply(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The counts grow as the stream is read. Raises ValueError for a system prompt that leaves room for nothing."""
        fitting = (self._chat(item) if isinstance(item, Chat) else self._request(item) for item in items)
        return cast("Iterator[_Item]", fitting)

    def _chat(self, chat: Chat) -> Chat:
        room = self._limit - chat.system_prompt_tokens
        if room < 2:
            raise ValueError(
                f"a system prompt of {chat.system_prompt_tokens} tokens leaves no room in a context of {self._limit}"
            )
        fitting = 0
        for turn, prompt_tokens in zip(chat.turns, chat.prompt_tokens(), strict=True):
            if prompt_tokens + turn.output_tokens > self._limit:
                break
            fitting += 1
        if fitting == len(chat.turns):
            return chat
        self.num_dropped_turns += len(chat.turns) - max(fitting, 1)
        if fitting:
            return chat._replace(turns=chat.turns[:fitting])
        first = chat.turns[0]
        new_tokens, output_tokens = self._fit(first.new_tokens, first.output_tokens, room)
        return chat._replace(turns=(ChatTurn(new_tokens, output_tokens),))

    def _fit(self, prompt_tokens: int, output_tokens: int, room: int) -> tuple[int, int]:
        """What is left of both, where they are longer than `room`; counted."""
        kept_output_tokens = min(output_tokens, room - 1)
        kept_prompt_tokens = min(prompt_tokens, room - kept_output_tokens)
        self.num_clipped += 1
        self.clipped_prompt_tokens += prompt_tokens - kept_prompt_tokens
        self.clipped_output_tokens += output_tokens - kept_output_tokens
        return kept_prompt_tokens, kept_output_tokens

    def _request(self, request: WorkloadRequest) -> WorkloadRequest:
        if request.prompt_tokens + request.output_tokens <= self._limit:
            return request
        prompt_tokens, output_tokens = self._fit(request.prompt_tokens, request.output_tokens, self._limit)
        blocks = -(-prompt_tokens // request.hash_block_tokens) if request.hash_ids else 0
        return request._replace(
            prompt_tokens=prompt_tokens, output_tokens=output_tokens, hash_ids=request.hash_ids[:blocks]
        )
