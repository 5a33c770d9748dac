"""Requests for a simulated cluster, and the check of what came back: every token, and every worker's books."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.errors import NotReady
from contracts.requests import SamplingParams
from simulator import Program, clients
from simulator.clients import Answer, Ask

if TYPE_CHECKING:
    import random

    from simulator.cluster import SimulatedCluster

__all__ = ["SETTLE_S", "Answer", "Ask", "ask_for", "check", "check_books", "serve", "workload"]

#: Everything ends within this much virtual time after the last request.
SETTLE_S = 30.0


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
    """Waits for the time of the request first."""
    await asyncio.sleep(ask.at_s)
    if not cluster.gateway_is_up:
        return Answer(ask=ask, error=NotReady("nobody listens at the gateway's address"))
    return await clients.ask_for(cluster.core, replace(ask, deadline_s=deadline_s))


def check(answer: Answer) -> None:
    assert answer.problems() == [], answer


async def serve(
    program: Program, cluster: SimulatedCluster, asks: list[Ask], *, deadline_s: float = 60.0
) -> list[Answer]:
    """Runs a workload; checks every token, and that nothing is left on any worker."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ask_for(cluster, ask, deadline_s=deadline_s)) for ask in asks]
    answers = [task.result() for task in running]
    for answer in answers:
        check(answer)
        program.trace.add(f"{len(answer.token_ids)} tokens, {answer.finish}, {answer.error!r}")
    await asyncio.sleep(SETTLE_S)
    await check_books(cluster)
    return answers


async def check_books(cluster: SimulatedCluster) -> None:
    """Nothing is open at the gateway, nothing is held by a worker that is up."""
    assert cluster.core.num_open == 0
    for worker_id, audit in (await cluster.audits()).items():
        assert audit.problems == (), worker_id
        assert audit.load.available_blocks == audit.total_blocks, (worker_id, audit)
        assert (audit.open_requests, audit.holder_leases, audit.reader_leases) == (0, 0, 0), (worker_id, audit)
