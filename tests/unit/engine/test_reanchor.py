"""Turned keys are those that would have been computed at the new positions."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine
from contracts.errors import BadRequest
from contracts.ids import BlockId
from contracts.layout import BlockLayout
from contracts.requests import SamplingParams
from engine.checkpoint import Checkpoint
from engine.demo import corpus
from engine.demo.evaluate import Demo
from engine.fused import expected_tensors, optional_tensors
from engine.kv_pool import block_layout, make_pool
from engine.model_config import RopeConfig, load_model_config
from engine.ops.torch_ops import TorchOps
from engine.plan import SampleSpec, SequenceStep, StepPlan
from engine.reanchor import reanchor_blocks, reanchor_bytes, reanchor_keys
from engine.rope import cos_sin_table, inverse_frequencies
from engine.runner import EngineOptions, Runner, load_runner
from engine.weights import load_weights
from tests.support.tiny_models import TINY_MODELS, VOCAB_SIZE, make_tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from engine.ops.api import Ops

HEAD_DIM = 32
ROPES = {
    "default": RopeConfig(kind="default", theta=10000.0),
    "linear": RopeConfig(kind="linear", theta=10000.0, factor=4.0),
    "llama3": RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_positions=256),
    "yarn": RopeConfig(kind="yarn", theta=10000.0, factor=8.0, original_max_positions=256),
}
POSITIONS = st.integers(0, 4000)
DELTAS = st.integers(-4000, 4000)


def computed_at(rope: RopeConfig, keys_TE: Tensor, start: int) -> Tensor:
    """Keys as the engine caches them at positions `start` on: by its table, a head's first half with its second."""
    num_tokens = keys_TE.shape[0]
    table_PE = cos_sin_table(rope, HEAD_DIM, start + num_tokens)[start:]
    cos, sin = table_PE.chunk(2, dim=-1)
    a, b = keys_TE.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def keys_of(seed: int, num_tokens: int = 5) -> Tensor:
    return torch.randn(num_tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ROPES)
@given(POSITIONS, POSITIONS, st.integers(0, 1000))
def test_they_equal_keys_computed_at_the_other_position(name: str, start: int, end: int, seed: int) -> None:
    rope = ROPES[name]
    frequencies, factor = inverse_frequencies(rope, HEAD_DIM)
    assert (factor != 1.0) == (name == "yarn")
    keys = computed_at(rope, keys_of(seed), start)
    reanchor_keys(keys, end - start, frequencies)
    # What a table of fp32 angles errs by at position 4,000.
    torch.testing.assert_close(keys, computed_at(rope, keys_of(seed), end), atol=3e-3, rtol=0)


@given(DELTAS, DELTAS, st.sampled_from(list(ROPES)))
def test_two_turns_are_one_and_a_turn_can_be_undone(one: int, other: int, name: str) -> None:
    frequencies, _ = inverse_frequencies(ROPES[name], HEAD_DIM)
    twice, once, back = keys_of(1), keys_of(1), keys_of(1)
    reanchor_keys(twice, one, frequencies)
    reanchor_keys(twice, other, frequencies)
    reanchor_keys(once, one + other, frequencies)
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=0)
    reanchor_keys(back, one, frequencies)
    assert one == 0 or not torch.allclose(back, keys_of(1), atol=1e-3)
    reanchor_keys(back, -one, frequencies)
    torch.testing.assert_close(back, keys_of(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_are_rounded_once(dtype: torch.dtype) -> None:
    frequencies, _ = inverse_frequencies(ROPES["default"], HEAD_DIM)
    keys = keys_of(2).to(dtype)
    wide = keys.float()
    reanchor_keys(keys, 1234, frequencies)
    reanchor_keys(wide, 1234, frequencies)
    assert torch.equal(keys, wide.to(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_block_only_the_keys_are_turned(dtype: str) -> None:
    layout = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=HEAD_DIM, block_tokens=4, dtype=dtype)  # type: ignore[arg-type]
    pool = make_pool(layout, 3, device=torch.device("cpu"))
    pool.tensor_NKL2BE.normal_(generator=torch.Generator().manual_seed(3))
    before = pool.tensor_NKL2BE.clone()
    frequencies, _ = inverse_frequencies(ROPES["default"], HEAD_DIM)
    reanchor_blocks(pool.tensor_NKL2BE, [BlockId(2)], -7, frequencies)
    assert torch.equal(pool.tensor_NKL2BE[:2], before[:2])
    assert torch.equal(pool.tensor_NKL2BE[2, :, :, 1], before[2, :, :, 1])
    wanted = before[2, :, :, 0].clone()
    reanchor_keys(wanted, -7, frequencies)
    assert torch.equal(pool.tensor_NKL2BE[2, :, :, 0], wanted)
    block = memoryview(bytearray(before[2].contiguous().view(torch.uint8).numpy().tobytes()))
    reanchor_bytes(block, layout, -7, frequencies)
    assert block == pool.tensor_NKL2BE[2].contiguous().view(torch.uint8).numpy().tobytes()


def test_what_does_not_fit_is_refused() -> None:
    frequencies, _ = inverse_frequencies(ROPES["default"], HEAD_DIM)
    with pytest.raises(BadRequest, match="two channels for each frequency"):
        reanchor_keys(torch.zeros(4, HEAD_DIM + 2), 1, frequencies)
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=HEAD_DIM, block_tokens=4, dtype="float32")
    with pytest.raises(BadRequest, match=f"{layout.block_bytes} writable bytes, not 3 writable"):
        reanchor_bytes(memoryview(bytearray(3)), layout, 1, frequencies)
    with pytest.raises(BadRequest, match="read-only"):
        reanchor_bytes(memoryview(bytes(layout.block_bytes)), layout, 1, frequencies)


# --- with the engine ----------------------------------------------------------------------------------

BLOCK_TOKENS = 8
SPEC = SampleSpec(params=SamplingParams(max_tokens=1), output_index=0, history=(), num_prompt_tokens=0)


def runner_from(model_dir: Path, offset: int, num_tokens: int) -> Runner:
    """An engine whose first position is `offset`: its table begins there."""
    config = load_model_config(model_dir)
    layout = block_layout(config, block_tokens=BLOCK_TOKENS, dtype="float32")
    plain = load_runner(model_dir, EngineOptions(block_tokens=BLOCK_TOKENS, num_blocks=1), TorchOps())
    ops = TorchOps()
    with (
        torch.inference_mode(),
        Checkpoint(model_dir, expected_tensors(config), optional=optional_tensors(config)) as c,
    ):
        weights = load_weights(config, c, ops, dtype=torch.float32, device=torch.device("cpu"))
    return Runner(
        config=config,
        weights=weights,
        ops=ops,
        pool=make_pool(layout, layout.blocks_for(num_tokens), device=torch.device("cpu")),
        cos_sin_PE=cos_sin_table(config.rope, config.head_dim, offset + num_tokens)[offset:],
        identity=plain.identity,
    )


def step(token_ids: Sequence[int], start: int, block_ids: Sequence[int]) -> StepPlan:
    blocks = [BlockId(block) for block in block_ids]
    return StepPlan((SequenceStep(sequence_id=0, token_ids=token_ids, start=start, block_ids=blocks, sample=SPEC),))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_model_goes_on_from_turned_keys_as_from_its_own(name: str, tmp_path: Path) -> None:
    """KV of a prompt computed from position 0, and from 300: one becomes the other, and the next tokens' logits too."""
    offset, num_prompt = 300, 5 * BLOCK_TOKENS
    model_dir = make_tiny_model(name, tmp_path)
    rng = random.Random(5)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(num_prompt)]
    at_zero = runner_from(model_dir, 0, num_prompt + BLOCK_TOKENS)
    shifted = runner_from(model_dir, offset, num_prompt + BLOCK_TOKENS)
    blocks = range(6)
    for runner in (at_zero, shifted):
        runner.run(step(prompt, 0, blocks))
    wanted_kv = shifted.pool.tensor_NKL2BE[:5].clone()
    frequencies, _ = inverse_frequencies(at_zero.config.rope, at_zero.config.head_dim)
    after = [3, 1, 4, 1, 5]
    wanted = shifted.logits(step(after, num_prompt, blocks))[0]
    shifted.pool.tensor_NKL2BE[:5] = at_zero.pool.tensor_NKL2BE[:5]
    naive = shifted.logits(step(after, num_prompt, blocks))[0]
    reanchor_blocks(shifted.pool.tensor_NKL2BE, [BlockId(block) for block in range(5)], offset, frequencies)
    torch.testing.assert_close(shifted.pool.tensor_NKL2BE[:5], wanted_kv, atol=2e-3, rtol=1e-3)
    turned = shifted.logits(step(after, num_prompt, blocks))[0]
    error, without = (turned - wanted).abs().max(), (naive - wanted).abs().max()
    assert error < 5e-3
    assert without > 20 * error, "keys at wrong positions change nothing: nothing was shown"


# --- truncation ---------------------------------------------------------------------------------------

NUM_DROPPED, NUM_KEPT, NUM_AFTER, NUM_TEXTS = 256, 256, 48, 6
DEMO_BLOCK = 16


def test_truncation_by_turning_is_as_good_as_computing_again(cpu_ops: Ops) -> None:
    """CachedAttention: a context that overflows loses its oldest half. Perplexity of what follows, on stories: with
    the rest turned to the front it is that of the rest computed anew; with the rest left as it is it diverges."""
    folder = Path(engine.__file__).parent / "demo"
    demo = Demo.load(folder)
    rng = random.Random(7)
    texts = [_story_tokens(demo, rng, NUM_DROPPED + NUM_KEPT + NUM_AFTER + 1) for _ in range(NUM_TEXTS)]
    num_blocks = (NUM_DROPPED + NUM_KEPT + NUM_AFTER) // DEMO_BLOCK + 2
    runner = load_runner(folder, EngineOptions(block_tokens=DEMO_BLOCK, num_blocks=num_blocks), cpu_ops)
    frequencies, _ = inverse_frequencies(runner.config.rope, runner.config.head_dim)
    kept = list(range(NUM_DROPPED // DEMO_BLOCK, (NUM_DROPPED + NUM_KEPT) // DEMO_BLOCK))
    behind = list(range(kept[-1] + 1, num_blocks))
    losses: dict[str, list[float]] = {"computed": [], "turned": [], "naive": []}
    for text in texts:
        short = text[NUM_DROPPED:]
        runner.run(step(short[:NUM_KEPT], 0, range(num_blocks)))
        losses["computed"] += _losses(runner, short, range(num_blocks))
        for way in ("turned", "naive"):
            runner.run(step(text[: NUM_DROPPED + NUM_KEPT], 0, range(num_blocks)))
            if way == "turned":
                blocks = [BlockId(block) for block in kept]
                reanchor_blocks(runner.pool.tensor_NKL2BE, blocks, -NUM_DROPPED, frequencies)
            losses[way] += _losses(runner, short, [*kept, *behind])
    computed, turned, naive = (math.exp(math.fsum(each) / len(each)) for each in losses.values())
    assert abs(turned - computed) < 0.02
    assert naive > 2 * computed


def _story_tokens(demo: Demo, rng: random.Random, num_tokens: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens += demo.encode("".join(span.text for span in corpus.stories(rng, num_tokens)))
    return tokens[:num_tokens]


def _losses(runner: Runner, text: Sequence[int], block_ids: Sequence[int]) -> list[float]:
    """Minus the log probability of each token behind the kept ones."""
    losses: list[float] = []
    for at in range(NUM_KEPT, NUM_KEPT + NUM_AFTER):
        logits = runner.logits(step([text[at]], at, block_ids))[0]
        losses.append(-float(logits.log_softmax(-1)[text[at + 1]]))
    return losses
