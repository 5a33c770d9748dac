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
from kvtransfer.ucx_parts import FEW_PAIRS, Region, parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer import BlockPair
    from kvtransfer.ucx_parts import Part

BLOCK_BYTES = 100

#: Blocks 0 to 8 of a holder's device, and 0 to 9 of one's own memory.
SOURCE = Region(1 << 47, 9, 3)
OWN = Region(5, 10, None)

#: Some are refused. Many continue each other, and some lists are long.
PAIRS = st.lists(
    st.tuples(st.integers(-1, 9), st.integers(-1, 10), st.integers(1, 9)).map(
        lambda each: [(BlockId(each[0] + n), BlockId(each[1] + n)) for n in range(each[2])]
    ),
    max_size=3 * FEW_PAIRS,
).map(lambda stretches: [pair for stretch in stretches for pair in stretch])

ALLOWED = PAIRS.map(lambda pairs: [each for each in pairs if 0 <= each[0] < 9 and 0 <= each[1] < 10])


def cut(pairs: Sequence[BlockPair], part_bytes: int) -> list[Part]:
    return parts(pairs, SOURCE, OWN, BLOCK_BYTES, part_bytes)


@given(ALLOWED, st.integers(1, 99))
def test_parts_are_the_runs_of_so_many_blocks(pairs: list[BlockPair], blocks_per_part: int) -> None:
    found = cut(pairs, blocks_per_part * BLOCK_BYTES + 99)
    starts = range(0, len(pairs), blocks_per_part)
    expected = [list(runs(pairs[start : start + blocks_per_part])) for start in starts]
    assert [part.sources.tolist() for part in found] == [
        [[(1 << 47) + first * 100, length * 100, 3] for first, _, length in each] for each in expected
    ]
    assert [part.targets.tolist() for part in found] == [
        [[5 + first * 100, length * 100, 0] for _, first, length in each] for each in expected
    ]
    assert [part.num_bytes for part in found] == [int(part.targets[:, 1].sum()) for part in found]


@pytest.mark.parametrize("num_blocks", [3, 3 * FEW_PAIRS])
def test_block_larger_than_a_part_travels_whole(num_blocks: int) -> None:
    found = cut([(BlockId(0), BlockId(0))] * num_blocks, BLOCK_BYTES - 1)
    assert [part.num_bytes for part in found] == [BLOCK_BYTES] * num_blocks


@given(PAIRS)
def test_pairs_are_checked_against_both_pools(pairs: list[BlockPair]) -> None:
    try:
        check_pairs(pairs, 9, 10)
    except BadRequest as error:
        with pytest.raises(BadRequest, match=re.escape(error.message)):
            cut(pairs, 1000)
    else:
        assert sum(part.num_bytes for part in cut(pairs, 1000)) == len(pairs) * BLOCK_BYTES


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
