"""What a capacity study found: one row a request, weighted gaps between tokens, and what each worker did.

All arrays of `RequestColumns` have one element for each request, in order of arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from simulator.heap.histogram import Histogram
from simulator.heap.move_tallies import MoveTallies

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from contracts.control_messages import Operation
    from contracts.messages import Role
    from simulator.heap.spec import StudySpec


class Outcome(IntEnum):
    FINISHED = 0
    #: Refused by the dispatch policy or by a full queue.
    REJECTED = 1
    #: Not finished within the spec's time-out.
    TIMED_OUT = 2
    #: Outgrew every worker, as a live one would answer with `no_capacity` in the midst.
    FAILED = 3


#: Why a request was refused: words of `coordinator.decision.RefusedWhy`, and the full queue of a worker.
REFUSALS: tuple[str, ...] = ("too_long", "no_prefill", "no_decode", "full", "ttft", "tpot", "queue")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestColumns:
    """Times are seconds since the start of the study; NaN where a request did not come so far."""

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    #: Values of `Outcome`.
    outcome: NDArray[np.int8]
    #: Rows of `StudyResult.workers`; -1 where it was never placed.
    prefill_worker: NDArray[np.int32]
    decode_worker: NDArray[np.int32]
    #: Its first step began.
    started_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    second_token_s: NDArray[np.float64]
    finished_s: NDArray[np.float64]
    #: Sum of its pulls on the wire.
    transfer_s: NDArray[np.float32]
    preemptions: NDArray[np.int16]
    #: Index into `StudyResult.slo_classes`.
    slo_class: NDArray[np.int16]
    #: What the coordinator expected when it decided last; NaN where it did not say.
    predicted_ttft_s: NDArray[np.float64]
    predicted_tpot_s: NDArray[np.float64]
    #: Prompt tokens that were not computed, for their KV stood in the worker's prefix cache, those included that were
    #: copied there for it; how many were copied, and the seconds from asking for them to having them.
    cached_tokens: NDArray[np.int32]
    fetched_tokens: NDArray[np.int32]
    fetch_s: NDArray[np.float32]
    #: Index into `REFUSALS` of the last refusal; -1: never.
    refusal: NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUsage:
    """What one worker did."""

    worker_id: str
    role: Role
    #: Steps ran for so long in all.
    busy_s: float
    steps: int
    #: Prompt tokens computed, recomputation included, and answer tokens written.
    prefill_tokens: int
    decode_tokens: int
    #: Prompt tokens found in its prefix cache, and KV blocks copied into that from other workers.
    cached_tokens: int
    fetched_blocks: int
    peak_blocks: int
    #: Time-weighted mean of blocks that were not free.
    mean_blocks: float
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLine:
    """Samples every `StudySpec.sample_interval_s`, for plots."""

    at_s: NDArray[np.float64]
    #: Prompts waiting or being read, over all workers; answers being written; of them preempted.
    prompts: NDArray[np.int32]
    answers: NDArray[np.int32]
    preempted: NDArray[np.int32]
    #: Share of prefill's and of decode's time spent in steps since the last sample; mixed workers count in both.
    prefill_busy: NDArray[np.float32]
    decode_busy: NDArray[np.float32]
    #: Load as Mooncake defines it, in parts of the study's strictest targets, mean over a pool's workers: the seconds
    #: of reading that are left, and the next step of the answers. NaN without targets.
    prefill_load: NDArray[np.float32]
    decode_load: NDArray[np.float32]
    #: Share of all KV blocks that were not free.
    blocks_used: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    spec: StudySpec
    requests: RequestColumns
    #: Names by `RequestColumns.slo_class`.
    slo_classes: tuple[str, ...]
    #: Gaps between the tokens of an answer, the one behind the handoff included; seconds.
    itl_s: Histogram
    workers: tuple[WorkerUsage, ...]
    time_line: TimeLine
    #: KV of prompts that went to their decode workers, of prefixes that prefill workers fetched, and of what the store
    #: took.
    transfer_bytes: int
    fetched_bytes: int
    stored_bytes: int
    #: Virtual seconds from the start to the end of the last request.
    duration_s: float
    #: Popped from the heap; and engine steps, those taken in closed form included.
    num_events: int
    num_steps: int
    #: KV of answers that went on at other workers, what became of all moves, and how long answers stood still for them.
    moved_bytes: int = 0
    moves: MoveTallies = field(default_factory=MoveTallies)
    move_pause_s: Histogram = field(default_factory=Histogram)
    #: Seconds that workers were there for, starts and drains included, over all.
    worker_s: float = 0.0
    #: When the autoscaler began which operation.
    operations: tuple[tuple[float, Operation], ...] = ()
