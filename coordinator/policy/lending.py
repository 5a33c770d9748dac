"""Workers lent between the phases when the load shifts suddenly, and given back: Splitwise's mixed pool (ISCA 2024,
section IV.A). Pure; the same live and in studies.

A prompt queue that is too long even at the best worker, or answers' memory that is nearly full even at the emptiest
one, takes a worker from the other phase, if that can do without it. What is lent goes home when its own phase needs it,
or the phase that it helped would be calm without it: at once when it has no work of that phase, with its work (that
ends or moves before the flip is done) only if this lasts. Between what lends and what gives back lie a gap of load and
a shortest stay, in time: the loads of the two phases do not swing against each other. Where both phases are short
nobody is lent, for that asks for more workers, not for others; nor to a phase that has lent some itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LendWorker:
    worker_id: str
    #: What it is for.
    home: Phase
    #: What it does now: its own phase, both, or the other.
    role: Literal["prefill", "decode", "mixed"]
    #: Since when.
    since_s: float = -math.inf
    #: How long a prompt that came now would wait for those before it.
    queue_delay_s: float = 0.0
    #: Of its time lately, the part in which it read prompts; 0 where that is not known.
    reading_share: float = 0.0
    memory_tokens: float = 0.0
    #: Virtual usage of its answers, and what waits to be written there.
    used_tokens: float = 0.0
    #: Requests here, by phase: prompts waiting or being read, answers waiting or being written.
    prompts: int = 0
    answers: int = 0
    #: It drains, or changes its role: it is counted as what it becomes in `role`, and left alone.
    is_changing: bool = False

    @property
    def is_lent(self) -> bool:
        return self.role != self.home

    @property
    def foreign_requests(self) -> int:
        """Of the phase that is not its own."""
        return self.answers if self.home == "prefill" else self.prompts

    def serves(self, phase: Phase) -> bool:
        return self.role in (phase, "mixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class LendRules:
    """Raises ValueError for rules that cannot be kept."""

    #: The shortest queue of a phase that reads: with more it borrows, with less than the second it is calm.
    queue_delay_high_s: float = 1.0
    queue_delay_low_s: float = 0.25
    #: Share of their time that workers may read, on average, for the phase to be calm.
    reading_high: float = 0.75
    #: Share of the memory that is used by a phase that writes: the same.
    memory_high: float = 0.9
    memory_low: float = 0.6
    #: After a change of role.
    min_stay_s: float = 20.0
    #: Between two decisions, so that the effect of the first is seen.
    cooldown_s: float = 5.0
    #: For so long a phase must be short, or calm, before anything is done.
    settle_s: float = 2.0
    #: And for so long before one goes home that has work of the phase it was lent to.
    leave_work_after_s: float = 10.0
    #: That stay with each phase.
    min_prefill: int = 1
    min_decode: int = 1
    #: Lent at once, at most, of each phase.
    max_lent: int = 8
    #: What a lent worker becomes.
    lend_as: Literal["mixed", "other"] = "mixed"

    def __post_init__(self) -> None:
        if not (0 <= self.queue_delay_low_s < self.queue_delay_high_s and 0 <= self.memory_low < self.memory_high <= 1):
            raise ValueError(f"needs queue_delay_low_s < queue_delay_high_s and memory_low < memory_high <= 1: {self}")
        if not 0 < self.reading_high <= 1:
            raise ValueError(f"needs reading_high in (0, 1]: {self}")
        if min(self.min_stay_s, self.cooldown_s, self.settle_s, self.leave_work_after_s) < 0:
            raise ValueError(f"needs min_stay_s, cooldown_s, settle_s and leave_work_after_s of at least 0: {self}")
        if min(self.min_prefill, self.min_decode) < 1 or self.max_lent < 0:
            raise ValueError(f"needs min_prefill and min_decode of at least 1, max_lent of at least 0: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LendMemory:
    """Begin with `LendMemory()`."""

    changed_s: float = -math.inf
    #: Since when each phase is short, and calm; None: it is not.
    prefill_short_s: float | None = None
    decode_short_s: float | None = None
    prefill_calm_s: float | None = None
    decode_calm_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LendDecision:
    kind: Literal["keep", "lend", "return"]
    #: Empty where nothing changes.
    worker_id: str = ""
    #: Which it is to have.
    role: Literal["prefill", "decode", "mixed"] = "mixed"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    phase: Phase
    is_short: bool
    #: It would be, without one of those that help it.
    is_calm: bool
    text: str


def lend(
    workers: Sequence[LendWorker], rules: LendRules, now_s: float, memory: LendMemory
) -> tuple[LendDecision, LendMemory]:
    """At most one worker changes its role; and what to remember for the next look, assuming that it does."""
    prefill, decode = _prefill(workers, rules), _decode(workers, rules)
    memory = LendMemory(
        changed_s=memory.changed_s,
        prefill_short_s=_since(prefill.is_short, memory.prefill_short_s, now_s),
        decode_short_s=_since(decode.is_short, memory.decode_short_s, now_s),
        prefill_calm_s=_since(prefill.is_calm, memory.prefill_calm_s, now_s),
        decode_calm_s=_since(decode.is_calm, memory.decode_calm_s, now_s),
    )
    decision = _decide(workers, rules, now_s, memory, prefill, decode)
    if decision.kind == "keep":
        return decision, memory
    return decision, LendMemory(changed_s=now_s)


def _decide(
    workers: Sequence[LendWorker], rules: LendRules, now_s: float, memory: LendMemory, prefill: _Side, decode: _Side
) -> LendDecision:
    state = f"{prefill.text}; {decode.text}"
    if any(worker.is_changing for worker in workers):
        return _keep(f"a worker changes its role: {state}")
    if now_s - memory.changed_s < rules.cooldown_s:
        return _keep(f"{now_s - memory.changed_s:.1f} s after the last change ({rules.cooldown_s:g} s apart): {state}")
    short = {"prefill": memory.prefill_short_s, "decode": memory.decode_short_s}
    calm = {"prefill": memory.prefill_calm_s, "decode": memory.decode_calm_s}
    # Home first: who is back is no loan that would have to be made.
    for worker in sorted(workers, key=lambda one: (one.foreign_requests, one.since_s, one.worker_id)):
        helped: Phase = "decode" if worker.home == "prefill" else "prefill"
        if not worker.is_lent or now_s - worker.since_s < rules.min_stay_s:
            continue
        lasting_s = rules.leave_work_after_s if worker.foreign_requests else rules.settle_s
        is_needed = short[helped] is None and _lasts(short[worker.home], now_s, lasting_s)
        if (is_needed or _lasts(calm[helped], now_s, lasting_s)) and _can_go(worker, workers, rules, helped):
            why = f"{worker.home} needs it" if is_needed else f"{helped} is calm without it"
            words = f"gives {worker.worker_id} back with {worker.foreign_requests} {helped} requests, {why}"
            return LendDecision(kind="return", worker_id=worker.worker_id, role=worker.home, reason=f"{words}: {state}")
    if prefill.is_short and decode.is_short:
        return _keep(f"both phases are short of workers: {state}")
    if _lasts(short["prefill"], now_s, rules.settle_s):
        return _borrow(workers, rules, now_s, "prefill", decode, state)
    if _lasts(short["decode"], now_s, rules.settle_s):
        return _borrow(workers, rules, now_s, "decode", prefill, state)
    return _keep(state)


def _borrow(
    workers: Sequence[LendWorker],
    rules: LendRules,
    now_s: float,
    phase: Phase,
    lender: _Side,
    state: str,
) -> LendDecision:
    """The one that has least to do."""
    other = lender.phase
    if away := [worker.worker_id for worker in workers if worker.home == phase and worker.is_lent]:
        return _keep(f"{phase} is short, and {', '.join(away)} of its own to come home first: {state}")
    if sum(worker.home == other and worker.is_lent for worker in workers) >= rules.max_lent:
        return _keep(f"{phase} is short, and {rules.max_lent} are lent already: {state}")
    at_home = [worker for worker in workers if worker.home == other and not worker.is_lent]
    rested = [worker for worker in at_home if now_s - worker.since_s >= rules.min_stay_s]
    for worker in sorted(rested, key=lambda one: (one.prompts + one.answers, one.used_tokens, one.worker_id)):
        if rules.lend_as == "mixed" or _can_go(worker, workers, rules, other):
            role: Literal["prefill", "decode", "mixed"] = "mixed" if rules.lend_as == "mixed" else phase
            words = f"lends {worker.worker_id} to {phase} as {role}"
            return LendDecision(kind="lend", worker_id=worker.worker_id, role=role, reason=f"{words}: {state}")
    return _keep(f"{phase} is short, and {other} can do without none of {len(at_home)}: {state}")


def _can_go(leaving: LendWorker, workers: Sequence[LendWorker], rules: LendRules, phase: Phase) -> bool:
    """Whether the phase's other workers carry its load without becoming short, and are enough."""
    rest = [worker for worker in workers if worker.serves(phase) and worker is not leaving]
    if len(rest) < (rules.min_prefill if phase == "prefill" else rules.min_decode):
        return False
    if phase == "prefill":
        waiting_s = sum(worker.queue_delay_s for worker in rest) + leaving.queue_delay_s
        reading = sum(worker.reading_share for worker in rest) + leaving.reading_share
        return waiting_s / len(rest) < rules.queue_delay_high_s and reading <= rules.reading_high * len(rest)
    memory_tokens = sum(worker.memory_tokens for worker in rest)
    used_tokens = sum(worker.used_tokens for worker in rest) + leaving.used_tokens
    return used_tokens < rules.memory_high * memory_tokens


def _prefill(workers: Sequence[LendWorker], rules: LendRules) -> _Side:
    readers = [worker for worker in workers if worker.serves("prefill")]
    delays = [worker.queue_delay_s for worker in readers]
    least_s = min(delays, default=math.inf)
    lent = any(worker.home == "decode" and worker.is_lent for worker in workers)
    left = max(1, len(readers) - lent)
    reading = sum(worker.reading_share for worker in readers)
    return _Side(
        phase="prefill",
        is_short=least_s > rules.queue_delay_high_s,
        is_calm=sum(delays) / left < rules.queue_delay_low_s and reading <= rules.reading_high * left,
        text=f"shortest prompt queue {least_s:.2f} s of {len(delays)} workers "
        f"(short above {rules.queue_delay_high_s:g}, calm below {rules.queue_delay_low_s:g})",
    )


def _decode(workers: Sequence[LendWorker], rules: LendRules) -> _Side:
    writers = [worker for worker in workers if worker.serves("decode") and worker.memory_tokens > 0]
    least = min((worker.used_tokens / worker.memory_tokens for worker in writers), default=math.inf)
    lent = [worker for worker in writers if worker.home == "prefill" and worker.is_lent]
    # As if the smallest of those that help were gone.
    without = min((worker.memory_tokens for worker in lent), default=0.0)
    left_tokens = sum(worker.memory_tokens for worker in writers) - without
    used_tokens = sum(worker.used_tokens for worker in writers)
    return _Side(
        phase="decode",
        is_short=least > rules.memory_high,
        is_calm=used_tokens < rules.memory_low * left_tokens,
        text=f"least used memory {least:.0%} of {len(writers)} workers "
        f"(short above {rules.memory_high:.0%}, calm below {rules.memory_low:.0%})",
    )


def _since(is_so: bool, before_s: float | None, now_s: float) -> float | None:
    if not is_so:
        return None
    return now_s if before_s is None else before_s


def _lasts(since_s: float | None, now_s: float, at_least_s: float) -> bool:
    return since_s is not None and now_s - since_s >= at_least_s


def _keep(reason: str) -> LendDecision:
    return LendDecision(kind="keep", reason=reason)
