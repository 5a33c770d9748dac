"""What happens to a store, and what its machine wants done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contracts.ids import BlockId, WorkerId
    from kvstore.tiers.disk import KeptBlock

# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FetchAsked:
    """Somebody wants the blocks with these keys, all different, consecutive ones of one prompt. `fetch_id` is not known
    yet."""

    fetch_id: str
    keys: tuple[bytes, ...]
    #: Position of the first one in its sequence.
    first_block: int = 0


@dataclass(frozen=True, slots=True)
class FetchOver:
    """The lease of a fetch has ended, or was never opened."""

    fetch_id: str


@dataclass(frozen=True, slots=True)
class BlockRead:
    """The disk is done with one block of a `ReadDisk`: its bytes are there and verified, or nothing usable is."""

    load_id: int
    index: int
    is_there: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Blocks of one sequence came from a worker; `owner` holds them in the ledger."""

    owner: str
    keys: tuple[bytes, ...]
    #: Parallel to `keys`.
    blocks: tuple[BlockId, ...]
    #: Position of the first one.
    first_block: int
    #: Tokens of the sequence up to the last block that was offered: the newest stay exact.
    num_tokens: int
    lossy: bool


@dataclass(frozen=True, slots=True)
class Written:
    """The disk is done with a `WriteDisk`."""

    write_id: int
    stored: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class WindowTold:
    """The prompts that wait at a worker, next one first: keys of their leading blocks."""

    worker_id: WorkerId
    prompts: tuple[tuple[bytes, ...], ...]


@dataclass(frozen=True, slots=True)
class PinAsked:
    """`until_s` None: until `UnpinAsked`."""

    keys: tuple[bytes, ...]
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class UnpinAsked:
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StoreTick:
    """Time has passed."""


StoreEvent = FetchAsked | FetchOver | BlockRead | Kept | Written | WindowTold | PinAsked | UnpinAsked | StoreTick

# --- instructions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLease:
    """Offer these blocks to who asked. The first `num_ready` are final; all are where `is_sealed`."""

    fetch_id: str
    blocks: tuple[BlockId, ...]
    num_ready: int
    is_sealed: bool
    #: Blocks by tier in which they were found.
    tier_blocks: dict[str, int]


@dataclass(frozen=True, slots=True)
class FoundNothing:
    fetch_id: str


@dataclass(frozen=True, slots=True)
class AdvanceLease:
    fetch_id: str
    num_ready: int


@dataclass(frozen=True, slots=True)
class SealLease:
    """It is its first `num_blocks` blocks."""

    fetch_id: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class WithdrawLease:
    fetch_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDisk:
    """`BlockRead` is owed once for each index."""

    load_id: int
    keys: tuple[bytes, ...]
    blocks: tuple[BlockId, ...]
    #: Nobody waits for it yet.
    is_ahead: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteDisk:
    """`Written` is owed."""

    write_id: int
    blocks: tuple[KeptBlock, ...]


StoreInstruction = OpenLease | FoundNothing | AdvanceLease | SealLease | WithdrawLease | ReadDisk | WriteDisk
