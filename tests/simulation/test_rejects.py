"""From a study's decision log alone its refusals are judged as the study itself would judge them."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.errors import ConfigError
from contracts.latency_models import CostCurve, FittedLatency
from contracts.transfer_models import LinkTransfer
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from engine.compose import StepBudget
from prefill import PrefillLimits
from prefill.ordering import QueueRules
from simulator.commands import rejects
from simulator.heap.results import Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from simulator.rejects.flags import RejectsFlags
from simulator.rejects.reader import read_logs
from simulator.rejects.rebuild import rebuild
from simulator.rejects.replay import ReplaySettings, beside, replay, run_requests
from simulator.study.metrics import request_latencies
from tests.support.logged_studies import simulate_logged
from workload.request import WorkloadRequest
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from simulator.heap.results import StudyResult

#: A prompt of 1,000 tokens takes 0.52 s, so two workers read some four a second; six come.
COSTS = FittedLatency(
    prefill=CostCurve.line(0.02, 0.0005), pair_s=0.0, decode=CostCurve.line(0.02, 0.001), context_token_s=1e-7
)
SLOS = (SloClass("default", 3000.0, 60.0),)
SEED = 1


def workload() -> Iterator[WorkloadRequest]:
    rng = random.Random(SEED)
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(6.0)) < 60.0:
        size = rng.choice((256, 1024, 2048))
        root = rng.randrange(20)
        ids = (root, *(rng.randrange(10**6, 10**9) for _ in range(size // 128 - 1)))
        yield WorkloadRequest(now_s, size, max(2, round(rng.gauss(60, 10))), ids, 128)


def spec(ttft_share: float) -> StudySpec:
    def group(name: str, num_tokens: int, cache_tokens: int) -> WorkerGroup:
        return WorkerGroup(
            name=name[0],
            role="prefill" if name == "prefill" else "decode",
            count=2,
            latency=COSTS,
            num_blocks=20_000,
            prefix_cache_tokens=cache_tokens,
            budget=StepBudget(max_tokens=num_tokens, max_sequences=256),
            prefill=PrefillLimits(queue=QueueRules(order="fcfs")),
        )

    return StudySpec(
        groups=(group("prefill", 1000, 320_000), group("decode", 256, 0)),
        transfer=LinkTransfer(latency_s=0.001, bandwidth_bytes_s=1e10),
        kv_token_bytes=1000,
        conductor=ConductorSettings(admission=AdmissionRule(ttft_share=ttft_share)),
        slos=SLOS,
        default_slo="default",
        max_output_tokens=128,
    )


@cache
def logged(ttft_share: float) -> tuple[StudyResult, bytes]:
    return simulate_logged(spec(ttft_share), workload())


def really(ttft_share: float, row: int) -> tuple[float, bool]:
    """TTFT of a refused request, and whether it meets its targets, where the study itself lets in that one alone."""
    result = simulate(replace(spec(ttft_share), forced=frozenset([row])), workload())
    latencies = request_latencies(result, SLOS)
    return float(latencies.ttft_s[row]), bool(latencies.met[row])


@pytest.mark.parametrize("ttft_share", [1.0, 0.4])
def test_a_replay_judges_as_the_study_itself(tmp_path: Path, ttft_share: float) -> None:
    result, log = logged(ttft_share)
    refused = np.flatnonzero(result.requests.outcome == Outcome.REJECTED).tolist()
    accepted = result.requests.outcome != Outcome.REJECTED
    assert len(refused) > 40, "a study that has something to judge"
    (tmp_path / "log").write_bytes(log)
    (stretch,) = read_logs([tmp_path / "log"]).stretches
    rebuilt = rebuild(stretch)
    found = replay(rebuilt, ReplaySettings(num_samples=5, share=0.02))
    assert (found.num_accepted, found.num_refused) == (int(accepted.sum()), len(refused))
    assert found.accepted_met == pytest.approx(request_latencies(result, SLOS).met[accepted].mean(), abs=0.03)
    assert found.refused_again == pytest.approx(len(refused) / len(accepted), abs=0.05)
    assert found.calibration.num_requests == found.num_accepted
    truth = [really(ttft_share, row)[1] for row in random.Random(9).sample(refused, 8)]
    assert found.overall.share == pytest.approx(sum(truth) / len(truth), abs=0.25)
    if ttft_share < 1.0:
        assert found.overall.share > 0.7, "most refusals were wrong, for they left more than half of the target"
    else:
        assert found.overall.share < 0.3


def test_a_request_that_is_let_in_alone_meets_the_very_cluster_that_refused_it(tmp_path: Path) -> None:
    result, log = logged(1.0)
    (tmp_path / "log").write_bytes(log)
    (stretch,) = read_logs([tmp_path / "log"]).stretches
    rebuilt = rebuild(stretch)
    refused = np.flatnonzero(result.requests.outcome == Outcome.REJECTED).tolist()
    for row in random.Random(4).sample(refused, 3):
        (asked,) = [each for each in rebuilt.requests if each.last.request == str(row)]
        requests = beside([asked], rebuilt.requests)
        replayed = request_latencies(run_requests(rebuilt, requests, True), rebuilt.slos)
        ttft_s, met = really(1.0, row)
        at = requests.index(asked)
        assert replayed.ttft_s[at] == pytest.approx(ttft_s, abs=0.01)
        assert bool(replayed.met[at]) == met


def test_the_command_tells_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, log = logged(0.4)
    path = tmp_path / "log"
    path.write_bytes(log[:-30])
    flags = RejectsFlags(replay=True, samples=2, share=0.02, json=tmp_path / "figures.json")
    assert rejects(path, flags=flags) == 0
    told = capsys.readouterr().out
    assert "the last line of" in told
    assert "would have met" in told
    assert "over 2 decode, 2 prefill workers" in told
    assert b'"format": "tandem-rejects-1"' in (tmp_path / "figures.json").read_bytes()


def test_the_command_tells_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = logged(0.4)[1].splitlines(keepends=True)[0]
    path = tmp_path / "log"
    path.write_bytes(header)
    assert rejects(path) == 0
    assert capsys.readouterr().out == f"{path}: no decisions yet\n"
    with pytest.raises(ConfigError, match="no log: name the file"):
        rejects()
    with pytest.raises(ConfigError, match="--samples must be at least 1"):
        rejects(path, flags=RejectsFlags(share=0.0))
