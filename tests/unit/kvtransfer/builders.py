"""Leases, peers and seals for the tests of the lease machines."""

from __future__ import annotations

from contracts.ids import BlockId, Generation, Incarnation, LeaseId, RequestId, WorkerId
from contracts.layout import PROTOCOL_VERSION, BlockLayout, KvIdentity
from contracts.messages import BlockRef, LeaseTerms, Peer, ProgressRequest, Seal
from contracts.requests import TokenDelta

TTL_S = 8.0

IDENTITY = KvIdentity(
    model_fingerprint="model",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=4, dtype="float32"),
    rope_base=10_000.0,
    protocol_version=PROTOCOL_VERSION,
)
HOLDER = Peer(worker_id=WorkerId("p0"), incarnation=Incarnation(7), address="p0:1")
READER = Peer(worker_id=WorkerId("d0"), incarnation=Incarnation(3), address="d0:1")
LEASE = LeaseId("p0/7/1")
SEAL = Seal(num_tokens=9, first_delta=TokenDelta(request_id=RequestId("q"), index=0, token_ids=(5,)))


def terms(
    lease_id: LeaseId = LEASE,
    *,
    num_blocks: int = 3,
    ttl_s: float = TTL_S,
    holder: Peer = HOLDER,
    identity: KvIdentity = IDENTITY,
    transport: str = "memory",
    endpoint: bytes = b"pool",
) -> LeaseTerms:
    return LeaseTerms(
        lease_id=lease_id,
        holder=holder,
        identity=identity,
        endpoints={transport: endpoint},
        num_blocks=num_blocks,
        ttl_s=ttl_s,
    )


def refs(*block_ids: int) -> tuple[BlockRef, ...]:
    return tuple(BlockRef(BlockId(block_id), Generation(0)) for block_id in block_ids)


def progress(
    start: int,
    *block_ids: int,
    seal: Seal | None = None,
    withdrawn: str | None = None,
    lease_id: LeaseId = LEASE,
    incarnation: Incarnation = HOLDER.incarnation,
    checksums: tuple[int, ...] = (),
) -> ProgressRequest:
    return ProgressRequest(
        lease_id=lease_id,
        holder_incarnation=incarnation,
        start=start,
        blocks=refs(*block_ids),
        checksums=checksums,
        seal=seal,
        withdrawn=withdrawn,
    )
