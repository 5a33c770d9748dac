"""What is given up, and what is written anew."""

from __future__ import annotations

import math

import numpy as np

from kvstore.ssd.reclaim import BlockColumns, SegmentColumns, choose_kept, choose_segment


def segments(*rows: tuple[int, int, float]) -> SegmentColumns:
    """(live bytes, pinned bytes, worth) of segments of 100 bytes, the oldest first."""
    live, pinned, worth = zip(*rows, strict=True)
    return SegmentColumns(
        num_bytes=np.full(len(rows), 100, np.int64),
        live_bytes=np.array(live, np.int64),
        pinned_bytes=np.array(pinned, np.int64),
        worth=np.array(worth, np.float64),
        sequence=np.arange(len(rows)) + 1,
    )


def chosen(columns: SegmentColumns) -> int | None:
    victim = choose_segment(columns, least_gain=0.5)
    return None if victim is None else victim.index


def test_the_segment_goes_that_costs_least_for_what_it_frees() -> None:
    assert chosen(segments((100, 0, 9.0), (100, 0, 3.0), (100, 0, 5.0))) == 1
    # Worth 4 for 50 bytes is dearer than worth 5 for 100.
    assert chosen(segments((100, 50, 4.0), (100, 0, 5.0))) == 1


def test_of_equals_the_oldest_goes() -> None:
    assert chosen(segments((100, 0, 2.0), (100, 0, 2.0))) == 0


def test_a_segment_full_of_pinned_blocks_stays() -> None:
    assert chosen(segments((100, 51, 0.0), (100, 50, 9.0))) == 1
    assert chosen(segments((100, 51, 0.0))) is None


def kept(*rows: tuple[int, bool, int, float], mean: float = -math.inf, budget: int = 100) -> list[int]:
    """(length, pinned, hits, log worth)."""
    length, pinned, hits, worth = zip(*rows, strict=True)
    columns = BlockColumns(
        length=np.array(length, np.int64),
        pinned=np.array(pinned, np.bool_),
        hits=np.array(hits, np.int64),
        log_worth=np.array(worth, np.float64),
    )
    return [int(index) for index in choose_kept(columns, mean_log_worth=mean, budget_bytes=budget)]


def test_pinned_blocks_are_kept_whatever_they_take() -> None:
    assert kept((80, True, 0, 0.0), (80, True, 0, 0.0), budget=0) == [0, 1]


def test_the_best_are_kept_as_far_as_the_budget_goes() -> None:
    assert kept((50, False, 1, 1.0), (50, False, 1, 3.0), (50, False, 1, 2.0)) == [1, 2]


def test_what_nobody_asked_for_is_not_kept() -> None:
    assert kept((10, False, 0, 9.0), (10, False, 1, 1.0)) == [1]


def test_what_is_worth_no_more_than_others_is_not_kept() -> None:
    assert kept((10, False, 1, 1.0), (10, False, 1, 2.0), mean=1.0) == [1]
