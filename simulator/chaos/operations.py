"""What operators and policies do to a chaos trial's cluster: requests are moved, workers are drained, flipped,
restarted, taken away and brought back. Drawn like faults, and overlapping with them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from contracts.control_messages import (
    DrainOperation,
    FlipOperation,
    RemoveOperation,
    RestartOperation,
    StartOperation,
    UndrainOperation,
)
from contracts.errors import TandemError
from contracts.ids import WorkerId
from coordinator.policy.move_terms import MoveRules
from coordinator.rebalancer import RebalanceSettings
from simulator.chaos.faults import CrashCoordinator, Fault

if TYPE_CHECKING:
    import random

    from contracts.control_messages import Operation
    from contracts.messages import MoveMode, Role
    from simulator.cluster import SimulatedCluster

#: Chance that requests are moved about in a trial, and that a cluster is operated.
MOVES_CHANCE = 0.5
OPERATED_CHANCE = 0.35
#: Chance that the coordinator balances a cluster by moves.
REBALANCED_CHANCE = 0.6
MOST_OPERATIONS = 3
#: Chance that a worker becomes mixed in the middle of its work, and goes back.
MIXED_CHANCE = 0.35
#: Chance that the coordinator is lost in the middle of an operation.
LEFT_ALONE_CHANCE = 0.15
#: After its time an operation is ended, or its effect undone; that is asked for again after so long, and so often.
UNDO_INTERVAL_S = 1.0
UNDO_TRIES = 60


@dataclass(frozen=True, slots=True)
class MoveOrder:
    after_s: float
    source: str
    destination: str
    mode: MoveMode
    max_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveAbout(Fault):
    """Requests are moved between workers, one order after the other."""

    what: ClassVar[str] = "moves"

    orders: tuple[MoveOrder, ...]

    def describe(self) -> str:
        return f"{len(self.orders)} {self.what} within {self.for_s:.3f} s"

    async def strike(self, cluster: SimulatedCluster) -> None:
        for order in self.orders:
            await asyncio.sleep(order.after_s)
            if order.source in cluster.up() and order.destination in cluster.up():
                with suppress(TandemError):
                    await cluster.migrate(
                        order.source, order.destination, mode=order.mode, max_requests=order.max_requests
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Operate(Fault):
    """An operator's wish; taken back, or undone, when its time is over."""

    what: ClassVar[str] = "operation"

    operation: Operation

    def describe(self) -> str:
        return f"{self.operation} for {self.for_s:.3f} s"

    async def strike(self, cluster: SimulatedCluster) -> None:
        number = None
        with suppress(TandemError):
            number = await cluster.operate(self.operation)
        await asyncio.sleep(self.for_s)
        for _ in range(UNDO_TRIES):
            if await self._is_undone(cluster, number):
                return
            await asyncio.sleep(UNDO_INTERVAL_S)
        raise TimeoutError(f"could not be undone: {self.describe()}")

    async def _is_undone(self, cluster: SimulatedCluster, number: int | None) -> bool:
        """Nothing of it is left; else something was tried."""
        operation = self.operation
        try:
            reply = await cluster.operations()
            if number is not None and any(
                one.operation_id == number and one.state == "running" for one in reply.operations
            ):
                await cluster.operations(cancel=number)
                return False
            match operation:
                case DrainOperation(worker_id=worker_id):
                    if not cluster.is_draining(worker_id):
                        return True
                    await cluster.operate(UndrainOperation(worker_id=worker_id))
                case RemoveOperation(worker_id=worker_id):
                    if worker_id in cluster.up():
                        return True
                    await cluster.operate(StartOperation(worker_id=worker_id))
                case _:
                    return True
        except TandemError:
            # The coordinator is away, or busy with another one of the same worker.
            pass
        return False


def draw_moves(rng: random.Random, roles: dict[str, Role], *, over_s: float) -> tuple[Fault, ...]:
    """None in some trials, and where nobody could take a request from another one."""
    readers = [worker_id for worker_id, role in roles.items() if role != "decode"]
    writers = [worker_id for worker_id, role in roles.items() if role != "prefill"]
    groups = [group for group in (readers, writers, writers) if len(group) > 1]
    if not groups or rng.random() >= MOVES_CHANCE:
        return ()
    mean_s = rng.choice([0.02, 0.1, 0.5])
    orders: list[MoveOrder] = []
    spent_s, for_s = 0.0, rng.uniform(0.5, 1.0) * over_s
    while (after_s := rng.expovariate(1.0 / mean_s)) + spent_s < for_s:
        source, destination = rng.sample(rng.choice(groups), 2)
        mode: MoveMode = rng.choice(["kv", "kv", "tokens", "auto"])
        orders.append(MoveOrder(after_s, source, destination, mode, rng.choice([1, 1, 2, 8])))
        spent_s += after_s
    return (MoveAbout(at_s=rng.uniform(0.0, 0.2) * over_s, for_s=for_s, orders=tuple(orders)),)


def draw_rebalancing(rng: random.Random) -> RebalanceSettings | None:
    """None in some trials. Thresholds are high, so that there is often a reason."""
    if rng.random() >= REBALANCED_CHANCE:
        return None
    low_tokens = rng.choice([16.0, 64.0, 128.0])
    rules = MoveRules(low_tokens=low_tokens, high_tokens=2.0 * low_tokens, cooldown_s=rng.choice([0.2, 1.0]))
    return RebalanceSettings(rules=rules, interval_s=rng.choice([0.05, 0.2]))


def draw_operations(rng: random.Random, roles: dict[str, Role], *, over_s: float) -> tuple[Fault, ...]:
    """None in many trials."""
    drawn: list[Fault] = []
    for _ in range(rng.randint(1, MOST_OPERATIONS) if rng.random() < OPERATED_CHANCE else 0):
        operation = _draw_operation(rng, WorkerId(rng.choice(list(roles))))
        at_s, for_s = rng.uniform(0.0, 0.7) * over_s, rng.choice([0.3, 1.0, 3.0, 12.0])
        drawn.append(Operate(at_s=at_s, for_s=for_s, operation=operation))
        if rng.random() < LEFT_ALONE_CHANCE:
            # In the middle of it, and away for longer than a drain lasts that nobody renews.
            drawn.append(CrashCoordinator(at_s=at_s + rng.uniform(0.1, 1.0), for_s=10.0))
    return (*drawn, *_draw_mixing(rng, roles, over_s=over_s))


def _draw_mixing(rng: random.Random, roles: dict[str, Role], *, over_s: float) -> list[Fault]:
    """Flips to mixed while requests come, and back to what the worker was, or to what it was not."""
    single = [worker_id for worker_id, role in roles.items() if role != "mixed"]
    if not single or rng.random() >= MIXED_CHANCE:
        return []
    worker_id = WorkerId(rng.choice(single))
    back: Role = roles[worker_id] if rng.random() < 0.8 else rng.choice(["prefill", "decode"])
    at_s, mixed_s = rng.uniform(0.0, 0.6) * over_s, rng.choice([0.05, 0.5, 2.0])
    return [
        Operate(at_s=at_s, for_s=mixed_s, operation=FlipOperation(worker_id=worker_id, role="mixed")),
        Operate(
            at_s=at_s + mixed_s + 0.1,
            for_s=rng.choice([1.0, 3.0, 12.0]),
            operation=FlipOperation(worker_id=worker_id, role=back),
        ),
    ]


def _draw_operation(rng: random.Random, worker_id: WorkerId) -> Operation:
    role: Role = rng.choice(["prefill", "decode", "mixed"])
    force = rng.random() < 0.3
    wishes: tuple[Operation, ...] = (
        DrainOperation(worker_id=worker_id, force=force),
        FlipOperation(worker_id=worker_id, role=role),
        RestartOperation(force=force),
        RestartOperation(worker_ids=(worker_id,), force=force),
        RemoveOperation(worker_id=worker_id, within_s=rng.choice([None, 2.0]), force=force),
    )
    return rng.choice(wishes)
