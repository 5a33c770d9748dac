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
    Compress,
    Compressed,
    CompressionFailed,
    CompressionSized,
    Cooled,
    CopyState,
    DropCompressed,
    DropRaw,
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


def idle(machine: Residence, each: WeightsKey, num_bytes: int, client: int) -> None:
    """A copy that was used, and is not any more."""
    (begin,) = machine.handle(Asked(client, each), 0.0)
    assert isinstance(begin, Begin)
    loaded(machine, begin.load, num_bytes)
    machine.handle(Gone(client), 0.0)


def compressed(machine: Residence, each: WeightsKey, bound_bytes: int, num_bytes: int) -> None:
    (begun,) = machine.handle(Cooled(each), 100.0)
    assert isinstance(begun, Compress)
    assert machine.handle(CompressionSized(begun.load, bound_bytes), 100.0) == [Fill(begun.load, bound_bytes)]
    assert machine.handle(Compressed(begun.load, num_bytes), 101.0) == [DropRaw(each)]


def only(machine: Residence) -> tuple[CopyState, int]:
    (copy,) = machine.copies()
    return copy.state, copy.held_bytes


def test_a_cold_copy_is_compressed_and_counts_for_what_it_takes() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 50, client=1)
    assert machine.handle(Cooled(A), 100.0) == [Compress(2, A)]
    assert only(machine) == (CopyState.COMPRESSING, 50)
    assert machine.handle(CompressionSized(2, 40), 100.0) == [Fill(2, 40)]
    assert machine.used_bytes == 90
    assert machine.handle(Compressed(2, 35), 101.0) == [DropRaw(A)]
    assert only(machine) == (CopyState.COMPRESSED, 35)
    assert machine.copies()[0].whole_bytes == 50


def test_what_is_compressed_is_decoded_for_who_asks_and_then_goes() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 50, client=1)
    compressed(machine, A, 40, 35)
    assert machine.handle(Asked(2, A), 200.0) == [Begin(3, A, is_decoding=True)]
    assert machine.handle(Sized(3, 50), 200.0) == [Fill(3, 50)]
    assert machine.used_bytes == 85
    assert machine.handle(Loaded(3), 201.0) == [DropCompressed(A, "it is decoded"), Hand(2, A)]
    assert only(machine) == (CopyState.RESIDENT, 50)
    assert machine.copies()[0].load_s == 1.0


def test_who_asks_while_it_is_compressed_gets_it_at_once() -> None:
    for steps in (1, 2):
        machine = Residence(BUDGET_BYTES)
        idle(machine, A, 50, client=1)
        for event in (Cooled(A), CompressionSized(2, 40))[:steps]:
            machine.handle(event, 100.0)
        assert machine.handle(Asked(2, A), 100.0) == [Abort(2), Hand(2, A)]
        assert only(machine) == (CopyState.RESIDENT, 50)
        # What the aborted one still says is not heard.
        for late in (CompressionSized(2, 10), Compressed(2, 10), CompressionFailed(2)):
            assert machine.handle(late, 100.0) == []
        assert only(machine) == (CopyState.RESIDENT, 50)


def test_who_is_about_to_ask_ends_it_too() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 50, client=1)
    machine.handle(Cooled(A), 100.0)
    assert machine.handle(Asked(None, A), 100.0) == [Abort(2)]
    assert only(machine) == (CopyState.RESIDENT, 50)


def test_a_result_for_which_there_is_no_room_is_not_begun() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 70, client=1)
    machine.handle(Cooled(A), 100.0)
    assert machine.handle(CompressionSized(2, 31), 100.0) == [Abort(2)]
    assert only(machine) == (CopyState.RESIDENT, 70)


def test_what_fails_leaves_the_copy_as_it_was() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 50, client=1)
    machine.handle(Cooled(A), 100.0)
    machine.handle(CompressionSized(2, 40), 100.0)
    assert machine.handle(CompressionFailed(2), 100.0) == []
    assert only(machine) == (CopyState.RESIDENT, 50)
    assert machine.handle(Asked(2, A), 100.0) == [Hand(2, A)]


def test_what_is_used_or_compressed_or_not_here_is_not_compressed() -> None:
    machine = Residence(BUDGET_BYTES)
    assert machine.handle(Cooled(A), 0.0) == []
    machine.handle(Asked(1, A), 0.0)
    assert machine.handle(Cooled(A), 0.0) == []
    loaded(machine, 1, 30)
    assert machine.handle(Cooled(A), 0.0) == []
    machine.handle(Gone(1), 0.0)
    compressed(machine, A, 25, 20)
    assert machine.handle(Cooled(A), 0.0) == []


def test_one_is_compressed_at_a_time_and_loads_come_first() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 30, client=1)
    idle(machine, B, 30, client=2)
    machine.handle(Cooled(A), 100.0)
    assert machine.handle(Cooled(B), 100.0) == []
    machine.handle(CompressionFailed(3), 100.0)
    assert machine.handle(Asked(3, C), 100.0) == [Begin(4, C)]
    assert machine.handle(Cooled(B), 100.0) == []


def test_a_form_that_cannot_be_decoded_goes_and_the_next_tier_serves_who_waits() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 50, client=1)
    compressed(machine, A, 40, 35)
    machine.handle(Asked(2, A), 200.0)
    machine.handle(Sized(3, 50), 200.0)
    machine.handle(Asked(3, B), 200.0)
    # Still first in line.
    assert machine.handle(LoadFailed(3, "chunk 1 is damaged"), 201.0) == [
        DropCompressed(A, "chunk 1 is damaged"),
        Begin(4, A),
    ]
    assert machine.used_bytes == 0
    assert loaded(machine, 4, 50) == [Hand(2, A), Begin(5, B)]


def test_a_form_that_has_no_room_beside_what_it_is_decoded_into_is_passed_by() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 60, client=1)
    compressed(machine, A, 40, 40)
    idle(machine, B, 50, client=2)
    machine.handle(Asked(3, B), 100.0)
    machine.handle(Asked(4, A), 200.0)
    # 50 are in use; 40 of the form and 60 of what it becomes are not to be had, nor are 60 alone.
    refused = machine.handle(Sized(4, 60), 200.0)
    assert [type(each) for each in refused] == [Abort, Refuse]
    assert {copy.key: copy.state for copy in machine.copies()} == {A: CopyState.COMPRESSED, B: CopyState.RESIDENT}
    machine.handle(Gone(3), 200.0)
    machine.handle(Gone(4), 200.0)
    idle(machine, C, 5, client=5)
    machine.handle(Asked(6, C), 300.0)
    assert machine.handle(Asked(7, A), 300.0) == [Begin(6, A, is_decoding=True)]
    assert machine.handle(Sized(6, 60), 300.0) == [
        Abort(6),
        DropCompressed(A, "there is no room for it beside what it is decoded into"),
        Begin(7, A),
    ]
    assert machine.handle(Sized(7, 60), 300.0)[-1] == Fill(7, 60)
    assert machine.handle(Loaded(7), 300.0) == [Hand(7, A)]


def test_a_load_that_needs_room_ends_a_compression_before_it_takes_a_copy() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 50, client=1)
    machine.handle(Cooled(A), 100.0)
    machine.handle(CompressionSized(2, 40), 100.0)
    machine.handle(Asked(2, B), 100.0)
    assert machine.handle(Sized(3, 45), 100.0) == [Abort(2), Fill(3, 45)]
    machine.handle(Loaded(3), 100.0)
    assert {copy.key: copy.held_bytes for copy in machine.copies()} == {A: 50, B: 45}


def test_compressed_copies_make_room_in_the_order_of_their_last_use() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 40, client=1)
    compressed(machine, A, 30, 30)
    idle(machine, B, 40, client=2)
    machine.handle(Asked(None, B), 50.0)
    machine.handle(Asked(3, C), 60.0)
    assert machine.handle(Sized(4, 60), 60.0) == [Evict(A, "not used for 60 s, and c needs room"), Fill(4, 60)]


def test_a_form_that_waits_in_line_makes_room_when_nothing_else_can() -> None:
    machine = Residence(BUDGET_BYTES)
    idle(machine, A, 50, client=1)
    compressed(machine, A, 40, 40)
    machine.handle(Asked(2, B), 100.0)
    machine.handle(Asked(3, A), 100.0)
    assert machine.handle(Sized(3, 70), 100.0) == [DropCompressed(A, "b needs room"), Fill(3, 70)]
    assert machine.handle(Loaded(3), 100.0) == [Hand(2, B), Begin(4, A)]


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
        #: What is being compressed, and whether it has its memory.
        self.job: tuple[int, WeightsKey] | None = None
        self.is_writing = False
        #: Memory that somebody holds, as the instructions say: by key, and by load for what is not complete.
        self.raw: dict[WeightsKey, int] = {}
        self.small: dict[WeightsKey, int] = {}
        self.pending: dict[int, int] = {}

    def take(self, done: list[ResidenceInstruction]) -> None:
        for each in done:
            match each:
                case Begin(load, key, is_decoding):
                    assert self.load is None, "one at a time"
                    assert is_decoding == (key in self.small)
                    assert key not in self.raw
                    self.load, self.is_filling = (load, key), False
                case Compress(load, key):
                    assert self.job is None, "one at a time"
                    assert key in self.raw
                    self.job, self.is_writing = (load, key), False
                case Fill(load, num_bytes):
                    if self.load is not None and self.load[0] == load:
                        self.is_filling = True
                    else:
                        assert self.job is not None
                        assert self.job[0] == load
                        self.is_writing = True
                    self.pending[load] = num_bytes
                case Abort(load):
                    if self.load is not None and self.load[0] == load:
                        self.load = None
                    else:
                        assert self.job is not None
                        assert self.job[0] == load
                        self.job = None
                    self.pending.pop(load, None)
                case Hand(client, key):
                    assert key in self.raw
                    assert self.unanswered.pop(client) == key
                    self.holding[client] = key
                case Refuse(client, key, reason):
                    assert reason
                    assert self.unanswered.pop(client) == key
                case Evict(key, reason):
                    assert reason
                    assert key not in self.holding.values(), "in use"
                    assert (key in self.raw) != (key in self.small)
                    self.raw.pop(key, None)
                    self.small.pop(key, None)
                case DropRaw(key):
                    assert key in self.small
                    assert key not in self.holding.values(), "in use"
                    del self.raw[key]
                case DropCompressed(key, reason):
                    assert reason
                    del self.small[key]
            held = sum(self.raw.values()) + sum(self.small.values()) + sum(self.pending.values())
            assert held <= BUDGET_BYTES, "also between two instructions"

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
        key = self.load[1]
        self.load = None
        held_bytes = self.pending.pop(load, 0)
        if ends_well:
            self.raw[key] = held_bytes
        self.take(self.machine.handle(Loaded(load) if ends_well else LoadFailed(load, "broken"), self.now_s))

    @rule(seconds=st.floats(0, 400))
    def get_on(self, seconds: float) -> None:
        self.now_s += seconds
        if self.load is not None:
            self.take(self.machine.handle(Advanced(self.load[0]), self.now_s))

    @rule(num_bytes=st.integers(1, 50))
    def all_ends_well(self, num_bytes: int) -> None:
        """What would take many lucky draws: loads and a compression run to their end, and everybody leaves."""
        while self.load is not None:
            self.go_on(num_bytes, True)
        while self.job is not None:
            self.compress_on(num_bytes // 2 + 1, True)
        for client in sorted(self.holding):
            del self.holding[client]
            self.take(self.machine.handle(Gone(client), self.now_s))

    @rule(seconds=st.floats(0, 400), data=st.data())
    def what_is_idle_cools(self, seconds: float, data: st.DataObject) -> None:
        idle = sorted(set(self.raw) - set(self.holding.values()))
        if idle:
            self.cool(data.draw(st.sampled_from(idle)).folder, seconds)

    @rule(is_client=st.booleans(), data=st.data())
    def what_is_compressed_is_wanted(self, is_client: bool, data: st.DataObject) -> None:
        if self.small:
            self.ask(data.draw(st.sampled_from(sorted(self.small))).folder, 0.0, is_client)

    @rule(name=st.sampled_from("abcde"), seconds=st.floats(0, 400))
    def cool(self, name: str, seconds: float) -> None:
        self.now_s += seconds
        self.take(self.machine.handle(Cooled(key(name)), self.now_s))

    @rule(num_bytes=st.integers(1, 90), ends_well=st.booleans())
    def compress_on(self, num_bytes: int, ends_well: bool) -> None:
        if self.job is None:
            return
        load, key = self.job
        if not self.is_writing and ends_well:
            self.take(self.machine.handle(CompressionSized(load, num_bytes), self.now_s))
            return
        self.job = None
        bound_bytes = self.pending.pop(load, 0)
        if not ends_well:
            self.take(self.machine.handle(CompressionFailed(load), self.now_s))
            return
        self.small[key] = min(num_bytes, bound_bytes)
        self.take(self.machine.handle(Compressed(load, self.small[key]), self.now_s))

    @rule()
    def tick(self) -> None:
        self.take(self.machine.handle(Ticked(), self.now_s))
        assert self.machine.deadline_s is None or self.machine.deadline_s > self.now_s

    @rule(load=st.integers(-3, 0))
    def an_old_load_speaks(self, load: int) -> None:
        for event in (
            Sized(load, 5),
            Advanced(load),
            Loaded(load),
            LoadFailed(load, "late"),
            CompressionSized(load, 5),
            Compressed(load, 5),
            CompressionFailed(load),
        ):
            self.take(self.machine.handle(event, self.now_s))

    @invariant()
    def holds(self) -> None:
        copies = self.machine.copies()
        assert self.machine.used_bytes <= BUDGET_BYTES
        assert sum(copy.state in (CopyState.SIZING, CopyState.FILLING) for copy in copies) == (self.load is not None)
        assert sum(copy.state is CopyState.COMPRESSING for copy in copies) == (self.job is not None)
        held = sum(self.raw.values()) + sum(self.small.values()) + sum(self.pending.values())
        assert self.machine.used_bytes == held
        whole = (CopyState.RESIDENT, CopyState.COMPRESSING)
        assert {copy.key for copy in copies if copy.state in whole} == set(self.raw)
        assert {copy.key for copy in copies if copy.state is CopyState.COMPRESSED} <= set(self.small)
        assert not any(copy.state is CopyState.QUEUED for copy in copies) or self.load is not None
        pinned = {client: copy.key for copy in copies for client in copy.pins}
        waiting = {client: copy.key for copy in copies for client in copy.waiting}
        assert pinned == self.holding
        assert waiting == self.unanswered


TestStory = Story.TestCase
TestStory.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
