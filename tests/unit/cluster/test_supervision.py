"""The supervision machine: a random history never breaks what the node agent relies on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.launch import Alive, Failed, Loading, Ready
from cluster.supervision import (
    LONGEST_GAP_S,
    TICK_S,
    DeadlineReached,
    Exited,
    Kill,
    Report,
    RestartWanted,
    Spawn,
    Start,
    State,
    StopWanted,
    Supervision,
    SupervisionLimits,
    Terminate,
    Told,
)
from contracts.ids import Incarnation

if TYPE_CHECKING:
    from cluster.launch import Status
    from cluster.supervision import Event, Instruction

LIMITS = SupervisionLimits(
    start_timeout_s=10.0, stop_timeout_s=5.0, restart_delay_s=1.0, restart_delay_max_s=8.0, stable_s=60.0
)


STATUSES = [Loading(what="weights"), Ready(address="a:1"), Alive(), Failed(error="internal", message="m")]


class Life:
    """A machine with a process that does what it is told."""

    def __init__(self) -> None:
        self.machine = Supervision(LIMITS, Incarnation(7))
        self.now_s = 0.0
        #: Whether a process of this worker exists.
        self.alive = False
        self.incarnations: list[int] = []
        self.said: list[str] = []

    def feed(self, event: Event) -> list[Instruction]:
        instructions = self.machine.handle(event, self.now_s)
        for instruction in instructions:
            match instruction:
                case Spawn(incarnation):
                    assert not self.alive, "two lives at once"
                    self.alive = True
                    self.incarnations.append(incarnation)
                case Kill() | Terminate():
                    assert self.alive, "nobody there to end"
                case Report(text):
                    self.said.append(text)
        return instructions

    def die(self, how: str = "it was ended by SIGKILL") -> None:
        self.alive = False
        self.feed(Exited(how))

    def become_ready(self) -> None:
        self.feed(Told(Ready(address="a:1")))

    def tick(self, for_s: float) -> list[Instruction]:
        """Looks at the clock as the agent does, until something comes of it or the time is over."""
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s = min(until_s, self.now_s + TICK_S)
            if instructions := self.feed(DeadlineReached()):
                return instructions
        return []

    def wait_for_deadline(self) -> list[Instruction]:
        assert self.machine.deadline_s is not None
        self.now_s = self.machine.deadline_s
        return self.feed(DeadlineReached())


class SupervisionHistory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.life = Life()
        self.stop_wanted = False
        self.life.feed(Start())

    @property
    def machine(self) -> Supervision:
        return self.life.machine

    @precondition(lambda self: self.life.alive)
    @rule(status=st.sampled_from(STATUSES))
    def tell(self, status: Status) -> None:
        self.life.feed(Told(status))

    @precondition(lambda self: self.life.alive)
    @rule()
    def die(self) -> None:
        self.life.die()

    @rule(delay_s=st.floats(0, 100))
    def pass_time(self, delay_s: float) -> None:
        self.life.now_s += delay_s
        self.life.feed(DeadlineReached())

    @precondition(lambda self: self.machine.deadline_s is not None)
    @rule()
    def reach_deadline(self) -> None:
        self.life.wait_for_deadline()

    @rule()
    def stop(self) -> None:
        self.stop_wanted = True
        self.life.feed(StopWanted())

    @rule()
    def start(self) -> None:
        self.stop_wanted = False
        self.life.feed(Start())

    @rule(is_other_build=st.booleans(), late=st.integers(0, 1))
    def restart(self, late: int, *, is_other_build: bool) -> None:
        if not late and self.machine.ended:
            self.stop_wanted = False
        self.life.feed(RestartWanted(Incarnation(self.machine.incarnation - late), is_other_build))

    @invariant()
    def states_say_whether_there_is_a_process(self) -> None:
        living = self.machine.state in (State.STARTING, State.READY, State.ENDING)
        assert living == self.life.alive

    @invariant()
    def there_is_a_deadline_exactly_where_something_is_awaited(self) -> None:
        waiting = self.machine.state in (State.STARTING, State.READY, State.ENDING, State.RESTARTING)
        assert (self.machine.deadline_s is not None) == waiting

    @invariant()
    def an_address_is_known_exactly_when_ready(self) -> None:
        if self.machine.state is State.READY:
            assert self.machine.address is not None
        elif self.machine.state is not State.ENDING:
            assert self.machine.address is None

    @invariant()
    def incarnations_grow(self) -> None:
        assert self.life.incarnations == list(range(7, 7 + len(self.life.incarnations)))
        assert self.machine.incarnation == self.life.incarnations[-1]

    @invariant()
    def a_stop_is_final(self) -> None:
        if self.stop_wanted and not self.life.alive:
            assert self.machine.ended

    def teardown(self) -> None:
        """Whatever happened: a stop ends it, once the process is gone."""
        self.life.feed(StopWanted())
        if self.life.alive:
            assert self.machine.deadline_s is not None
            self.life.die()
        assert self.machine.ended


TestSupervisionHistory = SupervisionHistory.TestCase
TestSupervisionHistory.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.fixture
def life() -> Life:
    started = Life()
    assert started.feed(Start()) == [Spawn(Incarnation(7))]
    return started


def test_delays_double_up_to_the_limit_and_crashes_never_give_up(life: Life) -> None:
    delays: list[float] = []
    for _ in range(6):
        life.become_ready()
        life.die()
        assert life.machine.deadline_s is not None
        delays.append(life.machine.deadline_s - life.now_s)
        life.wait_for_deadline()
    assert delays == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_long_life_earns_a_quick_restart(life: Life) -> None:
    for _ in range(3):
        life.become_ready()
        life.die()
        life.wait_for_deadline()
    life.become_ready()
    life.now_s += LIMITS.stable_s
    life.die()
    assert life.said[-1] == "crashed: it was ended by SIGKILL; restarting in 1 s"


def test_three_failed_starts_in_a_row_give_up(life: Life) -> None:
    for _ in range(2):
        life.die("it exited with code 3")
        life.wait_for_deadline()
    life.die("it exited with code 3")
    assert life.machine.state is State.GIVEN_UP
    assert life.said[-1] == "given up after 3 failed starts: it exited with code 3"


def test_being_ready_forgives_failed_starts(life: Life) -> None:
    for _ in range(2):
        life.die()
        life.wait_for_deadline()
    life.become_ready()
    life.die()
    life.wait_for_deadline()
    life.die()
    assert life.machine.state is State.RESTARTING


def test_a_configuration_error_gives_up_at_once_with_its_own_words(life: Life) -> None:
    life.feed(Told(Failed(error="config_error", message="no such architecture")))
    life.die("it exited with code 1")
    assert life.said == ["given up after 1 failed start: no such architecture"]


def test_a_restart_that_was_asked_for_is_no_crash_and_follows_at_once(life: Life) -> None:
    life.become_ready()
    assert life.feed(RestartWanted(Incarnation(7))) == [Terminate()]
    assert life.feed(RestartWanted(Incarnation(7))) == []
    life.die("it exited with code 0")
    assert life.said[-1] == "restarts, as it was asked to"
    assert life.incarnations == [7, 8]
    assert life.feed(RestartWanted(Incarnation(7))) == [], "that life is over"
    life.become_ready()
    life.die()
    assert life.said[-1].endswith("restarting in 1 s"), "its first crash"


def test_a_restart_of_one_that_is_dead_shortens_its_wait_and_a_stop_undoes_it(life: Life) -> None:
    life.become_ready()
    life.die()
    assert life.feed(RestartWanted(Incarnation(7))) == [Spawn(Incarnation(8))]
    life.feed(RestartWanted(Incarnation(8)))
    life.feed(StopWanted())
    life.die()
    assert life.machine.state is State.STOPPED


def test_a_stopped_worker_starts_again_and_one_that_is_on_its_way_out_comes_back(life: Life) -> None:
    life.become_ready()
    assert life.feed(Start()) == []
    life.feed(StopWanted())
    life.feed(Start())
    life.die()
    assert life.incarnations == [7, 8]
    life.feed(StopWanted())
    life.die()
    assert life.machine.state is State.STOPPED
    assert life.feed(Start()) == [Spawn(Incarnation(9))]


def test_another_build_that_does_not_start_is_given_up_although_the_one_before_did(life: Life) -> None:
    life.become_ready()
    life.feed(RestartWanted(Incarnation(7), is_other_build=True))
    life.die()
    for _ in range(LIMITS.start_attempts - 1):
        life.die("it exited with code 7")
        life.wait_for_deadline()
    life.die("it exited with code 7")
    assert life.machine.state is State.GIVEN_UP
    assert life.feed(Start()) == [Spawn(Incarnation(11))], "whoever asks again has done something about it"


def test_how_long_a_start_took_is_known_from_then_on(life: Life) -> None:
    life.now_s += 2.5
    assert (life.machine.start_s, life.machine.age_s(life.now_s)) == (None, 2.5)
    life.become_ready()
    life.die()
    assert (life.machine.start_s, life.machine.age_s(life.now_s)) == (2.5, None)


def test_progress_extends_the_start_deadline(life: Life) -> None:
    life.now_s = 9.0
    life.feed(Told(Loading(what="weights", fraction=0.1)))
    assert life.machine.deadline_s == 19.0
    assert life.wait_for_deadline() == [Kill()]
    life.die()
    assert life.machine.problem == "no progress for 10 s while loading weights"


def test_a_stop_is_asked_for_first_and_then_forced(life: Life) -> None:
    life.become_ready()
    assert life.feed(StopWanted()) == [Terminate()]
    assert life.feed(StopWanted()) == []
    assert life.wait_for_deadline() == [Kill()]
    life.die()
    assert life.machine.state is State.STOPPED


def test_a_late_ready_does_not_undo_a_stop(life: Life) -> None:
    life.feed(StopWanted())
    life.become_ready()
    assert life.machine.state is State.ENDING


def test_a_ready_worker_that_falls_silent_is_killed_and_restarted(life: Life) -> None:
    life.become_ready()
    for _ in range(20):
        life.tick(0.5)
        life.feed(Told(Alive()))
    assert life.tick(LIMITS.hang_timeout_s - 0.1) == []
    hangs = "hangs: no sign of life for 3 s; killed"
    assert life.tick(0.2) == [Kill(), Report(hangs)]
    assert life.machine.state is State.ENDING
    life.die()
    assert life.said[-1] == "crashed: no sign of life for 3 s; restarting in 1 s"
    assert life.wait_for_deadline() == [Spawn(Incarnation(8))]


def test_a_kill_that_does_not_take_is_repeated(life: Life) -> None:
    life.become_ready()
    life.tick(LIMITS.hang_timeout_s)
    life.feed(Told(Alive()))
    assert life.tick(LIMITS.stop_timeout_s) == [Kill()]
    assert life.machine.state is State.ENDING


def test_silence_while_loading_is_the_start_deadline_s_matter(life: Life) -> None:
    assert life.tick(LIMITS.hang_timeout_s + 1) == []
    life.feed(Told(Alive()))
    assert life.machine.deadline_s == LIMITS.start_timeout_s


@pytest.mark.parametrize("at_s", [0.1, 1.0, 2.9])
def test_a_pause_of_the_agent_itself_is_nobody_s_silence(life: Life, at_s: float) -> None:
    """A suspended machine wakes with every deadline past: the worker gets the time it had left."""
    life.become_ready()
    life.tick(at_s)
    life.now_s += 3600
    assert life.feed(DeadlineReached()) == []
    assert life.tick(LIMITS.hang_timeout_s - at_s - 0.01) == []
    assert life.tick(0.02)[0] == Kill()


def test_a_busy_agent_is_not_a_paused_one(life: Life) -> None:
    life.become_ready()
    for _ in range(3):
        life.now_s += LONGEST_GAP_S
        if Kill() in life.feed(DeadlineReached()):
            return
    raise AssertionError("never killed")
