"""A coordinator whose workload shifts, on virtual time: what a gateway asks and workers tell becomes one proposal."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from cluster import replanning
from cluster.services import coordinator_service
from contracts.config_loader import load_config
from contracts.ids import GatewayId, Incarnation, RequestId, WorkerId
from contracts.messages import (
    DISPATCH,
    HEARTBEAT,
    MEMBERS,
    REGISTER,
    AnswerTally,
    DispatchItem,
    DispatchRequest,
    Empty,
    HeartbeatRequest,
    LatencyFit,
    WorkerInfo,
    WorkerLoad,
)
from coordinator.split_question import NoSplit
from rpc import MemoryNetwork
from simulator import Program, VirtualClock, run
from simulator.engine import modelled_identity
from simulator.planning.present import better_split

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from contracts.messages import CoordinatorFigures, Role
    from coordinator.split_question import SplitAnswer, SplitQuestion

ROLES: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
RATE_RPS = 5.0
WINDOW_S = 40.0
PLANNED_FOR = ("2000", "2000", "4")
#: Steps that only decode take 10 ms and little more, a prompt of 1,000 tokens 110 ms.
FIT = LatencyFit(0.01, 1e-4, 0.0, 0.01, 1e-4, 0.0, 1000, 1000)
NOTHING_KNOWN = LatencyFit(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)


class Site:
    """A coordinator as it is served, and those who call it."""

    def __init__(self, fit: LatencyFit) -> None:
        self.network = MemoryNetwork(rng=random.Random(1), host="c")
        self.said: list[str] = []
        self._channel = self.network.channel("c:1")
        self._fit = fit
        self._rng = random.Random(5)
        self._num_items = self._num_answers = self._num_tokens = 0

    async def register(self) -> None:
        for name, role in ROLES.items():
            info = WorkerInfo(
                worker_id=WorkerId(name),
                incarnation=Incarnation(1),
                role=role,
                address=f"{name}:1",
                model="m",
                identity=modelled_identity(),
                total_blocks=8000,
                max_context_tokens=8192,
                max_batch_tokens=2048,
            )
            await self._channel.call(REGISTER, info, timeout_s=1)

    async def serve(self, for_s: float, *, prompt_tokens: int, answer_tokens: int) -> None:
        """Requests at a steady rate, all answered, told with every heartbeat."""
        for _ in range(round(for_s / 0.5)):
            await asyncio.sleep(0.5)
            count = self._rng.choice((2, 3))
            items = [self._item(prompt_tokens) for _ in range(count)]
            await self._channel.call(
                DISPATCH, DispatchRequest(gateway_id=GatewayId("g"), items=tuple(items)), timeout_s=1
            )
            self._num_answers += count
            self._num_tokens += count * answer_tokens
            for name, role in ROLES.items():
                answers = (AnswerTally(self._num_answers, self._num_tokens),) if role == "decode" else ()
                beat = HeartbeatRequest(
                    worker_id=WorkerId(name),
                    incarnation=Incarnation(1),
                    load=WorkerLoad(free_blocks=8000, answers=answers),
                    latency=self._fit,
                )
                await self._channel.call(HEARTBEAT, beat, timeout_s=1)

    async def figures(self) -> CoordinatorFigures:
        figures = (await self._channel.call(MEMBERS, Empty(), timeout_s=1)).coordinator
        assert figures is not None
        return figures

    def about_plans(self) -> list[str]:
        return [line for line in self.said if not line.startswith("worker ")]

    def _item(self, prompt_tokens: int) -> DispatchItem:
        self._num_items += 1
        return DispatchItem(request_id=RequestId(f"r{self._num_items}"), prompt_tokens=prompt_tokens, max_tokens=500)


def at_site(body: Callable[[Site], Awaitable[None]], *, fit: LatencyFit = FIT, mode: str = "propose") -> None:
    prompt_tokens, p95_tokens, answer_tokens = PLANNED_FOR
    overrides = {
        "slo": "{chat: {ttft_ms: 1000, tpot_ms: 13}}",
        "default_slo_class": "chat",
        "engine.max_sequences": "16",
        "coordinator.replan.mode": mode,
        "coordinator.replan.window_s": f"{WINDOW_S:g}",
        "coordinator.replan.expected.rate_rps": f"{RATE_RPS:g}",
        "coordinator.replan.expected.prompt_tokens": prompt_tokens,
        "coordinator.replan.expected.p95_prompt_tokens": p95_tokens,
        "coordinator.replan.expected.answer_tokens": answer_tokens,
    }
    config = load_config(None, {}, {}, overrides=list(overrides.items())).config

    async def main(program: Program) -> None:
        site = Site(fit)
        async with coordinator_service(config, site.network, VirtualClock(), "c:1", site.said.append):
            await site.register()
            await body(site)

    run(main, seed=1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SplitQuestion]:
    """The evaluator that is installed, asked at once and about fewer requests."""
    questions: list[SplitQuestion] = []

    class NearPlanner:
        async def __call__(self, question: SplitQuestion) -> SplitAnswer:
            questions.append(question)
            return better_split(question, min_requests=100, min_span_s=0.0)

    monkeypatch.setattr(replanning, "ChildPlanner", NearPlanner)
    return questions


def test_long_prompts_that_become_long_answers_are_one_proposal(asked: list[SplitQuestion]) -> None:
    async def body(site: Site) -> None:
        await site.serve(4 * WINDOW_S, prompt_tokens=2000, answer_tokens=4)
        assert site.about_plans() == []
        await site.serve(6 * WINDOW_S, prompt_tokens=600, answer_tokens=200)
        drift, proposal = site.about_plans()
        assert drift.startswith("the workload is not what was planned for: mean prompt 600 tokens instead of 2000")
        assert "mean answer 200 tokens instead of 4" in drift
        assert proposal.startswith("a better split: 1 prefill + 2 decode instead of 2 prefill + 1 decode would serve +")
        assert "mean answer 200 tokens instead of 4" in proposal
        figures = await site.figures()
        assert (figures.workload_shifts_total, figures.splits_proposed_total) == (1, 1)
        assert figures.proposed_split == "1 prefill + 2 decode"

    at_site(body)
    (question,) = asked
    assert [(pool.role, pool.num_workers) for pool in question.pools] == [("prefill", 2), ("decode", 1)]
    assert (question.max_sequences, question.num_blocks, question.mean_answer_tokens) == (16, 8000, 200)


def test_as_long_as_nobody_knows_what_steps_take_the_shift_is_told_alone(asked: list[SplitQuestion]) -> None:
    async def body(site: Site) -> None:
        await site.serve(4 * WINDOW_S, prompt_tokens=600, answer_tokens=200)
        drift, why = site.about_plans()
        assert "mean answer" in drift
        assert why.startswith("no better split of the workers was looked for: what steps that read prompts take is not")

    at_site(body, fit=NOTHING_KNOWN)
    assert asked == []


def test_a_planner_that_is_not_there_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody:
        async def __call__(self, question: SplitQuestion) -> SplitAnswer:
            raise NoSplit("no planner is installed")

    monkeypatch.setattr(replanning, "ChildPlanner", Nobody)

    async def body(site: Site) -> None:
        await site.serve(4 * WINDOW_S, prompt_tokens=600, answer_tokens=200)
        assert site.about_plans()[1:] == ["no better split of the workers was looked for: no planner is installed"]

    at_site(body)


def test_off_tells_nothing(asked: list[SplitQuestion]) -> None:
    async def body(site: Site) -> None:
        await site.serve(4 * WINDOW_S, prompt_tokens=600, answer_tokens=200)
        assert site.about_plans() == []

    at_site(body, mode="off")
    assert asked == []
