"""What may happen in the model besides its natural course."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from contracts.errors import DeadlineExceeded, TandemError, WorkerUnavailable
from kvtransfer import holder_events as h
from kvtransfer import reader_events as r
from kvtransfer.block_work import Landing, Preparation
from tests.support.lease_audit import audit_holder
from tests.support.lease_nodes import DEVIATIONS, SPOILT, HolderNode, Item, Node, changed, failed_reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.ids import LeaseId
    from tests.support.lease_world import World

#: Its name, and what does it to a world.
Choice = tuple[str, "Callable[[World], object]"]


def alternatives(world: World) -> Iterator[Choice]:
    """Things held back that may happen now, at no cost."""
    for index, item in enumerate(world.lurking):
        if world.runnable(item):
            yield "lurking", partial(_run_lurking, index)
    if world.frozen:
        yield "thaw", _thaw
    if world.cut:
        yield "heal", _heal


def deviations(world: World) -> Iterator[Choice]:
    """Everything else that may happen now, as far as the scenario wants it."""
    wanted = world.scenario.deviations or DEVIATIONS
    head = world.head()
    if head is not None:
        yield from (choice for choice in _of_item(world, head) if choice[0] in wanted)
    for index, node in enumerate(world.nodes):
        if not node.dead:
            yield from (choice for choice in _of_node(world, index, node) if choice[0] in wanted)


def _of_item(world: World, index: int) -> Iterator[Choice]:
    item = world.items[index]
    yield "delay", partial(_hold_back, index, item)
    match item.what:
        case "request":
            yield "lose", partial(_replace, index, failed_reply(item))
            yield "repeat", partial(_repeat, index, item)
        case "reply" if not isinstance(item.answer, TandemError):
            yield "lose", partial(_replace, index, changed(item, answer=DeadlineExceeded("lost")))
        case "pull":
            yield "fail", partial(_fail, index, item)
            if item.left and item.read is None:
                yield "read ahead", partial(_read_ahead, index, item)
                if world.scenario.checksums:
                    yield "spoil", partial(_spoil, index, item)
        case "prepare" | "land":
            yield "fail", partial(_fail, index, item)
        case _:
            pass


def _of_node(world: World, index: int, node: Node) -> Iterator[Choice]:
    for lease_id in node.machine.lease_ids():
        if isinstance(node, HolderNode):
            yield "withdraw", partial(_withdraw, index, lease_id)
        else:
            yield "cancel", partial(_cancel, index, lease_id)
    if node.me.incarnation == 1:
        yield "crash", partial(_crash, index, False)
        yield "crash", partial(_crash, index, True)
    if not world.frozen:
        yield "freeze", partial(_freeze, index)
    if isinstance(node, HolderNode) and not world.cut:
        for other in range(world.scenario.num_holders, len(world.nodes)):
            yield "cut", partial(_cut, index, other)


def _run_lurking(index: int, world: World) -> str:
    return world.run_lurking(index)


def _thaw(world: World) -> None:
    world.frozen = frozenset()


def _heal(world: World) -> None:
    world.cut = frozenset()


def _take(index: int, world: World) -> None:
    world.items = (*world.items[:index], *world.items[index + 1 :])


def _hold_back(index: int, item: Item, world: World) -> None:
    """It may happen at any later moment."""
    _take(index, world)
    world.lurking = (*world.lurking, item)


def _replace(index: int, item: Item, world: World) -> None:
    _take(index, world)
    world.items = (*world.items, item)


def _repeat(index: int, item: Item, world: World) -> None:
    """It arrives, and may arrive again."""
    world.run_item(index)
    world.haunt(item)


def _fail(index: int, item: Item, world: World) -> None:
    _take(index, world)
    if not world.lives(item.node, item.life):
        return
    error = WorkerUnavailable("failed")
    lease_id = cast("LeaseId", item.lease_id)
    if item.what == "pull":
        world.pull_ended(item, error)
    elif item.what == "prepare":
        world.feed_holder(item.node, h.Prepared(lease_id, Preparation(error=error)))
    else:
        world.feed_reader(item.node, r.Landed(lease_id, Landing(error=error)))


def _read_ahead(index: int, item: Item, world: World) -> None:
    """Everything the pull will bring is read now and is on its way; it may land whenever."""
    order = cast("r.StartPull", item.order)
    source = int(order.endpoints["memory"])
    if not world.lives(source, order.holder.incarnation):
        world.run_item(index)
        return
    contents = world.nodes[source].contents
    _hold_back(index, changed(item, read=tuple(contents[block] for block, _ in item.left)), world)


def _spoil(index: int, item: Item, world: World) -> None:
    """The next block of the pull lands with other bytes."""
    if world.lives(item.node, item.life):
        world.write(item, item.left[0][1], SPOILT)
    world.items = (*world.items[:index], changed(item, left=item.left[1:]), *world.items[index + 1 :])


def _cancel(index: int, lease_id: LeaseId, world: World) -> None:
    world.feed_reader(index, r.CancelRequested(lease_id, "client left"))


def _withdraw(index: int, lease_id: LeaseId, world: World) -> None:
    world.feed_holder(index, h.Withdrawn(lease_id, "client left"))
    node = world.holder(index)
    node.ledger.release_all(lease_id)
    audit_holder(node)


def _crash(index: int, told: bool, world: World) -> None:
    """The process is gone and starts again; `told`: its peers hear of it."""
    node = world.own(index)
    node.dead = True
    world.then(Item("restart", index, 0))
    if told:
        life = int(node.me.incarnation)
        for other, peer in enumerate(world.nodes):
            if isinstance(peer, HolderNode) != isinstance(node, HolderNode):
                world.then(Item("gone", other, int(peer.me.incarnation), answer=(index, life)))


def _freeze(index: int, world: World) -> None:
    """Nothing happens at that node until it is woken."""
    world.frozen = frozenset((index,))


def _cut(index: int, other: int, world: World) -> None:
    """No call between the two arrives, no answer either."""
    world.cut = frozenset(((index, other),))
