"""The coordinator's shell, on virtual time: what workers and gateways hear, and what a bug in its upkeep does."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from contracts.control_messages import (
    OPERATE,
    OPERATIONS,
    DrainOperation,
    OperateReply,
    OperateRequest,
    OperationsRequest,
)
from contracts.errors import BadRequest, StaleIncarnation
from contracts.ids import GatewayId, Incarnation, RequestId, WorkerId
from contracts.messages import (
    BLOCK_EVENTS,
    DEREGISTER,
    DISPATCH,
    HEARTBEAT,
    MEMBERS,
    REGISTER,
    BlockEvents,
    BlockEventsReply,
    DeregisterRequest,
    DispatchItem,
    DispatchRequest,
    Empty,
    HeartbeatReply,
    HeartbeatRequest,
    LinkReport,
    MembersReply,
    Placement,
    Rejection,
    TransferReport,
    WorkerInfo,
    WorkerLife,
    WorkerLoad,
)
from coordinator import CoordinatorShell
from coordinator.decision import Chosen, Refused
from coordinator.live_costs import LiveCosts
from coordinator.refusal_lines import MAX_LINES_PER_S
from coordinator.shell import default_conductor
from rpc import MemoryNetwork
from simulator import Program, VirtualClock, run
from simulator.engine import modelled_identity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from contracts.control_messages import Operation

INFO = WorkerInfo(
    worker_id=WorkerId("w0"),
    incarnation=Incarnation(1),
    role="mixed",
    address="w0:1",
    model="m",
    identity=modelled_identity(),
    total_blocks=8,
    max_context_tokens=64,
)


HINTS = bytes(range(16))


class Office:
    """A coordinator that listens, and calls to it."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(rng=random.Random(1), host="c")
        self.said: list[str] = []
        self.decided: list[tuple[DispatchItem, Chosen | Refused, float]] = []
        self.costs = LiveCosts()
        self.shell = CoordinatorShell(
            VirtualClock(),
            conductor=default_conductor(self.costs),
            on_decision=lambda item, decision, now_s: self.decided.append((item, decision, now_s)),
            on_transfers=self.costs.observe_transfers,
            on_gone=self.costs.forget_links,
            network=self.network,
            log=self.said.append,
        )
        server = self.network.server("c:1")
        self.shell.register_on(server)
        self.start = server.start

    async def register(self, name: str, incarnation: int = 1, **more: object) -> None:
        info = msgspec.structs.replace(INFO, worker_id=WorkerId(name), incarnation=Incarnation(incarnation), **more)
        await self.network.channel("c:1").call(REGISTER, info, timeout_s=1)

    async def operate(self, operation: Operation) -> OperateReply:
        return await self.network.channel("c:1").call(OPERATE, OperateRequest(operation=operation), timeout_s=1)

    async def beat(
        self, name: str, *, load: WorkerLoad | None = None, transfers: TransferReport | None = None
    ) -> HeartbeatReply:
        beat = HeartbeatRequest(
            worker_id=WorkerId(name),
            incarnation=Incarnation(1),
            load=load or WorkerLoad(free_blocks=8),
            transfers=transfers,
        )
        return await self.network.channel("c:1").call(HEARTBEAT, beat, timeout_s=1)

    async def tell(self, name: str, start: int, keys: bytes, stored: bytes, incarnation: int = 1) -> BlockEventsReply:
        events = BlockEvents(
            worker_id=WorkerId(name), incarnation=Incarnation(incarnation), start=start, keys=keys, stored=stored
        )
        return await self.network.channel("c:1").call(BLOCK_EVENTS, events, timeout_s=1)

    async def ask(self, *names: str, **more: object) -> tuple[Placement | Rejection, ...]:
        items = tuple(
            DispatchItem(request_id=RequestId(name), prompt_tokens=40, max_tokens=4, **more)  # type: ignore[arg-type]
            for name in names
        )
        ask = DispatchRequest(gateway_id=GatewayId("g"), items=items)
        return (await self.network.channel("c:1").call(DISPATCH, ask, timeout_s=1)).verdicts

    async def members(self) -> MembersReply:
        return await self.network.channel("c:1").call(MEMBERS, Empty(), timeout_s=1)

    async def keep_up(self, *names: str, for_s: float) -> None:
        for _ in range(round(for_s / 0.5)):
            await asyncio.sleep(0.5)
            for name in names:
                await self.beat(name)


def with_office(body: Callable[[Office], Awaitable[None]]) -> None:
    async def main(program: Program) -> None:
        office = Office()
        await office.start()
        async with office.shell:
            await body(office)

    run(main, seed=1)


def where(verdict: Placement | Rejection) -> str:
    return verdict.prefill.worker_id if isinstance(verdict, Placement) else f"{verdict.code}: {verdict.message}"


def test_a_heartbeat_is_answered_with_who_is_gone() -> None:
    async def main(program: Program) -> None:
        office = Office()
        await office.start()
        async with office.shell:
            await office.register("w0")
            await office.register("w1")
            assert await office.beat("w0") == HeartbeatReply(known=True)
            for _ in range(7):
                await asyncio.sleep(0.5)
                await office.beat("w0")
            assert await office.beat("w0") == HeartbeatReply(
                known=True, gone=(WorkerLife(WorkerId("w1"), Incarnation(1)),)
            )
            assert [line for line in office.said if "lost" in line] == [
                "worker lost: w1 incarnation 1: no heartbeat for 3.0 s"
            ]
            with pytest.raises(StaleIncarnation, match="was given up"):
                await office.beat("w1")

    run(main, seed=1)


def test_a_bug_in_its_upkeep_ends_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that notices no deaths any more is worse than none."""

    async def serve(office: Office, broken: Callable[[float], list[str]]) -> None:
        async with office.shell:
            await asyncio.sleep(5)
            monkeypatch.setattr(office.shell.membership, "expire", broken)
            await asyncio.sleep(60)
            raise AssertionError("its body goes on")

    def broken(now_s: float) -> list[str]:
        raise ZeroDivisionError("a bug")

    async def main(program: Program) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await serve(Office(), broken)
        assert caught.group_contains(ZeroDivisionError)

    run(main, seed=1)


# --- requests -------------------------------------------------------------------------------------------


def test_a_burst_is_spread_and_each_decision_is_heard() -> None:
    async def body(office: Office) -> None:
        for name in ("w0", "w1"):
            await office.register(name)
        verdicts = await office.ask("a", "b", "c", "d")
        assert sorted(where(verdict) for verdict in verdicts) == ["w0", "w0", "w1", "w1"]
        assert [verdict.request_id for verdict in verdicts] == ["a", "b", "c", "d"]
        infos = office.shell.conductor.fleet.view().infos
        assert [item.request_id for item, _, _ in office.decided] == ["a", "b", "c", "d"]
        for verdict, (_, decision, _) in zip(verdicts, office.decided, strict=True):
            assert isinstance(decision, Chosen)
            assert infos[decision.prefill_row].worker_id == where(verdict)

    with_office(body)


def test_verdicts_are_counted_by_reason_and_timed() -> None:
    async def body(office: Office) -> None:
        (verdict,) = await office.ask("early")
        assert isinstance(verdict, Rejection)
        assert verdict.reason == "no_prefill"
        await office.register("w0")
        await office.ask("a", "b")
        figures = (await office.members()).coordinator
        assert figures is not None
        assert figures.verdicts_total == {"no_prefill": 1, "placement": 2}
        assert figures.decisions_within[-1] == 3
        assert len(figures.decisions_within) == len(figures.decision_bounds_s)
        assert list(figures.decisions_within) == sorted(figures.decisions_within)

    with_office(body)


def test_a_suspect_gets_what_nobody_else_can_take_and_nothing_more() -> None:
    async def body(office: Office) -> None:
        for name in ("w0", "w1"):
            await office.register(name)
        await office.keep_up("w1", for_s=2.0)
        assert [(member.info.worker_id, member.state) for member in (await office.members()).members] == [
            ("w0", "suspect"),
            ("w1", "up"),
        ]
        assert [where(verdict) for verdict in await office.ask("a", "b", "c")] == ["w1"] * 3
        # The other's queue is full: better a suspect than a refusal.
        await office.beat("w1", load=WorkerLoad(waiting_requests=512, free_blocks=8))
        (verdict,) = await office.ask("d")
        assert where(verdict) == "w0"
        assert isinstance(verdict, Placement)
        assert "nobody else than w0, to be avoided" in verdict.reason
        await office.beat("w0")
        assert (await office.members()).members[0].state == "up"

    with_office(body)


def test_where_all_are_suspects_it_is_as_if_none_were() -> None:
    async def body(office: Office) -> None:
        for name in ("w0", "w1"):
            await office.register(name)
        await asyncio.sleep(2.0)
        assert sorted(where(verdict) for verdict in await office.ask("a", "b")) == ["w0", "w1"]
        # One that has just failed is worse than one that is late.
        assert [where(verdict) for verdict in await office.ask("c", avoid=(WorkerId("w0"),))] == ["w1"]

    with_office(body)


def test_who_drains_gets_nothing_and_who_is_about_to_neither() -> None:
    async def body(office: Office) -> None:
        for name in ("w0", "w1", "w2"):
            await office.register(name)
        await office.beat("w0", load=WorkerLoad(free_blocks=8, draining=True))
        number = (await office.operate(DrainOperation(worker_id=WorkerId("w1")))).operation_id
        verdicts = await office.ask(*(f"r{n}" for n in range(9)))
        assert {where(verdict) for verdict in verdicts} == {"w2"}
        await office.beat("w0")
        await office.network.channel("c:1").call(OPERATIONS, OperationsRequest(cancel=number), timeout_s=1)
        verdicts = await office.ask(*(f"s{n}" for n in range(9)))
        assert {where(verdict) for verdict in verdicts} == {"w0"}, "the idle one, and w1 may still refuse"

    with_office(body)


def test_who_drains_is_not_even_used_where_there_is_nobody_else() -> None:
    async def body(office: Office) -> None:
        await office.register("w0")
        await office.beat("w0", load=WorkerLoad(free_blocks=8, draining=True))
        (verdict,) = await office.ask("r0")
        assert isinstance(verdict, Rejection)
        assert verdict.code == "not_ready"

    with_office(body)


def test_a_worker_that_took_another_role_is_placed_by_it_and_keeps_its_life() -> None:
    async def body(office: Office) -> None:
        for name, role in (("w0", "prefill"), ("w1", "decode"), ("w2", "decode")):
            await office.register(name, role=role)
        assert {where(verdict) for verdict in await office.ask(*(f"r{n}" for n in range(6)))} == {"w0"}
        await office.register("w2", role="prefill")
        await office.beat("w2")
        assert "w2" in {where(verdict) for verdict in await office.ask(*(f"s{n}" for n in range(6)))}
        assert (await office.beat("w0")).gone == (), "nobody's leases are void"

    with_office(body)


def test_workers_of_another_protocol_are_never_paired_with_the_others() -> None:
    async def body(office: Office) -> None:
        newer = msgspec.structs.replace(INFO.identity, protocol_version=INFO.identity.protocol_version + 1)
        for name, role, identity in (
            ("old-p", "prefill", INFO.identity),
            ("old-d", "decode", INFO.identity),
            ("new-p", "prefill", newer),
            ("new-d", "decode", newer),
        ):
            await office.register(name, role=role, identity=identity)
        verdicts = await office.ask(*(f"r{n}" for n in range(20)))
        pairs = {(v.prefill.worker_id, v.decode.worker_id) for v in verdicts if isinstance(v, Placement)}
        assert pairs == {("old-p", "old-d"), ("new-p", "new-d")}
        await office.beat("old-d", load=WorkerLoad(free_blocks=8, draining=True))
        verdicts = await office.ask(*(f"s{n}" for n in range(20)))
        pairs = {(v.prefill.worker_id, v.decode.worker_id) for v in verdicts if isinstance(v, Placement)}
        assert pairs == {("new-p", "new-d")}

    with_office(body)


def test_who_said_goodbye_gets_nothing_more() -> None:
    async def body(office: Office) -> None:
        for name in ("w0", "w1"):
            await office.register(name)
        leave = DeregisterRequest(worker_id=WorkerId("w0"), incarnation=Incarnation(1), reason="ends")
        await office.network.channel("c:1").call(DEREGISTER, leave, timeout_s=1)
        assert [where(verdict) for verdict in await office.ask("a", "b")] == ["w1", "w1"]
        assert office.said[-1] == "worker left: w0 incarnation 1: ends"

    with_office(body)


def test_while_everybody_is_silent_nobody_gets_requests() -> None:
    async def body(office: Office) -> None:
        for name in ("w0", "w1"):
            await office.register(name)
        await asyncio.sleep(5.0)
        (verdict,) = await office.ask("a")
        assert isinstance(verdict, Rejection)
        assert verdict.code == "not_ready"
        await office.beat("w1")
        assert where((await office.ask("b"))[0]) == "w1"
        # The other has not had the time to be heard.
        assert {one.info.worker_id: one.state for one in (await office.members()).members} == {
            "w0": "suspect",
            "w1": "up",
        }

    with_office(body)


def test_a_new_life_on_the_same_address_is_a_new_worker() -> None:
    async def body(office: Office) -> None:
        for name in ("w0", "w1"):
            await office.register(name)
        await office.tell("w0", 0, HINTS, b"\1\1")
        assert len(await office.ask(*"abcd")) == 4
        await office.register("w0", incarnation=2)
        fleet = office.shell.fleet()
        assert [info.incarnation for info in fleet.infos] == [2, 1]
        assert fleet.prefill_load_tokens.tolist()[0] == 0, "what was placed on its last life is not its load"
        match = office.shell.conductor.directory.match(np.frombuffer(HINTS, np.uint64))
        assert match.best == 0, "nor does it hold what that one held"
        with pytest.raises(StaleIncarnation):
            await office.tell("w0", 2, HINTS, b"\1\1")

    with_office(body)


# --- what workers tell ----------------------------------------------------------------------------------


def test_block_events_place_prompts_and_gaps_are_asked_for() -> None:
    async def body(office: Office) -> None:
        assert await office.tell("w1", 0, HINTS, b"\1\1") == BlockEventsReply(known=False)
        for name in ("w0", "w1"):
            await office.register(name)
        assert (await office.tell("w1", 0, HINTS, b"\1\1")).expected == 2
        assert (await office.tell("w1", 5, HINTS, b"\1\1")).expected == 2, "2, 3 and 4 are missing"
        (verdict,) = await office.ask("a", block_keys=HINTS)
        assert isinstance(verdict, Placement)
        assert where(verdict) == "w1"
        assert verdict.prefix is not None
        assert verdict.prefix.local_blocks == 2
        figures = (await office.members()).coordinator
        assert figures is not None
        assert (figures.directory_blocks, figures.block_events_total, figures.block_gaps_total) == (2, 2, 1)

    with_office(body)


def test_events_that_make_no_sense_are_refused() -> None:
    async def body(office: Office) -> None:
        await office.register("w0")
        with pytest.raises(BadRequest, match="keys has 3 bytes"):
            await office.tell("w0", 0, b"abc", b"\1")

    with_office(body)


def test_what_left_workers_held_is_swept_when_there_is_time() -> None:
    async def body(office: Office) -> None:
        await office.register("w0")
        for start in range(0, 4000, 1000):
            keys = b"".join((start + number + 1).to_bytes(8, "little") for number in range(1000))
            await office.tell("w0", start, keys, b"\1" * 1000)
        await office.register("w0", incarnation=2)
        figures = (await office.members()).coordinator
        assert figures is not None
        assert figures.directory_blocks == 4000
        await asyncio.sleep(5.0)
        figures = (await office.members()).coordinator
        assert figures is not None
        assert figures.directory_blocks == 0

    with_office(body)


def test_measured_links_become_costs() -> None:
    async def body(office: Office) -> None:
        await office.register("w0")
        link = LinkReport(peer=WorkerId("w1"), transport="shm", bandwidth_bytes_per_s=5e9, latency_s=1e-4, chosen=True)
        assert office.costs.transfer.bandwidth_bytes_s == 1e9
        await office.beat("w0", transfers=TransferReport(links=(link,)))
        assert office.costs.transfer.bandwidth_bytes_s == 5e9
        assert office.costs.num_remembered == 2
        await asyncio.sleep(5.0)
        assert office.costs.num_remembered == 1, "it is gone, and its links with it"

    with_office(body)


def test_every_refusal_is_logged_with_its_inputs_or_counted() -> None:
    async def body(office: Office) -> None:
        await office.ask("r0")
        (line,) = [line for line in office.said if line.startswith("refused: ")]
        assert "no prefill worker" in line
        assert '"request":"r0"' in line
        for _ in range(4):
            await office.ask(*(f"r{number}" for number in range(60)))
        await asyncio.sleep(2.0)
        lines = [line for line in office.said if line.startswith("refused: ")]
        assert len(lines) == MAX_LINES_PER_S + 1
        assert lines[-1] == "refused: 41 more within a second, not told one by one"

    with_office(body)
