"""Real processes: streams whose requests move between workers all the time are the reference's, token by token, and so
they are when a worker is killed in the middle of a move."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.cluster import running_cluster
from tests.support.dying_worker import DYING_FILE, PROGRAM, Fate
from tests.support.long_tests import only_long
from tests.support.moving import Mover, Streamed, mover_of, stream
from tests.support.oracle import Oracle, make_oracle, write_tokenizer
from tests.support.tiny_models import VOCAB_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from contracts.messages import MoveMode
    from tests.support.cluster import ClusterProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_STREAMS = 8
NUM_MOVES = 300
#: Whatever happens, on a machine under load.
LIMIT_S = 240.0
OVERRIDES = {"dtype": "float32", "served_model_name": "tiny", "block_tokens": "16", "pools.*.kv_blocks": "512"}
TWO_WRITERS = {**OVERRIDES, "pools.decode.workers": "2"}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    made = make_oracle("llama", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(made.model_dir)
    return made


def prompt_of(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([3, 40, 100, 250]))]


def body_of(prompt: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


def right(oracle: Oracle, prompt: list[int], answer: Streamed, max_tokens: int) -> None:
    """Whole, without gap or repeat, and each token the reference's choice after our own ones, ties excepted."""
    assert answer.error is None, answer.error
    assert len(answer.token_ids) == max_tokens, (len(answer.token_ids), max_tokens)
    logits = oracle.logits(prompt + answer.token_ids)[len(prompt) - 1 : -1]
    best = [int(row.argmax()) for row in logits]
    Oracle(oracle.model_dir, oracle.model, [prompt], [best], oracle.count).check([answer.token_ids])


async def writing(client: httpx.AsyncClient, oracle: Oracle, seed: int, stop: asyncio.Event) -> int:
    """One stream after the other, until told; how many."""
    rng = random.Random(seed)
    num_done = 0
    while not stop.is_set():
        prompt, max_tokens = prompt_of(rng), rng.choice([100, 200, 400])
        answer = await stream(client, body_of(prompt, max_tokens))
        await asyncio.to_thread(right, oracle, prompt, answer, max_tokens)
        num_done += 1
    return num_done


async def outcomes(cluster: ClusterProcess) -> dict[str, float]:
    """How many moves the gateway granted, refused, and how often it took a request up again."""
    async with httpx.AsyncClient(base_url=cluster.base_url) as client:
        text = (await client.get("/metrics")).text
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(("tandem_requests_moved_total", "tandem_replays_total")):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


async def books_are_clean(mover: Mover, names: tuple[str, ...]) -> None:
    async with asyncio.timeout(30.0):
        while True:
            audits = [await mover.audit(name) for name in names]
            if all(
                audit is not None and not (audit.open_requests or audit.holder_leases or audit.reader_leases)
                for audit in audits
            ):
                assert all(audit.problems == () for audit in audits if audit is not None)
                return
            await asyncio.sleep(0.1)


async def test_hundreds_of_moves_at_any_moment_change_no_token(oracle: Oracle) -> None:
    async with (
        running_cluster(model=oracle.model_dir, config="configs/local.yaml", overrides=TWO_WRITERS) as cluster,
        asyncio.timeout(LIMIT_S),
        mover_of(cluster) as mover,
        httpx.AsyncClient(base_url=cluster.base_url, timeout=LIMIT_S) as client,
    ):
        stop = asyncio.Event()
        readers = [asyncio.create_task(writing(client, oracle, seed, stop)) for seed in range(NUM_STREAMS)]
        moves = asyncio.create_task(
            mover.move_at_random(random.Random(1), ("decode-0", "decode-1"), ("kv", "kv", "tokens", "auto"), 0.03)
        )
        while mover.num_begun < NUM_MOVES:
            raise_of(readers)
            await asyncio.sleep(0.1)
        moves.cancel()
        stop.set()
        assert sum(await asyncio.gather(*readers)) >= NUM_STREAMS
        seen = await outcomes(cluster)
        granted = sum(value for name, value in seen.items() if 'result="granted"' in name)
        assert granted >= NUM_MOVES / 2, seen
        assert not any(value for name, value in seen.items() if name.startswith("tandem_replays")), seen
        await books_are_clean(mover, ("prefill-0", "decode-0", "decode-1"))


STATES = [
    ("source", "offered"),
    ("source", "copying"),
    ("source", "stopping"),
    ("source", "paused"),
    ("source", "ended"),
    ("destination", "coming"),
    ("destination", "asking"),
    ("destination", "rest"),
    ("destination", "claiming"),
    ("destination", "owner"),
]


@pytest.mark.parametrize("mode", ["kv", pytest.param("tokens", marks=only_long)])
async def test_a_worker_killed_in_any_state_of_a_move_leaves_one_owner(
    oracle: Oracle, tmp_path: Path, mode: MoveMode
) -> None:
    fate = Fate(tmp_path / "fate")
    async with (
        running_cluster(
            model=oracle.model_dir,
            config="configs/local.yaml",
            overrides={**TWO_WRITERS, "supervisor.restart_delay_max_s": "0.25"},
            environ={DYING_FILE: str(tmp_path / "fate")},
            program=PROGRAM,
        ) as cluster,
        asyncio.timeout(LIMIT_S),
        mover_of(cluster) as mover,
        httpx.AsyncClient(base_url=cluster.base_url, timeout=LIMIT_S) as client,
    ):
        stop = asyncio.Event()
        readers = [asyncio.create_task(writing(client, oracle, seed, stop)) for seed in range(4)]
        moves = asyncio.create_task(mover.move_at_random(random.Random(2), ("decode-0", "decode-1"), (mode,), 0.02))
        for number, (side, state) in enumerate(STATES):
            await both_are_up(mover)
            fate.wish(side, state, after_ms=(0.0, 2.0)[number % 2])
            await fulfilled(fate, readers, f"{side} {state}")
        await both_are_up(mover)
        moves.cancel()
        stop.set()
        assert sum(await asyncio.gather(*readers)) >= 4
        await books_are_clean(mover, ("prefill-0", "decode-0", "decode-1"))


def raise_of(readers: list[asyncio.Task[int]]) -> None:
    """What went wrong with one that has ended."""
    for reader in readers:
        if reader.done():
            reader.result()


async def fulfilled(fate: Fate, readers: list[asyncio.Task[int]], what: str) -> None:
    for _ in range(1500):
        if fate.is_fulfilled:
            return
        raise_of(readers)
        await asyncio.sleep(0.02)
    raise AssertionError(f"nobody came into the state {what}")


async def both_are_up(mover: Mover) -> None:
    for _ in range(1200):
        if all([await mover.audit(name) is not None for name in ("decode-0", "decode-1")]):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("a worker that died did not come back")
