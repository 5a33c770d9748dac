"""Which offers a reader can never take: each mismatch is refused once, with both values, and nothing begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import BadRequest, IncompatiblePeer, NoCapacity
from contracts.layout import BlockLayout, KvIdentity
from kvtransfer.ledger import Ledger
from kvtransfer.reader import Reader
from kvtransfer.reader_events import Offered, RefuseOffer
from tests.unit.kvtransfer.builders import IDENTITY, terms

if TYPE_CHECKING:
    from contracts.messages import LeaseTerms


def changed_layout(**values: object) -> BlockLayout:
    return msgspec.structs.replace(IDENTITY.layout, **values)


def changed(**values: object) -> KvIdentity:
    return msgspec.structs.replace(IDENTITY, **values)


#: What differs at the holder, and the two values that the refusal must name: the reader's and the holder's.
MISMATCHES: dict[str, tuple[KvIdentity, str, str]] = {
    "model": (changed(model_fingerprint="other"), "'model' here", "'other' there"),
    "rope base": (changed(rope_base=5.0), "10000.0 here", "5.0 there"),
    "protocol": (
        changed(protocol_version=1),
        f"protocol_version: {IDENTITY.protocol_version} here",
        "1 there",
    ),
    "dtype": (changed(layout=changed_layout(dtype="float16")), "dtype='float32'", "dtype='float16'"),
    "layers": (changed(layout=changed_layout(num_layers=9)), "num_layers=1", "num_layers=9"),
    "heads": (changed(layout=changed_layout(num_kv_heads=9)), "num_kv_heads=1", "num_kv_heads=9"),
    "head size": (changed(layout=changed_layout(head_dim=9)), "head_dim=2", "head_dim=9"),
    "block size": (changed(layout=changed_layout(block_tokens=9)), "block_tokens=4", "block_tokens=9"),
}


def refuse(offer: LeaseTerms, *, checksum: bool = False) -> Exception:
    """The refusal of an offer to a reader of eight blocks; it must leave nothing behind."""
    ledger = Ledger(8)
    reader = Reader(ledger, IDENTITY, ("shm", "memory"), checksum=checksum)
    (refusal,) = reader.handle(Offered(terms=offer, owner="r"), 0.0)
    assert isinstance(refusal, RefuseOffer)
    assert reader.idle
    assert ledger.load()["free_blocks"] == 8
    assert reader.counters.refused == {refusal.error.code: 1}
    return refusal.error


@pytest.mark.parametrize("what", MISMATCHES)
def test_kv_that_means_something_else_is_refused_with_both_values(what: str) -> None:
    identity, ours, theirs = MISMATCHES[what]
    error = refuse(terms(identity=identity))
    assert isinstance(error, IncompatiblePeer)
    assert ours in str(error)
    assert theirs in str(error)
    assert "KV of p0" in str(error)


def test_every_field_of_the_identity_counts() -> None:
    different = {field for identity, _, _ in MISMATCHES.values() for field in _differing(identity, IDENTITY)}
    assert different == set(KvIdentity.__struct_fields__)
    layouts = {field for each, _, _ in MISMATCHES.values() for field in _differing(each.layout, IDENTITY.layout)}
    assert layouts == set(BlockLayout.__struct_fields__)


def _differing(one: msgspec.Struct, other: msgspec.Struct) -> list[str]:
    return [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]


def test_no_common_transport_is_refused_with_both_lists() -> None:
    error = refuse(terms(transport="ucx"))
    assert isinstance(error, IncompatiblePeer)
    assert "shm, memory here, ucx there" in str(error)


def test_checksums_that_are_wanted_and_missing_are_refused() -> None:
    error = refuse(terms(), checksum=True)
    assert isinstance(error, IncompatiblePeer)
    assert "checksums of p0: True here, False there" in str(error)


@pytest.mark.parametrize("num_blocks", [0, 9])
def test_lease_that_can_never_fit_is_refused(num_blocks: int) -> None:
    error = refuse(terms(num_blocks=num_blocks))
    assert isinstance(error, BadRequest)
    assert f"{num_blocks} blocks can never fit: this pool has 8" in str(error)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan")])
def test_lease_without_a_term_is_refused(ttl_s: float) -> None:
    assert isinstance(refuse(terms(ttl_s=ttl_s)), BadRequest)


def test_incompatible_peers_are_not_told_to_wait() -> None:
    """A full reader refuses for good what it could never take."""
    ledger = Ledger(8)
    ledger.allocate("others", 8)
    reader = Reader(ledger, IDENTITY, ("memory",), max_waiting=0)
    for offer, kind in ((terms(), NoCapacity), (terms(identity=changed(rope_base=5.0)), IncompatiblePeer)):
        (refusal,) = reader.handle(Offered(terms=offer, owner="r"), 0.0)
        assert isinstance(refusal, RefuseOffer)
        assert isinstance(refusal.error, kind)
