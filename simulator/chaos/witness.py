"""Sees what no client sees: every token that a worker computes, wanted or not, and every block that a pull or a disk
writes.

The gateway drops what comes of a try that it has given up, and blocks that are written by mistake may be nobody's
just then: a client would notice such a bug once in a thousand trials. Here it counts wherever it happens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvtransfer.ledger import BlockClass
from simulator.engine import expected_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.ids import Attempt, BlockId, RequestId
    from contracts.messages import Peer
    from contracts.requests import TokenDelta
    from engine.plan import SampleSpec, SequenceStep
    from kvtransfer.ledger import Ledger

#: Memory that was given to a pull.
_GIVEN = (BlockClass.RESERVED, BlockClass.QUARANTINED)
#: Memory that stands for somebody.
_HELD = (BlockClass.OWNED, BlockClass.OFFERED)
#: A bug that shows everywhere is told no more often.
MAX_PROBLEMS = 100


class Witness:
    """Implements `simulator.witness.Witness`; `problems` is empty where everything held."""

    def __init__(self, stray_limit_s: float = math.inf) -> None:
        """`stray_limit_s`: how long tokens may come of a request that the gateway has forgotten; infinite where
        a Cancel may be lost."""
        self.problems: list[str] = []
        self._stray_limit_s = stray_limit_s
        #: When the gateway forgot each request, until tokens came too long after.
        self._forgotten_s: dict[RequestId, float] = {}
        #: The right answer of each sequence, by its life and number there.
        self._right: dict[tuple[str, int], list[int]] = {}
        #: Blocks whose bytes were nobody's any more when they were pulled: nothing may be computed from them.
        self._void: dict[tuple[str, BlockId], None] = {}
        #: Output tokens that came, by the life that computed them and the try.
        self._heard: dict[tuple[str, RequestId, Attempt], set[int]] = {}

    def stepped(self, host: str, step: SequenceStep, block_tokens: int, token_id: int | None) -> None:
        first, last = step.start // block_tokens, (step.start + len(step.token_ids) - 1) // block_tokens
        for place, block_id in enumerate(step.block_ids[: last + 1]):
            if place > first or step.start == place * block_tokens:
                self._void.pop((host, block_id), None)
            elif (host, block_id) in self._void:
                self._say(f"{host} reads block {block_id}, which was pulled when its holder had let it go")
        if step.sample is not None and token_id is not None:
            self._check_token(host, step.sequence_id, step.sample, token_id)

    def heard(self, peer: Peer, delta: TokenDelta, now_s: float) -> None:
        life = f"{peer.worker_id}@{peer.incarnation}"
        stray_s = now_s - self._forgotten_s.get(delta.request_id, math.inf)
        if stray_s > self._stray_limit_s:
            self._say(f"{life}: token {delta.index} of {delta.request_id} comes {stray_s:.3f} s after it was forgotten")
            del self._forgotten_s[delta.request_id]
        heard = self._heard.setdefault((life, delta.request_id, delta.attempt), set())
        indices = range(delta.index, delta.index + len(delta.token_ids))
        if not heard.isdisjoint(indices):
            self._say(f"{life}: token {delta.index} of {delta.request_id}, attempt {delta.attempt}, is computed twice")
        heard.update(indices)

    def forgotten(self, request_id: RequestId, now_s: float) -> None:
        self._forgotten_s[request_id] = now_s

    def landed(self, host: str, block_id: BlockId, block_class: BlockClass, source_class: BlockClass) -> None:
        if block_class not in _GIVEN:
            self._say(f"{host}: a pull writes block {block_id}, which is {block_class.name}")
        if source_class in _HELD:
            self._void.pop((host, block_id), None)
        else:
            self._void[host, block_id] = None

    def loaded(self, host: str, block_id: BlockId, block_class: BlockClass, *, is_named: bool) -> None:
        if block_class not in _HELD:
            self._say(f"{host}: the disk writes block {block_id}, which is {block_class.name}")
        if is_named:
            self._say(f"{host}: the disk writes block {block_id}, which has a key already")
        self._void.pop((host, block_id), None)

    def spilled(self, host: str, block_id: BlockId, block_class: BlockClass) -> None:
        if block_class not in _HELD:
            self._say(f"{host}: the disk keeps block {block_id}, which is {block_class.name}")

    def look(self, ledgers: Mapping[str, Ledger]) -> None:
        """At what has a key: whoever asks for it would be given it. By life."""
        for host, block_id in [*self._void]:
            ledger = ledgers.get(host)
            if ledger is None:
                self._void.pop((host, block_id), None)
            elif ledger.key_of(block_id) is not None:
                self._say(f"{host} has named block {block_id}, which was pulled when its holder had let it go")
                self._void.pop((host, block_id), None)

    def _check_token(self, host: str, sequence_id: int, sample: SampleSpec, token_id: int) -> None:
        key = (host, sequence_id)
        right = self._right.get(key)
        if right is None:
            prompt = sample.history[: sample.num_prompt_tokens]
            right = self._right[key] = expected_tokens(prompt, sample.params, sample.params.max_tokens)
        index = sample.output_index
        if token_id != right[index]:
            self._say(f"{host} computes for sequence {sequence_id}: token {index} is {token_id}, not {right[index]}")

    def _say(self, problem: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)
