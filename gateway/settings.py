"""What an operator decides about the gateway, checked when made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from gateway.terms import DEFAULT_TENANT, Tenant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.requests import KvClass
    from workload.slo import SloClass


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSettings:
    """A tenant, and how its clients are known."""

    tenant: Tenant
    api_keys: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Raises ConfigError for values that cannot work, naming the field."""

    #: Names under which clients may ask for the model; answers to requests without one bear the first.
    served_model_names: tuple[str, ...]
    #: Prompt and answer together, in tokens.
    max_model_len: int
    host: str = "127.0.0.1"
    #: 0 lets the system choose.
    port: int = 8000
    #: Clients must send one of these, or of a tenant's, as a bearer token; none anywhere: everybody may ask.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    #: Tenants with keys of their own; whoever is none of theirs is the tenant `default`.
    tenants: tuple[TenantSettings, ...] = ()
    #: SLO classes by name, and that of requests which name none (and whose tenant has none).
    slos: Mapping[str, SloClass] = field(default_factory=dict[str, "SloClass"])
    default_slo_class: str | None = None
    #: Of requests that do not ask for exact KV.
    kv_class: KvClass = "exact"
    #: Needed to listen beyond this machine without keys.
    allow_unauthenticated: bool = False
    #: Refuse unknown fields instead of ignoring and counting them.
    strict_fields: bool = False
    max_body_bytes: int = 8 * 1024 * 1024
    #: How long a client may take to send its body.
    body_timeout_s: float = 30.0
    #: Answers that one request may ask for (prompts x n), and their tokens in all.
    max_sequences: int = 128
    max_total_tokens: int = 1024 * 1024
    #: A request not finished by then fails with DeadlineExceeded.
    request_timeout_s: float = 600.0
    #: How often a request is taken up again after its worker died or hung; 0: never.
    max_replays: int = 3
    #: How long requests are placed by the last known state of the cluster while no coordinator answers.
    snapshot_ttl_s: float = 60.0
    #: Silence on an event stream after which a comment is sent, so that proxies keep it open.
    keep_alive_s: float = 15.0
    #: A client that takes nothing for so long is cut off.
    write_timeout_s: float = 30.0
    #: Requests whose timelines are remembered.
    max_timelines: int = 1000
    health_cache_s: float = 0.5
    #: Workers not heard of for longer do not count as there.
    max_heartbeat_age_s: float = 5.0
    tokenizer_threads: int = 2
    #: What open requests get to end when the gateway stops.
    graceful_stop_s: float = 5.0
    #: The model may be without a worker until somebody asks.
    may_sleep: bool = False
    version: str = "0.1.0"

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError(f"served_model_names: {self.served_model_names!r} holds no usable name")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port: {self.port} is no TCP port")
        if self.max_replays < 0:
            raise ConfigError(f"max_replays: must be at least 0, not {self.max_replays}")
        keys = self.tenants_by_key()
        if not all(key for key, _ in keys):
            raise ConfigError("api_keys: an empty key would let everybody in")
        if len({key for key, _ in keys}) < len(keys):
            raise ConfigError("api_keys: a key stands twice; it must tell whose it is")
        if len({one.tenant.name for one in self.tenants}) < len(self.tenants):
            raise ConfigError("tenants: two have the same name")
        named = {self.default_slo_class, *(one.tenant.slo_class for one in self.tenants)} - {None}
        if unknown := sorted(str(name) for name in named if name not in self.slos):
            raise ConfigError(f"slos: there is no class {unknown[0]!r}")
        for name in ("max_model_len", "max_body_bytes", "max_sequences", "max_total_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if not (keys or self.allow_unauthenticated or _is_loopback(self.host)):
            raise ConfigError(
                f"host: {self.host} can be reached from other machines; set api_keys, "
                "or allow_unauthenticated to let everybody ask"
            )

    @property
    def default_tenant(self) -> Tenant:
        """Of requests without a key of another's."""
        named = (one.tenant for one in self.tenants if one.tenant.name == DEFAULT_TENANT)
        return next(named, Tenant(name=DEFAULT_TENANT))

    def tenants_by_key(self) -> list[tuple[str, Tenant]]:
        """Every API key, and whose it is."""
        return [
            *((key, self.default_tenant) for key in self.api_keys),
            *((key, one.tenant) for one in self.tenants for key in one.api_keys),
        ]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
