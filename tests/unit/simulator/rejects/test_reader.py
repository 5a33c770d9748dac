"""Decision logs as they are found: whole, cut, damaged, rotated, of other formats, and not logs at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import ConfigError
from contracts.messages import Predicted
from coordinator.decision_records import (
    AnswerMeans,
    CostKind,
    Decision,
    Header,
    Lost,
    WorkerGone,
    WorkerUp,
    line_of,
)
from simulator.rejects.reader import read_logs
from simulator.rejects.summary import summarise
from tests.support.conductors import PLAIN
from tests.support.decision_logs import HEADER, decision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coordinator.decision_records import Record
    from simulator.rejects.reader import DecisionHistory


def written(folder: Path, *records: Record, name: str = "log", end: bytes = b"") -> Path:
    path = folder / name
    path.write_bytes(b"".join(map(line_of, records)) + end)
    return path


def ids(history: DecisionHistory) -> list[list[str]]:
    return [[each.request for each in stretch.decisions] for stretch in history.stretches]


def test_a_stretch_ends_where_a_worker_comes_goes_or_is_another_one(tmp_path: Path) -> None:
    worker = HEADER.workers[0]
    log = written(
        tmp_path,
        HEADER,
        decision("a"),
        msgspec.structs.replace(worker, worker_id="new"),
        decision("b"),
        WorkerGone(at_s=1.0, worker_id="new"),
        decision("c"),
        msgspec.structs.replace(worker, incarnation=9),
        decision("d"),
    )
    history = read_logs([log])
    assert ids(history) == [["a"], ["b"], ["c"], ["d"]]
    assert [len(stretch.workers) for stretch in history.stretches] == [2, 3, 2, 2]


def test_what_is_learned_of_costs_and_answers_does_not_end_it(tmp_path: Path) -> None:
    kind = CostKind(number=5, latency=PLAIN, max_batch_tokens=1, between_steps_s=0.0)
    log = written(
        tmp_path,
        HEADER,
        decision("a"),
        kind,
        msgspec.structs.replace(HEADER.workers[0], costs=5),
        AnswerMeans(at_s=1.0, tokens={7: 40.0}),
        decision("b"),
    )
    (stretch,) = read_logs([log]).stretches
    assert [each.request for each in stretch.decisions] == ["a", "b"]
    assert stretch.workers[HEADER.workers[0].worker_id].costs == 5
    assert stretch.costs[5] == kind
    assert stretch.answers == {7: 40.0}


def test_parts_of_one_run_belong_together_and_another_run_does_not(tmp_path: Path) -> None:
    parts = [
        written(tmp_path, HEADER, decision("a"), name="log.1"),
        written(
            tmp_path,
            msgspec.structs.replace(HEADER, at_s=5.0),
            decision("b"),
            msgspec.structs.replace(HEADER, started_at=HEADER.started_at + 60),
            decision("c"),
        ),
    ]
    history = read_logs(parts)
    assert ids(history) == [["a", "b"], ["c"]]
    assert summarise(history).span_s == 60.0


def test_a_gap_is_counted_and_ends_the_stretch(tmp_path: Path) -> None:
    log = written(tmp_path, HEADER, decision("a"), HEADER, Lost(decisions=7), decision("b"))
    history = read_logs([log])
    assert (ids(history), history.num_lost) == ([["a"], ["b"]], 7)


def test_a_cut_last_line_and_lines_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    log = written(tmp_path, HEADER, decision("a"), end=b"garbage\n\xff\xfe\n" + line_of(decision("b"))[:-9])
    history = read_logs([log])
    assert (ids(history), history.num_unreadable, history.cut_files) == ([["a"]], 2, (str(log),))


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    log = written(tmp_path, HEADER, end=line_of(decision("a"))[:-1])
    history = read_logs([log])
    assert (ids(history), history.cut_files) == ([["a"]], ())


def test_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    line = line_of(decision("a")).replace(b'"at_s"', b'"mood":"good","at_s"')
    assert ids(read_logs([written(tmp_path, HEADER, end=line)])) == [["a"]]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "log: it is empty"),
        (b"hello\n", "log: not a decision log"),
        (b'{"kind":"decision"}\n', "log: not a decision log"),
        (b'{"format":"tandem-study-1","kind":"header"}\n', "log: not a decision log"),
        (b"\x89PNG\r\n\x1a\n\x00", "log: not a decision log"),
        (line_of(HEADER)[:-1][:50], "log: not a decision log, or one whose first line was cut"),
        (
            b'{"kind":"header","format":"tandem-decisions-1"}\n' + line_of(decision("a")),
            "log: not a decision log, or one whose first line was cut",
        ),
        (b'{"kind":"header","format":"tandem-decisions-2"}\n', "log: its format is tandem-decisions-2; this version"),
    ],
)
def test_what_is_no_log_is_told(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_logs([tmp_path / "log"])
    assert what in caught.value.message
    assert caught.value.message.startswith(str(tmp_path))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        read_logs([tmp_path / "none"])


def test_a_summary_counts_requests_by_their_last_decision(tmp_path: Path) -> None:
    decisions: Sequence[Decision] = [
        decision("a", at_s=0.0, slo_class="x", tenant="t"),
        decision("b", at_s=6.0, outcome="ttft", slo_class="x", tenant="t"),
        decision("b", at_s=7.0, slo_class="x", tenant="t"),
        decision("c", at_s=8.0, outcome="tpot", slo_class="x"),
        decision("d", at_s=12.0, outcome="full"),
    ]
    summary = summarise(read_logs([written(tmp_path, HEADER, *decisions)]))
    assert (summary.num_decisions, summary.everything.offered) == (5, 4)
    assert summary.everything.refused_for == {"tpot": 1, "full": 1}
    assert [(each.name, each.offered, each.refused) for each in summary.by_class] == [
        ("(no targets)", 1, 1),
        ("x", 3, 1),
    ]
    assert [(each.name, each.offered, each.refused) for each in summary.by_tenant] == [("(none)", 2, 2), ("t", 2, 0)]
    assert [each.offered for each in summary.over_time] == [1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1]
    assert summary.began_at == HEADER.started_at


def test_predictions_survive_the_file(tmp_path: Path) -> None:
    predicted = Predicted(waited_s=0.1, queue_s=0.2, transfer_s=0.0, prefill_s=0.3, ttft_s=0.6, tpot_s=0.05)
    log = written(tmp_path, HEADER, decision("a", predicted=predicted))
    assert read_logs([log]).stretches[0].decisions[0].predicted == predicted
    assert isinstance(HEADER, Header)
    assert all(isinstance(each, WorkerUp) for each in HEADER.workers)
