"""The modelled engine: any schedule gives the expected tokens, and any damage to KV gives others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvariantBroken
from contracts.ids import BlockId
from contracts.latency import StepWork
from contracts.requests import SamplingParams
from engine.plan import SampleSpec, SequenceStep, StepPlan, work_of
from simulator import ModelledEngine, ModelTiming, StepTiming, expected_tokens, modelled_identity, run
from tests.support.affine_latency import AffineLatency

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from engine.plan import Engine
    from simulator import Program

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPT = [7, 1, 30, 7, 7, 2, 19, 4, 11]
OUTPUT = expected_tokens(PROMPT, GREEDY, 8)


def play(main: Coroutine[Any, Any, T]) -> T:
    async def program(program: Program) -> T:
        return await main

    return run(program, seed=0)


def make_engine(*, block_tokens: int = 4, num_blocks: int = 32, **options: Any) -> ModelledEngine:
    identity = modelled_identity(block_tokens=block_tokens)
    return ModelledEngine(identity=identity, num_blocks=num_blocks, max_context_tokens=100, **options)


def one_step(
    token_ids: Sequence[int],
    start: int,
    block_ids: Sequence[int],
    *,
    output_index: int | None = None,
    params: SamplingParams = GREEDY,
    sequence_id: int = 0,
) -> SequenceStep:
    """One sequence's part of a plan; without `output_index` nothing is sampled."""
    spec = None
    if output_index is not None:
        spec = SampleSpec(params=params, output_index=output_index, history=(), num_prompt_tokens=0)
    blocks = [BlockId(block_id) for block_id in block_ids]
    return SequenceStep(sequence_id=sequence_id, token_ids=token_ids, start=start, block_ids=blocks, sample=spec)


async def next_token(engine: Engine, step: SequenceStep) -> int:
    result = await engine.step(StepPlan((step,)))
    return result.sampled[step.sequence_id].token_id


async def decode(
    engine: Engine,
    written: Sequence[int],
    output: Sequence[int],
    count: int,
    blocks: Sequence[int],
    params: SamplingParams = GREEDY,
) -> list[int]:
    """Continues a sequence whose KV holds `written`, and whose `output` ends with a token not yet written."""
    tokens = list(output)
    for position in range(len(written), len(written) + count):
        step = one_step(tokens[-1:], position, blocks, output_index=len(tokens), params=params)
        tokens.append(await next_token(engine, step))
    return tokens


async def prefill(
    engine: Engine,
    prompt: Sequence[int],
    chunks: Sequence[int],
    blocks: Sequence[int],
    params: SamplingParams,
) -> int:
    """Computes the prompt in chunks of these sizes (the last one takes the rest); the first output token."""
    start = 0
    for size in chunks:
        if start + size >= len(prompt):
            break
        await engine.step(StepPlan((one_step(prompt[start : start + size], start, blocks),)))
        start += size
    return await next_token(engine, one_step(prompt[start:], start, blocks, output_index=0, params=params))


params_of_all_kinds = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 3),
    max_tokens=st.just(10),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=5).map(tuple),
)


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    chunks=st.lists(st.integers(1, 20), max_size=6),
    block_tokens=st.sampled_from([1, 3, 4, 16]),
    order=st.permutations(range(64)),
    params=params_of_all_kinds,
)
def test_any_chunks_and_blocks_give_the_expected_tokens(
    prompt: list[int], chunks: list[int], block_tokens: int, order: list[int], params: SamplingParams
) -> None:
    async def main() -> list[int]:
        engine = make_engine(block_tokens=block_tokens, num_blocks=64, vocab_size=10)
        first = await prefill(engine, prompt, chunks, order, params)
        return await decode(engine, prompt, [first], 9, order, params)

    assert play(main()) == expected_tokens(prompt, params, 10, vocab_size=10)


def test_sampled_tokens_follow_the_seed_and_greedy_ones_do_not() -> None:
    def output(temperature: float, seed: int) -> list[int]:
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=5)
        return expected_tokens(PROMPT, params, 5)

    assert output(0.0, 1) == output(0.0, 2)
    assert len({tuple(output(1.0, seed)) for seed in range(20)}) == 20
    assert output(1.0, 3) == output(0.5, 3) != output(0.0, 3)


@given(at=st.integers(0, len(PROMPT) - 1), token_id=st.integers(0, 40))
def test_every_token_of_the_prompt_counts(at: int, token_id: int) -> None:
    changed = [*PROMPT[:at], token_id, *PROMPT[at + 1 :]]
    assert (expected_tokens(changed, GREEDY, 3) == OUTPUT[:3]) == (changed == PROMPT)


def test_end_of_sequence_tokens_are_masked_until_min_tokens() -> None:
    def output(min_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=30, min_tokens=min_tokens, stop_token_ids=(1,))
        return expected_tokens(PROMPT, params, 30, vocab_size=4, eos_token_ids=(0,))

    assert {0, 1} & set(output(0))
    assert not {0, 1} & set(output(30))


async def _two_engines(copy: Sequence[tuple[int, int]]) -> list[int]:
    """Prefills on one engine in blocks 5, 3, 9, copies (from, to) pairs, decodes on another in 0, 1, 2, 4."""
    source, target = make_engine(), make_engine()
    first = await prefill(source, PROMPT, [4, 4], [5, 3, 9], GREEDY)
    for source_block, target_block in copy:
        target.write_block(BlockId(target_block), source.read_block(BlockId(source_block)))
    return await decode(target, PROMPT, [first], 7, [0, 1, 2, 4])


def test_copied_blocks_continue_the_sequence_elsewhere() -> None:
    assert play(_two_engines([(5, 0), (3, 1), (9, 2)])) == OUTPUT


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param([(5, 0), (3, 1)], id="a block is missing"),
        pytest.param([(5, 1), (3, 0), (9, 2)], id="two blocks are swapped"),
        pytest.param([(5, 0), (5, 1), (9, 2)], id="one block is there twice"),
        pytest.param([(5, 0), (3, 1), (0, 2)], id="an unwritten block is copied"),
    ],
)
def test_a_damaged_copy_changes_the_answer(copy: list[tuple[int, int]]) -> None:
    assert play(_two_engines(copy))[1:] != OUTPUT[1:]


def test_a_stale_block_of_the_same_tokens_is_told_apart() -> None:
    async def main() -> list[int]:
        engine = make_engine()
        other_prompt = [8, *PROMPT[1:]]
        await prefill(engine, other_prompt, [], [10, 11, 12], GREEDY)
        first = await prefill(engine, PROMPT, [], [0, 1, 2], GREEDY)
        return await decode(engine, PROMPT, [first], 7, [0, 11, 2, 3])

    assert play(main())[1:] != OUTPUT[1:]


def test_a_chunk_computed_before_its_prefix_arrived_stays_wrong() -> None:
    async def main() -> int:
        source, target = make_engine(), make_engine()
        await prefill(source, PROMPT, [4], [0, 1, 2], GREEDY)
        await target.step(StepPlan((one_step(PROMPT[4:8], 4, [0, 1, 2]),)))
        target.write_block(BlockId(0), source.read_block(BlockId(0)))
        return await next_token(target, one_step(PROMPT[8:], 8, [0, 1, 2], output_index=0))

    assert play(main()) != OUTPUT[0]


def test_a_block_being_written_reads_as_unwritten() -> None:
    async def main() -> None:
        engine = make_engine(timing=StepTiming(floor_s=1.0))
        step = asyncio.ensure_future(engine.step(StepPlan((one_step([1, 2, 3, 4, 5], 0, [6, 7]),))))
        await asyncio.sleep(0.5)
        assert engine.read_block(BlockId(6)) == (None,) * 4
        await step
        assert [kv and (kv.position, kv.token_id) for kv in engine.read_block(BlockId(6))] == [
            (0, 1),
            (1, 2),
            (2, 3),
            (3, 4),
        ]
        assert [kv and (kv.position, kv.token_id) for kv in engine.read_block(BlockId(7))] == [(4, 5), None, None, None]

    play(main())


def test_a_prefix_that_changes_during_the_step_spoils_it() -> None:
    async def main() -> int:
        source, engine = make_engine(), make_engine(timing=StepTiming(floor_s=1.0))
        await prefill(source, PROMPT, [], [0, 1, 2], GREEDY)
        last = asyncio.ensure_future(next_token(engine, one_step(PROMPT[8:], 8, [0, 1, 2], output_index=0)))
        await asyncio.sleep(0.5)
        for block_id in (BlockId(0), BlockId(1)):
            engine.write_block(block_id, source.read_block(block_id))
        return await last

    assert play(main()) != OUTPUT[0]


def test_steps_take_what_the_formula_says() -> None:
    timing = StepTiming(floor_s=0.01, per_new_token_s=0.002, per_context_token_s=1e-5, per_sequence_s=1e-3)

    async def main() -> tuple[float, float, float]:
        engine = make_engine(timing=timing)
        chunk = one_step(PROMPT, 0, [0, 1, 2], sequence_id=1)
        token = one_step([3], 20, range(4, 10), sequence_id=2, output_index=12)
        result = await engine.step(StepPlan((chunk, token)))
        both_s = asyncio.get_running_loop().time()
        assert list(result.sampled) == [2]
        short = await engine.step(StepPlan((token,)))
        return result.duration_s, both_s, short.duration_s

    both_s = 10 * 0.002 + (9 + 21) * 1e-5 + 2e-3
    assert list(play(main())) == pytest.approx([both_s, both_s, 0.01 + 21e-5 + 1e-3])


def test_timing_refuses_negative_figures() -> None:
    with pytest.raises(ValueError, match="per_new_token_s must not be negative"):
        StepTiming(per_new_token_s=-1.0)


def test_a_cancelled_step_runs_on_until_quiesce() -> None:
    async def main() -> float:
        engine = make_engine(timing=StepTiming(floor_s=1.0, per_sequence_s=0, per_context_token_s=0))
        plan = StepPlan((one_step([1, 2], 0, [0]),))
        step = asyncio.ensure_future(engine.step(plan))
        await asyncio.sleep(0.5)
        step.cancel()
        await asyncio.wait([step])
        with pytest.raises(InvariantBroken, match="another runs"):
            await engine.step(plan)
        await engine.quiesce()
        await engine.quiesce()
        assert engine.read_block(BlockId(0))[0] is not None
        return asyncio.get_running_loop().time()

    assert play(main()) == 1.0


def test_a_closed_engine_computes_nothing() -> None:
    async def main() -> None:
        engine = make_engine()
        await engine.close()
        with pytest.raises(InvariantBroken, match="closed"):
            await engine.step(StepPlan((one_step([1], 0, [0]),)))

    play(main())


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ([one_step([], 0, [0])], "nothing to compute"),
        ([one_step([1], 100, range(30))], "the context ends at 100"),
        ([one_step([1], 4, [0])], "only 1 blocks"),
        ([one_step([1], 4, [3, 3])], "a block is twice"),
        ([one_step([1], 0, [32])], "no block 32"),
        ([one_step([99_999], 0, [0])], "no token 99999"),
        ([one_step([1], 0, [0]), one_step([1], 0, [1])], "sequence 0 is twice"),
        ([one_step([1], 0, [4]), one_step([1], 3, [4], sequence_id=1)], "both write block 4"),
    ],
)
def test_a_plan_no_caller_may_make_is_refused(steps: list[SequenceStep], complaint: str) -> None:
    async def main() -> None:
        await make_engine().step(StepPlan(tuple(steps)))

    with pytest.raises(InvariantBroken, match=complaint):
        play(main())


def test_two_sequences_may_read_one_block() -> None:
    async def main() -> list[int]:
        engine = make_engine()
        await engine.step(StepPlan((one_step(PROMPT[:8], 0, [0, 1]),)))
        steps = [one_step(PROMPT[8:], 8, [0, 1, block_id], output_index=0, sequence_id=block_id) for block_id in (2, 3)]
        result = await engine.step(StepPlan(tuple(steps)))
        return [result.sampled[sequence_id].token_id for sequence_id in (2, 3)]

    assert play(main()) == [OUTPUT[0], OUTPUT[0]]


def test_logprobs_come_when_asked_for() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=3)

    async def main() -> None:
        engine = make_engine()
        step = one_step(PROMPT, 0, [0, 1, 2], output_index=0, params=params)
        (sampled,) = (await engine.step(StepPlan((step,)))).sampled.values()
        assert sampled.logprobs is not None
        assert sampled.logprobs.top[0].token_id == sampled.token_id
        assert len(sampled.logprobs.top) == 3
        assert sampled.logprobs.logprob == sampled.logprobs.top[0].logprob

    play(main())


def test_a_plan_as_latency_models_see_it() -> None:
    """A decode at context 9, a whole prompt of 4, and 3 tokens behind 5: pairs 4*5/2 and 3*5 + 3*4/2."""

    def step(sequence_id: int, start: int, count: int) -> SequenceStep:
        blocks = tuple(BlockId(sequence_id * 4 + place) for place in range(4))
        return SequenceStep(sequence_id=sequence_id, token_ids=[1] * count, start=start, block_ids=blocks, sample=None)

    plan = StepPlan((step(0, 8, 1), step(1, 0, 4), step(2, 5, 3)))
    work = StepWork(prefill_tokens=7, prefill_pairs=10.0 + 21.0, num_chunks=2, num_decodes=1, context_tokens=9)
    assert work_of(plan) == work
    model = AffineLatency(base_s=1.0, token_s=0.1, pair_s=0.01, context_token_s=0.001, sequence_s=0.5)
    assert ModelTiming(model, around_step_s=0.25).duration_s(plan) == pytest.approx(0.25 + model.step_s(work))
