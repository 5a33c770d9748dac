"""Scores: which entry each policy lets go first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.eviction import policies
from kvstore.eviction.columns import Columns
from kvstore.eviction.policies import Learned
from kvstore.eviction.reuse import NUM_AGES, NUM_CLASSES

if TYPE_CHECKING:
    from kvstore.eviction.policies import Score

LEARNED = Learned(half_life_s=10.0, densities=np.ones((NUM_CLASSES, NUM_AGES)))
ROWS = np.arange(3)


def columns(**values: list[float]) -> Columns:
    made = Columns(3)
    made.is_stored[:] = True
    made.size_bytes[:] = 100
    made.recompute_s[:] = 1.0
    made.aged_uses[:] = 1.0
    for name, column in values.items():
        getattr(made, name)[:] = column
    return made


def order(score: Score, made: Columns, learned: Learned = LEARNED, now_s: float = 100.0) -> list[int]:
    scores = score(made, ROWS, now_s, learned)
    assert len(set(scores.tolist())) == 3
    return [int(row) for row in np.argsort(scores)]


def test_lru_lets_go_what_was_not_used_for_longest() -> None:
    assert order(policies.lru, columns(last_used_s=[30, 10, 20], hits=[0, 9, 0])) == [1, 2, 0]


def test_lfu_lets_go_what_was_used_least_but_a_use_counts_half_after_the_half_life() -> None:
    at_once = columns(last_used_s=[100, 100, 100], aged_uses=[3, 1, 2])
    assert order(policies.lfu_aged, at_once) == [1, 2, 0]
    # 8 uses 40 s ago count like half a use now; 20 s ago, like 2.
    aged = columns(last_used_s=[60, 100, 80], aged_uses=[8, 1, 8])
    assert order(policies.lfu_aged, aged) == [0, 1, 2]
    scores = policies.lfu_aged(aged, ROWS, 100.0, LEARNED)
    assert np.exp2(scores) == pytest.approx([0.5, 1.0, 2.0])


def test_cost_is_probability_times_time_by_size() -> None:
    assert order(policies.cost_aware, columns(recompute_s=[2, 1, 3])) == [1, 0, 2]
    assert order(policies.cost_aware, columns(size_bytes=[100, 50, 200])) == [2, 0, 1]
    densities = LEARNED.densities.copy()
    densities[1], densities[3] = 0.1, 0.5
    made = columns(hits=[0, 1, 1], is_inner=[1, 1, 1], recompute_s=[4, 1, 2])
    # 0.4, 0.5 and 1: often enough is better than costly.
    assert order(policies.cost_aware, made, Learned(10.0, densities)) == [0, 1, 2]


def test_what_no_one_waits_for_goes_before_what_is_needed_latest() -> None:
    # Worth a lot to nobody, needed soon, needed later.
    made = columns(recompute_s=[1000, 0, 1], need=[-1, 0, 7])
    assert order(policies.scheduler_aware, made) == [0, 2, 1]
    nobody = columns(recompute_s=[3, 1e-6, 2])
    assert order(policies.scheduler_aware, nobody) == order(policies.cost_aware, nobody) == [1, 2, 0]
