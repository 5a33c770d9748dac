"""What a node agent tells of the weights on its machine: where they lie, what is being loaded, how fast loads were.

It travels with `contracts.control_messages.AgentBeat`. Times are durations: clocks of two machines have nothing in
common.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

#: The nearest tier that has all of a model: the machine's memory; a folder there in the form that loads at the disk's
#: speed; or the original, which has to be fetched, converted or fused first, wherever it is.
WeightTier = Literal["dram", "ssd", "remote"]

#: Finished loads that an agent remembers, and tells at most.
MAX_MEASURED: Final = 32
#: Loads in line that it tells at most.
MAX_IN_LINE: Final = 64


class HeldWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model, that workers of this coordinator need."""

    model: str
    tier: WeightTier
    #: That a load from there takes.
    num_bytes: int


class WeightsInLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A load that waits or is under way. They go one after the other, in the order in which they are told."""

    #: That need it: several may have the same weights.
    models: tuple[str, ...] = ()
    tier: WeightTier
    num_bytes: int
    done_bytes: int = 0


class MeasuredWeights(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A load that ended well."""

    #: Of this life of the agent: 1, 2, ...
    number: int
    tier: WeightTier
    num_bytes: int
    #: From the first read until the last byte was in place.
    seconds: float
    #: Whether it went past the page cache.
    is_direct: bool = False


class NodeWeights(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of one machine."""

    held: tuple[HeldWeights, ...] = ()
    in_line: tuple[WeightsInLine, ...] = ()
    #: Those that the coordinator has not said it knows, oldest first.
    measured: tuple[MeasuredWeights, ...] = ()

    def of(self, model: str) -> HeldWeights | None:
        """None: nothing is known of it."""
        return next((one for one in self.held if one.model == model), None)
