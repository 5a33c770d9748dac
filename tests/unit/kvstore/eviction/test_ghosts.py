"""Ghosts: what left is remembered for a while, and what became of it is learned from."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.eviction.ghosts import PER_ENTRY, Ghosts
from kvstore.eviction.reuse import ReuseModel, classes, watched_s


class Told(ReuseModel):
    def __init__(self) -> None:
        super().__init__(1e6)
        self.back: list[tuple[int, float, float]] = []
        self.over: list[tuple[int, float, float]] = []

    def reused(self, class_numbers: np.ndarray, ages_s: np.ndarray, weight: float = 1.0) -> None:
        self.back += [
            (each, age_s, weight) for each, age_s in zip(class_numbers.tolist(), ages_s.tolist(), strict=True)
        ]

    def watched(self, class_numbers: np.ndarray, ages_s: np.ndarray, weight: float = 1.0) -> None:
        self.over += [
            (each, age_s, weight) for each, age_s in zip(class_numbers.tolist(), ages_s.tolist(), strict=True)
        ]


def test_what_comes_back_has_its_hits_and_is_learned_from() -> None:
    model = Told()
    ghosts = Ghosts(10, model)
    ghosts.left(7, last_used_s=100.0, hits=2, is_inner=True, now_s=130.0)
    ghosts.left(8, last_used_s=110.0, hits=0, is_inner=False, now_s=130.0)
    assert (ghosts.hits(7), ghosts.hits(9), len(ghosts)) == (2, None, 2)
    assert ghosts.come_back(7, 150.0) == 2
    assert ghosts.come_back(7, 160.0) is None
    waiting = ghosts.tell(200.0)
    assert model.back == [(5, 50.0, 1.0)]
    assert waiting == pytest.approx(watched_s(classes(np.array([0]), np.array([False])), np.array([90.0])))
    assert ghosts.tell(200.0).sum() == pytest.approx(90.0)
    assert len(model.back) == 1


def test_the_oldest_are_forgotten_and_count_with_the_time_they_were_watched_for() -> None:
    model = Told()
    ghosts = Ghosts(1, model)
    for hint in range(1, PER_ENTRY + 3):
        ghosts.left(hint, last_used_s=float(hint), hits=0, is_inner=True, now_s=50.0)
    assert len(ghosts) == PER_ENTRY
    assert [ghosts.come_back(hint, 60.0) for hint in (1, 2, 3)] == [None, None, 0]
    ghosts.tell(60.0)
    assert model.over == [(1, 49.0, 1.0), (1, 48.0, 1.0)]


def test_who_has_no_hint_is_not_remembered() -> None:
    ghosts = Ghosts(10, Told())
    ghosts.left(0, last_used_s=1.0, hits=0, is_inner=True, now_s=2.0)
    assert len(ghosts) == 0


def test_two_with_one_hint_are_one() -> None:
    model = Told()
    ghosts = Ghosts(10, model)
    ghosts.left(7, last_used_s=1.0, hits=1, is_inner=True, now_s=2.0)
    ghosts.left(7, last_used_s=3.0, hits=4, is_inner=True, now_s=4.0)
    assert ghosts.come_back(7, 5.0) == 4
    assert ghosts.tell(6.0).sum() == 0


def test_of_a_large_tier_a_sample_stands_for_all() -> None:
    model = Told()
    ghosts = Ghosts(1000, model, most=2000)
    assert ghosts.weight == PER_ENTRY * 1000 / 2000 == 4
    for hint in range(1, 4001):
        ghosts.left(hint, last_used_s=0.0, hits=0, is_inner=True, now_s=1.0)
    assert 800 < len(ghosts) < 1200
    total_s = ghosts.tell(10.0).sum()
    assert total_s == pytest.approx(4 * 10.0 * len(ghosts))
    back = [hint for hint in range(1, 4001) if ghosts.come_back(hint, 10.0) is not None]
    ghosts.tell(10.0)
    assert len(model.back) == len(back)
    assert {weight for _, _, weight in model.back} == {4.0}
