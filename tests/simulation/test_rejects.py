"""From a study's decision log alone its refusals are judged as the study itself would judge them."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from contracts.errors import ConfigError
from contracts.latency_models import CostCurve, FittedLatency
from contracts.transfer_models import LinkTransfer
from coordinator.decision_records import Decision, line_of, record_of
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
from simulator.rejects.replay import ReplaySettings, SimulatedCluster, replay
from simulator.study.metrics import request_latencies
from tests.support.logged_studies import simulate_logged
from workload.request import WorkloadRequest
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from simulator.heap.results import StudyResult
    from simulator.rejects.rebuild import Rebuilt

#: A prompt of 1,000 tokens takes 0.52 s, so two workers read some four a second; six come.
COSTS = FittedLatency(
    prefill=CostCurve.line(0.02, 0.0005), pair_s=0.0, decode=CostCurve.line(0.02, 0.001), context_token_s=1e-7
)
SLOS = (SloClass("default", 3000.0, 60.0),)
SEED = 1


def workload(rate: float = 6.0, seconds: float = 60.0, *, has_prefixes: bool = True) -> Iterator[WorkloadRequest]:
    rng = random.Random(SEED)
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(rate)) < seconds:
        size = rng.choice((256, 1024, 2048))
        root = rng.randrange(20)
        ids = (root, *(rng.randrange(10**6, 10**9) for _ in range(size // 128 - 1))) if has_prefixes else ()
        yield WorkloadRequest(now_s, size, max(2, round(rng.gauss(60, 10))), ids, 128 if has_prefixes else 0)


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


def rebuilt_from(folder: Path, log: bytes) -> Rebuilt:
    (folder / "log").write_bytes(log)
    (stretch,) = read_logs([folder / "log"]).stretches
    return rebuild(stretch)


@pytest.mark.parametrize("ttft_share", [1.0, 0.4])
def test_a_replay_judges_as_the_study_itself(tmp_path: Path, ttft_share: float) -> None:
    result, log = logged(ttft_share)
    refused = np.flatnonzero(result.requests.outcome == Outcome.REJECTED).tolist()
    accepted = result.requests.outcome != Outcome.REJECTED
    assert len(refused) > 40, "a study that has something to judge"
    found = replay(rebuilt_from(tmp_path, log), ReplaySettings(num_tried=24), SimulatedCluster(max_branches=2))
    assert (found.num_accepted, found.num_refused) == (int(accepted.sum()), len(refused))
    assert (found.overall.num_tried, found.overall.num_refused) == (24, len(refused))
    assert found.accepted_met == pytest.approx(request_latencies(result, SLOS).met[accepted].mean(), abs=0.03)
    assert found.refused_again == pytest.approx(len(refused) / len(accepted), abs=0.05)
    assert found.calibration.num_requests == found.num_accepted
    if ttft_share < 1.0:
        assert found.overall.share > 0.7, "most refusals were wrong, for they left more than half of the target"
    else:
        assert found.overall.share < 0.3


@pytest.mark.parametrize(("ttft_share", "error_s"), [(1.0, 0.001), (0.4, 0.1)])
def test_whoever_is_let_in_alone_meets_the_very_cluster_that_refused_it(
    tmp_path: Path, ttft_share: float, error_s: float
) -> None:
    """With prefix caches, and more than can be served. Where limits are tight, the study itself then refuses others,
    whose prompts share its steps in the replay, which follows the log."""
    result, log = logged(ttft_share)
    rebuilt = rebuilt_from(tmp_path, log)
    assert rebuilt.spec.groups[-1].prefix_cache_tokens
    refused = np.flatnonzero(result.requests.outcome == Outcome.REJECTED).tolist()
    rows = random.Random(4).sample(refused, 5)
    tried = [each for each in rebuilt.requests if each.last.request in map(str, rows)]
    _, fates = SimulatedCluster(max_branches=2).follow(rebuilt, tried)
    assert [rebuilt.requests[fate.index] for fate in fates] == tried
    for fate, each in zip(fates, tried, strict=True):
        ttft_s, met = really(ttft_share, int(each.last.request))
        assert fate.ttft_s == pytest.approx(ttft_s, abs=error_s)
        assert fate.met == met


def every_third_refused(spec: StudySpec, requests: Iterable[WorkloadRequest], *, begin_s: float) -> bytes:
    """The log of a study that refuses nobody, in which a third was refused all the same."""
    result, log = simulate_logged(spec, requests)
    assert not (result.requests.outcome == Outcome.REJECTED).any()
    lines: list[bytes] = []
    for line in log.splitlines(keepends=True):
        record = record_of(line)
        if isinstance(record, Decision) and record.at_s >= begin_s and int(record.request) % 3 == 2:
            record = msgspec.structs.replace(record, outcome="ttft")
            line = line_of(record)
        lines.append(line)
    return b"".join(lines)


@pytest.mark.parametrize("has_prefixes", [False, True])
@pytest.mark.parametrize(("rate", "begin_s", "share"), [(1.0, 0.0, 1.0), (16.0, 10.0, 0.0)])
def test_planted_refusals_are_told_from_right_ones(
    tmp_path: Path, rate: float, begin_s: float, share: float, has_prefixes: bool
) -> None:
    """Nearly idle, every refusal was wrong; with queues that are far longer than the target, none was."""
    unhurried = replace(spec(1.0), conductor=ConductorSettings(admission=AdmissionRule(form="none")))
    requests = workload(rate, 40.0 if rate < 2 else 20.0, has_prefixes=has_prefixes)
    log = every_third_refused(unhurried, requests, begin_s=begin_s)
    found = replay(rebuilt_from(tmp_path, log), ReplaySettings(num_tried=16), SimulatedCluster(max_branches=2)).overall
    assert found.num_refused > 10
    assert found.num_tried == min(16, found.num_refused)
    assert found.share == share


def test_a_replay_is_the_same_however_many_branches_run_at_once(tmp_path: Path) -> None:
    rebuilt = rebuilt_from(tmp_path, logged(1.0)[1])
    settings = ReplaySettings(num_tried=6, seed=2)
    assert replay(rebuilt, settings, SimulatedCluster(max_branches=3)) == replay(rebuilt, settings)


def test_a_replay_serves_the_accepted_as_they_were_served(tmp_path: Path) -> None:
    result, log = logged(1.0)
    replayed, _ = SimulatedCluster().follow(rebuilt_from(tmp_path, log), [])
    accepted = result.requests.outcome != Outcome.REJECTED
    began_s = result.requests.arrival_s[0]
    assert replayed.requests.arrival_s + began_s == pytest.approx(result.requests.arrival_s[accepted], abs=1e-5)
    assert replayed.requests.first_token_s + began_s == pytest.approx(result.requests.first_token_s[accepted], abs=1e-5)


def test_the_command_tells_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, log = logged(0.4)
    path = tmp_path / "log"
    path.write_bytes(log[:-30])
    flags = RejectsFlags(replay=True, samples=6, json=tmp_path / "figures.json")
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
        rejects(path, flags=RejectsFlags(samples=0))
