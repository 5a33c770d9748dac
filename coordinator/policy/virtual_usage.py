"""How full workers are, counted as if they had to hold more than they do (Llumnix, OSDI'24, section 4.4.1).

**Virtual usage** V of a worker, in KV blocks: what anybody has (answers, prompts, leases, quarantine: all but what is
free or cached), and beside it

- for each priority of which answers run there, its *headroom*: memory kept free so that their batch stays small. The
  paper shares it among the answers of one priority, so it counts once for a worker;
- what the first of those that wait for blocks would take. Those behind it count nothing, or with `queued="all"` all do;
- infinity where a worker is draining: everybody else is emptier.

**Freeness** F = (M - V) / B, with M all blocks and B the answers that run there, at least one: how many blocks each of
them could still get. Times the tokens of a block that is about the number of steps that the worker can go on. Below 0:
more is wanted than there is.

Columns, one row for each worker: a thousand of them take some 0.1 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from contracts.requests import GROWTH_TOKENS, MOST_PRIORITY
from coordinator.policy.fleet_view import count_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from contracts.ids import WorkerId
    from contracts.messages import PriorityUse, WorkerLoad
    from coordinator.policy.fleet_view import Counts, Flags, Seconds

    Blocks = NDArray[np.float64]

#: The priorities that there are (`contracts.requests.counted_priority`), rising: the columns of `UsageView.answers`.
LEVELS = tuple(range(-MOST_PRIORITY, MOST_PRIORITY + 1))
NUM_LEVELS = len(LEVELS)

#: Answers of at least this priority have headroom, unless told otherwise; about what the paper keeps free.
HIGH_PRIORITY = 1
HIGH_HEADROOM_TOKENS = 1600


def high_headroom() -> dict[int, int]:
    """What answers keep free unless told otherwise."""
    return {HIGH_PRIORITY: HIGH_HEADROOM_TOKENS}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRules:
    #: Kept free, by priority: each has that of the highest one here that is not above it; below all of them, none.
    headroom_tokens: Mapping[int, int] = field(default_factory=high_headroom)
    #: Of a worker's blocks: no priority keeps more free. Small pools would be full with one answer.
    max_headroom_share: float = 0.5
    #: Of those that wait for blocks: the first counts, or all.
    queued: Literal["head", "all"] = "head"
    #: What each answer is promised: a worker that cannot give as much to all is short of memory.
    growth_tokens: int = GROWTH_TOKENS


class WorkerUse(NamedTuple):
    """A row of a `UsageView`."""

    worker_id: WorkerId
    total_blocks: int
    #: Free, or cached and nobody's.
    available_blocks: int
    block_tokens: int = 16
    #: Equal numbers: KV means the same; the model is the same, so that tokens can be read again.
    kv_class: int = 0
    model_class: int = 0
    #: Its role reads prompts, writes answers.
    reads: bool = False
    writes: bool = True
    #: It is heard: it may be asked for something, and given something.
    is_up: bool = True
    is_draining: bool = False
    #: It drains, but the answers that it writes stay.
    keeps_answers: bool = False
    priorities: Sequence[PriorityUse] = ()
    preempted_answers: int = 0
    head_blocks: int = 0
    queued_blocks: int = 0
    head_moves: bool = False
    waiting_prompts: int = 0
    queue_s: float = 0.0
    moving_out: int = 0
    moving_in: int = 0
    arriving_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UsageView:
    """Workers (no stores) as their reports tell them, and what was asked of them since. Columns are read-only."""

    worker_ids: tuple[WorkerId, ...]
    total_blocks: Counts
    #: Free, or cached and nobody's.
    available_blocks: Counts
    block_tokens: Counts
    kv_class: Counts
    model_class: Counts
    reads: Flags
    writes: Flags
    is_up: Flags
    is_draining: Flags
    keeps_answers: Flags
    #: `[row, level]`: running answers, and the blocks that they hold; see `LEVELS`.
    answers: Counts
    answer_blocks: Counts
    #: Answers that lost their blocks and wait for them.
    preempted_answers: Counts
    #: What the first of those that wait for blocks would take, and what all of them would.
    head_blocks: Counts
    queued_blocks: Counts
    #: That first one could wait elsewhere: a preempted answer, or a prompt that nobody has begun to read.
    head_moves: Flags
    #: Prompts that nobody has begun to read, and when the worker would have read all that it has.
    waiting_prompts: Counts
    queue_s: Seconds
    #: Requests on their way from and to the worker.
    moving_out: Counts
    moving_in: Counts
    #: What those will take that are to come and that no report contains.
    arriving_blocks: Counts

    def __len__(self) -> int:
        return len(self.worker_ids)


def usage_view(uses: Sequence[WorkerUse]) -> UsageView:
    """These workers, in this order."""
    answers = np.zeros((len(uses), NUM_LEVELS), np.int64)
    blocks = np.zeros((len(uses), NUM_LEVELS), np.int64)
    for row, use in enumerate(uses):
        for priority in use.priorities:
            # Whatever a worker tells: the nearest that there is.
            level = min(max(priority.priority + MOST_PRIORITY, 0), NUM_LEVELS - 1)
            answers[row, level] += priority.answers
            blocks[row, level] += priority.blocks

    columns = dict(zip(WorkerUse._fields, zip(*uses, strict=True), strict=True)) if uses else {}

    def counts(name: str) -> Counts:
        return np.array(columns.get(name, ()), np.int64)

    def flags(name: str) -> Flags:
        return np.array(columns.get(name, ()), np.bool_)

    return UsageView(
        worker_ids=tuple(use.worker_id for use in uses),
        total_blocks=counts("total_blocks"),
        available_blocks=counts("available_blocks"),
        block_tokens=counts("block_tokens"),
        kv_class=counts("kv_class"),
        model_class=counts("model_class"),
        reads=flags("reads"),
        writes=flags("writes"),
        is_up=flags("is_up"),
        is_draining=flags("is_draining"),
        keeps_answers=flags("keeps_answers"),
        answers=answers,
        answer_blocks=blocks,
        preempted_answers=counts("preempted_answers"),
        head_blocks=counts("head_blocks"),
        queued_blocks=counts("queued_blocks"),
        head_moves=flags("head_moves"),
        waiting_prompts=counts("waiting_prompts"),
        queue_s=np.array(columns.get("queue_s", ()), np.float64),
        moving_out=counts("moving_out"),
        moving_in=counts("moving_in"),
        arriving_blocks=counts("arriving_blocks"),
    )


def batches(view: UsageView) -> Counts:
    """B by row: running answers, at least one."""
    counts: Counts = np.maximum(view.answers.sum(axis=1), 1)
    return counts


def headroom_blocks(view: UsageView, rules: UsageRules) -> Blocks:
    """`[row, level]`: what answers of that priority keep free where they run, all of them together."""
    tokens = np.array([headroom_of(level, rules) for level in LEVELS], np.float64)
    blocks: Blocks = np.ceil(tokens[np.newaxis, :] / np.maximum(view.block_tokens, 1)[:, np.newaxis])
    most: Blocks = np.floor(rules.max_headroom_share * view.total_blocks)
    return np.minimum(blocks, most[:, np.newaxis])


def headroom_of(priority: int, rules: UsageRules) -> int:
    """In tokens."""
    nearest = max((known for known in rules.headroom_tokens if known <= priority), default=None)
    return 0 if nearest is None else rules.headroom_tokens[nearest]


def wanted_blocks(view: UsageView, rules: UsageRules) -> Blocks:
    """V by row, as if nobody were draining."""
    headroom: Blocks = (headroom_blocks(view, rules) * (view.answers > 0)).sum(axis=1)
    queued = view.head_blocks if rules.queued == "head" else view.queued_blocks
    held = view.total_blocks - view.available_blocks + view.arriving_blocks
    return held + headroom + queued


def unclaimed(load: WorkerLoad, rules: UsageRules, total_blocks: int, block_tokens: int) -> int:
    """M - V of one worker, in blocks, as if it were not draining: what `wanted_blocks` leaves, without a view."""
    blocks = count_of(load.available_blocks)
    blocks -= count_of(load.head_demand_blocks if rules.queued == "head" else load.queued_demand_blocks)
    if load.priorities and rules.headroom_tokens:
        most = int(rules.max_headroom_share * total_blocks)
        for use in load.priorities:
            tokens = headroom_of(use.priority, rules)
            if use.answers > 0 and tokens:
                blocks -= min(-(-tokens // block_tokens), most)
    return blocks


def virtual_blocks(view: UsageView, rules: UsageRules) -> Blocks:
    """V by row; infinite where a worker is draining."""
    blocks: Blocks = np.where(view.is_draining, np.inf, wanted_blocks(view, rules))
    return blocks


def freeness(view: UsageView, rules: UsageRules) -> Blocks:
    """F by row, in blocks for each answer; minus infinity where a worker is draining."""
    free: Blocks = (view.total_blocks - virtual_blocks(view, rules)) / batches(view)
    return free
