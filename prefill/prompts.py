"""A prompt on the prefill side, and those that wait there without blocks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, TransferAborted, WorkerUnavailable

if TYPE_CHECKING:
    from contracts.errors import TandemError
    from contracts.ids import LeaseId
    from contracts.messages import Peer, RequestKey
    from engine.sequence import Sequence


@dataclass(slots=True, kw_only=True, eq=False)
class Prompt:
    """One try of a request on this side."""

    sequence: Sequence
    #: The reader, or None when this worker writes the answer itself.
    reader: Peer | None
    received_s: float
    num_blocks: int
    #: Start of the first step that computed it.
    started_s: float | None = None
    lease_id: LeaseId | None = None
    #: What its offer was last answered with; None: accepted, or not answered yet.
    refusal: TandemError | None = None
    accepted: bool = False
    #: A step is writing its blocks.
    in_step: bool = False
    #: The first token is out and the lease sealed: the engine is done with it.
    sealed: bool = False
    #: It was cancelled or failed while in a step; dropped when that step ends.
    doomed: bool = False

    @property
    def refusal_code(self) -> str:
        """The error code that tells a client why the KV was not taken."""
        if self.refusal is None:
            return TransferAborted.code
        # That the reader did not answer in time says nothing of the request's own deadline.
        return WorkerUnavailable.code if isinstance(self.refusal, DeadlineExceeded) else self.refusal.code


class WaitingPrompts:
    """Prompts without blocks, oldest first; every operation is O(1)."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[RequestKey, Prompt] = OrderedDict()
        #: Tokens of all.
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, prompt: Prompt) -> None:
        self._prompts[prompt.sequence.key] = prompt
        self.num_tokens += len(prompt.sequence.token_ids)

    def first(self) -> Prompt:
        """The oldest; there must be one."""
        return next(iter(self._prompts.values()))

    def discard(self, prompt: Prompt) -> None:
        """Removes it, if it is here."""
        if self._prompts.pop(prompt.sequence.key, None) is not None:
            self.num_tokens -= len(prompt.sequence.token_ids)
