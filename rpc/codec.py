"""Bodies as MessagePack maps, and errors as data. Both networks use it for every body.

Nothing is trusted: a body is measured before it is parsed, and parsed into the declared type only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import xxhash

from contracts.errors import ERROR_BY_CODE, BadRequest, Internal, PayloadTooLarge, TandemError, WorkerUnavailable

BodyT = TypeVar("BodyT", bound=msgspec.Struct)

MAX_BODY_BYTES = 64 * 1024 * 1024

#: gRPC carries errors in trailing metadata, of which 8 KiB are safe; base64 makes 4/3 of this.
MAX_ERROR_TEXT_BYTES = 4096

#: Of the XXH3-64 that follows every body: HTTP/2 without TLS has no check of its own, and a flipped bit in a token
#: id is a valid body.
CHECKSUM_BYTES = 8

_ENCODER = msgspec.msgpack.Encoder()


@functools.cache
def _decoder(kind: type[BodyT]) -> msgspec.msgpack.Decoder[BodyT]:
    assert not kind.__struct_config__.array_like, f"{kind.__name__}: a body must be a MessagePack map"
    return msgspec.msgpack.Decoder(kind)


def seal(raw: bytes) -> bytes:
    """`raw` and its checksum, as it travels."""
    return raw + xxhash.xxh3_64_digest(raw)


@dataclass(frozen=True, slots=True)
class Codec:
    max_body_bytes: int = MAX_BODY_BYTES

    def encode(self, body: msgspec.Struct, what: str) -> bytes:
        """`what` names the body in errors ("request of worker/Prefill"). Raises PayloadTooLarge."""
        raw = _ENCODER.encode(body)
        self._check_size(raw, what)
        return seal(raw)

    def decode_request(self, raw: bytes, kind: type[BodyT], what: str) -> BodyT:
        """Raises BadRequest (naming the field's path), PayloadTooLarge."""
        return _parse(self._checked(raw, what), kind, BadRequest, what)

    def decode_reply(self, raw: bytes, kind: type[BodyT], what: str) -> BodyT:
        """Raises Internal when the peer answered with something else, PayloadTooLarge."""
        return _parse(self._checked(raw, what), kind, Internal, what)

    def _checked(self, raw: bytes, what: str) -> bytes:
        """The body of `raw`. Raises PayloadTooLarge, and WorkerUnavailable where it changed on its way."""
        body = raw[:-CHECKSUM_BYTES]
        self._check_size(body, what)
        if xxhash.xxh3_64_digest(body) != raw[-CHECKSUM_BYTES:]:
            raise WorkerUnavailable(f"{what}: {len(body)} bytes were damaged on their way")
        return body

    def _check_size(self, raw: bytes, what: str) -> None:
        if len(raw) > self.max_body_bytes:
            raise PayloadTooLarge(f"{what}: {len(raw)} bytes, the limit is {self.max_body_bytes}")


def _parse(raw: bytes, kind: type[BodyT], fault: type[TandemError], what: str) -> BodyT:
    decoder: msgspec.msgpack.Decoder[BodyT] = _decoder(kind)
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise fault(f"{what}: {error}") from error


class ErrorData(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `TandemError` on the wire."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


def encode_error(error: TandemError) -> bytes:
    """At most about `MAX_ERROR_TEXT_BYTES` long: longer messages are cut."""
    return _ENCODER.encode(
        ErrorData(
            code=error.code,
            message=_clip(error.message, MAX_ERROR_TEXT_BYTES - 256),
            param=None if error.param is None else _clip(error.param, 128),
            retry_after_s=error.retry_after_s,
        )
    )


def decode_error(raw: bytes, what: str) -> TandemError:
    """The error `encode_error` was given; an `Internal` that names `what` for a code this side lacks."""
    data = _parse(raw, ErrorData, Internal, f"error of {what}")
    kind = ERROR_BY_CODE.get(data.code)
    if kind is None:
        return Internal(f"{what}: unknown error {data.code!r}: {data.message}")
    return kind(data.message, param=data.param, retry_after_s=data.retry_after_s)


def _clip(text: str, limit_bytes: int) -> str:
    """`text` as valid UTF-8 of at most `limit_bytes`; lone surrogates are escaped."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode("utf-8", "ignore") + "…"
