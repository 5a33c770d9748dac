"""The seam between leases and bytes: register memory, describe it, pull blocks, say when nothing can land.

A transport knows blocks as equal pieces of one registered pool, not what they hold. The one promise all rests
on is that of `Pull.wait`: it returns only when the transfer is terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from contracts.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from contracts.errors import TandemError
    from contracts.ids import BlockId

#: (the holder's block, the reader's own block)
BlockPair = tuple["BlockId", "BlockId"]


class Pool(Protocol):
    """A worker's KV blocks, as equal pieces of one stretch of memory."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def address(self) -> int:
        """Where block 0 begins, in this process."""
        ...

    def view(self) -> memoryview:
        """All of it, writable, one byte an item."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """A pull's end. `error` None: every byte of every pair landed. Otherwise any part of them may have."""

    num_bytes: int
    #: Time from the first to the last byte, without waiting for other pulls.
    wire_s: float
    #: Time from the asking to the first byte: for other pulls, connecting, or the holder's own queue.
    wait_s: float = 0.0
    #: The way it took, where there was a choice.
    transport: str = ""
    error: TandemError | None = None


class Pull(Protocol):
    """One transfer under way."""

    async def wait(self) -> PullResult:
        """Returns when the transfer is terminal: not one byte lands after that. Cancelling the wait does not
        stop the transfer. May be awaited again."""
        ...

    def request_stop(self) -> None:
        """Asks for an early end; the transfer is terminal only when `wait` says so. Repeats are harmless."""
        ...


class Transport(Protocol):
    """One way to move blocks, for one pool. Its methods are called on the event loop and do not block it."""

    @property
    def name(self) -> str:
        """Names the kind in `LeaseTerms.endpoints`: both sides need the same one."""
        ...

    def register(self, pool: Pool) -> None:
        """Serves this pool, and pulls into it; called once, before all else. The pool outlives `close`.

        Raises ConfigError where this kind of transport cannot work on this machine.
        """
        ...

    def endpoint(self) -> bytes:
        """How a reader reaches the registered pool; opaque, and as secret as the KV itself."""
        ...

    async def connect(self, endpoint: bytes, deadline_s: float) -> None:
        """Prepares for pulls from `endpoint`, which pulls would otherwise do themselves.

        `deadline_s` is a duration. Raises WorkerUnavailable, DeadlineExceeded, IncompatiblePeer or
        Unauthorized.
        """
        ...

    def pull(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> Pull:
        """Starts to copy the holder's blocks into this process's pool. Never raises for what a peer may do:
        that is the result's `error`."""
        ...

    def forget(self, endpoint: bytes) -> None:
        """The holder's life behind `endpoint` is over: lets go what is kept for it, once its pulls are
        terminal, and stops those. Unknown endpoints are no error."""
        ...

    async def close(self) -> None:
        """Stops pulls, waits until they are terminal and lets all memory and descriptors go."""
        ...


def check_pairs(pairs: Sequence[BlockPair], num_source_blocks: int, num_own_blocks: int) -> None:
    """Raises BadRequest where a pair names a block that one of the two pools does not have."""
    for source, target in pairs:
        if not 0 <= source < num_source_blocks:
            raise BadRequest(f"block {source} of a holder that has {num_source_blocks}")
        if not 0 <= target < num_own_blocks:
            raise BadRequest(f"pull into block {target} of {num_own_blocks}")


def runs(pairs: Sequence[BlockPair]) -> Iterator[tuple[BlockId, BlockId, int]]:
    """Joins pairs that continue each other on both sides, as (source, target, blocks); keeps the order."""
    if not pairs:
        return
    source, target = pairs[0]
    length = 1
    for next_source, next_target in pairs[1:]:
        if next_source == source + length and next_target == target + length:
            length += 1
            continue
        yield source, target, length
        source, target, length = next_source, next_target, 1
    yield source, target, length
