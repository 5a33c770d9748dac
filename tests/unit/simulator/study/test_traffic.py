"""From flags to the workload of a study."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from threading import Thread
from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import ConfigError
from simulator.study.flags import WorkloadFlags
from simulator.study.traffic import build_traffic

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A hundred requests, one a second; every second prompt shares its first block with the first one."""
    file = tmp_path / "trace.jsonl"
    rows = (
        {
            "timestamp": 1000 * number,
            "input_length": 600,
            "output_length": 10,
            "hash_ids": [0 if number % 2 else number, 1000 + number],
        }
        for number in range(100)
    )
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_a_trace_whole(trace: Path) -> None:
    traffic = build_traffic(WorkloadFlags(trace=trace))
    requests = list(traffic.requests())
    assert len(requests) == traffic.totals.num_requests == 100
    assert traffic.totals.rate_rps == pytest.approx(1.0)
    assert {request.slo_class for request in requests} == {"interactive"}
    assert traffic.text == (
        "trace.jsonl (mooncake): 100 requests in 99.0 s (1.000/s), on average 600 prompt and 10 output tokens"
    )
    assert traffic.facts["sha256"] == hashlib.sha256(trace.read_bytes()).hexdigest()
    assert json.loads(msgspec.json.encode(traffic.facts))["num_requests"] == 100


def test_a_trace_with_shared_prefixes_warns_that_no_cache_is_modelled(trace: Path) -> None:
    (warning,) = build_traffic(WorkloadFlags(trace=trace)).warnings
    assert warning.startswith("no prefix cache is modelled")
    assert f"{50 * 512 / 60_000:.1%}" in warning


def test_a_trace_from_a_pipe_has_no_checksum(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    row = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
    writer = Thread(target=pipe.write_text, args=(row,), daemon=True)
    writer.start()
    traffic = build_traffic(WorkloadFlags(trace=pipe))
    writer.join()
    assert traffic.totals.num_requests == 1
    assert traffic.facts["sha256"] is None


def test_a_trace_that_repeats_nothing_warns_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n')
    assert build_traffic(WorkloadFlags(trace=file)).warnings == ()


def test_rows_that_are_no_requests_are_told(trace: Path) -> None:
    trace.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "0,ChatGPT,10,5,15,Conversation log\n1,ChatGPT,10,0,10,Conversation log\n"
        "2,GPT-4,20,5,25,API log\n"
    )
    traffic = build_traffic(WorkloadFlags(trace=trace))
    assert traffic.totals.num_requests == 2
    assert traffic.warnings == ("1 of the trace's 3 rows have no prompt or no output tokens: left out",)


def test_a_part_of_a_trace_and_then_its_speed(trace: Path) -> None:
    flags = WorkloadFlags(trace=trace, start="10s", duration="1min", requests=31, speed=2.0)
    traffic = build_traffic(flags)
    arrivals_s = [request.arrival_s for request in traffic.requests()]
    assert arrivals_s == [0.5 * number for number in range(31)]
    assert traffic.totals.span_s == 15.0
    assert "31 requests in 15.0 s (2.000/s), time scaled 2 times" in traffic.text
    assert [request.arrival_s for request in traffic.requests(5.0)] == pytest.approx([0.1 * n for n in range(31)])


def test_a_rate_is_a_speed(trace: Path) -> None:
    traffic = build_traffic(WorkloadFlags(trace=trace, rate=8.0))
    assert traffic.speed == pytest.approx(8.0)
    assert traffic.totals.rate_rps == pytest.approx(8.0)


def test_drawn_requests_are_those_of_their_seed() -> None:
    flags = WorkloadFlags(arrivals="poisson:4", prompts="fixed:100", outputs="lognormal:mean=50,p95=100", requests=500)
    traffic = build_traffic(flags)
    assert list(traffic.requests()) == list(build_traffic(flags).requests()) == list(traffic.requests())
    other = build_traffic(WorkloadFlags(arrivals="poisson:4", prompts="fixed:100", requests=500, seed=1))
    assert list(other.requests()) != list(traffic.requests())
    assert traffic.totals.num_requests == 500
    assert traffic.totals.prompt_tokens == 50_000
    assert traffic.totals.rate_rps == pytest.approx(4.0, rel=0.2)


def test_drawn_requests_of_a_duration_and_by_default() -> None:
    lasting = build_traffic(WorkloadFlags(arrivals="constant:2", duration="30s"))
    assert lasting.totals.num_requests == 60
    assert build_traffic(WorkloadFlags()).totals.num_requests == 1000


@pytest.mark.parametrize("with_trace", [True, False])
def test_several_classes_are_drawn_among_the_requests(trace: Path, with_trace: bool) -> None:
    flags = WorkloadFlags(trace=trace if with_trace else None, slo=("interactive:300,50", "batch:5000,200"))
    counts = Counter(request.slo_class for request in build_traffic(flags).requests())
    assert set(counts) == {"interactive", "batch"}
    assert min(counts.values()) > 0.3 * counts.total()
    again = Counter(request.slo_class for request in build_traffic(flags).requests())
    assert again == counts


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (WorkloadFlags(speed=1.0, rate=1.0), "--speed and --rate: give one of them"),
        (WorkloadFlags(speed=0.0), "--speed 0: must be a number above 0"),
        (WorkloadFlags(rate=-1.0), "--rate -1: must be a number above 0"),
        (WorkloadFlags(requests=0), "--requests 0: must be between 1 and"),
        (WorkloadFlags(start="5s"), "--start: needs a --trace"),
        (WorkloadFlags(duration="soon"), "--duration: 'soon' is not a number with a unit"),
        (WorkloadFlags(duration="0s"), "--duration 0s: must be above 0"),
        (WorkloadFlags(duration="1ms", arrivals="poisson:0.001"), "--duration 1ms: no request arrives"),
        (WorkloadFlags(arrivals="poison:1"), "arrivals 'poison:1': .*did you mean 'poisson'"),
        (WorkloadFlags(prompts="fixed:many"), "prompts 'fixed:many': the length must be a whole number"),
        (WorkloadFlags(slo=("fast",)), "SLO 'fast': not NAME:TTFT_MS,TPOT_MS"),
        (WorkloadFlags(slo=("a:1,1", "a:2,2")), "--slo: each class needs a name of its own: a, a"),
        (WorkloadFlags(speed=float("nan")), "--speed nan: must be a number above 0"),
        (WorkloadFlags(requests=9, speed=1e-9), "the requests arrive over .* days: at most 366 are simulated"),
        (WorkloadFlags(requests=9, arrivals="poisson:1e-300"), "the requests arrive over .* days"),
        (WorkloadFlags(requests=9, speed=1e30), "requests per second: at most 1e\\+09 are simulated"),
        (WorkloadFlags(prompts="fixed:3000000000"), "a prompt of 3,000,000,000 tokens: at most 2,147,483,647"),
        (WorkloadFlags(requests=1, rate=2.0), "--rate 2: all requests of the workload come at once"),
    ],
)
def test_workloads_that_cannot_be(flags: WorkloadFlags, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        build_traffic(flags)


def test_what_a_trace_says_is_not_drawn(trace: Path) -> None:
    with pytest.raises(ConfigError, match="--outputs: a --trace says this already"):
        build_traffic(WorkloadFlags(trace=trace, outputs="fixed:1"))
    with pytest.raises(ConfigError, match=r"--start, --duration: no request of .*trace.jsonl arrives then"):
        build_traffic(WorkloadFlags(trace=trace, start="1h"))


def test_a_bad_row_is_named_by_its_line(trace: Path) -> None:
    trace.write_text(trace.read_text() + '{"timestamp": "later"}\n')
    with pytest.raises(ConfigError, match=r"trace\.jsonl:101: "):
        build_traffic(WorkloadFlags(trace=trace))
