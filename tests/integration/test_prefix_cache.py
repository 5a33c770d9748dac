"""The prefix cache of real workers: what is reused is right, token by token, and is really not computed.

The prompts go straight to the workers, so that the test says which one reads them and where a prefix comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.messages import Peer, PrefixPlan
from rpc import GrpcNetwork
from tests.support.cluster import running_cluster
from tests.support.direct_client import DirectAnswer, DirectClient
from tests.support.oracle import NUM_NEW, Oracle, make_oracle, write_tokenizer
from tests.support.tiny_models import VOCAB_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.state_file import WorkerState

BLOCK_TOKENS = 16


def peer(worker: WorkerState) -> Peer:
    assert worker.address is not None
    return Peer(worker_id=worker.worker_id, incarnation=worker.incarnation, address=worker.address)


def right(oracle: Oracle, answer: DirectAnswer) -> None:
    """Each token is the reference's choice after our own ones, ties excepted."""
    assert answer.error is None, answer.error
    assert len(answer.token_ids) == NUM_NEW
    prompt = list(answer.request.token_ids)
    logits = oracle.logits(prompt + answer.token_ids)[len(prompt) - 1 : -1]
    best = [int(row.argmax()) for row in logits]
    alone = Oracle(oracle.model_dir, oracle.model, [prompt], [best], oracle.count)
    alone.check([answer.token_ids])


async def test_reused_and_fetched_prefixes_give_the_reference_tokens(tmp_path: Path) -> None:
    oracle = make_oracle("llama", tmp_path)
    write_tokenizer(oracle.model_dir)
    prompt = oracle.prompts[6]
    assert len(prompt) == 400
    overrides = {
        "dtype": "float32",
        "block_tokens": str(BLOCK_TOKENS),
        "engine.max_batch_tokens": "64",
        "pools.*.kv_memory": "64MiB",
        "pools.prefill.workers": "2",
        # Measuring takes blocks for a while.
        "transfer.probe": "false",
    }
    async with running_cluster(model=oracle.model_dir, config="configs/local.yaml", overrides=overrides) as cluster:
        workers = [peer(worker) for worker in cluster.state.workers]
        first, second, writer = sorted(workers, key=lambda worker: (worker.worker_id[0] != "p", worker.worker_id))
        network = GrpcNetwork(token=cluster.state.cluster_token)
        async with DirectClient(network) as client:
            await client.open(*workers)

            async def ask(
                tokens: list[int], reader: Peer, *, salt: str = "", prefix: PrefixPlan | None = None
            ) -> DirectAnswer:
                answer = await client.ask(
                    tokens, max_tokens=NUM_NEW, prefill=reader, decode=writer, prefix=prefix, cache_salt=salt
                )
                right(oracle, answer)
                return answer

            fresh = await ask(prompt, first)
            assert fresh.phases.cached_tokens == 0
            again = await ask(prompt, first)
            assert (again.phases.cached_tokens, again.token_ids) == (384, fresh.token_ids)

            # The next turn of that conversation, elsewhere: it computes what nobody has read yet.
            turn = [*prompt, *fresh.token_ids, *(token % VOCAB_SIZE for token in range(7, 107, 4))]
            plan = PrefixPlan(source=first, source_blocks=len(prompt) // BLOCK_TOKENS)
            moved = await ask(turn, second, prefix=plan)
            assert moved.phases.cached_tokens == 400
            assert moved.phases.fetch_s is not None
            back = await ask(turn, first)
            assert back.phases.cached_tokens == 400
            assert back.token_ids == moved.token_ids

            for reader in (first, second):
                other = await ask(prompt, reader, salt="another", prefix=None if reader is first else plan)
                assert other.phases.cached_tokens == (0 if reader is first else 384)
                assert other.token_ids == fresh.token_ids
        await network.close()
        for worker_id, audit in (await cluster.audit()).items():
            assert audit.problems == (), worker_id
            assert audit.load.available_blocks == audit.total_blocks, (worker_id, audit)
            if worker_id != writer.worker_id:
                # What was asked for twice is kept once.
                assert 25 < audit.load.cached_blocks < 80, (worker_id, audit)
    assert oracle.count.ties <= 1


async def test_switched_off_nothing_is_kept(tmp_path: Path) -> None:
    oracle = make_oracle("qwen2", tmp_path)
    write_tokenizer(oracle.model_dir)
    overrides = {"dtype": "float32", "pools.*.kv_memory": "64MiB", "engine.prefix_cache": "false"}

    async with running_cluster(model=oracle.model_dir, config="configs/colocated.yaml", overrides=overrides) as cluster:
        worker = peer(cluster.state.workers[0])
        network = GrpcNetwork(token=cluster.state.cluster_token)
        async with DirectClient(network) as client:
            await client.open(worker)
            for _ in range(2):
                answer = await client.ask(oracle.prompts[5], max_tokens=NUM_NEW, prefill=worker, decode=worker)
                right(oracle, answer)
                assert answer.phases.cached_tokens is None
        await network.close()
        audit = (await cluster.audit())[worker.worker_id]
        assert audit.load.free_blocks == audit.total_blocks
