"""Keys of a prompt's blocks at the gateway: those that workers would make."""

from __future__ import annotations

import msgspec

from gateway.block_hints import BlockHints
from kvstore.block_keys import block_keys, hints, root_key
from tests.support.fake_backend import IDENTITY

OTHER = msgspec.structs.replace(IDENTITY, model_fingerprint="other")
BLOCK_TOKENS = IDENTITY.layout.block_tokens
PROMPT = tuple(range(5 * BLOCK_TOKENS + 1))


def test_they_are_those_of_the_workers() -> None:
    known = BlockHints()
    known.learn([IDENTITY, IDENTITY])
    wanted = hints(list(block_keys(root_key(IDENTITY, "salt"), PROMPT, BLOCK_TOKENS)))
    assert known.of(PROMPT, "salt") == wanted
    assert len(wanted) == 5 * 8
    assert known.of(PROMPT, "other") != wanted
    lossy = hints(list(block_keys(root_key(IDENTITY, "salt", kv_class="lossy"), PROMPT, BLOCK_TOKENS)))
    assert known.of(PROMPT, "salt", "lossy") == lossy != wanted
    assert known.of(PROMPT, "salt") == wanted, "the root of one class became the other's"
    assert known.of(PROMPT[: BLOCK_TOKENS - 1], "salt") == b""


def test_there_are_none_while_workers_are_unknown_or_disagree() -> None:
    known = BlockHints()
    assert known.of(PROMPT, "") == b""
    known.learn([])
    known.learn([IDENTITY, OTHER])
    assert known.of(PROMPT, "") == b""
    known.learn([OTHER])
    assert known.of(PROMPT, "") == hints(list(block_keys(root_key(OTHER, ""), PROMPT, BLOCK_TOKENS)))
    known.learn([])
    assert known.of(PROMPT, ""), "workers that are all restarting are the same ones again"
    known.learn([IDENTITY])
    assert known.of(PROMPT, "") == hints(list(block_keys(root_key(IDENTITY, ""), PROMPT, BLOCK_TOKENS)))


def test_any_number_of_salts_may_come() -> None:
    known = BlockHints()
    known.learn([IDENTITY])
    first = known.of(PROMPT, "0")
    assert len({known.of(PROMPT, str(number)) for number in range(3000)}) == 3000
    assert known.of(PROMPT, "0") == first
