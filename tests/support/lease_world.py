"""The world of the model checker: real lease machines and ledgers, forked at every choice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from contracts.errors import (
    Cancelled,
    DeadlineExceeded,
    InvariantBroken,
    StaleIncarnation,
    TandemError,
    WorkerUnavailable,
)
from contracts.ids import BlockId, Incarnation, LeaseId, RequestId, WorkerId
from contracts.messages import LeaseTerms, Peer, Seal
from contracts.requests import TokenDelta
from kvtransfer import holder_events as h
from kvtransfer import reader_events as r
from kvtransfer.block_work import Landing, Preparation
from kvtransfer.transport import PullResult
from tests.support.lease_audit import audit_holder, audit_reader, check_adoption, check_expiry, note_end
from tests.support.lease_nodes import (
    FREED,
    IDENTITY,
    MAX_GHOSTS,
    TTL_S,
    Call,
    HolderNode,
    Item,
    Node,
    ReaderNode,
    Scenario,
    Symbol,
    Violation,
    changed,
    checksum,
)
from tests.support.lease_snapshots import clone, holder_key, holder_lease, holds, reader_key

if TYPE_CHECKING:
    from contracts.messages import ConfirmReply, ProgressReply, RenewReply


class World:
    """One state. `fork` before changing it; nodes are copied when they are touched."""

    __slots__ = ("cut", "frozen", "items", "keys", "lurking", "nodes", "now_s", "owned", "scenario", "trail")

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now_s = 100.0
        self.nodes: list[Node] = []
        for index in range(scenario.num_holders):
            self.nodes.append(self._holder(index, 1))
        for index in range(scenario.num_readers):
            self.nodes.append(self._reader(index, 1))
        #: Under way, in the order in which it arrives by itself; held back, to happen whenever.
        self.items: tuple[Item, ...] = tuple(
            Item("script", script.holder, 1, lease_id=LeaseId(str(number)))
            for number, script in enumerate(scenario.scripts)
        )
        self.lurking: tuple[Item, ...] = ()
        self.frozen: frozenset[int] = frozenset()
        self.cut: frozenset[tuple[int, int]] = frozenset()
        #: Nodes that only this world has; canonical forms of nodes at `now_s`, where known.
        self.owned: set[int] = set(range(len(self.nodes)))
        self.keys: list[object] = [None] * len(self.nodes)
        #: How it came to be: (trail of the parent, what happened).
        self.trail: tuple[object, str] | None = None

    def fork(self) -> World:
        twin = World.__new__(World)
        twin.scenario = self.scenario
        twin.now_s = self.now_s
        twin.nodes = list(self.nodes)
        twin.items = self.items
        twin.lurking = self.lurking
        twin.frozen = self.frozen
        twin.cut = self.cut
        twin.owned = set()
        twin.keys = list(self.keys)
        twin.trail = self.trail
        self.owned = set()
        return twin

    def path(self) -> list[str]:
        steps: list[str] = []
        trail = self.trail
        while trail is not None:
            steps.append(trail[1])
            trail = cast("tuple[object, str] | None", trail[0])
        return steps[::-1]

    def key(self) -> int:
        """Equal for states that behave alike."""
        for index, node in enumerate(self.nodes):
            if self.keys[index] is None:
                self.keys[index] = self._node_key(node)
        moving = tuple(item.key(self.now_s) for item in self.items)
        held = tuple(sorted(repr(item.key(self.now_s)) for item in self.lurking))
        return hash((tuple(self.keys), moving, held, tuple(sorted(self.frozen)), tuple(sorted(self.cut))))

    def _node_key(self, node: Node) -> object:
        if isinstance(node, HolderNode):
            machine = holder_key(node.machine, node.ledger, self.now_s)
            history: object = tuple(node.confirmed)
        else:
            machine = reader_key(node.machine, node.ledger, self.now_s)
            history = tuple(node.accepted)
        return hash((node.me.incarnation, node.dead, machine, tuple(node.contents), tuple(node.ends.items()), history))

    # --- nodes ------------------------------------------------------------------------------------------

    def _holder(self, index: int, life: int) -> HolderNode:
        scenario = self.scenario
        me = Peer(worker_id=WorkerId(f"p{index}"), incarnation=Incarnation(life), address=f"{index}")
        ledger = scenario.make_ledger(scenario.holder_blocks)
        machine = scenario.make_holder(ledger, me.incarnation, max_age_s=2 * TTL_S, prepares=scenario.checksums)
        return HolderNode(me, ledger, machine, [FREED] * scenario.holder_blocks)

    def _reader(self, index: int, life: int) -> ReaderNode:
        scenario = self.scenario
        me = Peer(
            worker_id=WorkerId(f"d{index}"),
            incarnation=Incarnation(life),
            address=f"{scenario.num_holders + index}",
        )
        ledger = scenario.make_ledger(scenario.reader_blocks)
        machine = scenario.make_reader(
            ledger,
            IDENTITY,
            ("memory",),
            max_waiting=scenario.max_waiting,
            lands=scenario.checksums,
            checksum=scenario.checksums,
        )
        return ReaderNode(me, ledger, machine, [FREED] * scenario.reader_blocks)

    def own(self, index: int) -> Node:
        """The node, ready to be changed."""
        if index not in self.owned:
            self.nodes[index] = clone(self.nodes[index])
            self.owned.add(index)
        self.keys[index] = None
        return self.nodes[index]

    def holder(self, index: int) -> HolderNode:
        node = self.own(index)
        assert isinstance(node, HolderNode)
        return node

    def reader(self, index: int) -> ReaderNode:
        node = self.own(index)
        assert isinstance(node, ReaderNode)
        return node

    def lives(self, index: int, life: int) -> bool:
        node = self.nodes[index]
        return not node.dead and node.me.incarnation == life

    # --- feeding the machines ---------------------------------------------------------------------------

    def feed_holder(self, index: int, event: h.HolderEvent) -> list[h.HolderInstruction]:
        node = self.holder(index)
        instructions = node.machine.handle(event, self.now_s)
        for instruction in instructions:
            self._perform_holder(index, node, instruction)
        audit_holder(node)
        return instructions

    def _perform_holder(self, index: int, node: HolderNode, instruction: h.HolderInstruction) -> None:
        life = node.me.incarnation
        match instruction:
            case h.SendOffer(terms=terms, timeout_s=timeout_s):
                script = self.scenario.scripts[int(terms.lease_id.split("/")[0])]
                offered = r.Offered(terms=terms, owner=terms.lease_id)
                # The deadline of a call travels with it; half of an offer's term may pass on its way at most.
                lease = holder_lease(node.machine, terms.lease_id)
                if lease is None:
                    return  # ended in the same breath; the service sends nothing either
                reach_s = terms.ttl_s / 2 if self.scenario.offers_in_time else math.inf
                target = int(lease.reader.incarnation)
                self._call(index, script.reader, "offer", terms.lease_id, offered, timeout_s, reach_s, target)
            case h.SendProgress(reader=reader, body=body, timeout_s=timeout_s):
                self._call(index, int(reader.address), "progress", body.lease_id, r.ProgressArrived(body), timeout_s)
            case h.SendFarewell(reader=reader, body=body, timeout_s=timeout_s):
                self._call(index, int(reader.address), "farewell", body.lease_id, r.ProgressArrived(body), timeout_s)
            case h.PrepareBlocks(lease_id=lease_id):
                self.then(Item("prepare", index, life, lease_id=lease_id, order=instruction))
            case h.LeaseEnded(lease_id=lease_id, outcome=outcome, reason=reason):
                if lease_id in node.ends:
                    raise Violation(f"lease {lease_id} ended twice at its holder: {node.ends[lease_id]}, {outcome}")
                check_expiry(self, lease_id, outcome, reason)
                node.ends[lease_id] = outcome
                node.ledger.release_all(lease_id)
            case h.Answer() | h.Refuse():
                pass

    def feed_reader(self, index: int, event: r.ReaderEvent) -> list[r.ReaderInstruction]:
        node = self.reader(index)
        instructions = node.machine.handle(event, self.now_s)
        if isinstance(event, r.Offered) and any(isinstance(each, r.Verdict) for each in instructions):
            node.accepted[event.terms.lease_id] = None
        for instruction in instructions:
            self._perform_reader(index, node, instruction)
        audit_reader(node)
        return instructions

    def _perform_reader(self, index: int, node: ReaderNode, instruction: r.ReaderInstruction) -> None:
        life = node.me.incarnation
        match instruction:
            case r.StartPull(lease_id=lease_id, pairs=pairs):
                self.then(Item("pull", index, life, lease_id=lease_id, order=instruction, left=pairs))
            case r.LandBlocks(lease_id=lease_id):
                self.then(Item("land", index, life, lease_id=lease_id, order=instruction))
            case r.StopPull(lease_id):
                self.items = tuple(self._stopped(item, index, lease_id) for item in self.items)
                self.lurking = tuple(self._stopped(item, index, lease_id) for item in self.lurking)
            case r.AskConfirm(lease_id=lease_id, holder=holder, body=body, timeout_s=timeout_s):
                self._call(index, int(holder.address), "confirm", lease_id, h.ConfirmAsked(body), timeout_s)
            case r.AskRenew(holder=holder, body=body, timeout_s=timeout_s):
                key = (holder.worker_id, holder.incarnation)
                self._call(index, int(holder.address), "renew", key, h.RenewAsked(body), timeout_s)
            case r.SendAck(holder=holder, body=body, timeout_s=timeout_s):
                key = (holder.worker_id, holder.incarnation)
                self._call(index, int(holder.address), "ack", key, h.AckArrived(body), timeout_s)
            case r.LeaseAdopted(lease_id=lease_id, blocks=blocks):
                note_end(node, lease_id, "adopted")
                check_adoption(self, node, lease_id, blocks)
                self.then(Item("finish", index, life, lease_id=lease_id))
            case r.LeaseAborted(lease_id=lease_id, reason=reason):
                note_end(node, lease_id, reason)
            case _:
                pass

    def _stopped(self, item: Item, index: int, lease_id: LeaseId) -> Item:
        if item.what != "pull" or item.node != index or item.lease_id != lease_id:
            return item
        return changed(item, stopped=True)

    def then(self, item: Item) -> None:
        self.items = (*self.items, item)

    def _call(
        self,
        caller: int,
        callee: int,
        kind: str,
        about: LeaseId | r.HolderKey,
        question: h.HolderEvent | r.ReaderEvent,
        timeout_s: float,
        reach_s: float = math.inf,
        target: int | None = None,
    ) -> None:
        if timeout_s <= 0:
            raise Violation(f"{kind} call about {about} with a time-out of {timeout_s} s")
        call = Call(
            caller, self.nodes[caller].me.incarnation, callee, question, kind, about, self.now_s + timeout_s,
            self.now_s + reach_s, f"{kind} {question}", target,
        )  # fmt: skip
        self.then(Item("request", callee, 0, call=call))

    # --- what happens by itself -------------------------------------------------------------------------

    def runnable(self, item: Item) -> bool:
        return item.node not in self.frozen

    def head(self) -> int | None:
        """Which of the items is next; None where none can run."""
        return next((index for index, item in enumerate(self.items) if self.runnable(item)), None)

    def natural(self) -> str | None:
        """Does what comes next when nothing deviates; None at rest."""
        index = self.head()
        if index is not None:
            return self.run_item(index)
        if self.pass_time():
            return f"until {self.now_s:g}"
        for position, item in enumerate(self.lurking):
            if self.runnable(item):
                return self.run_lurking(position)
        if self.frozen:
            self.frozen = frozenset()
            return "thaw"
        return None

    def run_item(self, index: int) -> str:
        item = self.items[index]
        self.items = (*self.items[:index], *self.items[index + 1 :])
        return self._run(item)

    def run_lurking(self, index: int) -> str:
        item = self.lurking[index]
        self.lurking = (*self.lurking[:index], *self.lurking[index + 1 :])
        return f"at last {self._run(item)}"

    def pass_time(self) -> bool:
        """Moves the clock to the next thing that is due, and lets it happen; False when nothing ever is."""
        late = [item for item in (*self.items, *self.lurking) if item.call and item.call.expires_s <= self.now_s]
        if any(item.what != "ghost" and self._time_out(item) for item in late):
            return True
        due = [
            (due_s, index)
            for index, node in enumerate(self.nodes)
            if not node.dead and index not in self.frozen and (due_s := node.machine.next_due_s()) is not None
        ]
        calls = [
            item.call.expires_s
            for item in (*self.items, *self.lurking)
            if item.call is not None and item.what != "ghost" and item.call.caller not in self.frozen
        ]
        if not due and not calls:
            return False
        next_s = max(self.now_s, min([each for each, _ in due] + calls))
        if next_s > self.now_s:
            self.now_s = next_s
            self.keys = [None] * len(self.nodes)
        self.lurking = tuple(
            item for item in self.lurking if item.what != "ghost" or (item.call and self.now_s < item.call.lost_after_s)
        )
        for due_s, index in due:
            if due_s <= next_s:
                if isinstance(self.nodes[index], HolderNode):
                    self.feed_holder(index, h.HolderTick())
                else:
                    self.feed_reader(index, r.ReaderTick())
        return True

    def _time_out(self, item: Item) -> bool:
        """The caller gives up; the request, where it was still on its way, may arrive all the same."""
        call = item.call
        assert call is not None
        if call.caller in self.frozen:
            return False
        self.items = tuple(each for each in self.items if each is not item)
        self.lurking = tuple(each for each in self.lurking if each is not item)
        if item.what == "request" and self.now_s < call.lost_after_s:
            self.haunt(item)
        self._answer(call, DeadlineExceeded("no answer"))
        return True

    def _run(self, item: Item) -> str:
        match item.what:
            case "request" | "ghost":
                call = item.call
                assert call is not None
                answer = self._serve(call)
                if item.what == "request":
                    self.then(Item("reply", call.caller, call.caller_life, call=call, answer=answer))
                return f"{item.what}: {call.kind} {call.about}"
            case "reply":
                call = item.call
                assert call is not None
                self._answer(call, item.answer)
                return f"reply: {call.kind} {call.about} {type(item.answer).__name__}"
            case "restart":
                self._restart(item.node)
                return f"restart {self.nodes[item.node].me.worker_id}"
            case _ if not self.lives(item.node, item.life):
                return f"{item.what} of a dead life"
            case "script":
                return self._script(item)
            case "pull":
                return self._pull(item)
            case "prepare":
                return self._prepare(item)
            case "land":
                return self._land(item)
            case "finish":
                node = self.reader(item.node)
                node.ledger.release_all(cast("LeaseId", item.lease_id))
                self.feed_reader(item.node, r.BlocksFreed())
                return f"finish {item.lease_id}"
            case "gone":
                return self._gone(item)
            case _:
                raise AssertionError(item)

    def _serve(self, call: Call) -> object:
        """The answer of the callee, or the error."""
        node = self.nodes[call.callee]
        if (call.caller, call.callee) in self.cut or (call.callee, call.caller) in self.cut:
            return DeadlineExceeded("the link is cut")
        if node.dead:
            return WorkerUnavailable("dead")
        question = call.question
        if isinstance(node, ReaderNode):
            if call.target not in (None, node.me.incarnation):
                return StaleIncarnation("another life of the reader")
            if isinstance(question, r.Offered) and not holds(node.machine, question.terms.lease_id):
                script = self.scenario.scripts[int(question.terms.lease_id.split("/")[0])]
                question = replace(question, have=script.have)
            answers = self.feed_reader(call.callee, cast("r.ReaderEvent", question))
            for answer in answers:
                match answer:
                    case r.Verdict(body) | r.ReplyProgress(body):
                        return body
                    case r.RefuseOffer(error) | r.RefuseProgress(error):
                        return error
                    case _:
                        continue
        else:
            for reply in self.feed_holder(call.callee, cast("h.HolderEvent", question)):
                if isinstance(reply, h.Answer):
                    self._note_answer(call, reply)
                    return reply.body
                if isinstance(reply, h.Refuse):
                    return reply.error
        raise Violation(f"no answer to {call.text}")

    def _note_answer(self, call: Call, answer: h.Answer) -> None:
        node = self.holder(call.callee)
        asked = getattr(getattr(call.question, "body", None), "holder_incarnation", None)
        if asked != node.me.incarnation:
            raise Violation(f"life {node.me.incarnation} of {node.me.worker_id} answers what was meant for {asked}")
        if call.kind == "confirm" and cast("ConfirmReply", answer.body).stands:
            node.confirmed[cast("LeaseId", call.about)] = None

    def haunt(self, item: Item) -> None:
        """The request may arrive (again) though nobody waits for an answer; the oldest such are lost in the end."""
        ghosts = [each for each in self.lurking if each.what == "ghost"]
        if len(ghosts) == MAX_GHOSTS:
            self.lurking = tuple(each for each in self.lurking if each is not ghosts[0])
        self.lurking = (*self.lurking, changed(item, what="ghost"))

    def _answer(self, call: Call, answer: object) -> None:
        """Tells the caller, if that life of it is still there."""
        if not self.lives(call.caller, call.caller_life):
            return
        if (call.caller, call.callee) in self.cut or (call.callee, call.caller) in self.cut:
            answer = DeadlineExceeded("the link is cut")
        error = answer if isinstance(answer, TandemError) else None
        about = cast("LeaseId", call.about)
        key = cast("r.HolderKey", call.about)
        match call.kind:
            case "offer":
                taken = h.OfferAnswered(about, getattr(answer, "expected", 0))
                self.feed_holder(call.caller, h.OfferFailed(about, error) if error else taken)
            case "progress":
                known = h.ProgressAnswered(about, cast("ProgressReply", answer))
                self.feed_holder(call.caller, h.ProgressFailed(about, error) if error else known)
            case "farewell":
                self.feed_holder(call.caller, h.FarewellEnded(about, error))
            case "confirm":
                told = r.ConfirmAnswered(about, cast("ConfirmReply", answer))
                self.feed_reader(call.caller, r.ConfirmFailed(about, error) if error else told)
            case "renew":
                renewed = r.RenewAnswered(key, cast("RenewReply", answer))
                self.feed_reader(call.caller, r.RenewFailed(key, error) if error else renewed)
            case _:
                self.feed_reader(call.caller, r.AckEnded(key, error))

    def _script(self, item: Item) -> str:
        """One step of a request at its holder: take blocks and offer them, write some, seal."""
        script = self.scenario.scripts[int(cast("LeaseId", item.lease_id))]
        node = self.holder(item.node)
        lease_id = LeaseId(f"{item.lease_id}/{item.life}")
        again = changed(item, step=item.step + 1)
        if item.step == 0:
            blocks = node.ledger.allocate(lease_id, script.num_blocks)
            if blocks is None:
                # Until a lease lets blocks go; with nothing to wait for it is given up.
                if node.machine.num_leases:
                    self.lurking = (*self.lurking, item)
                return f"no blocks for {lease_id}"
            reader = self.nodes[script.reader].me
            terms = LeaseTerms(
                lease_id=lease_id,
                holder=node.me,
                identity=IDENTITY,
                endpoints={"memory": node.me.address.encode()},
                num_blocks=script.num_blocks,
                ttl_s=TTL_S,
                checksums=self.scenario.checksums,
            )
            if not script.sealed:
                self.feed_holder(item.node, h.Opened(terms=terms, reader=reader, blocks=tuple(blocks)))
                self.then(again)
                return f"open {lease_id}"
            for position, block in enumerate(blocks):
                node.contents[block] = (lease_id, position)
            opened = h.Opened(terms=terms, reader=reader, blocks=tuple(blocks), seal=_seal(lease_id))
            self.feed_holder(item.node, opened)
            node.ledger.release_all(lease_id)
            audit_holder(node)
            return f"open and seal {lease_id}"
        if not node.ledger.blocks_of(lease_id):
            return f"{lease_id} has ended"
        final = script.advances[item.step - 1] if item.step <= len(script.advances) else script.num_sealed
        for position, block in enumerate(node.ledger.blocks_of(lease_id)[:final]):
            node.contents[block] = (lease_id, position)
        if item.step <= len(script.advances):
            self.feed_holder(item.node, h.Advanced(lease_id, final))
            self.then(again)
            return f"advance {lease_id} to {final}"
        self.feed_holder(item.node, h.Sealed(lease_id, final, _seal(lease_id)))
        # From here on only the pins hold the blocks.
        node.ledger.release_all(lease_id)
        audit_holder(node)
        return f"seal {lease_id}"

    def _pull(self, item: Item) -> str:
        lease_id = cast("LeaseId", item.lease_id)
        order = cast("r.StartPull", item.order)
        if item.stopped and item.read is None:
            self.pull_ended(item, Cancelled("stopped"))
            return f"pull of {lease_id} stopped"
        if not item.left:
            self.pull_ended(item, None)
            return f"pull of {lease_id} done"
        source = int(order.endpoints["memory"])
        if item.read is None and not self.lives(source, order.holder.incarnation):
            self.pull_ended(item, WorkerUnavailable("the holder is gone"))
            return f"pull of {lease_id} failed"
        (from_block, to_block), rest = item.left[0], item.left[1:]
        symbol = self.nodes[source].contents[from_block] if item.read is None else item.read[0]
        self.write(item, to_block, symbol)
        again = changed(item, left=rest, read=None if item.read is None else item.read[1:])
        self.items = (again, *self.items)
        return f"{lease_id}: {symbol} lands in {to_block}"

    def write(self, item: Item, block: BlockId, symbol: Symbol) -> None:
        """Bytes land: only ever in blocks that are still set aside for that very lease."""
        node = self.reader(item.node)
        lease_id = cast("LeaseId", item.lease_id)
        try:
            mine = block in node.ledger.reserved_blocks(lease_id)
        except InvariantBroken:
            mine = False
        if not mine:
            name = node.ledger.block_class(block).name
            raise Violation(f"bytes of lease {lease_id} land in block {block}, which is {name} and not its own")
        node.contents[block] = symbol

    def pull_ended(self, item: Item, error: TandemError | None) -> None:
        result = PullResult(num_bytes=64, wire_s=0.0, error=error)
        self.feed_reader(item.node, r.PullEnded(cast("LeaseId", item.lease_id), result))

    def _prepare(self, item: Item) -> str:
        node = self.holder(item.node)
        lease_id = cast("LeaseId", item.lease_id)
        found = [node.contents[block] for block in cast("h.PrepareBlocks", item.order).blocks]
        if any(symbol[0] != lease_id for symbol in found):
            raise Violation(f"blocks of lease {lease_id} are read for it and hold {found}")
        sums = tuple(checksum(symbol) for symbol in found)
        self.feed_holder(item.node, h.Prepared(lease_id, Preparation(checksums=sums)))
        return f"prepared {lease_id}"

    def _land(self, item: Item) -> str:
        node = self.reader(item.node)
        order = cast("r.LandBlocks", item.order)
        found = [checksum(node.contents[block]) for block in order.blocks]
        bad = tuple(n for n, pair in enumerate(zip(found, order.checksums, strict=True)) if pair[0] != pair[1])
        self.feed_reader(item.node, r.Landed(order.lease_id, Landing(corrupt=bad)))
        return f"landed {order.lease_id}, bad: {bad}"

    def _gone(self, item: Item) -> str:
        """Membership tells a node that a life of another is over."""
        index, life = cast("tuple[int, int]", item.answer)
        worker_id = self.nodes[index].me.worker_id
        if isinstance(self.nodes[item.node], HolderNode):
            self.feed_holder(item.node, h.ReaderGone(worker_id, Incarnation(life)))
        else:
            self.feed_reader(item.node, r.HolderGone(worker_id, Incarnation(life)))
        return f"{self.nodes[item.node].me.worker_id} hears that {worker_id} is gone"

    def _restart(self, index: int) -> None:
        life = self.nodes[index].me.incarnation + 1
        first_reader = self.scenario.num_holders
        is_holder = index < first_reader
        self.nodes[index] = self._holder(index, life) if is_holder else self._reader(index - first_reader, life)
        self.owned.add(index)
        self.keys[index] = None
        if is_holder and life == 2:
            for number, script in enumerate(self.scenario.scripts):
                if script.holder == index:
                    self.then(Item("script", index, life, lease_id=LeaseId(str(number))))


def _seal(lease_id: LeaseId) -> Seal:
    return Seal(num_tokens=1, first_delta=TokenDelta(request_id=RequestId(lease_id), index=0))
