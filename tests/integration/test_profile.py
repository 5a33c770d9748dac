"""`tandem profile` on a real engine: stores what it measured, or says that the fit is not good enough."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.child_cluster import child_cluster
from cluster.model_source import resolve_model
from cluster.serving_profile import OUTPUT_TOKENS, ROUNDS, ServedAnswer, cluster_to_measure, measure_answers
from contracts.config import ClusterConfig
from contracts.errors import WorkerUnavailable
from contracts.latency import StepWork
from contracts.profile import MAX_DECODE_ERROR, load_profile
from rpc import LiveClock
from tests.support.commands import tandem
from tests.support.layout import ROOT
from tests.support.long_tests import only_long
from tests.support.processes import wait_gone

RANGE = ("--max-context", "256", "--max-num-batched-tokens", "64", "--max-num-seqs", "8")


@only_long
def test_a_profile_is_measured_shown_and_stored_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with tandem("profile", "demo", "--threads", "1", "--output", str(path), *RANGE) as command:
        status, output = command.wait()
    assert_stored_or_refused(path, status, output)
    if status == 0:
        assert "serving adds to a later token: " in output
        profile = load_profile(path)
        assert profile.serving is not None
        # HTTP and three processes on the way take some time, and no second.
        assert 0 < profile.serving.first_token_s < 1
        assert profile.serving.step_s < 1


def test_the_engine_alone(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with tandem("profile", "demo", "--no-serving", "--threads", "1", "--output", str(path), *RANGE) as command:
        status, output = command.wait()
    assert_stored_or_refused(path, status, output)
    assert "asked over HTTP" not in output
    if status == 0:
        assert load_profile(path).serving is None


def assert_stored_or_refused(path: Path, status: int, output: str) -> None:
    assert "held-out error: prefill " in output
    assert output.count("  held out") >= 6
    if status == 1:
        # A busy machine may spoil the measurement; then nothing is stored.
        assert "tandem: profile_refused: the fit is not stored: on held-out points the fit is off by" in output
        assert not path.exists()
        return
    assert status == 0, output
    assert f"stored in {path}" in output
    profile = load_profile(path)
    assert (profile.model, profile.threads, profile.block_tokens, profile.kv_token_bytes) == ("demo", 1, 16, 2048)
    assert profile.num_blocks == 2**29 // (16 * 2048)
    assert profile.max_context_tokens == 2048
    assert profile.errors.decode <= MAX_DECODE_ERROR
    assert 0 < profile.step_overhead_s < 1
    assert profile.transfer is not None
    whole = profile.latency.step_s(StepWork(64, 64 * 65 / 2, 1))
    assert profile.latency.decode_terms(1).base_s < whole


def test_a_real_cluster_is_asked_and_gone_afterwards() -> None:
    config = cluster_to_measure(ClusterConfig(), resolve_model("demo", print).folder, threads=1)
    progress: list[tuple[int, int]] = []

    async def measure() -> tuple[list[ServedAnswer], float]:
        clock = LiveClock()
        start_s = clock.now_s()
        answers = await measure_answers(
            config,
            max_chunk_tokens=64,
            vocab_size=500,
            clock=clock,
            progress=lambda done, total: progress.append((done, total)),
        )
        return answers, clock.now_s() - start_s

    answers, took_s = asyncio.run(measure())
    assert [answer.prompt_tokens for answer in answers] == [2, 16, 64] * ROUNDS
    assert {len(answer.gaps_s) for answer in answers} == {OUTPUT_TOKENS - 1}
    assert all(answer.ttft_s > 0 and min(answer.gaps_s) >= 0 for answer in answers)
    assert sum(answer.ttft_s + sum(answer.gaps_s) for answer in answers) < took_s
    assert progress == [(number, 27) for number in range(1, 28)]
    assert not psutil.Process().children(recursive=True)


def test_a_cluster_that_does_not_come_up_is_told_with_its_last_words() -> None:
    config = cluster_to_measure(ClusterConfig(), Path("/nowhere"), threads=1)

    async def start() -> None:
        async with child_cluster(config):
            raise AssertionError("there is no model")

    with pytest.raises(WorkerUnavailable, match=r"ended with 2:\ntandem: model /nowhere: no such folder"):
        asyncio.run(start())


def test_a_killed_measurement_leaves_no_cluster() -> None:
    program = (
        "import asyncio\n"
        "from pathlib import Path\n"
        "from cluster.child_cluster import child_cluster\n"
        "from cluster.serving_profile import cluster_to_measure\n"
        "from cluster.model_source import resolve_model\n"
        "from contracts.config import ClusterConfig\n"
        "async def main():\n"
        "    config = cluster_to_measure(ClusterConfig(), resolve_model('demo', print).folder, 1)\n"
        "    async with child_cluster(config):\n"
        "        print('up', flush=True)\n"
        "        await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(family) >= 3
        process.kill()
    wait_gone(family, 10.0)


def test_a_profile_needs_room_for_its_points() -> None:
    with tandem("profile", "demo", "--max-num-seqs", "7") as command:
        status, output = command.wait()
    assert status == 2
    assert "tandem: a profile needs chunks of at least 64 tokens and 8 sequences" in output


def test_a_profile_never_takes_most_of_the_memory() -> None:
    with tandem("profile", "demo", "--max-num-seqs", "1000000") as command:
        status, output = command.wait()
    assert status == 2, output
    assert "GiB of KV, this machine spares" in output
