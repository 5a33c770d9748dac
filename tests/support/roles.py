"""What the role queues stand on, recorded: leases that only note what was asked, and an engine's plain facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.ids import Attempt, GatewayId, Incarnation, LeaseId, RequestId, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import HandoffReply, LeaseTerms, Peer, RequestKey
from contracts.requests import GenerateRequest, SamplingParams
from engine.room import Room

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from contracts.errors import TandemError
    from contracts.ids import BlockId
    from contracts.messages import Seal
    from contracts.requests import TokenDelta
    from engine.plan import StepPlan, StepResult
    from kvtransfer import LeaseOutcome, Ledger

    EndedCallback = Callable[[LeaseId, LeaseOutcome, str], None]
    OnAdopted = Callable[[LeaseId, list[BlockId], Seal], None]
    OnAborted = Callable[[LeaseId, TandemError], None]
    OnCaughtUp = Callable[[LeaseId, int], None]

BLOCK_TOKENS = 4
EOS = 2
IDENTITY = KvIdentity(
    model_fingerprint="m",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=BLOCK_TOKENS, dtype="float32"),
    rope_base=10000.0,
    protocol_version=1,
)
READER = Peer(worker_id=WorkerId("d0"), incarnation=Incarnation(1), address="d0:1")


@dataclass
class HandClock:
    """A clock that a test sets."""

    time_s: float = 0.0

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return self.time_s

    async def sleep(self, delay_s: float) -> None:
        raise AssertionError("queues do not sleep")


@dataclass
class Facts:
    """An engine as the queues see it: they never step it."""

    num_blocks: int = 16
    max_context_tokens: int = 64
    identity: KvIdentity = IDENTITY
    eos_token_ids: tuple[int, ...] = (EOS,)
    vocab_size: int = 1000
    description: str = "facts"

    async def step(self, plan: StepPlan) -> StepResult:
        raise AssertionError("queues do not step the engine")

    async def quiesce(self) -> None:
        raise AssertionError("queues do not wait for the engine")

    async def close(self) -> None:
        return


@dataclass
class RecordingHolder:
    """The lease calls of a prefill queue, as sentences."""

    calls: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])
    opened: int = 0

    #: The callback of each open lease, for tests that end it.
    on_ended: dict[LeaseId, EndedCallback] = field(default_factory=dict[LeaseId, "EndedCallback"])
    #: How each lease that was opened is offered, and how long it may stand.
    send_offer: dict[LeaseId, Callable[[LeaseTerms, float], Awaitable[HandoffReply]]] = field(
        default_factory=dict[LeaseId, "Callable[[LeaseTerms, float], Awaitable[HandoffReply]]"]
    )
    max_age_s: dict[LeaseId, float | None] = field(default_factory=dict[LeaseId, "float | None"])

    def open(
        self,
        blocks: list[BlockId],
        reader: Peer,
        *,
        send_offer: Callable[[LeaseTerms, float], Awaitable[HandoffReply]],
        on_ended: EndedCallback,
        num_final_blocks: int = 0,
        seal: Seal | None = None,
        max_age_s: float | None = None,
    ) -> LeaseId:
        self.opened += 1
        self.calls.append(("open", len(blocks), reader.worker_id))
        if num_final_blocks:
            self.calls.append(("advance", f"lease-{self.opened}", num_final_blocks))
        lease_id = LeaseId(f"lease-{self.opened}")
        self.on_ended[lease_id] = on_ended
        self.send_offer[lease_id] = send_offer
        self.max_age_s[lease_id] = max_age_s
        return lease_id

    def end(self, lease_id: LeaseId, outcome: LeaseOutcome, reason: str = "") -> None:
        self.on_ended.pop(lease_id)(lease_id, outcome, reason)

    def advance(self, lease_id: LeaseId, num_final_blocks: int) -> None:
        self.calls.append(("advance", lease_id, num_final_blocks))

    def seal(self, lease_id: LeaseId, num_final_blocks: int, seal: Seal) -> None:
        self.calls.append(("seal", lease_id, num_final_blocks, seal.num_tokens))

    def withdraw(self, lease_id: LeaseId, reason: str) -> None:
        self.calls.append(("withdraw", lease_id, reason))


@dataclass
class RecordingReader:
    """The lease calls of a decode batch."""

    callbacks: dict[LeaseId, tuple[OnAdopted, OnAborted]] = field(
        default_factory=dict[LeaseId, "tuple[OnAdopted, OnAborted]"]
    )
    #: Leading blocks of each that were said to stand here.
    have: dict[LeaseId, int] = field(default_factory=dict[LeaseId, int])
    #: Whether each may wait for blocks.
    waits: dict[LeaseId, bool] = field(default_factory=dict[LeaseId, bool])
    #: Who wants to hear that all that was announced is here.
    followers: dict[LeaseId, OnCaughtUp] = field(default_factory=dict[LeaseId, "OnCaughtUp"])
    cancelled: list[LeaseId] = field(default_factory=list[LeaseId])
    freed: int = 0
    #: Raised by the next offers.
    refusal: TandemError | None = None

    def offer(
        self,
        terms: LeaseTerms,
        *,
        owner: str,
        on_adopted: OnAdopted,
        on_aborted: OnAborted,
        have: int = 0,
        waits: bool = True,
        on_caught_up: OnCaughtUp | None = None,
    ) -> HandoffReply:
        if self.refusal is not None:
            raise self.refusal
        self.callbacks[terms.lease_id] = (on_adopted, on_aborted)
        self.have[terms.lease_id], self.waits[terms.lease_id] = have, waits
        if on_caught_up is not None:
            self.followers[terms.lease_id] = on_caught_up
        return HandoffReply(verdict="reserved", expected=have)

    def adopted(self, lease_id: LeaseId, blocks: list[BlockId], seal: Seal) -> None:
        self.callbacks[lease_id][0](lease_id, blocks, seal)

    def aborted(self, lease_id: LeaseId, error: TandemError) -> None:
        self.callbacks[lease_id][1](lease_id, error)

    def cancel(self, lease_id: LeaseId, reason: str) -> None:
        self.cancelled.append(lease_id)

    def blocks_freed(self) -> None:
        self.freed += 1


@dataclass
class Deltas:
    """What was emitted, in order."""

    seen: list[TokenDelta] = field(default_factory=list["TokenDelta"])

    def __call__(self, request: GenerateRequest, delta: TokenDelta) -> None:
        assert request.request_id == delta.request_id
        self.seen.append(delta)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.seen for token in delta.token_ids]


def generate(
    name: str = "r", *, prompt: int = 6, max_tokens: int = 5, deadline_s: float = 100.0, attempt: int = 1
) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        attempt=Attempt(attempt),
        gateway_id=GatewayId("g"),
        token_ids=tuple(range(10, 10 + prompt)),
        num_prompt_tokens=prompt,
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        deadline_s=deadline_s,
    )


def room_over(ledger: Ledger, *, growth_tokens: int) -> Room:
    """The book that a worker's two sides share, over `ledger`."""
    return Room(
        layout=IDENTITY.layout,
        num_blocks=ledger.num_blocks,
        growth_tokens=growth_tokens,
        available_blocks=lambda: ledger.available_blocks,
    )


def key(name: str = "r", attempt: int = 1) -> RequestKey:
    return RequestKey(RequestId(name), Attempt(attempt))
