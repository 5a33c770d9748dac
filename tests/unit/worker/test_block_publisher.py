"""When a worker tells what its prefix cache holds: soon, not too often, and again until it was heard."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any, cast

from contracts.errors import DeadlineExceeded
from contracts.ids import Incarnation, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import BlockEvents, BlockEventsReply, WorkerInfo
from kvstore.block_keys import HINT_BYTES
from kvtransfer import Ledger
from simulator import Program, VirtualClock, run
from worker.block_publisher import INTERVAL_S, LONGEST_BACKOFF_S, BlockPublisher

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

INFO = WorkerInfo(
    worker_id=WorkerId("p0"),
    incarnation=Incarnation(3),
    role="prefill",
    address="p0:1",
    model="m",
    identity=KvIdentity(
        model_fingerprint="m",
        layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=4, dtype="float32"),
        rope_base=10000.0,
        protocol_version=1,
    ),
    total_blocks=8,
    max_context_tokens=64,
)


class Listener:
    """A coordinator's end, as simple as can be: a network, a channel and a directory in one."""

    def __init__(self) -> None:
        self.heard_at_s: list[float] = []
        self.held: set[bytes] = set()
        #: Number of the event to go on with; None: this life is not known.
        self.expected: int | None = 0
        self.answers = True

    def channel(self, address: str) -> Listener:
        assert address == "coordinator:1"
        return self

    async def call(self, method: Any, body: BlockEvents, *, timeout_s: float) -> BlockEventsReply:
        self.heard_at_s.append(asyncio.get_running_loop().time())
        if not self.answers:
            await asyncio.sleep(timeout_s)
            raise DeadlineExceeded("nobody answers")
        await asyncio.sleep(0.001)
        assert (body.worker_id, body.incarnation) == (INFO.worker_id, INFO.incarnation)
        if self.expected is None:
            return BlockEventsReply(known=False)
        found = [body.keys[start : start + HINT_BYTES] for start in range(0, len(body.keys), HINT_BYTES)]
        if body.snapshot is not None:
            assert (body.snapshot.index, body.snapshot.count) == (0, 1)
            self.held, self.expected = set(found), body.start
        elif body.start > self.expected:
            return BlockEventsReply(expected=None)
        else:
            for hint, stored in zip(found, body.stored, strict=True):
                (self.held.add if stored else self.held.discard)(hint)
            self.expected = body.start + len(found)
        return BlockEventsReply(expected=self.expected)


class Bench:
    def __init__(self) -> None:
        self.listener = Listener()
        self.ledger = Ledger(8)
        self.registered = asyncio.Event()
        self.lines: list[str] = []
        self.publisher = BlockPublisher(
            info=INFO,
            held=self.ledger.all_keys,
            network=cast("Any", self.listener),
            coordinator_address="coordinator:1",
            clock=VirtualClock(),
            registered=self.registered,
            log=self.lines.append,
        )
        self.ledger.key_listener = self.publisher
        self._number = 0

    def change(self) -> None:
        """One more block is cached, in place of the oldest when all are."""
        self._number += 1
        owner = f"r{self._number}"
        blocks = self.ledger.allocate(owner, 1)
        assert blocks is not None
        self.ledger.set_key(blocks[0], self._number.to_bytes(32, "little"))
        self.ledger.release_all(owner)

    @property
    def in_step(self) -> bool:
        return self.listener.held == {key[:HINT_BYTES] for key in self.ledger.all_keys()}


def on_a_bench(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main(program: Program) -> None:
        bench = Bench()
        telling = asyncio.create_task(bench.publisher.run())
        await test(bench)
        telling.cancel()
        await asyncio.wait([telling])

    run(main, seed=0)


def test_nothing_is_told_before_the_worker_is_registered_and_then_everything() -> None:
    async def test(bench: Bench) -> None:
        bench.change()
        await asyncio.sleep(5.0)
        assert bench.listener.heard_at_s == []
        bench.registered.set()
        await asyncio.sleep(0.01)
        assert bench.in_step
        await asyncio.sleep(5.0)
        assert len(bench.listener.heard_at_s) == 1, "without news there is nothing to tell"

    on_a_bench(test)


def test_news_are_told_at_once_and_then_at_most_every_tenth_of_a_second() -> None:
    async def test(bench: Bench) -> None:
        bench.registered.set()
        for _ in range(200):
            bench.change()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert bench.in_step
        heard = bench.listener.heard_at_s
        assert heard[0] < 0.001
        assert all(later - earlier >= INTERVAL_S for earlier, later in itertools.pairwise(heard))
        assert len(heard) >= 18

    on_a_bench(test)


def test_what_was_not_heard_is_told_again_ever_more_slowly() -> None:
    async def test(bench: Bench) -> None:
        bench.registered.set()
        bench.listener.answers = False
        bench.change()
        await asyncio.sleep(30.0)
        heard = bench.listener.heard_at_s
        assert 8 <= len(heard) <= 16
        assert heard[-1] - heard[-2] > LONGEST_BACKOFF_S
        bench.listener.answers = True
        await asyncio.sleep(4.0)
        assert bench.in_step
        begun, over = bench.lines
        assert begun == "WARNING: block events are not heard by the coordinator: nobody answers"
        assert over.startswith("block events are heard again after 3")
        assert over.endswith(f" s and {sum(at_s < 30.0 for at_s in heard)} failed calls")

    on_a_bench(test)


def test_a_new_coordinator_is_told_as_soon_as_this_life_is_registered_there() -> None:
    async def test(bench: Bench) -> None:
        bench.registered.set()
        for _ in range(20):
            bench.change()
        await asyncio.sleep(0.5)
        bench.listener.held, bench.listener.expected = set(), None
        bench.change()
        await asyncio.sleep(20.0)
        assert bench.listener.held == set()
        bench.listener.expected = 0
        bench.publisher.registered_anew()
        await asyncio.sleep(0.05)
        assert bench.in_step
        assert len(bench.listener.held) == 8

    on_a_bench(test)
