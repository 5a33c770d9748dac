"""Requests for a simulated cluster, and the check of what came back: every token, and every worker's books."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import TandemError
from contracts.requests import SamplingParams
from gateway.core import Submission
from simulator import Program, expected_tokens

if TYPE_CHECKING:
    import random

    from contracts.requests import TokenDelta
    from gateway.stream import RequestStream
    from simulator.cluster import SimulatedCluster

#: Everything ends within this much virtual time after the last request.
SETTLE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a workload."""

    at_s: float
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    #: Cancelled after this many tokens; None: never.
    cancel_after: int | None = None


@dataclass(slots=True, kw_only=True)
class Answer:
    ask: Ask
    token_ids: list[int]
    #: The likeliest token at each place, where logprobs were asked for.
    top_ids: list[int] = field(default_factory=list[int])
    finish: str | None = None
    error: TandemError | None = None

    def take(self, delta: TokenDelta) -> None:
        assert delta.index == len(self.token_ids), (delta, self.ask)
        self.token_ids.extend(delta.token_ids)
        self.top_ids.extend(each.top[0].token_id for each in delta.logprobs or () if each.top)
        self.finish = delta.finish

    def check(self) -> None:
        """What came is a prefix of the right answer, and the whole of it when it ended well."""
        sampling = self.ask.sampling
        expected = expected_tokens(self.ask.token_ids, sampling, sampling.max_tokens)
        assert self.token_ids == expected[: len(self.token_ids)], f"wrong tokens for {self.ask}"
        assert self.top_ids == (self.token_ids if sampling.logprobs else [])
        if self.finish is not None:
            assert (self.finish, len(self.token_ids)) == ("length", sampling.max_tokens)


def workload(
    rng: random.Random, *, count: int, over_s: float, prompt: int = 120, output: int = 40, cancels: float = 0.0
) -> list[Ask]:
    asks: list[Ask] = []
    for _ in range(count):
        max_tokens = rng.randint(1, output)
        sampling = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(2**32), max_tokens=max_tokens)
        cancel_after = rng.randrange(max_tokens + 1) if rng.random() < cancels else None
        asks.append(
            Ask(
                at_s=rng.uniform(0, over_s),
                token_ids=tuple(rng.randrange(1000) for _ in range(rng.randint(1, prompt))),
                sampling=sampling,
                cancel_after=cancel_after,
            )
        )
    return sorted(asks, key=lambda ask: ask.at_s)


async def ask_for(cluster: SimulatedCluster, ask: Ask, *, deadline_s: float = 60.0) -> Answer:
    await asyncio.sleep(ask.at_s)
    answer = Answer(ask=ask, token_ids=[])
    submission = Submission(token_ids=ask.token_ids, sampling=ask.sampling, deadline_s=deadline_s)
    try:
        async with cluster.core.submit(submission) as stream:
            await _read(stream, answer)
    except TandemError as error:
        answer.error = error
    return answer


async def _read(stream: RequestStream, answer: Answer) -> None:
    if answer.ask.cancel_after == 0:
        return
    async for delta in stream:
        answer.take(delta)
        if answer.ask.cancel_after is not None and len(answer.token_ids) >= answer.ask.cancel_after:
            return


async def serve(
    program: Program, cluster: SimulatedCluster, asks: list[Ask], *, deadline_s: float = 60.0
) -> list[Answer]:
    """Runs a workload; checks every token, and that nothing is left on any worker."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ask_for(cluster, ask, deadline_s=deadline_s)) for ask in asks]
    answers = [task.result() for task in running]
    for answer in answers:
        answer.check()
        program.trace.add(f"{len(answer.token_ids)} tokens, {answer.finish}, {answer.error!r}")
    await asyncio.sleep(SETTLE_S)
    await check_books(cluster)
    return answers


async def check_books(cluster: SimulatedCluster) -> None:
    """Nothing is open at the gateway, nothing is held by a worker that is up."""
    assert cluster.core.num_open == 0
    for worker_id, audit in (await cluster.audits()).items():
        assert audit.problems == (), worker_id
        assert audit.load.free_blocks == audit.total_blocks, (worker_id, audit)
        assert (audit.open_requests, audit.holder_leases, audit.reader_leases) == (0, 0, 0), (worker_id, audit)
