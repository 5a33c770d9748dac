"""The evaluator of a running cluster: which roles its workers should have for the requests that come now.

Named in the entry point group `tandem.evaluators`; a coordinator runs it in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from coordinator.planner.bench import Bench
from coordinator.planner.plans import Parallelism, Plan, PlanDoesNotFit, Pool, WorkerKind
from coordinator.planner.search import ROLES, plan_goodput
from coordinator.planner.space import Machines
from coordinator.split_question import NoSplit, SplitAnswer
from simulator.heap.spec import MESSAGE_S
from simulator.planning.costs import CostTable
from simulator.planning.evaluator import EvaluatorSettings, HeapEvaluator
from simulator.planning.search_range import MAX_REQUESTS, MIN_REQUESTS, MIN_SPAN_S, ROUGH_REQUESTS, search_settings
from workload.arrivals import Poisson
from workload.lengths import Fixed, Histogram, LogNormal
from workload.synthetic import synthetic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.messages import Role
    from coordinator.split_question import SplitQuestion
    from workload.lengths import Lengths
    from workload.request import WorkloadRequest

_ONE_DEVICE = Parallelism()
#: Share of the requests that meet their targets, of what counts as served.
_TARGET = 0.9
#: Of answers only the mean is known: their standard deviation is taken to be about as large (sigma of the logarithm).
_ANSWER_SIGMA = 0.83
_SEED = 0


def better_split(
    question: SplitQuestion, *, min_requests: int = MIN_REQUESTS, min_span_s: float = MIN_SPAN_S
) -> SplitAnswer:
    """Searches all splits of as many workers as there are, and mixed ones. Equal questions have equal answers. Studies
    are so long at least.

    Raises NoSplit where no split meets the targets, or what is known of the workers makes no study.
    """
    costs = _costs(question)
    answers = _answer_lengths(question)
    # Longer ones are refused before they are placed.
    most_tokens = max(1, question.max_context_tokens - 1)
    prompts = Histogram.from_observed(min(tokens, most_tokens) for tokens in question.prompt_tokens)

    def requests_at(rate_rps: float) -> Iterable[WorkloadRequest]:
        mix = {name: float(count) for name, count in question.mix.items()}
        arrivals = Poisson(rate_rps)
        return synthetic(
            arrivals=arrivals, prompts=prompts, outputs=answers, seed=_SEED, num_requests=MAX_REQUESTS, slo_mix=mix
        )

    settings = EvaluatorSettings(
        block_tokens=question.block_tokens,
        max_sequences=question.max_sequences,
        min_requests=min_requests,
        min_span_s=min_span_s,
    )
    exact = HeapEvaluator(costs, requests_at, question.slos, settings)
    rough = HeapEvaluator(
        costs,
        requests_at,
        question.slos,
        replace(settings, min_requests=min(ROUGH_REQUESTS, min_requests), min_span_s=0.0),
    )
    mean_prompt_tokens = sum(question.prompt_tokens) / len(question.prompt_tokens)
    try:
        bounds = search_settings(
            costs,
            _ONE_DEVICE,
            prompt_tokens=mean_prompt_tokens,
            output_tokens=question.mean_answer_tokens,
            target=_TARGET,
        )
    except ConfigError as error:
        raise NoSplit(error.message) from error
    num_workers = sum(pool.num_workers for pool in question.pools)
    kinds: dict[Role, list[WorkerKind]] = {role: [WorkerKind(_ONE_DEVICE, _budget(question, role))] for role in ROLES}
    planned = plan_goodput(Machines(num_devices=num_workers), kinds, exact, bounds, rough=rough)
    if planned.best is None:
        raise NoSplit("no split of the workers meets the targets at any rate")
    present = Plan(tuple(Pool(pool.role, kinds[pool.role][0], pool.num_workers) for pool in question.pools))
    try:
        found = Bench(exact, bounds).goodput(present, planned.best.goodput_rps)
    except PlanDoesNotFit as error:
        raise NoSplit(f"the workers as they are cannot be simulated: {error}") from error
    return SplitAnswer(
        best=_in_words(planned.best.plan),
        best_rps=planned.best.goodput_rps,
        present=_in_words(present),
        present_rps=0.0 if found is None else found.goodput_rps,
        best_workers={pool.role: pool.num_workers for pool in planned.best.plan.pools},
    )


def _costs(question: SplitQuestion) -> CostTable:
    return CostTable(
        text="measured while serving",
        model="served",
        num_heads=1,
        num_layers=1,
        kv_token_bytes=question.kv_token_bytes,
        max_context_tokens=question.max_context_tokens,
        transfer=question.transfer,
        between_steps_s=question.between_steps_s,
        message_s=MESSAGE_S,
        max_sequences=question.max_sequences,
        latency=lambda _: question.latency,
        kv_tokens=lambda _: question.num_blocks * question.block_tokens,
    )


def _answer_lengths(question: SplitQuestion) -> Lengths:
    """As long as the context allows."""
    most_tokens = max(1, question.max_context_tokens - 1)
    if question.mean_answer_tokens <= 1.0 or question.mean_answer_tokens >= most_tokens:
        return Fixed(min(max(1, round(question.mean_answer_tokens)), most_tokens))
    return LogNormal.from_mean(question.mean_answer_tokens, _ANSWER_SIGMA, most_tokens)


def _budget(question: SplitQuestion, role: Role) -> int:
    """Of a role that no worker has now: that of the workers most like it."""
    budgets = {pool.role: pool.max_batch_tokens for pool in question.pools}
    likeness: dict[Role, tuple[Role, ...]] = {
        "prefill": ("prefill", "mixed", "decode"),
        "mixed": ("mixed", "prefill", "decode"),
        "decode": ("decode", "mixed", "prefill"),
    }
    return next(budgets[like] for like in likeness[role] if like in budgets)


def _in_words(plan: Plan) -> str:
    return " + ".join(f"{pool.num_workers} {pool.role}" for pool in plan.pools)
