"""Every message between processes, and the method that carries it.

Bodies are MessagePack maps of these structs (msgspec validates types on receipt; unknown keys are ignored,
so that a field can be added without a version change). Times are durations in seconds: each side counts them
on its own monotonic clock. Who calls whom:

    gateway      -> coordinator   Dispatch, Members
    worker       -> coordinator   Register, Heartbeat, BlockEvents, Deregister
    gateway      -> worker        Prefill, Cancel, Grant, Frames (server stream)
    coordinator  -> worker        Migrate
    worker       -> worker        Yield, TakeOver (moves of requests)
    prefill side -> decode side   Handoff (the offer), Progress
    decode side  -> prefill side  Confirm, Renew, Ack
    prefill side -> any worker    Fetch (a prefix), Confirm, Renew, Ack
    operator     -> worker        Audit

What goes to and from stores stands in `contracts.store_messages`, what is about who runs where in
`contracts.control_messages`.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

from contracts.ids import (
    Attempt,
    BlockId,
    GatewayId,
    Generation,
    Incarnation,
    LeaseId,
    OwnerEpoch,
    RequestId,
    WorkerId,
)
from contracts.layout import KvIdentity
from contracts.requests import Frame, GenerateRequest, TokenDelta

Role = Literal["prefill", "decode", "mixed"]
#: A store keeps KV between requests and computes nothing: see `contracts.store_messages`.
MemberRole = Role | Literal["store"]

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
ReplyT = TypeVar("ReplyT", bound=msgspec.Struct)


class Method(msgspec.Struct, Generic[RequestT, ReplyT], frozen=True):
    """A remote call: its name on the wire and its two body types. `idempotent` says repeats are harmless."""

    name: str
    request: type[RequestT]
    reply: type[ReplyT]
    idempotent: bool = True


class StreamMethod(msgspec.Struct, Generic[RequestT, ReplyT], frozen=True):
    """A remote call answered by a stream of bodies."""

    name: str
    request: type[RequestT]
    reply: type[ReplyT]


class Empty(msgspec.Struct, frozen=True):
    pass


# --- membership -------------------------------------------------------------------------------------


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tells about itself once per life."""

    worker_id: WorkerId
    incarnation: Incarnation
    role: MemberRole
    #: rpc address, e.g. "127.0.0.1:41234".
    address: str
    model: str
    identity: KvIdentity
    total_blocks: int
    max_context_tokens: int
    #: Token budget of one of its steps; 0: not told.
    max_batch_tokens: int = 0
    #: Sequences that one of its steps holds: more answers do not get on at the same time. 0: not told.
    max_sequences: int = 0
    #: KV blocks that may wait for other workers to take them before it reads no more prompts for these; 0: not told.
    handoff_blocks: int = 0
    pid: int = 0
    #: e.g. "cpu-avx2, 1 thread, cores 0": for people.
    device: str = ""
    #: Names the machine: its workers use the store that is there.
    node: str = ""
    #: Version of the program that it runs, and of its protocol: for people. Who may exchange KV, `identity` says.
    build: str = ""


class AnswerTally(msgspec.Struct, frozen=True, array_like=True):
    """Answers that ended of themselves (at a stop or at their length) since the worker's start."""

    answers: int
    output_tokens: int


class PriorityUse(msgspec.Struct, frozen=True, array_like=True):
    """Answers of one priority (see `contracts.requests.counted_priority`) that run at a worker."""

    priority: int
    answers: int
    #: KV blocks that they hold.
    blocks: int


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What changes all the time. Block counts follow the ledger's classes; they sum to the total."""

    #: Requests accepted and not yet computing.
    waiting_requests: int = 0
    #: Prompt tokens not yet computed, over waiting and running requests; those found in the prefix cache are not.
    pending_prompt_tokens: int = 0
    #: Query-key pairs of their attention: see `contracts.latency.StepWork.prefill_pairs`.
    pending_prompt_pairs: float = 0.0
    #: Prompts here that are not read whole, by the worker that will write their answers; those that this one will
    #: write itself are left out. In order of id.
    unread_for: tuple[tuple[WorkerId, int], ...] = ()
    #: Of these, offers from other workers that have no blocks yet.
    waiting_offers: int = 0
    running_requests: int = 0
    #: Sequences among these that write answers; offers not yet adopted count too, once their prompts have been read.
    running_decodes: int = 0
    #: Sum of context lengths of running sequences, prompts on their way included.
    context_tokens: int = 0
    #: Of these, of prompts that are still being read elsewhere.
    unread_tokens: int = 0
    #: By `prompt_tokens.bit_length()` of their requests.
    answers: tuple[AnswerTally, ...] = ()
    free_blocks: int = 0
    owned_blocks: int = 0
    offered_blocks: int = 0
    reserved_blocks: int = 0
    cached_blocks: int = 0
    quarantined_blocks: int = 0
    #: Age of the engine step in progress; 0 when idle. For people: the worker itself judges it.
    step_age_s: float = 0.0
    #: It takes no new request.
    draining: bool = False
    #: Requests and leases (granted, and taken) that are not over: none of either where a drain has ended.
    open_requests: int = 0
    open_leases: int = 0
    #: What keeps it from giving up reading, and from giving up writing (`worker.standing.OpenWork`).
    open_prompts: int = 0
    open_answers: int = 0
    #: KV blocks that the first of those that wait for some would take, and what all of them would.
    head_demand_blocks: int = 0
    queued_demand_blocks: int = 0
    #: Answers that are written here, by priority, rising.
    priorities: tuple[PriorityUse, ...] = ()
    #: Answers here that lost their blocks, and wait for them.
    preempted_answers: int = 0
    #: Prompts here that nobody has begun to read.
    waiting_prompts: int = 0
    #: Requests that are on their way from here to another worker, and to here.
    moving_out: int = 0
    moving_in: int = 0

    @property
    def available_blocks(self) -> int:
        """Nobody's: free, or cached and given up as soon as somebody needs them."""
        return self.free_blocks + self.cached_blocks


class RegisterReply(msgspec.Struct, frozen=True, kw_only=True):
    heartbeat_interval_s: float


class PullTally(msgspec.Struct, frozen=True, array_like=True):
    """Pulls of one kind and end, since the worker's start."""

    transport: str
    #: "ok", or the code of a `contracts.errors` class.
    outcome: str
    count: int
    num_bytes: int
    #: From first to last byte, summed.
    wire_s: float
    #: Asked to first byte, summed.
    wait_s: float


class LinkReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker measured of one transport to one peer, and what it makes of it."""

    peer: WorkerId
    transport: str
    #: None: not measured, see `note`.
    bandwidth_bytes_per_s: float | None = None
    #: Of one block, asked to landed, median.
    latency_s: float | None = None
    #: Whether pulls from this peer go this way.
    chosen: bool = False
    #: Why it was chosen, or not.
    note: str = ""


class TransferReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's KV transfers since its start, for metrics and `tandem doctor`."""

    pulls: tuple[PullTally, ...] = ()
    #: Open leases by side and state, e.g. "holder.sealed", "reader.pulling".
    leases: dict[str, int] = {}
    #: Ended leases by side, outcome and reason, e.g. "holder.released", "reader.aborted.cancelled".
    ended: dict[str, int] = {}
    links: tuple[LinkReport, ...] = ()
    #: Blocks whose checksum was wrong, and how often one was pulled again for that.
    corrupt_blocks: int = 0
    refetched_blocks: int = 0
    #: Hashed on either side, and the time that took.
    checksum_bytes: int = 0
    checksum_s: float = 0.0
    #: Of a store: as `contracts.store_messages.TierFigures`.
    unencoded_blocks: int = 0


class LatencyFit(msgspec.Struct, frozen=True, array_like=True):
    """What a worker's own steps took lately, as coefficients; seconds.

    A step with chunks: `prefill_base_s + prefill_token_s * tokens + pair_s * pairs`; one that only decodes:
    `decode_base_s + sequence_s * sequences + context_token_s * context`.
    """

    prefill_base_s: float
    prefill_token_s: float
    pair_s: float
    decode_base_s: float
    sequence_s: float
    context_token_s: float
    #: Steps of each kind that it rests on; 0: the coefficients of that kind say nothing.
    num_prefill_steps: int
    num_decode_steps: int


class HeartbeatRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    worker_id: WorkerId
    incarnation: Incarnation
    load: WorkerLoad
    #: None: as last time.
    transfers: TransferReport | None = None
    #: None: as last time.
    latency: LatencyFit | None = None


class WorkerLife(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One life of one worker."""

    worker_id: WorkerId
    incarnation: Incarnation


class HeartbeatReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    #: False: the coordinator does not know this life of this worker; register (again).
    known: bool
    #: Lives that ended within the last while: their leases are void. Repeats are harmless.
    gone: tuple[WorkerLife, ...] = ()


class DeregisterRequest(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    incarnation: Incarnation
    reason: str


class SnapshotPage(msgspec.Struct, frozen=True, array_like=True):
    """Part `index` of `count` of everything that a worker's prefix cache held."""

    index: int
    count: int


class BlockEvents(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What entered and left a worker's prefix cache. A life's events are numbered 0, 1, 2, ..., each about one block.

    With `snapshot`, `keys` are a page of what the cache held before event `start`; pages come in order, and with the
    last of them they replace everything that was known of this life.
    """

    worker_id: WorkerId
    incarnation: Incarnation
    #: Number of the first event here.
    start: int
    #: Eight bytes for each event: the first of the block's key.
    keys: bytes = b""
    #: One byte for each event: 1 stored, 0 removed. Empty in a snapshot.
    stored: bytes = b""
    snapshot: SnapshotPage | None = None


class BlockEventsReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    #: Number of the event to go on with; None: nothing is known of this life's cache, or too little: send a snapshot.
    expected: int | None = None
    #: False: this life itself is unknown; register (again) first.
    known: bool = True


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as an addressee: the message is void for any other life of it."""

    worker_id: WorkerId
    incarnation: Incarnation
    address: str


class DispatchItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    request_id: RequestId
    prompt_tokens: int
    max_tokens: int
    #: Workers the gateway has just seen fail with this request.
    avoid: tuple[WorkerId, ...] = ()
    #: Name of its SLO class; empty, or unknown to the coordinator: the default class.
    slo_class: str = ""
    #: Larger goes first.
    priority: int = 0
    tenant: str = ""
    #: The first eight bytes of the key of each full block of the prompt, in order; empty: nothing is known of them.
    block_keys: bytes = b""
    #: Since its client asked; part of its time to first token.
    waited_s: float = 0.0
    #: It was accepted before: it is not refused for its targets any more.
    was_accepted: bool = False


class PrefixPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What of a prompt's beginning need not be computed. Hints: the holder compares whole keys."""

    #: Leading blocks that the prefill worker itself is believed to hold.
    local_blocks: int = 0
    #: Where the prefill worker is to fetch more from; None: from nowhere.
    source: Peer | None = None
    #: Leading blocks that `source` is believed to hold, and that are worth fetching.
    source_blocks: int = 0


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator expected when it decided; seconds. `ttft_s` is the sum of the other parts of it."""

    #: At the gateway, before the decision.
    waited_s: float
    queue_s: float
    #: Of a prefix from another worker.
    transfer_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float


class Placement(msgspec.Struct, frozen=True, kw_only=True, tag="placement", omit_defaults=True):
    """Where a request runs. `prefill == decode` (a mixed worker) means no handoff."""

    request_id: RequestId
    prefill: Peer
    decode: Peer
    #: Why these two: for logs, metrics and tests.
    reason: str
    prefix: PrefixPlan | None = None
    #: None where nothing is known of what steps cost.
    predicted: Predicted | None = None


class Rejection(msgspec.Struct, frozen=True, kw_only=True, tag="rejection", omit_defaults=True):
    request_id: RequestId
    #: "not_ready" (no such worker), "no_capacity" (all full), "slo_unattainable": codes of contracts.errors.
    code: str
    message: str
    retry_after_s: float
    #: A word for clients and metrics: "too_long", "no_prefill", "no_decode", "full", "ttft", "tpot".
    reason: str = ""
    #: Of the best place that there was.
    predicted: Predicted | None = None


#: Of a target, in which predictions are told.
PROMISED_PARTS = 20
_MOST_PROMISED = 10.0


class TtftTally(msgspec.Struct, frozen=True, array_like=True):
    """Requests of a class that were accepted with a prediction and whose first token came, without a failure before."""

    slo_class: str
    #: The TTFT that was predicted, in `PROMISED_PARTS` of the target, rounded down.
    promised: int = 0
    num_first_tokens: int = 0
    #: Of these, after the class's target.
    num_late: int = 0

    @classmethod
    def of(cls, slo_class: str, predicted_share: float, *, is_late: bool) -> TtftTally:
        """One request; `predicted_share` of the target."""
        promised = int(min(max(predicted_share, 0.0), _MOST_PROMISED) * PROMISED_PARTS)
        return cls(slo_class, promised, 1, int(is_late))

    @property
    def promised_least(self) -> float:
        """Share of the target that was predicted at least."""
        return self.promised / PROMISED_PARTS

    def __add__(self, other: TtftTally) -> TtftTally:
        return TtftTally(
            self.slo_class,
            self.promised,
            self.num_first_tokens + other.num_first_tokens,
            self.num_late + other.num_late,
        )


class DispatchRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    gateway_id: GatewayId
    items: tuple[DispatchItem, ...]
    #: Since the gateway's last call, whether that arrived or not.
    outcomes: tuple[TtftTally, ...] = ()


class DispatchReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    #: Parallel to the request's items.
    verdicts: tuple[Placement | Rejection, ...]
    #: As in `MembersReply`.
    members_mark: int = 0


class Member(msgspec.Struct, frozen=True, kw_only=True):
    info: WorkerInfo
    load: WorkerLoad
    heartbeat_age_s: float
    transfers: TransferReport | None = None
    #: "suspect": silent for a while; it gets requests only where no other can take them.
    state: Literal["up", "suspect"] = "up"


class PoolFigures(msgspec.Struct, frozen=True, array_like=True):
    """Of a pool that follows the load."""

    pool: str
    #: Workers that it is to have, that are ready to stay, and that are coming.
    wanted: int
    ready: int
    coming: int
    #: Looks at it, by the word for what was decided.
    decisions_total: dict[str, int]


class CoordinatorFigures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a coordinator counted since its start, and what it holds now: for metrics."""

    #: Decisions by "placement" or a rejection's reason.
    verdicts_total: dict[str, int] = {}
    #: Time that one decision took: how many took at most so many seconds (cumulative, the last bound is infinite), and
    #: the sum of all.
    decision_bounds_s: tuple[float, ...] = ()
    decisions_within: tuple[int, ...] = ()
    decisions_s: float = 0.0
    #: The prefix directory: blocks known, blocks not taken in for want of room, bytes.
    directory_blocks: int = 0
    directory_dropped: int = 0
    directory_bytes: int = 0
    #: Block events applied, gaps found in their numbers, snapshots taken over.
    block_events_total: int = 0
    block_gaps_total: int = 0
    block_snapshots_total: int = 0
    #: Lasting changes of the workload that were told, better splits of the workers that were proposed, and the last.
    workload_shifts_total: int = 0
    splits_proposed_total: int = 0
    proposed_split: str = ""
    #: By SLO class: how much of its TTFT target predictions may reach, besides `ttft_share`.
    ttft_margins: dict[str, float] = {}
    #: Requests that workers were asked to move, by purpose; of these those whose move was begun, those that the worker
    #: did not begin, those of which it did not tell.
    moves_asked_total: dict[str, int] = {}
    moves_begun_total: dict[str, int] = {}
    moves_refused_total: dict[str, int] = {}
    moves_failed_total: dict[str, int] = {}
    #: How often a worker that should have given requests away was not asked to, by why.
    moves_withheld_total: dict[str, int] = {}
    pools: tuple[PoolFigures, ...] = ()


class MembersReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    members: tuple[Member, ...]
    #: Stands for which lives are known and what they told when they registered: who knows others tells another number,
    #: who knows the same tells the same one, another coordinator too.
    members_mark: int = 0
    coordinator: CoordinatorFigures | None = None


# --- requests ---------------------------------------------------------------------------------------


class PrefillRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Read this prompt; hand it to `decode` (or keep it, when that is the receiver itself).

    Raises NoCapacity when the queue is full, BadRequest when it can never fit, StaleIncarnation.
    Idempotent: a repeat with the same (request_id, attempt) is answered and ignored.
    """

    target: Incarnation
    request: GenerateRequest
    decode: Peer
    prefix: PrefixPlan | None = None


class RequestKey(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One ownership of a request: a worker that it comes back to later has it under another key."""

    request_id: RequestId
    attempt: Attempt
    owner_epoch: OwnerEpoch = OwnerEpoch(1)


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Forget these tries: nothing more is computed or streamed for them. Unknown ones are no error."""

    requests: tuple[RequestKey, ...]
    reason: str


class FramesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Opens the one stream of frames from this worker to this gateway; an older one is closed."""

    gateway_id: GatewayId
    target: Incarnation


# --- requests that move -----------------------------------------------------------------------------

#: How a request moves: its KV, or its tokens that are read again; "auto": whichever is predicted to be less work. The
#: others are for comparison: it stops first, and all of it is copied, or read again, while nothing is written.
MoveMode = Literal["auto", "kv", "tokens", "stop_and_copy", "stop_and_read"]


class MigrateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Moves requests of this worker to another one, while they go on. Answered at once.

    Raises StaleIncarnation. Idempotent as far as requests that are moving already are left alone.
    """

    target: Incarnation
    destination: Peer
    #: These; empty: the worker chooses: preempted answers, then prompts that wait, then answers that run, of these the
    #: lowest priority and among them the shortest first.
    request_ids: tuple[RequestId, ...] = ()
    max_requests: int = 1
    #: Those that wait here (for their prompts to be read, or preempted) may be chosen too.
    waiting: bool = True
    #: Of prompts that wait, whether they go as they stand in line; else the last one first.
    first_in_line: bool = False
    #: Those that run may be.
    running: bool = True
    #: Of what is chosen: only priorities of at most this one; None: any.
    max_priority: int | None = None
    #: What they may take there, all of them together: who would be too large is passed over; None: anything.
    max_blocks: int | None = None
    #: What is to come free here by answers that run leaving: the smallest that suffice go; 0: the shortest go.
    need_blocks: int = 0
    mode: MoveMode = "auto"
    #: From here to there, as measured; None: not known.
    bandwidth_bytes_per_s: float | None = None
    reason: str = ""


class MigrateReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    started: tuple[RequestKey, ...]
    #: Why not more, in words.
    reason: str = ""


class YieldRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The destination of a move has all but what the source wrote lately, and asks it to stop there. Answered once no
    step computes the request any more; at once, where there is more than `at_most`. Idempotent.

    Raises NotFound (the request is not on its way from here, or has ended here), StaleIncarnation.
    """

    target: Incarnation
    #: The source's.
    key: RequestKey
    #: Output tokens that the destination has.
    num_known: int = 0
    #: The source goes on if it has written more tokens than these beyond `num_known`; None: it stops in any case.
    at_most: int | None = None


class YieldReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    #: Output tokens since the move was offered; where KV moves they come with the lease's seal, too.
    delta: TokenDelta | None = None
    #: It was too much to stop for: the source writes on, and is to be asked again.
    goes_on: bool = False


class DeclineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The destination of a move by tokens has let the request go, and never claimed it: the source need not wait for
    it. Of a move that is not, or is to somebody else by now, nothing comes. Raises StaleIncarnation."""

    target: Incarnation
    #: The source's.
    key: RequestKey
    #: Who declines.
    destination: Peer
    reason: str


class TakeOverRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Moves a request by its tokens: the receiver reads them again. Answered at once, and not repeated.

    Raises NoCapacity, NotReady (draining, or on its way there already), BadRequest (can never fit), StaleIncarnation.
    """

    target: Incarnation
    #: With the owner epoch that the receiver is to claim, and all tokens so far.
    request: GenerateRequest
    move: Move
    #: The source has stopped already: there is nothing to yield.
    final: bool = False
    #: A prompt that nobody has begun to read, to be handed to this worker when it is; None: an answer.
    decode: Peer | None = None


class ClaimVerdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who the gateway lets go on."""

    #: With the owner epoch that was claimed.
    key: RequestKey
    granted: bool
    #: Output tokens that the client has: those from here on are to be sent, also such as were written elsewhere.
    next_index: int = 0
    #: Why not.
    reason: str = ""


class GrantRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Answers claims. Who is granted a request that it does not have (any more) says so, as of one that is lost.
    Raises StaleIncarnation."""

    target: Incarnation
    #: Whose requests these are.
    gateway_id: GatewayId
    verdicts: tuple[ClaimVerdict, ...]


# --- the leased pull --------------------------------------------------------------------------------


class BlockRef(msgspec.Struct, frozen=True, array_like=True):
    """A holder's block, and the generation whose bytes are meant."""

    block_id: BlockId
    generation: Generation


class Seal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The lease grows no more. `first_delta` is output token 0, already streamed by the prefill side; None where
    the blocks are a prefix that somebody asked for."""

    num_tokens: int
    first_delta: TokenDelta | None = None


class ProgressRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Blocks that will never be written again, from position `start` of the lease's block list on.

    `withdrawn`: the holder takes the offer back (request ended, cancelled or failed there). Idempotent: blocks
    already known are skipped; a gap is answered with `expected`, and the holder sends from there.
    """

    lease_id: LeaseId
    holder_incarnation: Incarnation
    start: int = 0
    blocks: tuple[BlockRef, ...] = ()
    #: XXH3-64 of each block's bytes, parallel to `blocks`; empty where checksums are off.
    checksums: tuple[int, ...] = ()
    seal: Seal | None = None
    withdrawn: str | None = None


class LeaseTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a holder grants. The holder counts `ttl_s` from when it grants, the reader from when it asked (and
    half of it for an offer, which nobody asked for), so the reader's lease always ends first."""

    lease_id: LeaseId
    holder: Peer
    identity: KvIdentity
    #: How to reach the bytes, by the name of the transport; opaque to everything else.
    endpoints: dict[str, bytes]
    #: Blocks the lease will hold when sealed.
    num_blocks: int
    ttl_s: float
    #: Whether every block is announced with its checksum.
    checksums: bool = False
    #: What is final when this is offered: it spares a call where the blocks stood before the lease.
    progress: ProgressRequest | None = None


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a handoff a migration: the request is written on by `source` until the reader asks for the rest, and
    is the reader's once the gateway has granted its claim."""

    source: Peer
    #: Under which the source has it; the request itself carries the owner epoch that the reader is to claim.
    key: RequestKey


class HandoffRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Offer: a prompt's KV, still growing, and the request to continue.

    Answered at once. Raises NoCapacity (the holder may ask again), IncompatiblePeer, StaleIncarnation,
    BadRequest (can never fit), NotReady (draining; only a move). Idempotent by lease id.
    """

    target: Incarnation
    terms: LeaseTerms
    request: GenerateRequest
    #: None: a prompt's first handoff.
    move: Move | None = None


class FetchRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks a worker for the blocks with these keys, whole keys of leading blocks of one prompt, to copy them.

    Idempotent by `fetch_id`, which the asker makes. Raises StaleIncarnation, IncompatiblePeer, NoCapacity, BadRequest.
    Asked once more with `taken` when the reader has taken terms that are not sealed: news of a lease must not overtake
    the answer that it came with.
    """

    target: Incarnation
    fetch_id: str
    reader: Peer
    identity: KvIdentity
    #: 32 bytes each, in order; all different.
    keys: tuple[bytes, ...]
    #: Position of the first of them in its prompt.
    first_block: int = 0
    taken: bool = False


class FetchReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    #: A lease over the leading blocks that the holder has; None: it has not even the first. A worker's is sealed at
    #: once, a store's when the last of them has come from its disk, maybe with fewer of them.
    terms: LeaseTerms | None = None
    #: Where they stood, by tier (`contracts.store_messages.Tier`).
    tier_blocks: dict[str, int] = {}


class DescribeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Asks a worker how its pool is reached, to measure the way there before it is needed."""

    target: Incarnation


class DescribeReply(msgspec.Struct, frozen=True, kw_only=True):
    identity: KvIdentity
    num_blocks: int
    endpoints: dict[str, bytes]


class HandoffReply(msgspec.Struct, frozen=True, kw_only=True):
    #: "reserved": blocks are set aside. "waiting": queued without blocks, the reader renews meanwhile.
    verdict: Literal["reserved", "waiting"]
    #: As `ProgressReply.expected`.
    expected: int = 0


class ProgressReply(msgspec.Struct, frozen=True, kw_only=True):
    #: False: the reader does not hold this lease (any more); the holder lets it go.
    known: bool
    #: Next position of the block list the reader expects.
    expected: int = 0


class ConfirmRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Do all generations of this sealed lease still stand? Asked after the last byte. Idempotent."""

    lease_id: LeaseId
    holder_incarnation: Incarnation


class ConfirmReply(msgspec.Struct, frozen=True, kw_only=True):
    stands: bool
    reason: str = ""


class RenewRequest(msgspec.Struct, frozen=True, kw_only=True):
    holder_incarnation: Incarnation
    lease_ids: tuple[LeaseId, ...]


class RenewReply(msgspec.Struct, frozen=True, kw_only=True):
    """The leases that stand, for `ttl_s` from the holder's answering."""

    alive: tuple[LeaseId, ...]
    ttl_s: float


class AckRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The reader is done with these leases (adopted or aborted): the holder may let them go."""

    holder_incarnation: Incarnation
    lease_ids: tuple[LeaseId, ...]


# --- audit ------------------------------------------------------------------------------------------


class AuditReply(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's books, for tests, `tandem doctor` and metrics. `problems` is empty in a healthy worker."""

    load: WorkerLoad
    total_blocks: int
    open_requests: int
    holder_leases: int
    reader_leases: int
    problems: tuple[str, ...]


# --- methods ----------------------------------------------------------------------------------------

REGISTER = Method("coordinator/Register", WorkerInfo, RegisterReply)
HEARTBEAT = Method("coordinator/Heartbeat", HeartbeatRequest, HeartbeatReply)
BLOCK_EVENTS = Method("coordinator/BlockEvents", BlockEvents, BlockEventsReply)
DEREGISTER = Method("coordinator/Deregister", DeregisterRequest, Empty)
DISPATCH = Method("coordinator/Dispatch", DispatchRequest, DispatchReply, False)
MEMBERS = Method("coordinator/Members", Empty, MembersReply)

PREFILL = Method("worker/Prefill", PrefillRequest, Empty)
CANCEL = Method("worker/Cancel", CancelRequest, Empty)
GRANT = Method("worker/Grant", GrantRequest, Empty)
MIGRATE = Method("worker/Migrate", MigrateRequest, MigrateReply)
YIELD = Method("worker/Yield", YieldRequest, YieldReply)
DECLINE = Method("worker/Decline", DeclineRequest, Empty)
TAKE_OVER = Method("worker/TakeOver", TakeOverRequest, Empty)
AUDIT = Method("worker/Audit", Empty, AuditReply)
FRAMES = StreamMethod("worker/Frames", FramesRequest, Frame)

HANDOFF = Method("lease/Handoff", HandoffRequest, HandoffReply)
PROGRESS = Method("lease/Progress", ProgressRequest, ProgressReply)
CONFIRM = Method("lease/Confirm", ConfirmRequest, ConfirmReply)
RENEW = Method("lease/Renew", RenewRequest, RenewReply)
ACK = Method("lease/Ack", AckRequest, Empty)
FETCH = Method("lease/Fetch", FetchRequest, FetchReply)
DESCRIBE = Method("lease/Describe", DescribeRequest, DescribeReply)

# --- the collective transport -----------------------------------------------------------------------------


class MeetRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A reader asks a holder to form a process group of two, in place of any that it had with this reader.

    Raises NoCapacity, StaleIncarnation, Unauthorized, WorkerUnavailable.
    """

    target: Incarnation
    #: From the holder's endpoint, in this and the calls below.
    secret: bytes
    #: Names one life of a reader's transport.
    reader: str
    #: Counts the reader's groups.
    group: int
    #: The reader's address for the library, as it should be called.
    address: bytes
    #: The same as it is bound.
    bound: bytes
    #: What the holder proves itself with on the connection that follows.
    proof: bytes


class MeetReply(msgspec.Struct, frozen=True, kw_only=True):
    address: bytes
    bound: bytes
    #: What the reader proves itself with.
    proof: bytes


class SendRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for these blocks over the group, after those asked for before. Answered at once; repeats of a `pull`
    are ignored. Raises NotFound (no such group, any more), NoCapacity, BadRequest, StaleIncarnation,
    Unauthorized, WorkerUnavailable."""

    target: Incarnation
    secret: bytes
    reader: str
    group: int
    #: Counts the group's pulls from 1.
    pull: int
    #: Tag of the first message; the others count on from there.
    first_tag: int
    blocks: tuple[BlockId, ...]


class PartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The reader has let this group go. Unknown ones are no error."""

    target: Incarnation
    secret: bytes
    reader: str
    group: int


MEET = Method("collective/Meet", MeetRequest, MeetReply, False)
SEND = Method("collective/Send", SendRequest, Empty)
PART = Method("collective/Part", PartRequest, Empty)
