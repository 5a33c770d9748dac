"""Who is lent to the other phase, and when it comes back."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy.lending import LendMemory, LendRules, LendWorker, lend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.policy.lending import LendDecision

RULES = LendRules(settle_s=0.0, cooldown_s=5.0, min_stay_s=20.0)
RESTED = LendMemory()


def reader(name: str, delay_s: float, **figures: object) -> LendWorker:
    worker = LendWorker(worker_id=name, home="prefill", role="prefill", queue_delay_s=delay_s, memory_tokens=1_000.0)
    return replace(worker, **figures)  # type: ignore[arg-type]


def writer(name: str, used: float, **figures: object) -> LendWorker:
    worker = LendWorker(
        worker_id=name, home="decode", role="decode", memory_tokens=1_000.0, used_tokens=1_000.0 * used, answers=5
    )
    return replace(worker, **figures)  # type: ignore[arg-type]


def look(
    *workers: LendWorker, rules: LendRules = RULES, memory: LendMemory = RESTED, now_s: float = 0.0
) -> LendDecision:
    return lend(workers, rules, now_s, memory)[0]


def test_a_long_queue_at_the_best_prefill_worker_borrows_the_emptiest_writer() -> None:
    decision = look(reader("p", 1.5), writer("d0", 0.5), writer("d1", 0.3))
    assert (decision.kind, decision.worker_id, decision.role) == ("lend", "d1", "mixed")
    assert "shortest prompt queue 1.50 s" in decision.reason
    # Where one queue is short there is a place for prompts.
    assert look(reader("p0", 1.5), reader("p1", 0.9), writer("d0", 0.5)).kind == "keep"


def test_full_memory_at_the_best_decode_worker_borrows_a_reader() -> None:
    decision = look(reader("p0", 0.2), reader("p1", 0.1, prompts=1), writer("d", 0.95))
    assert (decision.kind, decision.worker_id, decision.role) == ("lend", "p0", "mixed")


def test_nobody_is_lent_where_both_phases_are_short() -> None:
    assert look(reader("p", 2.0), writer("d", 0.95)).reason.startswith("both phases are short")


def test_what_changes_its_role_whole_must_be_one_that_its_phase_can_do_without() -> None:
    rules = replace(RULES, lend_as="other")
    assert look(reader("p", 2.0), writer("d", 0.1), rules=rules).kind == "keep"
    assert look(reader("p", 2.0), writer("d0", 0.5), writer("d1", 0.5), rules=rules).kind == "keep"
    decision = look(reader("p", 2.0), writer("d0", 0.4), writer("d1", 0.3), rules=rules)
    assert (decision.worker_id, decision.role) == ("d1", "prefill")


def test_what_is_lent_goes_home_once_it_has_no_foreign_work_and_nobody_misses_it() -> None:
    lent = writer("d1", 0.1, role="mixed", since_s=-30.0)
    decision = look(reader("p", 0.1), writer("d0", 0.2), lent)
    assert (decision.kind, decision.worker_id, decision.role) == ("return", "d1", "decode")
    assert look(reader("p", 0.1), writer("d0", 0.2), replace(lent, prompts=1)).kind == "keep"
    assert look(reader("p", 0.1), writer("d0", 0.2), replace(lent, since_s=-19.0)).kind == "keep"
    # With work it goes if this lasts.
    workers, lasting = (reader("p", 0.1), writer("d0", 0.2), replace(lent, prompts=1)), LendMemory(prefill_calm_s=-10.0)
    assert look(*workers, memory=lasting).kind == "return"
    assert look(*workers, memory=replace(lasting, prefill_calm_s=-9.0)).kind == "keep"
    # Not calm without it: half a second for one.
    assert look(reader("p", 0.4), writer("d0", 0.2), lent).kind == "keep"
    # Nor where the others would read all the time.
    busy = reader("p", 0.0, reading_share=0.6)
    assert look(busy, writer("d0", 0.2), replace(lent, reading_share=0.3)).kind == "keep"


def test_what_is_lent_goes_home_at_once_where_it_is_needed() -> None:
    lent = reader("p1", 0.0, role="decode", since_s=-30.0)
    decision = look(reader("p0", 3.0), lent, writer("d", 0.7))
    assert (decision.kind, decision.role) == ("return", "prefill")
    assert "prefill needs it" in decision.reason
    # Unless those that it helps would then be short.
    assert look(reader("p0", 3.0), replace(lent, used_tokens=500.0), writer("d", 0.85)).kind == "keep"


def test_a_shift_must_last_and_changes_are_apart() -> None:
    rules = replace(RULES, settle_s=2.0)
    workers = (reader("p", 1.5), writer("d0", 0.3), writer("d1", 0.5))
    first, memory = lend(workers, rules, 0.0, RESTED)
    assert first.kind == "keep"
    calm, memory_after_calm = lend((reader("p", 0.5), *workers[1:]), rules, 1.0, memory)
    assert (calm.kind, lend(workers, rules, 2.0, memory_after_calm)[0].kind) == ("keep", "keep")
    second, memory = lend(workers, rules, 2.0, memory)
    assert second.kind == "lend"
    assert lend(workers, rules, 6.0, memory)[0].reason.startswith("4.0 s after the last change")


def test_nothing_is_done_while_one_changes_its_role() -> None:
    changing = writer("d1", 0.0, role="mixed", is_changing=True)
    assert look(reader("p", 3.0), writer("d0", 0.3), changing).reason.startswith("a worker changes its role")


def test_no_more_are_lent_than_the_rules_say() -> None:
    lent = writer("d1", 0.2, role="mixed")
    rules = replace(RULES, max_lent=1)
    assert look(reader("p", 3.0), writer("d0", 0.3), replace(lent, queue_delay_s=2.0), rules=rules).kind == "keep"


@pytest.mark.parametrize(
    "wrong",
    [
        {"queue_delay_low_s": 2.0},
        {"memory_low": 0.95},
        {"min_stay_s": -1.0},
        {"min_prefill": 0},
        {"reading_high": 0.0},
    ],
)
def test_rules_that_cannot_be_kept_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LendRules(**wrong)  # type: ignore[arg-type]


# --- a toy cluster -------------------------------------------------------------------------------------

Role = Literal["prefill", "decode", "mixed"]


class Toy:
    """Two readers and two writers. Work is in worker-seconds of each phase; a mixed worker divides its time by need."""

    def __init__(self, rules: LendRules) -> None:
        self.rules, self.memory, self.now_s = rules, LendMemory(), 0.0
        self.roles: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
        self.since_s = dict.fromkeys(self.roles, -math.inf)
        self.waiting_s = 0.0
        #: Answers in worker memories.
        self.used = 0.0
        self.changes: list[tuple[float, str, str]] = []

    def step(self, reading: float, writing: float) -> None:
        """A second: so much reading comes, and so much of memory is used."""
        self.now_s += 1.0
        readers = [name for name, role in self.roles.items() if role != "decode"]
        writers = [name for name, role in self.roles.items() if role != "prefill"]
        self.waiting_s = max(0.0, self.waiting_s + reading - len(readers))
        self.used = writing
        workers = [
            LendWorker(
                worker_id=name,
                home="prefill" if name.startswith("p") else "decode",
                role=role,
                since_s=self.since_s[name],
                queue_delay_s=self.waiting_s / len(readers) if name in readers else 0.0,
                reading_share=min(1.0, reading / len(readers)) if name in readers else 0.0,
                memory_tokens=1.0,
                used_tokens=self.used / len(writers) if name in writers else 0.0,
                prompts=int(self.waiting_s > 0) if name in readers else 0,
            )
            for name, role in self.roles.items()
        ]
        decision, self.memory = lend(workers, self.rules, self.now_s, self.memory)
        if decision.kind != "keep":
            self.roles[decision.worker_id] = decision.role
            self.since_s[decision.worker_id] = self.now_s
            self.changes.append((self.now_s, decision.worker_id, decision.role))


def run(seconds: Sequence[tuple[float, float]], rules: LendRules = RULES) -> Toy:
    toy = Toy(rules)
    for reading, writing in seconds:
        toy.step(reading, writing)
    return toy


def test_a_shift_is_answered_and_undone() -> None:
    toy = run([(2.8, 0.4)] * 120 + [(0.5, 0.4)] * 120)
    assert [(name, role) for _, name, role in toy.changes] == [("d0", "mixed"), ("d0", "decode")]
    assert toy.waiting_s == 0.0


@given(st.floats(0, 4), st.floats(0, 4))
def test_a_constant_load_swings_nothing(reading: float, writing: float) -> None:
    toy = run([(reading, writing)] * 600)
    # Whoever was lent for it stays: each worker changes once at most.
    assert len(toy.changes) == len({name for _, name, _ in toy.changes})


@given(st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=300))
def test_however_load_swings_each_worker_stays_and_each_phase_is_served(load: list[tuple[float, float]]) -> None:
    toy = run(load)
    last: dict[str, float] = {}
    for at_s, name, _ in toy.changes:
        assert at_s - last.get(name, -math.inf) >= RULES.min_stay_s
        last[name] = at_s
    assert {"prefill", "decode"} <= {phase for role in toy.roles.values() for phase in _phases(role)}
    times = [at_s for at_s, _, _ in toy.changes]
    assert all(after - before >= RULES.cooldown_s for before, after in pairwise(times))


def _phases(role: Role) -> set[str]:
    return {"prefill", "decode"} if role == "mixed" else {role}
