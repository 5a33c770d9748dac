"""Fleet, directory, costs and policies together: what decides where a request runs.

After Mooncake's conductor (FAST'25, section 4). The policies are in `coordinator.policy`; here is what they are asked
with, and what follows from their answers.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from contracts.requests import counted_priority
from coordinator.costs import costs_of
from coordinator.decision import Refused
from coordinator.directory.directory import Directory
from coordinator.fleet import Fleet
from coordinator.margins import Margins
from coordinator.policy.admission import Limits, admit, limits_of
from coordinator.policy.outlook import Decoding
from coordinator.policy.policies import POLICIES
from coordinator.policy.question import Question
from coordinator.policy.settings import AdmissionRule, ConductorSettings, DispatchLimits
from coordinator.policy.sources import Link
from coordinator.policy.virtual_usage import UsageRules
from coordinator.policy.words import placement, rejection

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Mapping, Sequence

    from contracts.ids import WorkerId
    from contracts.messages import DispatchItem, LatencyFit, Placement, Rejection, WorkerInfo, WorkerLoad
    from coordinator.costs import CostSource
    from coordinator.decision import Chosen
    from coordinator.directory.directory import Match
    from coordinator.directory.hints import Hints
    from coordinator.policy.fleet_view import Flags, FleetView
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.question import HeldBlocks
    from workload.slo import SloClass

__all__ = ["AdmissionRule", "Conductor", "ConductorSettings", "DispatchLimits", "Inputs"]

#: Classes with the longest targets beyond these share a rank.
_MAX_RANKS = 16
#: So many of those that hold most of a prompt are looked at.
_FEW_HOLDERS = 8
#: Of the 64-bit hints in `DispatchItem.block_keys`.
_HINT = np.dtype(np.uint64)


class Inputs(NamedTuple):
    """What a decision rested on, for the decision log."""

    #: Empty where the request has no targets.
    slo_class: str
    limits: Limits | None
    #: Whether the class's last judged request was refused: the limits are smaller then.
    was_refused: bool
    answer_tokens: float
    #: Leading blocks of the prompt held by the worker that holds most.
    best_held_blocks: int
    #: Of the workers that were chosen, or would have been, without this request; 0 where nobody was. The prefill
    #: worker's prompts: tokens not yet computed, and requests not yet computing.
    pending_tokens: int
    waiting_requests: int
    #: The decode worker's answers: now, and when this one would begin. 0 where nothing is predicted.
    num_decodes: float
    context_tokens: float
    num_decodes_then: float
    context_tokens_then: float


class _Asked(NamedTuple):
    """The last decision's."""

    question: Question
    slo: SloClass | None
    limits: Limits | None
    was_refused: bool


#: Of nobody.
_NO_LOADS = (0, 0, 0.0, 0.0, 0.0, 0.0)


class Conductor:
    """The same object live and in studies. Not thread-safe; no I/O; reads no clock."""

    def __init__(
        self,
        *,
        costs: CostSource,
        slos: Mapping[str, SloClass],
        default_slo: str | None,
        settings: ConductorSettings,
        rng: random.Random,
    ) -> None:
        """`slos` by name; requests that name none, or one that is not there, are of `default_slo`."""
        self._costs = costs
        self._slos = dict(slos)
        self._default_slo = default_slo
        self._settings = settings
        self._policy = POLICIES[settings.policy]
        self._rng = rng
        self._rank_targets_s = _rank_targets(slos.values(), settings)
        longest_target_s = max((slo.ttft_ms / 1e3 for slo in slos.values()), default=0.0)
        self.fleet = Fleet(
            settings.booking_grace_s,
            num_ranks=len(self._rank_targets_s) + 1,
            longest_wait_s=longest_target_s,
            usage=UsageRules(headroom_tokens=settings.headroom_tokens, queued="all"),
        )
        self.directory = Directory(settings.max_directory_blocks, seed=rng.getrandbits(64))
        self.margins = Margins(settings.admission, slos)
        #: Classes whose last judged request was refused.
        self._refusing: set[str] = set()
        self._num_decisions = 0
        self._asked: _Asked | None = None
        #: As in `Inputs`, in their order: before the decision was booked.
        self._loads: tuple[float, ...] = _NO_LOADS

    # --- who is there -----------------------------------------------------------------------------

    def add(self, info: WorkerInfo, now_s: float) -> None:
        """A worker without load, whose cache holds nothing. Raises ValueError when it is here already."""
        number = self.directory.free_number()
        self.fleet.add(info, now_s, number=number, costs=costs_of(info, self._costs))
        self.directory.add_worker(number)

    def remove(self, worker_id: WorkerId) -> None:
        """Raises KeyError when the worker is not here."""
        number = self.fleet.number_of(worker_id)
        self.fleet.remove(worker_id)
        self.directory.remove_worker(number)

    def number_of(self, worker_id: WorkerId) -> int:
        """The worker's number in the directory, for as long as it is here. Raises KeyError."""
        return self.fleet.number_of(worker_id)

    def report(self, worker_id: WorkerId, load: WorkerLoad, now_s: float, fit: LatencyFit | None = None) -> None:
        """A worker's own figures, as of now. Times of calls must not go backwards. Raises KeyError."""
        row = self.fleet.row_of(worker_id)
        info = self.fleet.info_at(row)
        if fit is not None and info.role != "store" and self._costs.observe(info, fit):
            self.fleet.set_costs(row, costs_of(info, self._costs))
        self.fleet.report(row, load, now_s)

    # --- requests ---------------------------------------------------------------------------------

    def matches(self, items: Sequence[DispatchItem]) -> list[Match | None]:
        """For `decide`: of each item, which workers hold how much of it. Together this takes less time than one by one.
        Good until the directory changes. None: nothing is known of it."""
        found: list[Match | None] = [None] * len(items)
        prompts = {index: hints for index, item in enumerate(items) if (hints := self._hints(item)) is not None}
        for index, match in zip(prompts, self.directory.match_each(list(prompts.values())), strict=True):
            found[index] = match
        return found

    def decide(
        self, item: DispatchItem, now_s: float, usable: Flags | None = None, match: Match | None = None
    ) -> Chosen | Refused:
        """Books what it places. `usable`, by row of the fleet's view: the others get nothing. `match`: as `matches`
        found it; else it is looked up."""
        view, outlook, settings = self.fleet.view(), self.fleet.outlook(), self._settings
        rule = settings.admission
        slo = self._slo_of(item)
        was_refused = slo is not None and slo.name in self._refusing
        limits = None if slo is None else limits_of(slo, rule, self.margins.of(slo.name), was_refused=was_refused)
        held, lengths = self._held(item, match)
        if held is not None and not outlook.knows_reading:
            self._note_read(item, held * view.can_read)
        question = Question(
            item=item,
            now_s=now_s,
            answer_tokens=self.fleet.answer_lengths.expected(item.prompt_tokens, item.max_tokens),
            held=held,
            held_lengths=lengths,
            is_kept=held is not None and bool(np.count_nonzero(held * view.keeps)),
            rank=self._rank_of(item, slo),
            tpot_limit_s=None if limits is None else limits.tpot_s,
            usable=usable,
            turn=self._num_decisions,
            rng=self._rng,
        )
        self._asked = _Asked(question, slo, limits, was_refused)
        self._num_decisions += 1
        costs = self._costs
        link = Link(costs.transfer, costs.kv_token_bytes, settings.block_tokens, costs.pairs)
        decision = self._policy(question, view, outlook, link, settings)
        if isinstance(decision, Refused):
            self._loads = _NO_LOADS
            return decision
        self._loads = _loads(decision, view, outlook)
        if slo is not None and limits is not None:
            refused = self._judge(question, decision, limits)
            if refused is not None:
                self._refusing.add(slo.name)
                return refused
            if was_refused and not item.was_accepted:
                self._refusing.discard(slo.name)
        self.fleet.book(item, decision.prefill_row, decision.decode_row, now_s, decision.plan)
        return decision

    def in_words(self, item: DispatchItem, decision: Chosen | Refused, now_s: float) -> Placement | Rejection:
        """The decision as a message, with its reason; to be called right after `decide`."""
        view, asked = self.fleet.view(), self._last()
        if isinstance(decision, Refused):
            return rejection(item, decision, view, asked.question.usable, asked.limits)
        return placement(item, decision, view, self._settings.policy)

    def inputs(self) -> Inputs:
        """What the last decision rested on. A placement's own load is not in it."""
        question, slo, limits, was_refused = self._last()
        pending_tokens, waiting_requests, *answers = self._loads
        return Inputs(
            "" if slo is None else slo.name,
            limits,
            was_refused,
            question.answer_tokens,
            question.held_lengths[-1] if question.held_lengths else 0,
            int(pending_tokens),
            int(waiting_requests),
            *answers,
        )

    # --- inside -----------------------------------------------------------------------------------

    def _slo_of(self, item: DispatchItem) -> SloClass | None:
        slo = self._slos.get(item.slo_class)
        if slo is None and self._default_slo is not None:
            slo = self._slos.get(self._default_slo)
        return slo

    def _rank_of(self, item: DispatchItem, slo: SloClass | None) -> int:
        """How urgent it is where prompts are read by deadline; more priority counts like an earlier one."""
        if not self._rank_targets_s:
            return 0
        settings = self._settings
        target_s = settings.unhurried_s if slo is None else min(slo.ttft_ms / 1e3, settings.unhurried_s)
        return bisect_left(self._rank_targets_s, target_s - settings.priority_s * counted_priority(item.priority))

    def _hints(self, item: DispatchItem) -> Hints | None:
        """Of the blocks of which a worker may make use; None: there is none."""
        most_blocks = (item.prompt_tokens - 1) // self._settings.block_tokens
        num_hints = min(len(item.block_keys) // _HINT.itemsize, most_blocks)
        if num_hints <= 0 or not len(self.fleet):
            return None
        return np.frombuffer(item.block_keys, _HINT, num_hints)

    def _held(self, item: DispatchItem, match: Match | None) -> tuple[HeldBlocks | None, tuple[int, ...]]:
        """As `Question.held`."""
        if match is None:
            hints = self._hints(item)
            match = None if hints is None else self.directory.match(hints)
        if match is None or not match.best:
            return None, ()
        return match.counts[self.fleet.numbers()], match.lengths

    def _note_read(self, item: DispatchItem, held: HeldBlocks) -> None:
        """Where nothing is predicted a placement counts until a report contains it, so that the next turn of a
        conversation would be kept from those who hold it by its own last one. `held` of those that read prompts."""
        most_blocks = int(held.max())
        if not most_blocks:
            return
        block_keys = item.block_keys[: most_blocks * _HINT.itemsize]
        for row in (held == most_blocks).nonzero()[0][:_FEW_HOLDERS].tolist():
            self.fleet.note_held(row, block_keys)

    def _judge(self, question: Question, chosen: Chosen, limits: Limits) -> Refused | None:
        rule, item = self._settings.admission, question.item
        outlook = self.fleet.outlook()
        tpot_now_s = 0.0
        if rule.form == "current" and outlook.knows_writing:
            now = Decoding(outlook.num_decodes, outlook.context_tokens)
            is_mixed = self.fleet.view().is_mixed if outlook.any_mixed else None
            tpot_s = outlook.tpot_s(now, item.prompt_tokens, question.answer_tokens, question.now_s, is_mixed)
            tpot_now_s = float(tpot_s[chosen.decode_row])
        return admit(
            item,
            chosen,
            limits,
            rule,
            tpot_now_s=tpot_now_s,
            answer_s=outlook.pace.answer_s,
            chance=self._rng.random(),
        )

    def _last(self) -> _Asked:
        if self._asked is None:
            raise ValueError("nothing has been decided yet")
        return self._asked


def _loads(chosen: Chosen, view: FleetView, outlook: Outlook) -> tuple[float, ...]:
    """As in `Inputs`."""
    reader, writer = chosen.prefill_row, chosen.decode_row
    pending_tokens, waiting_requests = view.prefill_load_tokens.item(reader), view.waiting_requests.item(reader)
    if chosen.plan is None:
        return pending_tokens, waiting_requests, 0.0, 0.0, 0.0, 0.0
    slot, decoding = outlook.slots.index_at(chosen.plan.begin_s), outlook.decoding
    return (
        pending_tokens,
        waiting_requests,
        outlook.num_decodes.item(writer),
        outlook.context_tokens.item(writer),
        decoding.item(writer, slot, 0),
        decoding.item(writer, slot, 1),
    )


def _rank_targets(slos: Iterable[SloClass], settings: ConductorSettings) -> list[float]:
    """The different TTFT targets, in seconds, rising: a request's rank is the number of those that are shorter. Empty
    where prompts are not read by deadline."""
    if settings.queue_order != "edf":
        return []
    targets_s = {min(slo.ttft_ms / 1e3, settings.unhurried_s) for slo in slos}
    return sorted(targets_s - {settings.unhurried_s})[:_MAX_RANKS]
