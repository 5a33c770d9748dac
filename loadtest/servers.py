"""From flags to the servers that are asked: addresses, headers, limits. Everything is checked before a byte is sent."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import orjson

from contracts.config import parse_duration_s
from contracts.errors import ConfigError
from loadtest.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loadtest.flags import RunFlags, ServerFlags

#: More would make the rounds of a comparison too long to be beside each other.
MAX_SERVERS = 8
#: Of one request.
MAX_TIMEOUT_S = 24 * 3600.0
MAX_RETRIES = 100

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
#: Written by the client itself: two of them would contradict each other.
_OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection"})


def server_urls(url: str | None, servers: str | None) -> dict[str, str]:
    """Base URLs by name; one server without `--servers` is called "server". Raises ConfigError."""
    if (url is None) == (servers is None):
        raise ConfigError("say whom to ask: tandem loadtest URL, or --servers A=URL,B=URL")
    if url is not None:
        return {"server": base_url("URL", url)}
    assert servers is not None
    named: dict[str, str] = {}
    for part in servers.split(","):
        name, equals, address = (piece.strip() for piece in part.partition("="))
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"--servers {part!r}: write NAME=URL; names are of letters, digits, . _ -")
        if name in named:
            raise ConfigError(f"--servers: {name!r} stands twice")
        named[name] = base_url("--servers", address)
    if len(named) > MAX_SERVERS:
        raise ConfigError(f"--servers: {len(named)} servers, at most {MAX_SERVERS}")
    return named


def base_url(flag: str, text: str) -> str:
    """Scheme, host, port and path below which /v1 lies. Raises ConfigError."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
        # As it is looked up: no label may be empty or too long.
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{flag} {text!r}: must be http://HOST:PORT or https://HOST")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(f"{flag} {text!r}: no user, query or fragment; keys go into --api-key-env or --header")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"


def request_headers(flags: ServerFlags, environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Of every request: authorization and `--header`. Raises ConfigError."""
    headers: list[tuple[str, str]] = []
    for text in flags.header:
        name, colon, value = (piece.strip() for piece in text.partition(":"))
        if not colon or not _HEADER_NAME.fullmatch(name) or not value.isascii() or not value.isprintable():
            raise ConfigError(f"--header {name!r}: write NAME: VALUE, in printable ASCII")
        if name.lower() in _OWN_HEADERS:
            raise ConfigError(f"--header {name}: the client writes it itself")
        headers.append((name, value))
    if not _VARIABLE_NAME.fullmatch(flags.api_key_env):
        # It may be the key itself.
        raise ConfigError("--api-key-env: write the name of a variable (letters, digits, _), not the key")
    key = environ.get(flags.api_key_env, "").strip()
    if key and not any(name.lower() == "authorization" for name, _ in headers):
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f"--api-key-env {flags.api_key_env}: the key is not printable ASCII")
        headers.append(("Authorization", f"Bearer {key}"))
    return tuple(headers)


def extra_body(flags: ServerFlags) -> dict[str, object]:
    """Raises ConfigError."""
    extra: dict[str, object] = {"include_timeline": True} if flags.server_timeline else {}
    if flags.extra_body is None:
        return extra
    try:
        given = orjson.loads(flags.extra_body)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"--extra-body: no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError("--extra-body: must be a JSON object")
    return {**extra, **given}


def limits(flags: RunFlags) -> Limits:
    """Raises ConfigError."""
    if not 0 <= flags.retries <= MAX_RETRIES:
        raise ConfigError(f"--retries {flags.retries}: must be between 0 and {MAX_RETRIES}")
    first_token = flags.first_token_timeout
    return Limits(
        connect_s=duration_s("--connect-timeout", flags.connect_timeout),
        first_token_s=None if first_token is None else duration_s("--first-token-timeout", first_token),
        total_s=duration_s("--timeout", flags.timeout),
        max_retries=flags.retries,
    )


def duration_s(flag: str, text: str) -> float:
    """`30s` -> 30.0. Raises ConfigError."""
    try:
        seconds = parse_duration_s(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if not isinstance(seconds, float) or not 0 < seconds <= MAX_TIMEOUT_S:
        raise ConfigError(f"{flag} {text}: must be above 0, at most {MAX_TIMEOUT_S / 3600:g} h")
    return seconds
