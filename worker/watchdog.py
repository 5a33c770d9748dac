"""When a worker must end its own life: an engine step that does not end, blocks that do not leave the quarantine.

Pure: the step loop tells when steps begin and end, the shell asks every `LOOK_INTERVAL_S` and acts on the answer.
The engine's thread can neither be interrupted nor joined, so a worker whose engine is stuck ends as a process;
its loop still runs and can say so to everybody first. (A loop that is stuck itself cannot: there the node agent
acts, see `cluster.supervision`.)

What a step may take is learned: `factor` times the slowest recent step of its size class, and never less than
`floor_s`. Size classes are powers of two of the tokens in a step; one that is not known yet borrows from the next
larger one that is, or takes as much longer as it is larger than the largest known one. Until any is known, steps
have `first_steps_s`: kernels are compiled in the first ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from contracts.errors import WorkerUnavailable
from contracts.failpoints import RarePath
from contracts.pauses import PauseWatch

#: How often the shell looks.
LOOK_INTERVAL_S = 0.25
#: Between two looks; after a longer gap this process did not run, and nothing is overdue by that time.
LONGEST_GAP_S = 1.0
#: Steps of a size class whose slowest one counts.
REMEMBERED_STEPS = 32

_ENGINE_STUCK = RarePath("worker.engine_stuck", "a step took longer than any may")
_PULLS_STUCK = RarePath("worker.pulls_stuck", "too many blocks stayed in quarantine for too long")
_PAUSED = RarePath("worker.paused", "a worker finds that it did not run for a while")


class LifeOver(WorkerUnavailable):
    """This life of a worker must end though its loop runs; the message says why. Its process must not wait for
    engine or transports: what is stuck in them is why it ends, or may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogLimits:
    #: A step may always take this long: shorter than what the rest of the cluster takes for a hang is no use.
    floor_s: float = 3.0
    factor: float = 8.0
    #: Bound while no size class is known, and the longest of all bounds.
    first_steps_s: float = 60.0
    #: Steps of a size class that make it known.
    enough_steps: int = 3
    #: More than this share of all blocks in quarantine, for longer than the grace, ends the worker.
    max_quarantined_share: float = 0.25
    quarantine_grace_s: float = 5.0


class Watchdog:
    def __init__(self, limits: WatchdogLimits) -> None:
        self._limits = limits
        self._pauses = PauseWatch(LONGEST_GAP_S)
        #: Durations of recent steps by size class.
        self._recent: dict[int, deque[float]] = {}
        #: Tokens and start of the step in progress; None between steps. The start moves by pauses of the process.
        self._step: tuple[int, float] | None = None
        #: Since when too many blocks are in quarantine; None while they are not.
        self._crowded_since_s: float | None = None

    def step_started(self, num_tokens: int, now_s: float) -> None:
        self._step = (num_tokens, now_s)

    def step_ended(self, now_s: float) -> None:
        """The step is over, well or not."""
        if self._step is None:
            return
        num_tokens, started_s = self._step
        self._step = None
        recent = self._recent.setdefault(_size_class(num_tokens), deque(maxlen=REMEMBERED_STEPS))
        recent.append(now_s - started_s)

    def step_age_s(self, now_s: float) -> float:
        """0 between steps."""
        return 0.0 if self._step is None else now_s - self._step[1]

    def bound_s(self, num_tokens: int) -> float:
        """What a step of so many tokens may take."""
        limits = self._limits
        wanted = _size_class(num_tokens)
        known = [size for size, recent in self._recent.items() if len(recent) >= limits.enough_steps]
        if not known:
            return limits.first_steps_s
        nearest = min((size for size in known if size >= wanted), default=max(known))
        slowest_s = max(self._recent[nearest]) * 2.0 ** max(0, wanted - nearest)
        return min(max(limits.floor_s, limits.factor * slowest_s), limits.first_steps_s)

    def look(self, now_s: float, *, quarantined_blocks: int, total_blocks: int) -> str | None:
        """Why this worker must end, or None."""
        paused_s = self._pauses.look(now_s)
        if paused_s:
            _PAUSED.reached()
        self._forgive(paused_s, now_s)
        return self._overdue_step(now_s) or self._crowded_quarantine(now_s, quarantined_blocks, total_blocks)

    def _forgive(self, paused_s: float, now_s: float) -> None:
        if self._step is not None:
            num_tokens, started_s = self._step
            self._step = (num_tokens, min(now_s, started_s + paused_s))
        if self._crowded_since_s is not None:
            self._crowded_since_s = min(now_s, self._crowded_since_s + paused_s)

    def _overdue_step(self, now_s: float) -> str | None:
        if self._step is None:
            return None
        num_tokens, started_s = self._step
        age_s, bound_s = now_s - started_s, self.bound_s(num_tokens)
        if age_s <= bound_s:
            return None
        _ENGINE_STUCK.reached()
        return f"its engine is stuck: a step of {num_tokens} tokens has run for {age_s:.1f} s ({bound_s:.1f} s allowed)"

    def _crowded_quarantine(self, now_s: float, quarantined_blocks: int, total_blocks: int) -> str | None:
        if quarantined_blocks <= self._limits.max_quarantined_share * total_blocks:
            self._crowded_since_s = None
            return None
        if self._crowded_since_s is None:
            self._crowded_since_s = now_s
        crowded_s = now_s - self._crowded_since_s
        if crowded_s <= self._limits.quarantine_grace_s:
            return None
        _PULLS_STUCK.reached()
        return (
            f"{quarantined_blocks} of its {total_blocks} blocks have been in quarantine for {crowded_s:.1f} s: "
            "their pulls do not end"
        )


def _size_class(num_tokens: int) -> int:
    """0 for none, 1 for one, 2 for two or three, 3 for four to seven..."""
    return num_tokens.bit_length()
