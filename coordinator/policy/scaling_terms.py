"""What scaling a pool goes by, and what comes of it: see `coordinator.policy.scaling`. Durations in seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from coldstart.keep_alive import KeepRules


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolWorker:
    """A worker of the pool that is ready."""

    worker_id: str
    #: KV that it can hold.
    memory_tokens: float
    #: Virtual usage of what runs there: the KV that it holds, and headroom.
    used_tokens: float = 0.0
    #: KV that all that waits there would take.
    queued_tokens: float = 0.0
    #: Being written.
    answers: int = 0
    waiting_requests: int = 0
    #: How long a prompt that came now would wait for those before it.
    queue_delay_s: float = 0.0
    #: It drains, or is going to die: no capacity from now on, but its load is still to be carried.
    is_leaving: bool = False
    #: Of these: nobody decided that; it has to be replaced.
    is_lost: bool = False

    @property
    def freeness(self) -> float:
        """Tokens that each answer can still grow by, Llumnix' F = (M - V) / B; infinite where none is written."""
        return (self.memory_tokens - self.used_tokens) / self.answers if self.answers else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingWorker:
    """Capacity that will come: a process that starts, or a worker that changes its role."""

    worker_id: str
    age_s: float
    #: From begin to end, as estimated.
    takes_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpareWorker:
    """A worker of another pool that could do without it."""

    worker_id: str
    pool: str
    #: Drain and change of role, as estimated.
    flip_s: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Whether an idle pool keeps a worker, by `coldstart.keep_alive` or for want of memory."""

    #: `warm`: it has none, and will be asked for one soon.
    kind: Literal["keep", "release", "warm"]
    reason: str
    #: Another model waits for the memory: no cooldown counts.
    is_urgent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """A pool as it is, and what was seen of it over the last `ScaleRules.window_s`."""

    pool: str
    workers: tuple[PoolWorker, ...] = ()
    starting: tuple[StartingWorker, ...] = ()
    #: Workers that could be started.
    num_startable: int = 0
    #: Estimate of a start, process to ready, and how much it varies.
    start_s: float = 0.0
    start_spread_s: float = 0.0
    #: Those that are flipped soonest first.
    spares: tuple[SpareWorker, ...] = ()
    #: Requests that asked for this pool, refused ones too: over the window, and over its last part.
    arrivals: int = 0
    recent_arrivals: int = 0
    recent_share: float = 0.25
    #: Reading of prompts that came in each second of the window, in worker-seconds; refused ones too.
    work_rate: float = 0.0
    #: For how long an answer is written; None: not known.
    answer_s: float | None = None
    #: Answers that one worker writes within their TPOT target; None: not known, or no target.
    answers_limit: float | None = None
    #: Share of requests that met the target that depends on this pool; warm-up is not counted. None: none was judged.
    attainment: float | None = None
    num_judged: int = 0
    #: Requests that asked lately and found nobody up.
    unserved_requests: int = 0
    #: For how long nothing came, waited or ran.
    idle_s: float = 0.0
    #: None: `ScaleRules.to_zero_after_s` says all there is to say.
    hold: Hold | None = None
    #: Workers that there is memory for; None: nobody counts it.
    fits: int | None = None

    @property
    def serving(self) -> tuple[PoolWorker, ...]:
        return tuple(worker for worker in self.workers if not worker.is_leaving)

    @property
    def freeness(self) -> float:
        """That of each worker if the load of all were spread evenly over those that stay."""
        return self.freeness_with(len(self.serving))

    def freeness_with(self, num_workers: int) -> float:
        """As `freeness`, with so many workers; infinite where no answer is written nor waits."""
        answers = sum(worker.answers + worker.waiting_requests for worker in self.workers)
        if not answers:
            return math.inf
        return (num_workers * self.memory_tokens - self.demand_tokens) / answers

    @property
    def memory_tokens(self) -> float:
        """Of one worker, on average; 0 where none is up."""
        like = self.serving or self.workers
        return sum(worker.memory_tokens for worker in like) / len(like) if like else 0.0

    @property
    def demand_tokens(self) -> float:
        """KV of all that runs and waits."""
        return sum(worker.used_tokens + worker.queued_tokens for worker in self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRules:
    """Raises ValueError for rules that cannot be kept."""

    min_workers: int = 1
    max_workers: int = 1
    target_attainment: float = 0.95
    #: What a prompt may wait to be begun.
    queue_delay_s: float = 1.0
    #: Tokens that each answer should be able to grow by (Llumnix keeps the mean between 10 and 60): with less the pool
    #: grows, with more it may shrink.
    freeness_low: float = 10.0
    freeness_high: float = 60.0
    #: After any change, before the next of this direction.
    cooldown_up_s: float = 10.0
    cooldown_down_s: float = 60.0
    max_step_up: int = 4
    max_step_down: int = 1
    #: None: the last worker stays.
    to_zero_after_s: float | None = None
    #: Instead of that: how long the last worker stays, and when one is started before it is asked for.
    keep: KeepRules | None = None
    #: Width of the bins in which idle times are counted.
    keep_bin_s: float = 60.0
    #: Workers of other pools may change their role to join this one.
    flip: bool = True
    #: What is observed; load has to be low for so long before the pool shrinks.
    window_s: float = 60.0
    #: Load has to be high for so long before it grows: one look is no reason.
    settle_s: float = 3.0
    #: Within which a queue that is too long is to be worked off.
    recover_s: float = 15.0
    #: Of the workers that would be left, so much must stay unneeded, relative to the demand.
    margin: float = 0.1
    #: Fewer judged requests tell nothing of attainment.
    min_judged: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise ValueError(f"needs 0 <= min_workers <= max_workers, and max_workers >= 1: {self}")
        if not (0 < self.target_attainment <= 1 and self.queue_delay_s > 0):
            raise ValueError(f"needs target_attainment in (0, 1] and queue_delay_s > 0: {self}")
        if not 0 <= self.freeness_low < self.freeness_high:
            raise ValueError(f"needs 0 <= freeness_low < freeness_high: {self}")
        if min(self.cooldown_up_s, self.cooldown_down_s, self.settle_s, self.margin) < 0:
            raise ValueError(f"needs cooldowns, settle_s and margin of at least 0: {self}")
        if min(self.max_step_up, self.max_step_down, self.min_judged) < 1:
            raise ValueError(f"needs steps and min_judged of at least 1: {self}")
        if not (self.window_s > 0 and self.recover_s > 0):
            raise ValueError(f"needs window_s > 0 and recover_s > 0: {self}")
        if self.to_zero_after_s is not None and (self.min_workers > 0 or self.to_zero_after_s <= 0):
            raise ValueError(f"to_zero_after_s needs min_workers = 0, and to be above 0: {self}")
        if self.keep is not None and (self.min_workers > 0 or self.to_zero_after_s is not None):
            raise ValueError(f"keep needs min_workers = 0, and no to_zero_after_s: {self}")
        if self.keep_bin_s <= 0:
            raise ValueError(f"needs keep_bin_s > 0: {self}")


@dataclass(frozen=True, slots=True)
class Look:
    """The demand that was seen at one time, in workers: as it was, and as it will be when a new one could be ready."""

    at_s: float
    now: float
    later: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleMemory:
    """What scaling remembers of a pool. Begin with `ScaleMemory()`."""

    #: Over the window, oldest first.
    looks: tuple[Look, ...] = ()
    first_look_s: float = math.inf
    up_s: float = -math.inf
    down_s: float = -math.inf
    #: Attainment when a worker was added for it; None: not since it was last good.
    pushed_at: float | None = None


#: "keep"; more workers; fewer.
Kind = Literal["keep", "up", "down"]

Why = Literal[
    #: What calls for more.
    "minimum",
    "wake",
    "prewarm",
    "demand",
    "attainment",
    #: Or for fewer.
    "maximum",
    "free",
    "idle",
    #: Why nothing is done.
    "steady",
    "starting",
    "settling",
    "cooldown",
    "at_maximum",
    "nothing_to_start",
    "no_room",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    pool: str
    kind: Kind
    why: Why
    #: Workers that the pool is to have.
    wanted: int
    #: Those that it has: ready to stay, or coming.
    present: int
    #: How many to start, beside the flips.
    num_starts: int = 0
    flips: tuple[SpareWorker, ...] = ()
    #: To be drained and ended.
    remove: tuple[str, ...] = ()
    #: In words, with the numbers.
    reason: str
