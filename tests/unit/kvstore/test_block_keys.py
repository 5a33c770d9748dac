"""Keys share nothing but where all that decides what KV is, and who may see it, is equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.requests import KvClass
from kvstore.block_keys import block_keys, root_key
from tests.support.fake_backend import IDENTITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.layout import KvIdentity

OTHER_MODEL = msgspec.structs.replace(IDENTITY, model_fingerprint="another")
CLASSES: tuple[KvClass, ...] = get_args(KvClass)

#: What a root is made of. Short texts of few letters, so that equal ones and moved borders come up.
SHORT = st.text("a/ ", max_size=3)
ROOTS = st.tuples(st.sampled_from([IDENTITY, OTHER_MODEL]), SHORT, SHORT, st.sampled_from(CLASSES))
TOKENS = st.lists(st.integers(0, 2), max_size=12)

Root = tuple["KvIdentity", str, str, KvClass]


def keys(root: Root, tokens: Sequence[int]) -> list[bytes]:
    return list(block_keys(root_key(*root), tokens, 2))


@given(ROOTS, ROOTS, TOKENS, TOKENS)
def test_keys_are_equal_for_equal_prefixes_of_equal_roots_only(
    one: Root, other: Root, tokens: list[int], others: list[int]
) -> None:
    ours, theirs = keys(one, tokens), keys(other, others)
    assert len(ours) == len(tokens) // 2
    if one != other:
        assert not set(ours) & set(theirs)
        return
    shared = sum(tokens[: 2 * n] == others[: 2 * n] for n in range(1, min(len(ours), len(theirs)) + 1))
    assert ours[:shared] == theirs[:shared]
    assert not set(ours[shared:]) & set(theirs[shared:])


def test_exact_keys_never_are_lossy_ones() -> None:
    assert root_key(IDENTITY, "salt", "adapter") == root_key(IDENTITY, "salt", "adapter", "exact")
    assert root_key(IDENTITY, "salt", "adapter") != root_key(IDENTITY, "salt", "adapter", "lossy")
    assert root_key(IDENTITY, "exact") != root_key(IDENTITY, "", "exact") != root_key(IDENTITY, "", "", "exact")


@pytest.mark.parametrize("tokens", [[2**32], [-1]])
def test_tokens_that_do_not_fit_have_no_key(tokens: list[int]) -> None:
    with pytest.raises(OverflowError):
        keys((IDENTITY, "", "", "exact"), tokens)
