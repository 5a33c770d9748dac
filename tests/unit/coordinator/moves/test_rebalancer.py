"""The shell of moves on virtual time: what workers are asked, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import NotReady
from contracts.ids import Attempt, Incarnation, RequestId, WorkerId
from contracts.messages import (
    DEREGISTER,
    HEARTBEAT,
    MEMBERS,
    MIGRATE,
    REGISTER,
    DeregisterRequest,
    Empty,
    HeartbeatRequest,
    MigrateReply,
    MigrateRequest,
    PriorityUse,
    RequestKey,
    WorkerInfo,
    WorkerLoad,
)
from coordinator import CoordinatorShell
from coordinator.policy.move_terms import MoveRules
from coordinator.rebalancer import CALL_TIMEOUT_S, RebalanceSettings
from rpc import MemoryNetwork
from simulator import Program, VirtualClock, run
from simulator.engine import modelled_identity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from contracts.messages import CoordinatorFigures, MemberRole
    from coordinator.policy.move_terms import Purpose
    from rpc import CallContext

BLOCKS = 1000
INTERVAL_S = 0.2
RULES = MoveRules(low_tokens=64.0, high_tokens=512.0, max_moving=1, purposes=frozenset({"draining", "balance"}))

FULL = WorkerLoad(free_blocks=20, owned_blocks=980, priorities=(PriorityUse(0, 10, 980),), open_requests=10)
EMPTY = WorkerLoad(free_blocks=BLOCKS)


class Worker:
    """What it was asked, and how it answers: as many begin as are wanted, unless it is told otherwise."""

    def __init__(self, network: MemoryNetwork, name: str, role: MemberRole) -> None:
        self.info = WorkerInfo(
            worker_id=WorkerId(name),
            incarnation=Incarnation(7),
            role=role,
            address=f"{name}:1",
            model="m",
            identity=modelled_identity(),
            total_blocks=BLOCKS,
            max_context_tokens=4096,
        )
        self.asked: list[MigrateRequest] = []
        self.answer: Callable[[MigrateRequest], Awaitable[MigrateReply]] = self._begin
        self._channel = network.channel("c:1")
        self._server = network.server(self.info.address)
        self._server.register(MIGRATE, self._on_migrate)

    async def start(self, load: WorkerLoad) -> None:
        await self._server.start()
        await self._channel.call(REGISTER, self.info, timeout_s=1)
        await self.beat(load)

    async def beat(self, load: WorkerLoad) -> None:
        beat = HeartbeatRequest(worker_id=self.info.worker_id, incarnation=self.info.incarnation, load=load)
        await self._channel.call(HEARTBEAT, beat, timeout_s=1)

    async def leave(self) -> None:
        leave = DeregisterRequest(worker_id=self.info.worker_id, incarnation=self.info.incarnation, reason="")
        await self._channel.call(DEREGISTER, leave, timeout_s=1)

    async def _on_migrate(self, ask: MigrateRequest, context: CallContext) -> MigrateReply:
        self.asked.append(ask)
        return await self.answer(ask)

    async def _begin(self, ask: MigrateRequest) -> MigrateReply:
        return begun(ask.max_requests)


def begun(number: int, reason: str = "") -> MigrateReply:
    keys = tuple(RequestKey(RequestId(f"r-{index}"), Attempt(1)) for index in range(number))
    return MigrateReply(started=keys, reason=reason)


class Office:
    def __init__(self, rules: MoveRules) -> None:
        self.network = MemoryNetwork(rng=random.Random(1), host="c")
        self.said: list[str] = []
        self.shell = CoordinatorShell(
            VirtualClock(),
            network=self.network,
            rebalancing=RebalanceSettings(rules=rules, interval_s=INTERVAL_S),
            bandwidth=lambda source, destination: 5e9 if (source, destination) == ("full", "empty") else None,
            log=self.said.append,
        )
        server = self.network.server("c:1")
        self.shell.register_on(server)
        self.start = server.start

    async def worker(self, name: str, load: WorkerLoad, role: MemberRole = "decode") -> Worker:
        worker = Worker(self.network, name, role)
        await worker.start(load)
        return worker

    async def figures(self) -> CoordinatorFigures:
        reply = await self.network.channel("c:1").call(MEMBERS, Empty(), timeout_s=1)
        assert reply.coordinator is not None
        return reply.coordinator


def with_office(body: Callable[[Office], Awaitable[None]], *purposes: Purpose, **changes: object) -> None:
    rules = replace(RULES, **changes)  # type: ignore[arg-type]
    if purposes:
        rules = replace(rules, purposes=frozenset(purposes))

    async def main(program: Program) -> None:
        office = Office(rules)
        await office.start()
        async with office.shell:
            await body(office)

    run(main, seed=1)


async def looks(number: int) -> None:
    """Until so many are over, and the answers have come."""
    await asyncio.sleep(number * INTERVAL_S + 0.05)


def test_a_full_worker_is_asked_to_give_to_an_empty_one() -> None:
    async def body(office: Office) -> None:
        full, empty = await office.worker("full", FULL), await office.worker("empty", EMPTY)
        await looks(1)
        (ask,) = full.asked
        assert not empty.asked
        assert (ask.target, ask.destination.worker_id, ask.destination.incarnation) == (7, "empty", 7)
        assert ask.destination.address == "empty:1"
        assert (ask.max_requests, ask.running, ask.waiting, ask.mode) == (1, True, False, "auto")
        assert ask.bandwidth_bytes_per_s == 5e9
        assert ask.reason.startswith("balance: full has 2 blocks for each of 10 answers, fewer than 4; empty has 1e+03")
        assert any(line.startswith("full moves 1 to empty, balance: full has 2 blocks") for line in office.said)
        figures = await office.figures()
        assert (figures.moves_asked_total, figures.moves_begun_total) == ({"balance": 1}, {"balance": 1})
        assert not figures.moves_refused_total
        assert not figures.moves_failed_total

    with_office(body)


def test_none_is_asked_again_before_both_have_told_what_came_of_it() -> None:
    async def body(office: Office) -> None:
        full, empty = await office.worker("full", FULL), await office.worker("empty", EMPTY)
        await looks(3)
        assert len(full.asked) == 1
        # The source tells that one is on its way: that is all that it may give at a time.
        await full.beat(msgspec.structs.replace(FULL, moving_out=1))
        await empty.beat(msgspec.structs.replace(EMPTY, moving_in=1))
        await looks(3)
        assert len(full.asked) == 1
        await full.beat(FULL)
        await looks(2)
        # The other still has it coming.
        assert len(full.asked) == 1
        await empty.beat(EMPTY)
        await looks(1)
        assert len(full.asked) == 2

    with_office(body)


def test_who_begins_nothing_is_left_alone_for_a_while() -> None:
    async def body(office: Office) -> None:
        full, empty = await office.worker("full", FULL), await office.worker("empty", EMPTY)

        async def refuse(ask: MigrateRequest) -> MigrateReply:
            return begun(0, "all of them are young")

        full.answer = refuse
        await looks(5)
        assert len(full.asked) == 1
        assert "full moves nothing to empty: all of them are young" in office.said
        for _ in range(4):
            await asyncio.sleep(RULES.retry_after_s / 4)
            await full.beat(FULL)
            await empty.beat(EMPTY)
        await looks(1)
        assert len(full.asked) == 2
        figures = await office.figures()
        assert figures.moves_refused_total == {"balance": 2}
        assert figures.moves_withheld_total["cooldown"] >= 4

    with_office(body)


def test_who_begins_fewer_than_it_may_is_not_pressed_for_the_rest() -> None:
    async def body(office: Office) -> None:
        full, empty = await office.worker("full", FULL), await office.worker("empty", EMPTY)

        async def begin_one(ask: MigrateRequest) -> MigrateReply:
            return begun(1, "the others are young")

        full.answer = begin_one
        await looks(1)
        assert [ask.max_requests for ask in full.asked] == [2]
        await asyncio.sleep(0.5)
        await full.beat(msgspec.structs.replace(FULL, moving_out=1))
        await empty.beat(msgspec.structs.replace(EMPTY, moving_in=1))
        await looks(3)
        assert len(full.asked) == 1
        figures = await office.figures()
        assert (figures.moves_begun_total, figures.moves_refused_total) == ({"balance": 1}, {"balance": 1})

    with_office(body, max_moving=2, low_tokens=256.0, high_tokens=512.0)


def test_a_worker_that_fails_to_answer_stops_nobody() -> None:
    async def body(office: Office) -> None:
        broken, hanging = await office.worker("broken", FULL), await office.worker("hanging", FULL)
        await office.worker("empty", EMPTY)
        await office.worker("idle", EMPTY)

        async def fail(ask: MigrateRequest) -> MigrateReply:
            raise NotReady("it is stopping")

        async def hang(ask: MigrateRequest) -> MigrateReply:
            await asyncio.sleep(60)
            return begun(1)

        broken.answer, hanging.answer = fail, hang
        await asyncio.sleep(CALL_TIMEOUT_S + 2 * INTERVAL_S)
        # Each was asked for one of the two that are empty; whoever answered was then asked for the other one, too.
        assert (len(broken.asked), len(hanging.asked)) == (2, 2)
        figures = await office.figures()
        assert figures.moves_failed_total == {"balance": 3}
        assert any(line.startswith("broken was asked to move requests to ") for line in office.said)
        full = await office.worker("full", FULL)
        await office.worker("empty-2", EMPTY)
        await looks(1)
        assert full.asked

    with_office(body)


def test_a_draining_worker_is_asked_as_soon_as_it_tells() -> None:
    async def body(office: Office) -> None:
        ends = await office.worker("ends", msgspec.structs.replace(FULL, free_blocks=500, owned_blocks=500))
        await office.worker("empty", EMPTY)
        await looks(1)
        assert not ends.asked
        await asyncio.sleep(0.6 * INTERVAL_S)
        await ends.beat(msgspec.structs.replace(FULL, draining=True))
        await asyncio.sleep(0.01)
        (ask,) = ends.asked
        assert ask.max_requests == RULES.max_moving_draining
        assert ask.reason.startswith("draining: ends is draining")

    with_office(body, "draining")


def test_who_drains_gets_nothing() -> None:
    async def body(office: Office) -> None:
        full = await office.worker("full", FULL)
        await office.worker("leaves", msgspec.structs.replace(EMPTY, draining=True))
        await looks(2)
        assert not full.asked
        assert (await office.figures()).moves_withheld_total == {"no_peer": 2}

    with_office(body)


def test_suspects_give_and_get_nothing() -> None:
    async def body(office: Office) -> None:
        full, empty = await office.worker("full", FULL), await office.worker("empty", EMPTY)
        third = await office.worker("third", msgspec.structs.replace(EMPTY, free_blocks=100, owned_blocks=900))
        await looks(1)
        for _ in range(4):
            await asyncio.sleep(0.5)
            await full.beat(FULL)
            await third.beat(msgspec.structs.replace(EMPTY, free_blocks=100, owned_blocks=900))
        asked = len(full.asked)
        await looks(3)
        assert len(full.asked) == asked
        await empty.beat(EMPTY)
        await looks(1)
        assert len(full.asked) == asked + 1

    with_office(body)


def test_a_life_that_ended_is_asked_nothing_more_and_holds_up_nobody() -> None:
    async def body(office: Office) -> None:
        full, empty = await office.worker("full", FULL), await office.worker("empty", EMPTY)
        await looks(1)
        await empty.leave()
        await office.worker("new", EMPTY)
        await looks(1)
        # The move to the one that left is not waited for.
        assert [ask.destination.worker_id for ask in full.asked] == ["empty", "new"]

    with_office(body)


def test_prompts_are_not_all_sent_to_the_same_worker() -> None:
    async def body(office: Office) -> None:
        waits = WorkerLoad(free_blocks=BLOCKS, waiting_requests=8, waiting_prompts=8, pending_prompt_tokens=8000)
        ends = await office.worker("ends", msgspec.structs.replace(waits, draining=True), "prefill")
        await office.worker("a", EMPTY, "prefill")
        await looks(1)
        # Four at a time; what was asked for is not asked for again.
        assert [ask.max_requests for ask in ends.asked] == [4]
        await looks(1)
        assert [ask.max_requests for ask in ends.asked] == [4, 4]
        await looks(2)
        assert len(ends.asked) == 2
        assert all(ask.waiting and not ask.running for ask in ends.asked)

    with_office(body, "draining")


def test_nothing_moves_unless_it_is_asked_for() -> None:
    async def body(office: Office) -> None:
        full = await office.worker("full", FULL)
        await office.worker("empty", EMPTY)
        await looks(5)
        assert not full.asked

    with_office(body, "draining")
