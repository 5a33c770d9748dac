"""One request in a study: a plain record; each part of the study writes its own fields."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING

from gateway.replay import History

if TYPE_CHECKING:
    from contracts.errors import NoCapacity
    from contracts.messages import Predicted, PrefixPlan
    from engine.compose import Candidate
    from engine.room import Demand
    from simulator.heap.moves import Move
    from simulator.heap.store import Holder
    from simulator.heap.wires import Flow
    from simulator.heap.worker import Worker


#: Of a request that nothing has happened to yet.
NEW = History()


class PromptStage(IntEnum):
    """Where it is on the prefill side."""

    ABSENT = 0
    #: Accepted; its prefix is on its way from another worker.
    FETCHING = 1
    #: Accepted, without blocks.
    WAITING = 2
    #: Has its blocks; its first token is not sampled.
    READING = 3
    #: Read; its blocks stay until the reader has taken them.
    SEALED = 4


class AnswerStage(IntEnum):
    """Where it is on the decode side."""

    ABSENT = 0
    #: Offered, without blocks.
    OFFERED = 1
    #: Blocks are reserved, KV is on its way.
    PULLING = 2
    #: Has blocks, and a token to compute.
    RUNNING = 3
    #: Lost its blocks; will be read again.
    PREEMPTED = 4
    #: Written no more by the worker that it leaves, not yet by the one that it goes to.
    MOVING = 5


class Request:
    """Mutable. Times are virtual seconds; NaN until they come."""

    __slots__ = (
        "admitted_as",
        "announced_blocks",
        "answer_demand",
        "answer_stage",
        "arrival_s",
        "block_keys",
        "cached_tokens",
        "candidate",
        "counted_tokens",
        "deadline_s",
        "decode",
        "doomed",
        "due_s",
        "fetch_from",
        "fetch_hash_blocks",
        "fetch_s",
        "fetch_since_s",
        "fetched_tokens",
        "finish_step",
        "finished_s",
        "first_token_s",
        "flow",
        "hands_over",
        "hash_ids",
        "held_blocks",
        "history",
        "in_step",
        "last_token_s",
        "membership",
        "move",
        "num_blocks",
        "num_computed",
        "num_moves",
        "num_refusals",
        "num_steps_in_flight",
        "num_written",
        "offset",
        "output_tokens",
        "over",
        "predicted",
        "preemptions",
        "prefill",
        "prefix_plan",
        "priority",
        "prompt_demand",
        "prompt_stage",
        "prompt_tokens",
        "pulled_blocks",
        "received_s",
        "refusal",
        "refused_why",
        "row",
        "sealed",
        "second_token_s",
        "sequence_id",
        "slo_class",
        "started_s",
        "tenant",
        "tpot_target_s",
        "transfer_s",
        "was_accepted",
    )

    def __init__(self, row: int, arrival_s: float, prompt_tokens: int, output_tokens: int, deadline_s: float) -> None:
        """`output_tokens`: what the answer will have, the context's end minded."""
        self.row = row
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.deadline_s = deadline_s
        #: What its client says of it; `due_s`: when its first token should be there, None without a target.
        self.slo_class = ""
        self.tenant = ""
        self.priority = 0
        self.due_s: float | None = None
        self.tpot_target_s: float | None = None
        #: Of the full blocks of its prompt: the workload's ids, and what the coordinator is told of them.
        self.hash_ids: tuple[int, ...] = ()
        self.block_keys = b""
        #: It is not refused for its targets.
        self.was_accepted = False
        #: Finished, or given up: whatever is still on its way about it is of no interest.
        self.over = False
        #: What its client was told so far.
        self.num_refusals = 0
        #: What its gateway knows of it: tries, and the worker without room for it.
        self.history = NEW
        self.refusal: tuple[Worker, NoCapacity] | None = None
        #: Why it was refused last: a word of `simulator.heap.results.REFUSALS`, empty where it never was.
        self.refused_why = ""
        #: What the coordinator expected when it decided last.
        self.predicted: Predicted | None = None
        self.prefill: Worker | None = None
        self.decode: Worker | None = None
        self.started_s = math.nan
        self.first_token_s = math.nan
        self.second_token_s = math.nan
        self.finished_s = math.nan
        self.transfer_s = 0.0
        self.preemptions = 0
        #: On its way to another worker.
        self.move: Move | None = None
        #: Times that it went on, or waited on, at another worker.
        self.num_moves = 0

        # The prefill side.
        self.prompt_stage = PromptStage.ABSENT
        self.received_s = math.nan
        #: Of the prompt.
        self.num_blocks = 0
        #: What its placement says of its prefix; that is fetched from another worker, up to that hash block; and what
        #: came of it.
        self.prefix_plan: PrefixPlan | None = None
        self.fetch_from: Holder | None = None
        self.fetch_hash_blocks = 0
        self.fetch_since_s = math.nan
        self.fetch_s = 0.0
        self.fetched_tokens = 0
        #: What stood in the worker's cache when it got its blocks.
        self.cached_tokens = 0
        #: So many of its tokens its worker does not count as pending any more.
        self.counted_tokens = 0
        #: Another worker gets the KV.
        self.hands_over = False
        self.prompt_demand: Demand | None = None
        #: Its number among the prompts that got blocks at this worker.
        self.admitted_as = 0
        #: What is not part of any step yet; None when everything is.
        self.candidate: Candidate | None = None
        self.num_steps_in_flight = 0

        # The handoff.
        self.answer_stage = AnswerStage.ABSENT
        self.answer_demand: Demand | None = None
        #: Final blocks that the reader knows of, and those that it has.
        self.announced_blocks = 0
        self.pulled_blocks = 0
        #: The reader has heard that the prompt is read.
        self.sealed = False
        self.flow: Flow | None = None

        # The sequence: its id at the worker where it is, tokens written, and those whose KV is computed while it is
        # read, on either side.
        self.sequence_id = 0
        self.num_written = 0
        self.num_computed = 0
        self.held_blocks = 0
        #: When its last token was sampled.
        self.last_token_s = math.nan
        #: On the decode side: in the step under way, outside of the lockstep group.
        self.in_step = False
        #: Given up during a step; dropped when that ends.
        self.doomed = False
        #: As a member of `Lockstep`: its length less the steps done, the step it ends with, and a number that
        #: changes whenever it joins or leaves.
        self.offset = 0
        self.finish_step = 0
        self.membership = 0

    def __repr__(self) -> str:
        return (
            f"<request {self.row} [{self.prompt_tokens}+{self.num_written}/{self.output_tokens} tokens, "
            f"{self.prompt_stage.name} {self.answer_stage.name}]>"
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far; not up to date while it is a member of a lockstep group."""
        return self.prompt_tokens + self.num_written
