"""What the model of the leased pull consists of: scripts, nodes, calls, and things under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from contracts.errors import DeadlineExceeded
from contracts.ids import LeaseId
from contracts.layout import PROTOCOL_VERSION, BlockLayout, KvIdentity
from kvtransfer.holder import Holder
from kvtransfer.ledger import Ledger
from kvtransfer.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import BlockId
    from contracts.messages import Peer
    from kvtransfer import holder_events as h
    from kvtransfer import reader_events as r

TTL_S = 8.0
#: Requests without a waiting caller that may still arrive.
MAX_GHOSTS = 2
#: Rounding of clocks may not count as a broken term.
CLOCK_SLACK_S = 1e-6

IDENTITY = KvIdentity(
    model_fingerprint="model",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=4, dtype="float32"),
    rope_base=10_000.0,
    protocol_version=PROTOCOL_VERSION,
)

#: What a block holds.
Symbol = tuple[str, int]
FREED: Symbol = ("freed", 0)
SPOILT: Symbol = ("spoilt", 0)


class Violation(Exception):
    """A promise of the protocol is broken in this state."""


@dataclass(frozen=True, slots=True)
class Script:
    """What one request does at its holder."""

    holder: int
    #: The reader, as a node.
    reader: int
    num_blocks: int
    #: Final blocks announced before the seal.
    advances: tuple[int, ...] = ()
    #: The blocks are final before the lease: its offer carries everything.
    sealed: bool = False
    #: So many leading blocks stand at the reader when the offer comes first; when it comes again, none do.
    have: int = 0
    #: The lease is sealed there; None: at its last block.
    seal_at: int | None = None

    @property
    def num_sealed(self) -> int:
        return self.num_blocks if self.seal_at is None else self.seal_at


@dataclass(frozen=True, slots=True)
class Scenario:
    """A world's beginning."""

    num_holders: int
    num_readers: int
    scripts: tuple[Script, ...]
    holder_blocks: int = 3
    reader_blocks: int = 2
    max_waiting: int = 2
    #: Blocks are prepared before they are announced, and checked after their pull.
    checksums: bool = False
    #: No offer is delivered after half its term. Otherwise the order of the two ends is not audited.
    offers_in_time: bool = True
    #: What the deviations may be; all of `DEVIATIONS` when empty.
    deviations: frozenset[str] = frozenset()
    make_holder: Callable[..., Holder] = Holder
    make_reader: Callable[..., Reader] = Reader
    make_ledger: Callable[[int], Ledger] = Ledger


DEVIATIONS = frozenset(
    ("delay", "lose", "repeat", "fail", "spoil", "read ahead", "cancel", "withdraw", "crash", "freeze", "cut")
)


# --- nodes ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class HolderNode:
    me: Peer
    ledger: Ledger
    machine: Holder
    contents: list[Symbol]
    dead: bool = False
    ends: dict[LeaseId, str] = field(default_factory=dict[LeaseId, str])
    #: Leases that a confirmation was answered with yes for.
    confirmed: dict[LeaseId, None] = field(default_factory=dict[LeaseId, None])


@dataclass(slots=True)
class ReaderNode:
    me: Peer
    ledger: Ledger
    machine: Reader
    contents: list[Symbol]
    dead: bool = False
    accepted: dict[LeaseId, None] = field(default_factory=dict[LeaseId, None])
    ends: dict[LeaseId, str] = field(default_factory=dict[LeaseId, str])


Node = HolderNode | ReaderNode


# --- what is under way ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A remote call, from one life of a node to another node."""

    caller: int
    caller_life: int
    callee: int
    #: The event at the callee; a tuple of (terms, target life) for an offer.
    question: h.HolderEvent | r.ReaderEvent
    #: Who is told of the answer: a lease id or a holder's key, and the kind of the call.
    kind: str
    about: LeaseId | r.HolderKey
    expires_s: float
    #: The request is not delivered after that (the deadline travels with it).
    lost_after_s: float
    text: str
    #: The life of the callee that it is for; None: the callee finds out.
    target: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """Something that happens next, or later: at `node`, in its life `life`."""

    what: str
    node: int
    life: int
    call: Call | None = None
    answer: object = None
    lease_id: LeaseId | None = None
    order: r.StartPull | r.LandBlocks | h.PrepareBlocks | None = None
    #: Of a pull: pairs that have not landed; the symbols read ahead; whether a stop was asked for.
    left: tuple[tuple[BlockId, BlockId], ...] = ()
    read: tuple[Symbol, ...] | None = None
    stopped: bool = False
    #: Of a script: the step to do.
    step: int = 0

    def key(self, now_s: float) -> object:
        call = self.call
        expires = None if call is None else (call.text, round(call.expires_s - now_s, 4))
        answer = "" if self.answer is None else repr(self.answer)
        return (
            self.what, self.node, self.life, expires, answer, self.lease_id, self.left, self.read, self.stopped,
            self.step, None if self.order is None else repr(self.order),
        )  # fmt: skip


def changed(item: Item, **values: Any) -> Item:
    """The item with some fields replaced."""
    fields: dict[str, Any] = {name: getattr(item, name) for name in Item.__slots__}
    return Item(**(fields | values))


def failed_reply(item: Item) -> Item:
    """What the caller of a lost request gets."""
    call = item.call
    assert call is not None
    return Item("reply", call.caller, call.caller_life, call=call, answer=DeadlineExceeded("lost"))


def checksum(symbol: Symbol) -> int:
    """Differs where the bytes do."""
    return hash(symbol) & 0xFFFF_FFFF
