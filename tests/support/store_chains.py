"""A few prompts for a store, some with a common beginning, and the keys of their blocks."""

from __future__ import annotations

from contracts.layout import BlockLayout, KvIdentity
from kvstore.block_keys import block_keys, root_key

BLOCK_TOKENS = 4
IDENTITY = KvIdentity(
    model_fingerprint="m",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=BLOCK_TOKENS, dtype="float32"),
    rope_base=10000.0,
    protocol_version=1,
)


def chain(*blocks: int, salt: str = "", adapter: str = "") -> tuple[bytes, ...]:
    """The keys of a prompt that has these numbers as its blocks' tokens."""
    tokens = [number for number in blocks for _ in range(BLOCK_TOKENS)]
    return tuple(block_keys(root_key(IDENTITY, salt, adapter), tokens, BLOCK_TOKENS))


#: The second has two blocks of the first, the third four; the fourth has the same tokens under another salt.
CHAINS = (chain(0, 1, 2, 3, 4, 5), chain(0, 1, 12, 13), chain(0, 1, 2, 3, 24), chain(0, 1, 2, salt="other"))

#: Of each key in its sequence.
POSITIONS = {key: position for keys in CHAINS for position, key in enumerate(keys)}
