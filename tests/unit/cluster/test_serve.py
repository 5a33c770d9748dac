"""The commands that start processes, as a user runs them."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.cluster import started_cluster
from tests.support.commands import PATIENCE_S, tandem
from tests.support.layout import ROOT
from tests.support.processes import is_gone

if TYPE_CHECKING:
    from tests.support.commands import Tandem

TOKEN = "a-token-for-tests"

#: Two signals at a process whose stop takes for ever.
IMPATIENCE = """
import asyncio
from cluster.serve import StopSignals

async def main():
    with StopSignals() as signals:
        signals.install(lambda: print("killed", flush=True))
        print("ready", flush=True)
        await signals.wanted.wait()
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_serve_tells_where_it_is_and_leaves_nothing_behind(run_tandem: Tandem) -> None:
    with started_cluster(overrides={"engine.max_sequences": "8"}) as cluster:
        cluster.wait_ready()
        state = cluster.state
        assert httpx.get(f"{state.base_url}/v1/models", timeout=PATIENCE_S).json()["data"][0]["id"] == "demo"
        assert [worker.worker_id for worker in state.workers] == ["prefill-0", "decode-0"]
        assert Path(state.runtime_dir, "logs", "prefill-0.log").exists()
        audit = run_tandem("doctor", "--state-file", f"{state.runtime_dir}/state.json")
        assert audit.status == 0, audit.stdout
        assert re.search(r"^ok +decode-0 \(decode, pid \d+\) +0 requests open", audit.stdout, re.MULTILINE)
        pids = cluster.worker_pids()
        assert cluster.stop() == 0
        assert all(is_gone(pid) for pid in pids)
        assert not Path(state.runtime_dir).exists()
        assert f"curl -N {state.base_url}/v1/chat/completions" in cluster.output


def test_a_port_in_use_is_told_before_anything_starts(run_tandem: Tandem) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run_tandem("serve", "--port", str(port))
    assert refused.status == 2
    assert f"127.0.0.1:{port}: Address already in use" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stdout == ""


def test_an_open_address_needs_keys_or_a_word(run_tandem: Tandem) -> None:
    refused = run_tandem("serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.status == 2
    assert "can be reached from other machines" in refused.stderr


def test_a_log_folder_that_cannot_be_made_is_told(run_tandem: Tandem, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = run_tandem("serve", "--port", "0", "--log-dir", f"{tmp_path}/file/logs")
    assert refused.status == 2
    assert refused.stderr == f"tandem: log_dir {tmp_path}/file/logs: cannot be made: Not a directory\n"


def test_a_second_signal_kills_at_once() -> None:
    command = [sys.executable, "-c", IMPATIENCE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping (once more to kill)\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "killed\n"
        assert process.wait(PATIENCE_S) == 130


def test_the_demo_answers_shows_the_time_and_ends() -> None:
    with tandem("demo") as demo:
        status, output = demo.wait()
    assert status == 0, output
    assert output.count("assistant: ") == 4
    head, *rows = output.splitlines()[-5:]
    assert head.split()[3:8] == ["gateway", "queue", "prefill", "handoff", "decode"]
    for row in rows:
        cells = row.split()
        total, measured = float(cells[8]), float(cells[9])
        assert total == pytest.approx(measured, abs=0.11)
        assert sum(map(float, cells[3:8])) == pytest.approx(measured, abs=0.3)
    assert int(rows[-1].split()[1]) >= 300


def test_coordinator_worker_and_gateway_can_be_started_alone(run_tandem: Tandem, tmp_path: Path) -> None:
    common: tuple[str, ...] = ("--config", "configs/colocated.yaml")
    environ = {"TANDEM_CLUSTER_TOKEN": TOKEN}
    with tandem("coordinator", *common, **environ) as coordinator:
        address = coordinator.wait_for("coordinator at ")
        common = (*common, "--coordinator", address)
        mixed = ("--pool", "mixed", "--runtime-dir", str(tmp_path))
        with (
            tandem("worker", *common, *mixed, **environ) as worker,
            tandem("gateway", *common, "--port", "0", **environ) as gateway,
        ):
            worker.wait_for("mixed-0: ready at ")
            url = gateway.wait_for("gateway at ")
            body = {"model": "demo", "prompt": "The weather is", "max_tokens": 4}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).json()
            assert answer["usage"]["completion_tokens"] >= 1
            audit = run_tandem("doctor", "--coordinator", address, **environ)
            assert audit.status == 0, audit.stdout
            wrong = run_tandem("doctor", "--coordinator", address, TANDEM_CLUSTER_TOKEN="wrong")
            assert wrong.status == 1
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(PATIENCE_S) == 0


def test_an_unknown_worker_names_the_known_ones(run_tandem: Tandem, tmp_path: Path) -> None:
    refused = run_tandem(
        *("worker", "--coordinator", "127.0.0.1:1", "--pool", "other", "--runtime-dir", str(tmp_path)),
        TANDEM_CLUSTER_TOKEN=TOKEN,
    )
    assert refused.status == 2
    assert refused.stderr == ("tandem: there is no worker 'other-0'; the configuration has prefill-0, decode-0\n")


def test_the_doctor_finds_what_is_missing(run_tandem: Tandem) -> None:
    healthy = run_tandem("doctor", "--port", "0")
    assert healthy.status == 0, healthy.stdout
    for what in ("python", "torch", "cores", "shared memory", "memory", "model", "port"):
        assert re.search(rf"^(ok|note) +{what} ", healthy.stdout, re.MULTILINE), what
    ill = run_tandem("doctor", "--model", "./nothing", "--port", "0")
    assert ill.status == 1
    assert re.search(r"^fail +model +model \./nothing: no such folder$", ill.stdout, re.MULTILINE)
