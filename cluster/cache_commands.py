"""The flags of `tandem cache`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import App, Parameter

from cluster.cluster_flags import AsJson, ClusterFlags, Model, running_cluster
from contracts.config import parse_duration_s
from contracts.errors import ConfigError
from contracts.store_messages import TIERS

if TYPE_CHECKING:
    from cluster.cache import Prefix

cache_app = App(name="cache", help="Look at the KV that a running cluster keeps; drop or pin it.")

Url = Annotated[str | None, Parameter(name="--url", help="Base URL of its gateway, where no state file tells it.")]
TierFlag = Annotated[
    Literal["device", "dram", "ssd", "all"],
    Parameter(name="--tier", help="The workers' own memory, the stores' host memory, or their disks."),
]
TextFile = Annotated[
    Path | None, Parameter(name="--text-file", help="Prompt whose beginning is meant, as /v1/completions gets it.")
]
MessagesFile = Annotated[
    Path | None, Parameter(name="--messages-file", help="Or a JSON list of chat messages, such as a system prompt.")
]
Tenant = Annotated[str, Parameter(name="--tenant", help="Whose prompts these are: tenants share no KV.")]
Salt = Annotated[str | None, Parameter(name="--cache-salt", help="The `cache_salt` of their requests, if any.")]
Lossy = Annotated[bool, Parameter(name="--lossy", negative="", help="Of the lossy class (store.lossy).")]
ApiKey = Annotated[str | None, Parameter(name="--api-key", help="For the gateway; else TANDEM_API_KEY is read.")]


@cache_app.command
def stat(
    *,
    model: Model = None,
    where: ClusterFlags | None = None,
    as_json: AsJson = False,
) -> int:
    """Size, hits, bytes moved and evictions of every tier of every process."""
    from cluster import cache

    return cache.print_stat(running_cluster(where, model=model), as_json=as_json)


@cache_app.command
def ls(
    *,
    order: Annotated[
        Literal["hits", "recent", "oldest"], Parameter(name="--order", help="Asked for most, last, or longest ago.")
    ] = "hits",
    limit: Annotated[int, Parameter(name="--limit", help="Blocks of each store, at most 1000.")] = 50,
    key: Annotated[str, Parameter(name="--key", help="Only keys that begin so, in hexadecimal digits.")] = "",
    pinned: Annotated[bool, Parameter(name="--pinned", negative="", help="Only pinned ones.")] = False,
    model: Model = None,
    where: ClusterFlags | None = None,
    as_json: AsJson = False,
) -> int:
    """The blocks that the stores keep."""
    from cluster import cache
    from contracts.ids import Incarnation
    from contracts.store_messages import CacheListRequest

    try:
        key_prefix = bytes.fromhex(key)
    except ValueError:
        raise ConfigError(f"--key {key}: an even number of hexadecimal digits is needed") from None
    if limit < 1:
        raise ConfigError(f"--limit {limit}: at least 1 is needed")
    ask = CacheListRequest(target=Incarnation(0), order=order, limit=limit, key_prefix=key_prefix, pinned_only=pinned)
    return cache.print_list(running_cluster(where, model=model), ask, as_json=as_json)


@cache_app.command
def clear(
    *,
    tier: TierFlag = "all",
    with_pinned: Annotated[bool, Parameter(name="--with-pinned", negative="", help="Pinned blocks too.")] = False,
    model: Model = None,
    where: ClusterFlags | None = None,
) -> int:
    """Drop what no request is using."""
    from cluster import cache

    tiers = TIERS if tier == "all" else (tier,)
    return cache.clear(running_cluster(where, model=model), tiers, with_pinned=with_pinned)


@cache_app.command
def pin(
    *,
    text_file: TextFile = None,
    messages_file: MessagesFile = None,
    for_: Annotated[
        str | None, Parameter(name="--for", help="How long, for example 2h; default: until unpinned or restarted.")
    ] = None,
    tenant: Tenant = "default",
    cache_salt: Salt = None,
    lossy: Lossy = False,
    api_key: ApiKey = None,
    model: Model = None,
    where: ClusterFlags | None = None,
    url: Url = None,
) -> int:
    """Keep the beginning of a prompt in the stores that have it, whatever else needs the room."""
    from cluster import cache

    for_s = None
    if for_ is not None:
        try:
            for_s = cast("float", parse_duration_s(for_))
        except ValueError as error:
            raise ConfigError(f"--for: {error}") from None
    prefix = _prefix(text_file, messages_file, tenant, cache_salt, lossy, api_key)
    return cache.pin(running_cluster(where, model=model, url=url), prefix, wanted=True, for_s=for_s)


@cache_app.command
def unpin(
    *,
    text_file: TextFile = None,
    messages_file: MessagesFile = None,
    tenant: Tenant = "default",
    cache_salt: Salt = None,
    lossy: Lossy = False,
    api_key: ApiKey = None,
    model: Model = None,
    where: ClusterFlags | None = None,
    url: Url = None,
) -> int:
    """Let the beginning of a prompt go again."""
    from cluster import cache

    prefix = _prefix(text_file, messages_file, tenant, cache_salt, lossy, api_key)
    return cache.pin(running_cluster(where, model=model, url=url), prefix, wanted=False, for_s=None)


def _prefix(
    text_file: Path | None,
    messages_file: Path | None,
    tenant: str,
    cache_salt: str | None,
    lossy: bool,
    api_key: str | None,
) -> Prefix:
    from cluster.cache import Prefix

    file = text_file or messages_file
    if file is None or (text_file is not None and messages_file is not None):
        raise ConfigError("which prompt? Give one of --text-file and --messages-file")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    messages: list[dict[str, Any]] | None = None
    if messages_file is not None:
        try:
            messages = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}: no JSON: {error}") from error
        if not isinstance(messages, list):
            raise ConfigError(f"{file}: a list of messages is needed")
    return Prefix(
        text=None if messages_file is not None else text,
        messages=messages,
        tenant=tenant,
        cache_salt=cache_salt,
        kv_class="lossy" if lossy else "exact",
        api_key=api_key,
    )
