"""What operators choose about placement and admission."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from contracts.config import AdmissionForm, DispatchPolicyName  # noqa: TC001 (read at run time by the decision log)
from coordinator.policy.virtual_usage import high_headroom


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    #: A worker with this many requests waiting gets no more: beyond it waiting only grows.
    max_waiting_requests: int = 512
    #: What a refused client is told while no worker of a role is up.
    not_ready_retry_after_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRule:
    """Which requests of classes with targets are refused; see `coordinator.policy.admission`."""

    form: AdmissionForm = "predicted"
    #: Of the target: what a prediction may be at most.
    ttft_share: float = 1.0
    tpot_share: float = 1.0
    #: After a refusal both shares of that class are smaller by this part until one of it is accepted.
    hysteresis: float = 0.02
    #: See `coordinator.margins`.
    miss_share: float = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class ConductorSettings:
    policy: DispatchPolicyName = "ttft_min"
    #: See `coordinator.policy.writing`.
    decode: Literal["spread", "pack"] = "spread"
    #: What another worker that reads prompts holds is copied only where that is more than so many times as much.
    fetch_ratio: float = 1.5
    #: Of a prefill worker's KV memory: what it copies of that within a minute at most.
    replica_share: float = 1.0
    #: Mixed workers beside others get only prompts with at most so many uncached tokens; 0: any.
    local_prefill_tokens: int = 0
    #: In which order workers read prompts: whether a request waits for those of classes with longer targets.
    queue_order: Literal["fcfs", "shortest", "edf"] = "edf"
    #: With `edf`: what has no target, or a later one, counts as due so long after it came; and one priority more as due
    #: so much earlier.
    unhurried_s: float = 60.0
    priority_s: float = 10.0
    #: With `freeness`: kept free where answers of a priority run; see `coordinator.policy.virtual_usage`.
    headroom_tokens: dict[int, int] = field(default_factory=high_headroom)
    admission: AdmissionRule = field(default_factory=AdmissionRule)
    limits: DispatchLimits = field(default_factory=DispatchLimits)
    #: A placement is contained in reports that come so much later.
    booking_grace_s: float = 0.25
    #: Tokens of each block that `DispatchItem.block_keys` names.
    block_tokens: int = 16
    max_directory_blocks: int = 16_000_000
