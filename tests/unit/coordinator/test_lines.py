"""Where readers are held up by their writers, prompts go to the writer with the shortest line."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import WorkerId
from contracts.messages import WorkerInfo, WorkerLoad
from coordinator.conductor import AdmissionRule, Conductor, ConductorSettings
from coordinator.decision import Chosen
from tests.support.conductors import conductor_of, info_of, item_of
from workload.slo import SloClass

SLO = SloClass("patient", 60_000.0, 60_000.0)
SETTINGS = ConductorSettings(admission=AdmissionRule(form="none"), queue_order="fcfs")
#: Prompts that were read and that nobody takes, above its budget.
HELD_UP = WorkerLoad(offered_blocks=50)


BUSY = (("d0", 60), ("d1", 20))


def told(name: str, *, seats: int = 0, handoff_blocks: int = 0) -> WorkerInfo:
    return msgspec.structs.replace(info_of(name), max_sequences=seats, handoff_blocks=handoff_blocks)


def unread(*counts: tuple[str, int]) -> WorkerLoad:
    return msgspec.structs.replace(HELD_UP, unread_for=tuple((WorkerId(name), count) for name, count in counts))


def full(num_decodes: int) -> WorkerLoad:
    return WorkerLoad(
        running_decodes=num_decodes, running_requests=4, context_tokens=100 * num_decodes, waiting_offers=1
    )


def made_of(reader: WorkerLoad, *writers: tuple[str, int, int]) -> Conductor:
    """Writers by name, seats and answers."""
    loads = [(told(name, seats=seats), full(num_decodes)) for name, seats, num_decodes in writers]
    return conductor_of(
        [(told("p0", handoff_blocks=10), reader), *loads], settings=SETTINGS, slos=[SLO], default_slo="patient"
    )


def placed(made: Conductor, count: int = 1) -> list[str]:
    names = list[str]()
    for _ in range(count):
        decision = made.decide(item_of(100, 101), 0.0)
        assert isinstance(decision, Chosen)
        names.append(made.fleet.view().infos[decision.decode_row].worker_id)
    return names


def test_the_shortest_line_counts_what_is_told_by_readers_too() -> None:
    same = ("d0", 4, 20), ("d1", 4, 20)
    assert placed(made_of(unread(("d0", 3)), *same)) == ["d1"]
    assert placed(made_of(unread(("d1", 3)), *same)) == ["d0"]
    assert placed(made_of(unread(), ("d0", 4, 30), ("d1", 4, 20))) == ["d1"]
    assert placed(made_of(unread(("d1", 12)), ("d0", 4, 30), ("d1", 4, 20))) == ["d0"]


def test_placements_count_at_once() -> None:
    names = placed(made_of(unread(("d0", 6)), ("d0", 4, 20), ("d1", 4, 20)), 26)
    assert names[:6] == ["d1"] * 6
    assert names[6:].count("d0") == names[6:].count("d1") == 10


def test_lines_are_as_long_as_they_take() -> None:
    """Eight seats let twice as many go at a time, in steps that take longer."""
    names = placed(made_of(unread(), ("d0", 4, 40), ("d1", 8, 40)), 60)
    assert names.count("d1") > 1.4 * names.count("d0")


def test_nobody_is_counted_where_readers_are_not_held_up() -> None:
    """Answers begin when they are predicted to, and until then the line may be gone."""
    reader = msgspec.structs.replace(unread(("d1", 40)), offered_blocks=0)
    loads = [(name, WorkerLoad(running_decodes=num, context_tokens=100 * num, free_blocks=900)) for name, num in BUSY]
    workers = [(told("p0", handoff_blocks=10), reader), *((told(name, seats=400), load) for name, load in loads)]
    assert placed(conductor_of(workers, settings=SETTINGS, slos=[SLO], default_slo="patient")) == ["d1"]


@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("tell"), st.sampled_from("pqr"), st.dictionaries(st.sampled_from("abcx"), st.integers(0, 5))
            ),
            st.tuples(st.just("flip"), st.sampled_from("pqrabc"), st.just({})),
        ),
        max_size=30,
    )
)
def test_lines_are_what_the_present_readers_told_last(steps: list[tuple[str, str, dict[str, int]]]) -> None:
    """Also while workers come and go."""
    made, present, told_by = conductor_of([]), dict[str, str](), dict[str, dict[str, int]]()
    for now_s, (what, name, counts) in enumerate(steps):
        if what == "flip" and name in present:
            made.remove(WorkerId(present.pop(name)))
            told_by.pop(name, None)
        elif what == "flip":
            present[name] = name
            made.add(info_of(name, role="prefill" if name in "pqr" else "decode"), float(now_s))
        elif name in present:
            told_by[name] = counts
            unread_for = tuple((WorkerId(writer), count) for writer, count in sorted(counts.items()))
            made.report(WorkerId(name), WorkerLoad(unread_for=unread_for), float(now_s))
        if present:
            names = [info.worker_id for info in made.fleet.view().infos]
            expected = [sum(counts.get(each, 0) for counts in told_by.values()) for each in names]
            assert np.array_equal(made.fleet.outlook().unread_answers, expected)
