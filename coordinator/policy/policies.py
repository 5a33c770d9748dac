"""The dispatch policies by name. Each is a pure function: who is there, what is expected of them and the question in,
rows out; it books nothing.

- `random`, `round_robin`: for comparison.
- `least_loaded`: fewest prompt tokens not yet computed; fewest context tokens held. What is placed counts at once, else
  a burst would land on one worker.
- `prefix_only`: the shortest predicted TTFT, each worker with the prefixes that it holds itself.
- `ttft_min`: the same, and prefixes are fetched from other workers where that is worth it (see
  `coordinator.policy.reading`).

Ties go to the smaller worker id, so that one view always gives one answer. Where nothing is known of what steps cost,
a prompt's wait is counted in tokens instead, and nothing is fetched.

**Mixed workers beside others** (conditional disaggregation): a mixed worker keeps the prompts that it reads, which
saves the handoff; but its answers are slowed by all prompts that it reads. There the policies compare when the answers
would end, relative to each other: TTFT, the handoff as far as it is waited for, and the seconds that all tokens of the
answer take longer than on the best worker. Who misses the request's TPOT target comes after those who meet it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.messages import Predicted
from coordinator.decision import Chosen, Plan
from coordinator.policy.pairing import fewest_wishes_dropped, least, pair
from coordinator.policy.question import candidates, refused
from coordinator.policy.reading import Link, Prompt
from coordinator.policy.writing import choose_writer, writing_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.config import DispatchPolicyName
    from coordinator.decision import Refused
    from coordinator.policy.fleet_view import Flags, FleetView, Seconds
    from coordinator.policy.outlook import Outlook, Writing
    from coordinator.policy.pairing import Pair, Pick, PickWriter
    from coordinator.policy.question import Candidates, HeldBlocks, Question
    from coordinator.policy.reading import Reading
    from coordinator.policy.settings import ConductorSettings

    Policy = Callable[[Question, FleetView, Outlook, Link, ConductorSettings], Chosen | Refused]

#: More than any prediction: comes after everybody who does not have it.
_MISSES_TARGET_S = 1e9


def random(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    """Any reader, any writer."""

    def pick(rows: Flags) -> int:
        return int(question.rng.choice(rows.nonzero()[0]))

    return _by_pick(question, view, outlook, link, settings, pick, pick)


def round_robin(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    """Readers take turns, and so do writers."""

    def pick(marked: Flags) -> int:
        rows = marked.nonzero()[0]
        return int(rows[question.turn % len(rows)])

    return _by_pick(question, view, outlook, link, settings, pick, pick)


def least_loaded(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    return _by_pick(
        question,
        view,
        outlook,
        link,
        settings,
        lambda rows: least(view.prefill_load_tokens, rows),
        lambda rows: least(view.decode_load_tokens, rows),
    )


def prefix_only(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    return _by_ttft(question, view, outlook, link, settings, None)


def ttft_min(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    return _by_ttft(question, view, outlook, link, settings, settings.fetch_ratio)


POLICIES: dict[DispatchPolicyName, Policy] = {
    "random": random,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "prefix_only": prefix_only,
    "ttft_min": ttft_min,
}


# --- by load, or by nothing ---------------------------------------------------------------------------


def _by_pick(
    question: Question,
    view: FleetView,
    outlook: Outlook,
    link: Link,
    settings: ConductorSettings,
    pick: Pick,
    pick_writer: Pick,
) -> Chosen | Refused:
    found = candidates(question, view, settings.limits)

    def writer(reader: int, writers: Flags) -> int:
        return pick_writer(fewest_wishes_dropped(question, view, found, writers))

    best = pair(view, found, found.open_readers, pick, writer)
    if best is None:
        return refused(question, found, settings.limits)
    ahead = None
    if outlook.knows_reading:
        ahead = _Ahead(question, view, outlook, Prompt(question, view, outlook, link, None))
    return _chosen(question, view, outlook, link, best, ahead)


# --- by prediction ------------------------------------------------------------------------------------


def _by_ttft(
    question: Question,
    view: FleetView,
    outlook: Outlook,
    link: Link,
    settings: ConductorSettings,
    fetch_ratio: float | None,
) -> Chosen | Refused:
    found = candidates(question, view, settings.limits)
    if not outlook.knows_reading:
        return _by_tokens(question, view, outlook, link, settings, found)
    prompt = Prompt(question, view, outlook, link, fetch_ratio)
    ahead = _Ahead(question, view, outlook, prompt)
    order = prompt.reach_s()
    if outlook.any_mixed and outlook.knows_writing and found.open_readers.any():
        order = order + _rest_s(question, view, outlook, link, found, prompt, order)

    def writer(reader: int, writers: Flags) -> int:
        if not outlook.knows_writing:
            return least(view.decode_load_tokens, fewest_wishes_dropped(question, view, found, writers))
        return choose_writer(question, view, found, ahead.writing(reader), writers, settings.decode)

    best = _pair_within_bound(question, view, link, settings, found, lambda rows: least(order, rows), writer)
    if best is None:
        return refused(question, found, settings.limits)
    return _chosen(question, view, outlook, link, best, ahead)


def _by_tokens(
    question: Question,
    view: FleetView,
    outlook: Outlook,
    link: Link,
    settings: ConductorSettings,
    found: Candidates,
) -> Chosen | Refused:
    """The fewest tokens to compute before the prompt is read: others' and its own."""
    order = view.prefill_load_tokens
    if question.held is not None:
        order = order - question.held * link.block_tokens

    def writer(reader: int, writers: Flags) -> int:
        return least(view.decode_load_tokens, fewest_wishes_dropped(question, view, found, writers))

    best = _pair_within_bound(question, view, link, settings, found, lambda rows: least(order, rows), writer)
    return Chosen(*best[:2], question.held_by(best.reader)) if best else refused(question, found, settings.limits)


def _pair_within_bound(
    question: Question,
    view: FleetView,
    link: Link,
    settings: ConductorSettings,
    found: Candidates,
    pick: Pick,
    pick_writer: PickWriter,
) -> Pair | None:
    """Leaves out mixed workers with more of the prompt to compute than operators let them, as long as others can have
    it."""
    allowed = found.open_readers
    if settings.local_prefill_tokens:
        held: HeldBlocks | int = 0 if question.held is None else question.held
        new_tokens = question.item.prompt_tokens - held * link.block_tokens
        allowed = allowed & ~(view.is_mixed & (new_tokens > settings.local_prefill_tokens))
    best = pair(view, found, allowed, pick, pick_writer)
    if settings.local_prefill_tokens and (best is None or best.num_avoided):
        anybody = pair(view, found, found.open_readers, pick, pick_writer)
        if best is None or (anybody is not None and anybody.num_avoided < best.num_avoided):
            return anybody
    return best


def _rest_s(
    question: Question,
    view: FleetView,
    outlook: Outlook,
    link: Link,
    found: Candidates,
    prompt: Prompt,
    reach_s: Seconds,
) -> Seconds:
    """By reader: what comes after its first token, relative to the best; see the module."""
    tpot_s = writing_at(question, view, outlook, question.now_s + float(reach_s[found.open_readers].min())).tpot_s
    by_reader = np.full(len(tpot_s), np.inf)
    by_reader[view.is_mixed] = tpot_s[view.is_mixed]
    handoff_s = np.zeros(len(tpot_s))
    for number, group in enumerate(outlook.read_groups):
        writers = found.fits & view.writers_of_class[group.kv_class]
        readers = (outlook.read_group == number) & ~view.is_mixed
        if writers.any():
            by_reader[readers] = tpot_s[writers].min()
        if readers.any():
            # What each holds matters little here.
            reading = prompt.at(int(readers.argmax()))
            token_bytes = prompt.kv_token_bytes(number)
            handoff_s[readers] = _handoff_wait_s(question, link, token_bytes, reading.read_s, reading.last_tokens)
    best_s = float(by_reader[found.open_readers].min())
    if not np.isfinite(best_s):
        return np.zeros(len(tpot_s))
    num_later = max(question.answer_tokens - 1.0, 0.0)
    # Who has no writer stays last, also where there is nothing to write.
    slower_s = np.multiply(by_reader - best_s, num_later, out=by_reader.copy(), where=np.isfinite(by_reader))
    rest_s: Seconds = handoff_s + slower_s
    if question.tpot_limit_s is not None:
        rest_s = rest_s + _MISSES_TARGET_S * (by_reader > question.tpot_limit_s)
    return rest_s


# --- what is predicted --------------------------------------------------------------------------------


class _Ahead:
    """What is expected with each reader, looked at once."""

    def __init__(self, question: Question, view: FleetView, outlook: Outlook, prompt: Prompt) -> None:
        self._question = question
        self._view = view
        self._outlook = outlook
        self.prompt = prompt
        self._readings: dict[int, Reading] = {}
        self._writings: dict[int, Writing] = {}

    def reading(self, reader: int) -> Reading:
        reading = self._readings.get(reader)
        if reading is None:
            reading = self._readings[reader] = self.prompt.at(reader)
        return reading

    def writing(self, reader: int) -> Writing:
        """When the answer of a prompt read there begins."""
        writing = self._writings.get(reader)
        if writing is None:
            begin_s = self.begin_s(reader)
            is_held_up = self.reading(reader).held_up_s > 0
            writing = self._writings[reader] = writing_at(
                self._question, self._view, self._outlook, begin_s, is_held_up=is_held_up
            )
        return writing

    def begin_s(self, reader: int) -> float:
        """When it does. Who is held up beyond what is looked ahead to counts as if he were not: his answer is one of
        many then that nobody can tell apart, and all that matters is that each writer gets its part of them."""
        reading = self.reading(reader)
        begin_s = self._question.now_s + reading.reach_s
        return begin_s - reading.held_up_s if begin_s >= self._outlook.slots.end_s else begin_s


def _handoff_wait_s(question: Question, link: Link, kv_token_bytes: int, read_s: float, last_tokens: int) -> float:
    """From the first token to the second: KV is pulled while later chunks compute, so either the last chunk's alone is
    late, or the link is slower than the computation."""
    whole_s = link.transfer.transfer_s(question.item.prompt_tokens * kv_token_bytes, 1)
    last_s = link.transfer.transfer_s(last_tokens * kv_token_bytes, 1)
    return max(last_s, whole_s - read_s)


def _chosen(
    question: Question, view: FleetView, outlook: Outlook, link: Link, best: Pair, ahead: _Ahead | None
) -> Chosen:
    held_blocks = question.held_by(best.reader)
    if ahead is None:
        return Chosen(best.reader, best.writer, held_blocks)
    reading = ahead.reading(best.reader)
    queue_s, _, fetch_wait_s, read_s, work_s, last_tokens, way = reading
    is_handed_over = best.reader != best.writer
    plan = Plan(question.rank, work_s, ahead.begin_s(best.reader))
    if way.source_blocks:
        source = ahead.prompt.source(int(view.kv_class[best.reader]))
        if source is not None:
            plan = plan._replace(source_row=source.row, fetched_s=question.now_s + way.fetch_s)
    predicted = None
    if outlook.knows_writing:
        tpot_s = ahead.writing(best.reader).tpot_s.item(best.writer)
        if is_handed_over:
            token_bytes = ahead.prompt.kv_token_bytes(outlook.read_group.item(best.reader))
            wait_s = _handoff_wait_s(question, link, token_bytes, read_s, last_tokens)
            tpot_s += wait_s / max(question.answer_tokens - 1.0, 1.0)
        waited_s = question.item.waited_s
        predicted = Predicted(
            waited_s=waited_s,
            queue_s=queue_s,
            transfer_s=fetch_wait_s,
            prefill_s=read_s,
            ttft_s=waited_s + reading.reach_s,
            tpot_s=tpot_s,
        )
    return Chosen(best.reader, best.writer, held_blocks, plan.source_row, way.source_blocks, predicted, plan)
