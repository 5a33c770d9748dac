"""Whom to ask, from flags: addresses, headers, fields, limits; and what reports may tell of them."""

from __future__ import annotations

import pytest

from contracts.errors import ConfigError
from loadtest import servers
from loadtest.commands import without_secrets
from loadtest.flags import RunFlags, ServerFlags


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("localhost:8000/", "http://localhost:8000"),
        ("https://host/v1", "https://host"),
        ("http://host:1/a/v1/", "http://host:1/a"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_base_urls(text: str, url: str) -> None:
    assert servers.base_url("URL", text) == url


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("ftp://host", "must be http"),
        ("http://", "must be http"),
        ("http://host:99999", "ort"),
        ("http://me:pw@host", "no user"),
        ("http://host/?a=1", "no user, query"),
        ("http://a..b", "label empty or too long"),
        (f"http://{'x' * 64}.org", "label empty or too long"),
    ],
)
def test_addresses_that_cannot_be(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        servers.base_url("URL", text)


def test_servers_by_name() -> None:
    assert servers.server_urls(None, "A=http://a:1, B=b:2") == {"A": "http://a:1", "B": "http://b:2"}
    assert servers.server_urls("a:1", None) == {"server": "http://a:1"}


@pytest.mark.parametrize(
    ("url", "named", "what"),
    [
        (None, None, "say whom to ask"),
        ("a:1", "A=b:1", "say whom to ask"),
        (None, "http://a:1", "NAME=URL"),
        (None, "A=a:1,A=b:1", "stands twice"),
        (None, "../x=a:1", "NAME=URL"),
        (None, ",".join(f"s{number}=a:{number + 1}" for number in range(9)), "at most 8"),
    ],
)
def test_servers_that_cannot_be(url: str | None, named: str | None, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        servers.server_urls(url, named)


def test_headers_and_keys() -> None:
    flags = ServerFlags(header=("X-Team: a b", "x-n:1"))
    assert servers.request_headers(flags, {"OPENAI_API_KEY": "k"}) == (
        ("X-Team", "a b"),
        ("x-n", "1"),
        ("Authorization", "Bearer k"),
    )
    own = ServerFlags(header=("authorization: Basic x",))
    assert servers.request_headers(own, {"OPENAI_API_KEY": "k"}) == (("authorization", "Basic x"),)


@pytest.mark.parametrize("text", ["no colon", "bad name: x", "host: x", "a: b\r\nc: d", "a: \N{SNOWMAN}", ": x"])
def test_headers_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="--header"):
        servers.request_headers(ServerFlags(header=(text,)), {})


def test_a_key_that_breaks_the_request_is_refused_without_being_told() -> None:
    with pytest.raises(ConfigError) as refused:
        servers.request_headers(ServerFlags(), {"OPENAI_API_KEY": "se\ncret"})
    assert "cret" not in refused.value.message


@pytest.mark.parametrize("key", ["sk-SECRET", "", "9SECRET", "a=SECRET", "SECRET\n"])
def test_a_key_in_the_place_of_its_variable_is_refused_without_being_told(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key-env") as refused:
        servers.request_headers(ServerFlags(api_key_env=key), {})
    assert "SECRET" not in refused.value.message


def test_extra_fields() -> None:
    flags = ServerFlags(extra_body='{"top_k": 1}', server_timeline=True)
    assert servers.extra_body(flags) == {"include_timeline": True, "top_k": 1}
    for text in ("[1]", "{", "1"):
        with pytest.raises(ConfigError, match="--extra-body"):
            servers.extra_body(ServerFlags(extra_body=text))


def test_limits() -> None:
    found = servers.limits(RunFlags(timeout="2min", first_token_timeout="500ms", retries=3))
    assert (found.total_s, found.first_token_s, found.connect_s, found.max_retries) == (120.0, 0.5, 10.0, 3)
    for flags in (RunFlags(timeout="0s"), RunFlags(connect_timeout="soon"), RunFlags(retries=-1)):
        with pytest.raises(ConfigError, match="--"):
            servers.limits(flags)


def test_a_report_tells_no_keys() -> None:
    arguments = [
        "URL",
        "--header",
        "Authorization: Bearer k",
        "--header=X: k",
        "--extra-body",
        '{"key":"k"}',
        "--extra_body",
        "k",
        "--extra_body=k",
        "--api-key-env",
        "k",
        "--api_key_env=k",
        # The value of a flag is no flag.
        "--extra-body",
        "--header",
        "--seed",
        "1",
    ]
    assert list(without_secrets(arguments)) == [
        "URL", "--header", "...", "--header=...", "--extra-body", "...", "--extra_body", "...", "--extra_body=...",
        "--api-key-env", "...", "--api_key_env=...", "--extra-body", "...", "--seed", "1",
    ]  # fmt: skip
