"""The planner with the event heap as its evaluator: half plans bound whole ones, and the choice is the right one."""

from __future__ import annotations

import pytest

from contracts.latency_models import DISTSERVE_OPT
from contracts.transfer_models import LinkTransfer
from coordinator.planner.bench import SearchSettings
from coordinator.planner.plans import Parallelism, Plan, PlanDoesNotFit, Pool, WorkerKind
from coordinator.planner.search import ROLES, plan_goodput
from coordinator.planner.space import Machines
from simulator.heap.study import simulate
from simulator.planning.costs import CostTable, PipelinedLatency
from simulator.planning.evaluator import EvaluatorSettings, HeapEvaluator
from workload import Poisson, synthetic
from workload.lengths import Fixed, LogNormal
from workload.slo import SloClass

FIT = DISTSERVE_OPT["opt-13b-tp1"]
PROMPTS = LogNormal.from_mean(600, 0.5, 1200)
OUTPUTS = LogNormal.from_mean(100, 0.5, 400)


def kind(max_batch_tokens: int = 1024, pipeline: int = 1) -> WorkerKind:
    return WorkerKind(Parallelism(1, pipeline), max_batch_tokens)


def table(kv_tokens: int = 100_000) -> CostTable:
    return CostTable(
        text="one device",
        model="opt-13b",
        num_heads=1,
        num_layers=1,
        kv_token_bytes=819_200,
        max_context_tokens=4096,
        transfer=LinkTransfer(latency_s=1e-4, bandwidth_bytes_s=50e9),
        message_s=0.0003,
        max_sequences=128,
        latency=lambda parallel: (
            FIT if parallel.pipeline == 1 else PipelinedLatency(FIT, parallel.pipeline - 1, 1e-3, 0.0)
        ),
        kv_tokens=lambda parallel: kv_tokens * parallel.num_devices,
    )


def evaluator(
    *, ttft_ms: float, tpot_ms: float, kv_tokens: int = 100_000, prompts_first: bool = False
) -> HeapEvaluator:
    return HeapEvaluator(
        table(kv_tokens),
        lambda rate_rps: synthetic(
            arrivals=Poisson(rate_rps), prompts=PROMPTS, outputs=OUTPUTS, seed=3, num_requests=250
        ),
        (SloClass("default", ttft_ms, tpot_ms),),
        EvaluatorSettings(max_sequences=128, prompts_first=prompts_first),
    )


def reading(count: int = 1, pipeline: int = 1) -> Pool:
    return Pool("prefill", kind(pipeline=pipeline), count)


def writing(count: int = 1, pipeline: int = 1) -> Pool:
    return Pool("decode", kind(512, pipeline), count)


@pytest.mark.parametrize("rate_rps", [0.5, 2.0, 5.0, 8.0])
def test_a_half_plan_attains_no_less_than_the_whole(rate_rps: float) -> None:
    judge = evaluator(ttft_ms=250, tpot_ms=40)
    whole = judge.attained(Plan((reading(), writing())), rate_rps)
    noise = 0.02
    assert judge.attained(Plan((reading(),)), rate_rps).joint >= whole.joint - noise
    assert judge.attained(Plan((writing(),)), rate_rps).joint >= whole.joint - noise
    assert whole.joint <= min(whole.ttft, whole.tpot)


def test_half_plans_are_limited_by_their_own_phase_alone() -> None:
    judge = evaluator(ttft_ms=250, tpot_ms=1)
    assert judge.attained(Plan((reading(),)), 1.0).joint > 0.9, "nothing is written"
    assert judge.attained(Plan((writing(),)), 1.0).joint == 0.0
    judge = evaluator(ttft_ms=1, tpot_ms=100)
    assert judge.attained(Plan((writing(),)), 1.0).joint > 0.9, "nothing has to be read"
    assert judge.attained(Plan((reading(),)), 1.0).joint == 0.0


def test_equal_questions_have_equal_answers() -> None:
    plan = Plan((reading(), writing()))
    judge = evaluator(ttft_ms=250, tpot_ms=40)
    assert (
        judge.attained(plan, 3.0) == judge.attained(plan, 3.0) == evaluator(ttft_ms=250, tpot_ms=40).attained(plan, 3.0)
    )


def test_a_pipeline_that_writes_is_lanes_with_their_part_of_the_kv() -> None:
    judge = evaluator(ttft_ms=250, tpot_ms=40)
    spec = judge.spec(Plan((reading(2, 2), writing(2, 2))))
    reader, writer = spec.groups
    assert (reader.count, reader.pipeline_stages, reader.num_devices, reader.num_blocks) == (2, 2, 2, 12_500)
    assert (writer.count, writer.pipeline_stages, writer.num_devices, writer.num_blocks) == (4, 1, 1, 6_250)
    assert spec.num_devices == Plan((reading(2, 2), writing(2, 2))).num_devices == 8
    # Two lanes take as long for a token as one device would, and a hop.
    terms = writer.latency.decode_terms(4)
    assert terms.base_s == pytest.approx(FIT.decode_terms(4).base_s + 1e-3)


def test_what_holds_no_block_does_not_fit() -> None:
    judge = evaluator(ttft_ms=250, tpot_ms=40, kv_tokens=8)
    with pytest.raises(PlanDoesNotFit, match="no room for a block of 16 tokens"):
        judge.attained(Plan((reading(), writing())), 1.0)
    with pytest.raises(ValueError, match="copies are alike"):
        judge.attained(Plan((reading(), writing()), copies=2), 1.0)


def test_prompts_first_makes_answers_wait_for_whole_prompts() -> None:
    mixed = Plan((Pool("mixed", WorkerKind(Parallelism(), 2048), 1),))
    requests = list(synthetic(arrivals=Poisson(4.0), prompts=Fixed(1000), outputs=Fixed(60), seed=1, num_requests=100))
    spec = evaluator(ttft_ms=250, tpot_ms=40, prompts_first=True).spec(mixed)
    assert spec.groups[0].prompts_first
    first = simulate(spec, requests)
    shared = simulate(evaluator(ttft_ms=250, tpot_ms=40).spec(mixed), requests)
    tokens = sum(request.prompt_tokens for request in requests)
    for result in (first, shared):
        assert (result.workers[0].prefill_tokens, result.workers[0].decode_tokens) == (tokens, 100 * 59)
    # A step with prompts writes nothing, so that there are more steps, and the longest pause is a prompt's.
    assert first.num_steps > shared.num_steps
    assert first.itl_s.quantile(1.0) >= FIT.prefill_base_s + 1000 * FIT.prefill_token_s


def plan(
    num_devices: int, judge: HeapEvaluator, *, mixed_tokens: int, tolerance: float = 0.05
) -> tuple[bool, float, float]:
    """Whether a split is best; goodput of the best split and of the best colocated plan."""
    settings = SearchSettings(start_rps=1.0, low_rps=1.0 / 16, high_rps=16.0, tolerance=tolerance)
    kinds = {"prefill": (kind(),), "decode": (kind(512),), "mixed": (kind(mixed_tokens),)}
    planned = plan_goodput(Machines(num_devices=num_devices), {role: kinds[role] for role in ROLES}, judge, settings)
    assert planned.best is not None
    split = 0.0 if planned.split is None else planned.split.goodput_rps
    return (
        not planned.best.plan.is_colocated,
        split,
        0.0 if planned.colocated is None else planned.colocated.goodput_rps,
    )


def test_tight_tpot_is_served_by_a_split() -> None:
    is_split, split_rps, colocated_rps = plan(3, evaluator(ttft_ms=400, tpot_ms=26), mixed_tokens=256)
    assert is_split
    assert split_rps > 1.2 * colocated_rps


def test_loose_tpot_is_served_by_mixed_workers() -> None:
    is_split, split_rps, colocated_rps = plan(2, evaluator(ttft_ms=2000, tpot_ms=500), mixed_tokens=2048)
    assert not is_split
    assert colocated_rps > split_rps > 0
