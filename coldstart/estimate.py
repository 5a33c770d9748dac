"""How long a start takes: `T = queue + bytes / bandwidth of the slowest tier on the path + initialisation`.

After ServerlessLLM (OSDI'24, section 6.1). Nothing about hardware is written down here: bandwidths are learned from the
loads of each node, and what is not known yet is taken from other nodes, then from what the caller was told about the
tier, and is else unknown (an infinite time). Initialisation is learned for each model.

A tier here is where a load takes its bytes from; all nearer tiers are passed on the way, chunk by chunk and at the same
time, so a path is as fast as its slowest part, and a measured load tells the speed of its whole path.

A file that is read through the page cache may come out of memory: such a load tells nothing of the disk. Loads carry
whether they went past the cache (direct I/O). As soon as one did, only such loads count for the disk. Where none can
(the file system refuses), the slow ones count: the slowest quarter, and never more than the caller was told.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    Seconds = NDArray[np.float64]
    TierCodes = NDArray[np.int64]

#: Where the bytes are, the nearest first. `device`: on the devices, and the model initialised: nothing to load.
Tier = Literal["device", "dram", "ssd", "remote"]
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)
#: By tier: its column in arrays.
TIER_CODES: Final[Mapping[Tier, int]] = {tier: code for code, tier in enumerate(TIERS)}
#: Tiers whose loads wait for each other. Copies out of DRAM go to each device on lanes of its own.
QUEUED_TIERS: Final[tuple[Tier, ...]] = ("ssd", "remote")

#: Where a bandwidth comes from, the best first. `buffered`: measured, but perhaps some of it out of the page cache.
Origin = Literal["measured", "buffered", "fleet", "told", "unknown"]

#: Loads of one node and tier that are remembered.
WINDOW_LOADS = 32
#: What a load counts less than the next one: after seven loads half.
_AGEING = 0.9
#: Smaller loads count less: much of their time is no transfer.
_FULL_WEIGHT_BYTES = 256 << 20
#: A buffered load that is so much faster than direct ones came out of the page cache.
_CACHED_FACTOR = 1.25
#: Of buffered loads, where nothing better is known.
_SLOW_QUANTILE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLoad:
    """One load that ended well."""

    node_id: str
    tier: Tier
    #: That came from the tier; > 0.
    num_bytes: int
    #: From the first read until the last byte was in place, > 0: without the wait in line and the initialisation.
    seconds: float
    #: Whether it went past the page cache. Means nothing but for `ssd`.
    is_direct: bool

    def __post_init__(self) -> None:
        if self.tier == "device":
            raise ValueError("nothing is loaded from the device")
        if self.num_bytes <= 0 or not 0 < self.seconds < math.inf:
            raise ValueError(f"a load has bytes and takes time, got {self.num_bytes} bytes in {self.seconds} s")

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds


@dataclass(frozen=True, slots=True)
class Bandwidth:
    #: 0: unknown.
    bytes_per_s: float
    origin: Origin
    num_loads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedLoad:
    """A load that waits or is under way."""

    load_id: str
    tier: Tier
    num_bytes: int
    done_bytes: int = 0
    #: When it was asked for: those of one tier go in this order, whatever model they are of.
    arrived_s: float


@dataclass(frozen=True, slots=True)
class BandwidthTable:
    """Paths of many nodes: a snapshot of what is known."""

    node_ids: tuple[str, ...]
    #: By node and tier (`TIER_CODES`), of the whole path to the device; infinite for `device`, 0 where unknown.
    bytes_per_s: Seconds

    def start_s(self, num_bytes: int, tiers: TierCodes, queue_s: Seconds, init_s: float) -> Seconds:
        """By node: seconds until a model of that size is ready if it is asked for now.

        `tiers`: by node, the code of the tier where the node has it; `queue_s`: by node, what is in line there.
        Infinite where no bandwidth is known. On the device nothing is waited for.
        """
        paths = self.bytes_per_s[np.arange(len(self.node_ids)), tiers]
        with np.errstate(divide="ignore"):
            load_s: Seconds = np.where(np.isinf(paths), 0.0, num_bytes / paths)
        needs_load = tiers != TIER_CODES["device"]
        seconds: Seconds = np.where(needs_load, queue_s + load_s + init_s, 0.0)
        return seconds


class LoadHistory:
    """What was measured so far: at most `WINDOW_LOADS` loads of each node and tier, and starts of each model."""

    def __init__(self, told_bytes_per_s: Mapping[Tier, float] | None = None, told_init_s: float = 0.0) -> None:
        """`told_...`: what somebody measured or configured; used until loads tell better."""
        if any(value <= 0 for value in (told_bytes_per_s or {}).values()) or told_init_s < 0:
            raise ValueError(f"bandwidths must be positive, got {told_bytes_per_s}, {told_init_s} s")
        self._told = dict(told_bytes_per_s or {})
        self._told_init_s = told_init_s
        self._direct: dict[tuple[str, Tier], deque[MeasuredLoad]] = {}
        self._buffered: dict[tuple[str, Tier], deque[MeasuredLoad]] = {}
        self._inits_s: dict[str, deque[float]] = {}
        self._own: dict[tuple[str, Tier], Bandwidth] = {}

    def observe(self, load: MeasuredLoad) -> None:
        is_buffered = load.tier == "ssd" and not load.is_direct
        windows = self._buffered if is_buffered else self._direct
        key = load.node_id, load.tier
        windows.setdefault(key, deque(maxlen=WINDOW_LOADS)).append(load)
        self._own[key] = self._estimate(key)

    def observe_init(self, model: str, seconds: float) -> None:
        """How long a worker took from the last byte in place until it could answer."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"initialisation takes a finite time, got {seconds}")
        self._inits_s.setdefault(model, deque(maxlen=WINDOW_LOADS)).append(seconds)

    def is_cached(self, load: MeasuredLoad) -> bool:
        """Whether the load was faster than the node's disk is, so that it must have come out of the page cache."""
        if load.tier != "ssd" or load.is_direct:
            return False
        direct = self._direct.get((load.node_id, "ssd"))
        if not direct:
            told = self._told.get("ssd", math.inf)
            return load.bytes_per_s > _CACHED_FACTOR * told
        return load.bytes_per_s > _CACHED_FACTOR * _quantile(direct, 0.5)

    def bandwidth(self, node_id: str, tier: Tier) -> Bandwidth:
        """Of the path from there to the device, as loads from there showed it."""
        if tier == "device":
            return Bandwidth(math.inf, "measured")
        own = self._own.get((node_id, tier))
        if own is not None:
            return own
        others = [one for (_, other), one in self._own.items() if other == tier]
        if others:
            middle = float(np.median([one.bytes_per_s for one in others]))
            return Bandwidth(middle, "fleet", sum(one.num_loads for one in others))
        if tier in self._told:
            return Bandwidth(self._told[tier], "told")
        return Bandwidth(0.0, "unknown")

    def path(self, node_id: str, tier: Tier) -> Bandwidth:
        """The slowest on the way. What is only told of a nearer tier does not overrule a load that passed it."""
        slowest = self.bandwidth(node_id, tier)
        if not slowest.bytes_per_s:
            return slowest
        is_measured = slowest.origin not in ("told", "unknown")
        for nearer in TIERS[1 : TIER_CODES[tier]]:
            one = self.bandwidth(node_id, nearer)
            if one.origin == "unknown" or (one.origin == "told" and is_measured):
                continue
            if one.bytes_per_s < slowest.bytes_per_s:
                slowest = one
        return slowest

    def table(self, node_ids: Sequence[str]) -> BandwidthTable:
        rows = [[self.path(node_id, tier).bytes_per_s for tier in TIERS] for node_id in node_ids]
        return BandwidthTable(tuple(node_ids), np.array(rows, np.float64).reshape(len(node_ids), len(TIERS)))

    def init_s(self, model: str) -> float:
        """The median of the model's own starts, else of all models' medians, else what was told."""
        own = self._inits_s.get(model)
        if own:
            return float(np.median(own))
        if self._inits_s:
            return float(np.median([np.median(one) for one in self._inits_s.values()]))
        return self._told_init_s

    def _estimate(self, key: tuple[str, Tier]) -> Bandwidth:
        direct, buffered = self._direct.get(key), self._buffered.get(key)
        if direct:
            return Bandwidth(_quantile(direct, 0.5), "measured", len(direct))
        assert buffered
        slow = min(_quantile(buffered, _SLOW_QUANTILE), self._told.get(key[1], math.inf))
        return Bandwidth(slow, "buffered", len(buffered))


def queue_s(
    loads: Iterable[QueuedLoad], tier: Tier, bytes_per_s: float, before: tuple[float, str] | None = None
) -> float:
    """Seconds until all that is in line at that tier of a node is loaded; infinite at an unknown bandwidth.

    `before`: (arrival, id) of a load; only what came before it counts. Loads of tiers without a queue wait for nothing.
    """
    if tier not in QUEUED_TIERS:
        return 0.0
    left = [
        max(0, one.num_bytes - one.done_bytes)
        for one in loads
        if one.tier == tier and (before is None or (one.arrived_s, one.load_id) < before)
    ]
    return _seconds(sum(left), bytes_per_s)


def _seconds(num_bytes: int, bytes_per_s: float) -> float:
    if not num_bytes:
        return 0.0
    return num_bytes / bytes_per_s if bytes_per_s > 0 else math.inf


def _quantile(loads: Iterable[MeasuredLoad], share: float) -> float:
    """The smallest bandwidth of which at least that share of all weight is not above it; later loads weigh more."""
    rows = list(loads)
    ages = range(len(rows) - 1, -1, -1)
    weighed = sorted(
        (load.bytes_per_s, min(load.num_bytes, _FULL_WEIGHT_BYTES) * _AGEING**age)
        for load, age in zip(rows, ages, strict=True)
    )
    aim = share * sum(weight for _, weight in weighed)
    for bytes_per_s, weight in weighed:
        aim -= weight
        if aim <= 0:
            return bytes_per_s
    return weighed[-1][0]
