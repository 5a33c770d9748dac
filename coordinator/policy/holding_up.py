"""When prompts wait for answers to end, not for the worker that reads them.

A worker keeps the KV that it has read for another one until that takes it, and only so much of it; beyond that it
reads no more prompts. So where answers are short of seats or of blocks prompts are read no faster than answers end, and
their clients wait for the first token although nothing computes. What is read by whom and taken by whom is not followed
one by one; it is a stream through a worker's budget into the room of all writers:

- a prompt can be read when what stands before it on its worker, read or not, is down to that worker's budget;
- the writers take from all readers in turn, first what they have room for, then as their answers end: the answers that
  they write at a time within the duration of one.

A mixed worker is its own writer: its prompts wait until its answers have left it a seat and blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from contracts.requests import GROWTH_TOKENS
from coordinator.policy.outlook import Decoding
from coordinator.policy.pairing import is_any

if TYPE_CHECKING:
    from coordinator.policy.fleet_view import Expected, Flags, FleetView, Seconds
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.question import Question


class _Lengths(NamedTuple):
    """Mean tokens of what was placed lately."""

    prompt: float
    answer: float

    @property
    def whole(self) -> float:
        return self.prompt + self.answer


def held_up_s(question: Question, view: FleetView, outlook: Outlook) -> Seconds | None:
    """By row: until the prompt could be read, however fast its worker reads. None: nobody is held up. Pure."""
    # Nearly always so, and quickly seen: even with all prompts ahead of it there is room on every worker.
    if not outlook.any_mixed and not is_any(
        view.prefill_load_tokens > outlook.spare_tokens - question.item.prompt_tokens
    ):
        return None
    ahead = _ahead_tokens(question, view, outlook)
    lengths = _Lengths(outlook.pace.prompt_tokens or float(question.item.prompt_tokens), outlook.pace.answer_tokens)
    wait_s = _until_taken_s(question, view, outlook, ahead, lengths)
    if outlook.any_mixed:
        own_s = _until_ended_s(question, view, outlook, ahead, lengths)
        wait_s = own_s if wait_s is None or own_s is None else np.maximum(wait_s, own_s)
    return wait_s


def _ahead_tokens(question: Question, view: FleetView, outlook: Outlook) -> Expected:
    """Of prompts that are not read and that go first."""
    tokens = view.prefill_load_tokens.astype(np.float64)
    if question.rank == len(outlook.prefill_free_s) - 1:
        return tokens
    own_s, all_s = outlook.queue_s(question.rank, question.now_s), outlook.queue_s(-1, question.now_s)
    ahead: Expected = tokens * (own_s / np.maximum(all_s, 1e-9))
    return ahead


def _until_taken_s(
    question: Question, view: FleetView, outlook: Outlook, ahead: Expected, lengths: _Lengths
) -> Seconds | None:
    """Of prompts that other workers take."""
    before = outlook.untaken_tokens + ahead
    budget = np.minimum(outlook.handoff_tokens, outlook.total_tokens - question.item.prompt_tokens)
    above = before - budget
    if not is_any(above > 0):
        return None
    wait_s = np.zeros(len(above))
    for readers, writers in zip(view.readers_of_class, view.writers_of_class, strict=True):
        held_up = readers & (above > 0) & np.isfinite(outlook.handoff_tokens)
        if not is_any(held_up) or not is_any(writers):
            continue
        # While these are taken, so are others': from each reader as many as it has in the writers' line, which is its
        # budget at most, however many wait behind that.
        in_line = np.minimum(before, budget)
        taken = above[held_up] * (float(in_line[readers].sum()) / np.maximum(in_line[held_up], 1.0))
        room_tokens, answers_per_s = _taking(outlook, writers, lengths)
        num_ends = np.maximum(taken - room_tokens, 0.0) / lengths.prompt
        wait_s[held_up] = _prudent(num_ends) / answers_per_s
    return wait_s


def _taking(outlook: Outlook, writers: Flags, lengths: _Lengths) -> tuple[float, float]:
    """Tokens of prompts that all writers have room for, and the answers of theirs that end each second."""
    free_tokens = outlook.free_tokens[writers]
    # What is left beside offers that wait is kept for what is there already; and less than one needs is no room.
    is_room = (free_tokens >= lengths.whole) & (outlook.waiting_offers[writers] == 0)
    room_tokens = float((free_tokens * is_room).sum()) * lengths.prompt / lengths.whole
    num_answers = float(_num_places(outlook, lengths)[writers].sum())
    return room_tokens, num_answers / outlook.pace.answer_s


def _until_ended_s(
    question: Question, view: FleetView, outlook: Outlook, ahead: Expected, lengths: _Lengths
) -> Seconds | None:
    """On mixed workers."""
    num_places = _num_places(outlook, lengths)
    num_ends = (outlook.num_decodes + ahead / lengths.prompt + 1.0 - num_places) * view.is_mixed
    if num_ends.max(initial=0.0) <= 0:
        return None
    token_s = outlook.token_s(Decoding(outlook.num_decodes, outlook.context_tokens), question.now_s, view.is_mixed)
    wait_s: Seconds = _prudent(np.maximum(num_ends, 0.0)) * (token_s * lengths.answer / num_places)
    return wait_s


def _num_places(outlook: Outlook, lengths: _Lengths) -> Expected:
    """Answers that a worker can write at a time: it has seats for them, and blocks for all that they have grown to and
    soon will, half of their length on average."""
    held_tokens = lengths.prompt + min(lengths.answer, 0.5 * lengths.answer + GROWTH_TOKENS)
    return np.minimum(outlook.seats, np.maximum(outlook.total_tokens / held_tokens, 1.0))


def _prudent(num_ends: Expected) -> Expected:
    """How many answers would have ended on average when so many have for all but one in forty: they end at random."""
    longer: Expected = num_ends + 2.0 * np.sqrt(num_ends)
    return longer
