"""What obstore is asked with and what its answers mean: stores by their address, pinned files, faults told apart."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from obstore import exceptions as store_errors
from obstore.store import from_url

from coldstart.remote import RemoteFile
from coldstart.remote_retry import Fault, RetrySettings
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import ObjectStore

    from coldstart.remote import Address

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
#: Names of variables whose values are never shown.
_SECRET_NAME = re.compile(r"(AWS|AZURE|GOOGLE|GCP)_.*(KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS|ACCOUNT)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How a store is asked. Times are in seconds."""

    #: In place of the store's own address, for S3-compatible ones; else the environment's (AWS_ENDPOINT_URL, ...).
    endpoint: str | None = None
    #: Longest range of one request: what breaks costs at most this much again, and usually nothing.
    piece_bytes: int = 8 << 20
    #: Bytes asked for and not yet here, over all reads of a folder.
    max_in_flight_bytes: int = 128 << 20
    connect_timeout_s: float = 5.0
    #: Until a request's next bytes come.
    stall_timeout_s: float = 10.0
    #: A whole request.
    request_timeout_s: float = 60.0
    #: A whole `read_into`, with all its requests and waits.
    read_deadline_s: float = 300.0
    #: A file up to this size is read whole from a server that knows no ranges.
    whole_file_bytes: int = 64 << 20
    retry: RetrySettings = field(default_factory=RetrySettings)


class Failed(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.value)
        self.fault = fault


def open_store(address: Address, settings: StoreSettings) -> ObjectStore:
    seconds = {"connect_timeout": settings.connect_timeout_s, "timeout": settings.request_timeout_s}
    client: dict[str, Any] = {name: timedelta(seconds=value) for name, value in seconds.items()}
    client["allow_http"] = address.scheme == "http" or _endpoint(address, settings).startswith("http://")
    # A request is asked again here or nowhere; credentials, too.
    retry = {"max_retries": 0, "retry_timeout": timedelta(seconds=settings.request_timeout_s)}
    config: dict[str, Any] = {}
    if settings.endpoint is not None and address.kind != "http":
        config["base_url" if address.kind == "gcs" else "endpoint"] = settings.endpoint
    more = {} if address.kind == "http" else {"config": config}
    try:
        return from_url(address.url, client_options=client, retry_config=retry, **more)  # type: ignore[call-overload, no-any-return]
    except (store_errors.BaseError, ValueError) as error:
        raise ConfigError(f"{address.url}: cannot be opened: {_without_secrets(str(error))}") from None


def _endpoint(address: Address, settings: StoreSettings) -> str:
    """What was configured explicitly; whoever names a plain-text one means it."""
    if settings.endpoint is not None:
        return settings.endpoint
    names = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "azure": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        "gcs": ("GOOGLE_BASE_URL",),
    }.get(address.kind, ())
    return next((value for name in names if (value := os.environ.get(name))), "")


def _without_secrets(text: str) -> str:
    line = text.partition("\n")[0]
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET_NAME.match(name):
            line = line.replace(value, "***")
    return line


def remote_file(name: str, meta: dict[str, Any]) -> RemoteFile:
    return RemoteFile(
        name=name, num_bytes=int(meta["size"]), e_tag=meta["e_tag"], modified_s=meta["last_modified"].timestamp()
    )


def pin(file: RemoteFile) -> GetOptions:
    """Weak tags never match by RFC 9110, 13.1.1; those are compared here only."""
    return {} if file.e_tag is None or file.e_tag.startswith("W/") else {"if_match": file.e_tag}


def check_same(file: RemoteFile, result: GetResult) -> None:
    now = remote_file(file.name, cast("dict[str, Any]", result.meta))
    # A server that names its contents is believed; of another, the time of the last change says as much.
    changed = now.e_tag != file.e_tag or (file.e_tag is None and now.modified_s != file.modified_s)
    if changed or now.num_bytes != file.num_bytes:
        raise Failed(Fault.CHANGED)


def fault_of(error: BaseException) -> Fault:
    by_type: tuple[tuple[type[BaseException], Fault], ...] = (
        (TimeoutError, Fault.TIMEOUT),
        (FileNotFoundError, Fault.GONE),
        (store_errors.PreconditionError, Fault.CHANGED),
        (store_errors.PermissionDeniedError, Fault.DENIED),
        (store_errors.UnauthenticatedError, Fault.DENIED),
        (store_errors.NotSupportedError, Fault.NO_RANGES),
    )
    if isinstance(error, Failed):
        return error.fault
    for kind, fault in by_type:
        if isinstance(error, kind):
            return fault
    return _fault_of_text(str(error))


def _fault_of_text(text: str) -> Fault:
    """What obstore has no class for stands in its words (0.12)."""
    found = _STATUS.search(text)
    if found is not None:
        status = int(found[1])
        if status in (429, 503):
            return Fault.THROTTLED
        if status >= 500 or status == 408:
            return Fault.SERVER
        # 416: the file is shorter than it was.
        return {404: Fault.GONE, 416: Fault.CHANGED}.get(status, Fault.REFUSED)
    if "UnexpectedRange" in text or "NoContentRange" in text:
        return Fault.WRONG_RANGE
    return Fault.TIMEOUT if "kind: Timeout" in text else Fault.BROKEN
