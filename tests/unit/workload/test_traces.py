"""Public traces are read as they were written, and a bad row is named by file and line."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.errors import ConfigError
from tests.support.traces import trace_path
from workload import WorkloadRequest, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workload import TraceKind

    WriteTrace = Callable[[str], Path]

BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def write(tmp_path: Path) -> WriteTrace:
    def write_trace(text: str) -> Path:
        path = tmp_path / "trace"
        path.write_text(text, "utf-8", "surrogatepass")
        return path

    return write_trace


def mooncake(timestamp: float, input_length: int, output_length: int, hash_ids: list[int] | None = None) -> str:
    ids = list(range(-(-input_length // 512))) if hash_ids is None else hash_ids
    row = {"timestamp": timestamp, "input_length": input_length, "output_length": output_length, "hash_ids": ids}
    return json.dumps(row) + "\n"


def test_mooncake(write: WriteTrace) -> None:
    trace = read_trace(write(mooncake(3000, 513, 7, [4, 9]) + "\n" + mooncake(4500, 512, 1, [4])))
    assert trace.requests == (
        WorkloadRequest(0.0, 513, 7, (4, 9), 512),
        WorkloadRequest(1.5, 512, 1, (4,), 512),
    )
    assert (trace.summary.kind, trace.summary.num_rows, trace.summary.duration_s) == ("mooncake", 2, 1.5)
    assert (trace.summary.prompt_tokens, trace.summary.output_tokens) == (1025, 8)


def test_azure_2023_and_2024(write: WriteTrace) -> None:
    old = "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n"
    new = "2024-05-10 00:00:00.009930+00:00,4808,10\n2024-05-10 02:00:00.061930+02:00,3180,8\n"
    for text in (old, new, "\ufeff" + AZURE + old):
        trace = read_trace(write(text if text.startswith("\ufeff") else AZURE + text))
        assert trace.requests == (WorkloadRequest(0.0, 4808, 10), WorkloadRequest(0.052, 3180, 8))
        assert trace.summary.kind == "azure"


def test_burstgpt_leaves_out_failures_and_counts_them(write: WriteTrace) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n47.5,ChatGPT,0,9,9,API log\n"
    trace = read_trace(write(BURSTGPT + rows + "118,GPT-4,417,276,693,API log\n"))
    assert trace.requests == (WorkloadRequest(0.0, 472, 18), WorkloadRequest(113.0, 417, 276))
    summary = trace.summary
    assert (summary.num_rows, summary.num_requests) == (4, 2)
    assert (summary.num_without_output, summary.num_without_prompt) == (1, 1)


def test_columns_are_found_by_name(write: WriteTrace) -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    trace = read_trace(write(header + "5,s-1,1.25,ChatGPT,472,18,490,Conversation log\n"))
    assert trace.requests == (WorkloadRequest(0.0, 472, 18),)


def test_rows_a_little_out_of_order_are_sorted_and_those_of_one_instant_stay(write: WriteTrace) -> None:
    rows = [(10, 1), (12, 2), (11, 3), (12, 4), (9, 5)]
    trace = read_trace(write(BURSTGPT + "".join(f"{time_s},m,{tokens},1,0,x\n" for time_s, tokens in rows)))
    assert [(each.arrival_s, each.prompt_tokens) for each in trace.requests] == [(0, 5), (1, 1), (2, 3), (3, 2), (3, 4)]
    assert trace.summary.num_out_of_order == 2


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (
            mooncake(0, 512, 1) + mooncake(0, 513, 1, [0]),
            2,
            "1 hash_ids for an input_length of 513, which has 2 blocks",
        ),
        (mooncake(0, 512, 1) + "{\n", 2, "JSON is malformed|truncated"),
        (mooncake(0, 512, -1), 1, r">= 0.*\$\.output_length"),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": [1]}', 1, "missing required field `output_length`"),
        ('{"timestamp": "0", "input_length": 5, "output_length": 5, "hash_ids": [1]}', 1, r"\$\.timestamp"),
        (AZURE + "yesterday,4,5\n", 2, "Invalid isoformat.*TIMESTAMP 'yesterday', ContextTokens '4'"),
        (AZURE + "2023-11-16 18:17:03,4\n", 2, "2 cells, where the header names 3"),
        (BURSTGPT + "1,m,4,5,9,x\n2,m,four,5,9,x\n", 3, "invalid literal.*Request tokens 'four'"),
        (BURSTGPT + "1,m,4,-5,9,x\n", 2, "tokens must be >= 0, got -5"),
        (BURSTGPT + "nan,m,4,5,9,x\n", 2, "the time must be finite, got nan"),
        (BURSTGPT + '1,"m,4,5,9,x\n', 2, "unexpected end of data"),
        (
            BURSTGPT + "100,m,4,5,9,x\n39,m,4,5,9,x\n",
            3,
            "61.000 s earlier than a row before it; only disorder of up to 60",
        ),
        ("time,input,output\n1,2,3\n", 1, "no known trace.*ContextTokens.*Response tokens"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write: WriteTrace, text: str, line: int, what: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=f"^{path}:{line}: .*({what})"):
        read_trace(path)


def test_a_format_that_is_given_is_not_guessed(write: WriteTrace) -> None:
    path = write(AZURE + "2023-11-16 18:17:03,4,5\n")
    with pytest.raises(ConfigError, match=":1: no column Timestamp, Request tokens, Response tokens in TIMESTAMP"):
        read_trace(path, "burstgpt")
    with pytest.raises(ConfigError, match=":1: JSON is malformed"):
        read_trace(path, "mooncake")


def test_no_file_and_no_request(write: WriteTrace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: cannot be read: No such file"):
        read_trace(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no request in 1 rows"):
        read_trace(write(BURSTGPT + "1,m,4,0,4,x\n"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([AZURE, BURSTGPT, mooncake(0, 512, 1), ""]), st.text(max_size=60))
def test_whatever_stands_in_a_file_it_is_read_or_refused(write: WriteTrace, begin: str, text: str) -> None:
    path = write(begin + text)
    refused = None
    try:
        trace = read_trace(path)
        assert len(trace.requests) == trace.summary.num_requests > 0
    except ConfigError as error:
        refused = error.message
    assert refused is None or str(path) in refused


REQUESTS = st.lists(
    st.tuples(
        st.integers(min_value=0, max_value=10**7),
        st.integers(min_value=1, max_value=3000),
        st.integers(min_value=1, max_value=3000),
    ),
    min_size=1,
    max_size=30,
).map(sorted)


@pytest.mark.parametrize("kind", ["mooncake", "azure", "burstgpt"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=REQUESTS)
def test_what_is_written_is_read(kind: TraceKind, rows: list[tuple[int, int, int]], write: WriteTrace) -> None:
    first_ms = rows[0][0]
    trace = read_trace(write(_write(kind, rows)))
    assert trace.summary.kind == kind
    expected = [((at_ms - first_ms) / 1000, prompt, output) for at_ms, prompt, output in rows]
    assert [each[:3] for each in trace.requests] == expected


def _write(kind: TraceKind, rows: list[tuple[int, int, int]]) -> str:
    if kind == "mooncake":
        return "".join(mooncake(*row) for row in rows)
    if kind == "burstgpt":
        return BURSTGPT + "".join(f"{at / 1000},m,{prompt},{output},0,x\n" for at, prompt, output in rows)
    begin = datetime(2023, 11, 16, tzinfo=UTC)
    times = [(begin + timedelta(milliseconds=at)).strftime("%Y-%m-%d %H:%M:%S.%f") for at, _, _ in rows]
    return AZURE + "".join(f"{time}0,{row[1]},{row[2]}\n" for time, row in zip(times, rows, strict=True))


def test_the_mooncake_conversation_hour() -> None:
    trace = read_trace(trace_path("mooncake_conversation.jsonl"))
    summary = trace.summary
    assert (summary.kind, summary.num_rows, summary.num_requests) == ("mooncake", 12_031, 12_031)
    assert round(summary.prompt_tokens / summary.num_requests) == 12_035
    assert round(summary.output_tokens / summary.num_requests) == 343
    assert summary.duration_s == pytest.approx(3537, abs=1)


def test_the_azure_code_hour() -> None:
    summary = read_trace(trace_path("azure_llm_2023_code.csv")).summary
    assert (summary.kind, summary.num_requests, summary.num_out_of_order) == ("azure", 8_819, 0)
    assert summary.duration_s == pytest.approx(3436, abs=1)
