"""The model of reuse: it counts what was seen, and values a place by it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.eviction.reuse import (
    EDGES_S,
    NUM_AGES,
    NUM_CLASSES,
    WIDTHS_S,
    ReuseModel,
    ages,
    classes,
    densities,
    hazards,
    watched_s,
)

NEW, HIT_ONCE = 1, 3
AGES_S = st.lists(st.floats(0, 3e6), max_size=20)


@given(AGES_S)
def test_an_age_lies_between_its_edges(found_s: list[float]) -> None:
    for age_s, number in zip(found_s, ages(np.array(found_s)).tolist(), strict=True):
        assert EDGES_S[number] * (1 - 1e-12) <= age_s
        assert age_s < EDGES_S[number + 1] * (1 + 1e-12) or number == NUM_AGES - 1


def test_classes_tell_octaves_of_hits_and_ends_apart() -> None:
    hits = np.array([0, 1, 2, 3, 4, 7, 8, 31, 32, 10_000])
    assert classes(hits, np.ones(10, np.bool_)).tolist() == [1, 3, 5, 5, 7, 7, 9, 11, 13, 13]
    assert classes(hits, np.zeros(10, np.bool_)).tolist() == [0, 2, 4, 4, 6, 6, 8, 10, 12, 12]
    assert NUM_CLASSES == 14


@given(AGES_S)
def test_watched_seconds_add_up(found_s: list[float]) -> None:
    class_numbers = np.arange(len(found_s)) % 3
    watched = watched_s(class_numbers, np.array(found_s))
    for number in range(3):
        of_class = [min(age_s, EDGES_S[-1]) for age_s in found_s[number::3]]
        assert watched[number].sum() == pytest.approx(sum(of_class))
        for age, (low_s, high_s) in enumerate(pairwise(EDGES_S)):
            expected = sum(min(high_s, max(age_s, low_s)) - low_s for age_s in of_class)
            assert watched[number, age] == pytest.approx(expected, abs=1e-6)


def test_a_constant_hazard_is_what_a_place_is_worth() -> None:
    found = densities(np.full((2, NUM_AGES), 0.01))
    assert found == pytest.approx(np.full((2, NUM_AGES), 0.01))


def test_what_comes_back_later_is_worth_waiting_for() -> None:
    """Nothing for 64 s, then soon: a block of 60 s is worth more than a new one, and one of 200 s nothing."""
    hazard = np.full((1, NUM_AGES), 1e-9)
    due = (EDGES_S[:-1] >= 64) & (EDGES_S[:-1] < 128)
    hazard[0, due] = 0.05
    worth = densities(hazard)[0]
    new, old, over = worth[ages(np.array([0.0, 50.0, 200.0]))]
    assert new < old < 0.05
    assert over < 1e-6
    # Kept until 128 s: it comes with almost 1 - e^-3.2, and stays 64 s and not quite 1 / 0.05 s.
    assert new == pytest.approx((1 - np.exp(-3.2)) / (64 + (1 - np.exp(-3.2)) / 0.05), rel=1e-3)


def test_without_evidence_it_is_lru() -> None:
    found = ReuseModel(1e6).densities
    assert (np.diff(found, axis=1) <= 0).all()
    assert (np.diff(found[:, 1:], axis=1) < 0).all()
    assert found == pytest.approx(np.tile(found[:1], (NUM_CLASSES, 1)))


def test_hazards_are_hits_by_time_watched_once_there_are_many() -> None:
    hits, watched = np.zeros((NUM_CLASSES, NUM_AGES)), np.zeros((NUM_CLASSES, NUM_AGES))
    hits[NEW], watched[NEW] = 1e6, 1e6 / 0.002
    hits[HIT_ONCE], watched[HIT_ONCE] = 1e6, 1e6 / 0.008
    found = hazards(hits, watched)
    assert found[NEW] == pytest.approx(0.002, rel=1e-3)
    assert found[HIT_ONCE] == pytest.approx(0.008, rel=1e-3)
    # Of the others nothing was seen: like all together.
    assert (found[5] > 0.002).all()
    assert (found[5] < 0.008).all()


def test_it_learns_which_class_comes_back_and_when() -> None:
    model = ReuseModel(1e6)
    rng = np.random.default_rng(0)
    model.watched(np.full(5000, NEW), np.full(5000, 900.0))
    model.reused(np.full(500, HIT_ONCE), rng.uniform(90, 110, 500))
    model.learn(np.zeros((NUM_CLASSES, NUM_AGES)), 1)
    at_80, at_200 = ages(np.array([80.0, 200.0]))
    assert model.densities[HIT_ONCE, at_80] > 10 * model.densities[NEW, at_80]
    assert model.densities[HIT_ONCE, at_80] > 3 * model.densities[HIT_ONCE, at_200]


def test_what_is_long_ago_counts_less() -> None:
    def learned(uses_since: int) -> float:
        model = ReuseModel(forget_after=100)
        model.reused(np.full(1000, NEW), np.full(1000, 50.0))
        nothing = np.zeros((NUM_CLASSES, NUM_AGES))
        model.learn(nothing, uses_since)
        model.watched(np.full(1000, NEW), np.full(1000, 500.0))
        model.learn(nothing, 0)
        return float(model.densities[NEW, ages(np.array([40.0]))[0]])

    assert learned(1000) < 0.1 * learned(0)


def test_weight_is_so_many_blocks() -> None:
    once, often = ReuseModel(1e6), ReuseModel(1e6)
    once.reused(np.array([NEW]), np.array([70.0]), weight=40.0)
    often.reused(np.full(40, NEW), np.full(40, 70.0))
    for model in (once, often):
        model.learn(np.outer(np.ones(NUM_CLASSES), WIDTHS_S), 1)
    assert once.densities == pytest.approx(often.densities)
