"""The node agents that a coordinator hears of, and the slots that they have. A machine without I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coordinator.operation_terms import SlotSeen

if TYPE_CHECKING:
    from contracts.control_messages import AgentBeat, WorkerSlot
    from contracts.ids import WorkerId

#: How often agents tell what they have, besides when it changes.
BEAT_INTERVAL_S = 1.0
#: An agent that is silent for longer is not counted on.
SILENCE_S = 3.5


class _Heard(NamedTuple):
    beat: AgentBeat
    at_s: float


class Agents:
    def __init__(self) -> None:
        #: By address: a later life of an agent has another one, or replaces the earlier one there.
        self._heard: dict[str, _Heard] = {}

    def beat(self, beat: AgentBeat, now_s: float) -> bool:
        """Whether that is news of a life that was not known."""
        known = self._heard.get(beat.address)
        self._heard[beat.address] = _Heard(beat, now_s)
        return known is None or known.beat.incarnation != beat.incarnation

    def slots(self, now_s: float) -> dict[WorkerId, SlotSeen]:
        """Those of the agents that are heard of; where two have the same one, the later agent's."""
        return {
            slot.worker_id: SlotSeen(
                worker_id=slot.worker_id,
                role=slot.role,
                state=slot.state,
                incarnation=slot.incarnation,
                problem=slot.problem,
                agent=heard.beat.incarnation,
                address=heard.beat.address,
            )
            for heard in self._present(now_s)
            for slot in heard.beat.slots
        }

    def told(self, now_s: float) -> tuple[WorkerSlot, ...]:
        """As `slots`, as they were told, by worker id."""
        found = {slot.worker_id: slot for heard in self._present(now_s) for slot in heard.beat.slots}
        return tuple(slot for _, slot in sorted(found.items()))

    def beats(self, now_s: float) -> tuple[AgentBeat, ...]:
        """What each agent that is heard of told last, the latest agent last."""
        return tuple(heard.beat for heard in self._present(now_s))

    def _present(self, now_s: float) -> list[_Heard]:
        """The latest agent last. Forgets those that are silent."""
        self._heard = {address: heard for address, heard in self._heard.items() if now_s - heard.at_s <= SILENCE_S}
        return sorted(self._heard.values(), key=lambda heard: heard.beat.incarnation)
