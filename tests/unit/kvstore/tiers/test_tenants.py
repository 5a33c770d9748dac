"""Two tenants never share: whatever differs in salt, adapter or class has other keys, and gets none of the others'."""

from __future__ import annotations

from itertools import combinations, product
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from contracts.requests import KvClass
from kvstore.block_keys import root_key
from kvstore.prefix_cache import KeyChain
from tests.support.store_chains import BLOCK_TOKENS, IDENTITY
from tests.support.store_disk import ModelDisk
from tests.support.store_views import content
from tests.support.store_world import StoreWorld

Owner = tuple[str, str, KvClass]
#: Ones that would be the same if their parts were joined carelessly.
ALIKE = ["", "a", "b", "ab", "ba", "aa", "exact", "lossy", "\x00", "a\x00", "\x00a"]
NAMES = st.sampled_from(ALIKE) | st.text(max_size=4)
CLASSES: st.SearchStrategy[KvClass] = st.sampled_from(["exact", "lossy"])
OWNERS = st.lists(st.tuples(NAMES, NAMES, CLASSES), min_size=2, max_size=4, unique=True)
#: Few numbers: equal blocks, also within one prompt.
TOKENS = st.lists(st.integers(0, 1), min_size=BLOCK_TOKENS, max_size=6 * BLOCK_TOKENS)


def keys_of(owner: Owner, tokens: list[int]) -> tuple[bytes, ...]:
    salt, adapter, kv_class = owner
    chain = KeyChain(root_key(IDENTITY, salt, adapter, kv_class), tokens, BLOCK_TOKENS)
    return chain.part(0, len(chain))


@given(OWNERS, st.lists(TOKENS, min_size=1, max_size=3))
def test_no_key_of_one_is_a_key_of_another(owners: list[Owner], prompts: list[list[int]]) -> None:
    keys = [{key for tokens in prompts for key in keys_of(owner, tokens)} for owner in owners]
    for ours, theirs in combinations(keys, 2):
        assert ours
        assert not ours & theirs


def test_names_that_look_alike_when_joined_share_nothing_either() -> None:
    owners: list[Owner] = [*product(ALIKE, ALIKE, get_args(KvClass))]
    keys = [key for owner in owners for key in keys_of(owner, [0] * (2 * BLOCK_TOKENS))]
    assert len(set(keys)) == len(keys) == 2 * len(owners)


@given(TOKENS, TOKENS, st.tuples(NAMES, NAMES, CLASSES))
def test_equal_keys_are_equal_beginnings_and_the_other_way_round(
    tokens: list[int], others: list[int], owner: Owner
) -> None:
    pairs = zip(keys_of(owner, tokens), keys_of(owner, others), strict=False)
    for number, (ours, theirs) in enumerate(pairs, 1):
        stop = number * BLOCK_TOKENS
        assert (ours == theirs) == (tokens[:stop] == others[:stop])


@given(OWNERS, TOKENS, st.booleans(), st.data())
def test_a_fetch_never_gets_another_tenants_blocks(
    owners: list[Owner], tokens: list[int], in_memory: bool, data: st.DataObject
) -> None:
    """Both send the very same prompt; what the first one's left behind is found by the first one only."""
    first, *others = owners
    store = StoreWorld(32, ModelDisk(() if in_memory else keys_of(first, tokens)))
    if in_memory:
        store.keep(keys_of(first, tokens))
        store.finish_disk()
    for number, owner in enumerate(data.draw(st.permutations([*others, first]))):
        fetch = store.ask(f"f{number}", keys_of(owner, tokens))
        store.finish_disk()
        store.check()
        if owner == first:
            assert fetch.end == len(tokens) // BLOCK_TOKENS
            assert [store.memory[block] for block in fetch.blocks] == list(map(content, fetch.keys))
        else:
            assert fetch.end == 0
