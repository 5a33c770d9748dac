"""The dispatch policies by name. Each is a pure function: who is there, what is expected of them and the question in,
rows out; it books nothing.

- `random`, `round_robin`: for comparison.
- `least_loaded`: fewest prompt tokens not yet computed; fewest context tokens held. What is placed counts at once, else
  a burst would land on one worker.
- `freeness`: the answer goes where each answer has most memory left, virtual usage counted, as in Llumnix
  (`coordinator.policy.virtual_usage`); a prompt that another worker reads goes where the fewest tokens wait.
- `prefix_only`: the shortest predicted TTFT, each worker with the prefixes that it holds itself.
- `ttft_min`: the same, and prefixes are fetched from other workers and from stores where that is worth it (see
  `coordinator.policy.sources`).

Ties go to the smaller worker id, so that one view always gives one answer. Where nothing is known of what steps cost,
a prompt's wait is counted in tokens instead (`coordinator.policy.unpriced`).

**Mixed workers beside others** (conditional disaggregation): a mixed worker keeps the prompts that it reads, which
saves the handoff; but its answers are slowed by all prompts that it reads. There the policies compare when the answers
would end, relative to each other: TTFT, the handoff as far as it is waited for, and the seconds that all tokens of the
answer take longer than on the best worker. Who misses the request's TPOT target comes after those who meet it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.decision import Chosen
from coordinator.policy.pairing import fewest_wishes_dropped, is_any, least, most, pair
from coordinator.policy.predicting import Ahead, chosen, handoff_wait_s
from coordinator.policy.question import candidates, refused
from coordinator.policy.reading import Prompt
from coordinator.policy.sources import rules_of
from coordinator.policy.unpriced import TokenCounts
from coordinator.policy.writing import choose_writer, holding_most, writing_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.config import DispatchPolicyName
    from coordinator.decision import Refused
    from coordinator.policy.fleet_view import Flags, FleetView, Seconds
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.pairing import Pair, Pick, PickWriter
    from coordinator.policy.question import Candidates, HeldBlocks, Question
    from coordinator.policy.settings import ConductorSettings
    from coordinator.policy.sources import FetchRules, Link

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


def freeness(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    each: Seconds = view.unclaimed_tokens / np.maximum(view.num_answers, 1)

    def pick(rows: Flags) -> int:
        # Whoever only reads has no answers.
        mixed = rows & view.is_mixed
        return most(each, mixed) if is_any(mixed) else least(view.prefill_load_tokens, rows)

    return _by_pick(question, view, outlook, link, settings, pick, lambda rows: most(each, rows))


def prefix_only(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    return _by_ttft(question, view, outlook, link, settings, None)


def ttft_min(
    question: Question, view: FleetView, outlook: Outlook, link: Link, settings: ConductorSettings
) -> Chosen | Refused:
    return _by_ttft(question, view, outlook, link, settings, rules_of(settings))


POLICIES: dict[DispatchPolicyName, Policy] = {
    "random": random,
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "freeness": freeness,
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
        return refused(question, view, found, settings.limits)
    ahead = None
    if outlook.knows_reading:
        ahead = Ahead(question, view, outlook, Prompt(question, view, outlook, link, None))
    return chosen(question, view, outlook, link, best, ahead)


# --- by prediction ------------------------------------------------------------------------------------


def _by_ttft(
    question: Question,
    view: FleetView,
    outlook: Outlook,
    link: Link,
    settings: ConductorSettings,
    rules: FetchRules | None,
) -> Chosen | Refused:
    """`rules` None: nothing is fetched."""
    found = candidates(question, view, settings.limits)
    if not outlook.knows_reading:
        return _by_tokens(question, view, outlook, link, settings, rules, found)
    prompt = Prompt(question, view, outlook, link, rules)
    ahead = Ahead(question, view, outlook, prompt)
    order = prompt.reach_s()
    if outlook.any_mixed and outlook.knows_writing and found.open_readers.any():
        order = order + _rest_s(question, view, outlook, link, found, prompt, order)

    def writer(reader: int, writers: Flags) -> int:
        if not outlook.knows_writing:
            return _least_loaded_writer(question, view, found, writers)
        return choose_writer(question, view, found, ahead.writing(reader), writers, settings.decode)

    best = _pair_within_bound(question, view, link, settings, found, lambda rows: least(order, rows), writer)
    if best is None:
        return refused(question, view, found, settings.limits)
    return chosen(question, view, outlook, link, best, ahead)


def _by_tokens(
    question: Question,
    view: FleetView,
    outlook: Outlook,
    link: Link,
    settings: ConductorSettings,
    rules: FetchRules | None,
    found: Candidates,
) -> Chosen | Refused:
    """The fewest tokens to compute before the prompt is read: others' and its own."""
    counts = TokenCounts(question, view, outlook, link, rules)
    order = view.prefill_load_tokens + counts.to_read()

    def writer(reader: int, writers: Flags) -> int:
        return _least_loaded_writer(question, view, found, writers)

    best = _pair_within_bound(question, view, link, settings, found, lambda rows: least(order, rows), writer)
    if best is None:
        return refused(question, view, found, settings.limits)
    source = counts.source(best.reader)
    return Chosen(
        best.reader,
        best.writer,
        question.held_by(best.reader),
        -1 if source is None else source.row,
        0 if source is None else source.blocks,
        decode_blocks=question.held_by(best.writer),
    )


def _least_loaded_writer(question: Question, view: FleetView, found: Candidates, writers: Flags) -> int:
    """Of these; where nothing is known of what their steps take."""
    writers = fewest_wishes_dropped(question, view, found, writers)
    return holding_most(question, view.decode_load_tokens, least(view.decode_load_tokens, writers), writers)


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
        readers = (outlook.read_group == number) & view.can_read & ~view.is_mixed
        if writers.any():
            by_reader[readers] = tpot_s[writers].min()
        if readers.any():
            # What each holds matters little here.
            reading = prompt.at(int(readers.argmax()))
            token_bytes = prompt.kv_token_bytes(number)
            handoff_s[readers] = handoff_wait_s(question, link, token_bytes, reading.read_s, reading.last_tokens, 0)
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
