"""What a planner is asked about the workers that are there, and what it answers.

Plain data, for the planner is in another process.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from contracts.latency_models import FittedLatency
from contracts.messages import Role
from contracts.transfer_models import LinkTransfer
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.messages import WorkerInfo
    from coordinator.costs import CostSource, WorkerCosts
    from coordinator.replan_terms import Ask

#: Requests without targets are in the workload too: any answer is good enough for them.
NO_TARGETS = SloClass("no targets", ttft_ms=1e9, tpot_ms=1e9)

#: What steps are compared by, of workers whose costs differ: prompt tokens, and sequences.
_TYPICAL_TOKENS, _TYPICAL_DECODES = 256, 8


class NoSplit(Exception):
    """Nobody can say which split is better, for a reason that the message tells."""


class PresentPool(msgspec.Struct, frozen=True, kw_only=True):
    """All workers of one role."""

    role: Role
    num_workers: int
    #: Token budget of a step; of different ones the smallest.
    max_batch_tokens: int


class SplitQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """Which roles should these workers have for this workload? Workers are alike but for their roles."""

    pools: tuple[PresentPool, ...]
    max_sequences: int
    block_tokens: int
    #: KV blocks of each worker.
    num_blocks: int
    max_context_tokens: int
    kv_token_bytes: int
    #: Of typical workers: chunks as those take that read, decodes as those that write.
    latency: FittedLatency
    between_steps_s: float
    transfer: LinkTransfer
    slos: tuple[SloClass, ...]
    #: How many requests there were of each class of `slos`.
    mix: dict[str, int]
    prompt_tokens: tuple[int, ...]
    mean_answer_tokens: float


class SplitAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The best split, and the workers as they are. Goodputs are the highest rates at which nine of ten requests meet
    their targets; 0: none does."""

    best: str
    best_rps: float
    present: str
    present_rps: float
    #: The best split as numbers of workers by role; empty: not said.
    best_workers: dict[Role, int] = {}

    @property
    def gain(self) -> float:
        """Infinite where the workers as they are serve nothing within targets."""
        if self.present_rps > 0:
            return self.best_rps / self.present_rps - 1.0
        return math.inf if self.best_rps > 0 else 0.0


def split_question(
    ask: Ask,
    infos: Sequence[WorkerInfo],
    costs: CostSource,
    *,
    slos: Sequence[SloClass],
    classes: Sequence[str | None],
    max_sequences: int,
    max_batch_tokens: int,
) -> SplitQuestion:
    """`infos` of the members, of which stores take no part. `classes` of recent requests, None for those without
    targets; `max_batch_tokens` of workers that do not say.

    Raises NoSplit where there is nothing to plan with.
    """
    if not ask.prompt_tokens:
        raise NoSplit("no requests come")
    infos = [info for info in infos if info.role != "store"]
    if len(infos) < 2:
        raise NoSplit("there are no two workers")
    mix = Counter(NO_TARGETS.name if name is None else name for name in classes)
    asked = tuple(slo for slo in (*slos, NO_TARGETS) if slo.name in mix)
    if all(slo is NO_TARGETS for slo in asked):
        raise NoSplit("no request has targets (slo, default_slo_class)")
    latency, between_steps_s = _typical(infos, costs)
    transfer = costs.transfer
    if not isinstance(transfer, LinkTransfer):
        raise NoSplit("what transfers cost is not known in a form that can be sent")
    budgets: dict[Role, list[int]] = {}
    for info in infos:
        if info.role != "store":
            budgets.setdefault(info.role, []).append(info.max_batch_tokens or max_batch_tokens)
    return SplitQuestion(
        pools=tuple(
            PresentPool(role=role, num_workers=len(each), max_batch_tokens=min(each))
            for role, each in sorted(budgets.items(), reverse=True)
        ),
        max_sequences=max_sequences,
        block_tokens=infos[0].identity.layout.block_tokens,
        num_blocks=min(info.total_blocks for info in infos),
        max_context_tokens=min(info.max_context_tokens for info in infos),
        kv_token_bytes=costs.kv_token_bytes,
        latency=latency,
        between_steps_s=between_steps_s,
        transfer=transfer,
        slos=asked,
        mix=dict(mix),
        prompt_tokens=ask.prompt_tokens,
        mean_answer_tokens=ask.observed.mean_output_tokens,
    )


def _typical(infos: Sequence[WorkerInfo], costs: CostSource) -> tuple[FittedLatency, float]:
    """Latency of a worker that could have any role, and its time between steps."""

    def median(kind: str, roles: tuple[Role, Role], size: Callable[[FittedLatency], float]) -> WorkerCosts:
        known = [found for info in infos if info.role in roles and (found := costs.of(info)) is not None]
        fitted = [each for each in known if isinstance(each.latency, FittedLatency)]
        if not fitted:
            raise NoSplit(f"what steps that {kind} take is not known (yet)")
        return sorted(fitted, key=lambda each: size(_fitted(each)))[len(fitted) // 2]

    reader = median("read prompts", ("prefill", "mixed"), lambda latency: latency.prefill.at(_TYPICAL_TOKENS))
    writer = median("write answers", ("decode", "mixed"), lambda latency: latency.decode.at(_TYPICAL_DECODES))
    chunks, decodes = _fitted(reader), _fitted(writer)
    latency = FittedLatency(
        prefill=chunks.prefill, pair_s=chunks.pair_s, decode=decodes.decode, context_token_s=decodes.context_token_s
    )
    return latency, max(reader.between_steps_s, writer.between_steps_s)


def _fitted(costs: WorkerCosts) -> FittedLatency:
    assert isinstance(costs.latency, FittedLatency), "only such are looked at"
    return costs.latency
