"""Different tensor-parallel degrees: every byte of a reader's block comes once, and from the right head."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError
from contracts.layout import BlockLayout
from kvtransfer.shards import ByteRange, Shard, ranges, sources

HEADS = (1, 2, 3, 4, 6, 8)


def layout_of(heads: int, layers: int = 2, head_dim: int = 3, tokens: int = 2) -> BlockLayout:
    return BlockLayout(num_layers=layers, num_kv_heads=heads, head_dim=head_dim, block_tokens=tokens, dtype="float32")


layouts = st.builds(
    layout_of,
    heads=st.sampled_from(HEADS),
    layers=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    tokens=st.integers(1, 4),
)


def degrees(heads: int) -> list[int]:
    return [degree for degree in range(1, 17) if heads % degree == 0 or degree % heads == 0]


@st.composite
def chains(draw: st.DrawFn, length: int) -> tuple[BlockLayout, list[int]]:
    layout = draw(layouts)
    return layout, [draw(st.sampled_from(degrees(layout.num_kv_heads))) for _ in range(length)]


def whole_block(layout: BlockLayout) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A block of the model in which every value is another."""
    count = int(np.prod(layout.shape))
    return np.arange(1, count + 1, dtype=np.float32).reshape(layout.shape)


def sliced(block: np.ndarray[tuple[int, ...], np.dtype[np.float32]], shard: Shard) -> bytes:
    """The reference: a rank's block as a slice of the whole array."""
    return np.ascontiguousarray(block[shard.heads.start : shard.heads.stop]).tobytes()


def moved(blocks: dict[int, bytes], layout: BlockLayout, degree: int, reader: Shard) -> bytes:
    """The reader rank's block, put together from the holder ranks' blocks; each byte is written once."""
    target = bytearray(reader.block_bytes)
    written = np.zeros(reader.block_bytes, np.int64)
    for rank in range(degree):
        for piece in ranges(Shard(layout, degree, rank), reader):
            target[piece.target : piece.target + piece.num_bytes] = blocks[rank][
                piece.source : piece.source + piece.num_bytes
            ]
            written[piece.target : piece.target + piece.num_bytes] += 1
    assert (written == 1).all()
    return bytes(target)


def reshard(blocks: dict[int, bytes], layout: BlockLayout, before: int, after: int) -> dict[int, bytes]:
    return {rank: moved(blocks, layout, before, Shard(layout, after, rank)) for rank in range(after)}


def all_ranks(layout: BlockLayout, degree: int) -> dict[int, bytes]:
    block = whole_block(layout)
    return {rank: sliced(block, Shard(layout, degree, rank)) for rank in range(degree)}


@given(chains(2))
def test_every_byte_comes_once_and_is_the_right_one(chain: tuple[BlockLayout, list[int]]) -> None:
    layout, (holder, reader) = chain
    assert reshard(all_ranks(layout, holder), layout, holder, reader) == all_ranks(layout, reader)


@given(chains(3))
def test_by_way_of_a_third_degree_is_the_same(chain: tuple[BlockLayout, list[int]]) -> None:
    layout, (holder, middle, reader) = chain
    blocks = all_ranks(layout, holder)
    by_way = reshard(reshard(blocks, layout, holder, middle), layout, middle, reader)
    assert by_way == reshard(blocks, layout, holder, reader)


@given(chains(2))
def test_there_and_back_is_the_same(chain: tuple[BlockLayout, list[int]]) -> None:
    layout, (one, other) = chain
    blocks = all_ranks(layout, one)
    assert reshard(reshard(blocks, layout, one, other), layout, other, one) == blocks


@given(chains(1))
def test_equal_degrees_move_whole_blocks_between_equal_ranks(chain: tuple[BlockLayout, list[int]]) -> None:
    layout, (degree,) = chain
    for rank in range(degree):
        shard = Shard(layout, degree, rank)
        assert sources(shard, degree) == (rank,)
        assert ranges(shard, shard) == (ByteRange(0, 0, shard.block_bytes),)


@given(chains(2))
def test_sources_are_the_ranks_that_something_comes_from(chain: tuple[BlockLayout, list[int]]) -> None:
    layout, (holder, reader) = chain
    for rank in range(reader):
        target = Shard(layout, reader, rank)
        giving = [each for each in range(holder) if ranges(Shard(layout, holder, each), target)]
        assert list(sources(target, holder)) == giving


@given(chains(2))
def test_neighbouring_heads_travel_as_one_range(chain: tuple[BlockLayout, list[int]]) -> None:
    """A rank's heads are a run, so what two ranks share is a run in both blocks: one range."""
    layout, (holder, reader) = chain
    for rank in range(reader):
        target = Shard(layout, reader, rank)
        for giver in sources(target, holder):
            (piece,) = ranges(Shard(layout, holder, giver), target)
            shared = set(target.heads) & set(Shard(layout, holder, giver).heads)
            assert piece.num_bytes == len(shared) * target.head_bytes


@given(chains(2))
def test_copies_of_a_head_share_the_load(chain: tuple[BlockLayout, list[int]]) -> None:
    layout, (holder, reader) = chain
    heads = layout.num_kv_heads
    loads = [0] * holder
    for rank in range(reader):
        for giver in sources(Shard(layout, reader, rank), holder):
            loads[giver] += 1
    if holder > heads and reader >= holder:
        assert max(loads) - min(loads) <= -(-reader // holder)
        assert min(loads) > 0


@pytest.mark.parametrize(
    ("holder", "reader", "expected"),
    [
        # 2 -> 1: each holder rank fills one half.
        ((2, 0), (1, 0), (ByteRange(0, 0, 2),)),
        ((2, 1), (1, 0), (ByteRange(2, 0, 2),)),
        # 1 -> 2: each reader rank takes one half.
        ((1, 0), (2, 1), (ByteRange(0, 2, 2),)),
        # 2 -> 4: from the rank that has the head.
        ((2, 1), (4, 2), (ByteRange(0, 0, 1),)),
        ((2, 1), (4, 3), (ByteRange(0, 1, 1),)),
        ((2, 0), (4, 3), ()),
        # 8 -> 4 with 4 heads: the first of the two copies.
        ((8, 6), (4, 3), (ByteRange(0, 0, 1),)),
        ((8, 7), (4, 3), ()),
    ],
)
def test_by_hand(holder: tuple[int, int], reader: tuple[int, int], expected: tuple[ByteRange, ...]) -> None:
    """Four heads; sizes in heads."""
    layout = layout_of(4)
    size = layout.block_bytes // 4
    actual = ranges(Shard(layout, *holder), Shard(layout, *reader))
    in_heads = tuple(ByteRange(p.target // size, p.source // size, p.num_bytes // size) for p in actual)
    assert in_heads == expected


@pytest.mark.parametrize(("heads", "degree"), [(4, 3), (6, 4), (2, 3), (3, 2)])
def test_degrees_that_do_not_fit_the_heads_are_refused(heads: int, degree: int) -> None:
    with pytest.raises(ConfigError, match=f"{heads} KV heads cannot be shared by {degree} ranks"):
        Shard(layout_of(heads), degree, 0)
    with pytest.raises(ConfigError, match=f"{heads} KV heads cannot be shared by {degree} ranks"):
        sources(Shard(layout_of(heads), 1, 0), degree)


def test_ranks_and_models_must_exist_and_agree() -> None:
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        Shard(layout_of(4), 2, 2)
    with pytest.raises(ConfigError, match="at the holder"):
        ranges(Shard(layout_of(4), 1, 0), Shard(layout_of(4, layers=3), 1, 0))
