"""What a capacity study is about: workers, what their steps cost, and the limits that the policies are given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coordinator.policy.settings import ConductorSettings
from decode import DecodeLimits
from engine.compose import StepBudget
from prefill import PrefillLimits

if TYPE_CHECKING:
    from contracts.latency import LatencyModel, TransferModel
    from contracts.messages import Role
    from coordinator.policy.move_terms import MoveRules
    from coordinator.scaling_settings import AutoscaleSettings
    from workload.slo import SloClass

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
    #: So many of them are up from the start; None: all.
    initial: int | None = None
    #: Host memory of each worker that reads prompts, for prefixes of earlier ones, in tokens; 0: none. It counts only
    #: where the workload says which prompts begin alike.
    prefix_cache_tokens: int = 0
    #: A pipeline of so many equal stages: a step takes as long, but the next may begin after a stage's share.
    pipeline_stages: int = 1
    #: Steps with prompts hold nothing else and no part of a prompt that the budget has room for, and answers wait for
    #: them: batching as it was before chunked prefill (vLLM, SOSP'23), for comparison.
    prompts_first: bool = False
    #: Prompts beside answers are cut so that these keep their TPOT targets.
    tpot_chunks: bool = True
    budget: StepBudget = field(default_factory=lambda: StepBudget(max_tokens=512, max_sequences=64))
    prefill: PrefillLimits = field(default_factory=PrefillLimits)
    decode: DecodeLimits = field(default_factory=DecodeLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """One study. All figures come from here and from the workload; chance is only in the policy `random`, seeded."""

    groups: tuple[WorkerGroup, ...]
    transfer: TransferModel
    kv_token_bytes: int
    block_tokens: int = 16
    max_context_tokens: int = 131_072
    #: How the coordinator decides. It knows its workers' costs exactly, their load as of the last heartbeats, and the
    #: order of the first group's queues; its blocks are the workload's.
    conductor: ConductorSettings = field(default_factory=ConductorSettings)
    #: Targets by class of the requests, and the class of requests of others; without targets nothing is refused for
    #: them.
    slos: tuple[SloClass, ...] = ()
    default_slo: str | None = None
    #: The answer that every client allows; None: exactly as long as it will be, so that the coordinator knows.
    max_output_tokens: int | None = None
    #: Rows of requests that are not refused for their targets, whatever the admission policy says.
    forced: frozenset[int] = frozenset()
    #: Room of a KV store that all workers share, in tokens; 0: there is none. Like prefix caches it counts only where
    #: the workload says which prompts begin alike.
    store_tokens: int = 0
    #: How requests move between workers; None: they stay where they are. The coordinator looks so often.
    moves: MoveRules | None = None
    look_interval_s: float = 0.2
    #: How workers come, go and change their roles with the load; its pools are named as the groups. None: they stay as
    #: they are.
    autoscale: AutoscaleSettings | None = None
    #: Of the dispatch policy `random`.
    seed: int = 0
    heartbeat_interval_s: float = 0.5
    #: A worker tells what entered and left its prefix cache at most that often.
    block_events_s: float = 0.1
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

    def settings(self, hash_block_tokens: int) -> ConductorSettings:
        """The coordinator's, for a workload with such blocks; 0: it has none."""
        readers = next(group for group in self.groups if group.role != "decode")
        return replace(
            self.conductor,
            queue_order=readers.prefill.queue.order,
            block_tokens=hash_block_tokens or self.block_tokens,
        )
