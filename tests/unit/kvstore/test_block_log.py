"""The worker's log of its cache: what is sent when, and that any coordinator ends up in step with it."""

from __future__ import annotations

from collections import OrderedDict
from random import Random

import numpy as np
import pytest

from contracts.ids import Incarnation, WorkerId
from contracts.messages import BlockEvents, BlockEventsReply, SnapshotPage
from coordinator.directory import Directory, DirectorySync
from kvstore.block_log import BlockLog, BlockLogLimits

W0 = WorkerId("w0")
LIFE = Incarnation(3)
LIMITS = BlockLogLimits(max_events=8, max_events_per_message=3, max_hints_per_page=4)


def hint(number: int) -> bytes:
    return np.array([number], "<u8").tobytes()


def numbers(keys: bytes) -> list[int]:
    return [int(number) for number in np.frombuffer(keys, "<u8")]


class Cache:
    """A prefix cache as the log sees it; what it holds comes in an order that changes without events."""

    def __init__(self, limits: BlockLogLimits = LIMITS) -> None:
        self.held = OrderedDict[int, None]()
        self.num_copies = 0
        self.log = BlockLog(W0, LIFE, self._copy, limits)

    def _copy(self) -> bytes:
        self.num_copies += 1
        return b"".join(map(hint, self.held))

    def store(self, *some: int) -> None:
        for number in some:
            self.held[number] = None
            self.log.stored(hint(number))

    def remove(self, *some: int) -> None:
        for number in some:
            del self.held[number]
            self.log.removed(hint(number))

    def sent(self) -> BlockEvents:
        message = self.log.next_message()
        assert message is not None
        assert (message.worker_id, message.incarnation) == (W0, LIFE)
        return message

    def answered(self, expected: int | None) -> None:
        self.log.answered(BlockEventsReply(expected=expected))


@pytest.fixture
def cache() -> Cache:
    return Cache()


def test_nothing_is_sent_while_nothing_happens(cache: Cache) -> None:
    assert cache.log.next_message() is None
    cache.store(1)
    assert cache.log.num_events == 1
    assert cache.sent().start == 0
    cache.answered(1)
    assert cache.log.next_message() is None


def test_events_go_in_order_and_in_bounded_messages(cache: Cache) -> None:
    cache.store(1, 2)
    cache.remove(1)
    cache.store(3)
    first = cache.sent()
    assert (first.start, numbers(first.keys), first.stored, first.snapshot) == (0, [1, 2, 1], b"\1\1\0", None)
    cache.store(4)
    cache.answered(3)
    second = cache.sent()
    assert (second.start, numbers(second.keys), second.stored) == (3, [3, 4], b"\1\1")
    cache.answered(5)
    assert cache.log.next_message() is None


def test_a_failed_call_is_repeated(cache: Cache) -> None:
    cache.store(1)
    before = cache.sent()
    cache.log.failed()
    assert cache.sent() == before
    cache.log.failed()
    cache.store(2)
    assert numbers(cache.sent().keys) == [1, 2]


def test_a_coordinator_that_misses_some_gets_them_from_the_log(cache: Cache) -> None:
    cache.store(1, 2, 3)
    cache.sent()
    cache.answered(3)
    cache.store(4)
    cache.sent()
    cache.answered(1)
    again = cache.sent()
    assert (again.start, numbers(again.keys)) == (1, [2, 3, 4])
    assert cache.num_copies == 0


@pytest.mark.parametrize("expected", [None, 0, 11, -1], ids=["nothing", "forgotten", "not happened yet", "nonsense"])
def test_what_the_log_cannot_give_comes_as_a_snapshot(cache: Cache, expected: int | None) -> None:
    for start in (1, 4, 7):
        cache.store(*range(start, start + 3))
        cache.sent()
        cache.answered(start + 2)
    cache.store(10)
    cache.sent()
    cache.answered(expected)
    pages = list[BlockEvents]()
    for index in range(3):
        cache.held.move_to_end(4)
        pages.append(cache.sent())
        assert pages[-1].snapshot == SnapshotPage(index, 3)
        assert (pages[-1].start, pages[-1].stored) == (10, b"")
        cache.log.failed()
        assert cache.sent() == pages[-1], "a page is repeated as it was"
        if index == 0:
            cache.store(11)
            cache.remove(1)
        cache.answered(10)
    assert [len(numbers(page.keys)) for page in pages] == [4, 4, 2]
    assert {number for page in pages for number in numbers(page.keys)} == set(range(1, 11)), "as it was at the first"
    after = cache.sent()
    assert (after.start, numbers(after.keys), after.stored) == (10, [11, 1], b"\1\0")
    cache.answered(12)
    assert cache.log.next_message() is None
    assert cache.num_copies == 1


def test_more_events_than_the_log_keeps_come_as_a_snapshot(cache: Cache) -> None:
    cache.store(*range(1, 10))
    message = cache.sent()
    assert (message.start, message.snapshot) == (9, SnapshotPage(0, 3))


def test_an_empty_cache_has_a_snapshot_of_one_empty_page(cache: Cache) -> None:
    cache.store(1)
    cache.remove(1)
    cache.sent()
    cache.answered(None)
    message = cache.sent()
    assert (message.start, message.keys, message.snapshot) == (2, b"", SnapshotPage(0, 1))
    cache.answered(2)
    assert cache.log.next_message() is None


def test_two_copies_of_the_same_contents_have_the_same_pages(cache: Cache) -> None:
    cache.store(1, 2, 3, 4, 5)
    cache.sent()
    cache.answered(None)
    page = cache.sent()
    cache.answered(None)
    cache.held.move_to_end(1)
    assert cache.sent() == page
    assert cache.num_copies == 2


def test_after_registering_anew_the_coordinator_is_asked_what_it_has(cache: Cache) -> None:
    cache.store(1, 2)
    cache.sent()
    cache.log.reset()
    cache.answered(2)
    question = cache.sent()
    assert (question.start, question.keys, question.stored, question.snapshot) == (2, b"", b"", None)
    cache.answered(1)
    assert cache.sent().start == 1
    cache.log.reset()
    cache.sent()
    cache.answered(2)
    assert cache.log.next_message() is None


def test_an_unknown_life_asks_again(cache: Cache) -> None:
    cache.store(1, 2)
    cache.sent()
    cache.log.answered(BlockEventsReply(known=False))
    assert cache.sent().keys == b""


def test_a_snapshot_in_progress_ends_where_the_coordinator_knows_more(cache: Cache) -> None:
    cache.store(1, 2, 3, 4, 5)
    cache.sent()
    cache.answered(None)
    assert cache.sent().snapshot == SnapshotPage(0, 2)
    cache.answered(4)
    assert (cache.sent().start, cache.sent().snapshot) == (4, None)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="a hint has 8 bytes, not 32"):
        Cache().log.stored(bytes(32))
    with pytest.raises(ValueError, match="max_events is 0"):
        BlockLogLimits(max_events=0)
    log = BlockLog(W0, LIFE, lambda: b"123", LIMITS)
    log.stored(hint(1))
    log.next_message()
    log.answered(BlockEventsReply(expected=None))
    with pytest.raises(ValueError, match=r"held\(\) gave 3 bytes"):
        log.next_message()


class World:
    """A worker, a network that loses, repeats and delays, and a coordinator that forgets everything at times."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.cache = Cache()
        self.late: list[BlockEvents] = []
        self.num_snapshots = self.num_gaps = 0
        self.begin()

    def begin(self) -> None:
        """A coordinator starts; the worker has not registered with it yet."""
        self.directory = Directory(1000)
        self.sync = DirectorySync(self.directory)
        self.is_registered = False

    def register(self) -> None:
        if not self.is_registered:
            self.directory.add_worker(0)
            self.is_registered = True
        self.cache.log.reset()

    def change(self) -> None:
        number = self.rng.randrange(1, 24)
        if number in self.cache.held:
            self.cache.remove(number)
        else:
            self.cache.store(number)

    def deliver(self, message: BlockEvents) -> BlockEventsReply:
        member = (0, LIFE) if self.is_registered else (None, None)
        return self.sync.handle(message, *member)

    def call(self) -> None:
        """One call, with whatever happens to it and meanwhile."""
        message = self.cache.log.next_message()
        if message is None:
            return
        fate = self.rng.random()
        if fate < 0.2:
            self.late.append(message)
            self.cache.log.failed()
            return
        if fate < 0.4:
            self.late.append(message)
        reply = self.deliver(message)
        self.meanwhile()
        if fate > 0.8:
            self.cache.log.failed()
        else:
            self.cache.log.answered(reply)
            if not reply.known:
                self.register()

    def meanwhile(self) -> None:
        for _ in range(self.rng.choice([0, 0, 1, 5, 12])):
            self.change()
        while self.late and self.rng.random() < 0.5:
            self.deliver(self.late.pop(self.rng.randrange(len(self.late))))
        if self.rng.random() < 0.03:
            self.count()
            self.begin()
        elif self.rng.random() < 0.03:
            self.register()
        if self.rng.random() < 0.3:
            order = list(self.cache.held)
            self.rng.shuffle(order)
            for number in order:
                self.cache.held.move_to_end(number)

    def count(self) -> None:
        self.num_snapshots += self.sync.snapshots_total
        self.num_gaps += self.sync.gaps_total

    def settle(self) -> int:
        """The network is quiet; how many calls it takes until nothing is to be sent."""
        self.late.clear()
        if not self.is_registered:
            self.register()
        for num_calls in range(100):
            message = self.cache.log.next_message()
            if message is None:
                return num_calls
            self.cache.log.answered(self.deliver(message))
        raise AssertionError("it never ends")


def run(seed: int) -> World:
    world = World(Random(seed))
    world.register()
    for _ in range(100):
        world.call()
        world.meanwhile()
    assert world.settle() <= 20
    held = {number for number in range(1, 24) if world.directory.match(np.array([number], np.uint64)).best}
    assert held == set(world.cache.held), f"seed {seed}"
    assert world.directory.check() == []
    world.count()
    return world


def test_once_the_network_is_quiet_the_directory_equals_the_cache() -> None:
    worlds = [run(seed) for seed in range(60)]
    assert sum(world.num_snapshots for world in worlds) > 100
    assert sum(world.num_gaps for world in worlds) > 100
