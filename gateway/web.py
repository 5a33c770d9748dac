"""HTTP around the endpoints: bodies within limits, keys, request ids, OpenAI's errors, disconnects."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from contracts.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    PayloadTooLarge,
    TandemError,
    Unauthorized,
    UnsupportedMediaType,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

    from gateway.settings import GatewaySettings
    from gateway.terms import Tenant

#: Answered without a key: they tell nothing but whether the gateway lives.
OPEN_PATHS = frozenset({"/health", "/live", "/ready"})

#: As JSON, with every character escaped, an error stays below 4 KB.
_MAX_MESSAGE_CHARS = 500

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

#: What a client is told to wait where nobody knows better.
_RETRY_AFTER_S = 1.0

ResultT = TypeVar("ResultT")


# --- errors -----------------------------------------------------------------------------------------


def error_object(error: TandemError) -> dict[str, object]:
    """OpenAI's shape; bounded, whatever the message quotes."""
    return _object(error.message, error.openai_type, error.param, error.code)


def error_response(error: TandemError) -> Response:
    headers: dict[str, str] = {}
    if error.http_status in (429, 503):
        wait_s = _RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers = {
            "retry-after": str(max(1, math.ceil(wait_s))),
            "retry-after-ms": str(max(1, math.ceil(wait_s * 1000))),
            "x-tandem-reason": error.code,
            "x-tandem-reject-reason": error.reason or error.code,
        }
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, PayloadTooLarge | DeadlineExceeded):
        # The rest of the body may still be on its way: it will not be read.
        headers["connection"] = "close"
    return json_response({"error": error_object(error)}, error.http_status, headers)


def routing_error_response(error: HTTPException) -> Response:
    """For what the router refuses: no such path, no such method."""
    names = {404: ("not_found_error", "not_found"), 405: ("invalid_request_error", "method_not_allowed")}
    kind, code = names.get(error.status_code, ("invalid_request_error", "bad_request"))
    return json_response(
        {"error": _object(str(error.detail), kind, None, code)}, error.status_code, dict(error.headers or {})
    )


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


def _object(message: str, kind: str, param: str | None, code: str) -> dict[str, object]:
    if len(message) > _MAX_MESSAGE_CHARS:
        message = message[: _MAX_MESSAGE_CHARS - 1] + "…"
    short = None if param is None else param[:64]
    return {"message": message, "type": kind, "param": short, "code": code}


# --- bodies -----------------------------------------------------------------------------------------


async def read_body(request: Request, settings: GatewaySettings) -> bytes:
    """The body, read no further than its limit and its time allow.

    Raises UnsupportedMediaType, PayloadTooLarge, BadRequest (too slow, or broken off).
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(f"the content type must be application/json, not {content_type[:64] or 'missing'}")
    _check_length(request.headers.get("content-length"), settings.max_body_bytes)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await _read_chunks(request.receive, settings.max_body_bytes)
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {settings.body_timeout_s:g} s") from None


def _check_length(header: str | None, limit: int) -> None:
    if header is not None and header.isascii() and header.isdecimal() and int(header[:20]) > limit:
        raise PayloadTooLarge(f"the body has {header[:20]} bytes, the limit is {limit}")


async def _read_chunks(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client left while sending its request")
        chunk: bytes = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > limit:
            raise PayloadTooLarge(f"the body has more than {limit} bytes, the limit")
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


# --- disconnects ------------------------------------------------------------------------------------


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled when the client leaves first: then raises Cancelled.

    The request's body must have been read.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise Cancelled("the client is gone")
    finally:
        await cancel_and_wait(worker, watcher)


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Ends tasks of the caller's own; their results are of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# --- the outermost layer ----------------------------------------------------------------------------


class Gate:
    """ASGI middleware around everything: keys, request ids, and an answer to whatever went wrong."""

    def __init__(
        self,
        app: ASGIApp,
        settings: GatewaySettings,
        new_request_id: Callable[[], str],
        log: FilteringBoundLogger,
    ) -> None:
        self._app = app
        self._write_timeout_s = settings.write_timeout_s
        self._tenants = [(hashlib.sha256(key.encode()).digest(), tenant) for key, tenant in settings.tenants_by_key()]
        self._default_tenant = settings.default_tenant
        self._new_request_id = new_request_id
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(Headers(scope=scope))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await self._send(send, message)

        try:
            state["tenant"] = self._tenant(scope)
            await self._app(scope, receive, send_with_id)
        except Cancelled:
            # The client is gone, or as good as gone: the server closes what is left of the connection.
            return
        except Exception as error:
            if started:
                raise
            await self._respond(error, request_id)(scope, receive, send_with_id)

    async def _send(self, send: Send, message: Message) -> None:
        """Returns when the connection has room again. Raises Cancelled when it finds none in time."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send(message)
        except TimeoutError:
            raise Cancelled("the client takes nothing") from None

    def _respond(self, error: Exception, request_id: str) -> Callable[..., Awaitable[None]]:
        if isinstance(error, TandemError):
            return error_response(error)
        self._log.error("request_failed", request_id=request_id, exc_info=error)
        return error_response(Internal("the gateway failed; the error has been logged"))

    def _request_id(self, headers: Headers) -> str:
        """The client's, where it can be echoed safely."""
        given = headers.get("x-request-id", "")
        return given if _REQUEST_ID.fullmatch(given) else self._new_request_id()

    def _tenant(self, scope: Scope) -> Tenant:
        """Whose the request is. Raises Unauthorized."""
        # The path that is routed, not one that a Host header could have a part in.
        if not self._tenants or scope["path"] in OPEN_PATHS:
            return self._default_tenant
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All keys are compared, so that the time taken tells nothing.
        matches = [tenant for known, tenant in self._tenants if hmac.compare_digest(digest, known)]
        if scheme.lower() != "bearer" or not matches:
            raise Unauthorized("a valid API key is needed: 'Authorization: Bearer KEY'")
        return matches[0]
