"""The front of a prompt is read while a fetch brings the rest: sooner than either alone where the link is slow, not
later where it is fast, and right whatever ends the fetch, the reading, or the prompt."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from contracts.errors import TandemError
from kvtransfer.memory import PullFate, PullInfo
from simulator import run
from simulator.engine import StepTiming, modelled_identity
from simulator.faults.rules import Between, Partition
from tests.simulation.test_prefix_fetch import Bench, check

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from simulator import Program
    from tests.support.direct_client import DirectAnswer

#: Of the modelled engine: 8 tokens of a block take 4 ms, so that a chunk of 64 tokens takes 32 ms.
TOKEN_S = 0.0005
#: 60 blocks and a tail: 0.24 s of reading.
LONG = tuple(range(1000, 1485))
#: As many of others, to learn from.
LESSONS = [tuple(range(base, base + size)) for base, size in ((11_000, 245), (12_000, 485), (13_000, 325))]


BLOCK_BYTES = modelled_identity(block_tokens=8).layout.block_bytes


class SlowLink(Bench):
    """Between the two workers that read each block takes `block_s`."""

    block_s = 0.0
    lesson_tokens = 0

    def _fate(self, info: PullInfo) -> PullFate:
        fate = super()._fate(info)
        if info.reader.startswith("d"):
            return fate
        num_blocks = max(1, info.num_bytes // BLOCK_BYTES)
        return PullFate(duration_s=0.001 + self.block_s * num_blocks, error=fate.error)

    async def learn(self) -> None:
        """p1 knows what its steps take, and what fetches from p0 do."""
        for number in range(24):
            await self.ask("p1", tuple(range(5000 + 100 * number, 5040 + 100 * number)))
        for lesson in LESSONS:
            await self.ask("p0", lesson)
            await self.ask("p1", lesson, prefix=self.plan(source_blocks=100))
        self.lesson_tokens = self.shell("p1").prefill.read_ahead_tokens_total

    @property
    def ahead_tokens(self) -> int:
        """Read ahead at p1 since the lessons."""
        return self.shell("p1").prefill.read_ahead_tokens_total - self.lesson_tokens

    async def ttft_s(self, prompt: tuple[int, ...], *, fetched: bool = True) -> tuple[float, DirectAnswer]:
        """At p1, from the worker's own times."""
        prefix = self.plan(source_blocks=100) if fetched else None
        answer = await self.ask("p1", prompt, prefix=prefix)
        assert answer.phases.queue_s is not None
        assert answer.phases.prefill_s is not None
        return answer.phases.queue_s + answer.phases.prefill_s, answer


def on_a_link(
    test: Callable[[SlowLink], Coroutine[Any, Any, None]], block_s: float, *, learn: bool = True, seed: int = 0
) -> None:
    async def main(program: Program) -> None:
        options: dict[str, Any] = {"num_blocks": 400, "timing": StepTiming(floor_s=0.002, per_new_token_s=TOKEN_S)}
        async with SlowLink(program, **options) as link, link.client:
            link.block_s = block_s
            await link.begin()
            if learn:
                await link.learn()
            await link.ask("p0", LONG)
            await test(link)

    run(main, seed=seed)


@pytest.mark.parametrize("block_s", [0.003, 0.006])
def test_on_a_slow_link_both_together_are_sooner_than_either_alone(block_s: float) -> None:
    """Reading the 60 blocks alone takes 0.24 s, fetching them alone 0.18 or 0.36 s."""

    async def test(link: SlowLink) -> None:
        other = tuple(range(7000, 7485))
        reading_s, _ = await link.ttft_s(other, fetched=False)
        both_s, answer = await link.ttft_s(LONG)
        fetching_s = 60 * block_s
        assert both_s < 0.8 * min(reading_s, fetching_s)
        tiers = answer.phases.cached_by_tier
        ahead = link.ahead_tokens
        assert ahead > 0
        assert tiers == {"peer": 480 - ahead}, "what was read ahead was computed, the rest came"
        assert answer.phases.cached_tokens == 480 - ahead
        await link.check_clean()

    on_a_link(test, block_s)


@pytest.mark.parametrize("learn", [True, False])
def test_on_a_fast_link_nothing_is_read_ahead(learn: bool) -> None:
    async def test(link: SlowLink) -> None:
        both_s, answer = await link.ttft_s(LONG)
        assert link.ahead_tokens == 0
        assert answer.phases.cached_by_tier == {"peer": 480}
        # The fetch's calls and pull, and one step for the rest.
        assert both_s < 0.05
        await link.check_clean()

    on_a_link(test, 0.00002, learn=learn)


def test_nothing_is_read_ahead_while_the_engine_reads_for_others() -> None:
    async def test(link: SlowLink) -> None:
        others = [await link.begin_at("p1", tuple(range(base, base + 485))) for base in (14_000, 15_000, 16_000)]
        _, answer = await link.ttft_s(LONG)
        assert answer.phases.cached_by_tier == {"peer": 480}
        assert link.ahead_tokens == 0
        await asyncio.gather(*(other.ended.wait() for other in others))
        await link.check_clean()

    on_a_link(test, 0.006)


def test_who_comes_while_a_prompt_is_read_ahead_goes_first() -> None:
    async def test(link: SlowLink) -> None:
        slow = await link.begin_at("p1", LONG, prefix=link.plan(source_blocks=100))
        await asyncio.sleep(0.05)
        assert 0 < link.ahead_tokens < 480
        other_s, _ = await link.ttft_s(tuple(range(14_000, 14_040)))
        # A chunk of the other, and its own: not the rest of what was being read ahead.
        assert other_s < 0.08
        await slow.ended.wait()
        check(slow)
        await link.check_clean()

    on_a_link(test, 0.006)


def test_a_fetch_that_fails_loses_nothing_that_was_read_meanwhile() -> None:
    async def test(link: SlowLink) -> None:
        link.pull_error = TandemError("the wire broke")
        _, answer = await link.ttft_s(LONG)
        assert link.ahead_tokens > 0
        assert answer.phases.cached_tokens == 0
        # Computed once: what was read ahead stood in the cache.
        assert answer.phases.prefill_s is not None
        assert answer.phases.prefill_s < 0.25 - 0.8 * TOKEN_S * link.ahead_tokens
        await link.check_clean()

    on_a_link(test, 0.006)


def test_a_fetch_that_ends_before_it_was_expected_leaves_a_gap_that_is_read() -> None:
    async def test(link: SlowLink) -> None:
        link.block_s = 0.0
        both_s, answer = await link.ttft_s(LONG)
        ahead = link.ahead_tokens
        fetched = answer.phases.cached_by_tier["peer"]
        assert ahead + fetched < 480
        assert answer.phases.cached_tokens == fetched
        # Nothing of what came is computed.
        assert both_s < TOKEN_S * (485 - fetched) + 0.05
        await link.check_clean()

    on_a_link(test, 0.006)


def test_a_fetch_that_hangs_is_overtaken() -> None:
    """Its holder is frozen: reading alone takes 0.24 s, the question would be given up after 1 s."""

    async def test(link: SlowLink) -> None:
        host = link.freeze("p0")
        took_s, answer = await link.ttft_s(LONG)
        assert answer.phases.cached_tokens == 0
        assert took_s < 0.75
        # It did not answer, and is not asked again so soon: nobody waits for it.
        again_s, _ = await link.ttft_s(tuple(range(7000, 7485)))
        assert again_s < 0.3
        link.thaw_host(host)
        await link.check_clean()

    on_a_link(test, 0.006)


@pytest.mark.parametrize("after_s", [0.002, 0.04, 0.1])
@pytest.mark.parametrize("what", ["cancel", "crash", "cut", "freeze", "reader crash"])
def test_whatever_happens_at_any_time_leaves_nothing_and_no_wrong_token(what: str, after_s: float) -> None:
    async def test(link: SlowLink) -> None:
        answer = await link.begin_at("p1", LONG, prefix=link.plan(source_blocks=100))
        await asyncio.sleep(after_s)
        if what == "cancel":
            await link.client.cancel(answer, link.peer("p1"))
            await link.check_clean()
            return
        if what == "reader crash":
            link.crash("p1")
            await link.start("p1")
            await link.check_clean()
            return
        host = ""
        if what == "crash":
            link.crash("p0")
        elif what == "cut":
            link.network.add(Partition(Between("p0", "p1")))
        else:
            host = link.freeze("p0")
        await asyncio.wait_for(answer.ended.wait(), 30.0)
        check(answer)
        link.network.heal()
        if what == "crash":
            await link.start("p0")
        elif host:
            link.thaw_host(host)
        await link.check_clean()

    on_a_link(test, 0.004)


@pytest.mark.parametrize("seed", range(4))
def test_chats_on_a_slow_link_are_right_whatever_is_read_ahead(seed: int) -> None:
    async def test(link: SlowLink) -> None:
        rng = random.Random(seed)

        async def chat(number: int) -> None:
            tokens = [9000 + number, *(rng.randrange(1000) for _ in range(rng.randint(100, 300)))]
            for _ in range(4):
                reader = rng.choice(["p0", "p1"])
                plan = link.plan(source_blocks=len(tokens) // 8, worker_id="p1" if reader == "p0" else "p0")
                link.block_s = rng.choice([0.0, 0.002, 0.01])
                answer = await link.ask(reader, tuple(tokens), prefix=plan)
                tokens += [*answer.token_ids, *(rng.randrange(1000) for _ in range(rng.randint(1, 60)))]
                await asyncio.sleep(rng.uniform(0.0, 1.0))

        await asyncio.gather(*(chat(number) for number in range(4)))
        await link.check_clean()
        assert link.ahead_tokens > 0

    on_a_link(test, 0.004, seed=seed)
