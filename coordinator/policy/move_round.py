"""One look at all workers for moves between them: what is decided counts for what is decided next."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.policy.move_terms import MovePair, Pairing
from coordinator.policy.virtual_usage import LEVELS, headroom_blocks, wanted_blocks

if TYPE_CHECKING:
    from coordinator.policy.fleet_view import Flags
    from coordinator.policy.move_terms import MoveHistory, MoveRules, NoMove, Purpose
    from coordinator.policy.virtual_usage import Blocks, UsageView


class Victim(NamedTuple):
    """What a worker would give away next, as far as the coordinator can tell."""

    #: Column of `UsageView.answers`.
    level: int
    num_blocks: int
    #: A preempted answer, or a prompt that nobody has begun to read: it holds nothing where it waits.
    waits: bool = False
    #: What it may take at most where the size is a guess; None: no matter.
    max_blocks: int | None = None
    #: It is to be about as large as that, not as short as possible: something is to come free.
    makes_room: bool = False


class Round:
    """`free` by row: M - V, draining or not, with everything moved that is to move. Everything by row otherwise."""

    def __init__(self, view: UsageView, rules: MoveRules, history: MoveHistory, now_s: float) -> None:
        self.view = view
        self.rules = rules
        self._history = history
        self._now_s = now_s
        usage = rules.usage
        self.headroom = headroom_blocks(view, usage)
        self.free: Blocks = view.total_blocks - wanted_blocks(view, usage)
        self.available: Blocks = (view.available_blocks - view.arriving_blocks).astype(np.float64)
        self.answers = view.answers.copy()
        self.num_answers = view.answers.sum(axis=1)
        self.preempted = view.preempted_answers.copy()
        self.waiting_prompts = view.waiting_prompts.copy()
        self.queue_s = view.queue_s.copy()
        block_tokens = np.maximum(view.block_tokens, 1)
        self.low: Blocks = rules.low_tokens / block_tokens
        self.high: Blocks = rules.high_tokens / block_tokens
        self.growth: Blocks = np.ceil(usage.growth_tokens / block_tokens)
        most_out = np.where(view.is_draining, rules.max_moving_draining, rules.max_moving)
        self.out_left = np.where(view.is_up, most_out - view.moving_out, 0)
        # Whoever drains may take part of what all may: from several at once.
        self.in_left = np.where(view.is_up & ~view.is_draining, rules.max_moving - view.moving_in, 0)
        self.in_left_draining = self.in_left + (rules.max_moving_draining - rules.max_moving)
        self.total_left = rules.max_moving_total - int(view.moving_out.sum())
        self._are_sources = np.zeros(len(view), np.bool_)
        self._are_destinations = np.zeros(len(view), np.bool_)
        self._moves: dict[tuple[int, int, Purpose, bool], MovePair] = {}
        self._not_moved: Counter[NoMove] = Counter()
        for row in view.moving_out.nonzero()[0].tolist():
            self._count_leaving(row, int(view.moving_out[row]))

    def _count_leaving(self, row: int, number: int) -> None:
        """Those on their way from here still hold their blocks, but not for long."""
        for _ in range(number):
            victim = self.victim(row)
            if victim is None:
                return
            self._take_away(row, victim)

    # --- what may move ----------------------------------------------------------------------------

    def victim(self, row: int, below_level: int | None = None) -> Victim | None:
        """Of those that run there: one of the lowest priority, of mean size. None: nobody (below that level) runs."""
        levels = self.answers[row, :below_level].nonzero()[0]
        if not len(levels):
            return None
        level = int(levels[0])
        held, number = self.view.answer_blocks.item(row, level), self.view.answers.item(row, level)
        return Victim(level, max(1, round(held / max(1, number))))

    def pressed(self) -> Blocks:
        """By how much they stand: F where it is above 0, else the blocks that are missing. Below 0 a share for each
        answer would fall when one of them leaves, though everybody gains."""
        stand: Blocks = np.where(self.free > 0, self.free / np.maximum(self.num_answers, 1), self.free)
        return stand

    def stand(self, row: int) -> float:
        """As `pressed`, of one."""
        return _stand(self.free.item(row), self.num_answers.item(row))

    def may_give(self, row: int) -> bool:
        return self.total_left > 0 and self.out_left.item(row) > 0 and not self._are_destinations[row]

    def may_give_prompt(self, row: int) -> bool:
        return bool(self.view.is_up[row]) and not self._are_destinations[row]

    def room(self) -> Blocks:
        """What each could take at once and still give all that is there then what it is promised."""
        room: Blocks = self.available - self.growth * (self.num_answers + 1)
        return room

    @property
    def are_sources(self) -> Flags:
        return self._are_sources

    # --- where to ---------------------------------------------------------------------------------

    def destination(self, source: int, victim: Victim | None, is_free: Flags, *, is_urgent: bool = False) -> int | None:
        """The emptiest of those marked that could go on with it; those that understand the KV before those that must
        read the tokens again. For a prompt that nobody has begun to read (no victim): whoever has the shortest queue.
        None: there is nobody, and it is counted why. `is_urgent`: a move the other way just now is no obstacle."""
        peers = self._takers(source, victim, is_free, is_urgent=is_urgent)
        if isinstance(peers, str):
            self.stays(peers)
            return None
        alike = peers & (self.view.kv_class == self.view.kv_class[source])
        rows = (alike if alike.any() else peers).nonzero()[0]
        order = self.queue_s[rows] if victim is None else -self.pressed()[rows]
        return int(rows[order.argmin()])

    def _takers(self, source: int, victim: Victim | None, is_free: Flags, *, is_urgent: bool) -> Flags | NoMove:
        """At least one; or why there is none."""
        view = self.view
        if victim is None:
            # Its answer's worker understands the reader; one that was to write it itself may be about to end.
            kind = (view.kv_class == view.kv_class[source]) & view.reads & (view.writes | ~view.writes[source])
        else:
            kind = (view.model_class == view.model_class[source]) & view.writes
            if victim.waits and self.waiting_prompts[source]:
                # Of those that wait the source may give a prompt.
                kind &= view.reads
        # Who preempts has too much as it is.
        takers = kind & view.is_up & ~view.is_draining & ~self._are_sources & (view.preempted_answers == 0)
        takers[source] = False
        if not takers.any():
            return "no_peer"
        if victim is not None:
            takers &= self.available >= victim.num_blocks + self.growth * (self.num_answers + 1)
            if not takers.any():
                return "no_room"
            takers &= (self.in_left_draining if view.is_draining[source] else self.in_left) > 0
            if not takers.any():
                return "busy"
        takers &= ~self.kept_apart(source, is_urgent=is_urgent)
        if not takers.any():
            return "cooldown"
        takers &= is_free
        return takers if takers.any() else "not_free"

    def kept_apart(self, source: int, *, is_urgent: bool) -> Flags:
        marked = np.zeros(len(self.view), np.bool_)
        if not self._history:
            return marked
        source_id = self.view.worker_ids[source]
        others = set(self._history.refusing(source_id, self._now_s, self.rules))
        if not is_urgent:
            others.update(self._history.cooling(source_id, self._now_s, self.rules))
        if others:
            marked |= np.array([worker_id in others for worker_id in self.view.worker_ids], np.bool_)
        return marked

    def stays(self, why: NoMove) -> None:
        self._not_moved[why] += 1

    # --- what follows -----------------------------------------------------------------------------

    def cost_there(self, destination: int, victim: Victim) -> float:
        """Blocks, and the headroom of its priority where nobody there has that."""
        headroom = 0.0 if self.answers[destination, victim.level] else self.headroom.item(destination, victim.level)
        return victim.num_blocks + headroom

    def gain_here(self, source: int, victim: Victim) -> float:
        if victim.waits:
            # Only what is first in line is counted, and another comes after it.
            return float(victim.num_blocks)
        is_last = self.answers.item(source, victim.level) == 1
        return victim.num_blocks + (self.headroom.item(source, victim.level) if is_last else 0.0)

    def after(self, source: int, destination: int, victim: Victim) -> tuple[float, float]:
        """How they would stand, here and there; as `pressed`."""
        free_here = self.free.item(source) + self.gain_here(source, victim)
        free_there = self.free.item(destination) - self.cost_there(destination, victim)
        left_here = self.num_answers.item(source) - (0 if victim.waits else 1)
        return _stand(free_here, left_here), _stand(free_there, self.num_answers.item(destination) + 1)

    def move(
        self, source: int, destination: int, victim: Victim, purpose: Purpose, reason: str, *, below_level: int | None
    ) -> None:
        """Of an answer, or of one that waits for blocks."""
        self.free[destination] -= self.cost_there(destination, victim)
        self.available[destination] -= victim.num_blocks
        self.num_answers[destination] += 1
        self.answers[destination, victim.level] += 1
        self._take_away(source, victim)
        self.in_left[destination] -= 1
        self.in_left_draining[destination] -= 1
        self.out_left[source] -= 1
        self.total_left -= 1
        priority = None if below_level is None else LEVELS[below_level - 1]
        self._note(source, destination, victim, purpose, reason, max_priority=priority, reading_s=0.0)

    def send_on(
        self, source: int, destination: int, number: int, num_blocks: int, room_blocks: int, reason: str
    ) -> None:
        """Of prompts that wait for blocks: as many as fit there, in the order of their line. They cost no more than
        messages: no bound of moves counts them."""
        self.available[destination] -= num_blocks
        self.free[destination] -= num_blocks
        self.num_answers[destination] += number
        self.waiting_prompts[source] -= number
        prompts = Victim(0, num_blocks, waits=True, max_blocks=room_blocks)
        self._note(source, destination, prompts, "defragment", reason, max_priority=None, reading_s=0.0, number=number)

    def move_prompt(self, source: int, destination: int, reading_s: float, purpose: Purpose, reason: str) -> None:
        """Of a prompt that nobody has begun to read. It costs no more than a message: no bound of moves counts it."""
        self.queue_s[source] -= reading_s
        self.queue_s[destination] += reading_s
        self.waiting_prompts[source] -= 1
        prompt = Victim(0, 0, waits=True)
        self._note(source, destination, prompt, purpose, reason, max_priority=None, reading_s=reading_s)

    def _take_away(self, row: int, victim: Victim) -> None:
        self.free[row] += self.gain_here(row, victim)
        if victim.waits:
            self.preempted[row] = max(0, self.preempted.item(row) - 1)
            return
        self.available[row] += victim.num_blocks
        self.answers[row, victim.level] -= 1
        self.num_answers[row] -= 1

    def _note(
        self,
        source: int,
        destination: int,
        victim: Victim,
        purpose: Purpose,
        reason: str,
        *,
        max_priority: int | None,
        reading_s: float,
        number: int = 1,
    ) -> None:
        self._are_sources[source] = self._are_destinations[destination] = True
        key = (source, destination, purpose, victim.waits)
        known = self._moves.get(key)
        if known is not None:
            self._moves[key] = known._replace(
                max_requests=known.max_requests + number,
                num_blocks=known.num_blocks + victim.num_blocks,
                reading_s=known.reading_s + reading_s,
                need_blocks=known.need_blocks + (victim.num_blocks if victim.makes_room else 0),
            )
            return
        view = self.view
        self._moves[key] = MovePair(
            source=source,
            destination=destination,
            purpose=purpose,
            max_requests=number,
            running=not victim.waits,
            waiting=victim.waits,
            max_priority=max_priority,
            max_blocks=victim.max_blocks,
            need_blocks=victim.num_blocks if victim.makes_room else 0,
            mode="auto" if view.kv_class[source] == view.kv_class[destination] else "tokens",
            num_blocks=victim.num_blocks,
            reading_s=reading_s,
            reason=reason,
        )

    def outcome(self) -> Pairing:
        return Pairing(tuple(self._moves.values()), dict(self._not_moved))


def _stand(free_blocks: float, num_answers: int) -> float:
    return free_blocks / max(1, num_answers) if free_blocks > 0 else free_blocks
