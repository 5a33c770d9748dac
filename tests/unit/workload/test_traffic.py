"""From flags to the workload of a study."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from contracts.errors import ConfigError
from workload import prefix_reuse
from workload.chats import Chat
from workload.flags import WorkloadFlags
from workload.traffic import Traffic, build_traffic

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
        (WorkloadFlags(requests=9, speed=1e-9), "the requests arrive over .* days: at most 366 are allowed"),
        (WorkloadFlags(requests=9, arrivals="poisson:1e-300"), "the requests arrive over .* days"),
        (WorkloadFlags(requests=9, speed=1e30), "requests per second: at most 1e\\+09 are allowed"),
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


CHAT_FILE = """
description: Small chats.
arrivals: poisson:4
requests: 300
prompts: lognormal:mean=40,sigma=1,max=400
outputs: fixed:20
system_prompts: {count: 2, tokens: 64}
chats: {mean_turns: 3, max_turns: 9, think_s: 2}
slo: {fast: {ttft_ms: 100, tpot_ms: 10, share: 3}, slow: {ttft_ms: 1000, tpot_ms: 100}}
cancel: {share: 0.5, after_tokens: "fixed:7"}
"""


def written(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


def chats_of(traffic: Traffic) -> list[Chat]:
    return [item for item in traffic.items() if isinstance(item, Chat)]


def test_chats_of_a_workload_file(tmp_path: Path) -> None:
    traffic = build_traffic(WorkloadFlags(workload=written(tmp_path, CHAT_FILE)))
    chats = chats_of(traffic)
    assert traffic.totals.num_items == traffic.totals.num_chats == len(chats) == len(list(traffic.items()))
    assert sum(len(chat.turns) for chat in chats) == traffic.totals.num_requests == 300
    assert traffic.totals.prompt_tokens == sum(sum(chat.prompt_tokens()) for chat in chats)
    assert traffic.totals.output_tokens == 300 * 20
    classes = Counter(chat.slo_class for chat in chats)
    assert classes["fast"] > 1.5 * classes["slow"] > 0
    assert {slo.name: slo.ttft_ms for slo in traffic.slos} == {"fast": 100, "slow": 1000}
    assert traffic.cancel is not None
    assert {traffic.cancel.after_tokens(index, 20) for index in range(99)} == {None, 7}
    assert traffic.text.startswith(f"mine: drawn chats: 300 requests of {len(chats)} chats in ")
    facts = json.loads(msgspec.json.encode(traffic.facts))
    assert facts["workload_file"] == str(tmp_path / "mine.yaml")
    assert facts["chats"]["mean_turns"] == 3
    assert facts["slo_mix"] == {"fast": 3, "slow": 1}


def test_flattened_chats_are_the_same_requests(tmp_path: Path) -> None:
    traffic = build_traffic(WorkloadFlags(workload=written(tmp_path, CHAT_FILE)))
    requests = list(traffic.requests())
    assert len(requests) == 300
    assert sum(each.prompt_tokens for each in requests) == traffic.totals.prompt_tokens
    assert prefix_reuse(requests).token_hit_rate > 0.4


def test_a_faster_workload_of_chats_thinks_as_long(tmp_path: Path) -> None:
    traffic = build_traffic(WorkloadFlags(workload=written(tmp_path, CHAT_FILE), rate=8.0))
    assert traffic.totals.rate_rps == pytest.approx(8.0)
    plain = chats_of(build_traffic(WorkloadFlags(workload=written(tmp_path, CHAT_FILE))))
    faster = chats_of(traffic)
    assert [chat[1:] for chat in faster] == [chat[1:] for chat in plain]
    assert faster[-1].arrival_s == pytest.approx(plain[-1].arrival_s / traffic.speed)
    twice = [item.arrival_s for item in traffic.items(2.0)]
    assert twice == pytest.approx([chat.arrival_s / 2 for chat in faster])


def test_flags_replace_what_a_workload_file_says(tmp_path: Path) -> None:
    file = written(tmp_path, f"{CHAT_FILE}rate: 4\n")
    flags = WorkloadFlags(
        workload=file, arrivals="constant:30", outputs="fixed:3", duration="20s", slo=("only:5,5",), think="0s"
    )
    traffic = build_traffic(flags)
    chats = chats_of(traffic)
    assert len(chats) == 200
    assert traffic.speed == 1.0
    assert {turn.output_tokens for chat in chats for turn in chat.turns} == {3}
    assert {turn.think_s for chat in chats for turn in chat.turns} == {0.0}
    assert {chat.slo_class for chat in chats} == {"only"}
    assert build_traffic(WorkloadFlags(workload=file, speed=3.0)).speed == 3.0
    assert build_traffic(WorkloadFlags(workload=file, requests=7)).totals.num_requests == 7
    other = build_traffic(WorkloadFlags(workload=file, cancel="1", seed=2)).cancel
    assert other is not None
    assert (other.share, other.seed, other.lengths) == (1.0, 2, None)


def test_lone_requests_with_system_prompts_share_them(tmp_path: Path) -> None:
    text = CHAT_FILE.replace("chats: {mean_turns: 3, max_turns: 9, think_s: 2}\n", "")
    requests = list(build_traffic(WorkloadFlags(workload=written(tmp_path, text))).requests())
    assert {each.hash_block_tokens for each in requests} == {64}
    assert len({each.hash_ids[0] for each in requests}) == 2
    assert min(each.prompt_tokens for each in requests) > 64
    behind = [each.hash_ids[1] for each in requests]
    assert len(set(behind)) == len(behind)


def test_a_workload_file_names_its_trace_from_where_it_is(trace: Path) -> None:
    text = "description: d.\ntrace: trace.jsonl\nstart: 10s\nspeed: 2\nslo: {a: {ttft_ms: 1, tpot_ms: 1}}\n"
    traffic = build_traffic(WorkloadFlags(workload=written(trace.parent, text)))
    assert traffic.totals.num_requests == 90
    assert traffic.totals.rate_rps == pytest.approx(2.0)
    assert build_traffic(WorkloadFlags(workload=written(trace.parent, text), start="50s")).totals.num_requests == 50


def test_scaled_and_clipped_lengths_are_told(trace: Path) -> None:
    traffic = build_traffic(WorkloadFlags(trace=trace, scale_lengths=0.0625, max_context=30))
    requests = list(traffic.requests())
    assert {(each.prompt_tokens, each.output_tokens, each.hash_block_tokens) for each in requests} == {(29, 1, 32)}
    assert traffic.warnings == (
        "100 of 100 requests cut to a context of 30 tokens: 900 prompt and 0 output tokens less",
    )
    assert list(traffic.requests()) == requests
    assert "lengths scaled 0.0625 times" in traffic.text
    whole = build_traffic(WorkloadFlags(trace=trace, scale_lengths=0.0625, max_context=39))
    assert whole.warnings == ()
    assert {each.prompt_tokens for each in whole.requests()} == {38}


def test_chats_end_at_the_context_and_it_is_told(tmp_path: Path) -> None:
    traffic = build_traffic(WorkloadFlags(workload=written(tmp_path, CHAT_FILE), max_context=256))
    longest = max(tokens for chat in chats_of(traffic) for tokens in chat.prompt_tokens())
    assert longest <= 236
    (warning,) = traffic.warnings
    left_out = 300 - traffic.totals.num_requests
    assert warning.endswith(f", and {left_out} turns of chats left out")
    assert left_out > 0


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 20}] * 3},
    {"id": "b", "conversations": [{"from": "gpt", "value": "only me"}]},
    {"id": "c", "conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]},
]


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(SHAREGPT * 20))
    return file


def test_a_file_of_conversations(conversations: Path) -> None:
    traffic = build_traffic(WorkloadFlags(trace=conversations, arrivals="constant:4"))
    chats = chats_of(traffic)
    assert [len(chat.turns) for chat in chats] == [3, 1] * 20
    assert [(turn.text, turn.new_tokens, turn.output_tokens) for turn in chats[0].turns] == [("x" * 40, 10, 5)] * 3
    assert [chat.arrival_s for chat in chats[:3]] == [0.0, 0.5, 1.0]
    assert chats[0].turns[1].think_s > 0
    assert traffic.totals.rate_rps == pytest.approx(4.0)
    assert traffic.warnings == (
        "no tokenizer: lengths of chats.json assume 4 characters a token",
        "20 of 60 conversations have no answered message, or an unknown speaker: left out",
    )
    assert traffic.facts["sha256"] == hashlib.sha256(conversations.read_bytes()).hexdigest()
    assert len(list(traffic.requests())) == 80


def test_texts_are_counted_by_whoever_can(conversations: Path) -> None:
    flags = WorkloadFlags(trace=conversations, arrivals="poisson:4", requests=6, think="1s")
    traffic = build_traffic(flags, count_tokens=lambda text: len(text.split()))
    assert [len(chat.turns) for chat in chats_of(traffic)] == [3, 1, 2]
    assert chats_of(traffic)[1].turns[0][:2] == (2, 1)
    assert not any("tokenizer" in warning for warning in traffic.warnings)
    shorter = build_traffic(replace(flags, scale_lengths=0.5), count_tokens=len)
    assert chats_of(shorter)[0].turns[0][:2] == (20, 10)
    assert chats_of(shorter)[0].turns[0].text is None


def test_a_workload_file_may_cut_conversations(conversations: Path) -> None:
    text = (
        "description: d.\ntrace: chats.json\nchats: {max_turns: 1}\narrivals: constant:2\n"
        "slo: {a: {ttft_ms: 1, tpot_ms: 1}}\n"
    )
    traffic = build_traffic(WorkloadFlags(workload=written(conversations.parent, text)))
    assert traffic.totals.num_requests == traffic.totals.num_chats == 40
    assert [chat.arrival_s for chat in chats_of(traffic)[:3]] == [0.0, 0.5, 1.0]


def test_what_does_not_go_together(trace: Path, conversations: Path, tmp_path: Path) -> None:
    lone = "description: d.\nslo: {a: {ttft_ms: 1, tpot_ms: 1}}\n"
    refused = [
        (WorkloadFlags(trace=trace, arrivals="poisson:1"), "--arrivals poisson:1: the trace .* says this already"),
        (WorkloadFlags(trace=trace, workload="chat"), "--trace: --workload chat says what is asked"),
        (WorkloadFlags(trace=trace, think="1s"), "--think 1s: the workload has no chats"),
        (WorkloadFlags(think="1s"), "--think 1s: the workload has no chats"),
        (WorkloadFlags(trace=conversations, start="5s"), "--start 5s: the conversations of .* have no times"),
        (WorkloadFlags(trace=trace, scale_lengths=0.3), "--scale-lengths 0.3: .* the nearest factor that works is 0.3"),
        (WorkloadFlags(scale_lengths=1.5), "--scale-lengths 1.5: must be above 0 and at most 1"),
        (WorkloadFlags(max_context=1), "--max-context 1: must be at least 2"),
        (WorkloadFlags(cancel="2"), "cancel '2': the share must be above 0 and at most 1"),
        (
            WorkloadFlags(workload=written(tmp_path, CHAT_FILE), max_context=65),
            "--max-context 65: leaves no room behind system prompts of 64 tokens",
        ),
    ]
    for flags, what in refused:
        with pytest.raises(ConfigError, match=what):
            build_traffic(flags)
    for text, what in (
        (f"{lone}trace: trace.jsonl\narrivals: poisson:1\n", r"mine\.yaml: arrivals: the trace .* says this already"),
        (f"{lone}trace: trace.jsonl\nchats: {{max_turns: 3}}\n", r"mine\.yaml: chats: the trace .* holds requests"),
        (f"{lone}trace: chats.json\nchats: {{mean_turns: 3}}\n", r"mine\.yaml: chats\.mean_turns: the conversations"),
        (f"{lone}arrivals: poisson:0.001\nduration: 1ms\n", r"mine\.yaml: duration: no request arrives"),
    ):
        with pytest.raises(ConfigError, match=what):
            build_traffic(WorkloadFlags(workload=written(tmp_path, text)))


@pytest.mark.parametrize("flags", [{"rate": 8.0}, {"speed": 8.0}, {"arrivals": "constant:8"}])
def test_what_is_drawn_lasts_as_long_as_asked_however_its_rate_is_said(flags: dict[str, Any]) -> None:
    traffic = build_traffic(WorkloadFlags(prompts="fixed:5", outputs="fixed:5", duration="50s", **flags))
    assert traffic.totals.span_s == pytest.approx(50, rel=0.15)
    assert traffic.totals.rate_rps == pytest.approx(8, rel=0.15)


def test_chats_last_as_long_as_asked_at_another_rate() -> None:
    traffic = build_traffic(WorkloadFlags(workload="chat", duration="200s", rate=8.0, scale_lengths=0.125))
    assert traffic.totals.span_s == pytest.approx(200, rel=0.2)
    assert traffic.totals.rate_rps == pytest.approx(8)
