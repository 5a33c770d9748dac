"""What a capacity study is about: workers, what their steps cost, and the limits that the policies are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.policy.dispatch import DispatchLimits
from decode import DecodeLimits
from engine.compose import StepBudget
from prefill import PrefillLimits

if TYPE_CHECKING:
    from contracts.latency import LatencyModel, TransferModel
    from contracts.messages import Role

#: One way of a control message, where nothing else is said.
MESSAGE_S = 0.0003
#: Control messages between a request's arrival and its first token: to the coordinator and back, to the worker and
#: back. And until it is written on: the announcement of its KV, and the lease's confirmation with its reply.
MESSAGES_TO_FIRST_TOKEN = 4
MESSAGES_OF_HANDOFF = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup:
    """Workers that are alike."""

    #: Worker ids are `{name}-{number}`.
    name: str
    role: Role
    count: int
    latency: LatencyModel
    #: KV blocks of each worker.
    num_blocks: int
    #: Devices of each worker: goodput is counted per device.
    num_devices: int = 1
    #: A pipeline of so many equal stages: a step takes as long, but the next may begin after a stage's share.
    pipeline_stages: int = 1
    budget: StepBudget = field(default_factory=lambda: StepBudget(max_tokens=512, max_sequences=64))
    prefill: PrefillLimits = field(default_factory=PrefillLimits)
    decode: DecodeLimits = field(default_factory=DecodeLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """One study. All figures come from here and from the workload: nothing in a study is random."""

    groups: tuple[WorkerGroup, ...]
    transfer: TransferModel
    kv_token_bytes: int
    block_tokens: int = 16
    max_context_tokens: int = 131_072
    dispatch: DispatchLimits = field(default_factory=DispatchLimits)
    heartbeat_interval_s: float = 0.5
    #: One way of a control message.
    message_s: float = MESSAGE_S
    #: What a worker spends between two steps outside its engine.
    between_steps_s: float = 0.0
    #: From the arrival at the gateway to the placement, beyond two messages: validating, tokenising.
    gateway_s: float = 0.0
    #: KV is pulled while the next chunk computes; else all of it after the last chunk.
    overlap: bool = True
    #: A request that is not finished by then is given up.
    request_timeout_s: float = 600.0
    #: How often a refused request is sent again, after the pause that the refusal names; 0: never.
    max_retries: int = 0
    #: Seconds between two samples of the time lines in the result.
    sample_interval_s: float = 1.0

    @property
    def num_devices(self) -> int:
        return sum(group.count * group.num_devices for group in self.groups)
