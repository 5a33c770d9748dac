"""Writes decisions down with what they rested on, as lines of `coordinator.decision_records`.

Each decision is one line; lines before it tell which workers came, went or cost something else since the decision
before it. A log therefore holds what a replay needs: workers, costs, settings, and requests with what is known of them.

**How long answers were** is not known here: no token passes the coordinator. Workers tell sums over the answers that
ended, from which means by prompt length are estimated; these are written down every ten seconds.

Prompts cannot be told from a log, equal beginnings can: hints are parts of SHA-256 keys. With them chained, each stands
for everything before it, so every n-th is enough to tell shared prefixes to n blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.latency_models import FittedLatency
from contracts.transfer_models import LinkTransfer
from coordinator.costs import costs_of
from coordinator.decision import Refused
from coordinator.decision_records import (
    FORMAT,
    ZERO,
    AnswerMeans,
    CostKind,
    Decision,
    Header,
    LinkCosts,
    Surroundings,
    Targets,
    WorkerGone,
    WorkerUp,
    line_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from contracts.messages import DispatchItem, Predicted, WorkerInfo
    from coordinator.conductor import Conductor, ConductorSettings
    from coordinator.costs import CostSource, WorkerCosts
    from coordinator.decision import Chosen
    from coordinator.policy.fleet_view import FleetView
    from coordinator.policy.outlook import Outlook
    from workload.slo import SloClass

#: Of a request: of longer prompts every second block's is kept, every fourth, ...
MAX_HINTS = 256
#: Between two lines about answers.
ANSWERS_EVERY_S = 10.0

_KEY_BYTES = 8
_HINT_BYTES = 4
#: Cost kinds that no worker has any more go when there are so many.
_MAX_KINDS = 256
#: More than any answer: what is expected is then not cut.
_ANY_LENGTH = 2**40
#: Significant digits: microseconds of an hour.
_DIGITS = 9


class DecisionLog:
    """A machine without I/O: returns lines. What it is told must come from the conductor's own decisions, in order."""

    def __init__(
        self,
        conductor: Conductor,
        costs: CostSource,
        *,
        settings: ConductorSettings,
        slos: Mapping[str, SloClass],
        default_slo: str | None,
        surroundings: Surroundings,
        version: str,
        started_at: float,
        started_s: float,
    ) -> None:
        """`costs`, `settings` and `slos` are the conductor's. `started_at` is the Unix time at `started_s`."""
        self._conductor = conductor
        self._costs = costs
        self._settings = settings
        self._slos = {name: Targets(slo.ttft_ms, slo.tpot_ms) for name, slo in slos.items()}
        self._default_slo = default_slo
        self._surroundings = surroundings
        self._version = version
        self._started_at = started_at
        self._started_s = started_s
        #: As they were told; windows of the fleet that change their identity with it.
        self._view: FleetView | None = None
        self._outlook: Outlook | None = None
        self._workers: dict[str, WorkerUp] = {}
        self._link: LinkCosts | None = None
        #: By identity; the costs themselves keep that from being reused.
        self._kinds: dict[int, tuple[CostKind, WorkerCosts]] = {}
        self._num_kinds = 0
        #: Bit lengths of prompts seen.
        self._buckets: set[int] = set()
        self._answers_due_s = started_s + ANSWERS_EVERY_S

    def opening(self, now_s: float) -> bytes:
        """A header: a log can be read from here on."""
        at_s = self._at_s(now_s)
        infos = self._conductor.fleet.view().infos
        workers = tuple(self._worker(info, at_s) for info in infos)
        used = {worker.costs for worker in workers}
        return line_of(
            Header(
                format=FORMAT,
                version=self._version,
                started_at=self._started_at,
                at_s=at_s,
                settings=self._settings,
                slos=self._slos,
                default_slo=self._default_slo,
                surroundings=self._surroundings,
                link=self._present_link(),
                costs=tuple(kind for kind, _ in self._kinds.values() if kind.number in used),
                workers=workers,
                answers=self._answer_means(),
            )
        )

    def decided(self, item: DispatchItem, decision: Chosen | Refused, now_s: float) -> bytes:
        """Lines; to be called right after `Conductor.decide`."""
        lines = list(self._changes(now_s))
        self._buckets.add(item.prompt_tokens.bit_length())
        lines.append(line_of(entry_of(self._conductor, item, decision, at_s=self._at_s(now_s))))
        return b"".join(lines)

    # --- what changed -----------------------------------------------------------------------------

    def _changes(self, now_s: float) -> Iterable[bytes]:
        fleet = self._conductor.fleet
        view, outlook = fleet.view(), fleet.outlook()
        if view is not self._view or outlook is not self._outlook:
            self._view, self._outlook = view, outlook
            yield from self._fleet_changes(view, self._at_s(now_s))
        link = self._present_link()
        if link is not self._link:
            self._link = link
            yield line_of(link)
        if now_s >= self._answers_due_s and self._buckets:
            self._answers_due_s = now_s + ANSWERS_EVERY_S
            yield line_of(AnswerMeans(at_s=self._at_s(now_s), tokens=self._answer_means()))

    def _fleet_changes(self, view: FleetView, at_s: float) -> Iterable[bytes]:
        told = self._workers
        self._workers = {}
        told_kinds = {worker.costs for worker in told.values()}
        for info in view.infos:
            worker = self._worker(info, at_s)
            before = told.pop(info.worker_id, None)
            if before is not None and worker.same_worker(before) and worker.costs == before.costs:
                worker = before
            else:
                if worker.costs is not None and worker.costs not in told_kinds:
                    told_kinds.add(worker.costs)
                    yield from (line_of(kind) for kind, _ in self._kinds.values() if kind.number == worker.costs)
                yield line_of(worker)
            self._workers[info.worker_id] = worker
        for worker_id in told:
            yield line_of(WorkerGone(at_s=at_s, worker_id=worker_id))

    def _worker(self, info: WorkerInfo, at_s: float) -> WorkerUp:
        return WorkerUp(
            at_s=at_s,
            worker_id=info.worker_id,
            incarnation=info.incarnation,
            role=info.role,
            total_blocks=info.total_blocks,
            block_tokens=info.identity.layout.block_tokens,
            max_context_tokens=info.max_context_tokens,
            max_batch_tokens=info.max_batch_tokens,
            max_sequences=info.max_sequences,
            handoff_blocks=info.handoff_blocks,
            device=info.device,
            costs=self._kind(costs_of(info, self._costs)),
        )

    def _kind(self, costs: WorkerCosts | None) -> int | None:
        if costs is None:
            return None
        known = self._kinds.get(id(costs))
        if known is None:
            if len(self._kinds) >= _MAX_KINDS:
                used = {worker.costs for worker in self._workers.values()}
                self._kinds = {key: kept for key, kept in self._kinds.items() if kept[0].number in used}
            kind = CostKind(
                number=self._num_kinds,
                latency=costs.latency if isinstance(costs.latency, FittedLatency) else None,
                max_batch_tokens=costs.max_batch_tokens,
                between_steps_s=costs.between_steps_s,
            )
            known = self._kinds[id(costs)] = kind, costs
            self._num_kinds += 1
        return known[0].number

    def _present_link(self) -> LinkCosts:
        """The one that was told last, where it still holds."""
        model, kv_token_bytes = self._costs.transfer, self._costs.kv_token_bytes
        if isinstance(model, LinkTransfer):
            latency_s, bandwidth_bytes_s, efficiency = model.latency_s, model.bandwidth_bytes_s, model.efficiency
        else:
            # What of it shows in two transfers.
            latency_s = model.transfer_s(0, 1)
            bandwidth_bytes_s, efficiency = 2**30 / max(model.transfer_s(2**30, 1) - latency_s, 1e-9), 1.0
        link = LinkCosts(
            latency_s=latency_s,
            bandwidth_bytes_s=bandwidth_bytes_s,
            efficiency=efficiency,
            kv_token_bytes=kv_token_bytes,
        )
        return self._link if self._link is not None and self._link == link else link

    def _answer_means(self) -> dict[int, float]:
        lengths = self._conductor.fleet.answer_lengths
        return {
            bucket: round(lengths.expected(max(1, 2**bucket - 1), _ANY_LENGTH), 3) for bucket in sorted(self._buckets)
        }

    def _at_s(self, now_s: float) -> float:
        return round(now_s - self._started_s, 6)


def entry_of(conductor: Conductor, item: DispatchItem, decision: Chosen | Refused, *, at_s: float) -> Decision:
    """To be called right after `conductor` decided."""
    inputs = conductor.inputs()
    chosen = decision.best if isinstance(decision, Refused) else decision
    infos = conductor.fleet.view().infos
    hints, hint_blocks = hints_on_record(item.block_keys)
    prefill = decode = source = ""
    predicted = None
    if chosen is not None:
        prefill, decode = infos[chosen.prefill_row].worker_id, infos[chosen.decode_row].worker_id
        source = "" if chosen.source_row < 0 else infos[chosen.source_row].worker_id
        predicted = None if chosen.predicted is None else _shortened(chosen.predicted)
    limits = inputs.limits
    return Decision(
        at_s=at_s,
        request=item.request_id,
        prompt_tokens=item.prompt_tokens,
        max_tokens=item.max_tokens,
        outcome=decision.why if isinstance(decision, Refused) else "placement",
        slo_class=inputs.slo_class,
        priority=item.priority,
        tenant=item.tenant,
        waited_s=_short(item.waited_s),
        was_accepted=item.was_accepted,
        avoid=item.avoid,
        hints=hints,
        hint_blocks=hint_blocks,
        retry_after_s=_short(decision.retry_after_s) if isinstance(decision, Refused) else ZERO,
        prefill=prefill,
        decode=decode,
        source=source,
        local_blocks=0 if chosen is None else chosen.local_blocks,
        source_blocks=0 if chosen is None else chosen.source_blocks,
        best_held_blocks=inputs.best_held_blocks,
        predicted=predicted,
        ttft_limit_s=ZERO if limits is None else limits.ttft_s,
        tpot_limit_s=ZERO if limits is None else limits.tpot_s,
        was_refusing=inputs.was_refused,
        answer_tokens=_short(inputs.answer_tokens),
        pending_tokens=inputs.pending_tokens,
        waiting_requests=inputs.waiting_requests,
        num_decodes=_short(inputs.num_decodes),
        context_tokens=_short(inputs.context_tokens),
        num_decodes_then=_short(inputs.num_decodes_then),
        context_tokens_then=_short(inputs.context_tokens_then),
    )


def hints_on_record(block_keys: bytes) -> tuple[str, int]:
    """As `Decision.hints` and `Decision.hint_blocks`; the latter is a power of two."""
    num_blocks = len(block_keys) // _KEY_BYTES
    if not num_blocks:
        return "", 1
    every = 1
    while num_blocks // every > MAX_HINTS:
        every *= 2
    keys = np.frombuffer(block_keys, np.uint8, num_blocks * _KEY_BYTES).reshape(num_blocks, _KEY_BYTES)
    return keys[every - 1 :: every, :_HINT_BYTES].tobytes().hex(), every


def _shortened(predicted: Predicted) -> Predicted:
    return type(predicted)(**{name: _short(getattr(predicted, name)) for name in predicted.__struct_fields__})


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if value else ZERO
