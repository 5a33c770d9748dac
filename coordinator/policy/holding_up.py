"""When prompts wait for the workers that write the answers, not for those that read.

A worker keeps the KV that it has read for another one until that takes it, and only so much of it; beyond that it
reads no more prompts. So where answers are short of seats or of blocks prompts are read no faster than answers end, and
their clients wait for the first token although nothing computes. What is read by whom and taken by whom is not followed
one by one; it is a stream through a worker's budget into the room of all writers:

- a prompt can be read when what stands before it on its worker, read or not, is down to that worker's budget;
- the writers take from all readers in turn, first what they have room for, then as their answers end: the answers that
  they write at a time within the duration of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.policy.pairing import is_any

if TYPE_CHECKING:
    from coordinator.policy.fleet_view import Expected, Flags, FleetView, Seconds
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.question import Question


def held_up_s(question: Question, view: FleetView, outlook: Outlook) -> Seconds | None:
    """By row: until the prompt could have the blocks to be read into, however fast its worker reads. None: nobody is
    held up. Pure."""
    before = outlook.untaken_tokens + _ahead_tokens(question, view, outlook)
    above = before - np.minimum(outlook.handoff_tokens, outlook.total_tokens - question.item.prompt_tokens)
    if above.max(initial=0.0) <= 0:
        return None
    wait_s = np.zeros(len(above))
    for readers, writers in zip(view.readers_of_class, view.writers_of_class, strict=True):
        held_up = readers & (above > 0) & np.isfinite(outlook.handoff_tokens)
        if not is_any(held_up) or not is_any(writers):
            continue
        # While these are taken, so are others'.
        taken = above[held_up] * (float(before[readers].sum()) / before[held_up])
        room_tokens, tokens_per_s = _taking(question, outlook, writers)
        wait_s[held_up] = np.maximum(taken - room_tokens, 0.0) / tokens_per_s
    return wait_s


def _ahead_tokens(question: Question, view: FleetView, outlook: Outlook) -> Expected:
    """Of prompts that are not read and that go first."""
    tokens: Expected = view.prefill_load_tokens
    if question.rank == len(outlook.prefill_free_s) - 1:
        return tokens
    own_s, all_s = outlook.queue_s(question.rank, question.now_s), outlook.queue_s(-1, question.now_s)
    ahead: Expected = tokens * (own_s / np.maximum(all_s, 1e-9))
    return ahead


def _taking(question: Question, outlook: Outlook, writers: Flags) -> tuple[float, float]:
    """Of prompts, by all writers: tokens that they have room for, and then so many each second."""
    answer_tokens = outlook.pace.answer_tokens
    prompt_tokens = outlook.pace.prompt_tokens or float(question.item.prompt_tokens)
    whole_tokens = prompt_tokens + answer_tokens
    free_tokens = outlook.free_tokens[writers]
    # Less than one needs is no room.
    room_tokens = float((free_tokens * (free_tokens >= whole_tokens)).sum()) * prompt_tokens / whole_tokens
    in_blocks = outlook.total_tokens[writers] / (prompt_tokens + 0.5 * answer_tokens)
    num_answers = float(np.minimum(outlook.seats[writers], np.maximum(in_blocks, 1.0)).sum())
    return room_tokens, num_answers * prompt_tokens / outlook.pace.answer_s
