"""What became of the moves of a study."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class MoveTallies:
    """Counts; see `simulator.heap.moves`."""

    #: Answers that went on elsewhere; prompts and preempted answers that changed lines.
    answers: int = 0
    prompts: int = 0
    preempted: int = 0
    #: The destination had no room; or the request ended, or lost its blocks, while it moved.
    refused: int = 0
    overtaken: int = 0
    #: KV blocks that were pulled, also for nothing.
    blocks: int = 0
    #: Requests that the policy wanted to move, by purpose; and why it did not want to move more.
    asked: Counter[str] = field(default_factory=Counter[str])
    not_moved: Counter[str] = field(default_factory=Counter[str])
