"""Errors that cross a boundary, grouped by what the caller can do about them.

Give up: `BadRequest`, `NotFound`, `Unauthorized`, `ConfigError`. Retry later: `NoCapacity`, `NotReady`.
Retry elsewhere: `WorkerUnavailable`, `DeadlineExceeded`, `StaleIncarnation`, `TransferAborted`. A bug:
`InvariantBroken`, `Internal`. `Cancelled` is nobody's fault.

One table maps each to its HTTP status and OpenAI error type; rpc carries the code by name, so that a typed
error raised in one process is the same typed error in another.
"""

from __future__ import annotations


class TandemError(Exception):
    """Base of every error that may cross a boundary. The message names what and where, for a person."""

    #: Stable name on the wire and in metrics.
    code: str = "internal"
    #: HTTP status the gateway answers with.
    http_status: int = 500
    #: `type` field of OpenAI's error object.
    openai_type: str = "server_error"
    #: Whether the same call may succeed when repeated (later, or at another worker).
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        #: The request field at fault, where there is one.
        self.param = param
        #: Earliest sensible repeat, where the thrower knows.
        self.retry_after_s = retry_after_s
        #: One word for what of a kind it was, where a code is not enough; does not travel between processes.
        self.reason = reason


class BadRequest(TandemError):
    code = "bad_request"
    http_status = 400
    openai_type = "invalid_request_error"


class PayloadTooLarge(BadRequest):
    code = "payload_too_large"
    http_status = 413


class UnsupportedMediaType(BadRequest):
    code = "unsupported_media_type"
    http_status = 415


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(TandemError):
    code = "unauthorized"
    http_status = 401
    openai_type = "authentication_error"


class NotFound(TandemError):
    code = "not_found"
    http_status = 404
    openai_type = "not_found_error"


class ConfigError(TandemError):
    """A configuration, model folder or command line that cannot work. Shown without a traceback."""

    code = "config_error"
    http_status = 500


class NoCapacity(TandemError):
    """A bound was reached: blocks, queue, budget. Nothing was started."""

    code = "no_capacity"
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True


class SloUnattainable(NoCapacity):
    """Accepted now, the request would miss the latency targets of its class. Nothing was started."""

    code = "slo_unattainable"


class NotReady(TandemError):
    """No worker for the role is up (yet, or any more)."""

    code = "not_ready"
    http_status = 503
    openai_type = "service_unavailable_error"
    retryable = True


class WorkerUnavailable(TandemError):
    """The process at the other end is gone, unreachable, or closed the connection."""

    code = "worker_unavailable"
    http_status = 503
    openai_type = "service_unavailable_error"
    retryable = True


class DeadlineExceeded(TandemError):
    code = "deadline_exceeded"
    http_status = 504
    openai_type = "timeout_error"
    retryable = True


class StaleIncarnation(TandemError):
    """The message was meant for an earlier life of this process, or came from one."""

    code = "stale_incarnation"
    http_status = 503
    openai_type = "service_unavailable_error"
    retryable = True


class TransferAborted(TandemError):
    """A leased pull ended without adoption."""

    code = "transfer_aborted"
    http_status = 503
    openai_type = "service_unavailable_error"
    retryable = True


class CorruptKv(TransferAborted):
    """Bytes arrived that are not those that were sent."""

    code = "corrupt_kv"


class LoadError(TandemError):
    """The bytes of a checkpoint could not be had: a disk or object store failed, or did not answer in time."""

    code = "load_failed"
    http_status = 503
    openai_type = "service_unavailable_error"
    retryable = True


class CorruptCheckpoint(LoadError):
    """Bytes of a checkpoint are not those that were converted, or it is none, or of another version."""

    code = "corrupt_checkpoint"
    retryable = False


class IncompatiblePeer(TandemError):
    """Two workers whose KV bytes do not mean the same thing. Both values stand in the message."""

    code = "incompatible_peer"
    http_status = 500


class Cancelled(TandemError):
    code = "cancelled"
    http_status = 499
    openai_type = "cancelled"


class Internal(TandemError):
    code = "internal"


class InvariantBroken(TandemError):
    """A bug: state that cannot be. The process that finds one stops serving rather than lie."""

    code = "invariant_broken"


def _subclasses(cls: type[TandemError]) -> list[type[TandemError]]:
    return [cls] + [leaf for child in cls.__subclasses__() for leaf in _subclasses(child)]


#: Wire code -> class, for the receiving side. The base class is no code of its own.
ERROR_BY_CODE: dict[str, type[TandemError]] = {cls.code: cls for cls in _subclasses(TandemError)[1:]}
