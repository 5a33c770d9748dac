"""What comes together goes together, in order, within the bounds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gateway.batches import Batches

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Post:
    """Carries batches once they are let through; `fails` are places where nothing arrives."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[int, str]]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.fails: set[str] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(work)

    async def send(self, place: str, batch: dict[int, str]) -> bool:
        self.sent.append((place, batch))
        await self.open.wait()
        return place not in self.fails

    def batches(self, max_waiting: int = 10, max_batch: int = 3) -> Batches[str, int, str]:
        return Batches(self.spawn, self.send, max_waiting=max_waiting, max_batch=max_batch)


async def test_what_comes_together_goes_in_batches_of_each_place() -> None:
    post = Post()
    batches = post.batches()
    for number in range(4):
        batches.add("a", number, "x")
    batches.add("b", 9, "y")
    await batches.flush()
    assert [batch for place, batch in post.sent if place == "a"] == [{0: "x", 1: "x", 2: "x"}, {3: "x"}]
    assert [batch for place, batch in post.sent if place == "b"] == [{9: "y"}]
    assert batches.num_dropped == 0


async def test_what_comes_during_a_call_waits_for_its_end_and_the_last_under_a_key_counts() -> None:
    post = Post()
    batches = post.batches()
    post.open.clear()
    batches.add("a", 1, "first")
    await asyncio.sleep(0)
    for value in ("second", "third"):
        batches.add("a", 1, value)
    post.open.set()
    await batches.flush()
    assert post.sent == [("a", {1: "first"}), ("a", {1: "third"})]


async def test_what_is_too_much_or_does_not_arrive_is_counted() -> None:
    post = Post()
    post.fails = {"a"}
    batches = post.batches(max_waiting=2)
    for number in range(5):
        batches.add("a", number, "x")
    batches.add("b", 1, "y")
    # The same again is no more.
    batches.add("a", 0, "z")
    assert batches.num_dropped == 3
    await batches.flush()
    assert post.sent[0] == ("a", {0: "z", 1: "x"})
    assert batches.num_dropped == 5


async def test_stopping_gives_up_what_is_left() -> None:
    post = Post()
    batches = post.batches()
    post.open.clear()
    for number in range(5):
        batches.add("a", number, "x")
    flushing = asyncio.create_task(batches.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    assert len(post.sent) == 1
    assert batches.num_dropped == 2
