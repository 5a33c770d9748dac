"""Far more load than fits: nothing is lost, nobody waits for ever, and hardly anything is computed twice.

Pools of a few hundred tokens, prompts of up to half of one, and everything asked at once. Whatever the seed,
each request ends with the right tokens, or with 429 before its first one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contracts.errors import DeadlineExceeded, NoCapacity, TandemError
from contracts.ids import GatewayId
from contracts.messages import DISPATCH, DispatchReply, Peer, Placement
from contracts.requests import SamplingParams
from gateway.core import GatewayCore, Submission
from gateway.limits import GatewayLimits
from simulator import Program, StepTiming, VirtualClock, expected_tokens, run
from simulator.cluster import ClusterSpec, SimulatedCluster

if TYPE_CHECKING:
    import random
    from types import TracebackType

    from contracts.messages import DispatchItem, DispatchRequest, Role
    from rpc import CallContext
    from worker import WorkerShell

ONE_OF_EACH: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
TWO_OF_EACH: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
TWO_MIXED: dict[str, Role] = {"m0": "mixed", "m1": "mixed"}
ROUTER = "router:1"

#: No request of these tests may need longer.
DEADLINE_S = 600.0
#: Everything is given back within this much virtual time after the last answer.
SETTLE_S = 30.0
#: While anything is open, some client gets a token within this time.
LONGEST_SILENCE_S = 2.0
#: Tokens computed again after a preemption, per token that had to be computed, in pools that hold two answers.
MOST_RECOMPUTED = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    at_s: float
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float = DEADLINE_S


@dataclass(slots=True, kw_only=True)
class Answer:
    ask: Ask
    token_ids: list[int] = field(default_factory=list[int])
    finish: str | None = None
    error: TandemError | None = None
    asked_s: float
    ended_s: float = 0.0

    def check(self) -> None:
        """The whole answer and the right one, or a refusal before the first token."""
        if self.error is not None:
            assert isinstance(self.error, NoCapacity), self.error
            assert self.error.retry_after_s is not None, self.error
            assert self.token_ids == [], self.error
        else:
            most = self.ask.sampling.max_tokens
            assert (self.finish, len(self.token_ids)) == ("length", most)
            assert self.token_ids == expected_tokens(self.ask.token_ids, self.ask.sampling, most)


#: From the prompt's length to (index of the reading worker, index of the writing one), in the order of their ids.
Route = Callable[[int], tuple[int, int]]


class PressedCluster(SimulatedCluster):
    """A cluster whose requests go where a test says, and whose workers are looked into."""

    def __init__(self, program: Program, spec: ClusterSpec, route: Route | None = None) -> None:
        """`route`: None leaves it to the coordinator."""
        super().__init__(program, spec)
        self._route = route
        self._peers: list[Peer] = []
        #: When a client last got a token, and the longest time without.
        self.last_token_s = 0.0
        self.longest_silence_s = 0.0

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.gateway = self.core
        if self._route is not None:
            infos = sorted((member.info for member in await self.core.members()), key=lambda info: info.worker_id)
            self._peers = [
                Peer(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address) for info in infos
            ]
            server = self._network.process("router").server(ROUTER)
            server.register(DISPATCH, self._on_dispatch)
            await server.start()
            self.gateway = GatewayCore(
                self._network, VirtualClock(), GatewayId("routed"), ROUTER, GatewayLimits(), structlog.get_logger()
            )
            await self.gateway.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._route is not None:
            await self.gateway.__aexit__(None, None, None)
        await super().__aexit__(kind, error, trace)

    async def _on_dispatch(self, ask: DispatchRequest, context: CallContext) -> DispatchReply:
        return DispatchReply(verdicts=tuple(self._place(item) for item in ask.items))

    def _place(self, item: DispatchItem) -> Placement:
        assert self._route is not None
        reader, writer = (self._peers[index] for index in self._route(item.prompt_tokens))
        return Placement(request_id=item.request_id, prefill=reader, decode=writer, reason="routed")

    @property
    def shells(self) -> list[WorkerShell]:
        return [self.worker(worker_id) for worker_id in self.up()]

    async def ask(self, ask: Ask) -> Answer:
        await asyncio.sleep(ask.at_s)
        loop = asyncio.get_running_loop()
        answer = Answer(ask=ask, asked_s=loop.time())
        try:
            submission = Submission(token_ids=ask.token_ids, sampling=ask.sampling, deadline_s=ask.deadline_s)
            async with self.gateway.submit(submission) as stream:
                async for delta in stream:
                    answer.token_ids.extend(delta.token_ids)
                    answer.finish = delta.finish
                    self.longest_silence_s = max(self.longest_silence_s, loop.time() - self.last_token_s)
                    self.last_token_s = loop.time()
        except TandemError as error:
            answer.error = error
        answer.ended_s = loop.time()
        return answer

    async def serve(self, asks: list[Ask]) -> list[Answer]:
        """Runs a workload to its end."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self.ask(ask)) for ask in asks]
        return [task.result() for task in running]

    async def check_clean(self) -> None:
        """Nothing is left of anything, on any worker."""
        await asyncio.sleep(SETTLE_S)
        assert self.gateway.num_open == 0
        for worker_id, audit in (await self.audits()).items():
            assert audit.problems == (), worker_id
            assert audit.load.available_blocks == audit.total_blocks, (worker_id, audit)
            assert (audit.open_requests, audit.holder_leases, audit.reader_leases) == (0, 0, 0), (worker_id, audit)

    @property
    def recomputed_tokens(self) -> int:
        return sum(shell.decode.recomputed_tokens_total for shell in self.shells)


def alternately() -> Route:
    """Each of two workers reads for the other."""
    turns = itertools.cycle([(0, 1), (1, 0)])
    return lambda prompt_tokens: next(turns)


def prompt_of(rng: random.Random, num_tokens: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1000) for _ in range(num_tokens))


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


def flood(rng: random.Random, *, count: int, over_s: float, prompt: int, output: int) -> list[Ask]:
    """Sizes from one token to the largest, with both ends frequent."""

    def size(most: int) -> int:
        return rng.choice([1, most, rng.randint(1, most), rng.randint(1, max(1, most // 4))])

    asks: list[Ask] = []
    for _ in range(count):
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(2**32), max_tokens=size(output)
        )
        asks.append(Ask(at_s=rng.uniform(0, over_s), token_ids=prompt_of(rng, size(prompt)), sampling=sampling))
    return sorted(asks, key=lambda ask: ask.at_s)


def one_by_one_s(asks: list[Ask], spec: ClusterSpec) -> float:
    """About what the workload takes when every request waits for the one before it: steps at their shortest,
    and a tenth of a second for each to be sent, handed over and answered."""
    steps = sum(len(ask.token_ids) / spec.max_batch_tokens + 1 + ask.sampling.max_tokens for ask in asks)
    timing = spec.timing
    assert isinstance(timing, StepTiming)
    longest_step_s = 2 * max(timing.floor_s, timing.per_new_token_s * spec.max_batch_tokens)
    return steps * longest_step_s + 0.1 * len(asks)


async def check_flood(program: Program, spec: ClusterSpec, route: Route | None, asks: list[Ask]) -> None:
    """Serves a flood and checks all that backpressure promises."""
    async with PressedCluster(program, spec, route) as cluster:
        answers = await cluster.serve(asks)
        for answer in answers:
            answer.check()
        served = [answer for answer in answers if answer.error is None]
        assert served
        assert cluster.longest_silence_s < LONGEST_SILENCE_S
        assert max(answer.ended_s for answer in answers) < one_by_one_s(asks, spec) + 1.0
        needed = sum(len(answer.ask.token_ids) + len(answer.token_ids) for answer in served)
        program.trace.add(f"{len(served)} of {len(asks)} served, {cluster.recomputed_tokens} of {needed} tokens again")
        assert cluster.recomputed_tokens <= MOST_RECOMPUTED * needed
        await cluster.check_clean()


@pytest.mark.parametrize("roles", [ONE_OF_EACH, TWO_OF_EACH, TWO_MIXED], ids=["1P1D", "2P2D", "mixed"])
@pytest.mark.parametrize("seed", range(3))
def test_a_flood_is_served_or_refused_and_nothing_waits_for_ever(roles: dict[str, Role], seed: int) -> None:
    async def main(program: Program) -> None:
        asks = flood(program.rng("flood"), count=90, over_s=1.0, prompt=150, output=100)
        await check_flood(program, ClusterSpec(roles=roles, num_blocks=32), None, asks)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(6))
def test_two_full_workers_that_read_for_each_other_never_wait_for_each_other(seed: int) -> None:
    async def main(program: Program) -> None:
        asks = flood(program.rng("flood"), count=90, over_s=1.0, prompt=150, output=100)
        await check_flood(program, ClusterSpec(roles=TWO_MIXED, num_blocks=32), alternately(), asks)

    run(main, seed=seed)


@settings(max_examples=15)
@given(
    sizes=st.lists(
        st.tuples(
            st.floats(0, 0.5), st.integers(1, 100), st.integers(1, 28), st.sampled_from([(0, 1), (1, 0), (0, 0)])
        ),
        min_size=2,
        max_size=24,
    ),
    seed=st.integers(0, 2**32),
)
@example(
    # While each computes something small, two prompts come to it that together nearly fill it.
    sizes=[
        *[(0.0, 1, 2, (worker, worker)) for worker in (0, 1)],
        *[(0.004, 52, 20, way) for way in [(0, 1), (0, 1), (1, 0), (1, 0)]],
    ],
    seed=0,
)
def test_whatever_two_workers_read_for_each_other_all_of_it_is_served(
    sizes: list[tuple[float, int, int, tuple[int, int]]], seed: int
) -> None:
    """Any two of these prompts fill a pool, none outgrows it."""

    async def main(program: Program) -> None:
        rng = program.rng("prompts")
        asks = [
            Ask(at_s=at_s, token_ids=prompt_of(rng, prompt), sampling=greedy(output))
            for at_s, prompt, output, _ in sizes
        ]
        ways = itertools.cycle(way for _, _, _, way in sizes)
        await check_flood(program, ClusterSpec(roles=TWO_MIXED, num_blocks=16), lambda _: next(ways), asks)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_what_the_reader_refuses_waits_at_prefill_past_many_terms_and_is_read_once(seed: int) -> None:
    """A decode worker that lets one offer wait, and answers that fill it for far longer than a lease's term."""

    async def main(program: Program) -> None:
        rng = program.rng("prompts")
        spec = ClusterSpec(
            roles=ONE_OF_EACH, num_blocks=32, max_waiting_offers=1, lease_ttl_s=3.0, timing=StepTiming(floor_s=0.25)
        )
        async with PressedCluster(program, spec) as cluster:
            asks = [Ask(at_s=0.0, token_ids=prompt_of(rng, 40), sampling=greedy(100)) for _ in range(8)]
            answers = await cluster.serve(asks)
            for answer in answers:
                answer.check()
                assert answer.error is None
            prefill = cluster.shells[0]
            assert prefill.holder.counters.failed_calls["offer: no_capacity"] > 5
            assert prefill.holder.counters.opened == len(asks), "no prompt was read twice"
            assert max(answer.ended_s for answer in answers) > 10 * spec.lease_ttl_s
            await cluster.check_clean()

    run(main, seed=seed)


def test_a_prompt_that_its_reader_never_takes_ends_at_its_deadline() -> None:

    async def main(program: Program) -> None:
        rng = program.rng("prompts")
        spec = ClusterSpec(
            roles=ONE_OF_EACH, num_blocks=32, max_waiting_offers=1, lease_ttl_s=2.0, timing=StepTiming(floor_s=0.2)
        )
        async with PressedCluster(program, spec) as cluster:
            hog = Ask(at_s=0.0, token_ids=prompt_of(rng, 140), sampling=greedy(100))
            late = [Ask(at_s=0.5, token_ids=prompt_of(rng, 140), sampling=greedy(10), deadline_s=9.0) for _ in range(3)]
            answers = await cluster.serve([hog, *late])
            answers[0].check()
            assert answers[0].error is None
            for answer in answers[1:]:
                assert isinstance(answer.error, DeadlineExceeded), answer.error
                assert answer.ended_s - answer.asked_s < 10.0
            await cluster.check_clean()

    run(main, seed=1)


@pytest.mark.parametrize(
    ("large_way", "small_ways"),
    [
        ((0, 2), [(0, 2), (1, 2)]),
        ((0, 2), [(2, 2)]),
        ((2, 2), [(0, 2), (1, 2)]),
        ((2, 1), [(0, 2), (1, 2)]),
    ],
    ids=["offer by offers", "offer by prompts", "prompt by offers", "prompt to hand over by offers"],
)
def test_what_is_large_is_not_starved_by_a_stream_of_small(
    large_way: tuple[int, int], small_ways: list[tuple[int, int]]
) -> None:
    """Small requests come to the third worker without end; beside them something large does."""
    roles: dict[str, Role] = {"p0": "prefill", "w1": "mixed", "w2": "mixed"}

    async def main(program: Program) -> None:
        rng = program.rng("clients")
        turns = itertools.cycle(small_ways)

        def route(prompt_tokens: int) -> tuple[int, int]:
            return large_way if prompt_tokens >= 100 else next(turns)

        async with PressedCluster(program, ClusterSpec(roles=roles, num_blocks=32), route) as cluster:
            over = asyncio.Event()

            async def keep_asking() -> None:
                while not over.is_set():
                    small = Ask(at_s=0.0, token_ids=prompt_of(rng, 30), sampling=greedy(rng.randint(10, 40)))
                    (await cluster.ask(small)).check()

            async with asyncio.TaskGroup() as tasks:
                for _ in range(12):
                    tasks.create_task(keep_asking())
                await asyncio.sleep(1.0)
                for _ in range(3):
                    num_tokens = 120 if large_way != (0, 2) else 200
                    large = await cluster.ask(Ask(at_s=0.0, token_ids=prompt_of(rng, num_tokens), sampling=greedy(20)))
                    large.check()
                    assert large.finish == "length"
                    assert large.ended_s - large.asked_s < 8.0
                over.set()
            await cluster.check_clean()

    run(main, seed=1)
