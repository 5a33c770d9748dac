"""Measures how long an engine's steps take, and judges whether a formula tells it.

Some thirty steps of one kind (chunks of several sizes behind several prefixes; decodes of several batches at several
contexts) and a few that hold both. Some are held out of the fit, none of them at the edge of what is measured, and
the fit is judged by these.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from contracts.errors import ConfigError
from contracts.ids import BlockId
from contracts.latency import StepWork
from contracts.profile import FitErrors, ProfilePoint
from contracts.requests import SamplingParams
from engine.plan import SampleSpec, SequenceStep, StepPlan
from engine.profile_fit import MeasuredStep, fit_latency, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from contracts.clock import Clock
    from contracts.latency_models import FittedLatency
    from engine.plan import Engine

    #: Seconds that each thread of the engine was ready to run but had no core, so far, by any name of the thread.
    ThreadWaits = Callable[[], Mapping[str, float]]

#: Of the repeats of a step, its duration is the value that this share of them does not reach. Whatever else runs
#: on the machine only ever adds to a step (it cools caches, takes bandwidth), at times to half of all, so the median
#: may be a neighbour's; the minimum hangs from one lucky repeat.
DURATION_QUANTILE = 0.25

#: In one round a step is repeated until it has taken so long, so many times at most.
_TURN_S = 0.1
_TURN_STEPS = 20

#: So much of a step's duration stays whatever is taken off for waiting.
_MIN_RUNNING_SHARE = 0.1

#: Smallest largest chunk and batch that leave room for different sizes.
MIN_CHUNK_TOKENS = 64
MIN_SEQUENCES = 8

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRange:
    """The largest of everything that is measured; a fit holds up to there."""

    max_chunk_tokens: int
    max_context_tokens: int
    max_sequences: int

    def __post_init__(self) -> None:
        if self.max_chunk_tokens < MIN_CHUNK_TOKENS or self.max_sequences < MIN_SEQUENCES:
            raise ConfigError(
                f"a profile needs chunks of at least {MIN_CHUNK_TOKENS} tokens and {MIN_SEQUENCES} sequences, "
                f"not {self.max_chunk_tokens} and {self.max_sequences}"
            )
        if self.max_context_tokens < 2 * self.max_chunk_tokens:
            raise ConfigError(
                f"a profile needs a context of two chunks of {self.max_chunk_tokens} tokens, "
                f"not {self.max_context_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSpec:
    """A step to be measured: at most one chunk, and decodes of equal contexts."""

    chunk_tokens: int = 0
    prefix_tokens: int = 0
    num_decodes: int = 0
    #: Of each decode, the token being computed included.
    context_tokens: int = 0
    held_out: bool = False

    @property
    def work(self) -> StepWork:
        chunk = self.chunk_tokens
        return StepWork(
            prefill_tokens=chunk,
            prefill_pairs=chunk * self.prefix_tokens + chunk * (chunk + 1) / 2,
            num_chunks=1 if chunk else 0,
            num_decodes=self.num_decodes,
            context_tokens=self.num_decodes * self.context_tokens,
        )

    @property
    def sequence_tokens(self) -> tuple[int, ...]:
        """Tokens of each sequence after the step."""
        chunk = (self.prefix_tokens + self.chunk_tokens,) if self.chunk_tokens else ()
        return chunk + (self.context_tokens,) * self.num_decodes


@dataclass(frozen=True, slots=True)
class Measurement:
    """Parallel to the specs that were asked for."""

    steps: tuple[MeasuredStep, ...]
    #: What awaiting a step takes beyond the engine's own time, with nothing else on the loop.
    step_overhead_s: float


@dataclass(frozen=True, slots=True)
class FitReport:
    latency: FittedLatency
    points: tuple[ProfilePoint, ...]
    errors: FitErrors


def profile_points(extent: ProfileRange) -> tuple[PointSpec, ...]:
    """Steps of prefill, of decode, and of both; the last are all held out."""
    return (*_prefill_points(extent), *_decode_points(extent), *_mixed_points(extent))


def _prefill_points(extent: ProfileRange) -> Iterator[PointSpec]:
    largest = extent.max_chunk_tokens
    half, most = (extent.max_context_tokens - largest) // 2, extent.max_context_tokens - largest
    # A single token shows what a step costs at least.
    yield PointSpec(chunk_tokens=1)
    for divisor, prefix, held_out in (
        (32, 0, False),
        (16, 0, False),
        (8, 0, True),
        (4, 0, False),
        (2, 0, True),
        (1, 0, False),
        (1, half, False),
        (4, half, True),
        (16, most, False),
        (2, most, False),
        (1, most, False),
    ):
        yield PointSpec(chunk_tokens=largest // divisor, prefix_tokens=prefix, held_out=held_out)


def _decode_points(extent: ProfileRange) -> Iterator[PointSpec]:
    """Two contexts at each doubling of the batch, one half-way to the next; held out are the quarters between.

    So many because kernels take rows in tiles: a batch one larger may cost a tile more.
    """
    context, last = extent.max_context_tokens, extent.max_sequences
    batches = [1 << power for power in range(last.bit_length()) if 1 << power < last] + [last]
    for num_decodes in batches:
        # The largest batches at the longest context would need memory that few workers have.
        longest = max(context // 4, min(context, 8 * context // num_decodes))
        yield PointSpec(num_decodes=num_decodes, context_tokens=context // 16)
        yield PointSpec(num_decodes=num_decodes, context_tokens=longest)
    for lower, upper in pairwise(batches):
        quarter = (upper - lower) // 4
        if upper - lower > 1:
            yield PointSpec(num_decodes=(lower + upper) // 2, context_tokens=context // 4)
        if quarter:
            yield PointSpec(num_decodes=lower + quarter, context_tokens=context // 4, held_out=True)
            yield PointSpec(num_decodes=upper - quarter, context_tokens=context // 4, held_out=True)


def _mixed_points(extent: ProfileRange) -> Iterator[PointSpec]:
    chunk, sequences, context = extent.max_chunk_tokens, extent.max_sequences, extent.max_context_tokens
    for divisor, num_decodes in ((8, sequences), (4, sequences // 2), (2, sequences // 4)):
        yield PointSpec(
            chunk_tokens=chunk // divisor,
            prefix_tokens=context // 4,
            num_decodes=num_decodes,
            context_tokens=context // 4,
            held_out=True,
        )


def blocks_needed(specs: Sequence[PointSpec], block_tokens: int) -> int:
    """Blocks of the step that holds most."""
    return max(
        -(-(spec.prefix_tokens + spec.chunk_tokens) // block_tokens)
        + spec.num_decodes * -(-spec.context_tokens // block_tokens)
        for spec in specs
    )


async def measure_steps(
    engine: Engine,
    specs: Sequence[PointSpec],
    *,
    clock: Clock,
    rounds: int,
    waits: ThreadWaits = dict,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measurement:
    """Runs every step once to warm up, then in `rounds` over all of them, each in another order, so that what else
    happens on the machine touches all alike. Short steps run several times a round. Overwrites the engine's KV pool.
    `progress(turns done, turns in all)`.

    A step's duration leaves out what `waits` says that the engine's threads waited for a core that others held; of
    several threads, the one that waited longest held up the step.

    Raises ConfigError when the engine's pool is too small; what `Engine.step` raises.
    """
    needed = blocks_needed(specs, engine.identity.layout.block_tokens)
    if needed > engine.num_blocks:
        raise ConfigError(f"the profile needs {needed} KV blocks, the engine has {engine.num_blocks}")
    plans = [_plan(engine, spec) for spec in specs]
    turns: list[list[_Turn]] = [[] for _ in plans]
    total = len(plans) * (rounds + 1)
    for index, plan in enumerate(plans):
        await engine.step(plan)
        progress(index + 1, total)
    done = len(plans)
    for number in range(rounds):
        for index in random.Random(number).sample(range(len(plans)), len(plans)):
            turns[index].extend(await _run_turn(engine, plans[index], clock, waits))
            done += 1
            progress(done, total)
    steps = tuple(
        MeasuredStep(spec.work, float(np.quantile([turn.duration_s for turn in taken], DURATION_QUANTILE)))
        for spec, taken in zip(specs, turns, strict=True)
    )
    overhead_s = float(np.quantile([turn.overhead_s for taken in turns for turn in taken], DURATION_QUANTILE))
    return Measurement(steps, max(0.0, overhead_s))


class _Turn(NamedTuple):
    duration_s: float
    overhead_s: float


async def _run_turn(engine: Engine, plan: StepPlan, clock: Clock, waits: ThreadWaits) -> list[_Turn]:
    taken: list[_Turn] = []
    while not taken or (sum(turn.duration_s for turn in taken) < _TURN_S and len(taken) < _TURN_STEPS):
        before_s = waits()
        start_s = clock.now_s()
        duration_s = (await engine.step(plan)).duration_s
        elapsed_s = clock.now_s() - start_s
        waited_s = max((total_s - before_s.get(thread, 0.0) for thread, total_s in waits().items()), default=0.0)
        # The engine may have waited before its step began too; then none of it is in its own time.
        running_s = max(elapsed_s - waited_s, _MIN_RUNNING_SHARE * duration_s)
        taken.append(_Turn(min(duration_s, running_s), elapsed_s - duration_s))
    return taken


def _plan(engine: Engine, spec: PointSpec) -> StepPlan:
    """Each sequence has blocks of its own. What they hold does not matter: no kernel's time depends on it."""
    steps: list[SequenceStep] = []
    first_block = 0
    for index, num_tokens in enumerate(spec.sequence_tokens):
        num_new = spec.chunk_tokens if index == 0 and spec.chunk_tokens else 1
        token_ids = [(7919 * position + index) % engine.vocab_size for position in range(num_new)]
        num_blocks = engine.identity.layout.blocks_for(num_tokens)
        steps.append(
            SequenceStep(
                sequence_id=index,
                token_ids=token_ids,
                start=num_tokens - num_new,
                block_ids=[BlockId(block) for block in range(first_block, first_block + num_blocks)],
                sample=SampleSpec(params=_GREEDY, output_index=0, history=token_ids, num_prompt_tokens=num_new),
            )
        )
        first_block += num_blocks
    return StepPlan(tuple(steps))


def fit_points(specs: Sequence[PointSpec], steps: Sequence[MeasuredStep]) -> FitReport:
    """Fits the steps that are not held out and compares with all. Parallel arguments.

    Raises ValueError as `fit_latency`.
    """
    latency = fit_latency([step for spec, step in zip(specs, steps, strict=True) if not spec.held_out])
    points = tuple(
        ProfilePoint(
            work=step.work,
            measured_s=step.duration_s,
            error=relative_error(latency, step),
            held_out=spec.held_out,
        )
        for spec, step in zip(specs, steps, strict=True)
    )
    return FitReport(latency, points, FitErrors.of(points))
