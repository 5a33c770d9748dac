"""`tandem cache`: what KV a running cluster keeps, and where; dropping and pinning it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from cluster.state_file import read_state
from contracts.errors import BadRequest, ConfigError, NotFound, TandemError
from contracts.messages import MEMBERS, Empty
from contracts.store_messages import (
    CACHE_CLEAR,
    CACHE_LIST,
    CACHE_PIN,
    CACHE_STAT,
    CacheClearRequest,
    CacheListRequest,
    CachePinRequest,
    CacheStatRequest,
)
from kvstore.block_keys import block_keys, root_key
from rpc import GrpcNetwork

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from contracts.messages import WorkerInfo
    from contracts.requests import KvClass
    from contracts.store_messages import CacheListReply, CacheStatReply, Tier, TierFigures
    from rpc import Network

ReplyT = TypeVar("ReplyT")

#: Deadline of each question.
ASK_TIMEOUT_S = 10.0
#: Keys of one Pin.
PIN_KEYS = 8_192


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """How a running cluster is reached."""

    coordinator: str
    token: str
    #: Of its gateway; None: not known.
    base_url: str | None = None
    #: As clients ask for it, where there are several; None: there is but one.
    model: str | None = None

    @classmethod
    def of_state(cls, path: Path, model: str | None = None, worker: str | None = None) -> Cluster:
        """`model`, or a worker's id, tells which one is meant where there are several. Raises ConfigError."""
        found = cls.all_of_state(path)
        state = read_state(path)
        if not state.cells:
            if model not in (None, state.model_name):
                raise ConfigError(f"--model {model}: this cluster serves {state.model_name}")
            return found[0]
        chosen = [
            cluster
            for cluster, cell in zip(found, state.cells, strict=True)
            if (model in (cell.name, cell.model_name) if model is not None else worker in cell.worker_ids)
        ]
        if not chosen:
            names = ", ".join(cell.model_name for cell in state.cells)
            said = f"no model {model!r} is served here" if model is not None else f"no model has a worker {worker!r}"
            if model is None and worker is None:
                said = "which model? Give --model"
            raise ConfigError(f"{said}; there are {names}")
        return chosen[0]

    @classmethod
    def all_of_state(cls, path: Path) -> list[Cluster]:
        """One for each model. Raises ConfigError."""
        state = read_state(path)
        cells: list[tuple[str, str | None]] = [(cell.coordinator_address, cell.model_name) for cell in state.cells]
        return [
            cls(coordinator=address, token=state.cluster_token, base_url=state.base_url, model=model)
            for address, model in cells or [(state.coordinator_address, None)]
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The beginning of a prompt, as its client would send it."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tenant: str = "default"
    cache_salt: str | None = None
    kv_class: KvClass = "exact"
    api_key: str | None = None


def print_stat(cluster: Cluster, *, as_json: bool) -> int:
    """One line for each tier of each process. 1 where somebody did not answer."""
    found = _everybody(cluster, lambda network, info: _stat(network, info), roles=None)
    answered = [(info, reply) for info, reply in found if not isinstance(reply, TandemError)]
    if as_json:
        print(msgspec.json.encode({info.worker_id: reply for info, reply in answered}).decode())
    else:
        _print_stat(answered)
    return _complain(found)


def print_list(cluster: Cluster, ask: CacheListRequest, *, as_json: bool) -> int:
    found = _everybody(cluster, lambda network, info: _list(network, info, ask), roles=("store",))
    answered = [(info, reply) for info, reply in found if not isinstance(reply, TandemError)]
    if as_json:
        print(msgspec.json.encode({info.worker_id: reply for info, reply in answered}).decode())
    else:
        _print_list(answered)
    return _complain(found)


def clear(cluster: Cluster, tiers: tuple[Tier, ...], *, with_pinned: bool) -> int:
    """Drops what nobody refers to; says how much."""

    async def ask(network: Network, info: WorkerInfo) -> dict[str, int]:
        body = CacheClearRequest(target=info.incarnation, tiers=tiers, with_pinned=with_pinned)
        return (await network.channel(info.address).call(CACHE_CLEAR, body, timeout_s=ASK_TIMEOUT_S)).dropped

    roles = None if "device" in tiers else ("store",)
    found = _everybody(cluster, ask, roles=roles)
    for info, reply in found:
        if not isinstance(reply, TandemError):
            dropped = ", ".join(f"{count} blocks of {tier}" for tier, count in sorted(reply.items())) or "nothing"
            print(f"{info.worker_id}: dropped {dropped}")
    return _complain(found)


def pin(cluster: Cluster, prefix: Prefix, *, wanted: bool, for_s: float | None) -> int:
    """Pins the full blocks of a prefix in every store (or, not `wanted`, lets them go). 1 where no store has all."""

    async def ask(network: Network, info: WorkerInfo) -> tuple[int, int, str]:
        keys = await _keys(cluster, prefix, info)
        num_pinned = 0
        for start in range(0, len(keys), PIN_KEYS):
            body = CachePinRequest(
                target=info.incarnation, keys=tuple(keys[start : start + PIN_KEYS]), pin=wanted, for_s=for_s
            )
            reply = await network.channel(info.address).call(CACHE_PIN, body, timeout_s=ASK_TIMEOUT_S)
            num_pinned += reply.num_blocks
            if reply.reason:
                return num_pinned, len(keys), reply.reason
        return num_pinned, len(keys), ""

    found = _everybody(cluster, ask, roles=("store",))
    is_whole = False
    for info, reply in found:
        if isinstance(reply, TandemError):
            continue
        num_pinned, num_keys, reason = reply
        is_whole = is_whole or num_pinned == num_keys
        done = "pinned" if wanted else "unpinned"
        print(f"{info.worker_id}: {num_pinned} of {num_keys} blocks {done}{f' ({reason})' if reason else ''}")
    return _complain(found) or int(not is_whole)


# --- asking -----------------------------------------------------------------------------------------


def _everybody(
    cluster: Cluster,
    ask: Callable[[Network, WorkerInfo], Awaitable[ReplyT]],
    *,
    roles: Sequence[str] | None,
) -> list[tuple[WorkerInfo, ReplyT | TandemError]]:
    """What each member of these roles (None: all) answers. Raises what the coordinator does not answer with, and
    NotFound where there is no such member."""

    async def one(network: Network, info: WorkerInfo) -> tuple[WorkerInfo, ReplyT | TandemError]:
        try:
            return info, await ask(network, info)
        except TandemError as error:
            return info, error

    async def gather() -> list[tuple[WorkerInfo, ReplyT | TandemError]]:
        network = GrpcNetwork(token=cluster.token)
        try:
            members = await network.channel(cluster.coordinator).call(MEMBERS, Empty(), timeout_s=ASK_TIMEOUT_S)
            infos = [member.info for member in members.members if roles is None or member.info.role in roles]
            if not infos:
                what = "worker" if roles is None else " or ".join(roles)
                raise NotFound(f"this cluster has no {what}: `store` in its configuration makes one")
            return await asyncio.gather(*(one(network, info) for info in infos))
        finally:
            await network.close()

    return uvloop.run(gather())


async def _stat(network: Network, info: WorkerInfo) -> CacheStatReply:
    body = CacheStatRequest(target=info.incarnation)
    return await network.channel(info.address).call(CACHE_STAT, body, timeout_s=ASK_TIMEOUT_S)


async def _list(network: Network, info: WorkerInfo, ask: CacheListRequest) -> CacheListReply:
    body = msgspec.structs.replace(ask, target=info.incarnation)
    return await network.channel(info.address).call(CACHE_LIST, body, timeout_s=ASK_TIMEOUT_S)


async def _keys(cluster: Cluster, prefix: Prefix, info: WorkerInfo) -> list[bytes]:
    """Of the full blocks of a prefix, as the workers of this KV make them."""
    token_ids = await _tokenize(cluster, prefix)
    salt = prefix.tenant if prefix.cache_salt is None else f"{prefix.tenant}/{prefix.cache_salt}"
    root = root_key(info.identity, salt, kv_class=prefix.kv_class)
    keys = list(block_keys(root, token_ids, info.identity.layout.block_tokens))
    if not keys:
        tokens = info.identity.layout.block_tokens
        raise BadRequest(f"{len(token_ids)} tokens are less than one block of {tokens}: nothing of it is ever kept")
    return keys


async def _tokenize(cluster: Cluster, prefix: Prefix) -> list[int]:
    """By the gateway, which knows tokenizer and chat template."""
    if cluster.base_url is None:
        raise ConfigError("the gateway's address is needed to make tokens of text: give --state-file or --url")
    if prefix.messages is not None:
        body: dict[str, Any] = {"messages": prefix.messages, "add_generation_prompt": False}
    else:
        body = {"prompt": prefix.text}
    if cluster.model is not None:
        body["model"] = cluster.model
    key = prefix.api_key or os.environ.get("TANDEM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with httpx.AsyncClient(timeout=ASK_TIMEOUT_S, trust_env=False) as client:
            answer = await client.post(f"{cluster.base_url}/tokenize", json=body, headers=headers)
    except httpx.HTTPError as error:
        raise ConfigError(f"{cluster.base_url}/tokenize: {error or type(error).__name__}") from error
    if not answer.is_success:
        raise ConfigError(f"{cluster.base_url}/tokenize: status {answer.status_code}: {answer.text[:200]}")
    tokens: list[int] = answer.json()["tokens"]
    return tokens


# --- telling ----------------------------------------------------------------------------------------


def _complain(found: Sequence[tuple[WorkerInfo, object]]) -> int:
    failed = [(info, reply) for info, reply in found if isinstance(reply, TandemError)]
    for info, error in failed:
        print(f"{info.worker_id}: {error.message}")
    return int(bool(failed))


def _print_stat(answered: Sequence[tuple[WorkerInfo, CacheStatReply]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("process", "tier", "used", "of", "blocks", "pinned", "hit", "missed", "in", "out", "gone", "idle"):
        table.add_column(name, justify="left" if name in ("process", "tier", "in", "out", "gone") else "right")
    problems: list[str] = []
    for info, reply in answered:
        for tier in reply.tiers:
            table.add_row(
                info.worker_id,
                tier.tier,
                _size(tier.used_bytes),
                _size(tier.capacity_bytes),
                str(tier.num_blocks),
                str(tier.pinned_blocks),
                str(tier.hit_blocks),
                str(tier.missed_blocks),
                _sizes(tier.bytes_in),
                _sizes(tier.bytes_out),
                _counts(tier),
                "-" if tier.oldest_s is None else f"{tier.oldest_s:.0f} s",
            )
            if tier.unencoded_blocks:
                problems.append(
                    f"{info.worker_id} {tier.tier}: {tier.unencoded_blocks} blocks are kept as they are: their codec "
                    "failed"
                )
            if tier.problem:
                problems.append(f"{info.worker_id} {tier.tier}: {tier.problem}")
    _console().print(table)
    for problem in problems:
        print(problem)


def _counts(tier: TierFigures) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(tier.evicted.items())) or "-"


def _sizes(by_place: dict[str, int]) -> str:
    return ", ".join(f"{_size(size)} {place}" for place, size in sorted(by_place.items())) or "-"


def _print_list(answered: Sequence[tuple[WorkerInfo, CacheListReply]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("store", "key", "position", "tiers", "hits", "age", "idle", "size", "codec", "pinned"):
        table.add_column(name, justify="right" if name in ("position", "hits", "age", "idle", "size") else "left")
    for info, reply in answered:
        for block in reply.blocks:
            table.add_row(
                info.worker_id,
                block.key.hex()[:16],
                str(block.position),
                "+".join(block.tiers),
                str(block.hits),
                f"{block.age_s:.0f} s",
                f"{block.idle_s:.0f} s",
                _size(block.num_bytes),
                block.codec,
                "yes" if block.pinned else "",
            )
    _console().print(table)
    for info, reply in answered:
        print(f"{info.worker_id}: {len(reply.blocks)} of {reply.num_matching} blocks")


def _size(size_bytes: int) -> str:
    """Three digits, for people."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        count = size_bytes / int({"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}[unit])
        if count >= 1:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
    return f"{size_bytes} B"


def _console() -> Console:
    """Wide where nobody reads it on a terminal: lines must not be cut for a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)
