"""Keys of full blocks: content addresses that say "this KV, behind exactly these tokens, of exactly this model".

A key is the SHA-256 of its parent's key and its own tokens, the first block's parent being a root that holds
everything else that changes the bytes or who may see them. Two equal keys therefore mean equal prefixes, and no one
can make a colliding prompt (a fast hash would let one tenant read another's cache: CVE-2025-25183).

Between processes mostly the first eight bytes travel: enough to place by, since whoever holds the block compares
the whole key before it serves it.
"""

from __future__ import annotations

from array import array
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from contracts.layout import KvIdentity
    from contracts.requests import KvClass

KEY_BYTES = 32
#: Of a key, where a hint is enough.
HINT_BYTES = 8


def root_key(identity: KvIdentity, cache_salt: str, adapter: str = "", kv_class: KvClass = "exact") -> bytes:
    """What the keys of a prompt's blocks descend from; equal for equal arguments in every process.

    Whatever differs in one argument shares no key: a key of the exact class never names KV that went through a lossy
    codec, nor was computed after such KV.
    """
    # Encoded as one array of whole strings, so that no two different quadruples are the same bytes.
    return sha256(msgspec.msgpack.encode((b"tandem-kv-2", identity, adapter, cache_salt, kv_class))).digest()


def block_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> Iterator[bytes]:
    """The keys of the full blocks of `token_ids`, in order; ids must fit into 32 bits unsigned."""
    packed = memoryview(array("I", token_ids)).cast("B")
    step = 4 * block_tokens
    parent = root
    for end in range(step, len(packed) + 1, step):
        parent = sha256(parent + packed[end - step : end]).digest()
        yield parent


def hints(keys: Sequence[bytes]) -> bytes:
    """The first eight bytes of each, one after another."""
    return b"".join(key[:HINT_BYTES] for key in keys)
