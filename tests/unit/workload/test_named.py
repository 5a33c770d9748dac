"""Workload files: the shipped ones are what they say, and a wrong one is told file, key and what."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

import pytest

from contracts.errors import ConfigError
from tests.support.layout import ROOT
from workload import prefix_reuse
from workload.flags import WorkloadFlags
from workload.named import find_workload, read_workload, workload_names
from workload.traffic import build_traffic

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("agents", "bursty", "chat", "code", "long-context", "summarise")


def test_six_come_with_tandem() -> None:
    assert workload_names() == NAMES
    assert find_workload("chat") == ROOT / "configs" / "workloads" / "chat.yaml"


#: Mean tokens of prompts and answers, and the share of prompt tokens that repeat earlier ones; as the files say.
PUBLISHED = {
    "agents": (8_596, 182, 0.59),
    "bursty": (755.5, 200.3, 0.0),
    "chat": (755.5, 200.3, None),
    "code": (2_048, 27.9, 0.0),
    "long-context": (12_035, 343, 0.0),
    "summarise": (1_738.3, 90.7, 0.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workload_has_the_lengths_that_it_cites(name: str) -> None:
    requests = list(build_traffic(WorkloadFlags(workload=name, requests=5000)).requests())
    prompt_tokens, output_tokens, repeated = PUBLISHED[name]
    assert mean(each.prompt_tokens for each in requests) == pytest.approx(prompt_tokens, rel=0.1)
    assert mean(each.output_tokens for each in requests) == pytest.approx(output_tokens, rel=0.1)
    if repeated is not None:
        assert prefix_reuse(requests).token_hit_rate == pytest.approx(repeated, abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workload_says_what_it_is_for(name: str) -> None:
    file = read_workload(find_workload(name))
    assert file.description.endswith(".")
    assert file.slo
    assert build_traffic(WorkloadFlags(workload=name)).totals.num_requests == file.requests


def test_a_wrong_name_is_told_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--workload chatt: neither .*: agents, bursty, .*; did you mean 'chat'\?$"):
        find_workload("chatt")
    with pytest.raises(ConfigError, match=r"long-context, summarise$"):
        find_workload("zzz")
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read: No such file"):
        read_workload(find_workload("missing.yaml"))


MINIMAL = "description: d.\nslo: {a: {ttft_ms: 1, tpot_ms: 1}}\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("arivals: poisson:1", r"w\.yaml: arivals: unknown key; did you mean 'arrivals'\?"),
        ("chats: {mean_turns: 2, thnk_s: 1}", r"w\.yaml: chats\.thnk_s: unknown key; did you mean 'think_s'\?"),
        ("cancel: {shar: 1}", r"w\.yaml: cancel\.share: this key is required\n.*cancel\.shar: unknown key"),
        ("cancel: {share: 2}", r"w\.yaml: cancel\.share = 2: Input should be less than or equal to 1"),
        ("arrivals: poison:1", r"w\.yaml: arrivals = 'poison:1': .*did you mean 'poisson'"),
        ("prompts: fixed:many", r"w\.yaml: prompts = 'fixed:many': .*must be a whole number"),
        ("cancel: {share: 0.1, after_tokens: fixd:1}", r"w\.yaml: cancel\.after_tokens = 'fixd:1': .*unknown form"),
        ("chats: {mean_turns: 9, max_turns: 4}", r"w\.yaml: chats = .*: mean_turns must be between 1 and max_turns 4"),
        ("chats: {max_turns: 4}", r"w\.yaml: chats\.mean_turns: needed where there is no trace of conversations"),
        ("duration: soon", r"w\.yaml: duration = 'soon': 'soon' is not a number with a unit"),
        ("start: 5s", r"w\.yaml: start: needs a trace"),
        ("speed: 2\nrate: 2", r"w\.yaml: speed and rate: give one of them"),
        ("trace: t.csv\nprompts: fixed:1", r"w\.yaml: prompts: the trace says this already"),
        ("scale_lengths: 2", r"w\.yaml: scale_lengths = 2: Input should be less than or equal to 1"),
        ("requests: 60000000", r"w\.yaml: requests = 60000000: Input should be less than or equal to 50000000"),
        ("requests: [", r"w\.yaml: line 4: "),
        ("slo: {}", r"w\.yaml: line 3: the key 'slo' stands twice"),
    ],
)
def test_a_wrong_file_is_told_what(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(f"{MINIMAL}{text}\n")
    with pytest.raises(ConfigError, match=what):
        read_workload(file)


def test_targets_are_needed_and_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("description: d.\nslo: {a: {ttft_ms: -1, tpo_ms: 3}}\n")
    with pytest.raises(ConfigError) as refused:
        read_workload(file)
    assert str(refused.value).splitlines() == [
        f"{file}: slo.a.ttft_ms = -1: Input should be greater than 0",
        f"{file}: slo.a.tpot_ms: this key is required",
        f"{file}: slo.a.tpo_ms: unknown key; did you mean 'tpot_ms'?",
    ]
    file.write_text("description: d.\n")
    with pytest.raises(ConfigError, match="slo: this key is required"):
        read_workload(file)
