"""What has ended at a worker comes to its store, or does not: no request notices, and nothing is left on either side.

The store, the worker, or the link between them is lost at every step of an offer; the steps are told by the messages
and pulls that set out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.store_messages import CACHE_CLEAR, CACHE_STAT, CacheClearRequest, CacheStatRequest
from simulator.faults.rules import Between, Partition
from tests.support.prefix_bench import PrefixBench, check_answer, on_bench

if TYPE_CHECKING:
    from contracts.messages import Role

BLOCK = 8
ROLES: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
STORES = ("s0",)
#: Five full blocks and a tail.
PROMPT = tuple(range(100, 145))
#: With a prompt of 45: 64 tokens are computed, eight blocks.
MAX_TOKENS = 20
#: Nothing that can be kept takes longer.
KEPT_S = 3.0
STEPS = ["Keep call", "Keep reply", "pull", "Confirm call", "Confirm reply", "Ack call"]


def no_more(step: str, source: str, target: str) -> None:
    """It has struck."""


def test_a_long_prompt_is_kept_while_its_answer_is_still_written_and_only_the_rest_follows() -> None:
    async def test(bench: PrefixBench) -> None:
        slow = await bench.client.begin(PROMPT, max_tokens=400, prefill=bench.peer("p0"), decode=bench.peer("d0"))
        await asyncio.sleep(0.5)
        assert not slow.ended.is_set()
        assert bench.held("s0", PROMPT) == 5
        assert bench.count["pull", "s0", "p0"] == 1
        await asyncio.wait_for(slow.ended.wait(), 60.0)
        check_answer(slow, 400)
        await asyncio.sleep(KEPT_S)
        tokens = (*PROMPT, *slow.token_ids)
        assert bench.held("s0", tokens) == (len(tokens) - 1) // BLOCK
        assert bench.store("s0").reader.counters.pulled_bytes == (len(tokens) - 1) // BLOCK * bench.block_bytes
        await bench.check_clean()

    on_bench(test, ROLES, stores=STORES, num_blocks=80)


def test_nothing_is_offered_twice() -> None:
    async def test(bench: PrefixBench) -> None:
        for _ in range(4):
            await bench.ask("p0", "d0", PROMPT, max_tokens=MAX_TOKENS)
            await asyncio.sleep(1.0)
        assert (bench.count["Keep call", "p0", "s0"], bench.count["Keep call", "d0", "s0"]) == (1, 1)
        assert bench.store("s0").reader.counters.pulled_bytes == 8 * bench.block_bytes
        await bench.check_clean()

    on_bench(test, ROLES, stores=STORES)


def test_what_came_from_the_store_is_not_offered_to_it() -> None:
    async def test(bench: PrefixBench) -> None:
        await bench.ask("p0", "d0", PROMPT, max_tokens=MAX_TOKENS)
        await asyncio.sleep(KEPT_S)
        bench.crash("p0")
        await bench.start("p0")
        await bench.begin()
        answer = await bench.ask("p0", "d0", PROMPT, max_tokens=MAX_TOKENS, prefix=bench.plan(5, "s0"))
        assert answer.phases.cached_tokens == 40
        await asyncio.sleep(KEPT_S)
        assert bench.count["Keep call", "p0", "s0"] == 0
        await bench.check_clean()

    on_bench(test, ROLES, stores=STORES)


def test_a_prompt_that_ended_with_its_first_token_and_one_whose_handoff_failed_are_kept() -> None:
    async def test(bench: PrefixBench) -> None:
        await bench.ask("p0", "d0", PROMPT, max_tokens=1)
        await asyncio.sleep(KEPT_S)
        assert bench.held("s0", PROMPT) == 5
        other = tuple(range(300, 345))
        bench.pull_s["d0", "p0"] = 100.0
        answer = await bench.client.begin(other, max_tokens=5, prefill=bench.peer("p0"), decode=bench.peer("d0"))
        await asyncio.sleep(0.2)
        bench.crash("d0")
        await asyncio.wait_for(answer.ended.wait(), 60.0)
        assert answer.error is not None
        await asyncio.sleep(KEPT_S)
        assert bench.held("s0", other) == 5

    on_bench(test, ROLES, stores=STORES)


def test_offers_are_taken_back_as_soon_as_something_waits_for_blocks() -> None:
    """The store pulls so slowly that two offers pin most of the pool, which the next prompt needs."""

    async def test(bench: PrefixBench) -> None:
        bench.pull_s["s0", "p0"] = 100.0
        for number in range(2):
            await bench.ask("p0", "d0", tuple(range(500 * number, 500 * number + 61)))
        shell = bench.shell("p0")
        await asyncio.sleep(0.05)
        assert (shell.store_offers.num_open, shell.ledger.load()["offered_blocks"]) == (2, 14)
        answer = await bench.ask("p0", "d0", tuple(range(2000, 2100)))
        assert answer.phases.queue_s is not None
        assert answer.phases.queue_s < 0.2
        assert shell.store_offers.counters.dropped["its blocks may be needed"] == 2
        await asyncio.sleep(120.0)
        await bench.check_clean()

    on_bench(test, ROLES, stores=STORES, num_blocks=20)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["crash", "freeze", "cut"])
def test_a_store_lost_at_any_step_costs_no_request_anything(step: str, how: str) -> None:
    async def test(bench: PrefixBench) -> None:
        struck: list[str] = []

        def strike() -> None:
            if how == "crash":
                bench.crash("s0")
            elif how == "freeze":
                struck.append(bench.freeze("s0"))
            else:
                bench.network.add(Partition(Between("s0", "d0")))

        def on_step(seen: str, source: str, target: str) -> None:
            if seen == step and {source, target} == {"s0", "d0"}:
                bench.on_step = no_more
                asyncio.get_running_loop().call_later(0.001 if step == "pull" else 0.0, strike)

        bench.on_step = on_step
        answer = await bench.ask("p0", "d0", PROMPT, max_tokens=MAX_TOKENS)
        await asyncio.sleep(1.0)
        assert bench.on_step is not on_step, f"{step} never came"
        tokens = (*PROMPT, *answer.token_ids, *range(900, 920))
        another = await bench.ask("p0", "d0", tokens, max_tokens=MAX_TOKENS)
        assert another.phases.queue_s is not None
        assert another.phases.queue_s < 0.5
        bench.network.heal()
        for host in struck:
            bench.thaw_host(host)
        if how == "crash":
            await bench.start("s0")
        # Its own waiting times are over, and the members have been asked for.
        await asyncio.sleep(40.0)
        tokens = (*tokens, *another.token_ids)
        again = await bench.ask("p0", "d0", (*tokens, 1), max_tokens=MAX_TOKENS)
        await asyncio.sleep(KEPT_S)
        tokens = (*tokens, 1, *again.token_ids)
        assert bench.held("s0", tokens) == (len(tokens) - 1) // BLOCK, "a store that is back gets all of it"
        await bench.check_clean()

    on_bench(test, ROLES, stores=STORES)


@pytest.mark.parametrize("step", STEPS)
def test_a_worker_lost_at_any_step_leaves_nothing_at_the_store(step: str) -> None:
    async def test(bench: PrefixBench) -> None:
        def on_step(seen: str, source: str, target: str) -> None:
            if seen == step and {source, target} == {"s0", "d0"}:
                bench.on_step = no_more
                asyncio.get_running_loop().call_later(0.001 if step == "pull" else 0.0, bench.crash, "d0")

        bench.on_step = on_step
        await bench.client.begin(PROMPT, max_tokens=MAX_TOKENS, prefill=bench.peer("p0"), decode=bench.peer("d0"))
        await asyncio.sleep(5.0)
        assert "d0" not in bench.up(), f"{step} never came"
        await bench.start("d0")
        await bench.check_clean()

    on_bench(test, ROLES, stores=STORES)


def test_a_worker_without_a_store_offers_nothing_and_begins_when_there_is_one() -> None:
    async def test(bench: PrefixBench) -> None:
        bench.crash("s0")
        # The coordinator has given it up, and the workers have heard.
        await asyncio.sleep(20.0)
        bench.count.clear()
        await bench.ask("p0", "d0", PROMPT, max_tokens=MAX_TOKENS)
        await asyncio.sleep(1.0)
        assert bench.count["Keep call", "d0", "s0"] == bench.count["Keep call", "p0", "s0"] == 0
        assert not bench.shell("d0").store_offers.counters.dropped
        await bench.start("s0")
        await asyncio.sleep(10.0)
        answer = await bench.ask("p0", "d0", PROMPT, max_tokens=MAX_TOKENS)
        await asyncio.sleep(1.0)
        assert bench.held("s0", (*PROMPT, *answer.token_ids)) == 8
        await bench.check_clean()

    on_bench(test, ROLES, stores=STORES)


def test_the_device_tier_tells_its_figures_and_is_cleared() -> None:
    async def test(bench: PrefixBench) -> None:
        answer = await bench.ask("p0", "d0", PROMPT, max_tokens=MAX_TOKENS)
        tokens = (*PROMPT, *answer.token_ids, 1, 2)
        await bench.ask("p0", "d0", tokens, prefix=bench.plan(8, "d0", 5))
        target = bench.peer("d0")
        channel = bench.outside.channel(target.address)
        stat = await channel.call(CACHE_STAT, CacheStatRequest(target=target.incarnation), timeout_s=1.0)
        (figures,) = stat.tiers
        assert (figures.tier, figures.capacity_bytes) == ("device", 64 * bench.block_bytes)
        assert (figures.num_blocks, figures.used_bytes) == (9, 9 * bench.block_bytes)
        # Each handoff asks for the full blocks of its prompt, and the fetch for the three that the reader lacks.
        assert (figures.hit_blocks, figures.missed_blocks) == (8 + 3, 5)
        assert bench.shell("d0").reader.counters.pulled_bytes == figures.bytes_in["worker"]
        reply = await channel.call(CACHE_CLEAR, CacheClearRequest(target=target.incarnation), timeout_s=1.0)
        assert reply.dropped == {"device": 9}
        (figures,) = bench.shell("d0").device_tier.stat().tiers
        assert (figures.num_blocks, figures.evicted) == (0, {"cleared": 9})
        none = CacheClearRequest(target=target.incarnation, tiers=("dram", "ssd"))
        assert (await channel.call(CACHE_CLEAR, none, timeout_s=1.0)).dropped == {}
        await bench.check_clean()

    on_bench(test, ROLES)
