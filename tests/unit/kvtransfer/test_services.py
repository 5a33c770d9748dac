"""Both lease services over the in-memory network and transport, on virtual time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec
import pytest

from contracts.errors import (
    Cancelled,
    IncompatiblePeer,
    NoCapacity,
    TandemError,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.ids import BlockId, GatewayId, Incarnation, LeaseId, RequestId, WorkerId
from contracts.messages import HANDOFF, HandoffReply, HandoffRequest, LeaseTerms, Peer, Seal
from contracts.requests import GenerateRequest, SamplingParams
from kvtransfer import HolderService, LeaseOutcome, Ledger, MemoryFabric, ReaderService, TransportSet
from kvtransfer.memory import PullFate, PullInfo, steady_link
from rpc import MemoryNetwork
from simulator import Program, VirtualClock, run
from tests.support.pools import register_pool
from tests.unit.kvtransfer.builders import IDENTITY, SEAL

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Iterator

    from rpc import CallContext
    from rpc.memory import MemoryProcess

Result = TypeVar("Result")

TTL_S = 8.0
NUM_BLOCKS = 16
BLOCK_BYTES = 64
REQUEST = GenerateRequest(
    request_id=RequestId("q"),
    gateway_id=GatewayId("g"),
    token_ids=(1,),
    num_prompt_tokens=1,
    sampling=SamplingParams(max_tokens=1),
    deadline_s=60.0,
)


def content(stamp: int, num_blocks: int) -> list[bytes]:
    return [bytes([stamp]) * BLOCK_BYTES] * num_blocks


class BenchPool:
    """`kvtransfer.Pool` over one side's memory."""

    num_blocks = NUM_BLOCKS
    block_bytes = BLOCK_BYTES
    address = 0

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def view(self) -> memoryview:
        return self._memory


async def at_once(work: Callable[[], Result], /) -> Result:
    """Block work on the loop itself: threads have no place on virtual time."""
    return work()


@dataclass
class Ends:
    """What the callbacks of one side were told; each lease once."""

    by_lease: dict[LeaseId, object] = field(default_factory=dict[LeaseId, object])
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, lease_id: LeaseId, end: object) -> None:
        assert lease_id not in self.by_lease, f"{lease_id} ended twice"
        self.by_lease[lease_id] = end
        self.changed.set()

    async def of(self, lease_id: LeaseId) -> object:
        async with asyncio.timeout(100):
            while lease_id not in self.by_lease:
                self.changed.clear()
                await self.changed.wait()
        return self.by_lease[lease_id]


class PrefillSide:
    """A worker that grants leases."""

    def __init__(self, cluster: Cluster, incarnation: int) -> None:
        self.network: MemoryProcess = cluster.network.process("p")
        self.ledger = Ledger(NUM_BLOCKS)
        self.transport = cluster.fabric.transport("p")
        self.pool = register_pool(self.transport, NUM_BLOCKS, BLOCK_BYTES)
        self.server = self.network.server("p:0")
        self.ends = Ends()
        self.clock = VirtualClock(offset_s=1000.0)
        self.checksum = cluster.checksum
        self.incarnation = incarnation
        self.identity = IDENTITY

    async def start(self, stack: AsyncExitStack) -> None:
        address = await self.server.start()
        self.me = Peer(worker_id=WorkerId("p"), incarnation=Incarnation(self.incarnation), address=address)
        self.service = HolderService(
            ledger=self.ledger,
            network=self.network,
            clock=self.clock,
            worker=self.me,
            identity=self.identity,
            transports=TransportSet((self.transport,)),
            ttl_s=TTL_S,
            pool=BenchPool(self.pool),
            checksum=self.checksum,
            offload=at_once,
            log=print,
        )
        self.service.register(self.server)
        await stack.enter_async_context(self.service)

    def open(self, reader: Peer, num_blocks: int, max_age_s: float | None = None) -> tuple[LeaseId, list[BlockId]]:
        blocks = self.ledger.allocate(f"prompt {num_blocks}", num_blocks)
        assert blocks is not None

        async def send_offer(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            body = HandoffRequest(target=reader.incarnation, terms=terms, request=REQUEST)
            return await self.network.channel(reader.address).call(HANDOFF, body, timeout_s=timeout_s)

        lease_id = self.service.open(
            blocks,
            reader,
            send_offer=send_offer,
            on_ended=lambda lease_id, outcome, reason: self.ends.put(lease_id, outcome),
            max_age_s=max_age_s,
        )
        return lease_id, blocks

    def write(self, blocks: list[BlockId], stamp: int) -> None:
        for block in blocks:
            self.pool[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([stamp]) * BLOCK_BYTES

    def release(self, blocks: list[BlockId]) -> None:
        self.ledger.release(f"prompt {len(blocks)}", blocks)


class StoppableClock(VirtualClock):
    """As a process that was stopped for `stopped_s` reads it before any of its timers has run."""

    stopped_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.stopped_s


class DecodeSide:
    """A worker that takes leases."""

    def __init__(self, cluster: Cluster) -> None:
        self.network: MemoryProcess = cluster.network.process("d")
        self.ledger = Ledger(NUM_BLOCKS)
        self.transport = cluster.fabric.transport("d")
        self.pool = register_pool(self.transport, NUM_BLOCKS, BLOCK_BYTES)
        self.server = self.network.server("d:0")
        self.ends = Ends()
        self.verdicts: list[str] = []
        self.clock = StoppableClock(offset_s=5.0)
        self.checksum = cluster.checksum
        #: So many leading blocks of what is offered are here.
        self.have = 0

    async def start(self, stack: AsyncExitStack) -> None:
        self.service = ReaderService(
            ledger=self.ledger,
            network=self.network,
            clock=self.clock,
            transports=TransportSet((self.transport,)),
            identity=IDENTITY,
            max_waiting=2,
            pool=BenchPool(self.pool),
            checksum=self.checksum,
            offload=at_once,
            log=print,
        )
        self.service.register(self.server)
        self.server.register(HANDOFF, self._handoff)
        address = await self.server.start()
        self.me = Peer(worker_id=WorkerId("d"), incarnation=Incarnation(1), address=address)
        await stack.enter_async_context(self.service)

    async def _handoff(self, body: HandoffRequest, context: CallContext) -> HandoffReply:
        reply = self.service.offer(
            body.terms,
            owner=body.terms.lease_id,
            on_adopted=self._adopted,
            on_aborted=self.ends.put,
            have=self.have,
        )
        self.verdicts.append(reply.verdict)
        return reply

    def _adopted(self, lease_id: LeaseId, blocks: list[BlockId], seal: Seal) -> None:
        stamps = [bytes(self.pool[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) for block in blocks]
        self.ends.put(lease_id, (stamps, seal))

    def release(self, lease_id: LeaseId) -> None:
        self.ledger.release_all(lease_id)
        self.service.blocks_freed()


class Cluster:
    """One prefill and one decode worker."""

    def __init__(
        self,
        program: Program,
        stack: AsyncExitStack,
        fate: Callable[[PullInfo], PullFate],
        *,
        checksum: bool = False,
    ) -> None:
        self.checksum = checksum
        self.rng: random.Random = program.rng("test")
        self.stack = stack
        self.network = MemoryNetwork(rng=program.rng("network"))
        self.fabric = MemoryFabric(fate)
        self.prefill = PrefillSide(self, 1)
        self.decode = DecodeSide(self)

    async def check_rest(self) -> None:
        """Nothing is held on either side, and all books are right."""
        await asyncio.sleep(0.1)
        for side in (self.prefill, self.decode):
            side.ledger.check()
            side.service.check()
            assert side.ledger.load()["free_blocks"] == NUM_BLOCKS, side.ledger
            assert side.service.num_leases == 0


def on_cluster(
    scenario: Callable[[Cluster], Coroutine[None, None, None]],
    *,
    fate: Callable[[PullInfo], PullFate] = steady_link,
    seed: int = 1,
    checksum: bool = False,
) -> None:
    async def main(program: Program) -> None:
        async with AsyncExitStack() as stack:
            cluster = Cluster(program, stack, fate, checksum=checksum)
            await cluster.decode.start(stack)
            await cluster.prefill.start(stack)
            await scenario(cluster)

    run(main, seed=seed, limit_s=600.0)


async def hand_off(cluster: Cluster, num_blocks: int, stamp: int) -> LeaseId:
    """One handoff in three chunks, to its end on both sides."""
    lease_id, blocks = cluster.prefill.open(cluster.decode.me, num_blocks)
    for stop in range(1, num_blocks):
        cluster.prefill.write(blocks[stop - 1 : stop], stamp)
        cluster.prefill.service.advance(lease_id, stop)
        await asyncio.sleep(0.01)
    cluster.prefill.write(blocks[-1:], stamp)
    cluster.prefill.service.seal(lease_id, num_blocks, SEAL)
    cluster.prefill.release(blocks)
    assert await cluster.decode.ends.of(lease_id) == (content(stamp, num_blocks), SEAL)
    assert await cluster.prefill.ends.of(lease_id) is LeaseOutcome.RELEASED
    return lease_id


def test_handoff() -> None:
    async def scenario(cluster: Cluster) -> None:
        lease_id = await hand_off(cluster, 4, 7)
        assert cluster.decode.verdicts == ["reserved"]
        assert cluster.decode.ledger.blocks_of(lease_id) == [0, 1, 2, 3]
        cluster.decode.release(lease_id)
        await cluster.check_rest()
        counters = cluster.decode.service.counters
        assert (counters.adopted, counters.pulled_bytes) == (1, 4 * BLOCK_BYTES)
        assert counters.pulls == 4
        assert cluster.prefill.service.counters.outcomes == {"released": 1}

    on_cluster(scenario)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("num_sealed", [1, 3, 4])
@pytest.mark.parametrize("num_here", [0, 1, 3, 4])
def test_only_what_is_not_here_and_sealed_crosses(num_here: int, num_sealed: int, *, checksum: bool) -> None:
    """Block by block, and so that blocks are final before and after the reader says what it has."""

    async def scenario(cluster: Cluster) -> None:
        cluster.decode.have = num_here
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 4)
        for position in range(num_sealed):
            cluster.prefill.write(blocks[position : position + 1], position)
            if position < num_sealed - 1:
                cluster.prefill.service.advance(lease_id, position + 1)
                await asyncio.sleep(0.01)
        cluster.prefill.service.seal(lease_id, num_sealed, SEAL)
        cluster.prefill.release(blocks)
        wanted = [bytes([position]) * BLOCK_BYTES for position in range(num_here, num_sealed)]
        assert await cluster.decode.ends.of(lease_id) == (wanted, SEAL)
        assert await cluster.prefill.ends.of(lease_id) is LeaseOutcome.RELEASED
        assert len(cluster.decode.ledger.blocks_of(lease_id)) == len(wanted)
        assert cluster.decode.ledger.load()["free_blocks"] == NUM_BLOCKS - len(wanted)
        counters = cluster.decode.service.counters
        assert (counters.adopted, counters.pulled_bytes) == (1, len(wanted) * BLOCK_BYTES)
        assert counters.checksum_bytes == (len(wanted) * BLOCK_BYTES if checksum else 0)
        cluster.decode.release(lease_id)
        await cluster.check_rest()

    on_cluster(scenario, checksum=checksum)


def test_a_whole_offer_whose_end_is_lacking_is_pulled_at_once() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.decode.have = 2
        prefill, reader = cluster.prefill, cluster.decode.me
        blocks = prefill.ledger.allocate("kept", 3)
        assert blocks is not None
        for stamp, block in enumerate(blocks):
            prefill.write([block], stamp)

        async def send_offer(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            body = HandoffRequest(target=reader.incarnation, terms=terms, request=REQUEST)
            reply = await prefill.network.channel(reader.address).call(HANDOFF, body, timeout_s=timeout_s)
            assert reply.expected == 3
            return reply

        lease_id = prefill.service.open(
            blocks,
            reader,
            send_offer=send_offer,
            on_ended=lambda lease_id, outcome, reason: prefill.ends.put(lease_id, outcome),
            seal=SEAL,
            whole=True,
        )
        prefill.ledger.release_all("kept")
        assert await cluster.decode.ends.of(lease_id) == ([bytes([2]) * BLOCK_BYTES], SEAL)
        assert await prefill.ends.of(lease_id) is LeaseOutcome.RELEASED
        cluster.decode.release(lease_id)
        await cluster.check_rest()

    on_cluster(scenario)


def test_one_round_trip_between_the_last_byte_and_adoption() -> None:
    async def scenario(cluster: Cluster) -> None:
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 3)
        await asyncio.sleep(0.1)
        cluster.prefill.service.seal(lease_id, 3, SEAL)
        cluster.prefill.release(blocks)
        sealed_s = asyncio.get_running_loop().time()
        await cluster.decode.ends.of(lease_id)
        took_s = asyncio.get_running_loop().time() - sealed_s
        pull_s = steady_link(PullInfo(holder="p", reader="d", num_bytes=3 * BLOCK_BYTES)).duration_s
        # One way for the announcement, the pull, and there and back for the question.
        assert took_s <= pull_s + 3 * 0.0004 + 1e-6
        cluster.decode.release(lease_id)
        await cluster.check_rest()

    on_cluster(scenario)


def test_long_prompt_outlives_its_first_term() -> None:
    async def scenario(cluster: Cluster) -> None:
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 2)
        await asyncio.sleep(10 * TTL_S)
        cluster.prefill.write(blocks, 9)
        cluster.prefill.service.seal(lease_id, 2, SEAL)
        cluster.prefill.release(blocks)
        assert await cluster.decode.ends.of(lease_id) == (content(9, 2), SEAL)
        cluster.decode.release(lease_id)
        await cluster.check_rest()

    on_cluster(scenario)


def test_full_reader_takes_turns() -> None:
    async def scenario(cluster: Cluster) -> None:
        first = await hand_off(cluster, 15, 1)
        async with asyncio.TaskGroup() as group:
            group.create_task(hand_off(cluster, 2, 2))
            group.create_task(hand_off(cluster, 3, 3))
            await asyncio.sleep(2 * TTL_S)
            assert cluster.decode.verdicts[1:] == ["waiting", "waiting"]
            assert cluster.decode.service.leases_by_state()["waiting"] == 2
            cluster.decode.release(first)
        for lease_id in list(cluster.decode.ends.by_lease):
            cluster.decode.release(lease_id)
        await cluster.check_rest()

    on_cluster(scenario)


def test_offer_to_a_reader_without_any_room_waits_as_long_as_it_may() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.decode.ledger.allocate("others", NUM_BLOCKS)
        opened = [
            cluster.prefill.open(cluster.decode.me, n, age_s) for n, age_s in ((1, None), (2, None), (3, 5 * TTL_S))
        ]
        before_s = asyncio.get_running_loop().time()
        end = await cluster.prefill.ends.of(opened[2][0])
        assert end is LeaseOutcome.EXPIRED
        assert asyncio.get_running_loop().time() - before_s == pytest.approx(5 * TTL_S, abs=0.1)
        assert cluster.prefill.service.counters.failed_calls[f"offer: {NoCapacity.code}"] > 5
        for lease_id, blocks in opened[:2]:
            cluster.prefill.service.withdraw(lease_id, "client left")
            assert isinstance(await cluster.decode.ends.of(lease_id), Cancelled)
            cluster.prefill.release(blocks)
        cluster.prefill.release(opened[2][1])
        cluster.decode.ledger.release_all("others")
        await cluster.check_rest()

    on_cluster(scenario)


def test_incompatible_reader_refuses() -> None:
    async def scenario(cluster: Cluster) -> None:
        other = PrefillSide(cluster, 2)
        other.identity = msgspec.structs.replace(IDENTITY, rope_base=1.0)
        await other.start(cluster.stack)
        lease_id, _ = other.open(cluster.decode.me, 1)
        assert await other.ends.of(lease_id) is LeaseOutcome.REFUSED
        assert other.service.counters.failed_calls == {f"offer: {IncompatiblePeer.code}": 1}

    on_cluster(scenario)


def test_cancel_during_a_pull_that_cannot_be_stopped_quarantines() -> None:
    def deaf(info: PullInfo) -> PullFate:
        return PullFate(duration_s=5.0, heeds_stop=False)

    async def scenario(cluster: Cluster) -> None:
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 3)
        cluster.prefill.service.advance(lease_id, 2)
        await asyncio.sleep(0.1)
        cluster.decode.service.cancel(lease_id, "client left")
        assert isinstance(await cluster.decode.ends.of(lease_id), Cancelled)
        assert cluster.decode.ledger.load()["quarantined_blocks"] == 3
        assert await cluster.prefill.ends.of(lease_id) is LeaseOutcome.REFUSED
        cluster.prefill.release(blocks)
        await asyncio.sleep(4.0)
        assert cluster.decode.ledger.load()["quarantined_blocks"] == 3
        await asyncio.sleep(1.0)
        await cluster.check_rest()

    on_cluster(scenario, fate=deaf)


def test_a_pull_that_ended_while_its_reader_was_stopped_beyond_the_lease_s_term() -> None:
    """It hears of the pull's end first when it goes on, and finds by that that the lease is over: no pull is left to
    stop, and the blocks are free at once."""

    async def scenario(cluster: Cluster) -> None:
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 3)
        cluster.prefill.service.advance(lease_id, 2)
        await asyncio.sleep(0.1)
        assert cluster.decode.ledger.load()["reserved_blocks"] == 3
        cluster.decode.clock.stopped_s += 2 * TTL_S
        error = await cluster.decode.ends.of(lease_id)
        assert asyncio.get_running_loop().time() == pytest.approx(0.5, abs=0.01), "the pull's end"
        assert isinstance(error, TransferAborted)
        assert "did not renew" in error.message
        cluster.prefill.release(blocks)
        await asyncio.sleep(0.1)
        await cluster.check_rest()

    on_cluster(scenario, fate=lambda _: PullFate(duration_s=0.5))


def test_withdrawal_stops_the_pull() -> None:
    def slow(info: PullInfo) -> PullFate:
        return PullFate(duration_s=5.0)

    async def scenario(cluster: Cluster) -> None:
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 3)
        cluster.prefill.service.advance(lease_id, 2)
        await asyncio.sleep(0.1)
        cluster.prefill.service.withdraw(lease_id, "client left")
        assert cluster.prefill.ends.by_lease[lease_id] is LeaseOutcome.WITHDRAWN
        cluster.prefill.release(blocks)
        error = await cluster.decode.ends.of(lease_id)
        assert isinstance(error, Cancelled)
        assert "client left" in error.message
        await cluster.check_rest()

    on_cluster(scenario, fate=slow)


def test_failed_pull_ends_both_sides() -> None:
    def broken(info: PullInfo) -> PullFate:
        return PullFate(duration_s=0.1, error=WorkerUnavailable("link down"))

    async def scenario(cluster: Cluster) -> None:
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 3)
        cluster.prefill.service.seal(lease_id, 3, SEAL)
        cluster.prefill.release(blocks)
        error = await cluster.decode.ends.of(lease_id)
        assert isinstance(error, TransferAborted)
        assert "link down" in error.message
        assert await cluster.prefill.ends.of(lease_id) is LeaseOutcome.REFUSED
        await cluster.check_rest()

    on_cluster(scenario, fate=broken)


def test_dead_reader_costs_the_holder_one_term() -> None:
    async def scenario(cluster: Cluster) -> None:
        lease_id, blocks = cluster.prefill.open(cluster.decode.me, 3)
        await asyncio.sleep(0.1)
        cluster.decode.network.kill()
        cluster.prefill.service.seal(lease_id, 3, SEAL)
        cluster.prefill.release(blocks)
        before_s = asyncio.get_running_loop().time()
        assert await cluster.prefill.ends.of(lease_id) is LeaseOutcome.EXPIRED
        assert asyncio.get_running_loop().time() - before_s <= TTL_S
        assert cluster.prefill.ledger.load()["free_blocks"] == NUM_BLOCKS

    on_cluster(scenario)


def test_known_death_of_a_reader_costs_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        lease_id, _ = cluster.prefill.open(cluster.decode.me, 3)
        await asyncio.sleep(0.1)
        cluster.prefill.service.reader_gone(WorkerId("d"), Incarnation(1))
        assert cluster.prefill.ends.by_lease[lease_id] is LeaseOutcome.EXPIRED
        cluster.prefill.service.reader_gone(WorkerId("d"), Incarnation(1))

    on_cluster(scenario)


def test_dead_holder_costs_the_reader_one_term() -> None:
    async def scenario(cluster: Cluster) -> None:
        lease_id, _ = cluster.prefill.open(cluster.decode.me, 3)
        await asyncio.sleep(0.1)
        cluster.prefill.network.kill()
        cluster.prefill.transport.crash()
        before_s = asyncio.get_running_loop().time()
        assert isinstance(await cluster.decode.ends.of(lease_id), TransferAborted)
        assert asyncio.get_running_loop().time() - before_s <= TTL_S
        assert cluster.decode.ledger.load()["free_blocks"] == NUM_BLOCKS

    on_cluster(scenario)


def test_next_life_of_a_holder_ends_the_leases_of_the_last() -> None:
    async def scenario(cluster: Cluster) -> None:
        lease_id, _ = cluster.prefill.open(cluster.decode.me, 3)
        await asyncio.sleep(0.1)
        cluster.prefill.network.kill()
        reborn = PrefillSide(cluster, 2)
        await reborn.start(cluster.stack)
        reborn.open(cluster.decode.me, 1)
        await asyncio.sleep(0.1)
        assert isinstance(cluster.decode.ends.by_lease[lease_id], TransferAborted)
        assert cluster.decode.service.leases_by_state()["reserved"] == 1
        cluster.decode.service.holder_gone(WorkerId("p"), Incarnation(2))
        assert len(cluster.decode.ends.by_lease) == 2

    on_cluster(scenario)


def test_stopping_ends_every_lease_once_and_tells_the_peers() -> None:
    async def main(program: Program) -> None:
        async with AsyncExitStack() as readers, AsyncExitStack() as holders:
            cluster = Cluster(program, readers, steady_link)
            await cluster.decode.start(readers)
            await cluster.prefill.start(holders)
            leases = [cluster.prefill.open(cluster.decode.me, n)[0] for n in (1, 2, 3)]
            cluster.prefill.service.advance(leases[2], 2)
            await asyncio.sleep(0.5)
            await holders.aclose()
            assert set(cluster.prefill.ends.by_lease.values()) == {LeaseOutcome.WITHDRAWN}
            assert all(isinstance(end, Cancelled) for end in cluster.decode.ends.by_lease.values())
            assert len(cluster.decode.ends.by_lease) == 3
            assert cluster.decode.ledger.load()["free_blocks"] == NUM_BLOCKS
            with pytest.raises(WorkerUnavailable, match="stopping"):
                cluster.prefill.open(cluster.decode.me, 4)

    run(main, seed=1, limit_s=60.0)


def test_stopping_reader_waits_for_its_pulls_and_tells_the_holder() -> None:
    def slow(info: PullInfo) -> PullFate:
        return PullFate(duration_s=1.0, heeds_stop=False)

    async def main(program: Program) -> None:
        async with AsyncExitStack() as holders, AsyncExitStack() as readers:
            cluster = Cluster(program, holders, slow)
            await cluster.decode.start(readers)
            await cluster.prefill.start(holders)
            lease_id, _ = cluster.prefill.open(cluster.decode.me, 3)
            cluster.prefill.service.advance(lease_id, 2)
            await asyncio.sleep(0.5)
            await readers.aclose()
            assert isinstance(cluster.decode.ends.by_lease[lease_id], Cancelled)
            assert cluster.decode.ledger.load()["free_blocks"] == NUM_BLOCKS
            assert cluster.prefill.ends.by_lease[lease_id] is LeaseOutcome.REFUSED

    run(main, seed=1, limit_s=60.0)


def test_stopping_gives_up_on_silent_peers() -> None:
    async def main(program: Program) -> None:
        async with AsyncExitStack() as readers, AsyncExitStack() as holders:
            cluster = Cluster(program, readers, steady_link)
            await cluster.decode.start(readers)
            await cluster.prefill.start(holders)
            cluster.prefill.open(cluster.decode.me, 3)
            await asyncio.sleep(0.5)
            cluster.prefill.network.kill()
            before_s = asyncio.get_running_loop().time()
            await holders.aclose()
            assert asyncio.get_running_loop().time() - before_s <= 1.0 + 1e-6

    run(main, seed=1, limit_s=60.0)


def test_an_error_in_the_body_leaves_as_it_is() -> None:
    async def scenario(cluster: Cluster) -> None:
        raise TransferAborted("mine")

    with pytest.raises(TransferAborted, match="mine"):
        on_cluster(scenario)


def test_a_bug_in_a_callback_ends_the_service() -> None:
    async def scenario(cluster: Cluster) -> None:
        def broken(lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
            raise ZeroDivisionError

        async def send_offer(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            raise IncompatiblePeer("never")

        blocks = cluster.prefill.ledger.allocate("r", 1)
        assert blocks is not None
        cluster.prefill.service.open(blocks, cluster.decode.me, send_offer=send_offer, on_ended=broken)
        await asyncio.sleep(1.0)
        raise AssertionError("the service lives on")

    with pytest.raises(ExceptionGroup) as caught:
        on_cluster(scenario)
    assert caught.value.subgroup(ZeroDivisionError) is not None


@pytest.mark.parametrize("seed", range(12))
def test_random_cancels_leave_both_sides_clean(seed: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(one(cluster, number))
                await asyncio.sleep(cluster.rng.uniform(0, 0.1))
        await asyncio.sleep(3 * TTL_S)
        for lease_id in list(cluster.decode.ends.by_lease):
            cluster.decode.release(lease_id)
        await cluster.check_rest()
        assert cluster.prefill.service.counters.opened == len(cluster.prefill.ends.by_lease)

    async def one(cluster: Cluster, number: int) -> None:
        """One request that may be cancelled at either side at any moment."""
        prefill, rng, stamp = cluster.prefill, cluster.rng, number + 1
        owner = f"request {number}"
        blocks = prefill.ledger.allocate(owner, rng.randint(1, 5))
        if blocks is None:
            return

        async def send_offer(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            reader = cluster.decode.me
            body = HandoffRequest(target=reader.incarnation, terms=terms, request=REQUEST)
            return await prefill.network.channel(reader.address).call(HANDOFF, body, timeout_s=timeout_s)

        lease_id = prefill.service.open(
            blocks,
            cluster.decode.me,
            send_offer=send_offer,
            on_ended=lambda lease_id, outcome, reason: prefill.ends.put(lease_id, outcome),
        )
        async with asyncio.TaskGroup() as group:
            if rng.random() < 0.5:
                group.create_task(cancel_later(cluster, lease_id))
            for stop in range(1, len(blocks) + 1):
                await asyncio.sleep(rng.uniform(0, 0.05))
                prefill.write(blocks[stop - 1 : stop], stamp)
                prefill.service.advance(lease_id, stop)
            prefill.service.seal(lease_id, len(blocks), SEAL)
            prefill.ledger.release(owner, blocks)
        await prefill.ends.of(lease_id)
        end = cluster.decode.ends.by_lease.get(lease_id)
        if isinstance(end, tuple):
            assert end == (content(stamp, len(blocks)), SEAL)
            await asyncio.sleep(rng.uniform(0, 0.2))
            cluster.decode.release(lease_id)
        else:
            assert end is None or isinstance(end, TandemError)

    async def cancel_later(cluster: Cluster, lease_id: LeaseId) -> None:
        await asyncio.sleep(cluster.rng.uniform(0, 0.25))
        if cluster.rng.random() < 0.5:
            cluster.prefill.service.withdraw(lease_id, "client left")
        else:
            cluster.decode.service.cancel(lease_id, "client left")

    def shaky(info: PullInfo) -> PullFate:
        return next(fates)

    def fate_stream() -> Iterator[PullFate]:
        number = seed
        while True:
            number = (number * 1103515245 + 12345) % 2**31
            yield PullFate(duration_s=(number % 40) / 1000, heeds_stop=number % 3 > 0)

    fates = fate_stream()
    on_cluster(scenario, fate=shaky, seed=seed, checksum=seed % 2 == 0)
