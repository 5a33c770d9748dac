"""Conversations of several turns: each computes, and moves, only what is new, and is answered as if all of it were.

The modelled engine's tokens depend on every slot of the KV they are sampled from.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from simulator import Program, run
from tests.support.prefix_bench import PrefixBench, on_bench

if TYPE_CHECKING:
    from contracts.messages import Role

BLOCK = 8
ROLES: dict[str, Role] = {"p0": "prefill", "d0": "decode"}


def full_blocks_written(tokens: tuple[int, ...]) -> int:
    """Of a conversation so far: the KV of the last token was not computed."""
    return (len(tokens) - 1) // BLOCK


@pytest.mark.parametrize("source", ["d0", "s0"])
def test_from_turn_two_on_only_new_tokens_are_computed_and_only_new_blocks_move(source: str) -> None:
    async def test(bench: PrefixBench) -> None:
        tokens = tuple(range(100, 145))
        held = num_read = 0
        for turn in range(5):
            moved = bench.shell("d0").reader.counters.pulled_bytes
            fetched = bench.shell("p0").fetches.fetched_blocks_total
            plan = bench.plan(held, source, bench.held("p0", tokens)) if held else None
            answer = await bench.ask("p0", "d0", tokens, max_tokens=20, prefix=plan)
            assert answer.phases.cached_tokens == held * BLOCK, f"turn {turn}"
            prompt_blocks = -(-len(tokens) // BLOCK)
            moved = bench.shell("d0").reader.counters.pulled_bytes - moved
            assert moved == (prompt_blocks - held) * bench.block_bytes, f"turn {turn}"
            fetched = bench.shell("p0").fetches.fetched_blocks_total - fetched
            assert fetched == max(0, held - num_read), f"turn {turn}: what p0 read itself stands there"
            num_read = len(tokens) // BLOCK
            tokens = (*tokens, *answer.token_ids)
            held = full_blocks_written(tokens)
            assert bench.held("d0", tokens) == held
            await asyncio.sleep(1.0)
            if source == "s0":
                assert bench.held("s0", tokens) == held, "written back"
            tokens = (*tokens, *range(1000 * turn, 1000 * turn + 13))
        assert bench.shell("d0").decode.skipped_blocks_total > 0
        await bench.check_clean()

    on_bench(test, ROLES, stores=("s0",) if source == "s0" else ())


def test_what_workers_computed_outlasts_them_in_the_store() -> None:
    async def test(bench: PrefixBench) -> None:
        tokens = tuple(range(100, 145))
        answer = await bench.ask("p0", "d0", tokens, max_tokens=20)
        tokens = (*tokens, *answer.token_ids)
        await asyncio.sleep(1.0)
        for worker_id in ROLES:
            bench.crash(worker_id)
            await bench.start(worker_id)
        await bench.begin()
        held = full_blocks_written(tokens)
        answer = await bench.ask("p0", "d0", (*tokens, 1, 2, 3), prefix=bench.plan(held, "s0"))
        assert answer.phases.cached_tokens == held * BLOCK
        await bench.check_clean()

    on_bench(test, ROLES, stores=("s0",))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_store", [False, True])
def test_chats_over_small_pools_are_right_whoever_reads_and_writes_them(seed: int, with_store: bool) -> None:
    """Pools that hold a few of the chats: blocks are shared, evicted, preempted, found again, fetched from whoever may
    have them and kept, while others come and go. Every answer is right, and nothing is left behind."""
    roles: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "m0": "mixed"}

    async def main(program: Program) -> None:
        rng = program.rng("chats")
        stores = ("s0",) if with_store else ()
        async with PrefixBench(program, roles, num_blocks=40, stores=stores, store_blocks=40) as bench, bench.client:
            await bench.begin()
            sources = [*roles, *stores]

            async def chat(number: int) -> None:
                # Two chats each begin alike.
                tokens = [2000 + number // 2] * 17 + [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
                for _ in range(5):
                    reads, writes = rng.choice(["p0", "p1", "m0"]), rng.choice(["d0", "m0"])
                    source = rng.choice([each for each in sources if each != reads])
                    plan = bench.plan(full_blocks_written(tuple(tokens)), source)
                    answer = await bench.ask(reads, writes, tuple(tokens), max_tokens=rng.randint(2, 24), prefix=plan)
                    tokens += [*answer.token_ids, *(rng.randrange(1000) for _ in range(rng.randint(1, 20)))]
                    await asyncio.sleep(rng.uniform(0.0, 0.3))

            await asyncio.gather(*(chat(number) for number in range(8)))
            await bench.check_clean()
            assert sum(bench.shell(each).decode.skipped_blocks_total for each in ("d0", "m0")) > 0
            if with_store:
                assert sum(bench.shell(each).store_offers.counters.blocks_taken for each in roles) > 0

    run(main, seed=seed)
