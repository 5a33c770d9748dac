"""Counts of requests in a server's own metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from contracts.errors import Internal
from loadtest import gauges
from loadtest.gauges import GaugePoint, GaugeWatch, requests_in

if TYPE_CHECKING:
    from collections.abc import Mapping

VLLM = b"vllm:num_requests_running 3.0\nvllm:num_requests_waiting 1.0\n"


@pytest.mark.parametrize(
    ("exposition", "counts"),
    [
        (VLLM, (3.0, 1.0)),
        (b'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_waiting{engine="0"} 1', (3.0, 1.0)),
        # Summed over labels; with a time; with what looks like an end of labels.
        (
            b'vllm:num_requests_running{e="0"} 1 1700000000\nvllm:num_requests_running{e="}1"} 2\n'
            b"vllm:num_requests_waiting\t4e1\n",
            (3.0, 40.0),
        ),
        (b"sglang:num_running_reqs 5\nsglang:num_queue_reqs 6\n", (5.0, 6.0)),
        # Compatible names beside a server's own: counted once.
        (b"sglang:num_running_reqs 5\nsglang:num_queue_reqs 6\n" + VLLM, (3.0, 1.0)),
        # Neither help, nor other names, nor names within others.
        (
            b"# HELP vllm:num_requests_running 7\n# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"
            b"vllm:num_requests_running_total 9\nvllm:num_requests_waiting_by_reason 9\nx_vllm:num_requests_waiting 9\n"
            b"vllm:num_requests_waiting 0\n",
            (0.0, 0.0),
        ),
        (b"vllm:num_requests_running 3\n", None),
        (b"vllm:num_requests_running x\nvllm:num_requests_waiting\n", None),
        (b"", None),
        (b"<html>", None),
    ],
)
def test_requests_in(exposition: bytes, counts: tuple[float, float] | None) -> None:
    assert requests_in(exposition) == counts


def test_what_the_prometheus_library_writes() -> None:
    registry = CollectorRegistry()
    for name, base in (("tandem_worker_num_requests_running", 1), ("tandem_num_requests_waiting", 10)):
        gauge = Gauge(name, "Requests.", ["worker_id"], registry=registry)
        gauge.labels('w{"0"}\n').set(base)
        gauge.labels("w1").set(base * 2)
    assert requests_in(generate_latest(registry)) == (3.0, 30.0)


class Server:
    """Answers from a script: bodies, statuses, errors."""

    def __init__(self, *script: bytes | int | OSError) -> None:
        self._script = list(script)
        self.all_asked = asyncio.Event()

    async def get(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        assert path == "/metrics"
        if not self._script:
            self.all_asked.set()
            raise Internal("nobody should ask any more")
        said = self._script.pop(0)
        if isinstance(said, OSError):
            raise said
        return (said, {}, b"") if isinstance(said, int) else (200, {}, said)


async def test_points_come_with_their_times_and_three_failures_in_a_row_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "INTERVAL_S", 0.0)
    times = iter([1.0, 2.0])
    server = Server(VLLM, OSError("reset"), 503, VLLM.replace(b"3.0", b"4.0"), 404, 404, b"nothing")
    watch = GaugeWatch(server, lambda: next(times))
    async with asyncio.timeout(1):
        await watch.run()
        # Of the next part of a run: it stays quiet.
        await watch.run()
    assert watch.points == [GaugePoint(1.0, 3.0, 1.0), GaugePoint(2.0, 4.0, 1.0)]
    assert watch.stopped_because == "GET /metrics: no counts of requests in it"


@pytest.mark.parametrize(("said", "why"), [(OSError("refused"), "refused"), (404, "status 404")])
async def test_it_says_why_it_stopped(monkeypatch: pytest.MonkeyPatch, said: OSError | int, why: str) -> None:
    monkeypatch.setattr(gauges, "INTERVAL_S", 0.0)
    watch = GaugeWatch(Server(said, said, said), lambda: 0.0)
    async with asyncio.timeout(1):
        await watch.run()
    assert watch.points == []
    assert watch.stopped_because == f"GET /metrics: {why}"
