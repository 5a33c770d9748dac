"""What a node agent knows of its weights, as it tells coordinators: where they lie, what is in line, how fast loads
were. Reads no clock; does no I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coldstart.residence import CopyState
from contracts.weight_messages import (
    MAX_IN_LINE,
    MAX_MEASURED,
    HeldWeights,
    MeasuredWeights,
    NodeWeights,
    WeightsInLine,
)

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from coldstart.residence import Copy, WeightsKey
    from coldstart.whereabouts import Whereabouts
    from contracts.weight_messages import WeightTier

#: A copy in one of these states is not there yet.
_COMING = (CopyState.QUEUED, CopyState.SIZING, CopyState.FILLING)
#: In one of these it can be handed out. A compressed one is decoded first, where that is expected to take less than the
#: next tier: that is told of it, as what it takes at most.
_THERE = (CopyState.RESIDENT, CopyState.COMPRESSING)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSeen:
    """A load that ended well, as its loader tells."""

    num_bytes: int
    #: As `cluster.launch.Filled`.
    tier: str
    seconds: float
    is_direct: bool
    converted_s: float


class WeightsBook:
    def __init__(self) -> None:
        #: By key: the models that need it.
        self._models: dict[WeightsKey, list[str]] = {}
        #: As of the last look at the disk.
        self._places: dict[WeightsKey, Whereabouts] = {}
        self._measured: deque[MeasuredWeights] = deque(maxlen=MAX_MEASURED)
        self._num_measured = 0

    def needs(self, key: WeightsKey, model: str) -> None:
        """Workers of that model may run here."""
        models = self._models.setdefault(key, [])
        if model not in models:
            models.append(model)

    @property
    def keys(self) -> tuple[WeightsKey, ...]:
        """Those that are needed here."""
        return tuple(self._models)

    def found(self, key: WeightsKey, place: Whereabouts | None) -> None:
        """What a look at the disk tells; None: nothing."""
        if place is None:
            self._places.pop(key, None)
        else:
            self._places[key] = place

    def loaded(self, key: WeightsKey, load: LoadSeen) -> None:
        """Of an original the bytes count that it has there: they are what the next load is estimated by."""
        place = self._places.get(key)
        original_bytes = place.num_bytes if place is not None and place.tier == "remote" else load.num_bytes
        if load.tier in ("original", "remote"):
            self._measure("remote", original_bytes, load.seconds, is_direct=False)
        elif load.tier == "ssd":
            if load.converted_s > 0:
                self._measure("remote", original_bytes, load.converted_s + load.seconds, is_direct=False)
            self._measure("ssd", load.num_bytes, load.seconds, is_direct=load.is_direct)

    def report(
        self, copies: Sequence[Copy], done_bytes: int, models: Container[str], measured_after: int
    ) -> NodeWeights:
        """`copies`: in the order of asking; `done_bytes`: of the load that is under way; `models`: those that the
        coordinator is told about; `measured_after`: number of the last load that it knows."""
        by_key = {copy.key: copy for copy in copies}
        held: list[HeldWeights] = []
        for key, names in self._models.items():
            copy, place = by_key.get(key), self._places.get(key)
            for name in names:
                if name not in models:
                    continue
                if copy is not None and copy.state in _THERE:
                    held.append(HeldWeights(model=name, tier="dram", num_bytes=copy.num_bytes))
                elif place is not None and place.num_bytes > 0:
                    held.append(HeldWeights(model=name, tier=place.tier, num_bytes=place.num_bytes))
        in_line = [self._in_line(copy, done_bytes) for copy in copies if copy.state in _COMING]
        return NodeWeights(
            held=tuple(held),
            in_line=tuple(in_line[:MAX_IN_LINE]),
            measured=tuple(one for one in self._measured if one.number > measured_after),
        )

    def _in_line(self, copy: Copy, done_bytes: int) -> WeightsInLine:
        place = self._places.get(copy.key)
        tier: WeightTier = "remote" if place is None else place.tier
        num_bytes = (place.num_bytes if place is not None else 0) or copy.num_bytes
        return WeightsInLine(
            models=tuple(self._models.get(copy.key, ())),
            tier=tier,
            num_bytes=num_bytes,
            done_bytes=min(done_bytes, num_bytes) if copy.state is CopyState.FILLING else 0,
        )

    def _measure(self, tier: WeightTier, num_bytes: int, seconds: float, *, is_direct: bool) -> None:
        if num_bytes <= 0 or seconds <= 0:
            return
        self._num_measured += 1
        self._measured.append(
            MeasuredWeights(
                number=self._num_measured, tier=tier, num_bytes=num_bytes, seconds=seconds, is_direct=is_direct
            )
        )
