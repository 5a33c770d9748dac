"""What a plan attains, by a study on the event heap: the planner's evaluator.

A prefill pipeline is a worker whose stages overlap. A pipeline that writes answers keeps as many batches in flight as
it has stages; where these take equally long, a batch meets no other, and gets a token for each pass: so many lanes,
each with its part of the KV, are what it is simulated as. Unequal batches would wait for each other, which flatters
pipelines of mixed workers a little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from contracts.latency import DecodeTerms
from contracts.transfer_models import LinkTransfer
from coordinator.planner.plans import Attained, PlanDoesNotFit
from engine.compose import StepBudget
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from simulator.study.metrics import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from contracts.latency import LatencyModel, StepWork
    from contracts.messages import Role
    from coordinator.planner.plans import Plan, Pool
    from simulator.heap.results import StudyResult
    from simulator.planning.costs import CostTable
    from workload.request import WorkloadRequest
    from workload.slo import SloClass

#: A worker's, where requests come often. Where they are rare their workers' load is stale, and next to nothing.
HEARTBEAT_S = 0.5
_HEARTBEATS_OF_A_REQUEST = 0.25
#: Steps of the phase that a half plan leaves out.
_NO_TIME_S = 1e-6
#: Its workers hold and do anything; there are a few, for links are not to be what limits the other phase.
_UNLIMITED_TOKENS = 1 << 40
_NUM_UNLIMITED = 4
_UNLIMITED_LINK = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=1e18)


class _NoTime:
    """Follows `contracts.latency.LatencyModel`."""

    def step_s(self, work: StepWork) -> float:
        return _NO_TIME_S

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        return DecodeTerms(_NO_TIME_S, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorSettings:
    """Of all studies."""

    block_tokens: int = 16
    max_sequences: int = 256
    #: Of the workload, and more where these are over sooner than this; None: all of it.
    min_requests: int | None = None
    min_span_s: float = 0.0
    #: Mixed workers read prompts whole, before anything is written (see `WorkerGroup.prompts_first`).
    prompts_first: bool = False


class HeapEvaluator:
    """Follows `coordinator.planner.plans.Evaluator`."""

    def __init__(
        self,
        costs: CostTable,
        requests_at: Callable[[float], Iterable[WorkloadRequest]],
        slos: tuple[SloClass, ...],
        settings: EvaluatorSettings | None = None,
    ) -> None:
        """`requests_at` a rate, in requests a second: the same requests at every rate."""
        self._costs = costs
        self._requests_at = requests_at
        self._slos = slos
        self._settings = settings or EvaluatorSettings()

    def attained(self, plan: Plan, rate_rps: float) -> Attained:
        attainment = measure(self.study(plan, rate_rps), self._slos).attainment
        only_writes = all(pool.role == "decode" for pool in plan.pools)
        # A half plan that reads prompts is asked for one token only, which meets any TPOT.
        joint = attainment.tpot_only if only_writes else attainment.joint
        return Attained(joint, attainment.ttft_only, attainment.tpot_only)

    def study(self, plan: Plan, rate_rps: float) -> StudyResult:
        """Of a single copy. Raises PlanDoesNotFit."""
        if plan.copies != 1:
            raise ValueError(f"copies are alike, one is to be asked about: {plan}")
        requests: Iterable[WorkloadRequest] = islice(self._requests_at(rate_rps), self.num_requests(rate_rps))
        roles = {pool.role for pool in plan.pools}
        if roles == {"prefill"}:
            requests = (request._replace(output_tokens=1) for request in requests)
        heartbeat_interval_s = max(HEARTBEAT_S, _HEARTBEATS_OF_A_REQUEST / rate_rps)
        return simulate(replace(self.spec(plan), heartbeat_interval_s=heartbeat_interval_s), requests)

    def num_requests(self, rate_rps: float) -> int | None:
        """So many of the workload are simulated at this rate at most; None: all."""
        settings = self._settings
        if settings.min_requests is None:
            return None
        return max(settings.min_requests, math.ceil(rate_rps * settings.min_span_s))

    def spec(self, plan: Plan) -> StudySpec:
        """What is simulated. Raises PlanDoesNotFit."""
        costs = self._costs
        groups = [self._group(pool) for pool in plan.pools]
        transfer = costs.transfer
        roles = {pool.role for pool in plan.pools}
        if roles == {"prefill"}:
            groups.append(self._unlimited("decode"))
        elif roles == {"decode"}:
            groups.append(self._unlimited("prefill"))
            transfer = _UNLIMITED_LINK
        return StudySpec(
            groups=tuple(groups),
            transfer=transfer,
            kv_token_bytes=costs.kv_token_bytes,
            block_tokens=self._settings.block_tokens,
            max_context_tokens=costs.max_context_tokens,
            message_s=costs.message_s,
            between_steps_s=costs.between_steps_s,
            gateway_s=costs.gateway_s,
            # Nobody looks at the time lines.
            sample_interval_s=60.0,
        )

    def num_blocks(self, pool: Pool) -> int:
        """KV blocks of each worker. Raises PlanDoesNotFit."""
        parallel = pool.kind.parallel
        try:
            num_blocks = self._costs.kv_tokens(parallel) // self._settings.block_tokens
        except (ConfigError, ValueError) as error:
            raise PlanDoesNotFit(str(error)) from error
        if num_blocks < parallel.pipeline:
            raise PlanDoesNotFit(f"{parallel} has no room for a block of {self._settings.block_tokens} tokens")
        return num_blocks

    def _group(self, pool: Pool) -> WorkerGroup:
        parallel = pool.kind.parallel
        num_blocks = self.num_blocks(pool)
        try:
            latency = self._costs.latency(parallel)
        except (ConfigError, ValueError) as error:
            raise PlanDoesNotFit(str(error)) from error
        group = _plain_group(pool.role, latency, num_blocks)
        group = replace(
            group,
            count=pool.num_workers,
            num_devices=parallel.num_devices,
            budget=StepBudget(max_tokens=pool.kind.max_batch_tokens, max_sequences=self._settings.max_sequences),
            prompts_first=self._settings.prompts_first and pool.role == "mixed",
        )
        if pool.role == "prefill":
            return replace(group, pipeline_stages=parallel.pipeline)
        return replace(
            group,
            count=pool.num_workers * parallel.pipeline,
            num_devices=parallel.tensor,
            num_blocks=num_blocks // parallel.pipeline,
        )

    def _unlimited(self, role: Role) -> WorkerGroup:
        group = _plain_group(role, _NoTime(), _UNLIMITED_TOKENS // self._settings.block_tokens)
        budget = StepBudget(max_tokens=_UNLIMITED_TOKENS, max_sequences=_UNLIMITED_TOKENS)
        return replace(group, count=_NUM_UNLIMITED, budget=budget)


def _plain_group(role: Role, latency: LatencyModel, num_blocks: int) -> WorkerGroup:
    return WorkerGroup(name=role, role=role, count=1, latency=latency, num_blocks=num_blocks)
