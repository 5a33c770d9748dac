"""Keeping one worker process alive: a machine without I/O that decides on start, restart, giving up and stop.

`NodeAgent` feeds it events with the time and carries out its instructions. A worker that dies before it ever
was ready, several times in a row, is given up: the cause will not go away by itself. One that was ready and
crashed is restarted for ever, after a delay that doubles up to a limit and starts anew once it has lived
through `stable_s`. Each life has a larger incarnation than the one before. A life that ends because somebody asked for
the next one has not crashed.

A ready worker tells that it is alive every half second; one that is silent for `hang_timeout_s` hangs, and is
killed: what is frozen cannot be asked to leave, and while it exists its transfers do not end. Time in which this
process itself did not run counts as nobody's silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from cluster.launch import Alive, Failed, Loading, Ready
from contracts.errors import ConfigError
from contracts.ids import Incarnation
from contracts.pauses import PauseWatch

if TYPE_CHECKING:
    from cluster.launch import Status

#: `handle` is called at least this often while a worker is ready, with DeadlineReached when nothing else happens.
TICK_S = 0.5
#: Between two events of a ready worker; a longer gap means that this process did not run.
LONGEST_GAP_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionLimits:
    start_timeout_s: float = 300.0
    stop_timeout_s: float = 5.0
    #: Silence after which a ready worker is taken for hung.
    hang_timeout_s: float = 3.0
    restart_delay_s: float = 0.25
    restart_delay_max_s: float = 15.0
    start_attempts: int = 3
    #: A worker that was ready for so long has earned a quick restart again.
    stable_s: float = 60.0


class State(Enum):
    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    #: Told to leave, or killed for being stuck; its exit is awaited.
    ENDING = "ending"
    #: Dead; its next life begins at the deadline.
    RESTARTING = "restarting"
    STOPPED = "stopped"
    GIVEN_UP = "given up"


# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """It is to run. Nothing happens to one that does, or is about to."""


@dataclass(frozen=True, slots=True)
class Told:
    """The process wrote a status line."""

    status: Status


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone and all it wrote has been read, or it could not be started. `how` is for people."""

    how: str


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """A look at the clock. One before the deadline changes nothing."""


@dataclass(frozen=True, slots=True)
class StopWanted:
    """It is to end, and to stay so until the next Start."""


@dataclass(frozen=True, slots=True)
class RestartWanted:
    """Its next life is to begin, at once; nothing happens where the present or last one is another than `life`."""

    life: Incarnation
    #: Of a program that was never seen to start here: it may be given up again.
    is_other_build: bool = False


Event = Start | Told | Exited | DeadlineReached | StopWanted | RestartWanted

# --- instructions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Terminate:
    """Ask it to leave: SIGTERM and the end of its life-line."""


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to its process group."""


@dataclass(frozen=True, slots=True)
class Report:
    """A sentence for people; `with_log` asks for the last log lines below it."""

    text: str
    with_log: bool = False


Instruction = Spawn | Terminate | Kill | Report


class Supervision:
    def __init__(self, limits: SupervisionLimits, first_incarnation: Incarnation) -> None:
        self._limits = limits
        #: Of the present or last life; grows with each Spawn.
        self.incarnation = Incarnation(first_incarnation - 1)
        self.state = State.NEW
        #: When DeadlineReached is due; None exactly in NEW, STOPPED and GIVEN_UP.
        self.deadline_s: float | None = None
        #: Where the present life listens; not None exactly in READY.
        self.address: str | None = None
        #: The last Loading of the present life.
        self.loading: Loading | None = None
        #: The last words of the worker that was given up, or of its last failed life.
        self.problem: str | None = None
        #: Lives in a row that ended before they were ready.
        self._failed_starts = 0
        #: A life was ready once: the configuration can work, and what fails now may pass.
        self._proven = False
        #: Lives in a row that were ready and ended before they were stable.
        self._crashes = 0
        self._ready_s = 0.0
        self._pauses = PauseWatch(LONGEST_GAP_S)
        #: The Failed status of the present life.
        self._last_words: Failed | None = None
        #: The present life is the last one, until the next Start.
        self._stop_wanted = False
        #: The present life ends because it was asked to, and the next one follows at once.
        self._renewing = False
        self._spawned_s = 0.0
        #: What the last start took, from the process to its being ready; None: never seen.
        self.start_s: float | None = None
        #: As `contracts.control_messages.WorkerSlot`.
        self.weights_wait_s: float | None = None
        self.weights_due_s = 0.0

    def __repr__(self) -> str:
        failed = f"{self._failed_starts} failed starts"
        return f"<Supervision {self.state.value}, incarnation {self.incarnation}, {failed}>"

    @property
    def ended(self) -> bool:
        return self.state in (State.STOPPED, State.GIVEN_UP)

    @property
    def is_idle(self) -> bool:
        """There is no process, and none is due."""
        return self.ended or self.state is State.NEW

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        paused_s = self._pauses.look(now_s)
        if self.state is State.READY and self.deadline_s is not None:
            self.deadline_s += paused_s
        match event:
            case Start():
                return self._start(now_s)
            case Told(status):
                return self._told(status, now_s)
            case Exited(how):
                return self._exited(how, now_s)
            case DeadlineReached():
                return self._deadline_reached(now_s)
            case StopWanted():
                return self._stop(now_s)
            case RestartWanted(life, is_other_build):
                if life != self.incarnation:
                    return []
                self._proven = self._proven and not is_other_build
                return self._renew(now_s)

    def age_s(self, now_s: float) -> float | None:
        """Of the present process; None while there is none."""
        return now_s - self._spawned_s if self.state in (State.STARTING, State.READY, State.ENDING) else None

    def _start(self, now_s: float) -> list[Instruction]:
        if self.state is State.NEW or self.ended:
            # Whoever asks again has done something about why it was given up.
            self._stop_wanted, self._failed_starts, self._crashes, self.problem = False, 0, 0, None
            return self._spawn(now_s)
        if self._stop_wanted:
            # It is on its way out, and comes back.
            self._stop_wanted, self._renewing = False, True
        return []

    def _renew(self, now_s: float) -> list[Instruction]:
        if self._stop_wanted or self._renewing:
            return []
        match self.state:
            case State.STARTING | State.READY:
                self._renewing = True
                self.state, self.deadline_s = State.ENDING, now_s + self._limits.stop_timeout_s
                return [Terminate()]
            case State.ENDING:
                self._renewing = True
                return []
            case State.RESTARTING:
                return self._spawn(now_s)
            case State.NEW | State.STOPPED | State.GIVEN_UP:
                return self._start(now_s)

    def _spawn(self, now_s: float) -> list[Instruction]:
        self._spawned_s, self._renewing = now_s, False
        self.incarnation = Incarnation(self.incarnation + 1)
        self.state = State.STARTING
        self.deadline_s = now_s + self._limits.start_timeout_s
        self.loading = self._last_words = None
        return [Spawn(self.incarnation)]

    def _told(self, status: Status, now_s: float) -> list[Instruction]:
        if isinstance(status, Failed):
            self._last_words = status
        elif self.state is State.READY and isinstance(status, Alive):
            self.deadline_s = now_s + self._limits.hang_timeout_s
        elif self.state is State.STARTING and isinstance(status, Ready):
            self.state, self.deadline_s = State.READY, now_s + self._limits.hang_timeout_s
            self.address, self._ready_s = status.address, now_s
            self.start_s, self.weights_wait_s = now_s - self._spawned_s, status.weights_wait_s
            self.weights_due_s = max(0.0, self.start_s - (status.weights_wait_s or 0.0) - status.after_weights_s)
            self._failed_starts, self._proven = 0, True
            return [Report(f"ready at {status.address}")]
        elif self.state is State.STARTING and isinstance(status, Loading):
            self.loading = status
            self.deadline_s = now_s + self._limits.start_timeout_s
        return []

    def _exited(self, how: str, now_s: float) -> list[Instruction]:
        was_ready = self.address is not None
        self.address = None
        if self._stop_wanted:
            self.state, self.deadline_s = State.STOPPED, None
            return []
        if self._renewing:
            return [Report("restarts, as it was asked to"), *self._spawn(now_s)]
        self.problem = self._last_words.message if self._last_words is not None else how
        if was_ready:
            return self._crashed(how, now_s)
        self._failed_starts += 1
        if self._hopeless():
            self.state, self.deadline_s = State.GIVEN_UP, None
            tries = "1 failed start" if self._failed_starts == 1 else f"{self._failed_starts} failed starts"
            return [Report(f"given up after {tries}: {self.problem}", with_log=True)]
        return self._restart(f"did not start: {self.problem}", self._failed_starts, now_s)

    def _hopeless(self) -> bool:
        """A configuration that cannot work fails the same way every time; one that worked fails for other reasons
        (a network that is away)."""
        if self._proven:
            return False
        permanent = self._last_words is not None and self._last_words.error == ConfigError.code
        return permanent or self._failed_starts >= self._limits.start_attempts

    def _crashed(self, how: str, now_s: float) -> list[Instruction]:
        stable = now_s - self._ready_s >= self._limits.stable_s
        self._crashes = 1 if stable else self._crashes + 1
        return self._restart(f"crashed: {self.problem or how}", self._crashes, now_s)

    def _restart(self, why: str, failures: int, now_s: float) -> list[Instruction]:
        doublings = min(failures - 1, 30)
        delay_s = min(self._limits.restart_delay_s * 2**doublings, self._limits.restart_delay_max_s)
        self.state, self.deadline_s = State.RESTARTING, now_s + delay_s
        return [Report(f"{why}; restarting in {delay_s:g} s")]

    def _deadline_reached(self, now_s: float) -> list[Instruction]:
        if self.deadline_s is None or now_s < self.deadline_s:
            return []
        if self.state is State.RESTARTING:
            return self._spawn(now_s)
        instructions: list[Instruction] = [Kill()]
        if self.state is State.STARTING:
            why = f"no progress for {self._limits.start_timeout_s:g} s while {self._activity()}"
            self._last_words = Failed(error="deadline_exceeded", message=why)
        elif self.state is State.READY:
            why = f"no sign of life for {self._limits.hang_timeout_s:g} s"
            self._last_words = Failed(error="deadline_exceeded", message=why)
            instructions.append(Report(f"hangs: {why}; killed"))
        self.state = State.ENDING
        self.deadline_s = now_s + self._limits.stop_timeout_s
        return instructions

    def _activity(self) -> str:
        return "starting" if self.loading is None else f"loading {self.loading.what}"

    def _stop(self, now_s: float) -> list[Instruction]:
        if self._stop_wanted or self.ended:
            return []
        self._stop_wanted, self._renewing = True, False
        if self.state in (State.NEW, State.RESTARTING):
            self.state, self.deadline_s = State.STOPPED, None
            return []
        if self.state is State.ENDING:
            return []
        self.state, self.deadline_s = State.ENDING, now_s + self._limits.stop_timeout_s
        return [Terminate()]
