"""A prefix comes from another worker, or does not: the answer is right, and nothing is left on either side.

The holder, the reader, or the link between them is lost at every step of a fetch; the steps are told by the messages
and pulls that set out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from contracts.errors import TandemError
from contracts.ids import WorkerId
from contracts.messages import FETCH, FetchRequest, Peer, PrefixPlan
from contracts.requests import SamplingParams
from engine.room import Demand
from kvtransfer.memory import PullFate, PullInfo
from rpc.memory import loopback_latency
from simulator import Program, expected_tokens, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.engine import modelled_identity
from simulator.faults.rules import Between, Partition
from tests.support.direct_client import DirectAnswer, DirectClient

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine

    from contracts.messages import Role
    from rpc import Network
    from rpc.memory import Message
    from worker import WorkerShell

ROLES: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
#: Ten full blocks of 8 and a tail.
PROMPT = tuple(range(100, 185))
#: A term of a lease, and slack: everything is given back within this much virtual time after the last answer.
SETTLE_S = 30.0
MAX_TOKENS = 6
#: All ways are measured within this much virtual time.
PROBED_S = 5.0

#: What sets out during a fetch, in order.
STEPS = ["Fetch call", "Fetch reply", "pull", "Confirm call", "Confirm reply", "Ack call"]


class Bench(SimulatedCluster):
    """Two workers that read and one that writes; the test says who does what, and hears of every step."""

    def __init__(self, program: Program, **options: Any) -> None:
        super().__init__(program, ClusterSpec(roles=ROLES, latency_s=self._latency, fate=self._fate, **options))
        #: Told before the step's message or pull sets out.
        self.on_step: Callable[[str], None] = lambda step: None
        self.steps: list[str] = []
        self.pull_s = 0.01
        self.pull_error: TandemError | None = None
        self.outside: Network = self._network
        self.client = DirectClient(self.outside)

    async def begin(self) -> None:
        await self.client.open(*(self.peer(worker_id) for worker_id in self.up()))
        # The ways between the workers are measured by pulls, too.
        await asyncio.sleep(PROBED_S)
        self.steps.clear()

    def _latency(self, message: Message, rng: random.Random) -> float:
        method, kind = message.method.rpartition("/")[2], str(message.kind)
        if {message.source, message.target} == {"p0", "p1"} and kind in ("request", "reply"):
            self._step(f"{method} {'call' if kind == 'request' else 'reply'}")
        return loopback_latency(message, rng)

    def _fate(self, info: PullInfo) -> PullFate:
        if info.reader.startswith("d"):
            return PullFate(duration_s=0.002)
        self._step("pull")
        return PullFate(duration_s=self.pull_s, error=self.pull_error)

    def _step(self, step: str) -> None:
        if step in STEPS:
            self.steps.append(step)
            self.on_step(step)

    def shell(self, worker_id: str) -> WorkerShell:
        return self.worker(worker_id)

    def peer(self, worker_id: str) -> Peer:
        _, _, incarnation = self._lives[worker_id].host.partition("@")
        return Peer(worker_id=WorkerId(worker_id), incarnation=int(incarnation), address=f"{worker_id}:1")  # type: ignore[arg-type]

    def plan(self, source_blocks: int = 10, worker_id: str = "p0") -> PrefixPlan:
        return PrefixPlan(source=self.peer(worker_id), source_blocks=source_blocks)

    async def ask(self, worker_id: str, tokens: tuple[int, ...], **options: Any) -> DirectAnswer:
        answer = await self.client.ask(
            tokens, max_tokens=MAX_TOKENS, prefill=self.peer(worker_id), decode=self.peer("d0"), **options
        )
        check(answer)
        return answer

    async def begin_at(self, worker_id: str, tokens: tuple[int, ...], **options: Any) -> DirectAnswer:
        return await self.client.begin(
            tokens, max_tokens=MAX_TOKENS, prefill=self.peer(worker_id), decode=self.peer("d0"), **options
        )

    async def check_clean(self) -> None:
        await asyncio.sleep(SETTLE_S)
        for worker_id, audit in (await self.audits()).items():
            assert audit.problems == (), worker_id
            assert audit.load.available_blocks == audit.total_blocks, (worker_id, audit)
            assert (audit.open_requests, audit.holder_leases, audit.reader_leases) == (0, 0, 0), (worker_id, audit)
            shell = self.shell(worker_id)
            assert (shell.fetches.num_open, shell.fetch_answers.num_open) == (0, 0), worker_id


def check(answer: DirectAnswer) -> None:
    assert answer.error is None, answer.error
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    assert answer.token_ids == expected_tokens(answer.request.token_ids, sampling, MAX_TOKENS)


def on_a_bench(test: Callable[[Bench], Coroutine[Any, Any, None]], *, seed: int = 0, **options: Any) -> None:
    async def main(program: Program) -> None:
        async with Bench(program, **options) as bench, bench.client:
            await bench.begin()
            await test(bench)

    run(main, seed=seed)


def test_only_what_is_new_is_computed_where_the_prefix_comes_from_another_worker() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        answer = await bench.ask("p1", (*PROMPT, *range(700, 720)), prefix=bench.plan())
        assert answer.phases.cached_tokens == 80
        assert answer.phases.fetch_s is not None
        assert 0.01 < answer.phases.fetch_s < 0.05
        assert bench.steps[: len(STEPS) - 1] == STEPS[:-1]
        again = await bench.ask("p1", PROMPT, prefix=bench.plan())
        assert (again.phases.cached_tokens, again.phases.fetch_s) == (80, None), "it is here now"
        await bench.check_clean()
        assert bench.shell("p1").fetches.fetched_blocks_total == 10
        assert bench.shell("p0").ledger.load()["cached_blocks"] == 10
        assert bench.shell("p1").ledger.load()["cached_blocks"] == 13

    on_a_bench(test)


def test_what_stands_here_already_is_not_fetched() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        await bench.ask("p1", PROMPT[:30])
        answer = await bench.ask("p1", PROMPT, prefix=bench.plan())
        assert answer.phases.cached_tokens == 80
        assert bench.shell("p1").fetches.fetched_blocks_total == 7
        await bench.check_clean()

    on_a_bench(test)


def test_another_salt_gets_nothing() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT, cache_salt="a")
        answer = await bench.ask("p1", PROMPT, cache_salt="b", prefix=bench.plan())
        assert answer.phases.cached_tokens == 0
        assert bench.shell("p0").fetch_answers.granted_blocks_total == 0
        answer = await bench.ask("p1", PROMPT, cache_salt="a", prefix=bench.plan())
        assert answer.phases.cached_tokens == 80
        await bench.check_clean()

    on_a_bench(test)


def test_a_holder_that_has_part_of_it_gives_that() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT[:45])
        answer = await bench.ask("p1", PROMPT, prefix=bench.plan())
        assert answer.phases.cached_tokens == 40
        await bench.check_clean()

    on_a_bench(test)


def test_prompts_with_one_beginning_share_one_fetch() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        prompts = [(*PROMPT, 700 + number) for number in range(5)]
        answers = await asyncio.gather(*(bench.ask("p1", prompt, prefix=bench.plan()) for prompt in prompts))
        assert [answer.phases.cached_tokens for answer in answers] == [80] * 5
        assert bench.steps.count("Fetch call") == 1
        await bench.check_clean()

    on_a_bench(test)


def test_others_are_read_while_a_slow_fetch_goes_on_and_it_ends_in_time() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        bench.pull_s = 60.0
        slow = await bench.begin_at("p1", PROMPT, prefix=bench.plan())
        other = await bench.ask("p1", tuple(range(500, 540)))
        assert other.phases.queue_s is not None
        assert other.phases.queue_s < 0.1
        assert not slow.ended.is_set()
        await asyncio.wait_for(slow.ended.wait(), 60.0)
        check(slow)
        assert slow.phases.cached_tokens == 0
        assert slow.phases.fetch_s == pytest.approx(3.0, abs=0.2)
        await bench.check_clean()

    on_a_bench(test)


def test_a_failed_pull_costs_only_the_computing() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        bench.pull_error = TandemError("the wire broke")
        answer = await bench.ask("p1", PROMPT, prefix=bench.plan())
        assert answer.phases.cached_tokens == 0
        await bench.check_clean()

    on_a_bench(test)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["crash", "freeze", "cut"])
def test_a_holder_lost_at_any_step_costs_only_the_computing(step: str, how: str) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        loop = asyncio.get_running_loop()
        hosts: list[str] = []

        def strike() -> None:
            if how == "crash":
                bench.crash("p0")
            elif how == "freeze":
                hosts.append(bench.freeze("p0"))
            else:
                bench.network.add(Partition(Between("p0", "p1")))

        def on_step(seen: str) -> None:
            if seen == step:
                bench.on_step = lambda _: None
                # In the middle of a pull, before a message arrives.
                loop.call_later(bench.pull_s / 2 if step == "pull" else 0.0, strike)

        bench.on_step = on_step
        plan = bench.plan()
        prompts = [(*PROMPT, 700), tuple(range(500, 560))]
        answers = await asyncio.gather(*(bench.ask("p1", prompt, prefix=plan) for prompt in prompts))
        assert bench.on_step is not on_step, f"{step} never came"
        assert answers[0].phases.cached_tokens in (0, 80)
        assert answers[0].phases.queue_s is not None
        assert answers[0].phases.queue_s < 4.0
        bench.network.heal()
        for host in hosts:
            bench.thaw_host(host)
        if how == "crash":
            await bench.start("p0")
        await bench.check_clean()

    on_a_bench(test)


@pytest.mark.parametrize("step", STEPS)
def test_a_reader_lost_at_any_step_leaves_nothing_at_the_holder(step: str) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        loop = asyncio.get_running_loop()

        def on_step(seen: str) -> None:
            if seen == step:
                bench.on_step = lambda _: None
                loop.call_later(bench.pull_s / 2 if step == "pull" else 0.0, bench.crash, "p1")

        bench.on_step = on_step
        await bench.begin_at("p1", PROMPT, prefix=bench.plan())
        await asyncio.sleep(5.0)
        assert "p1" not in bench.up(), f"{step} never came"
        await bench.start("p1")
        await bench.check_clean()
        answer = await bench.ask("p0", PROMPT)
        assert answer.phases.cached_tokens == 80, "what was lent is still there"

    on_a_bench(test)


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_prompt_cancelled_at_any_step_gives_its_fetch_up(step: str) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        struck = asyncio.Event()

        def on_step(seen: str) -> None:
            if seen == step:
                struck.set()

        bench.on_step = on_step
        answer = await bench.begin_at("p1", PROMPT, prefix=bench.plan())
        await struck.wait()
        await bench.client.cancel(answer, bench.peer("p1"))
        await bench.check_clean()
        assert answer.token_ids == []

    on_a_bench(test)


def test_two_full_workers_that_want_each_others_prefixes_do_not_wait_for_each_other() -> None:
    """Each pool holds its own prefix, in use, and has no room for the other's: both compute at once what they can."""

    async def test(bench: Bench) -> None:
        other = tuple(range(300, 385))
        await bench.ask("p0", PROMPT)
        await bench.ask("p1", other)
        answers = await asyncio.gather(
            bench.ask("p0", (*other, 1), prefix=bench.plan(worker_id="p1")),
            bench.ask("p1", (*PROMPT, 1), prefix=bench.plan(worker_id="p0")),
        )
        assert all(answer.phases.queue_s is not None and answer.phases.queue_s < 4.0 for answer in answers)
        await bench.check_clean()

    on_a_bench(test, num_blocks=14)


def test_what_came_to_wait_for_blocks_meanwhile_goes_before_a_fetch() -> None:
    """Between the question and the answer a prompt came that needs whatever is available."""

    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        room = bench.shell("p1").room

        def on_step(seen: str) -> None:
            if seen == "Fetch reply":
                room.prompt = Demand(arrival_s=0.0, num_blocks=room.view().num_blocks)

        bench.on_step = on_step
        answer = await bench.ask("p1", PROMPT, prefix=bench.plan())
        assert "Fetch reply" in bench.steps
        assert "pull" not in bench.steps
        assert answer.phases.cached_tokens == 0
        await bench.check_clean()

    on_a_bench(test)


def test_a_repeated_question_gets_the_same_lease_while_it_stands() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("p0", PROMPT)
        shell = bench.shell("p0")
        chain = shell.prefixes.chain(PROMPT, "")
        ask = FetchRequest(
            target=bench.peer("p0").incarnation,
            fetch_id="q",
            reader=bench.peer("p1"),
            identity=modelled_identity(block_tokens=8),
            keys=chain.part(0, 10),
        )
        channel = bench.outside.channel("p0:1")
        first, second = [await channel.call(FETCH, ask, timeout_s=1.0) for _ in range(2)]
        assert first.terms is not None
        assert second.terms is not None
        assert first.terms.lease_id == second.terms.lease_id
        assert (shell.holder.num_leases, shell.ledger.load()["offered_blocks"]) == (1, 10)
        await bench.check_clean()
        third = await channel.call(FETCH, ask, timeout_s=1.0)
        assert third.terms is not None
        assert third.terms.lease_id != first.terms.lease_id
        await bench.check_clean()

    on_a_bench(test)


@pytest.mark.parametrize("seed", range(4))
def test_chats_over_two_workers_are_right_whatever_is_fetched(seed: int) -> None:
    """Growing conversations whose turns are read by either worker, in pools that hold a few of them."""

    async def main(program: Program) -> None:
        rng = program.rng("chats")
        async with Bench(program, num_blocks=48) as bench, bench.client:
            await bench.begin()

            async def chat(number: int) -> None:
                tokens = [1000 + number, *(rng.randrange(1000) for _ in range(rng.randint(1, 40)))]
                for _ in range(6):
                    reader = rng.choice(["p0", "p1"])
                    source = "p1" if reader == "p0" else "p0"
                    plan = bench.plan(source_blocks=len(tokens) // 8, worker_id=source)
                    answer = await bench.ask(reader, tuple(tokens), prefix=plan)
                    tokens += [*answer.token_ids, *(rng.randrange(1000) for _ in range(rng.randint(1, 20)))]
                    await asyncio.sleep(rng.uniform(0.0, 0.5))

            await asyncio.gather(*(chat(number) for number in range(6)))
            await bench.check_clean()
            fetched = [bench.shell(worker_id).fetches.fetched_blocks_total for worker_id in ("p0", "p1")]
            assert min(fetched) > 0

    run(main, seed=seed)
