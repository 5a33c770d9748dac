"""Cores and threads: nobody shares while there are enough, everybody has one, loads are even."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cores import CoreDemand, CoreShare, assign_cores

core_lists = st.lists(st.integers(0, 127), min_size=1, max_size=24, unique=True).map(sorted)


@given(core_lists, st.integers(1, 12))
def test_while_there_are_enough_cores_they_are_divided_and_all_used(cores: list[int], workers: int) -> None:
    shares = assign_cores(cores, [CoreDemand()] * workers)
    used = [core for share in shares for core in share.cores]
    if workers <= len(cores):
        assert sorted(used) == cores
        sizes = [len(share.cores) for share in shares]
        assert all(first >= second >= first - 1 for first, second in pairwise(sizes))
        assert [share.threads for share in shares] == sizes
    else:
        assert all(share.threads == 1 and len(share.cores) == 1 for share in shares)
        load = Counter(used)
        assert max(load.values()) - min(load[core] for core in cores) <= 1


threads = st.one_of(st.just("auto"), st.integers(1, 6))


@given(core_lists, st.lists(threads, min_size=1, max_size=8))
def test_everybody_gets_the_threads_asked_for_and_a_core(cores: list[int], wanted: list[int | str]) -> None:
    demands = [CoreDemand(threads=count) for count in wanted]  # type: ignore[arg-type]
    shares = assign_cores(cores, demands)
    assert len(shares) == len(demands)
    for share, count in zip(shares, wanted, strict=True):
        assert share.cores
        assert set(share.cores) <= set(cores)
        assert share.threads == count or (count == "auto" and share.threads >= 1)
    minimum = sum(1 if count == "auto" else int(count) for count in wanted)
    if minimum <= len(cores):
        used = [core for share in shares for core in share.cores]
        assert len(used) == len(set(used))


def test_two_cores_two_workers_is_one_each() -> None:
    assert assign_cores([0, 1], [CoreDemand()] * 2) == [
        CoreShare(cores=(0,), threads=1),
        CoreShare(cores=(1,), threads=1),
    ]


def test_a_pool_divides_its_own_cores_and_the_others_keep_off() -> None:
    own = CoreDemand(cores=(4, 5, 6, 7))
    shares = assign_cores(range(8), [own, CoreDemand(), own])
    assert [share.cores for share in shares] == [(4, 5), (0, 1, 2, 3), (6, 7)]


def test_when_every_core_is_claimed_the_rest_shares_them() -> None:
    shares = assign_cores([0, 1], [CoreDemand(cores=(0, 1)), CoreDemand()])
    assert [share.cores for share in shares] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("count", [3, 5])
def test_more_threads_than_cores_run_on_all_of_them(count: int) -> None:
    assert assign_cores([0, 1], [CoreDemand(threads=count)]) == [CoreShare(cores=(0, 1), threads=count)]
