"""How the UCX transport cuts pulls into parts, and what it tells UCX about interfaces. Needs no NIXL."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadRequest, ConfigError
from contracts.ids import BlockId, Incarnation
from kvtransfer.transport import check_pairs, runs
from kvtransfer.ucx_agent import net_devices
from kvtransfer.ucx_endpoint import UcxEndpoint, decode_endpoint, encode_endpoint
from kvtransfer.ucx_work import checked_table, parts, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer import BlockPair
    from kvtransfer.ucx_work import Part

BLOCK_BYTES = 100

PAIRS = st.lists(
    st.tuples(st.integers(-1, 12), st.integers(-1, 12)).map(lambda each: (BlockId(each[0]), BlockId(each[1]))),
    max_size=40,
)


def cut(pairs: Sequence[tuple[int, int]], part_bytes: int) -> list[Part]:
    blocks = [(BlockId(source), BlockId(target)) for source, target in pairs]
    return list(parts(checked_table(blocks, 99, 99), BLOCK_BYTES, part_bytes))


@given(PAIRS.map(lambda pairs: [each for each in pairs if min(each) >= 0]), st.integers(1, 9))
def test_parts_are_the_runs_of_so_many_blocks(pairs: list[BlockPair], blocks_per_part: int) -> None:
    found = [
        list(zip(*(column.tolist() for column in part), strict=True))
        for part in cut(pairs, blocks_per_part * BLOCK_BYTES)
    ]
    starts = range(0, len(pairs), blocks_per_part)
    assert found == [list(runs(pairs[start : start + blocks_per_part])) for start in starts]


def test_block_larger_than_a_part_travels_whole() -> None:
    assert [part[2].tolist() for part in cut([(n, n) for n in range(3)], BLOCK_BYTES - 1)] == [[1], [1], [1]]


def test_pieces_are_addresses_and_sizes() -> None:
    ((sources, targets, lengths),) = cut([(2, 0), (3, 1)], 1000)
    assert pieces(1 << 47, None, sources, lengths, BLOCK_BYTES).tolist() == [[(1 << 47) + 200, 200, 0]]
    assert pieces(5, 3, targets, lengths, BLOCK_BYTES).tolist() == [[5, 200, 3]]


@given(PAIRS)
def test_pairs_are_checked_against_both_pools(pairs: list[BlockPair]) -> None:
    try:
        check_pairs(pairs, 9, 10)
    except BadRequest as error:
        with pytest.raises(BadRequest, match=re.escape(error.message)):
            checked_table(pairs, 9, 10)
    else:
        assert checked_table(pairs, 9, 10).tolist() == [list(each) for each in pairs]


def test_interfaces() -> None:
    assert net_devices(None) == "lo"
    assert net_devices("lo") == "lo"
    with pytest.raises(ConfigError, match="nowhere0"):
        net_devices("nowhere0")


def test_endpoint_shows_neither_addresses_nor_keys() -> None:
    endpoint = UcxEndpoint(
        agent="p/1/x",
        metadata=b"metadata",
        software="nixl 1",
        address=4096,
        num_blocks=2,
        block_bytes=BLOCK_BYTES,
        device=None,
        incarnation=Incarnation(1),
    )
    assert repr(endpoint) == f"<UcxEndpoint p/1/x [2 x {BLOCK_BYTES} bytes]>"
    raw = encode_endpoint(endpoint)
    assert decode_endpoint(raw).metadata == b"metadata"
    with pytest.raises(BadRequest, match="damaged"):
        decode_endpoint(raw.replace(b"nixl 1", b"nixl 2"))
