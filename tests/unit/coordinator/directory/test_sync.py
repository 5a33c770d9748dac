"""Following one worker's events: order, repeats, gaps, snapshots, lives, and messages that make no sense."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadRequest
from contracts.ids import Incarnation, WorkerId
from contracts.messages import BlockEvents, BlockEventsReply, SnapshotPage
from coordinator.directory import Directory, DirectorySync

W0 = WorkerId("w0")
LIFE = Incarnation(5)


def keys(*hints: int) -> bytes:
    return np.array(hints, "<u8").tobytes()


def events(start: int, *changes: int) -> BlockEvents:
    """Positive: stored; negative: removed."""
    return BlockEvents(
        worker_id=W0,
        incarnation=LIFE,
        start=start,
        keys=keys(*map(abs, changes)),
        stored=bytes(change > 0 for change in changes),
    )


def page(start: int, index: int, count: int, *hints: int) -> BlockEvents:
    return BlockEvents(
        worker_id=W0, incarnation=LIFE, start=start, keys=keys(*hints), snapshot=SnapshotPage(index, count)
    )


class Rig:
    def __init__(self, max_blocks: int = 1000) -> None:
        self.directory = Directory(max_blocks)
        self.directory.add_worker(0)
        self.sync = DirectorySync(self.directory)

    def send(self, message: BlockEvents) -> int | None:
        reply = self.sync.handle(message, 0, LIFE)
        assert reply.known
        return reply.expected

    def held(self, up_to: int = 100) -> set[int]:
        return {hint for hint in range(1, up_to) if self.directory.match(np.array([hint], np.uint64)).counts[0]}

    def totals(self) -> tuple[int, int, int]:
        return self.sync.events_total, self.sync.gaps_total, self.sync.snapshots_total


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_events_in_order_are_followed(rig: Rig) -> None:
    assert rig.send(events(0, 10, 11, 12)) == 3
    assert rig.send(events(3, -11, 13)) == 5
    assert rig.send(events(5)) == 5
    assert rig.held() == {10, 12, 13}
    assert rig.totals() == (5, 0, 0)


def test_of_several_events_about_one_block_the_last_one_counts(rig: Rig) -> None:
    assert rig.send(events(0, 10, -10, 11, -11, 11, 12, -13, 13, -13)) == 9
    assert rig.held() == {11, 12}
    assert rig.send(events(9, -12, 12, 14, -11)) == 13
    assert rig.held() == {12, 14}


def test_repeats_change_nothing_also_where_they_overlap(rig: Rig) -> None:
    rig.send(events(0, 10, 11, -10))
    assert rig.send(events(0, 10, 11)) == 3
    assert rig.send(events(1, 11, -10)) == 3
    assert rig.send(events(1, 11, -10, 12)) == 4
    assert rig.held() == {11, 12}
    assert rig.totals() == (4, 0, 0)


def test_a_gap_changes_nothing_and_names_the_number_that_is_missing(rig: Rig) -> None:
    rig.send(events(0, 10, 11))
    assert rig.send(events(3, -10)) == 2
    assert rig.held() == {10, 11}
    assert rig.totals() == (2, 1, 0)
    assert rig.send(events(2, 12, -10)) == 4
    assert rig.held() == {11, 12}


def test_of_a_life_in_progress_a_snapshot_is_wanted(rig: Rig) -> None:
    assert rig.send(events(7, 10)) is None
    assert rig.send(events(7)) is None
    assert rig.send(page(7, 0, 1, 10, 11)) == 7
    assert rig.send(events(7, -10, 12)) == 9
    assert rig.held() == {11, 12}
    assert rig.totals() == (2, 0, 1)


def test_a_snapshot_replaces_everything_with_its_last_page(rig: Rig) -> None:
    rig.send(events(0, 10, 11))
    assert rig.send(page(5, 0, 3, 20, 21)) == 5
    assert rig.send(page(5, 1, 3, 22)) == 5
    assert rig.held() == {10, 11}
    assert rig.send(page(5, 1, 3, 22)) == 5, "a repeated page"
    assert rig.send(page(5, 2, 3, 11)) == 5
    assert rig.held() == {11, 20, 21, 22}
    assert rig.send(page(5, 0, 1)) == 5
    assert rig.held() == set()
    assert rig.totals() == (2, 0, 2)


@pytest.mark.parametrize(
    "second", [page(5, 2, 3, 22), page(6, 1, 3, 22), page(5, 1, 2, 22)], ids=["skips", "other event", "other count"]
)
def test_a_page_that_does_not_follow_means_to_begin_again(rig: Rig, second: BlockEvents) -> None:
    rig.send(events(0, 10))
    assert rig.send(page(5, 0, 3, 20)) == 5
    assert rig.send(second) is None
    assert rig.send(page(5, 1, 3, 21)) is None, "nothing is in progress any more"
    assert rig.totals() == (1, 2, 0)
    assert rig.held() == {10}
    assert [rig.send(page(6, index, 2, 30 + index)) for index in range(2)] == [6, 6]
    assert rig.held() == {30, 31}


def test_a_late_snapshot_is_ignored_where_more_is_known(rig: Rig) -> None:
    rig.send(events(0, 10, 11, -10))
    assert rig.send(page(1, 0, 1, 10)) == 3
    assert rig.held() == {11}
    # Events that follow while a snapshot is in progress make it late.
    rig.send(page(3, 0, 2, 40))
    assert rig.send(events(3, 12)) == 4
    assert rig.send(page(3, 1, 2, 41)) == 4
    assert rig.held() == {11, 12}


def test_only_the_life_that_is_a_member_is_followed(rig: Rig) -> None:
    unknown = BlockEventsReply(expected=None, known=False)
    assert rig.sync.handle(events(0, 10), None, None) == unknown
    assert rig.sync.handle(events(0, 10), 0, Incarnation(6)) == unknown
    assert rig.held() == set()
    assert rig.totals() == (0, 0, 0)


def test_another_life_or_number_begins_from_nothing(rig: Rig) -> None:
    rig.send(events(0, 10, 11))
    rig.directory.remove_worker(0)
    rig.sync.forget(W0)
    rig.sync.forget(WorkerId("nobody"))
    rig.directory.add_worker(0)
    assert rig.send(events(2, 12)) is None
    assert rig.send(events(0, 10)) == 1
    assert rig.held() == {10}
    rig.directory.add_worker(1)
    assert rig.sync.handle(events(1, 12), 1, LIFE).expected is None, "the same worker under another number"


def test_a_snapshot_of_more_than_fits_is_cut_and_counted() -> None:
    rig = Rig(max_blocks=5)
    assert rig.send(page(9, 0, 3, 1, 2, 3)) == 9
    assert rig.send(page(9, 1, 3, 4, 5, 6)) == 9
    assert rig.send(page(9, 2, 3, 7)) == 9
    assert rig.held() == {1, 2, 3, 4, 5}
    assert rig.sync.cut_total == 2
    assert rig.send(page(9, 0, 1, 6)) == 9
    assert rig.sync.cut_total == 2


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (BlockEvents(worker_id=W0, incarnation=LIFE, start=2, keys=b"1234567", stored=b""), "keys"),
        (BlockEvents(worker_id=W0, incarnation=LIFE, start=2, keys=keys(1, 2), stored=b"\x01"), "stored"),
        (BlockEvents(worker_id=W0, incarnation=LIFE, start=2, keys=keys(1), stored=b"\x02"), "stored"),
        (BlockEvents(worker_id=W0, incarnation=LIFE, start=-1), "start"),
        (page(2, 1, 1), "snapshot"),
        (page(2, -1, 1), "snapshot"),
        (page(2, 0, 0), "snapshot"),
        (BlockEvents(worker_id=W0, incarnation=LIFE, start=2, stored=b"\x01", snapshot=SnapshotPage(0, 1)), "stored"),
    ],
)
def test_messages_that_make_no_sense_are_refused_and_change_nothing(rig: Rig, message: BlockEvents, param: str) -> None:
    rig.send(events(0, 10, 11))
    with pytest.raises(BadRequest, match=param) as caught:
        rig.send(message)
    assert caught.value.param == param
    assert rig.send(events(2, 12)) == 3
    assert rig.held() == {10, 11, 12}


@given(
    st.lists(st.sampled_from([-4, -3, -2, -1, 1, 2, 3, 4]), max_size=30),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=8),
)
def test_messages_of_any_cut_and_any_repeat_end_in_the_same(changes: list[int], cuts: list[tuple[int, int]]) -> None:
    rig = Rig()
    known = 0
    for start, length in [*cuts, (0, len(changes))]:
        some = changes[start : start + length]
        if start <= known:
            known = max(known, start + len(some))
        assert rig.send(events(start, *some)) == (known if known or not start else None)
    present = set[int]()
    for change in changes:
        (present.add if change > 0 else present.discard)(abs(change))
    assert rig.held(5) == present
    assert rig.sync.events_total == len(changes)
