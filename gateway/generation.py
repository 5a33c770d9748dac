"""The running answers of one HTTP request: submitted together, ended together."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from gateway.answers import Answer, Piece
from gateway.core import Submission
from gateway.planning import seed_of
from gateway.web import cancel_and_wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from gateway.core import GatewayCore
    from gateway.metrics import Metrics
    from gateway.planning import Plan, Prompt
    from gateway.stream import RequestStream
    from gateway.terms import Terms
    from gateway.timeline import Timeline
    from gateway.tokenizer import TextTokenizer

ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class Choice:
    """One answer."""

    index: int
    prompt: Prompt
    stream: RequestStream
    answer: Answer
    #: Characters of the answer's text given out so far (with `echo`, the prompt's too).
    num_chars: int = 0


class TimelineLog:
    """The timelines of the last `capacity` HTTP requests, by tenant and request id: nobody sees another's."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[tuple[str, str], tuple[Timeline, ...]] = OrderedDict()

    def add(self, tenant: str, request_id: str, timelines: tuple[Timeline, ...]) -> None:
        self._entries.pop((tenant, request_id), None)
        self._entries[tenant, request_id] = timelines
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    def get(self, tenant: str, request_id: str) -> tuple[Timeline, ...] | None:
        return self._entries.get((tenant, request_id))


class Generation:
    """Submits a plan's answers. Whoever makes it calls `close`, however it went; that ends what still runs.

    `block_keys` are the prompts', each as in `DispatchItem`. Raises NoCapacity or NotReady when one cannot be
    submitted; then none runs.
    """

    def __init__(
        self,
        core: GatewayCore,
        tokenizer: TextTokenizer,
        plan: Plan,
        request_id: str,
        *,
        terms: Terms,
        block_keys: Sequence[bytes],
        received_s: float,
        timeout_s: float,
        metrics: Metrics,
        timelines: TimelineLog,
    ) -> None:
        self.plan = plan
        self.request_id = request_id
        self.choices: list[Choice] = []
        self._clock = core.clock
        self._metrics = metrics
        self._timelines = timelines
        self._tenant = terms.tenant
        self._closed = False
        try:
            for index in range(plan.num_answers):
                submission = _submission(plan, index, terms, block_keys, received_s, timeout_s)
                stream = core.submit(submission)
                self.choices.append(_choice(plan, index, stream, tokenizer))
        except BaseException:
            self.close("another answer of the same request could not be started")
            raise

    async def accepted(self) -> None:
        """Returns once every answer is in a worker's hands; raises what went wrong before."""
        for choice in self.choices:
            await choice.stream.accepted()

    async def pieces(self, choice: Choice) -> AsyncIterator[Piece]:
        """What `choice` adds, as it comes; the last piece has `finish`."""
        last_s: float | None = None
        async for delta in choice.stream:
            now_s = self._clock.now_s()
            if last_s is not None:
                self._metrics.itl.observe(now_s - last_s)
            last_s = now_s
            piece = choice.answer.feed(delta)
            yield piece
            if piece.finish is not None:
                # Where the worker ended the answer itself, this finds nothing left to cancel.
                choice.stream.cancel("a stop string was written", outcome="stop")
                return

    async def whole(self, choice: Choice) -> Piece:
        whole = Piece()
        async for piece in self.pieces(choice):
            whole.extend(piece)
        return whole

    def usage(self) -> dict[str, object]:
        """Each prompt counts once, every answer's tokens count."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.plan.prompts)
        completion_tokens = sum(choice.answer.num_tokens for choice in self.choices)
        usage: dict[str, object] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        cached_tokens = self._cached_tokens()
        if cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
        return usage

    def _cached_tokens(self) -> int | None:
        """Of each prompt what the answer with the least found: the others found what that one had computed. None
        where no worker told."""
        least: dict[int, int] = {}
        for choice in self.choices:
            timeline = choice.stream.timeline
            if timeline is not None and timeline.num_cached_tokens is not None:
                prompt = choice.index // self.plan.n
                least[prompt] = min(least.get(prompt, timeline.num_cached_tokens), timeline.num_cached_tokens)
        return sum(least.values()) if least else None

    def timeline(self) -> dict[str, object]:
        """Of answers that have ended."""
        return timeline_json([one for choice in self.choices if (one := choice.stream.timeline)])

    def close(self, reason: str) -> None:
        """Cancels what still runs, and keeps the books. May be repeated."""
        if self._closed:
            return
        self._closed = True
        for choice in self.choices:
            choice.stream.cancel(reason)
        timelines = tuple(one for choice in self.choices if (one := choice.stream.timeline))
        for timeline in timelines:
            self._metrics.record(timeline)
        self._timelines.add(self._tenant, self.request_id, timelines)


def timeline_json(timelines: Sequence[Timeline]) -> dict[str, object]:
    """The timeline of the answer that took longest; beside it all of them, if there are several."""
    if not timelines:
        return {}
    slowest = max(timelines, key=lambda timeline: timeline.total_us)
    several = {"choices": [timeline.as_json() for timeline in timelines]} if len(timelines) > 1 else {}
    return {**slowest.as_json(), **several}


async def run_all(works: Sequence[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """All results; the first failure ends the others and is raised."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel_and_wait(*tasks)


def _submission(
    plan: Plan, index: int, terms: Terms, block_keys: Sequence[bytes], received_s: float, timeout_s: float
) -> Submission:
    sampling = plan.sampling[index // plan.n]
    return Submission(
        token_ids=plan.prompt_of(index).token_ids,
        sampling=msgspec.structs.replace(sampling, seed=seed_of(sampling, index % plan.n)),
        deadline_s=timeout_s,
        received_s=received_s,
        terms=terms,
        block_keys=block_keys[index // plan.n],
    )


def _choice(plan: Plan, index: int, stream: RequestStream, tokenizer: TextTokenizer) -> Choice:
    prompt = plan.prompt_of(index)
    after = () if plan.is_chat else prompt.token_ids
    answer = Answer(tokenizer, plan.options, after=after)
    return Choice(index, prompt, stream, answer, num_chars=len(prompt.text) if plan.echo else 0)
