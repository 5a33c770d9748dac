"""What the coordinator's ordinary log tells of refusals: all they rested on, and no more lines than it can take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from contracts.messages import Rejection
from coordinator.decision import Refused
from coordinator.decision_records import Decision, record_of
from coordinator.refusal_lines import RefusalLines
from tests.support.conductors import conductor_of, item_of
from workload.slo import SloClass

SLO = SloClass("fast", 300.0, 50.0)


class Office:
    def __init__(self, *workers: str, max_lines_per_s: int = 200) -> None:
        self.conductor = conductor_of(workers, slos=(SLO,), default_slo="fast")
        self.lines = RefusalLines(self.conductor, max_lines_per_s=max_lines_per_s)

    def refuse(self, now_s: float, prompt_tokens: int = 5000) -> list[str]:
        item = item_of(prompt_tokens, blocks=range(6))
        decision = self.conductor.decide(item, now_s)
        words = self.conductor.in_words(item, decision, now_s)
        assert isinstance(decision, Refused)
        assert isinstance(words, Rejection)
        return self.lines.refused(item, decision, words, now_s)


def entry(line: str) -> Decision:
    start = line.index("{")
    found = record_of(line[start:].encode())
    assert isinstance(found, Decision)
    return found


def test_a_refusal_is_one_line_with_what_it_rested_on() -> None:
    (line,) = Office("p0", "d0").refuse(1.5)
    assert line.startswith("refused: predicted time to first token ")
    assert "\n" not in line
    told = entry(line)
    assert (told.request, told.outcome, told.slo_class, told.at_s) == ("r", "ttft", "fast", 1.5)
    assert (told.prefill, told.decode, told.ttft_limit_s) == ("p0", "d0", 0.3)
    assert told.predicted is not None
    assert told.predicted.ttft_s > 0.3
    assert told.hints == "", "they are long, and for replays"


def test_where_nobody_is_up_the_line_says_so() -> None:
    (line,) = Office("d0").refuse(1.0, prompt_tokens=100)
    assert "no prefill worker can take the request (workers up: d0 (decode))" in line
    assert entry(line).outcome == "no_prefill"


@given(
    st.lists(st.floats(0, 5, exclude_max=True), max_size=60).map(sorted),
    st.lists(st.floats(0, 5, exclude_max=True), max_size=10),
)
def test_there_are_few_lines_a_second_and_none_is_forgotten(times_s: list[float], looks_s: list[float]) -> None:
    most = 3
    office = Office("d0", max_lines_per_s=most)
    calls = sorted([(time_s, True) for time_s in times_s] + [(time_s, False) for time_s in looks_s])
    told: list[tuple[int, str]] = []
    for now_s, is_refusal in calls:
        lines = office.refuse(now_s, prompt_tokens=100) if is_refusal else office.lines.look(now_s)
        told += [(int(now_s), line) for line in lines]
    told += [(6, line) for line in office.lines.look(6.0)]
    for second in range(6):
        assert sum(at == second for at, _ in told) <= most + 1
    singles = sum("{" in line for _, line in told)
    left_out = sum(int(line.split()[1]) for _, line in told if "{" not in line)
    assert singles + left_out == len(times_s)
    assert singles == sum(min(most, sum(int(at) == second for at in times_s)) for second in range(5))
    assert office.lines.look(7.0) == []
