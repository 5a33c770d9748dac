"""The decision log of a real cluster: what its clients heard stands in it, and `tandem rejects` judges it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from simulator.commands import rejects
from simulator.rejects.flags import RejectsFlags
from simulator.rejects.reader import read_logs
from tests.support.cluster import running_cluster
from tests.support.long_tests import only_long

if TYPE_CHECKING:
    from pathlib import Path

#: Until workers know what their steps take, nothing is predicted and nobody refused.
MAX_ASKED = 400

CONFIG = """
model: demo
pools:
  - {name: prefill, role: prefill}
  - {name: decode, role: decode}
slo: {instant: {ttft_ms: 0.001, tpot_ms: 1000}, patient: {ttft_ms: 600000, tpot_ms: 600000}}
default_slo_class: instant
"""


@only_long
@pytest.mark.timeout(300)
async def test_every_decision_of_a_real_cluster_is_in_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, config = tmp_path / "decisions", tmp_path / "cluster.yaml"
    config.write_text(CONFIG)
    overrides = {"coordinator.decision_log": str(log)}
    async with (
        running_cluster(config=config, overrides=overrides) as cluster,
        httpx.AsyncClient(base_url=cluster.base_url, timeout=120) as client,
    ):

        async def ask(number: int, **fields: str) -> httpx.Response:
            prompt = f"story {number} " + "and on it went " * 12
            body = {"model": "demo", "prompt": prompt, "max_tokens": 4, **fields}
            return await client.post("/v1/completions", json=body)

        num_placed = 0
        while (answer := await ask(num_placed)).status_code == 200:
            num_placed += 1
            assert num_placed < MAX_ASKED, "an instant answer was never refused"
        assert answer.status_code == 429, answer.text
        assert (await ask(0, slo_class="patient")).status_code == 200
    history = read_logs([log])
    assert (history.num_lost, history.num_unreadable, history.cut_files) == (0, 0, ())
    decisions = [each for stretch in history.stretches for each in stretch.decisions]
    outcomes = [(each.slo_class, each.outcome) for each in decisions]
    assert outcomes == [("instant", "placement")] * num_placed + [("instant", "ttft"), ("patient", "placement")]
    last = decisions[-2]
    assert last.predicted is not None
    assert last.predicted.ttft_s > last.ttft_limit_s == 1e-6
    assert last.hints
    assert decisions[-1].hints == decisions[0].hints
    assert rejects(log, flags=RejectsFlags(replay=True)) == 0
    assert "of 1 refused requests about 0 (0 to 1) would have met their targets" in " ".join(
        capsys.readouterr().out.split()
    )
