"""Greedy tokens and logits equal the reference implementation's, whatever the batching does.

Ties: where tokens differ, the reference's logits of the two, on our own tokens, lie within 1e-4; at most one
token in 10,000 (checked over the whole session).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.ids import BlockId
from engine.compose import StepBudget
from engine.ops import TorchOps
from engine.plan import SequenceStep, StepPlan
from engine.runner import EngineOptions, Runner, load_runner
from tests.support.oracle import NUM_NEW
from tests.support.tiny_models import TINY_MODELS
from tests.unit.engine.driver import Driver, greedy_sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.ops.api import Ops
    from tests.support.oracle import Oracle

#: Tokens of all prompts and outputs of an oracle, with room for partly filled blocks.
_POOL_TOKENS = 2600


def _runner(oracle: Oracle, ops: Ops, *, block_tokens: int = 16) -> Runner:
    num_blocks = 16 + _POOL_TOKENS // block_tokens
    return load_runner(oracle.model_dir, EngineOptions(num_blocks=num_blocks, block_tokens=block_tokens), ops)


def _driver(runner: Runner, *, max_tokens: int, max_sequences: int = 64, preempt_share: float = 0.0) -> Driver:
    return Driver(
        runner=runner,
        budget=StepBudget(max_tokens=max_tokens, max_sequences=max_sequences),
        num_new=NUM_NEW,
        rng=random.Random(5),
        preempt_share=preempt_share,
    )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tokens_equal_generate(name: str, oracles: Callable[[str], Oracle], any_ops: Ops) -> None:
    """Eight prompts of 1 to 600 tokens at once, in chunks that mix with decodes."""
    oracle = oracles(name)
    oracle.check(_driver(_runner(oracle, any_ops), max_tokens=160).run(oracle.prompts))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_equal_the_reference(name: str, oracles: Callable[[str], Oracle], any_ops: Ops) -> None:
    """At chunk ends within one prompt, over random blocks: within 1e-4."""
    oracle = oracles(name)
    prompt = oracle.prompts[-1]
    expected = oracle.logits(prompt)
    runner = _runner(oracle, any_ops)
    block_ids = [BlockId(block) for block in range(runner.pool.num_blocks)]
    random.Random(3).shuffle(block_ids)
    start = 0
    for length in (1, 1, 15, 111, 1, 200, 271):
        stop = start + length
        step = SequenceStep(
            sequence_id=4,
            token_ids=prompt[start:stop],
            start=start,
            block_ids=block_ids,
            sample=greedy_sample(prompt[:stop], stop),
        )
        ours = runner.logits(StepPlan((step,)))[4]
        assert (ours - expected[stop - 1]).abs().max() < 1e-4
        start = stop


@pytest.mark.parametrize("block_tokens", [8, 16, 32, 256])
@pytest.mark.parametrize("max_tokens", [13, 64, 2048])
def test_any_block_size_and_budget(
    block_tokens: int, max_tokens: int, oracles: Callable[[str], Oracle], cpu_ops: Ops
) -> None:
    oracle = oracles("llama")
    runner = _runner(oracle, cpu_ops, block_tokens=block_tokens)
    oracle.check(_driver(runner, max_tokens=max_tokens).run(oracle.prompts))


def test_a_chunk_of_one_token(oracles: Callable[[str], Oracle], cpu_ops: Ops) -> None:
    oracle = oracles("qwen3")
    short = Driver(
        runner=_runner(oracle, cpu_ops),
        budget=StepBudget(max_tokens=1, max_sequences=1),
        num_new=NUM_NEW,
        rng=random.Random(1),
    )
    assert short.run(oracle.prompts[:4]) == oracle.outputs[:4]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window"])
def test_preempted_sequences_are_recomputed_exactly(name: str, oracles: Callable[[str], Oracle], cpu_ops: Ops) -> None:
    """Prompt and output so far are computed again, in other blocks that hold other sequences' old KV."""
    oracle = oracles(name)
    driver = _driver(_runner(oracle, cpu_ops), max_tokens=256, preempt_share=0.3)
    oracle.check(driver.run(oracle.prompts))
    assert driver.num_preemptions > 0


@given(
    max_tokens=st.integers(9, 700),
    max_sequences=st.integers(1, 9),
    preempt_share=st.sampled_from([0.0, 0.1]),
    arrivals=st.lists(st.integers(0, 12), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interleaving_changes_nothing(
    max_tokens: int,
    max_sequences: int,
    preempt_share: float,
    arrivals: list[int],
    seed: int,
    oracles: Callable[[str], Oracle],
    cpu_ops: Ops,
) -> None:
    oracle = oracles("llama-yarn-rope")
    driver = _driver(
        _runner(oracle, cpu_ops),
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        preempt_share=preempt_share,
    )
    driver.rng.seed(seed)
    oracle.check(driver.run(oracle.prompts, lambda index: arrivals[index]))


def test_the_pool_may_lie_in_a_given_buffer(oracles: Callable[[str], Oracle]) -> None:
    """KV lands in the buffer, block by block, where a transport reads it."""
    oracle = oracles("llama")
    memory = bytearray()

    def buffer(num_blocks: int, block_bytes: int) -> bytearray:
        memory.extend(bytes(num_blocks * block_bytes))
        return memory

    options = EngineOptions(num_blocks=80, block_tokens=16)
    runner = load_runner(oracle.model_dir, options, TorchOps(), pool_buffer_factory=buffer)
    driver = _driver(runner, max_tokens=64)
    assert driver.run(oracle.prompts[:5]) == oracle.outputs[:5]
    block_bytes = runner.pool.layout.block_bytes
    for block in (0, 17, 79):
        raw = memory[block * block_bytes : (block + 1) * block_bytes]
        assert raw == runner.pool.tensor_NKL2BE[block].numpy().tobytes()
    assert any(memory)
