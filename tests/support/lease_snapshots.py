"""Copies and canonical forms of the lease machines, for the model checker.

A machine's copy shares what never changes. Its canonical form is equal for machines that behave alike from now on:
times count from now, what is past counts as past, and counters are left out.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from kvtransfer.holder_lease import HolderCounters
from kvtransfer.reader_lease import ReaderCounters, ReaderState

if TYPE_CHECKING:
    from contracts.ids import LeaseId
    from contracts.messages import LeaseTerms
    from kvtransfer.holder import Holder
    from kvtransfer.holder_lease import HolderLease
    from kvtransfer.ledger import Ledger
    from kvtransfer.reader import Reader
    from kvtransfer.reader_events import HolderKey
    from kvtransfer.reader_lease import ReaderLease

T = TypeVar("T")

#: Shared by copies: values, and counters, which nothing depends on.
_ATOMS = (
    int, float, str, bytes, bool, type(None), tuple, range, frozenset, Enum, msgspec.Struct, BaseException, Counter,
    HolderCounters, ReaderCounters,
)  # fmt: skip


class _Kind(Enum):
    ATOM = 0
    DICT = 1
    LIST = 2
    SET = 3
    OBJECT = 4


#: How to copy each type that was met.
_kinds: dict[type[Any], tuple[_Kind, tuple[str, ...]]] = {}


def clone(node: T) -> T:
    """An independent copy of a node and its machine."""
    copy: T = _clone(node, {})
    return copy


def _clone(value: Any, memo: dict[int, Any]) -> Any:
    cls: type[Any] = value.__class__
    kind, names = _kinds.get(cls) or _kind_of(value)
    if kind is _Kind.ATOM:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    copy: Any
    if kind is _Kind.OBJECT:
        copy = object.__new__(cls)
        memo[id(value)] = copy
        for name in names or tuple(_inside(value)):
            setattr(copy, name, _clone(getattr(value, name), memo))
        return copy
    # What a container holds is of one kind.
    first: Any = next(iter(value.values() if kind is _Kind.DICT else value), None)
    if kind is _Kind.SET or _kind_of(first)[0] is _Kind.ATOM:
        copy = value.copy()
    elif kind is _Kind.DICT:
        copy = cls((key, _clone(each, memo)) for key, each in value.items())
    else:
        copy = [_clone(each, memo) for each in value]
    memo[id(value)] = copy
    return copy


def _kind_of(value: Any) -> tuple[_Kind, tuple[str, ...]]:
    cls: type[Any] = value.__class__
    known = _kinds.get(cls)
    if known is not None:
        return known
    names: tuple[str, ...] = getattr(cls, "__slots__", ())
    kind = _Kind.OBJECT
    params: Any = getattr(cls, "__dataclass_params__", None)
    if isinstance(value, _ATOMS) or callable(value) or (params is not None and params.frozen):
        kind = _Kind.ATOM
    elif issubclass(cls, dict):
        kind = _Kind.DICT
    elif issubclass(cls, list):
        kind = _Kind.LIST
    elif issubclass(cls, set):
        kind = _Kind.SET
    _kinds[cls] = (kind, names)
    return kind, names


def _inside(thing: object) -> dict[str, Any]:
    return thing.__dict__


def _until(time_s: float, now_s: float) -> float:
    return round(max(0.0, time_s - now_s), 4)


def _deadlines_key(machine: Any, now_s: float) -> object:
    inside: dict[str, Any] = _inside(machine)
    valid: dict[object, tuple[float, int]] = _inside(inside["_deadlines"])["_valid"]
    return tuple(sorted((str(key), _until(due[0], now_s)) for key, due in valid.items()))


def ledger_key(ledger: Ledger) -> object:
    inside: dict[str, Any] = _inside(ledger)
    return (
        tuple((owner, tuple(blocks)) for owner, blocks in inside["_owned"].items()),
        tuple(inside["_pinned"].items()),
        tuple((k, tuple(v.blocks), v.pulling, v.quarantined) for k, v in inside["_reservations"].items()),
        tuple(inside["_free"]),
    )


def holder_key(machine: Holder, ledger: Ledger, now_s: float) -> object:
    inside: dict[str, Any] = _inside(machine)
    leases = tuple(
        (
            lease_id, _until(lease.expires_s, now_s), _until(lease.last_s, now_s), lease.accepted, lease.num_final,
            lease.num_ready, lease.preparing, lease.seal is None, lease.expected, lease.seal_known, lease.confirmed,
            max(lease.had, lease.num_ready), lease.num_skipped, lease.calling, lease.sent_seal,
            min(lease.failures, 6), _until(lease.retry_at_s, now_s),
        )
        for lease_id, lease in inside["_leases"].items()
    )  # fmt: skip
    farewells = tuple(
        (lease_id, _until(each.until_s, now_s), each.calling, min(each.failures, 6), _until(each.retry_at_s, now_s))
        for lease_id, each in inside["_farewells"].items()
    )
    return (leases, farewells, tuple(sorted(inside["_lingering"])), ledger_key(ledger), _deadlines_key(machine, now_s))


def reader_key(machine: Reader, ledger: Ledger, now_s: float) -> object:
    inside: dict[str, Any] = _inside(machine)
    leases = tuple(
        (
            lease_id, lease.terms.holder.incarnation, lease.state.value, _until(lease.expires_s, now_s),
            _until(lease.renew_at_s, now_s), len(lease.announced), lease.num_pulled, lease.num_pulling, lease.window,
            lease.have, lease.num_final, lease.landing, lease.refetches, lease.seal is None, lease.calling,
            min(lease.failures, 6), _until(lease.retry_at_s, now_s),
        )
        for lease_id, lease in inside["_leases"].items()
    )  # fmt: skip
    by_holder: dict[HolderKey, Any] = _inside(inside["_calls"])["_holders"]
    holders = tuple(
        (
            key, tuple(each.leases), tuple((k, _until(v, now_s)) for k, v in each.acks_owed.items()), each.renewing,
            None if each.renewing is None else round(now_s - each.renew_asked_s, 4), min(each.renew_failures, 6),
            _until(each.renew_retry_at_s, now_s), each.acking, min(each.ack_failures, 6),
            _until(each.ack_retry_at_s, now_s),
        )
        for key, each in by_holder.items()
    )  # fmt: skip
    return (
        leases, holders, tuple(inside["_waiting"]), tuple(inside["_newest"].items()), tuple(inside["_ended"]),
        ledger_key(ledger), _deadlines_key(machine, now_s),
    )  # fmt: skip


def holder_lease(machine: Holder, lease_id: LeaseId) -> HolderLease | None:
    """What the holder keeps of a lease; None once it has ended."""
    leases: dict[LeaseId, HolderLease] = _inside(machine)["_leases"]
    return leases.get(lease_id)


def reader_terms(machine: Reader) -> list[tuple[LeaseTerms, float]]:
    """The terms of each lease that the reader counts on, and until when it does."""
    leases: dict[LeaseId, ReaderLease] = _inside(machine)["_leases"]
    live = [lease for lease in leases.values() if lease.state is not ReaderState.QUARANTINED]
    return [(lease.terms, lease.expires_s) for lease in live]


def holds(machine: Reader, lease_id: LeaseId) -> bool:
    """Whether the reader has a lease, or its blocks in quarantine."""
    return lease_id in _inside(machine)["_leases"]
