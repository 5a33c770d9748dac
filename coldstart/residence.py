"""Which models' weights lie in this machine's memory: the machine of the node's DRAM tier.

Copies are loaded one after the other, in the order in which they were asked for (the disk is one queue, and what waits
for it can be foretold); everybody who asks for a model that is being loaded waits for that one load. A copy that a
client uses is pinned; of the others the one not used for the longest time goes when room is needed. What does not fit
beside the pinned ones is refused, and the client reads its weights itself.

`handle(event, now_s)` answers with instructions; nothing is done here. A load goes through three states:

    QUEUED --begin--> SIZING --Sized--> FILLING --Loaded--> RESIDENT --room is needed--> gone
                         any --LoadFailed, patience over--> gone
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


@dataclass(slots=True, kw_only=True)
class Copy:
    """What is known of one key. Read-only outside of this module."""

    key: WeightsKey
    state: CopyState
    asked_s: float
    used_s: float
    #: 0 until it is known.
    num_bytes: int = 0
    load_s: float = 0.0
    #: Clients that use it.
    pins: set[int] = field(default_factory=set[int])
    #: Clients that wait for it, with the time at which they give up.
    waiting: dict[int, float] = field(default_factory=dict[int, float])
    #: Number of the load that fills it: what an earlier one still says is not meant.
    load: int = 0


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


ResidenceEvent: TypeAlias = Asked | Gone | Sized | Advanced | Loaded | LoadFailed | Ticked


# --- instructions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Start a load; it tells `Sized`, and then waits for `Fill` or `Abort`."""

    load: int
    key: WeightsKey


@dataclass(frozen=True, slots=True)
class Fill:
    """Its memory may be taken."""

    load: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Abort:
    """End a load and give back its memory; nothing more is heard of it."""

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
    """Give back the memory of a copy that nobody uses."""

    key: WeightsKey
    reason: str


ResidenceInstruction: TypeAlias = Begin | Fill | Abort | Hand | Refuse | Evict


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
        return sum(copy.num_bytes for copy in self._copies.values())

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
        if copy is None:
            if sum(each.state is CopyState.QUEUED for each in self._copies.values()) >= MAX_QUEUED:
                if client is not None:
                    done.append(Refuse(client, key, f"{MAX_QUEUED} loads are waiting already"))
                return
            copy = self._copies[key] = Copy(key=key, state=CopyState.QUEUED, asked_s=now_s, used_s=now_s)
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
        victims = self._victims(num_bytes)
        if victims is None:
            pinned_bytes = sum(each.num_bytes for each in self._copies.values() if each.pins)
            done.append(Abort(load))
            self._drop(
                copy,
                f"{num_bytes} bytes of weights do not fit into the {self.budget_bytes} bytes of memory for weights, "
                f"of which {pinned_bytes} are in use",
                done,
            )
            return
        for victim in victims:
            del self._copies[victim.key]
            idle_s = now_s - victim.used_s
            done.append(Evict(victim.key, f"not used for {idle_s:.0f} s, and {copy.key.folder} needs room"))
        copy.num_bytes, copy.state = num_bytes, CopyState.FILLING
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
        for client in copy.waiting:
            copy.pins.add(client)
            done.append(Hand(client, copy.key))
        copy.waiting.clear()

    def _fail(self, load: int, message: str, done: list[ResidenceInstruction]) -> None:
        copy = self._loading(load, CopyState.SIZING, CopyState.FILLING)
        if copy is not None:
            # Whoever waited may ask again in its next life; to load again and again for nobody helps nobody.
            self._drop(copy, message, done)

    def _tick(self, now_s: float, done: list[ResidenceInstruction]) -> None:
        for copy in list(self._copies.values()):
            for client in [each for each, until_s in copy.waiting.items() if now_s >= until_s]:
                del copy.waiting[client]
                del self._clients[client]
                why = f"no load got on for {PATIENCE_S:.0f} s"
                if now_s >= copy.asked_s + LONGEST_WAIT_S:
                    why = f"not loaded within {LONGEST_WAIT_S:.0f} s"
                done.append(Refuse(client, copy.key, why))

    # --- how ------------------------------------------------------------------------------------------

    def _begin_next(self, done: list[ResidenceInstruction]) -> None:
        if any(copy.state in (CopyState.SIZING, CopyState.FILLING) for copy in self._copies.values()):
            return
        for copy in self._copies.values():
            if copy.state is CopyState.QUEUED:
                copy.state, copy.load = CopyState.SIZING, self._next_load
                self._next_load += 1
                done.append(Begin(copy.load, copy.key))
                return

    def _victims(self, num_bytes: int) -> list[Copy] | None:
        """Those not used for the longest time, until there is room; None where there cannot be enough."""
        free_bytes = self.budget_bytes - self.used_bytes
        idle = [each for each in self._copies.values() if each.state is CopyState.RESIDENT and not each.pins]
        victims: list[Copy] = []
        for each in sorted(idle, key=lambda each: (each.used_s, each.key)):
            if free_bytes >= num_bytes:
                break
            victims.append(each)
            free_bytes += each.num_bytes
        return victims if free_bytes >= num_bytes else None

    def _loading(self, load: int, *states: CopyState) -> Copy | None:
        for copy in self._copies.values():
            if copy.load == load and copy.state in states:
                return copy
        return None

    def _drop(self, copy: Copy, reason: str, done: list[ResidenceInstruction]) -> None:
        del self._copies[copy.key]
        for client in copy.waiting:
            del self._clients[client]
            done.append(Refuse(client, copy.key, reason))


def _until_s(copy: Copy, now_s: float) -> float:
    """When a client gives up that heard now that the line gets on."""
    return min(now_s + PATIENCE_S, copy.asked_s + LONGEST_WAIT_S)
