"""The live network: gRPC with MessagePack bodies, deadlines, a cluster token, and quick failure.

Method `worker/Prefill` is served at `/tandem/worker/Prefill` by a generic handler; no code is generated.
Errors travel as data in trailing metadata, so a status without them comes from the transport itself.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
from typing import TYPE_CHECKING, cast

import grpc
from grpc import aio

from contracts.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    Internal,
    InvariantBroken,
    NoCapacity,
    NotFound,
    PayloadTooLarge,
    TandemError,
    Unauthorized,
    WorkerUnavailable,
)
from rpc.api import MAX_OPEN_CALLS, CallContext
from rpc.codec import MAX_BODY_BYTES, Codec, decode_error, encode_error
from rpc.grpc_listener import GrpcListener
from rpc.routes import Log, RouteTable, StreamRoute, UnaryRoute, log_to_stdlib

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

    from contracts.messages import Method, ReplyT, RequestT, StreamMethod

PATH_PREFIX = "/tandem/"
ERROR_KEY = "tandem-error-bin"

#: Room that gRPC's own limit leaves above ours, so that ours answers first, in our words.
_LIMIT_SLACK_BYTES = 64 * 1024

#: A silent peer (frozen, or its machine gone) is noticed after the sum of these two.
KEEPALIVE_INTERVAL_MS = 1000
KEEPALIVE_TIMEOUT_MS = 2000

#: For people who look at the wire with gRPC's tools; our own side reads the error data.
_STATUS: tuple[tuple[type[TandemError], grpc.StatusCode], ...] = (
    (BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthorized, grpc.StatusCode.UNAUTHENTICATED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (NoCapacity, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (WorkerUnavailable, grpc.StatusCode.UNAVAILABLE),
    (Internal, grpc.StatusCode.INTERNAL),
)


class GrpcNetwork:
    """`rpc.Network` over gRPC. With a token every call carries it, and servers refuse calls without it."""

    def __init__(
        self,
        *,
        token: str | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_open_calls: int = MAX_OPEN_CALLS,
        log: Log = log_to_stdlib,
    ) -> None:
        self._authorization = None if token is None else f"Bearer {token}"
        self._codec = Codec(max_body_bytes)
        self._max_open_calls = max_open_calls
        self._log = log
        #: The one loop all of this network lives on; gRPC's objects are bound to it. Set at first use.
        self._loop: asyncio.AbstractEventLoop | None = None
        #: One open channel per address; empty once closed.
        self._channels: dict[str, GrpcChannel] = {}
        self._closed = False

    def server(self, bind: str) -> GrpcServer:
        """Raises ConfigError for an address other machines can reach, unless there is a token."""
        self._check_loop()
        host, _ = split_address(bind)
        if self._authorization is None and not _is_loopback(host):
            raise ConfigError(f"cannot listen on {bind} without a cluster token: not a loopback address")
        routes = RouteTable(self._codec, self._log, self._max_open_calls)
        return GrpcServer(bind, routes, self._authorization, self._codec.max_body_bytes, self._log)

    def channel(self, address: str) -> GrpcChannel:
        self._check_loop()
        if self._closed:
            raise WorkerUnavailable(f"no call to {address}: this network is closed")
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = GrpcChannel(address, self._codec, self._authorization)
        return channel

    async def drop(self, address: str) -> None:
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise InvariantBroken("a GrpcNetwork was used from a second event loop")


class GrpcServer:
    """`rpc.Server` over gRPC."""

    def __init__(self, bind: str, routes: RouteTable, authorization: str | None, max_body_bytes: int, log: Log) -> None:
        self._bind = bind
        self._routes = routes
        self._handlers = _Handlers(bind, routes, authorization)
        self._listener = GrpcListener(self._handlers, _server_options(max_body_bytes), log)

    def register(
        self,
        method: Method[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], Awaitable[ReplyT]],
    ) -> None:
        self._routes.add(method, handler)

    def register_stream(
        self,
        method: StreamMethod[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], AsyncIterator[ReplyT]],
    ) -> None:
        self._routes.add_stream(method, handler)

    async def start(self) -> str:
        host, _ = split_address(self._bind)
        port = await self._listener.start(self._bind)
        self._handlers.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self._handlers.address

    async def stop(self, grace_s: float) -> None:
        await self._listener.stop(grace_s)


class _Handlers(grpc.GenericRpcHandler):
    """Chooses what answers a call, from its path and metadata alone: refusals never read the body."""

    def __init__(self, address: str, routes: RouteTable, authorization: str | None) -> None:
        #: For error messages; the bound one once there is one.
        self.address = address
        self._routes = routes
        self._authorization = None if authorization is None else authorization.encode()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        name = handler_call_details.method.removeprefix(PATH_PREFIX)
        try:
            self._check_token(name, handler_call_details.invocation_metadata)
            route = self._routes.find(name, self.address)
        except TandemError as error:
            return grpc.stream_stream_rpc_method_handler(_refusal(error))
        if isinstance(route, UnaryRoute):
            return grpc.unary_unary_rpc_method_handler(_unary_behaviour(name, route))
        return grpc.unary_stream_rpc_method_handler(_stream_behaviour(name, route))

    def _check_token(self, name: str, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        if self._authorization is None:
            return
        given = next((value for key, value in metadata if key == "authorization"), "")
        raw = given if isinstance(given, bytes) else given.encode()
        if not hmac.compare_digest(raw, self._authorization):
            raise Unauthorized(f"{name} at {self.address}: {'wrong' if raw else 'no'} cluster token")


def _refusal(error: TandemError) -> Callable[..., Awaitable[None]]:
    async def refuse(requests: object, context: aio.ServicerContext[bytes, bytes]) -> None:
        await _abort(context, error)

    return refuse


def _unary_behaviour(name: str, route: UnaryRoute) -> Callable[..., Awaitable[bytes]]:
    async def behaviour(raw: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            return await route.serve(raw, _call_context(name, context))
        except TandemError as error:
            failure = error
        return await _abort(context, failure)

    return behaviour


def _stream_behaviour(name: str, route: StreamRoute) -> Callable[..., Awaitable[None]]:
    async def behaviour(raw: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
        bodies = route.serve(raw, _call_context(name, context))
        try:
            async for body in bodies:
                await context.write(body)
            return
        except TandemError as error:
            failure = error
        finally:
            # A cancelled write leaves the generator suspended: its handler's `finally` must run now.
            await bodies.aclose()
        await _abort(context, failure)

    return behaviour


def _call_context(name: str, context: aio.ServicerContext[bytes, bytes]) -> CallContext:
    remaining_s = cast("float | None", context.time_remaining())
    expires_at_s = math.inf if remaining_s is None else asyncio.get_running_loop().time() + remaining_s
    return CallContext(peer=context.peer(), method=name, expires_at_s=expires_at_s)


async def _abort(context: aio.ServicerContext[bytes, bytes], error: TandemError) -> bytes:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.ABORTED)
    await context.abort(status, error.code, ((ERROR_KEY, encode_error(error)),))
    raise InvariantBroken("gRPC's abort returned")


class GrpcChannel:
    """`rpc.Channel` over gRPC."""

    def __init__(self, address: str, codec: Codec, authorization: str | None) -> None:
        self._address = address
        self._codec = codec
        self._metadata = None if authorization is None else (("authorization", authorization),)
        self._channel = aio.insecure_channel(address, options=_channel_options(codec.max_body_bytes))
        self._unary: dict[str, aio.UnaryUnaryMultiCallable[bytes, bytes]] = {}

    async def call(self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float) -> ReplyT:
        assert math.isfinite(timeout_s), f"{method.name}: every call has a deadline, not {timeout_s}"
        what = f"{method.name} at {self._address}"
        raw = self._codec.encode(request, f"request of {what}")
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{what}: no time left for the call ({timeout_s:g} s)")
        callee = self._unary.get(method.name)
        if callee is None:
            callee = self._unary[method.name] = self._channel.unary_unary(PATH_PREFIX + method.name)
        cancels_before = _num_cancels()
        try:
            answer = await callee(raw, timeout=timeout_s, metadata=self._metadata, wait_for_ready=False)
        except aio.AioRpcError as error:
            raise _tandem_error(error, what, f"no reply within {timeout_s:g} s") from error
        except aio.UsageError as error:
            raise WorkerUnavailable(f"{what}: the channel is closed") from error
        except asyncio.CancelledError:
            if _num_cancels() > cancels_before:
                raise
            raise WorkerUnavailable(f"{what}: the channel was closed during the call") from None
        reply = cast("bytes | None", answer)
        if reply is None:
            # HTTP/2 that was damaged on its way can end a call well, and empty.
            raise WorkerUnavailable(f"{what}: it ended without a reply")
        return self._codec.decode_reply(reply, method.reply, f"reply of {what}")

    async def stream(
        self, method: StreamMethod[RequestT, ReplyT], request: RequestT, *, idle_timeout_s: float
    ) -> AsyncGenerator[ReplyT, None]:
        what = f"{method.name} at {self._address}"
        raw = self._codec.encode(request, f"request of {what}")
        try:
            callee: aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(PATH_PREFIX + method.name)
            call = callee(raw, metadata=self._metadata, wait_for_ready=False)
        except aio.UsageError as error:
            raise WorkerUnavailable(f"{what}: the channel is closed") from error
        try:
            while True:
                body = await _read(call, what, idle_timeout_s)
                if body is None:
                    return
                yield self._codec.decode_reply(body, method.reply, f"body of {what}")
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


async def _read(call: aio.UnaryStreamCall[bytes, bytes], what: str, idle_timeout_s: float) -> bytes | None:
    """The next body; None at the stream's end."""
    cancels_before = _num_cancels()
    try:
        async with asyncio.timeout(idle_timeout_s):
            body = await call.read()
    except TimeoutError:
        raise DeadlineExceeded(f"{what}: no body within {idle_timeout_s:g} s") from None
    except aio.AioRpcError as error:
        raise _tandem_error(error, what, "the stream's deadline passed") from error
    except asyncio.CancelledError:
        if _num_cancels() > cancels_before:
            raise
        raise WorkerUnavailable(f"{what}: the channel was closed during the stream") from None
    return body if isinstance(body, bytes) else None


def _tandem_error(error: aio.AioRpcError, what: str, on_deadline: str) -> TandemError:
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            return decode_error(value, what)
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{what}: {on_deadline}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PayloadTooLarge(f"{what}: {details}")
    return WorkerUnavailable(f"{what}: {code.name}: {details}")


def _num_cancels() -> int:
    """How often the running task was asked to cancel.

    gRPC raises CancelledError both when our task is cancelled and when the channel is closed under the
    call; only in the first case has this number grown.
    """
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise ConfigError(f"not an address: {address!r} (expected host:port)")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _common_options(max_body_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_body_bytes + _LIMIT_SLACK_BYTES),
        ("grpc.max_send_message_length", max_body_bytes + _LIMIT_SLACK_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # Pings have a timeout of their own, a minute unless told, and keep-alive waits for the longer one.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _server_options(max_body_bytes: int) -> list[tuple[str, int]]:
    return [
        *_common_options(max_body_bytes),
        # Without this a second server would share the port silently and take half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_INTERVAL_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _channel_options(max_body_bytes: int) -> list[tuple[str, int]]:
    return [
        *_common_options(max_body_bytes),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        # A dropped channel takes its connection and its back-off with it.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Despite its name: how long one attempt may take, which must suit a peer that is busy.
        ("grpc.min_reconnect_backoff_ms", 2000),
        # Below a heartbeat's interval: whoever calls that often finds a peer that is back with its next call but one.
        ("grpc.max_reconnect_backoff_ms", 400),
    ]
