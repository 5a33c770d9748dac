"""What a coordinator learns of starts: how fast each machine loads weights, how long workers take beside that, and from
it where the next one is ready soonest. No I/O; reads no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from coldstart.estimate import TIERS, LoadHistory, MeasuredLoad
from contracts.scale_messages import NodeStarts, TierSpeed
from coordinator.policy.room_moves import EmptySlot, Machine, PoolOffer
from coordinator.policy.start_places import StartSite, choose, line_s
from coordinator.pool_history import Durations

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from coldstart.estimate import Tier
    from contracts.control_messages import AgentBeat, WorkerSlot
    from contracts.ids import Incarnation, WorkerId
    from coordinator.agents import Agents
    from coordinator.policy.room_moves import OfferedWorker
    from coordinator.policy.start_places import ChosenStart

#: Workers compute on weights where they lie in the machine's memory: nothing is copied. A measured load says otherwise.
_TOLD: Final[Mapping[Tier, float]] = {"dram": math.inf}
#: Lives of agents of which the last load is remembered.
_MAX_AGENTS = 1024


@dataclass(slots=True)
class _Expected:
    """A start that was begun."""

    takes_s: float
    #: Of the life before it.
    after: Incarnation


class StartKnowledge:
    """Of one coordinator; forgotten with it. Bounded by machines and pools."""

    def __init__(self, agents: Agents) -> None:
        self._agents = agents
        self._history = LoadHistory(_TOLD)
        #: By life of an agent: number of the last load that was noted.
        self._heard: dict[Incarnation, int] = {}
        self._expected: dict[WorkerId, _Expected] = {}
        #: By pool: by how much starts missed their estimates.
        self._misses: dict[str, Durations] = {}
        #: By pool: how long a process does something else before it needs its weights.
        self._overlaps: dict[str, Durations] = {}
        #: Whose initialisation was seen.
        self._inits: set[str] = set()

    # --- what is heard ----------------------------------------------------------------------------

    def heard(self, beat: AgentBeat) -> int:
        """Number of the last load that is known of this life of the agent; 0: none."""
        last = self._heard.pop(beat.incarnation, 0)
        for load in () if beat.weights is None else beat.weights.measured:
            # What was told before may come again; what makes no sense is nobody's measurement.
            if load.number > last and load.num_bytes > 0 and 0 < load.seconds < math.inf:
                self._history.observe(
                    MeasuredLoad(
                        node_id=beat.node,
                        tier=load.tier,
                        num_bytes=load.num_bytes,
                        seconds=load.seconds,
                        is_direct=load.is_direct,
                    )
                )
            last = max(last, load.number)
        # The one that was heard of last is the last to be forgotten.
        self._heard[beat.incarnation] = last
        while len(self._heard) > _MAX_AGENTS:
            del self._heard[next(iter(self._heard))]
        return last

    def started(self, slot: WorkerSlot) -> None:
        """A life of a worker became ready; called once for each."""
        if slot.start_s is None or not 0 <= slot.start_s < math.inf:
            return
        if slot.weights_wait_s is not None and 0 <= slot.weights_wait_s <= slot.start_s:
            self._history.observe_init(slot.pool, slot.start_s - slot.weights_wait_s)
            self._inits.add(slot.pool)
            overlap = self._overlaps.setdefault(slot.pool, Durations(0.0))
            overlap.note(min(slot.weights_due_s, slot.start_s - slot.weights_wait_s))
        expected = self._expected.pop(slot.worker_id, None)
        if expected is not None and slot.incarnation > expected.after:
            self._misses.setdefault(slot.pool, Durations(0.0)).note(abs(slot.start_s - expected.takes_s))

    # --- what is asked ----------------------------------------------------------------------------

    def next_starts(self, pool: str, worker_ids: Sequence[WorkerId], count: int, now_s: float) -> list[ChosenStart]:
        """So many of these empty slots of a pool, those first that would be ready soonest."""
        slots = self._slots(now_s)
        models = {slots[worker_id].model for worker_id in worker_ids if worker_id in slots}
        model = min(models - {""}, default="")
        overlap = self._overlaps.get(pool)
        chosen = choose(
            self._sites(worker_ids, now_s),
            model,
            self._history,
            count,
            init_s=self._history.init_s(pool),
            overlap_s=0.0 if overlap is None else overlap.mean_s,
        )
        if self._inits:
            return chosen
        # Nothing was seen yet of what comes after the weights: places can be compared, times are not whole.
        return [
            one if one.takes_s is None else replace(one, takes_s=None, reason=f"{one.reason} (weights alone)")
            for one in chosen
        ]

    def takes_s(self, pool: str, worker_ids: Sequence[WorkerId], now_s: float) -> float | None:
        """What the next start of the pool takes, from its process to its being ready; None: too little is known."""
        return next((one.takes_s for one in self.next_starts(pool, worker_ids, 1, now_s)), None)

    def nodes(self, now_s: float) -> dict[WorkerId, str]:
        """By slot, the machine that has it."""
        return {slot.worker_id: beat.node for beat in self._agents.beats(now_s) for slot in beat.slots}

    def budgets(self, now_s: float) -> dict[str, int | None]:
        """By machine, what workers may take there together."""
        return {beat.node: beat.workers_memory_bytes for beat in self._agents.beats(now_s)}

    def machines(self, now_s: float) -> dict[str, Machine]:
        """By name, those that tell of their weights; nothing is said of their memory."""
        found: dict[str, Machine] = {}
        for beat in self._agents.beats(now_s):
            if beat.weights is None:
                continue
            speeds: dict[Tier, float] = {tier: self._history.path(beat.node, tier).bytes_per_s for tier in TIERS}
            found[beat.node] = Machine(
                node=beat.node,
                free_bytes=None,
                bytes_per_s=speeds,
                queue_s=line_s(beat.weights, speeds),
            )
        return found

    def offer(
        self, pool: str, worker_bytes: int, workers: tuple[OfferedWorker, ...], empty: Sequence[WorkerId], now_s: float
    ) -> PoolOffer | None:
        """What a pool has, and where else it could be; None: nobody tells of its weights."""
        slots, nodes = self._slots(now_s), self.nodes(now_s)
        model = next((slot.model for slot in slots.values() if slot.pool == pool and slot.model), "")
        held = {
            beat.node: one
            for beat in self._agents.beats(now_s)
            if beat.weights is not None and (one := beat.weights.of(model)) is not None
        }
        if not held:
            return None
        places: dict[str, EmptySlot] = {}
        for worker_id in empty:
            node = nodes.get(worker_id, "")
            if node in held and node not in places:
                places[node] = EmptySlot(worker_id, held[node].tier)
        return PoolOffer(
            pool=pool,
            worker_bytes=worker_bytes,
            weight_bytes=max(one.num_bytes for one in held.values()),
            init_s=self._history.init_s(pool),
            workers=workers,
            slots=places,
        )

    def spread_s(self, pool: str) -> float:
        """By how much starts of the pool miss what was expected of them."""
        misses = self._misses.get(pool)
        return 0.0 if misses is None else misses.mean_s

    def expect(self, chosen: ChosenStart, now_s: float) -> None:
        """That start was begun."""
        slot = self._slots(now_s).get(chosen.worker_id)
        if chosen.takes_s is not None and slot is not None:
            self._expected[chosen.worker_id] = _Expected(chosen.takes_s, slot.incarnation)

    def forget_all_but(self, worker_ids: Container[WorkerId]) -> None:
        """Only these are still being started; others failed, or were called off."""
        self._expected = {name: one for name, one in self._expected.items() if name in worker_ids}

    def expected_s(self) -> Mapping[WorkerId, float]:
        """Of starts that were begun and have not ended, what they take in all."""
        return {worker_id: one.takes_s for worker_id, one in self._expected.items()}

    def told(self, now_s: float) -> tuple[NodeStarts, ...]:
        """Each machine whose agent tells of its weights, by name."""
        rows: dict[str, NodeStarts] = {}
        for beat in self._agents.beats(now_s):
            if beat.weights is None:
                continue
            speeds: list[TierSpeed] = []
            for tier in TIERS:
                one = self._history.bandwidth(beat.node, tier)
                if tier != "device" and one.bytes_per_s > 0 and math.isfinite(one.bytes_per_s):
                    speeds.append(
                        TierSpeed(tier=tier, bytes_per_s=one.bytes_per_s, origin=one.origin, num_loads=one.num_loads)
                    )
            rows[beat.node] = NodeStarts(
                node=beat.node,
                held=beat.weights.held,
                in_line=len(beat.weights.in_line),
                in_line_bytes=sum(max(0, one.num_bytes - one.done_bytes) for one in beat.weights.in_line),
                speeds=tuple(speeds),
            )
        return tuple(row for _, row in sorted(rows.items()))

    # --- inside -----------------------------------------------------------------------------------

    def _slots(self, now_s: float) -> dict[WorkerId, WorkerSlot]:
        return {slot.worker_id: slot for slot in self._agents.told(now_s)}

    def _sites(self, worker_ids: Sequence[WorkerId], now_s: float) -> list[StartSite]:
        """In the order of their first slots."""
        nodes = self.nodes(now_s)
        reports: dict[str, AgentBeat] = {}
        for beat in self._agents.beats(now_s):
            if beat.weights is not None or beat.node not in reports:
                reports[beat.node] = beat
        by_node: dict[str, list[WorkerId]] = {}
        for worker_id in worker_ids:
            by_node.setdefault(nodes.get(worker_id, ""), []).append(worker_id)
        return [
            StartSite(node=node, worker_ids=tuple(own), weights=reports[node].weights if node in reports else None)
            for node, own in by_node.items()
        ]
