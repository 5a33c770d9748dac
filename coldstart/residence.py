"""Which models' weights lie in this machine's memory: the machine of the node's DRAM tier.

Copies are loaded one after the other, in the order in which they were asked for (the disk is one queue, and what waits
for it can be foretold); everybody who asks for a model that is being loaded waits for that one load. A copy that a
client uses is pinned; of the others the one not used for the longest time goes when room is needed. What does not fit
beside the pinned ones is refused, and the client reads its weights itself.

`handle(event, now_s)` answers with instructions; nothing is done here. A load goes through three states:

    QUEUED --begin--> SIZING --Sized--> FILLING --Loaded--> RESIDENT --room is needed--> gone
                         any --LoadFailed, patience over--> gone

A copy that nobody uses may be compressed. Until that is done it is there as before, and whoever asks for it gets it at
once; memory for the result is taken only where it is free. What is compressed is loaded as from a tier of its own, the
nearest one; if that fails, or memory is too short for both, it is loaded from the next tier, and who waits waits on.

    RESIDENT --Cooled--> COMPRESSING --Compressed--> COMPRESSED --asked for--> QUEUED ...
        ^--asked for, room is needed, failed--'          '--room is needed--> gone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import msgspec

#: A client waits so long without the line getting on, and then reads its weights itself: within the time that a start
#: may take without a word (300 s), or the worker would be killed while it waits, again and again.
PATIENCE_S = 120.0
#: Nobody waits for one load for longer, however it gets on.
LONGEST_WAIT_S = 1800.0
#: Clients at a time; one more is refused.
MAX_CLIENTS = 1024
#: Loads that wait for the disk; one more is refused.
MAX_QUEUED = 64


class WeightsKey(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """One partition of one model's weights as one engine wants them."""

    #: Folder of the model, in Hugging Face layout or Tandem's.
    folder: str
    #: What to compute in, or "auto".
    dtype: str
    tensor_parallel: int = 1
    rank: int = 0


class CopyState(Enum):
    QUEUED = "queued"
    SIZING = "sizing"
    FILLING = "filling"
    RESIDENT = "resident"
    #: Resident still, beside a result that is being made.
    COMPRESSING = "compressing"
    COMPRESSED = "compressed"


@dataclass(slots=True, kw_only=True)
class Copy:
    """What is known of one key. Read-only outside of this module."""

    key: WeightsKey
    state: CopyState
    asked_s: float
    used_s: float
    #: Memory for the weights as they are used: 0 until it is known, and while they are compressed alone.
    num_bytes: int = 0
    #: Memory for them compressed: the bound of a result that is being made, or what it takes.
    compressed_bytes: int = 0
    #: What `num_bytes` was last.
    whole_bytes: int = 0
    load_s: float = 0.0
    #: Clients that use it.
    pins: set[int] = field(default_factory=set[int])
    #: Clients that wait for it, with the time at which they give up.
    waiting: dict[int, float] = field(default_factory=dict[int, float])
    #: Number of the load that fills it, or of what compresses it: what an earlier one still says is not meant.
    load: int = 0
    #: Whether that load reads the compressed form.
    is_decoding: bool = False

    @property
    def held_bytes(self) -> int:
        return self.num_bytes + self.compressed_bytes


# --- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A client wants a copy, or (None) somebody wants it to be there before it is asked for."""

    client: int | None
    key: WeightsKey


@dataclass(frozen=True, slots=True)
class Gone:
    """A client's connection has ended."""

    client: int


@dataclass(frozen=True, slots=True)
class Sized:
    """The load found its bytes, and waits for memory."""

    load: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Advanced:
    """The load has got on since it was last heard of."""

    load: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """All of it is there and verified."""

    load: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The load ended in another way; the message names what and where."""

    load: int
    message: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Cooled:
    """A copy was not used for long, and is to be compressed."""

    key: WeightsKey


@dataclass(frozen=True, slots=True)
class CompressionSized:
    """What compresses a copy knows how much memory its result has at most, and waits for it."""

    load: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Compressed:
    """The compressed form is complete, and takes so much."""

    load: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CompressionFailed:
    """It ended in another way, or is not worth it."""

    load: int


ResidenceEvent: TypeAlias = (
    Asked
    | Gone
    | Sized
    | Advanced
    | Loaded
    | LoadFailed
    | Ticked
    | Cooled
    | CompressionSized
    | Compressed
    | CompressionFailed
)


# --- instructions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Start a load; it tells `Sized`, and then waits for `Fill` or `Abort`."""

    load: int
    key: WeightsKey
    #: Read the compressed form, which is here, and not the next tier.
    is_decoding: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """Its memory may be taken: of a load, or of a compression."""

    load: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Abort:
    """End a load, or a compression, and give back its memory; nothing more is heard of it."""

    load: int


@dataclass(frozen=True, slots=True)
class Hand:
    """Give a client the copy."""

    client: int
    key: WeightsKey


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a client that it must read its weights itself, and why."""

    client: int
    key: WeightsKey
    reason: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Give back the memory of a copy that nobody uses, in whichever form it is here."""

    key: WeightsKey
    reason: str


@dataclass(frozen=True, slots=True)
class Compress:
    """Start to compress a copy; it tells `CompressionSized`, and then waits for `Fill` or `Abort`."""

    load: int
    key: WeightsKey


@dataclass(frozen=True, slots=True)
class DropRaw:
    """Give back the memory of a copy that is here compressed."""

    key: WeightsKey


@dataclass(frozen=True, slots=True)
class DropCompressed:
    """Give back the memory of the compressed form."""

    key: WeightsKey
    reason: str


ResidenceInstruction: TypeAlias = Begin | Fill | Abort | Hand | Refuse | Evict | Compress | DropRaw | DropCompressed


class Residence:
    """See above. Deterministic; raises nothing."""

    def __init__(self, budget_bytes: int) -> None:
        """`budget_bytes`: of all copies together, those being filled among them."""
        self.budget_bytes = budget_bytes
        #: In the order in which they were asked for.
        self._copies: dict[WeightsKey, Copy] = {}
        self._clients: dict[int, WeightsKey] = {}
        self._next_load = 1

    def copies(self) -> tuple[Copy, ...]:
        return tuple(self._copies.values())

    @property
    def used_bytes(self) -> int:
        return sum(copy.held_bytes for copy in self._copies.values())

    def num_ahead(self, key: WeightsKey) -> int:
        """Loads that come before its own; 0 for one that is under way, is over, or was never asked for."""
        copy = self._copies.get(key)
        if copy is None or copy.state is not CopyState.QUEUED:
            return 0
        waiting = [each for each in self._copies.values() if each.state is CopyState.QUEUED]
        under_way = sum(each.state in (CopyState.SIZING, CopyState.FILLING) for each in self._copies.values())
        return under_way + waiting.index(copy)

    @property
    def deadline_s(self) -> float | None:
        """When `Ticked` is due next."""
        return min((at_s for copy in self._copies.values() for at_s in copy.waiting.values()), default=None)

    def handle(self, event: ResidenceEvent, now_s: float) -> list[ResidenceInstruction]:
        done: list[ResidenceInstruction] = []
        match event:
            case Asked(client, key):
                self._ask(client, key, now_s, done)
            case Gone(client):
                self._let_go(client, now_s, done)
            case Sized(load, num_bytes):
                self._size(load, num_bytes, now_s, done)
            case Advanced(load):
                self._get_on(load, now_s)
            case Loaded(load):
                self._get_on(load, now_s)
                self._finish(load, now_s, done)
            case LoadFailed(load, message):
                self._get_on(load, now_s)
                self._fail(load, message, done)
            case Ticked():
                self._tick(now_s, done)
            case Cooled(key):
                self._cool(key, done)
            case CompressionSized(load, num_bytes):
                self._size_compression(load, num_bytes, done)
            case Compressed(load, num_bytes):
                self._finish_compression(load, num_bytes, done)
            case CompressionFailed(load):
                self._end_compression(load)
        self._begin_next(done)
        return done

    # --- what happens ---------------------------------------------------------------------------------

    def _ask(self, client: int | None, key: WeightsKey, now_s: float, done: list[ResidenceInstruction]) -> None:
        if client is not None:
            if client in self._clients:
                # One connection, one copy: it is what its end gives back.
                done.append(Refuse(client, key, f"this client has asked for {self._clients[client].folder} before"))
                return
            if len(self._clients) >= MAX_CLIENTS:
                done.append(Refuse(client, key, f"{MAX_CLIENTS} clients are here already"))
                return
        copy = self._copies.get(key)
        if copy is None or copy.state is CopyState.COMPRESSED:
            if sum(each.state is CopyState.QUEUED for each in self._copies.values()) >= MAX_QUEUED:
                if client is not None:
                    done.append(Refuse(client, key, f"{MAX_QUEUED} loads are waiting already"))
                return
            if copy is None:
                copy = Copy(key=key, state=CopyState.QUEUED, asked_s=now_s, used_s=now_s)
            # Behind all that were asked for before.
            self._copies.pop(key, None)
            self._copies[key] = copy
            copy.state, copy.asked_s = CopyState.QUEUED, now_s
        if copy.state is CopyState.COMPRESSING:
            self._give_up(copy, done)
        copy.used_s = now_s
        if client is None:
            return
        self._clients[client] = key
        if copy.state is CopyState.RESIDENT:
            copy.pins.add(client)
            done.append(Hand(client, key))
        else:
            copy.waiting[client] = _until_s(copy, now_s)

    def _let_go(self, client: int, now_s: float, done: list[ResidenceInstruction]) -> None:
        key = self._clients.pop(client, None)
        copy = None if key is None else self._copies.get(key)
        if copy is None:
            return
        if client in copy.pins:
            copy.pins.discard(client)
            copy.used_s = now_s
        # A load goes on without anybody who waits: its next client is likely to be the same worker's next life.
        copy.waiting.pop(client, None)

    def _size(self, load: int, num_bytes: int, now_s: float, done: list[ResidenceInstruction]) -> None:
        copy = self._loading(load, CopyState.SIZING)
        if copy is None:
            return
        if not self._make_room(copy, num_bytes, now_s, done):
            done.append(Abort(load))
            if copy.is_decoding and num_bytes <= self._most_bytes(copy) + copy.compressed_bytes:
                # Not beside the compressed form, but instead of it.
                self._read_anew(copy, "there is no room for it beside what it is decoded into", done)
                return
            pinned_bytes = sum(each.num_bytes for each in self._copies.values() if each.pins)
            self._refuse_all(
                copy,
                f"{num_bytes} bytes of weights do not fit into the {self.budget_bytes} bytes of memory for weights, "
                f"of which {pinned_bytes} are in use",
                done,
            )
            return
        copy.num_bytes = copy.whole_bytes = num_bytes
        copy.state = CopyState.FILLING
        done.append(Fill(load, num_bytes))

    def _get_on(self, load: int, now_s: float) -> None:
        """Of the whole line: whoever is behind it is nearer too."""
        if self._loading(load, CopyState.SIZING, CopyState.FILLING) is None:
            return
        for copy in self._copies.values():
            for client in copy.waiting:
                copy.waiting[client] = _until_s(copy, now_s)

    def _finish(self, load: int, now_s: float, done: list[ResidenceInstruction]) -> None:
        copy = self._loading(load, CopyState.FILLING)
        if copy is None:
            return
        copy.state, copy.load_s, copy.used_s = CopyState.RESIDENT, now_s - copy.asked_s, now_s
        if copy.compressed_bytes:
            copy.compressed_bytes = 0
            done.append(DropCompressed(copy.key, "it is decoded"))
        for client in copy.waiting:
            copy.pins.add(client)
            done.append(Hand(client, copy.key))
        copy.waiting.clear()

    def _fail(self, load: int, message: str, done: list[ResidenceInstruction]) -> None:
        copy = self._loading(load, CopyState.SIZING, CopyState.FILLING)
        if copy is not None and copy.is_decoding:
            self._read_anew(copy, message, done)
        elif copy is not None:
            # Whoever waited may ask again in its next life; to load again and again for nobody helps nobody.
            self._refuse_all(copy, message, done)

    def _tick(self, now_s: float, done: list[ResidenceInstruction]) -> None:
        for copy in list(self._copies.values()):
            for client in [each for each, until_s in copy.waiting.items() if now_s >= until_s]:
                del copy.waiting[client]
                del self._clients[client]
                why = f"no load got on for {PATIENCE_S:.0f} s"
                if now_s >= copy.asked_s + LONGEST_WAIT_S:
                    why = f"not loaded within {LONGEST_WAIT_S:.0f} s"
                done.append(Refuse(client, copy.key, why))

    # --- compressed copies ------------------------------------------------------------------------------

    def _cool(self, key: WeightsKey, done: list[ResidenceInstruction]) -> None:
        copy = self._copies.get(key)
        if copy is None or copy.state is not CopyState.RESIDENT or copy.pins:
            return
        if any(each.state not in (CopyState.RESIDENT, CopyState.COMPRESSED) for each in self._copies.values()):
            # Loads come first, and what is compressed is compressed by all cores.
            return
        copy.state, copy.load = CopyState.COMPRESSING, self._next_load
        self._next_load += 1
        done.append(Compress(copy.load, key))

    def _size_compression(self, load: int, num_bytes: int, done: list[ResidenceInstruction]) -> None:
        copy = self._loading(load, CopyState.COMPRESSING)
        if copy is None or copy.compressed_bytes:
            return
        if num_bytes > self.budget_bytes - self.used_bytes:
            # It is to make room for others, not to take theirs.
            self._give_up(copy, done)
            return
        copy.compressed_bytes = num_bytes
        done.append(Fill(load, num_bytes))

    def _finish_compression(self, load: int, num_bytes: int, done: list[ResidenceInstruction]) -> None:
        copy = self._loading(load, CopyState.COMPRESSING)
        if copy is None:
            return
        copy.state, copy.num_bytes, copy.compressed_bytes = (
            CopyState.COMPRESSED,
            0,
            min(num_bytes, copy.compressed_bytes),
        )
        done.append(DropRaw(copy.key))

    def _end_compression(self, load: int) -> None:
        copy = self._loading(load, CopyState.COMPRESSING)
        if copy is not None:
            copy.state, copy.compressed_bytes = CopyState.RESIDENT, 0

    def _give_up(self, copy: Copy, done: list[ResidenceInstruction]) -> None:
        done.append(Abort(copy.load))
        copy.state, copy.compressed_bytes = CopyState.RESIDENT, 0

    def _read_anew(self, copy: Copy, reason: str, done: list[ResidenceInstruction]) -> None:
        """From the next tier: it keeps its place in line, and whoever waits for it waits on."""
        copy.state, copy.num_bytes = CopyState.QUEUED, 0
        self._drop_compressed(copy, reason, done)

    def _drop_compressed(self, copy: Copy, reason: str, done: list[ResidenceInstruction]) -> None:
        copy.compressed_bytes, copy.is_decoding = 0, False
        done.append(DropCompressed(copy.key, reason))

    # --- how ------------------------------------------------------------------------------------------

    def _begin_next(self, done: list[ResidenceInstruction]) -> None:
        if any(copy.state in (CopyState.SIZING, CopyState.FILLING) for copy in self._copies.values()):
            return
        for copy in self._copies.values():
            if copy.state is CopyState.QUEUED:
                copy.state, copy.load = CopyState.SIZING, self._next_load
                self._next_load += 1
                copy.is_decoding = copy.compressed_bytes > 0
                done.append(Begin(copy.load, copy.key, copy.is_decoding))
                return

    def _make_room(self, copy: Copy, num_bytes: int, now_s: float, done: list[ResidenceInstruction]) -> bool:
        """Whether there is room for a load now: at the cost of a compression under way, then of the copies not used for
        the longest time, then of compressed forms of others that wait in line. If that is not enough, nothing goes."""
        if num_bytes > self._most_bytes(copy):
            return False
        for each in list(self._copies.values()):
            if num_bytes > self._free_bytes and each.state is CopyState.COMPRESSING and each.compressed_bytes:
                self._give_up(each, done)
        for each in sorted(self._copies.values(), key=lambda each: (each.used_s, each.key)):
            if num_bytes > self._free_bytes and _is_idle(each):
                if each.state is CopyState.COMPRESSING:
                    self._give_up(each, done)
                del self._copies[each.key]
                idle_s = now_s - each.used_s
                done.append(Evict(each.key, f"not used for {idle_s:.0f} s, and {copy.key.folder} needs room"))
        for each in reversed(self._copies.values()):
            if num_bytes > self._free_bytes and each.state is CopyState.QUEUED and each.compressed_bytes:
                self._drop_compressed(each, f"{copy.key.folder} needs room", done)
        return True

    @property
    def _free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def _most_bytes(self, copy: Copy) -> int:
        """What a load of that copy could have, if all went that may go."""
        staying = sum(
            each.compressed_bytes if each is copy else 0 if each.state is CopyState.QUEUED else each.num_bytes
            for each in self._copies.values()
            if each is copy or not _is_idle(each)
        )
        return self.budget_bytes - staying

    def _loading(self, load: int, *states: CopyState) -> Copy | None:
        for copy in self._copies.values():
            if copy.load == load and copy.state in states:
                return copy
        return None

    def _refuse_all(self, copy: Copy, reason: str, done: list[ResidenceInstruction]) -> None:
        """Who waits for it is told. A compressed form is kept: it costs nobody anything who needs the room."""
        if copy.compressed_bytes:
            copy.state, copy.is_decoding = CopyState.COMPRESSED, False
        else:
            del self._copies[copy.key]
        for client in copy.waiting:
            del self._clients[client]
            done.append(Refuse(client, copy.key, reason))
        copy.waiting.clear()


def _until_s(copy: Copy, now_s: float) -> float:
    """When a client gives up that heard now that the line gets on."""
    return min(now_s + PATIENCE_S, copy.asked_s + LONGEST_WAIT_S)


def _is_idle(copy: Copy) -> bool:
    """Whether it may go."""
    return copy.state in (CopyState.RESIDENT, CopyState.COMPRESSING, CopyState.COMPRESSED) and not copy.pins
