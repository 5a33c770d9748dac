"""What a worker warmed up, across its lives: in the first answer of the next one, and never wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from coldstart.snapshot.codecs import CodecRegistry
from coldstart.snapshot.format import MAGIC
from coldstart.snapshot.reading import SnapshotFile
from tests.support.chaos_asking import until
from tests.support.cluster import running_cluster
from tests.support.oracle import Oracle, make_oracle, write_tokenizer
from tests.support.tiny_models import VOCAB_SIZE

if TYPE_CHECKING:
    from tests.support.cluster import ClusterProcess

NUM_ANSWER_TOKENS = 8
#: What all prompts begin with: 12 blocks and a bit.
SYSTEM = [(7 * number + 3) % VOCAB_SIZE for number in range(200)]
SHARED_TOKENS = 192
PATIENCE_S = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    found = make_oracle("llama", tmp_path_factory.mktemp("model"))
    write_tokenizer(found.model_dir)
    return found


def overrides(tier: Path, **more: str) -> dict[str, str]:
    return {
        "dtype": "float32",
        "served_model_name": "tiny",
        "weights.dram": "null",
        "weights.ssd.path": str(tier),
        "weights.snapshot": "64MiB",
        **more,
    }


async def ask(cluster: ClusterProcess, oracle: Oracle, number: int) -> int:
    """How many tokens of the prompt were not computed; its answer is the reference's."""
    prompt = [*SYSTEM, *((13 * number + index) % VOCAB_SIZE for index in range(20 + number))]
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": NUM_ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=PATIENCE_S) as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    answer: list[int] = document["choices"][0]["token_ids"]
    assert len(answer) == NUM_ANSWER_TOKENS
    logits = oracle.logits(prompt + answer)[len(prompt) - 1 : -1]
    best = [int(row.argmax()) for row in logits]
    Oracle(oracle.model_dir, oracle.model, [prompt], [best], oracle.count).check([answer])
    cached: int = document["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def log_of(cluster: ClusterProcess, worker_id: str) -> str:
    return (Path(cluster.state.log_dir) / f"{worker_id}.log").read_text()


def snapshots(tier: Path) -> list[Path]:
    return sorted((tier / "snapshots").glob("*.snapshot"))


async def end(cluster: ClusterProcess, worker_id: str, number: signal.Signals) -> None:
    """Returns when its next life is ready."""
    before = cluster.worker(worker_id)
    assert before.pid is not None
    os.kill(before.pid, number)
    await until(lambda: cluster.worker(worker_id).incarnation > before.incarnation, "it lives again", PATIENCE_S)
    await until(lambda: cluster.state.ready, "it is ready again", PATIENCE_S)


async def test_a_model_that_slept_finds_the_beginning_of_its_prompts(tmp_path: Path, oracle: Oracle) -> None:
    pool = {
        "name": "all",
        "role": "mixed",
        "kv_blocks": 512,
        "workers": {"min": 0, "max": 1},
        "scale": {"to_zero_after_s": 2, "cooldown_s": 2, "window_s": 2},
    }
    settings = overrides(tmp_path, pools=json.dumps([pool]), **{"coordinator.autoscale.interval_s": "0.5"})
    async with running_cluster(model=oracle.model_dir, overrides=settings) as cluster:
        assert await ask(cluster, oracle, 1) == 0
        assert await ask(cluster, oracle, 2) == SHARED_TOKENS
        written = "a snapshot of 12 blocks is written"
        await until(lambda: written in log_of(cluster, "all-0"), "its snapshot is written", PATIENCE_S)
        await until(lambda: not cluster.worker_pids(), "it sleeps", PATIENCE_S)
        assert await ask(cluster, oracle, 3) == SHARED_TOKENS
        assert "12 of 12 blocks (192 tokens) restored" in log_of(cluster, "all-0")
        audits = await cluster.audit()
        assert all(not audit.problems for audit in audits.values())


async def test_snapshots_outlast_the_cluster_and_a_kill_and_are_refused_where_they_are_of_another_kind(
    tmp_path: Path, oracle: Oracle
) -> None:
    async with running_cluster(model=oracle.model_dir, overrides=overrides(tmp_path)) as cluster:
        for number in range(3):
            await ask(cluster, oracle, number)
        assert await asyncio.to_thread(cluster.stop) == 0
    # One of the worker that reads, one of that which writes.
    written = {path: path.read_bytes() for path in snapshots(tmp_path)}
    assert len(written) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in (*written, tmp_path / "snapshots"))

    async with running_cluster(model=oracle.model_dir, overrides=overrides(tmp_path)) as cluster:
        assert await ask(cluster, oracle, 4) == SHARED_TOKENS
        await end(cluster, "prefill-0", signal.SIGKILL)
        assert {path: path.read_bytes() for path in snapshots(tmp_path)} == written
        assert await ask(cluster, oracle, 5) == SHARED_TOKENS
        await end(cluster, "prefill-0", signal.SIGTERM)
        assert log_of(cluster, "prefill-0").count("a snapshot of 12 blocks is written") == 1
        assert await ask(cluster, oracle, 6) == SHARED_TOKENS
        for process in cluster.tree():
            process.kill()

    for path, data in written.items():
        path.write_bytes(data[: len(MAGIC)] + (2).to_bytes(4, "little") + data[len(MAGIC) + 4 :])
    async with running_cluster(model=oracle.model_dir, overrides=overrides(tmp_path)) as cluster:
        assert await ask(cluster, oracle, 7) == 0
        refused = "written in version 2 of the format, read here is version 1"
        assert refused in log_of(cluster, "prefill-0")
        assert refused in log_of(cluster, "decode-0")
        assert await ask(cluster, oracle, 8) == SHARED_TOKENS
        assert await asyncio.to_thread(cluster.stop) == 0
    # What could not be read is written anew.
    for path in snapshots(tmp_path):
        assert SnapshotFile(path, CodecRegistry()).sections


async def test_a_damaged_block_is_computed(tmp_path: Path, oracle: Oracle) -> None:
    async with running_cluster(model=oracle.model_dir, overrides=overrides(tmp_path)) as cluster:
        for number in range(2):
            await ask(cluster, oracle, number)
        assert await asyncio.to_thread(cluster.stop) == 0
    for path in snapshots(tmp_path):
        section = next(each for each in SnapshotFile(path, CodecRegistry()).sections if each.kind == "kv")
        data = bytearray(path.read_bytes())
        data[section.offset + section.stored_bytes // 2] ^= 1
        path.write_bytes(data)
    async with running_cluster(model=oracle.model_dir, overrides=overrides(tmp_path)) as cluster:
        assert await ask(cluster, oracle, 2) == 0
        assert "damaged: its checksum is wrong" in log_of(cluster, "prefill-0")
