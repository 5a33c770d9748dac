"""What the coordinator tells operators of how pools scale, and why.

operator -> coordinator   Scaling
"""

from __future__ import annotations

from typing import Literal

import msgspec

from contracts.messages import Empty, Method, Role
from contracts.weight_messages import HeldWeights, WeightTier


class PoolScaling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What would be decided about a pool now."""

    pool: str
    role: Role
    min_workers: int
    max_workers: int
    ready: int
    #: Workers that start, or change their role to join.
    coming: int
    leaving: int = 0
    wanted: int
    kind: Literal["keep", "up", "down"]
    #: A word for it, and all of it in words, with the numbers.
    why: str
    reason: str
    num_starts: int = 0
    flips: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    #: How long a start takes, and how much that varies.
    start_s: float
    start_spread_s: float = 0.0
    #: Whether that was seen, or is only configured.
    starts_seen: int = 0
    #: What the next start is estimated to take, by where it would go; None: too little is known.
    expected_start_s: float | None = None
    #: Which worker that would be, and why; empty: none can be started.
    next_start: str = ""


class TierSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Of loads from one tier of a machine."""

    tier: WeightTier
    bytes_per_s: float
    #: As `coldstart.estimate.Origin`: "measured" there, "buffered", or "fleet" (on other machines).
    origin: str
    num_loads: int


class NodeStarts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What starts are estimated by on one machine."""

    node: str
    held: tuple[HeldWeights, ...] = ()
    #: Loads that wait or are under way, and what they still have to read.
    in_line: int = 0
    in_line_bytes: int = 0
    speeds: tuple[TierSpeed, ...] = ()


class ScalingReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`mode`: whether any of it is done."""

    mode: Literal["off", "propose", "apply"]
    #: Those that have a fixed number of workers are left out.
    pools: tuple[PoolScaling, ...] = ()
    lend_mode: Literal["off", "propose", "apply"] = "off"
    #: What would be lent or given back, and why, in words.
    lending: str = ""
    #: What was done or proposed lately, in words, the newest last, and how long ago.
    done: tuple[tuple[float, str], ...] = ()
    #: Machines whose agents tell of weights.
    nodes: tuple[NodeStarts, ...] = ()


SCALING = Method("coordinator/Scaling", Empty, ScalingReply)
