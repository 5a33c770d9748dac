"""The weights in a machine's memory: one load for all who ask, nothing taken from who uses it, never over budget."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coldstart.residence import (
    LONGEST_WAIT_S,
    MAX_QUEUED,
    PATIENCE_S,
    Abort,
    Advanced,
    Asked,
    Begin,
    CopyState,
    Evict,
    Fill,
    Gone,
    Hand,
    Loaded,
    LoadFailed,
    Refuse,
    Residence,
    ResidenceInstruction,
    Sized,
    Ticked,
    WeightsKey,
)

BUDGET_BYTES = 100


def key(name: str) -> WeightsKey:
    return WeightsKey(folder=name, dtype="auto")


A, B, C = key("a"), key("b"), key("c")


def loaded(machine: Residence, load: int, num_bytes: int, now_s: float = 0.0) -> list[ResidenceInstruction]:
    """What the end of a whole load brings."""
    machine.handle(Sized(load, num_bytes), now_s)
    return machine.handle(Loaded(load), now_s)


def test_two_who_want_the_same_model_at_once_share_one_load() -> None:
    machine = Residence(BUDGET_BYTES)
    assert machine.handle(Asked(1, A), 0.0) == [Begin(1, A)]
    assert machine.handle(Asked(2, A), 0.5) == []
    assert machine.handle(Sized(1, 60), 1.0) == [Fill(1, 60)]
    assert machine.handle(Loaded(1), 3.0) == [Hand(1, A), Hand(2, A)]
    assert machine.handle(Asked(3, A), 9.0) == [Hand(3, A)]
    assert [copy.load_s for copy in machine.copies()] == [3.0]


def test_loads_go_one_after_the_other_in_the_order_of_asking() -> None:
    machine = Residence(BUDGET_BYTES)
    assert machine.handle(Asked(1, A), 0.0) == [Begin(1, A)]
    assert machine.handle(Asked(2, B), 0.0) == []
    assert machine.handle(Asked(3, C), 0.0) == []
    assert loaded(machine, 1, 10) == [Hand(1, A), Begin(2, B)]
    assert machine.handle(LoadFailed(2, "b: truncated"), 0.0) == [Refuse(2, B, "b: truncated"), Begin(3, C)]


def test_the_copy_not_used_for_the_longest_time_makes_room_and_one_in_use_never() -> None:
    machine = Residence(BUDGET_BYTES)
    for at_s, each in enumerate((A, B)):
        machine.handle(Asked(at_s, each), float(at_s))
        loaded(machine, at_s + 1, 50, float(at_s))
    machine.handle(Gone(1), 5.0)
    machine.handle(Asked(2, C), 9.0)
    assert machine.handle(Sized(3, 30), 9.0) == [Evict(B, "not used for 4 s, and c needs room"), Fill(3, 30)]
    machine.handle(Loaded(3), 9.0)
    machine.handle(Asked(3, B), 9.0)
    refused = machine.handle(Sized(4, 50), 9.0)
    assert refused[0] == Abort(4)
    assert isinstance(refused[1], Refuse)
    assert "50 bytes of weights do not fit into the 100 bytes" in refused[1].reason
    assert {copy.key for copy in machine.copies()} == {A, C}


def test_a_model_larger_than_all_memory_for_weights_is_refused_and_takes_nothing() -> None:
    machine = Residence(BUDGET_BYTES)
    machine.handle(Asked(1, A), 0.0)
    loaded(machine, 1, 80)
    machine.handle(Gone(1), 0.0)
    machine.handle(Asked(2, B), 0.0)
    assert [type(each) for each in machine.handle(Sized(2, 101), 0.0)] == [Abort, Refuse]
    assert machine.handle(Asked(3, A), 0.0) == [Hand(3, A)]


def test_who_waits_too_long_is_told_and_the_load_goes_on() -> None:
    machine = Residence(BUDGET_BYTES)
    machine.handle(Asked(1, A), 0.0)
    assert machine.deadline_s == PATIENCE_S
    assert machine.handle(Ticked(), PATIENCE_S - 1) == []
    assert [type(each) for each in machine.handle(Ticked(), PATIENCE_S)] == [Refuse]
    assert machine.deadline_s is None
    assert loaded(machine, 1, 10) == []
    assert machine.handle(Asked(1, A), 700.0) == [Hand(1, A)]


def test_patience_counts_from_when_the_line_got_on_last() -> None:
    machine = Residence(BUDGET_BYTES)
    machine.handle(Asked(1, A), 0.0)
    machine.handle(Asked(2, B), 0.0)
    for now_s in (100.0, 200.0):
        assert machine.handle(Advanced(1), now_s) == []
    # Both: what comes before one's own load getting on brings it nearer too.
    assert machine.handle(Ticked(), 200.0 + PATIENCE_S - 1) == []
    assert loaded(machine, 1, 10, 250.0) == [Hand(1, A), Begin(2, B)]
    assert machine.handle(Ticked(), 250.0 + PATIENCE_S) == [Refuse(2, B, f"no load got on for {PATIENCE_S:.0f} s")]
    # Of a load that is over nothing is heard.
    assert machine.handle(Advanced(1), 500.0) == []


def test_nobody_waits_for_ever_for_a_load_that_gets_on() -> None:
    machine = Residence(BUDGET_BYTES)
    machine.handle(Asked(1, A), 0.0)
    now_s = 0.0
    while not (done := machine.handle(Ticked(), now_s)):
        now_s += PATIENCE_S / 2
        machine.handle(Advanced(1), now_s)
    assert done == [Refuse(1, A, f"not loaded within {LONGEST_WAIT_S:.0f} s")]
    assert now_s == LONGEST_WAIT_S


def test_who_waits_knows_how_many_come_first() -> None:
    machine = Residence(BUDGET_BYTES)
    for client, name in enumerate("abc"):
        machine.handle(Asked(client, key(name)), 0.0)
    assert [machine.num_ahead(key(name)) for name in "abcd"] == [0, 1, 2, 0]
    loaded(machine, 1, 10)
    assert [machine.num_ahead(key(name)) for name in "abc"] == [0, 0, 1]


def test_what_an_aborted_load_still_says_is_not_heard() -> None:
    machine = Residence(BUDGET_BYTES)
    machine.handle(Asked(1, A), 0.0)
    machine.handle(Sized(1, 200), 0.0)
    assert machine.handle(Loaded(1), 0.0) == []
    assert machine.handle(Sized(1, 10), 0.0) == []
    assert machine.copies() == ()


def test_the_line_of_loads_has_an_end() -> None:
    machine = Residence(BUDGET_BYTES)
    for number in range(MAX_QUEUED + 1):
        machine.handle(Asked(number, key(f"model-{number}")), 0.0)
    (refused,) = machine.handle(Asked(1000, key("one too many")), 0.0)
    assert isinstance(refused, Refuse)
    assert machine.handle(Asked(None, key("nor this")), 0.0) == []


class Story(RuleBasedStateMachine):
    """Anything in any order: what each client was told, and what a load is told, is kept beside the machine."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Residence(BUDGET_BYTES)
        self.now_s = 0.0
        self.next_client = 0
        #: Clients that have been told nothing yet, and those that hold a copy.
        self.unanswered: dict[int, WeightsKey] = {}
        self.holding: dict[int, WeightsKey] = {}
        self.load: tuple[int, WeightsKey] | None = None
        self.is_filling = False

    def take(self, done: list[ResidenceInstruction]) -> None:
        for each in done:
            match each:
                case Begin(load, key):
                    assert self.load is None, "one at a time"
                    self.load, self.is_filling = (load, key), False
                case Fill(load, _):
                    assert self.load is not None
                    assert self.load[0] == load
                    self.is_filling = True
                case Abort(load):
                    assert self.load is not None
                    assert self.load[0] == load
                    self.load = None
                case Hand(client, key):
                    assert self.unanswered.pop(client) == key
                    self.holding[client] = key
                case Refuse(client, key, reason):
                    assert reason
                    assert self.unanswered.pop(client) == key
                case Evict(key, reason):
                    assert reason
                    assert key not in self.holding.values(), "in use"

    @rule(name=st.sampled_from("abcde"), seconds=st.floats(0, 400), is_client=st.booleans())
    def ask(self, name: str, seconds: float, is_client: bool) -> None:
        self.now_s += seconds
        client = None
        if is_client:
            client, self.next_client = self.next_client, self.next_client + 1
            self.unanswered[client] = key(name)
        self.take(self.machine.handle(Asked(client, key(name)), self.now_s))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        known = sorted({*self.unanswered, *self.holding})
        if known:
            client = data.draw(st.sampled_from(known))
            self.unanswered.pop(client, None)
            self.holding.pop(client, None)
            self.take(self.machine.handle(Gone(client), self.now_s))

    @rule(num_bytes=st.integers(1, 120), ends_well=st.booleans())
    def go_on(self, num_bytes: int, ends_well: bool) -> None:
        if self.load is None:
            return
        load = self.load[0]
        if not self.is_filling and ends_well:
            self.take(self.machine.handle(Sized(load, num_bytes), self.now_s))
            return
        self.load = None
        self.take(self.machine.handle(Loaded(load) if ends_well else LoadFailed(load, "broken"), self.now_s))

    @rule(seconds=st.floats(0, 400))
    def get_on(self, seconds: float) -> None:
        self.now_s += seconds
        if self.load is not None:
            self.take(self.machine.handle(Advanced(self.load[0]), self.now_s))

    @rule()
    def tick(self) -> None:
        self.take(self.machine.handle(Ticked(), self.now_s))
        assert self.machine.deadline_s is None or self.machine.deadline_s > self.now_s

    @rule(load=st.integers(-3, 0))
    def an_old_load_speaks(self, load: int) -> None:
        for event in (Sized(load, 5), Advanced(load), Loaded(load), LoadFailed(load, "late")):
            self.take(self.machine.handle(event, self.now_s))

    @invariant()
    def holds(self) -> None:
        copies = self.machine.copies()
        assert self.machine.used_bytes <= BUDGET_BYTES
        assert sum(copy.state in (CopyState.SIZING, CopyState.FILLING) for copy in copies) == (self.load is not None)
        assert not any(copy.state is CopyState.QUEUED for copy in copies) or self.load is not None
        pinned = {client: copy.key for copy in copies for client in copy.pins}
        waiting = {client: copy.key for copy in copies for client in copy.waiting}
        assert pinned == self.holding
        assert waiting == self.unanswered


TestStory = Story.TestCase
TestStory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
