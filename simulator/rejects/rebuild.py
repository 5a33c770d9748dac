"""Makes a study of a stretch of a decision log: its workers, what they cost, and its requests. Pure.

What a log does not hold is assumed, and `Rebuilt.assumptions` says so: the length of each answer is the mean of those
to prompts of such a length, a worker's prefix cache has the size of its whole KV pool, and the cluster begins empty.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import ConfigError
from contracts.latency_models import FittedLatency
from contracts.transfer_models import LinkTransfer
from engine.compose import StepBudget
from prefill import PrefillLimits
from prefill.ordering import QueueRules
from simulator.heap.spec import MESSAGE_S, StudySpec, WorkerGroup
from simulator.rejects.summary import NO_CLASS
from workload.request import WorkloadRequest
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.decision_records import CostKind, Decision, WorkerUp
    from simulator.rejects.reader import Stretch

#: Reasons that a replay can judge: the others say that a worker was missing, or that a prompt fits nowhere.
REPLAYED = ("ttft", "tpot", "full")

_HINT_CHARS = 8
_DEFAULT_BATCH_TOKENS = 512
_DEFAULT_SEQUENCES = 64
#: Of requests without targets, for the figures alone.
_NO_TARGETS = SloClass(NO_CLASS, 1e12, 1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request of the log."""

    arrival_s: float
    last: Decision
    workload: WorkloadRequest
    is_accepted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    spec: StudySpec
    #: In order of arrival; those refused for other reasons than `REPLAYED` are left out.
    requests: tuple[Asked, ...]
    #: Of all classes of the requests.
    slos: tuple[SloClass, ...]
    num_left_out: int
    assumptions: tuple[str, ...]


def rebuild(stretch: Stretch) -> Rebuilt:
    """Raises ConfigError where the log does not say what steps cost."""
    hint_blocks = max((each.hint_blocks for each in stretch.decisions), default=1)
    hash_block_tokens = hint_blocks * stretch.header.settings.block_tokens
    has_hints = any(each.hints for each in stretch.decisions)
    asked, num_left_out = _asked(stretch, hash_block_tokens if has_hints else 0)
    groups = _groups(stretch, has_hints=has_hints)
    header, surroundings = stretch.header, stretch.header.surroundings
    slos = tuple(SloClass(name, targets.ttft_ms, targets.tpot_ms) for name, targets in header.slos.items())
    waited_s = median(each.last.waited_s for each in asked) if asked else 0.0
    spec = StudySpec(
        groups=groups,
        transfer=LinkTransfer(
            latency_s=stretch.link.latency_s,
            bandwidth_bytes_s=stretch.link.bandwidth_bytes_s,
            efficiency=stretch.link.efficiency,
        ),
        kv_token_bytes=stretch.link.kv_token_bytes,
        block_tokens=next(iter(stretch.workers.values())).block_tokens,
        max_context_tokens=max(worker.max_context_tokens for worker in stretch.workers.values()),
        store_tokens=sum(_num_tokens(worker) for worker in stretch.workers.values() if worker.role == "store"),
        conductor=header.settings,
        slos=slos,
        default_slo=header.default_slo,
        max_output_tokens=max((each.last.max_tokens for each in asked), default=1),
        heartbeat_interval_s=surroundings.heartbeat_interval_s,
        between_steps_s=max(
            _costs_of(worker, stretch).between_steps_s for worker in stretch.workers.values() if worker.role != "store"
        ),
        gateway_s=max(0.0, waited_s - MESSAGE_S),
    )
    prefixes = (
        f"shared prefixes to {hash_block_tokens:,} tokens, prefix caches as large as the whole KV pools (none at those "
        "that only write answers), all stores as one"
        if has_hints
        else "no shared prefixes: the log has no hints"
    )
    return Rebuilt(
        spec=spec,
        requests=asked,
        slos=(*slos, _NO_TARGETS),
        num_left_out=num_left_out,
        assumptions=(
            "answers have the mean length for their prompts' lengths, at most what was allowed",
            prefixes,
            "costs as known at the end of the stretch, and an empty cluster at its beginning",
            "accepted requests come in and refused ones do not, as logged; who reads and writes each is decided anew",
        ),
    )


# --- requests -----------------------------------------------------------------------------------------


def _asked(stretch: Stretch, hash_block_tokens: int) -> tuple[tuple[Asked, ...], int]:
    first: dict[str, Decision] = {}
    last: dict[str, Decision] = {}
    accepted: set[str] = set()
    for each in stretch.decisions:
        first.setdefault(each.request, each)
        last[each.request] = each
        if each.is_placed or each.was_accepted:
            accepted.add(each.request)
    kept = [name for name in first if name in accepted or last[name].outcome in REPLAYED]
    arrivals_s = {name: _arrival_s(first[name]) for name in kept}
    begin_s = min(arrivals_s.values(), default=0.0)
    asked = [
        Asked(
            arrival_s=arrivals_s[name] - begin_s,
            last=last[name],
            workload=_workload_request(first[name], arrivals_s[name] - begin_s, stretch, hash_block_tokens),
            is_accepted=name in accepted,
        )
        for name in kept
    ]
    asked.sort(key=lambda each: each.arrival_s)
    return tuple(asked), len(first) - len(kept)


def _arrival_s(decision: Decision) -> float:
    """A request that was taken up again came long ago; what is left of it is work from now on."""
    return decision.at_s if decision.was_accepted else decision.at_s - decision.waited_s


def _workload_request(
    decision: Decision, arrival_s: float, stretch: Stretch, hash_block_tokens: int
) -> WorkloadRequest:
    expected = stretch.answers.get(decision.prompt_tokens.bit_length(), decision.answer_tokens)
    return WorkloadRequest(
        arrival_s=arrival_s,
        prompt_tokens=decision.prompt_tokens,
        output_tokens=max(1, min(decision.max_tokens, round(expected))),
        hash_ids=_hash_ids(decision, hash_block_tokens // stretch.header.settings.block_tokens),
        hash_block_tokens=hash_block_tokens,
        slo_class=decision.slo_class or NO_CLASS,
        tenant=decision.tenant,
        priority=decision.priority,
    )


def _hash_ids(decision: Decision, hint_blocks: int) -> tuple[int, ...]:
    """Of blocks of so many of the log's: keys are chained, so that each says everything before it."""
    if not decision.hints:
        return ()
    every = hint_blocks // decision.hint_blocks
    hints = [decision.hints[at : at + _HINT_CHARS] for at in range(0, len(decision.hints), _HINT_CHARS)]
    return tuple(int(hint, 16) for hint in hints[every - 1 :: every])


# --- workers ------------------------------------------------------------------------------------------


def _groups(stretch: Stretch, *, has_hints: bool) -> tuple[WorkerGroup, ...]:
    """Workers that are alike."""
    workers = [worker for worker in stretch.workers.values() if worker.role != "store"]
    if not workers:
        raise ConfigError("the log has no workers there: nothing can be replayed")
    alike: Counter[WorkerUp] = Counter()
    for worker in workers:
        kind = _costs_of(worker, stretch).number
        alike[msgspec.structs.replace(worker, at_s=0.0, worker_id="", incarnation=0, device="", costs=kind)] += 1
    header = stretch.header
    rules = QueueRules(
        order=header.settings.queue_order,
        ageing_s=header.surroundings.queue_ageing_s,
        fair=header.surroundings.queue_fair,
    )
    groups: list[WorkerGroup] = []
    for number, (worker, count) in enumerate(alike.items()):
        if worker.role == "store":
            continue
        costs = _costs_of(worker, stretch)
        groups.append(
            WorkerGroup(
                name=f"{worker.role}{number}",
                role=worker.role,
                count=count,
                latency=_latency(costs, stretch),
                num_blocks=worker.total_blocks,
                prefix_cache_tokens=_num_tokens(worker) if has_hints else 0,
                budget=StepBudget(
                    max_tokens=worker.max_batch_tokens or costs.max_batch_tokens or _DEFAULT_BATCH_TOKENS,
                    max_sequences=worker.max_sequences
                    or header.surroundings.max_sequences.get(worker.role, _DEFAULT_SEQUENCES),
                ),
                tpot_chunks=header.surroundings.tpot_chunks,
                prefill=_prefill_limits(worker, rules),
            )
        )
    return tuple(groups)


def _num_tokens(worker: WorkerUp) -> int:
    return worker.total_blocks * worker.block_tokens


def _prefill_limits(worker: WorkerUp, rules: QueueRules) -> PrefillLimits:
    if not worker.handoff_blocks:
        return PrefillLimits(queue=rules)
    # Half a block more: what is rounded down is then as many as told.
    return PrefillLimits(queue=rules, handoff_share=min(0.5, (worker.handoff_blocks + 0.5) / worker.total_blocks))


def _costs_of(worker: WorkerUp, stretch: Stretch) -> CostKind:
    """Its own, else those that most others of its role have, else anybody's. Raises ConfigError."""
    if worker.costs is not None:
        return stretch.costs[worker.costs]
    known = [other for other in stretch.workers.values() if other.costs is not None]
    kinds = Counter(other.costs for other in known if other.role == worker.role) or Counter(
        other.costs for other in known
    )
    if not kinds:
        raise ConfigError(
            "the log does not say what steps cost: no profile was given to the coordinator, and no worker had measured "
            "enough of its own; nothing can be replayed"
        )
    most = kinds.most_common(1)[0][0]
    return stretch.costs[most if most is not None else 0]


def _latency(costs: CostKind, stretch: Stretch) -> FittedLatency:
    """With what a worker of one role never measures (a step of the other kind) taken from others. Raises
    ConfigError."""
    own = _written(costs)
    others = (worker for worker in stretch.workers.values() if worker.role != "store")
    every = [own, *(_written(_costs_of(worker, stretch)) for worker in others)]
    reads = next((each for each in every if each.prefill.at(1) > 0), None)
    writes = next((each for each in every if each.decode.at(1) > 0), None)
    if reads is None or writes is None:
        unknown = "reading a prompt" if reads is None else "writing an answer"
        raise ConfigError(
            f"the log does not say what {unknown} takes: no profile was given to the coordinator, and "
            "no worker had measured enough of its own; nothing can be replayed"
        )
    return FittedLatency(
        prefill=reads.prefill, pair_s=reads.pair_s, decode=writes.decode, context_token_s=writes.context_token_s
    )


def _written(costs: CostKind) -> FittedLatency:
    if costs.latency is None:
        raise ConfigError("the log does not say what steps cost: they have a form without coefficients")
    return costs.latency


def best_stretch(stretches: Sequence[Stretch]) -> Stretch:
    """The one that says most: with most refusals that can be replayed, else with most decisions. There must be one."""
    return max(
        stretches,
        key=lambda stretch: (sum(each.outcome in REPLAYED for each in stretch.decisions), len(stretch.decisions)),
    )
