"""What people read: progress, reasons for giving up, the curl line, the demo's table."""

from __future__ import annotations

import json
import shlex
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.demo import CHATS, Measured, timeline_table
from cluster.launch import Loading
from cluster.node_agent import WorkerStatus
from cluster.progress import ProgressLines, can_serve, curl_line, settled, starting_line, why_hopeless
from cluster.state_file import ClusterState, WorkerState, read_state, write_state
from cluster.supervision import State
from contracts.errors import ConfigError
from contracts.ids import Incarnation, WorkerId

if TYPE_CHECKING:
    from pathlib import Path

    from contracts.messages import MemberRole


def worker(
    name: str,
    state: State,
    *,
    role: MemberRole = "mixed",
    loading: Loading | None = None,
    problem: str | None = None,
) -> WorkerStatus:
    return WorkerStatus(
        worker_id=WorkerId(name),
        role=role,
        state=state,
        incarnation=Incarnation(1),
        pid=None,
        address=None,
        loading=loading,
        problem=problem,
    )


def test_the_first_line_counts_the_workers() -> None:
    assert starting_line("demo", ["prefill", "decode", "decode"]) == (
        "starting demo: 1 prefill worker, 2 decode workers"
    )
    assert starting_line("demo", ["mixed", "store"]) == "starting demo: 1 mixed worker, 1 store"


def loading(what: str, fraction: float | None) -> list[WorkerStatus]:
    return [worker("w", State.STARTING, loading=Loading(what=what, fraction=fraction))]


def test_who_waits_for_somebody_else_says_so() -> None:
    waiting = worker("s", State.STARTING, loading=Loading(what="a worker", is_waiting=True))
    assert ProgressLines().update([waiting], 0.0) == ["s: waiting for a worker"]


def test_progress_is_told_once_a_second() -> None:
    lines = ProgressLines()
    told = [line for step in range(40) for line in lines.update(loading("weights", step / 40), step / 10)]
    assert told == ["w: loading weights", *(f"w: loading weights {percent}%" for percent in (25, 50, 75))]
    assert lines.update([worker("w", State.READY)], 9.0) == []


def test_a_new_stage_is_told_at_once_and_an_unchanged_one_not_again() -> None:
    lines = ProgressLines()
    assert lines.update(loading("kernels", None), 0.0) == ["w: loading kernels"]
    assert lines.update(loading("weights", 0.0), 0.1) == ["w: loading weights"]
    assert lines.update(loading("weights", 0.0), 5.0) == []


@pytest.mark.parametrize(
    ("roles", "enough"),
    [
        ([], False),
        (["prefill"], False),
        (["decode"], False),
        (["prefill", "decode"], True),
        (["mixed"], True),
        (["mixed", "store"], True),
        (["prefill", "store"], False),
    ],
)
def test_which_roles_can_serve(roles: list[MemberRole], *, enough: bool) -> None:
    assert can_serve(roles) is enough


def test_a_lost_role_is_hopeless_and_says_why() -> None:
    prefill = worker("p-0", State.READY, role="prefill")
    lost = worker("d-0", State.GIVEN_UP, role="decode", problem="out of memory")
    spare = worker("d-1", State.STARTING, role="decode")
    assert why_hopeless([prefill, lost, spare]) is None
    assert not settled([prefill, lost, spare])
    reason = why_hopeless([prefill, lost])
    assert reason == "the remaining workers cannot serve; given up were d-0 (decode): out of memory"


def test_slots_that_are_empty_are_waited_for_by_nobody_and_missed_by_nobody() -> None:
    prefill = worker("p-0", State.READY, role="prefill")
    absent = replace(worker("d-1", State.NEW, role="decode"), is_wanted=False)
    stopped = replace(worker("d-0", State.STOPPED, role="decode"), is_wanted=False)
    assert settled([prefill, absent, stopped])
    assert not settled([prefill, worker("d-0", State.NEW, role="decode")]), "it is about to start"
    assert why_hopeless([prefill, absent, stopped]) is None, "somebody wanted it so"
    lost = worker("d-0", State.GIVEN_UP, role="decode", problem="out of memory")
    assert why_hopeless([prefill, lost, absent]) is not None, "the others of its pool would fail alike"


@pytest.mark.parametrize("with_key", [False, True])
def test_the_curl_line_is_a_command(*, with_key: bool) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", "a/b", with_key=with_key))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "a/b"
    assert any("Authorization" in word for word in words) is with_key


def test_the_timeline_sums_to_what_was_measured() -> None:
    timeline = {
        "gateway_ms": 1.0,
        "queue_ms": 2.0,
        "prefill_ms": 30.0,
        "handoff_ms": 4.0,
        "decode_ms": 50.0,
        "total_ms": 87.0,
        "prompt_tokens": 12,
        "completion_tokens": 8,
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
    }
    lines = timeline_table([Measured("2.1", 88.5, timeline)])
    figures = ["1.0", "2.0", "30.0", "4.0", "50.0", "87.0", "87.0", "88.5"]
    assert lines[-1].split() == ["2.1", "12", "8", *figures, "prefill-0", "->", "decode-0"]
    assert len(set(map(len, lines[2:]))) == 1


def test_the_demo_asks_across_turns_and_across_distance() -> None:
    assert [len(chat.turns) for chat in CHATS] == [1, 2, 1]
    (long_chat,) = CHATS[2].turns
    assert len(long_chat.partition("7305")[2].split()) > 300


def test_the_state_file_is_private_and_whole(tmp_path: Path) -> None:
    state = ClusterState(
        pid=1,
        base_url="http://127.0.0.1:1",
        model_name="demo",
        coordinator_address="127.0.0.1:2",
        cluster_token="secret",
        runtime_dir="/tmp/t",
        log_dir="/tmp/t/logs",
        ready=True,
        workers=(
            WorkerState(
                worker_id=WorkerId("w-0"),
                role="mixed",
                state="ready",
                incarnation=Incarnation(3),
                pid=4,
                address="127.0.0.1:5",
            ),
        ),
    )
    path = tmp_path / "state.json"
    write_state(path, state)
    assert read_state(path) == state
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_state_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_state(tmp_path / "state.json")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state file .*truncated"):
        read_state(tmp_path / "state.json")
