"""The oracle over the whole path: HTTP, two processes and a handoff give the reference's greedy tokens.

Each case starts a real cluster with another family, block size and chunk size; eight prompts of 1 to 600 tokens
run at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx
import pytest

from tests.support.cluster import running_cluster
from tests.support.long_tests import LONG, only_long
from tests.support.oracle import NUM_NEW, Oracle, make_oracle, write_tokenizer


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    config: str
    block_tokens: int
    chunk_tokens: int

    def __str__(self) -> str:
        config = self.config.removesuffix(".yaml")
        return f"{self.model}-{config}-block{self.block_tokens}-chunk{self.chunk_tokens}"


CASES = [
    Case("llama", "local.yaml", 16, 64),
    Case("llama-llama3-rope", "2p2d.yaml", 8, 37),
    Case("qwen3", "local.yaml", 256, 37),
    Case("llama-tied", "colocated.yaml", 256, 64),
    Case("mistral-window", "colocated.yaml", 8, 37),
]
#: More families, sizes and pools.
MORE = [
    Case("qwen2", "local.yaml", 8, 100),
    Case("mistral-window", "local.yaml", 32, 512),
    Case("qwen2", "colocated.yaml", 32, 512),
    Case("qwen3", "colocated.yaml", 16, 100),
]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    folder = tmp_path_factory.mktemp("tiny")
    made = {name: make_oracle(name, folder) for name in {case.model for case in (*CASES, *(MORE if LONG else ()))}}
    for oracle in made.values():
        write_tokenizer(oracle.model_dir)
    return made


async def complete(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": NUM_NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=only_long) for case in MORE)], ids=str)
async def test_greedy_tokens_equal_the_reference(case: Case, oracles: dict[str, Oracle]) -> None:
    oracle = oracles[case.model]
    overrides = {
        "served_model_name": "tiny",
        "dtype": "float32",
        "block_tokens": str(case.block_tokens),
        "engine.max_batch_tokens": str(case.chunk_tokens),
        "pools.*.kv_memory": "64MiB",
    }
    async with running_cluster(model=oracle.model_dir, config=f"configs/{case.config}", overrides=overrides) as cluster:
        async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60) as client:
            outputs = await asyncio.gather(*(complete(client, prompt) for prompt in oracle.prompts))
        oracle.check(list(outputs))
        for worker_id, audit in (await cluster.audit()).items():
            assert audit.problems == (), worker_id
    assert oracle.count.ties <= max(1, oracle.count.tokens // 10_000)
