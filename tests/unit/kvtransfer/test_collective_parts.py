"""The pure parts of the collective transport: how lists of blocks are cut, and gloo's addresses read and changed."""

from __future__ import annotations

import socket
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadRequest, ConfigError
from contracts.ids import BlockId
from kvtransfer import HostPool
from kvtransfer.collective_address import Address, blob_to_dial, device_arguments, read_address, rewrite_address
from kvtransfer.collective_endpoint import decode_endpoint
from kvtransfer.collective_group import FIRST_TAG, LAST_TAG, advance_tag
from kvtransfer.collective_pieces import PIECE_BYTES, BlockCopier, Piece, piece_bytes, pieces


@given(num_blocks=st.integers(0, 200), block_bytes=st.integers(1, 3 * PIECE_BYTES))
def test_pieces_cover_every_byte_once_and_in_order(num_blocks: int, block_bytes: int) -> None:
    position = 0
    for piece in pieces(num_blocks, block_bytes):
        assert piece.first * block_bytes + piece.offset == position
        assert 0 < piece.num_bytes <= piece_bytes(block_bytes) <= PIECE_BYTES
        # Either whole blocks, or a part of one.
        assert piece.num_bytes == piece.num_blocks * block_bytes or piece.num_blocks == 1
        position += piece.num_bytes
    assert position == num_blocks * block_bytes


@given(blocks=st.lists(st.integers(0, 9), min_size=1, max_size=12), targets=st.permutations(range(12)))
def test_gathered_pieces_scatter_to_the_same_blocks(blocks: list[int], targets: list[int]) -> None:
    source, target = HostPool(10, 24), HostPool(12, 24)
    np.frombuffer(source.view(), np.uint8)[:] = np.arange(240)
    wanted, own = [BlockId(each) for each in blocks], [BlockId(each) for each in targets]
    out, back = BlockCopier(source), BlockCopier(target)
    for piece in (Piece(0, len(blocks), 0, 24 * len(blocks)), Piece(len(blocks) - 1, 1, 8, 16)):
        staging = np.zeros(piece.num_bytes, np.uint8)
        if piece.offset == 0:
            out.gather(wanted, piece, staging)
        else:
            span = blocks[-1] * 24 + 8
            assert out.span(wanted, piece) == span
            staging[:] = np.frombuffer(source.view(), np.uint8)[span : span + 16]
        back.scatter(staging, own, piece)
    given_blocks = np.frombuffer(source.view(), np.uint8).reshape(10, 24)[blocks]
    found = np.frombuffer(target.view(), np.uint8).reshape(12, 24)
    assert (found[targets[: len(blocks)]] == given_blocks).all()
    assert not found[targets[len(blocks) :]].any()
    del out, back, found
    source.close()
    target.close()


def test_span_is_where_neighbours_lie() -> None:
    pool = HostPool(8, 16)
    copier = BlockCopier(pool)
    blocks = [BlockId(each) for each in (3, 4, 5, 7, 6)]
    assert copier.span(blocks, Piece(0, 3, 0, 48)) == 48
    assert copier.span(blocks, Piece(0, 4, 0, 64)) is None
    assert copier.span(blocks, Piece(3, 2, 0, 32)) is None
    assert copier.span(blocks, Piece(4, 1, 8, 8)) == 104
    del copier
    pool.close()


def test_tags_begin_again_before_they_overflow() -> None:
    assert advance_tag(FIRST_TAG) == FIRST_TAG + 1
    assert advance_tag(LAST_TAG) == FIRST_TAG
    assert advance_tag(LAST_TAG - 2, 5) == FIRST_TAG + 2


# --- addresses ------------------------------------------------------------------------------------------


def blob(family: int, host: str, port: int, name: bytes = b"a-machine") -> bytes:
    """As gloo writes it."""
    packed = socket.inet_pton(family, host)
    sockaddr = struct.pack("=H", family) + struct.pack("!H", port)
    sockaddr += packed if family == socket.AF_INET else bytes(4) + packed
    address = sockaddr.ljust(128, b"\0") + bytes(8)
    return struct.pack("=Q", len(name)) + name + struct.pack("=Q", len(address)) + address


@pytest.mark.parametrize(
    ("family", "host", "other"), [(2, "10.1.2.3", "192.168.0.9"), (10, "fd00::1", "::ffff:1.2.3.4")]
)
def test_addresses_are_read_and_rewritten(family: int, host: str, other: str) -> None:
    raw = blob(family, host, 40001)
    address = read_address(raw)
    assert (address.family, address.host, address.port) == (family, socket.inet_pton(family, host), 40001)
    assert rewrite_address(raw, other, 7) == blob(family, other, 7)
    assert str(address).endswith(":40001")
    with pytest.raises(BadRequest):
        rewrite_address(raw, "::1" if family == 2 else "127.0.0.1", 7)


@pytest.mark.parametrize("raw", [b"", b"12345678", bytes(16), b"\xff" * 200, blob(2, "1.2.3.4", 5)[:-9]])
def test_what_is_no_address_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        read_address(raw)


def test_who_calls_whom_follows_the_bound_addresses() -> None:
    low, high = blob(2, "10.0.0.1", 5), blob(2, "10.0.0.2", 5)
    assert read_address(high).connects_to(read_address(low))
    assert not read_address(low).connects_to(read_address(high))
    # Ports are compared as they lie in memory: 256 before 1 on a little-endian machine.
    one, other = Address(2, bytes(4), 1), Address(2, bytes(4), 256)
    assert one.connects_to(other) != other.connects_to(one)
    # Who waits must not be tempted to call, wherever the peer says it is.
    waiting = blob_to_dial(read_address(low), read_address(high), blob(2, "10.0.0.0", 9))
    assert not read_address(low).connects_to(read_address(waiting))
    assert blob_to_dial(read_address(high), read_address(low), blob(2, "10.0.0.1", 9)) == blob(2, "10.0.0.1", 9)
    with pytest.raises(BadRequest, match="lesser"):
        blob_to_dial(read_address(high), read_address(low), blob(2, "10.0.0.3", 9))
    with pytest.raises(BadRequest):
        read_address(low).connects_to(read_address(low))
    with pytest.raises(BadRequest):
        read_address(low).connects_to(read_address(blob(10, "::1", 5)))


def test_interfaces() -> None:
    assert device_arguments(None) == {"hostname": "127.0.0.1"}
    assert device_arguments("127.0.0.9") == {"hostname": "127.0.0.9"}
    assert device_arguments("lo") == {"interface": "lo"}
    with pytest.raises(ConfigError, match="none0"):
        device_arguments("none0")


def test_endpoint_of_nothing_is_refused() -> None:
    for raw in (b"", b"\xc0", b"\x95\xa1a\x01\xc4\x00\x01\x01"):
        with pytest.raises(BadRequest):
            decode_endpoint(raw)
