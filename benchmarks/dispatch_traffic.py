"""A fleet and prompts for benchmarks of the coordinator: conversations that share prefixes, and who holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import DispatchItem, LatencyFit, WorkerInfo, WorkerLoad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Hints = NDArray[np.uint64]

BLOCK_TOKENS = 16
#: Prompts of 2,048 to 8,192 tokens.
MIN_BLOCKS, MAX_BLOCKS = 128, 512
#: System prompts, and how many conversations begin with one of them.
NUM_SYSTEM_PROMPTS, SYSTEM_BLOCKS, SYSTEM_SHARE = 20, 64, 0.5
#: Requests that begin like no other.
NEW_SHARE = 0.1
MAX_TOKENS = 256

IDENTITY = KvIdentity(
    model_fingerprint="benchmark",
    layout=BlockLayout(num_layers=80, num_kv_heads=8, head_dim=128, block_tokens=BLOCK_TOKENS, dtype="bfloat16"),
    rope_base=10000.0,
    protocol_version=2,
)
TOTAL_BLOCKS = 65_536


def worker_infos(num_workers: int) -> list[WorkerInfo]:
    """Half of them prefill workers."""
    return [
        WorkerInfo(
            worker_id=WorkerId(f"{'decode' if number % 2 else 'prefill'}-{number // 2}"),
            incarnation=Incarnation(1),
            role="decode" if number % 2 else "prefill",
            address=f"127.0.0.1:{20_000 + number}",
            model="benchmark",
            identity=IDENTITY,
            total_blocks=TOTAL_BLOCKS,
            max_context_tokens=131_072,
            max_batch_tokens=8192,
        )
        for number in range(num_workers)
    ]


def fit(rng: np.random.Generator) -> LatencyFit:
    """Steps of a 70 B model on eight GPUs, give or take what is measured."""
    noise = rng.uniform(0.98, 1.02)
    return LatencyFit(0.01 * noise, 6e-5 * noise, 2e-9 * noise, 0.02 * noise, 1e-4 * noise, 2e-7 * noise, 5000, 5000)


def load(rng: np.random.Generator) -> WorkerLoad:
    """Of a worker that is busy, with room for more."""
    pending, decodes = int(rng.integers(0, 16_384)), int(rng.integers(0, 64))
    return WorkerLoad(
        waiting_requests=pending // 4096,
        pending_prompt_tokens=pending,
        pending_prompt_pairs=pending * 2000.0,
        running_requests=decodes,
        running_decodes=decodes,
        context_tokens=decodes * 4096,
        free_blocks=TOTAL_BLOCKS // 2,
        cached_blocks=TOTAL_BLOCKS // 4,
    )


class Held(NamedTuple):
    """What one worker holds of conversations."""

    worker: int
    hints: Hints


class Traffic:
    """Conversations whose blocks are `num_blocks` altogether, and requests that go on with them."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._system = [self._fresh(SYSTEM_BLOCKS) for _ in range(NUM_SYSTEM_PROMPTS)]
        self.conversations: list[Hints] = []
        left = num_blocks
        while left > 0:
            conversation = self._conversation()
            self.conversations.append(conversation)
            left -= len(conversation) - SYSTEM_BLOCKS
        #: Some conversations go on much more often than others.
        weights = 1.0 / np.arange(1, len(self.conversations) + 1) ** 0.6
        self._shares = np.cumsum(weights) / weights.sum()

    def held_by(self, num_workers: int) -> list[Held]:
        """Each conversation at one prefill worker, or at two or three that have a part of it as well."""
        held: list[Held] = []
        for conversation in self.conversations:
            copies = min(num_workers // 2, int(self._rng.choice([1, 1, 1, 2, 3])))
            readers = self._rng.choice(num_workers // 2, size=copies, replace=False)
            for place, reader in enumerate(readers):
                part = len(conversation) if place == 0 else int(self._rng.integers(1, len(conversation) + 1))
                held.append(Held(2 * int(reader), conversation[:part]))
        return held

    def items(self, count: int, classes: Sequence[str] = ("",)) -> list[DispatchItem]:
        return [self._item(number, classes[number % len(classes)]) for number in range(count)]

    def _item(self, number: int, slo_class: str) -> DispatchItem:
        hints = self._new_prompt() if self._rng.random() < NEW_SHARE else self._next_turn()
        return DispatchItem(
            request_id=RequestId(f"request-{number}"),
            prompt_tokens=len(hints) * BLOCK_TOKENS + int(self._rng.integers(0, BLOCK_TOKENS)),
            max_tokens=MAX_TOKENS,
            slo_class=slo_class,
            block_keys=hints.astype("<u8").tobytes(),
        )

    def _next_turn(self) -> Hints:
        which = int(np.searchsorted(self._shares, self._rng.random()))
        conversation = self.conversations[which]
        known = int(self._rng.integers(len(conversation) // 2, len(conversation) + 1))
        more = int(self._rng.integers(1, MIN_BLOCKS))
        return np.concatenate([conversation[:known], self._fresh(more)])[:MAX_BLOCKS]

    def _new_prompt(self) -> Hints:
        return self._fresh(int(self._rng.integers(MIN_BLOCKS, MAX_BLOCKS + 1)))

    def _conversation(self) -> Hints:
        own = self._fresh(int(self._rng.integers(MIN_BLOCKS, MAX_BLOCKS + 1)))
        if self._rng.random() < SYSTEM_SHARE:
            own[:SYSTEM_BLOCKS] = self._system[int(self._rng.integers(0, NUM_SYSTEM_PROMPTS))]
        return own

    def _fresh(self, count: int) -> Hints:
        return self._rng.integers(1, 2**64, size=count, dtype=np.uint64)
