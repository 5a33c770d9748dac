"""Both lease machines against each other: thousands of short runs over a network that loses, repeats, delays
and reorders, with cancels, crashes and late transfers. No wrong byte may be adopted, and nothing may leak.

Every second run has checksums: blocks are prepared before they are announced and checked after their pull, both
of which take time, and a pull may spoil what it copies.

Readers have some leading blocks of every other lease already, and say something else when its offer comes again;
some leases are sealed before their last block.

Block contents are modelled: a holder's block holds (request, position) while it is that request's, and
nothing once it is free. A pull copies block by block at random moments, even after it was asked to stop.
A failing run is repeated with `run(seed)`.
"""

from __future__ import annotations

import heapq
import random
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import pytest

from contracts.errors import (
    DeadlineExceeded,
    StaleIncarnation,
    TandemError,
    WorkerUnavailable,
)
from contracts.ids import BlockId, Incarnation, LeaseId, RequestId, WorkerId
from contracts.messages import (
    ConfirmReply,
    LeaseTerms,
    Peer,
    ProgressReply,
    ProgressRequest,
    RenewReply,
    Seal,
)
from contracts.requests import TokenDelta
from kvtransfer import holder_events as h
from kvtransfer import reader_events as r
from kvtransfer.block_work import Landing, Preparation
from kvtransfer.holder import Holder
from kvtransfer.ledger import Ledger
from kvtransfer.reader import Reader
from kvtransfer.transport import PullResult
from tests.unit.kvtransfer.builders import IDENTITY

if TYPE_CHECKING:
    from collections.abc import Callable

HOLDER_BLOCKS = 10
READER_BLOCKS = 8
TTL_S = 4.0
FAULTS_UNTIL_S = 12.0
#: After the last fault: the longest lease, its farewells and acknowledgements, and a late pull.
QUIET_S = 40.0

Content = tuple[str, int] | None
SPOILT: Content = ("spoilt", 0)


def checksum(content: Content) -> int:
    return zlib.crc32(repr(content).encode())


class World:
    """Time, chance and the network."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._ticket = 0
        self._audits = 0
        self.harsh = self.rng.random() < 0.7
        self.checksums = seed % 2 == 0

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        self._ticket += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._ticket, action))

    def run(self) -> None:
        while self._heap:
            self.now_s, _, action = heapq.heappop(self._heap)
            assert self.now_s < FAULTS_UNTIL_S + QUIET_S, "not at rest within the bound"
            action()

    def audit(self, ledger: Ledger, machine: Holder | Reader) -> None:
        """Audits every fourth time: an audit costs more than the event before it."""
        self._audits += 1
        if self._audits % 4 == 0:
            ledger.check()
            machine.check()

    @property
    def faulty(self) -> bool:
        return self.harsh and self.now_s < FAULTS_UNTIL_S

    def delay_s(self) -> float:
        if self.faulty and self.rng.random() < 0.15:
            return self.rng.uniform(0.1, 3.0)
        return self.rng.uniform(0.001, 0.03)

    def work_s(self) -> float:
        """How long a preparation or a landing takes."""
        if self.faulty and self.rng.random() < 0.1:
            return self.rng.uniform(0.1, 5.0)
        return self.rng.uniform(0.0001, 0.01)

    def call(
        self,
        timeout_s: float,
        serve: Callable[[], object],
        done: Callable[[object], None],
    ) -> None:
        """A remote call: `done` gets the reply or a TandemError, once. Requests may come late or twice."""
        answered = False

        def finish(reply: object) -> None:
            nonlocal answered
            if not answered:
                answered = True
                done(reply)

        def deliver() -> None:
            try:
                reply = serve()
            except TandemError as error:
                reply = error
            if not (self.faulty and self.rng.random() < 0.15):
                self.later(self.delay_s(), lambda: finish(reply))

        self.later(timeout_s, lambda: finish(DeadlineExceeded("no reply")))
        if not (self.faulty and self.rng.random() < 0.15):
            self.later(self.delay_s(), deliver)
        if self.faulty and self.rng.random() < 0.1:
            self.later(self.delay_s() * 2, deliver)


@dataclass
class Request:
    name: str
    num_blocks: int
    blocks: list[BlockId]
    written: int = 0
    lease_id: LeaseId | None = None


class HolderNode:
    """A prefill worker: one machine and its blocks per life."""

    def __init__(self, world: World, cluster: Cluster, incarnation: int) -> None:
        self.world = world
        self.cluster = cluster
        self.dead = False
        self.offset_s = world.rng.uniform(0, 1000)
        self.me = Peer(worker_id=WorkerId("p"), incarnation=Incarnation(incarnation), address="p:1")
        self.ledger = Ledger(HOLDER_BLOCKS)
        self.machine = Holder(self.ledger, self.me.incarnation, max_age_s=8.0, prepares=world.checksums)
        self.contents: list[Content] = [None] * HOLDER_BLOCKS
        self.requests: dict[LeaseId, Request] = {}
        self.outcomes: dict[LeaseId, h.LeaseOutcome] = {}
        #: Blocks of each lease that was sealed.
        self.sealed: dict[LeaseId, int] = {}
        self.numbers = 0
        self.tick_at_s = float("inf")

    def feed(self, event: h.HolderEvent) -> list[h.HolderInstruction]:
        if self.dead:
            return []
        instructions = self.machine.handle(event, self.world.now_s + self.offset_s)
        for instruction in instructions:
            self.perform(instruction)
        self.world.audit(self.ledger, self.machine)
        self._scribble()
        self._set_alarm()
        return instructions

    def _scribble(self) -> None:
        """Whoever gets a free block next writes it; so does nobody's memory keep old bytes by luck."""
        for index in range(HOLDER_BLOCKS):
            if self.ledger.block_class(BlockId(index)).name == "FREE":
                self.contents[index] = None

    def _set_alarm(self) -> None:
        due_s = self.machine.next_due_s()
        if due_s is not None and due_s < self.tick_at_s:
            self.tick_at_s = due_s
            self.world.later(max(1e-6, due_s - self.offset_s - self.world.now_s), self._alarm)

    def _alarm(self) -> None:
        self.tick_at_s = float("inf")
        self.feed(h.HolderTick())

    # the prefill side's life of a request

    def start(self, num_blocks: int) -> None:
        if self.dead:
            return
        self.numbers += 1
        lease_id = LeaseId(f"p/{self.me.incarnation}/{self.numbers}")
        blocks = self.ledger.allocate(lease_id, num_blocks)
        if blocks is None:
            return
        request = Request(lease_id, num_blocks, blocks, lease_id=lease_id)
        self.requests[lease_id] = request
        terms = LeaseTerms(
            lease_id=lease_id,
            holder=self.me,
            identity=IDENTITY,
            endpoints={"memory": str(self.me.incarnation).encode()},
            num_blocks=num_blocks,
            ttl_s=TTL_S,
            checksums=self.world.checksums,
        )
        self.feed(h.Opened(terms=terms, reader=self.cluster.reader.me, blocks=tuple(blocks)))
        self._compute(lease_id)
        if self.world.rng.random() < 0.15:
            self.world.later(self.world.rng.uniform(0, 3), lambda: self.cancel(lease_id))

    def cancel(self, lease_id: LeaseId) -> None:
        if self.dead:
            return
        self.feed(h.Withdrawn(lease_id, "client left"))
        if self.requests.pop(lease_id, None) is not None:
            self.ledger.release_all(lease_id)
        self._scribble()

    def _compute(self, lease_id: LeaseId) -> None:
        long = self.world.faulty and self.world.rng.random() < 0.1
        pause_s = self.world.rng.uniform(0.001, 6.0 if long else 0.2)
        self.world.later(pause_s, lambda: self._computed(lease_id))

    def _computed(self, lease_id: LeaseId) -> None:
        request = self.requests.get(lease_id)
        if self.dead or request is None:
            return
        for _ in range(self.world.rng.randint(1, 3)):
            if request.written < request.num_blocks:
                self.contents[request.blocks[request.written]] = (request.name, request.written)
                request.written += 1
        if request.written < request.num_blocks and self.world.rng.random() < 0.9:
            self.feed(h.Advanced(lease_id, request.written))
            self._compute(lease_id)
            return
        self.sealed[lease_id] = request.written
        seal = Seal(num_tokens=1, first_delta=TokenDelta(request_id=RequestId(lease_id), index=0))
        self.feed(h.Sealed(lease_id, request.written, seal))
        # From here on only the pins hold the blocks.
        if self.requests.pop(lease_id, None) is not None:
            self.ledger.release_all(lease_id)
            self._scribble()
        if self.world.faulty and self.world.rng.random() < 0.2:
            self.world.later(self.world.rng.uniform(0, 0.1), lambda: self.cancel(lease_id))

    # instructions

    def perform(self, instruction: h.HolderInstruction) -> None:
        match instruction:
            case h.SendOffer(terms=terms, timeout_s=timeout_s):
                target = self.cluster.reader.me
                self.world.call(
                    timeout_s,
                    lambda: self.cluster.reader.offer(terms, target.incarnation),
                    lambda reply: self._offer_done(terms.lease_id, reply),
                )
            case h.SendProgress(body=body, timeout_s=timeout_s):
                self.world.call(
                    timeout_s,
                    lambda: self.cluster.reader.progress(body),
                    lambda reply: self._progress_done(body.lease_id, reply),
                )
            case h.SendFarewell(body=body, timeout_s=timeout_s):
                self.world.call(
                    timeout_s,
                    lambda: self.cluster.reader.progress(body),
                    lambda reply: self._farewell_done(body.lease_id, reply),
                )
            case h.PrepareBlocks(lease_id=lease_id, blocks=blocks):
                self.world.later(self.world.work_s(), partial(self._prepared, lease_id, blocks))
            case h.LeaseEnded(lease_id=lease_id, outcome=outcome):
                assert lease_id not in self.outcomes, "a lease ended twice"
                self.outcomes[lease_id] = outcome
                if self.requests.pop(lease_id, None) is not None:
                    self.ledger.release_all(lease_id)
            case h.Answer() | h.Refuse():
                pass

    def _prepared(self, lease_id: LeaseId, blocks: tuple[BlockId, ...]) -> None:
        if self.dead:
            return
        contents = [self.contents[block] for block in blocks]
        # Whatever became of the lease: what is read for it is not yet anybody else's.
        assert all(content is not None and content[0] == lease_id for content in contents), contents
        checksums = tuple(checksum(content) for content in contents)
        error = WorkerUnavailable("device lost") if self.world.faulty and self.world.rng.random() < 0.01 else None
        self.feed(h.Prepared(lease_id, Preparation(checksums=checksums, error=error)))

    def _offer_done(self, lease_id: LeaseId, reply: object) -> None:
        if isinstance(reply, TandemError):
            self.feed(h.OfferFailed(lease_id, reply))
        else:
            self.feed(h.OfferAnswered(lease_id, getattr(reply, "expected", 0)))

    def _progress_done(self, lease_id: LeaseId, reply: object) -> None:
        if isinstance(reply, TandemError):
            self.feed(h.ProgressFailed(lease_id, reply))
        else:
            self.feed(h.ProgressAnswered(lease_id, cast("ProgressReply", reply)))

    def _farewell_done(self, lease_id: LeaseId, reply: object) -> None:
        self.feed(h.FarewellEnded(lease_id, reply if isinstance(reply, TandemError) else None))

    def ask(self, event: h.HolderEvent) -> object:
        if self.dead:
            raise WorkerUnavailable("dead")
        for instruction in self.feed(event):
            if isinstance(instruction, h.Refuse):
                raise instruction.error
            if isinstance(instruction, h.Answer):
                return instruction.body
        raise AssertionError(f"{event} was not answered")


class ReaderNode:
    """A decode worker: one machine and its blocks per life."""

    def __init__(self, world: World, cluster: Cluster, incarnation: int) -> None:
        self.world = world
        self.cluster = cluster
        self.dead = False
        self.offset_s = world.rng.uniform(0, 1000)
        self.me = Peer(worker_id=WorkerId("d"), incarnation=Incarnation(incarnation), address="d:1")
        self.ledger = Ledger(READER_BLOCKS)
        self.machine = Reader(
            self.ledger,
            IDENTITY,
            ("memory",),
            max_waiting=1 if world.rng.random() < 0.3 else 3,
            max_pull_bytes=2 * 64,
            lands=world.checksums,
            checksum=world.checksums,
        )
        self.contents: list[Content] = [None] * READER_BLOCKS
        #: Leases whose offer was accepted, and what was here of each; how each ended.
        self.accepted: dict[LeaseId, int] = {}
        self.ends: dict[LeaseId, str] = {}
        self.stopping: set[LeaseId] = set()
        self.tick_at_s = float("inf")

    def feed(self, event: r.ReaderEvent) -> list[r.ReaderInstruction]:
        if self.dead:
            return []
        instructions = self.machine.handle(event, self.world.now_s + self.offset_s)
        # The asker records the acceptance before callbacks run.
        if isinstance(event, r.Offered) and any(isinstance(each, r.Verdict) for each in instructions):
            self.accepted.setdefault(event.terms.lease_id, event.have)
        for instruction in instructions:
            self.perform(instruction)
        self.world.audit(self.ledger, self.machine)
        self._set_alarm()
        return instructions

    def _set_alarm(self) -> None:
        due_s = self.machine.next_due_s()
        if due_s is not None and due_s < self.tick_at_s:
            self.tick_at_s = due_s
            self.world.later(max(1e-6, due_s - self.offset_s - self.world.now_s), self._alarm)

    def _alarm(self) -> None:
        self.tick_at_s = float("inf")
        self.feed(r.ReaderTick())

    def offer(self, terms: LeaseTerms, target: Incarnation) -> object:
        self._require_life(target)
        have = self.world.rng.randint(0, terms.num_blocks) if self.world.rng.random() < 0.5 else 0
        for instruction in self.feed(r.Offered(terms=terms, owner=terms.lease_id, have=have)):
            if isinstance(instruction, r.RefuseOffer):
                raise instruction.error
            if isinstance(instruction, r.Verdict):
                if self.world.rng.random() < 0.1:
                    delay_s = self.world.rng.uniform(0, 2)
                    self.world.later(delay_s, partial(self.feed, r.CancelRequested(terms.lease_id, "left")))
                return instruction.reply
        raise AssertionError("the offer was not answered")

    def _require_life(self, target: Incarnation) -> None:
        if self.dead:
            raise WorkerUnavailable("dead")
        if target != self.me.incarnation:
            raise StaleIncarnation("another life of the reader")

    def progress(self, body: ProgressRequest) -> object:
        if self.dead:
            raise WorkerUnavailable("dead")
        for instruction in self.feed(r.ProgressArrived(body)):
            if isinstance(instruction, r.RefuseProgress):
                raise instruction.error
            if isinstance(instruction, r.ReplyProgress):
                return instruction.reply
        raise AssertionError("the progress was not answered")

    # instructions

    def perform(self, instruction: r.ReaderInstruction) -> None:
        match instruction:
            case r.StartPull():
                self._start_pull(instruction)
            case r.LandBlocks():
                self.world.later(self.world.work_s(), partial(self._land, instruction))
            case r.StopPull(lease_id):
                self.stopping.add(lease_id)
            case r.AskConfirm(lease_id=lease_id, body=body, timeout_s=timeout_s):
                self._ask(timeout_s, h.ConfirmAsked(body), lambda reply: self._confirmed(lease_id, reply))
            case r.AskRenew(holder=holder, body=body, timeout_s=timeout_s):
                key = (holder.worker_id, holder.incarnation)
                self._ask(timeout_s, h.RenewAsked(body), lambda reply: self._renewed(key, reply))
            case r.SendAck(holder=holder, body=body, timeout_s=timeout_s):
                key = (holder.worker_id, holder.incarnation)
                self._ask(timeout_s, h.AckArrived(body), lambda reply: self._acked(key, reply))
            case r.LeaseAdopted():
                self._adopted(instruction)
            case r.LeaseAborted(lease_id=lease_id, reason=reason):
                assert lease_id in self.accepted
                assert lease_id not in self.ends, "a lease ended twice"
                self.ends[lease_id] = reason
            case _:
                pass

    def _ask(self, timeout_s: float, question: h.HolderEvent, done: Callable[[object], None]) -> None:
        self.world.call(timeout_s, lambda: self.cluster.holder.ask(question), done)

    def _confirmed(self, lease_id: LeaseId, reply: object) -> None:
        if isinstance(reply, TandemError):
            self.feed(r.ConfirmFailed(lease_id, reply))
        else:
            self.feed(r.ConfirmAnswered(lease_id, cast("ConfirmReply", reply)))

    def _renewed(self, key: r.HolderKey, reply: object) -> None:
        if isinstance(reply, TandemError):
            self.feed(r.RenewFailed(key, reply))
        else:
            self.feed(r.RenewAnswered(key, cast("RenewReply", reply)))

    def _acked(self, key: r.HolderKey, reply: object) -> None:
        self.feed(r.AckEnded(key, reply if isinstance(reply, TandemError) else None))

    def _start_pull(self, order: r.StartPull) -> None:
        rng = self.world.rng
        source = self.cluster.holders[int(order.endpoints["memory"])]
        duration_s = rng.uniform(0.001, 0.02)
        if self.world.faulty and rng.random() < 0.1:
            duration_s = rng.uniform(0.5, 8.0)
        for pair in order.pairs:
            self.world.later(rng.uniform(0, duration_s), partial(self._copy, source, *pair))
        failed = self.world.faulty and rng.random() < 0.05
        error = WorkerUnavailable("pull failed") if failed else None
        result = PullResult(num_bytes=64 * len(order.pairs), wire_s=duration_s, error=error)
        self.world.later(duration_s, lambda: self._pull_ended(order.lease_id, result))

    def _copy(self, source: HolderNode, block: BlockId, own: BlockId) -> None:
        """One block lands; into memory that nobody else may have been given."""
        if not self.dead:
            assert self.ledger.block_class(own).name in ("RESERVED", "QUARANTINED")
            spoilt = self.world.checksums and self.world.faulty and self.world.rng.random() < 0.2
            self.contents[own] = SPOILT if spoilt else source.contents[block]

    def _land(self, order: r.LandBlocks) -> None:
        if self.dead:
            return
        assert all(self.ledger.block_class(block).name in ("RESERVED", "QUARANTINED") for block in order.blocks)
        found = [checksum(self.contents[block]) for block in order.blocks]
        corrupt = tuple(n for n, pair in enumerate(zip(found, order.checksums, strict=True)) if pair[0] != pair[1])
        self.feed(r.Landed(order.lease_id, Landing(corrupt=corrupt, num_bytes=64 * len(found))))

    def _pull_ended(self, lease_id: LeaseId, result: PullResult) -> None:
        self.feed(r.PullEnded(lease_id, result))

    def _adopted(self, adopted: r.LeaseAdopted) -> None:
        lease_id = adopted.lease_id
        assert lease_id in self.accepted
        assert lease_id not in self.ends, "a lease ended twice"
        self.ends[lease_id] = "adopted"
        contents = [self.contents[block] for block in adopted.blocks]
        self.cluster.check_adoption(lease_id, self.accepted[lease_id], contents)
        self.world.later(self.world.rng.uniform(0, 1), lambda: self._finish(adopted.owner))

    def _finish(self, owner: str) -> None:
        if not self.dead:
            self.ledger.release_all(owner)
            self.feed(r.BlocksFreed())


@dataclass
class Cluster:
    world: World
    holders: dict[int, HolderNode] = field(default_factory=dict[int, HolderNode])
    readers: dict[int, ReaderNode] = field(default_factory=dict[int, ReaderNode])

    def __post_init__(self) -> None:
        self.restart_holder()
        self.restart_reader()

    def restart_holder(self) -> None:
        if self.holders:
            self.holder.dead = True
        life = len(self.holders) + 1
        self.holders[life] = HolderNode(self.world, self, life)

    def restart_reader(self) -> None:
        if self.readers:
            self.reader.dead = True
        life = len(self.readers) + 1
        self.readers[life] = ReaderNode(self.world, self, life)

    @property
    def holder(self) -> HolderNode:
        return self.holders[len(self.holders)]

    @property
    def reader(self) -> ReaderNode:
        return self.readers[len(self.readers)]

    def sealed_blocks(self, lease_id: LeaseId) -> int:
        return self.holders[int(lease_id.split("/")[1])].sealed[lease_id]

    def check_adoption(self, lease_id: LeaseId, num_here: int, contents: list[Content]) -> None:
        holder = self.holders[int(lease_id.split("/")[1])]
        wanted = [(lease_id, position) for position in range(num_here, self.sealed_blocks(lease_id))]
        assert contents == wanted, f"wrong bytes: {contents}, not {wanted}"
        if not holder.dead:
            # The term the reader counts ends first: only the holder's own withdrawal may have crossed.
            assert holder.outcomes.get(lease_id) in (None, h.LeaseOutcome.WITHDRAWN)


def start_one(cluster: Cluster, num_blocks: int) -> None:
    cluster.holder.start(num_blocks)


def run(seed: int) -> Cluster:
    """One short life of a small cluster; raises AssertionError where a promise is broken."""
    world = World(seed)
    cluster = Cluster(world)
    for _ in range(world.rng.randint(3, 12)):
        num_blocks = world.rng.randint(1, 5)
        world.later(world.rng.uniform(0, 6), partial(start_one, cluster, num_blocks))
    if world.harsh and world.rng.random() < 0.4:
        world.later(world.rng.uniform(0, 8), cluster.restart_holder)
    if world.harsh and world.rng.random() < 0.4:
        world.later(world.rng.uniform(0, 8), cluster.restart_reader)
    world.run()
    check_rest(cluster)
    return cluster


def check_rest(cluster: Cluster) -> None:
    """After everything: both sides' books are empty, and each lease had exactly one end on each side."""
    holder, reader = cluster.holder, cluster.reader
    assert holder.ledger.load()["free_blocks"] == HOLDER_BLOCKS, holder.ledger
    assert reader.ledger.load()["free_blocks"] == READER_BLOCKS, reader.ledger
    for node in (holder, reader):
        node.ledger.check()
        node.machine.check()
    assert holder.machine.idle, holder.machine
    assert reader.machine.idle, reader.machine
    assert len(holder.outcomes) == holder.machine.counters.opened
    assert set(reader.ends) == set(reader.accepted)
    for lease_id, end in reader.ends.items():
        outcome = cluster.holders[int(lease_id.split("/")[1])].outcomes.get(lease_id)
        if end == "adopted" and not cluster.holders[int(lease_id.split("/")[1])].dead:
            assert outcome in (h.LeaseOutcome.RELEASED, h.LeaseOutcome.WITHDRAWN), (lease_id, outcome)


@pytest.mark.parametrize("batch", range(8))
def test_random_runs_end_clean_and_adopt_no_wrong_byte(batch: int) -> None:
    for seed in range(batch * 250, (batch + 1) * 250):
        try:
            run(seed)
        except AssertionError as error:
            raise AssertionError(f"run({seed}): {error}") from error


def test_runs_reach_what_they_are_for() -> None:
    ends: dict[str, int] = {}
    outcomes: dict[str, int] = {}
    #: Of adopted leases: how much of what was sealed was here.
    here: set[str] = set()
    for seed in range(400):
        cluster = run(seed)
        for reader in cluster.readers.values():
            for lease_id, end in reader.ends.items():
                ends[end] = ends.get(end, 0) + 1
                if end == "adopted":
                    num_here, num_sealed = reader.accepted[lease_id], cluster.sealed_blocks(lease_id)
                    here.add("none" if not num_here else "some" if num_here < num_sealed else "all")
        for holder in cluster.holders.values():
            for outcome in holder.outcomes.values():
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert set(ends) == {"adopted", *r.AbortReason}, ends
    assert set(outcomes) == set(h.LeaseOutcome), outcomes
    assert here == {"none", "some", "all"}


def test_one_seed_is_one_run() -> None:
    def trace(seed: int) -> list[object]:
        cluster = run(seed)
        return [
            cluster.world.now_s,
            *(sorted(reader.ends.items()) for reader in cluster.readers.values()),
            *(sorted(holder.outcomes.items()) for holder in cluster.holders.values()),
        ]

    assert trace(11) == trace(11)
    assert trace(11) != trace(12)


def test_quiet_network_adopts_everything_that_nobody_cancels() -> None:
    for seed in range(60):
        world = World(seed)
        world.harsh = False
        cluster = Cluster(world)
        world.later(0.0, partial(start_one, cluster, 4))
        world.run()
        check_rest(cluster)
        reasons = set(cluster.reader.ends.values())
        assert reasons <= {"adopted", r.AbortReason.CANCELLED, r.AbortReason.WITHDRAWN}
