"""Stores hear which prompts wait, the next first: at once, not too often, one message at a time, and what is left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import DeadlineExceeded
from contracts.ids import Incarnation, WorkerId
from contracts.messages import Empty, Peer
from kvstore.look_ahead import INTERVAL_S, PAUSE_S, LookAhead, LookAheadWindow, Wanted
from simulator import Program, VirtualClock, run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from contracts.store_messages import PrefetchRequest


def peer(name: str) -> Peer:
    return Peer(worker_id=WorkerId(name), incarnation=Incarnation(1), address=f"{name}:1")


WORKER, STORE, OTHER, WORKER_TOO = peer("p0"), peer("s0"), peer("s1"), peer("p1")


def wanted(*names: str, store: Peer = STORE) -> list[Wanted]:
    """A prompt of two keys for each."""
    return [Wanted(store, (f"{name}0".encode(), f"{name}1".encode())) for name in names]


def prompts(*names: str) -> tuple[tuple[bytes, ...], ...]:
    return tuple(each.keys for each in wanted(*names))


# --- the machine --------------------------------------------------------------------------------------


def test_each_store_hears_of_its_own_prompts_in_order() -> None:
    window = LookAheadWindow()
    asked = [*wanted("a"), *wanted("b", store=OTHER), *wanted("c")]
    assert window.due(asked, 0.0) == [(STORE, prompts("a", "c")), (OTHER, prompts("b"))]


def test_what_was_told_is_not_told_again_and_one_message_is_under_way() -> None:
    window = LookAheadWindow()
    assert window.due(wanted("a"), 0.0) == [(STORE, prompts("a"))]
    assert window.due(wanted("b", "a"), 0.0) == []
    window.answered(STORE)
    assert window.due(wanted("a"), 0.0) == []
    assert window.due(wanted("b", "a"), 0.0) == [(STORE, prompts("b", "a"))]


def test_a_store_hears_that_nothing_waits_any_more_and_is_forgotten() -> None:
    window = LookAheadWindow()
    window.due(wanted("a"), 0.0)
    window.answered(STORE)
    assert window.due([], 0.0) == [(STORE, ())]
    window.answered(STORE)
    assert window.due([], 0.0) == []


def test_a_store_that_does_not_answer_is_left_alone_for_a_while() -> None:
    window = LookAheadWindow()
    window.due(wanted("a"), 0.0)
    window.failed(STORE, 1.0)
    assert window.due(wanted("a"), 1.0 + PAUSE_S / 2) == []
    assert window.due(wanted("a"), 1.0 + PAUSE_S) == [(STORE, prompts("a"))], "nobody knows what it heard"


def test_the_window_is_bounded_in_prompts_and_keys() -> None:
    window = LookAheadWindow(max_prompts=3, max_keys=5)
    (_, told), *others = window.due(wanted("a", "b", "c", "d"), 0.0)
    assert others == []
    assert [len(keys) for keys in told] == [2, 2, 1]


@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "fail"]), st.permutations("abc"), st.integers(0, 3))))
def test_whatever_is_lost_a_store_knows_in_the_end(events: list[tuple[str, list[str], int]]) -> None:
    """What the machine believes of a store that answered last is what that store has heard."""
    window, heard, under_way, now_s = LookAheadWindow(), prompts(), None, 0.0
    asked: list[str] = []
    for kind, names, count in events:
        now_s += 1.0
        if kind == "ask":
            asked = names[:count]
            for _, told in window.due(wanted(*asked), now_s):
                assert under_way is None
                under_way = told
        elif under_way is not None:
            if kind == "answer":
                heard = under_way
                window.answered(STORE)
            else:
                window.failed(STORE, now_s)
                if not under_way:
                    heard = prompts()
            under_way = None
    if under_way is not None:
        heard = under_way
        window.answered(STORE)
    for _, told in window.due(wanted(*asked), now_s + PAUSE_S):
        heard = told
    assert heard == prompts(*asked)


# --- the shell ----------------------------------------------------------------------------------------


class Stores:
    """Network and stores in one."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, str, tuple[tuple[bytes, ...], ...]]] = []
        self.answers = True
        self._address = ""

    def channel(self, address: str) -> Stores:
        self._address = address
        return self

    async def call(self, method: Any, body: PrefetchRequest, *, timeout_s: float) -> Empty:
        address = self._address
        assert (body.worker_id, body.incarnation) == (WORKER.worker_id, WORKER.incarnation)
        self.heard.append((asyncio.get_running_loop().time(), address, body.prompts))
        if not self.answers:
            await asyncio.sleep(timeout_s)
            raise DeadlineExceeded("nobody answers")
        return Empty()


class Bench:
    def __init__(self) -> None:
        self.stores = Stores()
        self.waiting: list[Wanted] = []
        self.ahead = LookAhead(
            worker=WORKER,
            wanted=lambda limit: self.waiting[:limit],
            is_store=lambda worker_id: worker_id.startswith("s"),
            network=cast("Any", self.stores),
            clock=VirtualClock(),
        )

    def wait_for(self, *asked: Wanted) -> None:
        self.waiting = list(asked)
        self.ahead.changed()


def on_a_bench(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main(program: Program) -> None:
        bench = Bench()
        running = asyncio.create_task(bench.ahead.run())
        await test(bench)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()

    run(main, seed=1)


def test_a_change_is_told_at_once_and_what_follows_soon_after() -> None:
    async def test(bench: Bench) -> None:
        bench.wait_for(*wanted("a"))
        await asyncio.sleep(0.001)
        assert [told for _, _, told in bench.stores.heard] == [prompts("a")]
        for names in ("b", "bc", "bcd"):
            bench.wait_for(*wanted(*names))
        await asyncio.sleep(3 * INTERVAL_S)
        assert [told for _, _, told in bench.stores.heard] == [prompts("a"), prompts("b", "c", "d")]
        assert bench.ahead.messages_total == 2

    on_a_bench(test)


def test_only_stores_are_told() -> None:
    async def test(bench: Bench) -> None:
        bench.wait_for(*wanted("a", store=WORKER_TOO), *wanted("b", store=OTHER))
        await asyncio.sleep(0.01)
        assert [(address, told) for _, address, told in bench.stores.heard] == [("s1:1", prompts("b"))]

    on_a_bench(test)


def test_a_store_that_does_not_answer_keeps_no_other_waiting() -> None:
    async def test(bench: Bench) -> None:
        bench.stores.answers = False
        bench.wait_for(*wanted("a"))
        await asyncio.sleep(0.1)
        bench.stores.answers = True
        bench.wait_for(*wanted("a"), *wanted("b", store=OTHER))
        await asyncio.sleep(0.1)
        assert [address for _, address, _ in bench.stores.heard] == ["s0:1", "s1:1"]
        await asyncio.sleep(2 * PAUSE_S)
        bench.ahead.changed()
        await asyncio.sleep(0.1)
        assert [address for _, address, _ in bench.stores.heard] == ["s0:1", "s1:1", "s0:1"]
        assert (bench.ahead.messages_total, bench.ahead.failures_total) == (2, 1)

    on_a_bench(test)
