"""A model checker for the leased pull: the real machines and ledgers in a world that is forked at every choice.

A `World` is two kinds of nodes (holders, readers), what is under way between them, and a clock. It runs by itself
along one *natural* path: what was sent first arrives first, and time passes only when nothing is under way. Every
other thing that may happen (a message lost, repeated, held back; a pull that fails, spoils its bytes, or lands long
after it was asked to stop; a cancel, a crash, a freeze, a cut link) is a *deviation*. What is held back may happen at
any later moment. `explore` visits every state that is reached with at most so many deviations, in order of their
number, each state once, and audits it; see `docs/lease.md` for what is audited.

Bytes are symbols: a holder's block holds (lease, position) while it is that lease's, and FREED once it is free.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import InvariantBroken
from tests.support.lease_audit import check_terms
from tests.support.lease_deviations import alternatives, deviations
from tests.support.lease_nodes import Scenario, Violation
from tests.support.lease_world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(slots=True)
class Found:
    """What a search saw."""

    #: Different states, and steps between them.
    states: int = 0
    steps: int = 0
    #: Every state within so many deviations was visited; -1: not even the natural path.
    complete_deviations: int = -1
    #: Longest path to a state, in steps.
    depth: int = 0
    #: From how many states the world was run to its rest.
    runs_to_rest: int = 0
    #: How leases ended, over all states.
    ends: set[str] = field(default_factory=set[str])


def explore(scenario: Scenario, *, max_deviations: int, max_states: int, rest_every: int = 50) -> Found:
    """Visits states in order of deviations, then of depth. Raises Violation with the path to the first bad one.

    Every `rest_every`-th state is run to its rest without further faults.
    """
    found = Found()
    tickets = itertools.count()
    first = World(scenario)
    seen = {first.key(): 0}
    #: (deviations, depth, a number that no other has, the state)
    queue = [(0, 0, next(tickets), first)]
    #: States that wait in the queue, by deviations; and whether one was left out because its turn cannot come.
    waiting = [0] * (max_deviations + 1)
    waiting[0] = 1
    left_out = False
    while queue and found.states < max_states:
        cost_so_far, depth, _, state = heapq.heappop(queue)
        waiting[cost_so_far] -= 1
        found.complete_deviations = max(found.complete_deviations, cost_so_far - 1)
        found.states += 1
        found.depth = max(found.depth, depth)
        if found.states % rest_every == 1:
            _run_to_rest(state.fork(), found)
        for name, cost, act in _choices(state, cost_so_far < max_deviations):
            world = state.fork()
            if not _act(world, name, act, state):
                continue
            found.steps += 1
            key = world.key()
            total = cost_so_far + cost
            if seen.get(key, max_deviations + 1) <= total:
                continue
            seen[key] = total
            if sum(waiting[: total + 1]) >= max_states - found.states:
                left_out = True  # audited like the others, but not worth its memory
                continue
            waiting[total] += 1
            heapq.heappush(queue, (total, depth + 1, next(tickets), world))
    if not queue and not left_out:
        found.complete_deviations = max_deviations
    return found


def _choices(world: World, more: bool) -> Iterator[tuple[str, int, Callable[[World], object]]]:
    yield "", 0, World.natural
    for name, act in alternatives(world):
        yield name, 0, act
    if more:
        for name, act in deviations(world):
            yield name, 1, act


def _act(world: World, name: str, act: Callable[[World], object], before: World) -> bool:
    """Lets it happen and audits what came of it; False where nothing was left to happen."""
    try:
        done = act(world)
        if not name and done is None:
            return False
        world.trail = (before.trail, f"{name} {done or ''}".strip())
        check_terms(world)
    except (Violation, InvariantBroken, AssertionError) as error:
        path = "\n  ".join([*before.path(), f"{name or 'natural'} <-- here"])
        raise Violation(f"{error}\n  {path}") from error
    return True


def _run_to_rest(world: World, found: Found) -> None:
    """Without further faults everything ends: both sides idle, every block free."""
    world.cut = frozenset()
    start_s = world.now_s
    before = world.path()
    for _ in range(3000):
        world.frozen = frozenset()
        if not _act(world, "", World.natural, world):
            break
    else:
        raise Violation(f"not at rest after 3000 steps and {world.now_s - start_s:g} s\n  " + "\n  ".join(before))
    found.runs_to_rest += 1
    for node in world.nodes:
        if node.dead:
            raise Violation(f"{node.me.worker_id} is dead at rest\n  " + "\n  ".join(world.path()))
        free = node.ledger.load()["free_blocks"]
        if not node.machine.idle or free != node.ledger.num_blocks or world.items or world.lurking:
            raise Violation(f"at rest: {node.machine!r}, {node.ledger!r}\n  " + "\n  ".join(world.path()))
        found.ends.update(node.ends.values())
