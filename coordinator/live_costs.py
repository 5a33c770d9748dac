"""What steps and transfers cost, from a profile where there is one and from what the workers measure of themselves.

Workers that run the same model with the same token budget share *base* costs: the profile's, where one for their model
was given, else the means of their own fits, weighted by steps. A worker whose steps disagree with that by more than a
fifth over enough of them gets the base scaled, its steps with chunks and its decodes apart: so a slow device or a
crowded machine is found without being told of. Scales are powers of one fixed ratio, and a scale is kept while the
measured one stays within that ratio of it. There are therefore few different `WorkerCosts` however many workers there
are, and they change only for changes that matter.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from contracts.latency_models import CostCurve, FittedLatency
from coordinator.costs import WorkerCosts
from coordinator.live_links import LiveLinks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.ids import Incarnation, WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import LatencyFit, TransferReport, WorkerInfo
    from contracts.profile import LatencyProfile
    from contracts.transfer_models import LinkTransfer
    from coordinator.policy.pair_links import PairLinks

#: Where costs are compared. Steps with chunks: parts of the token budget, each as one prompt; decodes: sequences.
_CHUNK_SHARES = (0.125, 0.5, 1.0)
_NUM_DECODES = (1, 8, 32)
_COMPARED_CONTEXT_TOKENS = 512

#: Scales beyond these powers mean that something else is wrong.
_MAX_POWER = 40
#: Whatever a profile or a fit says, no step takes less, and nothing in it more.
_SHORTEST_S, _LONGEST_S = 1e-9, 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCostLimits:
    #: Of a worker that does not tell its own.
    max_batch_tokens: int = 512
    #: Steps of a kind that a worker's fit must rest on to become base costs ...
    min_base_steps: int = 32
    #: ... and to be held against them.
    min_scale_steps: int = 200
    #: Relative: what measures within it of the base counts as the base. The same for links and a profile's link.
    tolerance: float = 0.2
    #: Ratio between one scale and the next.
    scale_ratio: float = 1.1
    #: Base costs and links are replaced where they changed by more, relative.
    replace_above: float = 0.05
    #: Remembered at most, the latest: lives with their costs, and workers with their links.
    max_workers: int = 16_384
    max_link_workers: int = 256


@dataclass(frozen=True, slots=True)
class _Part:
    """Costs of steps with chunks or of steps that only decode: a curve by tokens or sequences, and one slope."""

    curve: CostCurve
    #: Per query-key pair or per context token.
    slope_s: float

    def scaled(self, ratio: float) -> _Part:
        knots = tuple(seconds * ratio for seconds in self.curve.knot_s)
        curve = CostCurve(floor_s=self.curve.floor_s * ratio, knots=self.curve.knots, knot_s=knots)
        return _Part(curve, self.slope_s * ratio)


_NOTHING = _Part(CostCurve.line(0.0, 0.0), 0.0)

_Points = tuple[tuple[float, float], ...]


def _chunk_points(max_batch_tokens: int) -> _Points:
    tokens = [max(1, int(share * max_batch_tokens)) for share in _CHUNK_SHARES]
    return tuple((number, number * (number + 1) / 2) for number in tokens)


_DECODE_POINTS: _Points = tuple((number, number * _COMPARED_CONTEXT_TOKENS) for number in _NUM_DECODES)


@dataclass(frozen=True, slots=True)
class _Line:
    """One kind of step as a worker fitted it."""

    base_s: float
    count_s: float
    slope_s: float
    num_steps: int

    def part(self) -> _Part:
        return _Part(CostCurve.line(self.base_s, self.count_s), self.slope_s)

    def ratio_to(self, base_s: Sequence[float], points: _Points) -> float:
        """Median over the points of what this takes, relative to the base."""
        return median(
            (self.base_s + self.count_s * count + self.slope_s * size) / other_s
            for other_s, (count, size) in zip(base_s, points, strict=True)
        )


def _line(base_s: float, count_s: float, slope_s: float, num_steps: int) -> _Line | None:
    """None for coefficients that are no costs: whatever a worker sends, the coordinator goes on."""
    coefficients = (base_s, count_s, slope_s)
    if num_steps <= 0 or not all(0 <= seconds <= _LONGEST_S for seconds in coefficients):
        return None
    if base_s + count_s < _SHORTEST_S:
        return None
    return _Line(*coefficients, num_steps)


def _mean_line(lines: Sequence[_Line]) -> _Line:
    """Its seconds are the mean of theirs, weighted by steps, for any step."""
    num_steps = sum(line.num_steps for line in lines)
    base_s, count_s, slope_s = (
        sum(getattr(line, name) * line.num_steps for line in lines) / num_steps
        for name in ("base_s", "count_s", "slope_s")
    )
    return _Line(base_s, count_s, slope_s, num_steps)


class _KindOfStep:
    """Base costs of one kind of step, and the latest fits of the workers that say something of it."""

    def __init__(self, limits: LiveCostLimits, points: _Points, profiled: _Part | None) -> None:
        self._limits = limits
        self._points = points
        self._is_profiled = profiled is not None
        #: Of a round, in which as many fits are heard as workers are known, and of the round before: whoever is heard
        #: in neither is not there any more.
        self._lines: dict[WorkerId, _Line] = {}
        self._lines_before: dict[WorkerId, _Line] = {}
        self._num_heard = 0
        #: None: nothing is known.
        self.base: _Part | None = None
        self._base_s: tuple[float, ...] = ()
        if profiled is not None:
            self._set_base(profiled)

    def hear(self, worker_id: WorkerId, line: _Line) -> bool:
        """Whether the base changed."""
        self._lines_before.pop(worker_id, None)
        self._lines[worker_id] = line
        self._num_heard += 1
        round_is_over = self._num_heard >= len(self._lines) + len(self._lines_before)
        is_first = self.base is None and line.num_steps >= self._limits.min_base_steps
        changed = (round_is_over or is_first) and not self._is_profiled and self._look_at_base()
        if round_is_over:
            self._num_heard = 0
            self._lines_before, self._lines = self._lines, {}
        return changed

    def power_of(self, worker_id: WorkerId, present: int) -> int:
        """The power of `scale_ratio` by which the worker's steps take longer than the base; `present` is the one that
        it has, and keeps unless the measurements say otherwise."""
        line = self._lines.get(worker_id) or self._lines_before.get(worker_id)
        if line is None or line.num_steps < self._limits.min_scale_steps or self.base is None:
            return present
        unit = math.log(self._limits.scale_ratio)
        measured = math.log(line.ratio_to(self._base_s, self._points))
        # From the base itself it is further than from one scale to the next.
        keeps_within = unit if present else math.log1p(self._limits.tolerance)
        if abs(measured - present * unit) <= keeps_within:
            return present
        return max(-_MAX_POWER, min(_MAX_POWER, round(measured / unit)))

    def forget(self, worker_id: WorkerId) -> None:
        self._lines.pop(worker_id, None)
        self._lines_before.pop(worker_id, None)

    def _look_at_base(self) -> bool:
        told = (*self._lines.values(), *self._lines_before.values())
        enough = [line for line in told if line.num_steps >= self._limits.min_base_steps]
        if not enough:
            return False
        mean = _mean_line(enough)
        if self.base is not None and abs(mean.ratio_to(self._base_s, self._points) - 1) <= self._limits.replace_above:
            return False
        self._set_base(mean.part())
        return True

    def _set_base(self, base: _Part) -> None:
        self.base = base
        self._base_s = tuple(
            max(_SHORTEST_S, base.curve.at(int(count)) + base.slope_s * size) for count, size in self._points
        )


@dataclass(slots=True)
class _Known:
    """A worker's life, and what was answered for it last."""

    incarnation: Incarnation
    costs: WorkerCosts | None
    #: Of the base costs that its powers of scale are relative to.
    base_number: int
    chunk_power: int = 0
    decode_power: int = 0


@dataclass(slots=True)
class _Group:
    """Workers that share base costs."""

    max_batch_tokens: int
    kv_token_bytes: int
    between_steps_s: float
    chunks: _KindOfStep
    decodes: _KindOfStep
    #: Counts the changes of base costs.
    base_number: int = 0
    #: What was made of the present base, by role's needs and powers: kinds are told apart by identity.
    made: dict[tuple[bool, bool, int, int], WorkerCosts] = field(
        default_factory=dict[tuple[bool, bool, int, int], WorkerCosts]
    )

    def costs(self, role: str, chunk_power: int, decode_power: int, limits: LiveCostLimits) -> WorkerCosts | None:
        """None where a kind of step that the role takes is not known."""
        reads, writes = role != "decode", role != "prefill"
        chunks, decodes = self.chunks.base, self.decodes.base
        if (reads and chunks is None) or (writes and decodes is None):
            return None
        key = (chunks is None, decodes is None, chunk_power, decode_power)
        costs = self.made.get(key)
        if costs is None:
            scaled_chunks = (chunks or _NOTHING).scaled(limits.scale_ratio**chunk_power)
            scaled_decodes = (decodes or _NOTHING).scaled(limits.scale_ratio**decode_power)
            latency = FittedLatency(
                prefill=scaled_chunks.curve,
                pair_s=scaled_chunks.slope_s,
                decode=scaled_decodes.curve,
                context_token_s=scaled_decodes.slope_s,
            )
            costs = self.made[key] = WorkerCosts(
                latency=latency,
                max_batch_tokens=self.max_batch_tokens,
                between_steps_s=self.between_steps_s,
                kv_token_bytes=self.kv_token_bytes,
            )
        return costs


class LiveCosts:
    """A `coordinator.costs.CostSource`. What it answers for a worker changes only when that worker is observed."""

    def __init__(self, profile: LatencyProfile | None = None, limits: LiveCostLimits | None = None) -> None:
        """A profile of another model than a worker's says nothing about that worker."""
        self._profile = profile
        self._limits = limits or LiveCostLimits()
        self._groups: dict[tuple[KvIdentity, int], _Group] = {}
        self._known: OrderedDict[WorkerId, _Known] = OrderedDict()
        self._kv_token_bytes = 0 if profile is None else profile.kv_token_bytes
        self._links = LiveLinks(
            None if profile is None else profile.transfer,
            tolerance=self._limits.tolerance,
            replace_above=self._limits.replace_above,
            max_workers=self._limits.max_link_workers,
        )

    @property
    def transfer(self) -> LinkTransfer:
        return self._links.model

    @property
    def pairs(self) -> PairLinks | None:
        return self._links.pairs or None

    @property
    def kv_token_bytes(self) -> int:
        """Of the worker whose life began last; 0 before. Where models differ, their `WorkerCosts` tell."""
        return self._kv_token_bytes

    def of(self, info: WorkerInfo) -> WorkerCosts | None:
        known = self._known.get(info.worker_id)
        if known is None or known.incarnation != info.incarnation:
            known = self._first_look(info)
        return known.costs

    def observe(self, info: WorkerInfo, fit: LatencyFit) -> bool:
        """A fit without steps leaves what was told before: the worker may still learn from what others told."""
        self.of(info)
        known = self._known[info.worker_id]
        self._known.move_to_end(info.worker_id)
        group = self._group_of(info)
        changed = False
        chunks = _line(fit.prefill_base_s, fit.prefill_token_s, fit.pair_s, fit.num_prefill_steps)
        decodes = _line(fit.decode_base_s, fit.sequence_s, fit.context_token_s, fit.num_decode_steps)
        for kind, line in ((group.chunks, chunks), (group.decodes, decodes)):
            if line is not None:
                changed |= kind.hear(info.worker_id, line)
        if changed:
            group.base_number += 1
            group.made.clear()
        if known.base_number != group.base_number:
            known.base_number, known.chunk_power, known.decode_power = group.base_number, 0, 0
        known.chunk_power = group.chunks.power_of(info.worker_id, known.chunk_power)
        known.decode_power = group.decodes.power_of(info.worker_id, known.decode_power)
        costs = group.costs(info.role, known.chunk_power, known.decode_power, self._limits)
        differs = costs is not known.costs
        known.costs = costs
        return differs

    def observe_transfers(self, worker_id: WorkerId, report: TransferReport) -> None:
        """What a worker measured of its links. Its pulls are no measure: they wait for prompts to be computed."""
        self._links.hear(worker_id, report.links)

    def bandwidth_bytes_s(self, source: WorkerId, reader: WorkerId) -> float | None:
        """Of KV between two workers; None: not known."""
        return self._links.bandwidth_bytes_s(source, reader)

    def forget_links(self, worker_id: WorkerId) -> None:
        """Of a worker that is not there any more. What its steps took is forgotten with its next life."""
        self._links.forget(worker_id)

    @property
    def num_remembered(self) -> int:
        """Lives and workers with links that take memory."""
        return len(self._known) + len(self._links)

    def _first_look(self, info: WorkerInfo) -> _Known:
        """Of a new life: it costs what the others of its group do, until it tells otherwise."""
        group = self._group_of(info)
        self._kv_token_bytes = group.kv_token_bytes
        group.chunks.forget(info.worker_id)
        group.decodes.forget(info.worker_id)
        costs = group.costs(info.role, 0, 0, self._limits)
        known = self._known[info.worker_id] = _Known(info.incarnation, costs, group.base_number)
        self._known.move_to_end(info.worker_id)
        if len(self._known) > self._limits.max_workers:
            self._known.popitem(last=False)
        return known

    def _group_of(self, info: WorkerInfo) -> _Group:
        max_batch_tokens = info.max_batch_tokens or self._limits.max_batch_tokens
        group = self._groups.get((info.identity, max_batch_tokens))
        if group is None:
            group = self._groups[info.identity, max_batch_tokens] = self._new_group(info, max_batch_tokens)
        return group

    def _new_group(self, info: WorkerInfo, max_batch_tokens: int) -> _Group:
        profile = self._profile
        points = _chunk_points(max_batch_tokens)
        token_bytes = info.identity.layout.token_bytes
        if profile is None or profile.model_fingerprint != info.identity.model_fingerprint:
            chunks = _KindOfStep(self._limits, points, None)
            return _Group(max_batch_tokens, token_bytes, 0.0, chunks, _KindOfStep(self._limits, _DECODE_POINTS, None))
        latency = profile.latency
        return _Group(
            max_batch_tokens,
            token_bytes,
            profile.step_overhead_s,
            _KindOfStep(self._limits, points, _Part(latency.prefill, latency.pair_s)),
            _KindOfStep(self._limits, _DECODE_POINTS, _Part(latency.decode, latency.context_token_s)),
        )
