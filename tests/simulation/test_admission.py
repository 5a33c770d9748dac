"""Admission under overload, where decode is the bottleneck.

Where prompts take seconds to be read, Mooncake's case (arXiv 2407.00079, section 7): what is refused by the present
decode load is refused too late, and for too long. Where decode has no seats or no blocks for more answers: prompts wait
although nothing computes, and that has to be foreseen too.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from coordinator.policy.settings import AdmissionRule, ConductorSettings
from engine.compose import StepBudget
from prefill import PrefillLimits
from prefill.ordering import QueueRules
from simulator.heap.results import REFUSALS, Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from simulator.study.metrics import request_latencies
from tests.support.affine_latency import AffineLatency
from tests.support.heap_studies import FAST_LINK, audit
from tests.support.long_tests import only_long
from workload.request import WorkloadRequest
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from contracts.config import AdmissionForm
    from simulator.heap.results import StudyResult

    Column = NDArray[np.float32]

#: A prompt of 1,000 tokens takes 8 s. An answer of 100 tokens takes 5 s where 30 are written at once.
#: The second shows the same again.
SEEDS = [1, pytest.param(2, marks=only_long)]

READING = AffineLatency(base_s=0.02, token_s=0.00798)
WRITING = AffineLatency(base_s=0.02, sequence_s=0.001)
SLO = SloClass("default", 24_000.0, 60.0)
#: Sixty readers could read 7.5 prompts a second; a writer keeps the target with 40 answers, which is 6.7 a second.
OFFERED_RPS = 10.0
SECONDS = 200.0
#: Until both pools have filled.
WARM_UP_S = 40.0


def overload(seed: int) -> Iterator[WorkloadRequest]:
    rng = random.Random(seed)
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(OFFERED_RPS)) < SECONDS:
        yield WorkloadRequest(now_s, 1000, max(2, round(rng.gauss(100, 10))))


@cache
def served(form: AdmissionForm, seed: int, forced: frozenset[int] = frozenset()) -> StudyResult:
    def group(name: str, role: str, count: int, max_tokens: int) -> WorkerGroup:
        return WorkerGroup(
            name=name,
            role="prefill" if role == "prefill" else "decode",
            count=count,
            latency=READING if role == "prefill" else WRITING,
            num_blocks=20_000,
            budget=StepBudget(max_tokens=max_tokens, max_sequences=256),
        )

    spec = StudySpec(
        groups=(group("p", "prefill", 120, 1000), group("d", "decode", 1, 256)),
        transfer=FAST_LINK,
        kv_token_bytes=1000,
        conductor=ConductorSettings(admission=AdmissionRule(form=form)),
        slos=(SLO,),
        default_slo=SLO.name,
        max_output_tokens=256,
    )
    result = simulate(replace(spec, forced=forced), overload(seed))
    audit(result)
    return result


def served_in_time(result: StudyResult) -> float:
    """Share of all requests."""
    return float(request_latencies(result, (SLO,)).met.mean())


def loads(result: StudyResult) -> tuple[Column, Column]:
    """Of the pool that reads and of the one that writes."""
    line = result.time_line
    chosen = (line.at_s > WARM_UP_S) & (line.at_s < SECONDS)
    return line.prefill_load[chosen], line.decode_load[chosen]


@pytest.mark.parametrize("seed", SEEDS)
def test_by_the_present_load_the_pools_swing_against_each_other_and_by_the_forecast_they_do_not(seed: int) -> None:
    prefill, decode = loads(served("current", seed))
    calm_prefill, calm_decode = loads(served("predicted", seed))
    assert np.corrcoef(prefill, decode)[0, 1] < -0.3
    assert prefill.std() > 5 * calm_prefill.std()
    assert decode.std() > 5 * calm_decode.std()
    assert decode.max() > 1.5 > 0.2 > decode.min(), "too many at first, then none"
    assert 0.7 < calm_decode.min() < calm_decode.max() < 1.3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_forecast_serves_the_most(seed: int) -> None:
    shares = {form: served_in_time(served(form, seed)) for form in ("none", "current", "predicted")}
    assert shares["predicted"] > 3 * shares["current"] > 3 * shares["none"]
    # Two of three that are offered could be served.
    assert shares["predicted"] > 0.5


def test_who_is_refused_is_told_why_and_when_to_come_again() -> None:
    """And whoever comes again then is served more often."""
    result = served("predicted", 1)
    refused = result.requests.outcome == Outcome.REJECTED
    assert {REFUSALS[index] for index in result.requests.refusal[refused].tolist()} == {"tpot"}
    assert (result.requests.predicted_tpot_s[refused] > 0.95 * SLO.tpot_ms / 1e3).all()
    assert (result.requests.predicted_tpot_s[~refused] <= SLO.tpot_ms / 1e3).all()
    again = simulate(replace(result.spec, max_retries=3), overload(1))
    assert (again.requests.outcome == Outcome.FINISHED).sum() > (~refused).sum()


def test_forced_requests_are_admitted_and_others_are_not() -> None:
    """In a run of its own, where a few that were refused go in nevertheless."""
    result = served("predicted", 1)
    refused = np.flatnonzero(result.requests.outcome == Outcome.REJECTED).tolist()
    forced = frozenset(refused[10::50])
    again = served("predicted", 1, forced)
    assert (again.requests.outcome[sorted(forced)] == Outcome.FINISHED).all()
    assert np.isfinite(again.requests.predicted_ttft_s[sorted(forced)]).all()
    accepted, before = again.requests.outcome != Outcome.REJECTED, result.requests.outcome != Outcome.REJECTED
    assert accepted.sum() <= before.sum() + len(forced)


# --- short of seats, or of blocks -------------------------------------------------------------------------

#: A prompt takes 12 ms, an answer with a seat a quarter of a second: two writers with two seats each end some 19 a
#: second. Those who ask are five times as many.
SHORT_OF_PLACES_RPS = 90.0
SHORT_OF_PLACES_S = 40.0
CHAT = SloClass("default", 3000.0, 300.0)
PLACES_RPS = 18.0


def short_of_places(
    form: AdmissionForm, seed: int, *, max_sequences: int = 64, reader_blocks: int = 128, writer_blocks: int = 128
) -> StudyResult:
    def group(name: str, latency: AffineLatency, num_blocks: int) -> WorkerGroup:
        return WorkerGroup(
            name=name,
            role="prefill" if name == "p" else "decode",
            count=2,
            latency=latency,
            num_blocks=num_blocks,
            budget=StepBudget(max_tokens=96, max_sequences=max_sequences),
            prefill=PrefillLimits(queue=QueueRules(order="fcfs")),
        )

    spec = StudySpec(
        groups=(
            group("p", AffineLatency(base_s=0.002, token_s=0.0001), reader_blocks),
            group("d", AffineLatency(base_s=0.0045, sequence_s=0.0002), writer_blocks),
        ),
        transfer=FAST_LINK,
        kv_token_bytes=1000,
        conductor=ConductorSettings(admission=AdmissionRule(form=form)),
        slos=(CHAT,),
        default_slo=CHAT.name,
        max_output_tokens=48,
    )
    rng = random.Random(seed)
    arrivals_s = np.cumsum([rng.expovariate(SHORT_OF_PLACES_RPS) for _ in range(6000)])
    requests = (WorkloadRequest(at_s, 96, 48) for at_s in arrivals_s.tolist() if at_s < SHORT_OF_PLACES_S)
    result = simulate(spec, requests)
    audit(result)
    return result


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "places", [{"max_sequences": 2}, {"reader_blocks": 64, "writer_blocks": 20}], ids=["seats", "blocks"]
)
def test_prompts_that_wait_for_places_are_foreseen(places: dict[str, int], seed: int) -> None:
    result, unrefused = (short_of_places(form, seed, **places) for form in ("predicted", "none"))
    met, met_unrefused = (request_latencies(each, (CHAT,)).met for each in (result, unrefused))
    refused = result.requests.outcome == Outcome.REJECTED
    assert {REFUSALS[index] for index in result.requests.refusal[refused].tolist()} == {"ttft"}, "and no queue is full"
    accepted = np.count_nonzero(~refused)
    assert accepted - np.count_nonzero(met) <= 0.05 * accepted
    # Nothing that could be served was refused: all places were taken, all the time.
    assert np.count_nonzero(met) > 0.9 * PLACES_RPS * SHORT_OF_PLACES_S
    assert np.count_nonzero(met_unrefused) < 0.8 * np.count_nonzero(met)
