"""Queues in studies: whose prompt is read next, and what answers notice of the prompts beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coordinator.policy.settings import AdmissionRule, ConductorSettings
from engine.chunk_budget import TARGET_SHARE
from engine.compose import StepBudget
from prefill import PrefillLimits
from prefill.ordering import QueueRules
from simulator.heap.study import simulate
from tests.support.affine_latency import AffineLatency
from tests.support.heap_studies import audit, colocated, disaggregated, study
from workload.request import WorkloadRequest
from workload.slo import SloClass

if TYPE_CHECKING:
    from simulator.heap.spec import StudySpec

LATENCY = AffineLatency(base_s=0.01, token_s=1e-4, pair_s=1e-9, context_token_s=1e-8, sequence_s=1e-4)
TPOT_S = 0.03
SLOS = (SloClass("tight", 1_000.0, 1e3 * TPOT_S), SloClass("loose", 30_000.0, 1e3 * TPOT_S))
NO_ADMISSION = ConductorSettings(admission=AdmissionRule(form="none"))


def mixed(*, tpot_chunks: bool) -> StudySpec:
    groups = colocated(LATENCY, num_blocks=4000, budget=StepBudget(max_tokens=2048, max_sequences=64))
    groups = tuple(replace(group, tpot_chunks=tpot_chunks) for group in groups)
    return replace(study(groups), conductor=NO_ADMISSION, slos=SLOS)


@pytest.mark.parametrize("prompt_tokens", [1000, 8000, 32_000])
def test_answers_never_wait_longer_for_a_prompt_than_was_promised(prompt_tokens: int) -> None:
    """Sarathi's claim: the longest gap between tokens does not depend on what is read beside them."""
    requests = [
        WorkloadRequest(0.0, 10, 1500, slo_class="loose"),
        WorkloadRequest(2.0, prompt_tokens, 2, slo_class="loose"),
    ]
    cut, whole = (simulate(mixed(tpot_chunks=cut), requests) for cut in (True, False))
    assert TARGET_SHARE * TPOT_S * 0.9 < cut.itl_s.max <= TARGET_SHARE * TPOT_S
    assert whole.itl_s.max > 0.1
    assert cut.requests.first_token_s[1] > whole.requests.first_token_s[1]
    audit(cut)


def test_without_targets_prompts_are_not_cut() -> None:
    requests = [WorkloadRequest(0.0, 10, 500), WorkloadRequest(2.0, 4000, 2)]
    with_rule, without = (simulate(replace(mixed(tpot_chunks=cut), slos=()), requests) for cut in (True, False))
    assert with_rule.requests.finished_s == pytest.approx(without.requests.finished_s)


def reading(rules: QueueRules) -> StudySpec:
    """One worker that reads 100 tokens a step."""
    groups = disaggregated(LATENCY, num_blocks=4000, budget=StepBudget(max_tokens=100, max_sequences=64))
    limits = PrefillLimits(queue=rules)
    groups = tuple(replace(group, prefill=limits) for group in groups)
    return replace(study(groups), conductor=NO_ADMISSION, slos=SLOS)


def order(rules: QueueRules, requests: list[WorkloadRequest]) -> list[int]:
    result = simulate(reading(rules), requests)
    audit(result)
    return [int(row) for row in result.requests.first_token_s.argsort()]


def test_orders_act_on_what_waits() -> None:
    """The first is being read when the others come."""
    requests = [
        WorkloadRequest(0.0, 400, 2, slo_class="loose"),
        WorkloadRequest(0.001, 300, 2, slo_class="loose"),
        WorkloadRequest(0.002, 200, 2, slo_class="loose"),
        WorkloadRequest(0.003, 400, 2, slo_class="tight"),
        WorkloadRequest(0.004, 400, 2, slo_class="loose", priority=100),
    ]
    assert order(QueueRules(order="fcfs"), requests) == [0, 4, 1, 2, 3]
    assert order(QueueRules(order="shortest"), requests) == [0, 4, 2, 1, 3]
    assert order(QueueRules(order="edf"), requests) == [0, 4, 3, 1, 2]


def test_tenants_take_turns() -> None:
    flood = [WorkloadRequest(0.001 * number, 100, 2, tenant="flood") for number in range(6)]
    requests = [*flood, *(WorkloadRequest(0.006 + 0.001 * number, 100, 2, tenant="other") for number in range(2))]
    assert order(QueueRules(fair=False), requests) == list(range(8))
    served = order(QueueRules(), requests)
    assert [row for row in served if row < 6] == list(range(6))
    assert max(served.index(6), served.index(7)) < 6
