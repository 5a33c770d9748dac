"""What must hold in every state of the model; each function raises Violation where it does not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from contracts.ids import BlockId
from kvtransfer.holder_events import LeaseOutcome
from kvtransfer.ledger import BlockClass
from tests.support.lease_nodes import CLOCK_SLACK_S, FREED, HolderNode, ReaderNode, Symbol, Violation
from tests.support.lease_snapshots import holder_lease, reader_terms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.ids import Incarnation, LeaseId, WorkerId
    from tests.support.lease_world import World


def audit_holder(node: HolderNode) -> None:
    """The machine and the books agree; free blocks lose their bytes to whoever comes next."""
    node.machine.check()
    node.ledger.check()
    for index in range(node.ledger.num_blocks):
        if node.ledger.block_class(BlockId(index)) is BlockClass.FREE:
            node.contents[index] = FREED


def audit_reader(node: ReaderNode) -> None:
    """The machine and the books agree; leases are of one life of each holder; each accepted one ends once."""
    node.machine.check()
    node.ledger.check()
    newest: dict[WorkerId, Incarnation] = {}
    for terms, _ in reader_terms(node.machine):
        life = newest.setdefault(terms.holder.worker_id, terms.holder.incarnation)
        if life != terms.holder.incarnation:
            raise Violation(f"{node.machine!r} holds leases of lives {life} and {terms.holder.incarnation}")
    if set(node.accepted) - set(node.ends) != set(node.machine.lease_ids()):
        raise Violation(f"{node.machine!r}: accepted {list(node.accepted)}, ended {node.ends}")


def check_terms(world: World) -> None:
    """The reader's lease ends before the holder's: in every state, for every lease that both have."""
    if not world.scenario.offers_in_time:
        return
    for node in world.nodes:
        if not isinstance(node, ReaderNode) or node.dead:
            continue
        for terms, expires_s in reader_terms(node.machine):
            index = int(terms.holder.address)
            if expires_s <= world.now_s or not world.lives(index, terms.holder.incarnation):
                continue
            holder = cast("HolderNode", world.nodes[index])
            lease = holder_lease(holder.machine, terms.lease_id)
            end_s = math.inf if lease is None else lease.expires_s
            if expires_s > end_s + CLOCK_SLACK_S:
                raise Violation(f"lease {terms.lease_id} ends at {expires_s} at its reader, {end_s} at its holder")


def check_expiry(world: World, lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
    """A lease expires at its holder only when its reader does not count on it any more."""
    if not world.scenario.offers_in_time:
        return
    if outcome is not LeaseOutcome.EXPIRED or "is over" in reason or "does not hold" in reason:
        return
    for node in world.nodes:
        if isinstance(node, ReaderNode) and not node.dead:
            for terms, expires_s in reader_terms(node.machine):
                if terms.lease_id == lease_id and expires_s > world.now_s + CLOCK_SLACK_S:
                    raise Violation(f"lease {lease_id} expired at its holder, its reader counts on {expires_s}")


def note_end(node: ReaderNode, lease_id: LeaseId, how: str) -> None:
    """A lease ended at its reader, for the first time."""
    if lease_id not in node.accepted:
        raise Violation(f"lease {lease_id} ended {how} at a reader that never took it")
    if lease_id in node.ends:
        raise Violation(f"lease {lease_id} ended twice at its reader: {node.ends[lease_id]}, {how}")
    node.ends[lease_id] = how


def check_adoption(world: World, node: ReaderNode, lease_id: LeaseId, blocks: Iterable[BlockId]) -> None:
    """What is adopted are the sealed bytes that were not there before, and their holder said that the lease stood."""
    script = world.scenario.scripts[int(lease_id.split("/")[0])]
    found = [node.contents[block] for block in blocks]
    wanted: list[Symbol] = [(lease_id, position) for position in range(script.have, script.num_sealed)]
    if found != wanted:
        raise Violation(f"lease {lease_id} adopted with {found}")
    # The life that granted it must have said so, alive or not by now.
    holder = world.nodes[script.holder]
    granted = int(lease_id.split("/")[1])
    if holder.me.incarnation == granted and lease_id not in cast("HolderNode", holder).confirmed:
        raise Violation(f"lease {lease_id} adopted and never confirmed")
