"""Measuring an engine: every step as asked, without the first, unmoved by what disturbs some of them."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import pytest

from contracts.errors import ConfigError
from contracts.latency import StepWork
from engine.profile import PointSpec, ProfileRange, blocks_needed, fit_points, measure_steps, profile_points
from simulator import ModelledEngine, StepTiming, VirtualClock, modelled_identity, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.plan import StepPlan
    from engine.profile import Measurement, ThreadWaits
    from simulator import Program

SPECS = profile_points(ProfileRange(max_chunk_tokens=128, max_context_tokens=512, max_sequences=16))
ROUNDS = 3
TIMING = StepTiming(floor_s=0.012, per_new_token_s=0.0005, per_context_token_s=1e-6, per_sequence_s=0.0002)

FIELDS: dict[str, float] = asdict(TIMING)


@dataclass(frozen=True, slots=True, kw_only=True)
class DisturbedTiming(StepTiming):
    """As its base, but the first step of each kind takes very long, and every third one of all three times as long."""

    seen: set[tuple[int, ...]] = field(default_factory=set[tuple[int, ...]])
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def duration_s(self, plan: StepPlan) -> float:
        kind = tuple(step.start + len(step.token_ids) for step in plan.sequences)
        known = kind in self.seen
        self.seen.add(kind)
        factor = 3.0 if next(self.numbers) % 3 == 0 else 1.0
        # The base class by name: slots make a new class, which super() does not find.
        return StepTiming.duration_s(self, plan) * (factor if known else 100.0)


def measure(
    timing: StepTiming,
    specs: Sequence[PointSpec],
    told: list[tuple[int, int]] | None = None,
    waits: ThreadWaits = dict,
) -> Measurement:
    async def main(_: Program) -> Measurement:
        clock = VirtualClock()
        engine = ModelledEngine(
            identity=modelled_identity(block_tokens=16),
            num_blocks=blocks_needed(specs, 16),
            max_context_tokens=512,
            timing=timing,
        )
        return await measure_steps(
            engine,
            specs,
            clock=clock,
            rounds=ROUNDS,
            waits=waits,
            progress=lambda done, total: None if told is None else told.append((done, total)),
        )

    return run(main, seed=0)


def expected_s(spec: PointSpec) -> float:
    num_tokens = spec.chunk_tokens + spec.num_decodes
    return (
        max(TIMING.floor_s, TIMING.per_new_token_s * num_tokens)
        + TIMING.per_context_token_s * sum(spec.sequence_tokens)
        + TIMING.per_sequence_s * len(spec.sequence_tokens)
    )


def test_a_point_says_how_much_work_its_step_is() -> None:
    point = PointSpec(chunk_tokens=10, prefix_tokens=100, num_decodes=3, context_tokens=50)
    assert point.work == StepWork(10, 10 * 100 + 55, 1, 3, 150)
    assert point.sequence_tokens == (110, 50, 50, 50)
    assert blocks_needed([point, PointSpec(num_decodes=1, context_tokens=16)], 16) == 7 + 3 * 4


def test_every_step_is_measured_and_the_fit_tells_them_all() -> None:
    told: list[tuple[int, int]] = []
    measurement = measure(TIMING, SPECS, told)
    assert [step.work for step in measurement.steps] == [spec.work for spec in SPECS]
    assert [step.duration_s for step in measurement.steps] == pytest.approx([expected_s(spec) for spec in SPECS])
    assert measurement.step_overhead_s == pytest.approx(0.0, abs=1e-9)
    total = len(SPECS) * (ROUNDS + 1)
    assert told == [(done, total) for done in range(1, total + 1)]
    report = fit_points(SPECS, measurement.steps)
    assert report.errors.decode < 0.03
    assert report.errors.prefill < 0.03


def test_warming_up_and_disturbed_steps_do_not_count() -> None:
    steps = measure(DisturbedTiming(seen=set(), numbers=itertools.count(), **FIELDS), SPECS).steps
    short = [
        (step.duration_s, expected_s(spec)) for step, spec in zip(steps, SPECS, strict=True) if step.duration_s < 0.05
    ]
    assert len(short) > 10
    assert [duration_s for duration_s, _ in short] == pytest.approx([wanted_s for _, wanted_s in short])


def test_waiting_for_a_core_is_no_part_of_a_step() -> None:
    """A neighbour holds up every step by a time of its own; the kernel tells how long, thread by thread."""
    rng, waited_s = random.Random(0), {"one": 5.0, "other": 7.0}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class HeldUpTiming(StepTiming):
        def duration_s(self, plan: StepPlan) -> float:
            held_up_s = rng.uniform(0.0, 0.02)
            waited_s["one"] += held_up_s
            waited_s["other"] += held_up_s / 2
            return StepTiming.duration_s(self, plan) + held_up_s

    steps = measure(HeldUpTiming(**FIELDS), SPECS, waits=lambda: dict(waited_s)).steps
    assert [step.duration_s for step in steps] == pytest.approx([expected_s(spec) for spec in SPECS])


def test_a_pool_that_is_too_small_is_refused() -> None:
    async def main(_: Program) -> None:
        clock = VirtualClock()
        engine = ModelledEngine(
            identity=modelled_identity(block_tokens=16), num_blocks=20, max_context_tokens=512, timing=TIMING
        )
        await measure_steps(engine, SPECS, clock=clock, rounds=1)

    with pytest.raises(ConfigError, match=rf"needs {blocks_needed(SPECS, 16)} KV blocks, the engine has 20"):
        run(main, seed=0)


@pytest.mark.parametrize(
    ("chunk", "context", "sequences", "complaint"),
    [(63, 512, 16, "chunks of at least 64"), (64, 512, 7, "8 sequences"), (128, 255, 16, "two chunks of 128")],
)
def test_a_range_that_leaves_no_room_is_refused(chunk: int, context: int, sequences: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ProfileRange(max_chunk_tokens=chunk, max_context_tokens=context, max_sequences=sequences)
