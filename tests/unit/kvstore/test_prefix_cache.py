"""Finding and naming blocks by key: what stands is found, nothing else, and only under the same salt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from contracts.layout import BlockLayout, KvIdentity
from kvstore.block_keys import block_keys, root_key
from kvstore.prefix_cache import KeyChain, PrefixCache
from kvtransfer import BlockClass, Ledger

if TYPE_CHECKING:
    from contracts.ids import BlockId

BLOCK_TOKENS = 4
IDENTITY = KvIdentity(
    model_fingerprint="m",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=BLOCK_TOKENS, dtype="float32"),
    rope_base=10000.0,
    protocol_version=1,
)


def read(ledger: Ledger, cache: PrefixCache, owner: str, tokens: list[int], salt: str = "") -> list[BlockId]:
    """As a prompt that is read whole, sharing what it finds."""
    chain = cache.chain(tokens, salt)
    found = cache.match_prompt(chain, len(tokens))
    ledger.share(owner, found)
    new = ledger.allocate(owner, IDENTITY.layout.blocks_for(len(tokens)) - len(found))
    assert new is not None
    cache.name(chain, [*found, *new], len(found), len(tokens) // BLOCK_TOKENS)
    return found


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.lists(st.integers(-2, 12), max_size=12))
def test_a_chain_gives_the_keys_of_block_keys_in_whatever_order_they_are_asked_for(
    tokens: list[int], asked: list[int]
) -> None:
    root = root_key(IDENTITY, "s")
    whole = list(block_keys(root, tokens, BLOCK_TOKENS))
    chain = KeyChain(root, tokens, BLOCK_TOKENS)
    assert len(chain) == len(whole)
    for index in asked:
        if 0 <= index < len(whole):
            assert chain[index] == whole[index]
        else:
            try:
                chain[index]
            except IndexError:
                continue
            raise AssertionError(f"key {index} of {len(whole)}")
    assert list(chain.part(0, len(whole))) == whole


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=10), max_size=8), st.booleans())
def test_a_chain_grows_with_its_sequence_and_says_what_one_of_the_whole_would(
    parts: list[list[int]], asks: bool
) -> None:
    """Whether keys were asked for before it grew or not."""
    cache = PrefixCache(Ledger(1), IDENTITY)
    tokens: list[int] = []
    chain = cache.chain(tokens, "s")
    for part in parts:
        tokens += part
        whole = tuple(block_keys(root_key(IDENTITY, "s"), tokens, BLOCK_TOKENS))
        assert len(chain) == len(whole)
        if asks:
            assert chain.part(0, len(chain)) == whole
    assert chain.part(0, len(chain)) == tuple(block_keys(root_key(IDENTITY, "s"), tokens, BLOCK_TOKENS))


def test_the_classes_share_nothing() -> None:
    cache = PrefixCache(Ledger(1), IDENTITY)
    exact, lossy = (cache.chain(range(8), "", kv_class) for kv_class in ("exact", "lossy"))
    assert not set(exact.part(0, 2)) & set(lossy.part(0, 2))
    assert cache.chain(range(8), "").part(0, 2) == exact.part(0, 2)


def test_the_last_token_is_always_left_to_compute() -> None:
    ledger = Ledger(16)
    cache = PrefixCache(ledger, IDENTITY)
    read(ledger, cache, "a", list(range(12)))
    for num_tokens, num_found in ((1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)):
        tokens = list(range(num_tokens))
        assert len(cache.match_prompt(cache.chain(tokens, ""), num_tokens)) == num_found, num_tokens


def test_other_salts_and_other_models_share_nothing() -> None:
    ledger = Ledger(16)
    tokens = list(range(9))
    read(ledger, PrefixCache(ledger, IDENTITY), "a", tokens, "tenant-a")
    same = PrefixCache(ledger, IDENTITY)
    assert len(same.match_prompt(same.chain(tokens, "tenant-a"), 9)) == 2
    assert same.match_prompt(same.chain(tokens, "tenant-b"), 9) == []
    assert same.match_prompt(same.chain(tokens, ""), 9) == []
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=BLOCK_TOKENS, dtype="bfloat16")
    other_identity = KvIdentity(model_fingerprint="m", layout=layout, rope_base=10000.0, protocol_version=1)
    other = PrefixCache(ledger, other_identity)
    assert other.match_prompt(other.chain(tokens, "tenant-a"), 9) == []


def test_switched_off_it_finds_and_keeps_nothing() -> None:
    ledger = Ledger(8)
    cache = PrefixCache(ledger, IDENTITY, enabled=False)
    read(ledger, cache, "a", list(range(9)))
    assert read(ledger, cache, "b", list(range(9))) == []
    ledger.release_all("a")
    ledger.release_all("b")
    assert ledger.load()["free_blocks"] == 8


def test_what_somebody_holds_is_told_from_what_nobody_does() -> None:
    ledger = Ledger(8)
    cache = PrefixCache(ledger, IDENTITY)
    read(ledger, cache, "a", list(range(13)))
    found = cache.match_prompt(cache.chain(list(range(13)), ""), 13)
    assert (len(found), cache.num_held(found)) == (3, 3)
    ledger.release("a", ledger.blocks_of("a")[1:])
    assert cache.num_held(found) == 1
    assert [ledger.block_class(block) for block in found] == [BlockClass.OWNED, BlockClass.CACHED, BlockClass.CACHED]


class Heard:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def stored(self, key: bytes) -> None:
        assert key not in self.keys
        self.keys.add(key)

    def removed(self, key: bytes) -> None:
        self.keys.remove(key)


@given(st.data())
def test_shared_blocks_hold_the_right_tokens_and_the_listener_knows_every_key(data: st.DataObject) -> None:
    """Prompts over three token ids come and go in a small pool; the content of each block is what was put there
    when it was allocated."""
    ledger = Ledger(12)
    heard = Heard()
    ledger.key_listener = heard
    cache = PrefixCache(ledger, IDENTITY)
    content: dict[BlockId, tuple[str, tuple[int, ...]]] = {}
    owners: list[str] = []
    for number in range(data.draw(st.integers(1, 25), label="prompts")):
        ends = data.draw(st.booleans(), label="one ends")
        if ends and owners:
            ledger.release_all(owners.pop(data.draw(st.integers(0, len(owners) - 1))))
        tokens = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=24), label="tokens")
        salt = data.draw(st.sampled_from(["", "t"]), label="salt")
        chain = cache.chain(tokens, salt)
        found = cache.match_prompt(chain, len(tokens))
        num_new = IDENTITY.layout.blocks_for(len(tokens)) - len(found)
        if num_new + len(found) - cache.num_held(found) > ledger.available_blocks:
            continue
        owner = f"r{number}"
        ledger.share(owner, found)
        new = ledger.allocate(owner, num_new)
        assert new is not None, "what is held takes none of the available blocks"
        owners.append(owner)
        for place, block in enumerate(found):
            assert content[block] == (salt, tuple(tokens[: (place + 1) * BLOCK_TOKENS]))
        for place, block in enumerate(new, len(found)):
            content[block] = (salt, tuple(tokens[: (place + 1) * BLOCK_TOKENS]))
        cache.name(chain, [*found, *new], len(found), len(tokens) // BLOCK_TOKENS)
        ledger.check()
        assert heard.keys == set(ledger.all_keys())
