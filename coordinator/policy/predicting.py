"""What is expected of a request with a reader and a writer, and the decision made of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.messages import Predicted
from coordinator.decision import Chosen, Plan
from coordinator.policy.writing import writing_at

if TYPE_CHECKING:
    from coordinator.policy.fleet_view import FleetView
    from coordinator.policy.outlook import Outlook, Writing
    from coordinator.policy.pairing import Pair
    from coordinator.policy.question import Question
    from coordinator.policy.reading import Prompt, Reading
    from coordinator.policy.sources import Link


class Ahead:
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


def handoff_wait_s(
    question: Question, link: Link, kv_token_bytes: int, read_s: float, last_tokens: int, held_blocks: int
) -> float:
    """From the first token to the second: KV is pulled while later chunks compute, so either the last chunk's alone is
    late, or the link is slower than the computation. `held_blocks`: of its writer, which do not move."""
    moved_tokens = question.item.prompt_tokens - held_blocks * link.block_tokens
    whole_s = link.transfer.transfer_s(moved_tokens * kv_token_bytes, 1)
    last_s = link.transfer.transfer_s(min(last_tokens, moved_tokens) * kv_token_bytes, 1)
    return max(last_s, whole_s - read_s)


def chosen(
    question: Question, view: FleetView, outlook: Outlook, link: Link, best: Pair, ahead: Ahead | None
) -> Chosen:
    held_blocks = question.held_by(best.reader)
    is_handed_over = best.reader != best.writer
    decode_blocks = question.held_by(best.writer) if is_handed_over else 0
    if ahead is None:
        return Chosen(best.reader, best.writer, held_blocks, decode_blocks=decode_blocks)
    reading = ahead.reading(best.reader)
    queue_s, _, fetch_wait_s, read_s, work_s, last_tokens, way = reading
    plan = Plan(question.rank, work_s, ahead.begin_s(best.reader))
    if way.source is not None:
        fetched_s, replica_s = question.now_s + way.fetch_s, ahead.prompt.replica_s(best.reader, way)
        plan = plan._replace(source_row=way.source.row, fetched_s=fetched_s, replica_s=replica_s)
    predicted = None
    if outlook.knows_writing:
        tpot_s = ahead.writing(best.reader).tpot_s.item(best.writer)
        if is_handed_over:
            token_bytes = ahead.prompt.kv_token_bytes(outlook.read_group.item(best.reader))
            wait_s = handoff_wait_s(question, link, token_bytes, read_s, last_tokens, decode_blocks)
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
    return Chosen(
        best.reader,
        best.writer,
        held_blocks,
        plan.source_row,
        way.source_blocks,
        predicted,
        plan,
        decode_blocks,
        way.is_withheld,
    )
