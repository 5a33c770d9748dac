"""Bodies and errors as bytes: round trips, and nothing but typed errors from any bytes."""

from __future__ import annotations

import importlib
import math
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import (
    ERROR_BY_CODE,
    BadRequest,
    Internal,
    NoCapacity,
    PayloadTooLarge,
    TandemError,
    WorkerUnavailable,
)
from contracts.ids import GatewayId
from contracts.messages import DispatchItem, DispatchRequest, WorkerLoad
from contracts.requests import Frame
from rpc.codec import CHECKSUM_BYTES, MAX_ERROR_TEXT_BYTES, Codec, decode_error, encode_error, seal

if TYPE_CHECKING:
    from collections.abc import Callable

CODEC = Codec()

msgpack = importlib.import_module("msgpack")  # a package without types
packb: Callable[[object], bytes] = msgpack.packb
unpackb: Callable[[bytes], object] = msgpack.unpackb

items = st.builds(
    DispatchItem,
    request_id=st.text(max_size=20),
    prompt_tokens=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(0, 2**63 - 1),
    avoid=st.lists(st.text(max_size=5), max_size=3).map(tuple),
)
requests = st.builds(DispatchRequest, gateway_id=st.text(max_size=20), items=st.lists(items, max_size=4).map(tuple))


@given(requests)
def test_a_body_survives_the_trip(request: DispatchRequest) -> None:
    assert CODEC.decode_request(CODEC.encode(request, "it"), DispatchRequest, "it") == request


@given(requests)
def test_a_body_is_a_plain_messagepack_map(request: DispatchRequest) -> None:
    plain = unpackb(CODEC.encode(request, "it")[:-CHECKSUM_BYTES])
    assert plain == {
        "gateway_id": request.gateway_id,
        "items": [
            {
                "request_id": item.request_id,
                "prompt_tokens": item.prompt_tokens,
                "max_tokens": item.max_tokens,
            }
            | ({"avoid": list(item.avoid)} if item.avoid else {})
            for item in request.items
        ],
    }
    assert CODEC.decode_request(seal(packb(plain)), DispatchRequest, "it") == request


@given(st.integers(0, 10_000))
def test_a_flipped_bit_is_noticed_wherever_it_is(position: int) -> None:
    raw = bytearray(CODEC.encode(WorkerLoad(free_blocks=3, running_requests=70_000), "it"))
    bit = position % (8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WorkerUnavailable, match=r"request of x/Y: \d+ bytes were damaged on their way"):
        CODEC.decode_request(bytes(raw), WorkerLoad, "request of x/Y")


@given(st.binary(max_size=60))
def test_bytes_without_a_checksum_are_no_body(raw: bytes) -> None:
    with pytest.raises(WorkerUnavailable, match="damaged"):
        CODEC.decode_request(raw, WorkerLoad, "request of x/Y")


@given(st.binary(max_size=60))
def test_any_bytes_give_a_body_or_a_bad_request(raw: bytes) -> None:
    with suppress(BadRequest):
        assert isinstance(CODEC.decode_request(seal(raw), WorkerLoad, "request of x/Y"), WorkerLoad)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"worker_id": "w", "incarnation": 1}, "missing required field `sequence_number`"),
        ({"worker_id": "w", "incarnation": "1", "sequence_number": 0}, r"\$\.incarnation"),
        (
            {"worker_id": "w", "incarnation": 1, "sequence_number": 0, "deltas": [{"index": 0}]},
            r"\$\.deltas\[0\]",
        ),
        ([1, 2, 3], "Expected `object`, got `array`"),
        (None, "Expected `object`, got `None`"),
    ],
)
def test_a_wrong_body_is_told_by_its_path(body: object, said: str) -> None:
    with pytest.raises(BadRequest, match=f"request of x/Y: .*{said}"):
        CODEC.decode_request(seal(packb(body)), Frame, "request of x/Y")
    with pytest.raises(Internal, match=f"reply of x/Y: .*{said}"):
        CODEC.decode_reply(seal(packb(body)), Frame, "reply of x/Y")


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x81\xa9worker_id\xa2\xff\xfe", id="invalid UTF-8"),
        pytest.param(b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0", id="deep"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map that claims four thousand million keys"),
        pytest.param(packb({"a": 1}) + b"\x00", id="trailing"),
    ],
)
def test_malformed_bytes_are_a_bad_request(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="request of x/Y: "):
        CODEC.decode_request(seal(raw), Frame, "request of x/Y")


def test_keys_of_later_versions_are_ignored() -> None:
    assert CODEC.decode_request(seal(packb({"free_blocks": 3, "later": {"x": [1]}})), WorkerLoad, "it").free_blocks == 3


def test_size_is_measured_both_ways() -> None:
    codec = Codec(max_body_bytes=100)
    request = DispatchRequest(gateway_id=GatewayId("g" * 200), items=())
    with pytest.raises(PayloadTooLarge, match=r"request of x/Y: \d+ bytes, the limit is 100"):
        codec.encode(request, "request of x/Y")
    raw = CODEC.encode(request, "it")
    with pytest.raises(PayloadTooLarge, match="request of x/Y"):
        codec.decode_request(raw, DispatchRequest, "request of x/Y")
    with pytest.raises(PayloadTooLarge, match="reply of x/Y"):
        codec.decode_reply(raw, DispatchRequest, "reply of x/Y")


class Row(msgspec.Struct, frozen=True, array_like=True):
    value: int


def test_a_body_that_is_not_a_map_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="Row: a body must be a MessagePack map"):
        CODEC.decode_request(seal(b"\x91\x01"), Row, "it")


@given(
    kind=st.sampled_from(sorted(set(ERROR_BY_CODE.values()), key=lambda kind: kind.code)),
    message=st.text(max_size=200),
    param=st.none() | st.text(max_size=30),
    retry_after_s=st.none() | st.floats(0, 1e6),
)
def test_an_error_survives_the_trip(
    kind: type[TandemError], message: str, param: str | None, retry_after_s: float | None
) -> None:
    there = decode_error(encode_error(kind(message, param=param, retry_after_s=retry_after_s)), "x/Y")
    assert type(there) is (Internal if kind is TandemError else kind)
    assert (there.message, there.param, there.retry_after_s) == (message, param, retry_after_s)


@given(character=st.sampled_from("aü€😀"), count=st.integers(900, 6000), start=st.text(max_size=4))
def test_a_long_message_is_cut_to_fit(character: str, count: int, start: str) -> None:
    message = start + character * count
    raw = encode_error(NoCapacity(message, param="p" * 5000, retry_after_s=math.pi))
    assert len(raw) <= MAX_ERROR_TEXT_BYTES
    there = decode_error(raw, "x/Y")
    assert there.message == message or message.startswith(there.message.removesuffix("…"))
    assert there.retry_after_s == math.pi


def test_text_that_is_not_unicode_is_escaped() -> None:
    assert decode_error(encode_error(BadRequest("bad \ud800 text")), "x/Y").message == "bad \\ud800 text"


def test_an_unknown_code_is_internal_and_named() -> None:
    error = decode_error(packb({"code": "from_the_future", "message": "hm"}), "x/Y")
    assert type(error) is Internal
    assert error.message == "x/Y: unknown error 'from_the_future': hm"
