"""The configuration tree: every key that an operator can set, its type, default and meaning.

Schema only. Reading files, environment and flags, and saying where a value came from, is
`contracts.config_loader`'s. Unknown keys are refused. Each key acts: nothing here is accepted and ignored.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_serializer, model_validator

from contracts.config_fields import (
    DURATION_UNITS_S,
    SIZE_UNITS,
    Count,
    DurationS,
    Label,
    PoolName,
    Section,
    SizeBytes,
    format_size,
    parse_duration_s,
    parse_size,
)
from contracts.coordinator_config import (
    AdmissionForm,
    CoordinatorConfig,
    DispatchPolicyName,
    ExpectedWorkload,
    QueueConfig,
)
from contracts.models_config import DtypeName, ModelConfig, SloTargets
from contracts.pool_config import PoolConfig
from contracts.requests import MOST_PRIORITY

__all__ = [
    "DEFAULT_POOLS",
    "DURATION_UNITS_S",
    "SIZE_UNITS",
    "AdmissionForm",
    "ClusterConfig",
    "CodecName",
    "CoordinatorConfig",
    "DispatchPolicyName",
    "DurationS",
    "EngineConfig",
    "EvictionPolicyName",
    "ExpectedWorkload",
    "GatewayConfig",
    "Label",
    "ModelConfig",
    "PoolConfig",
    "SizeBytes",
    "SloTargets",
    "SsdConfig",
    "StoreConfig",
    "SupervisorConfig",
    "TenantConfig",
    "TransferConfig",
    "TransportName",
    "format_size",
    "parse_duration_s",
    "parse_size",
]


class TenantConfig(Section):
    """Who asks. A request's tenant follows from its API key."""

    name: Label
    """Its name in metrics, and the salt of its prefix cache: tenants share no KV."""

    api_keys: Annotated[tuple[SecretStr, ...], Field(min_length=1)]
    """Bearer tokens of this tenant's clients."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Its share of the prefill work where tenants compete, relative to the others'."""

    slo_class: Label | None = None
    """SLO class of requests that name none, instead of the cluster's default."""

    max_priority: int = MOST_PRIORITY
    """Requests that ask for more get this; what is above the default counts like it."""


class GatewayConfig(Section):
    """The REST front end."""

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless said otherwise."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one and prints it."""

    api_keys: tuple[SecretStr, ...] = ()
    """Clients must send one of these as a bearer token; none: everybody may ask."""

    allow_unauthenticated: bool = False
    """Needed to listen on an address that other machines can reach without `api_keys`."""

    strict_fields: bool = False
    """Refuse requests with unknown fields instead of ignoring and counting them."""

    max_body: SizeBytes = 8 * 2**20
    """Largest request body."""

    request_timeout_s: DurationS = 600.0
    """A request that is not finished by then fails."""

    max_replays: Annotated[int, Field(ge=0, le=16)] = 3
    """How often one request is taken up again on other workers after its worker died or hung."""

    graceful_stop_s: DurationS = 5.0
    """What open requests get to end when the gateway stops."""

    tenants: tuple[TenantConfig, ...] = ()
    """Clients with API keys of their own; `api_keys` are those of the tenant `default`."""

    snapshot_ttl_s: DurationS = 60.0
    """How long requests are placed by the last known state of the cluster while no coordinator answers."""

    @field_serializer("max_body", when_used="json")
    def _size_with_unit(self, size_bytes: int) -> str:
        return format_size(size_bytes)


TransportName = Literal["shm", "ucx", "collective"]


class TransferConfig(Section):
    """How KV blocks move between workers."""

    interface: str | None = None
    """Network interface that KV travels on between machines, for example eth1; ucx and collective listen on
    no other. Their ports know no authentication: this network must be private. Default: loopback."""

    checksum: bool = False
    """Send an XXH3 checksum with every block and compare it before the block is used."""

    lease_ttl_s: DurationS = 10.0
    """Term of a lease; renewed while its reader lives."""

    probe: bool = True
    """Measure every transport to every peer at start."""

    expect_bandwidth: SizeBytes | None = None
    """Bytes a second that the transport should reach, for example 10GiB; the default is its class: what shared
    memory, RDMA or TCP ordinarily does."""

    allow_slow: bool = False
    """Serve on a transport five times slower than expected instead of refusing it."""

    @field_serializer("expect_bandwidth", when_used="json")
    def _size_with_unit(self, size_bytes: int | None) -> str | None:
        return None if size_bytes is None else format_size(size_bytes)


class EngineConfig(Section):
    """Limits of one engine step, for every pool that does not set its own."""

    max_batch_tokens: Count = 512
    """Token budget of one step: running sequences first, then chunks of prompts."""

    max_sequences: Count = 64
    """Sequences that run at once in one worker."""

    prefix_cache: bool = True
    """Workers keep the KV of prompts while nobody needs its memory, for prompts that begin alike."""

    queue: QueueConfig = QueueConfig()


class SupervisorConfig(Section):
    """Care for the worker processes of this machine."""

    start_timeout_s: DurationS = 300.0
    """Time a worker may go without progress between its start and its being ready."""

    stop_timeout_s: DurationS = 5.0
    """Time a worker gets to leave before it is killed."""

    hang_timeout_s: DurationS = 3.0
    """Silence after which a worker that was ready is killed and started anew."""

    restart_delay_s: DurationS = 0.25
    """Wait before the first restart of a crashed worker; doubles with each further crash."""

    restart_delay_max_s: DurationS = 15.0
    """Longest wait between restarts."""

    start_attempts: Count = 3
    """Deaths in a row before being ready after which a worker is given up."""

    @model_validator(mode="after")
    def _some_signs_may_be_late(self) -> SupervisorConfig:
        if self.hang_timeout_s < 1.5:
            raise ValueError(
                f"hang_timeout_s ({self.hang_timeout_s:g}) must be at least 1.5: workers show life every 0.5 s"
            )
        return self


CodecName = Literal["raw", "int8", "int4", "auto"]
EvictionPolicyName = Literal["lru", "lfu_aged", "s3_fifo", "cost_aware", "scheduler_aware"]


class SsdConfig(Section):
    """Part of the store that outlasts a restart of everything."""

    path: str | None = None
    """Folder of the block files, for example ~/.cache/tandem/kv; made where missing, readable for this user alone.
    None: host memory only."""

    size: SizeBytes = 20 * 2**30
    """What they take at most."""

    codec: CodecName = "raw"
    """How blocks of the lossy class are kept: `int8`, `int4` (with zstd), or `auto`: whichever is read fastest at the
    bandwidth of this disk. Blocks of the exact class are always kept as they are."""

    direct: bool = True
    """Read and write past the page cache where the file system can."""

    @field_serializer("size", when_used="json")
    def _size_with_unit(self, size_bytes: int) -> str:
        return format_size(size_bytes)


class StoreConfig(Section):
    """KV between requests, for all workers of a machine: it outlasts the workers that computed it."""

    dram: SizeBytes | None = 2**30
    """Host memory of each machine's store, for example 4GiB, taken as it fills. None: there is no store, KV stays in
    the workers' own pools alone."""

    ssd: SsdConfig = SsdConfig()

    policy: EvictionPolicyName = "cost_aware"
    """What is given up first where there is no room."""

    lossy: bool = False
    """Requests may go on from KV that went through a lossy codec, unless they ask for exact KV."""

    @model_validator(mode="after")
    def _disk_needs_memory(self) -> StoreConfig:
        if self.dram is None and self.ssd.path is not None:
            raise ValueError("ssd.path without dram: what is kept on disk passes through the store's host memory")
        return self

    @field_serializer("dram", when_used="json")
    def _size_with_unit(self, size_bytes: int | None) -> str | None:
        return None if size_bytes is None else format_size(size_bytes)


class WeightTierConfig(Section):
    """Checkpoints in the form that loads at the disk's speed; models are converted on their first use."""

    path: str | None = None
    """Folder of the checkpoints, for example ~/.cache/tandem/weights; made where missing. None: weights are read from
    the model's own folder each time."""

    size: SizeBytes = 100 * 2**30
    """What they take at most; those not used for the longest time go."""

    @field_serializer("size", when_used="json")
    def _size_with_unit(self, size_bytes: int) -> str:
        return format_size(size_bytes)


class WeightsConfig(Section):
    """Models' weights on each machine, between their workers' lives: see docs/coldstart.md."""

    dram: SizeBytes | Literal["auto"] | None = "auto"
    """Host memory of each machine for weights, shared by its workers: a model is there once, however many workers
    compute on it, and outlasts them. auto: half of the machine's. None: each worker reads its own."""

    ssd: WeightTierConfig = WeightTierConfig()

    compress: Literal["auto", "off"] = "auto"
    """Models that nobody uses in that memory are kept compressed, without loss, where memory is short and decompressing
    is faster, as measured on the machine, than reading them again. off: they stay as they are until they make room."""

    cold_after_s: DurationS = 600.0
    """What was used since then is not compressed."""

    standby: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes of each machine that have imported what a worker needs, and become one within the time that its weights
    take. Each takes some 250 MiB. With `fork` one of them does for all."""

    fork: bool = True
    """Workers on the CPU are forked of one process that has imported what they need, if two or more of a machine start
    at once, or `standby` is not 0: they start sooner, and share its memory. Not: each is a program of its own."""

    snapshot: SizeBytes | None = None
    """Disk for what workers warmed up (KV that prompts share, step times), for example 1GiB: written when they leave,
    there again when they are back. A worker's takes a quarter at most; those not used for the longest time go. The
    folder is `ssd.path`/snapshots, ~/.cache/tandem/weights/snapshots without one. None: workers begin cold."""

    @field_serializer("dram", "snapshot", when_used="json")
    def _size_with_unit(self, size_bytes: int | str | None) -> str | None:
        return format_size(size_bytes) if isinstance(size_bytes, int) else size_bytes


#: Of a pool, its model included.
MAX_NAME_CHARS = 40

DEFAULT_POOLS = (PoolConfig(name="prefill", role="prefill"), PoolConfig(name="decode", role="decode"))


class ClusterConfig(Section):
    """One cluster serving one model, or several."""

    model: str = "demo"
    """`demo`, a folder with a checkpoint in Hugging Face layout or Tandem's, a hub id such as org/name, or the
    address of such a folder in an object store: s3://bucket/folder, gs://, az://, https://."""

    models: tuple[ModelConfig, ...] = ()
    """Several models instead of `model`: see docs/models.md."""

    served_model_name: str | None = None
    """Name in the API; the default is the folder's name or the hub id."""

    dtype: DtypeName = "auto"
    """Type of weights and KV; auto: the checkpoint's."""

    max_model_len: Count | None = None
    """Longest prompt plus answer in tokens; the default is the checkpoint's."""

    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens of one KV block."""

    pools: Annotated[tuple[PoolConfig, ...], Field(min_length=1)] = DEFAULT_POOLS
    """The pools; in a file each may also be the path of a pool file, relative to the cluster file."""

    transport: Literal["auto"] | TransportName = "auto"
    """How KV blocks move between workers; auto: whatever measures fastest between two of them."""

    transfer: TransferConfig = TransferConfig()

    store: StoreConfig = StoreConfig()

    weights: WeightsConfig = WeightsConfig()

    slo: dict[Label, SloTargets] = Field(default={})
    """Targets by SLO class, for example {interactive: {ttft_ms: 300, tpot_ms: 50}}. Requests name a class with
    `slo_class`."""

    default_slo_class: Label | None = None
    """Class of requests that name none; without it they have no targets."""

    gateway: GatewayConfig = GatewayConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    engine: EngineConfig = EngineConfig()
    supervisor: SupervisorConfig = SupervisorConfig()

    workers_memory: SizeBytes | None = None
    """What the workers of all models may take together on this machine, weights and KV: where one has to be started
    that does not fit, idle pools that may be empty make room, the one first that was used longest ago. None: no
    limit."""

    node: PoolName | None = None
    """Name of this machine, different from those of the cluster's others; default: its host name."""

    first_worker: Annotated[int, Field(ge=0, le=9999)] = 0
    """Number of this machine's first worker in each pool. Agents of several machines that share pools need numbers that
    do not overlap: 0 on one, 8 on the next."""

    log_dir: str | None = None
    """Folder for the workers' logs; the default is a temporary one that goes when all ended well."""

    @field_serializer("workers_memory", when_used="json")
    def _size_with_unit(self, size_bytes: int | None) -> str | None:
        return None if size_bytes is None else format_size(size_bytes)

    @model_validator(mode="after")
    def _pools_can_serve(self) -> ClusterConfig:
        self._check_cell(self.pools, self.slo, self.default_slo_class)
        tenants = Counter(tenant.name for tenant in self.gateway.tenants)
        if repeated := [name for name, count in tenants.items() if count > 1]:
            raise ValueError(f"two tenants are named {repeated[0]!r}")
        keys = Counter(
            key.get_secret_value()
            for key in (*self.gateway.api_keys, *(key for tenant in self.gateway.tenants for key in tenant.api_keys))
        )
        if any(count > 1 for count in keys.values()):
            raise ValueError("an API key stands twice in gateway.api_keys and gateway.tenants")
        return self

    @model_validator(mode="after")
    def _models_can_stand_beside_each_other(self) -> ClusterConfig:
        if not self.models:
            return self
        if named := {"model", "served_model_name"} & self.model_fields_set:
            raise ValueError(f"`{min(named)}` and `models` cannot both be set: name all models under `models`")
        if self.coordinator.dispatch.profile is not None:
            raise ValueError("coordinator.dispatch.profile is of one model: set models.NAME.profile")
        for what, names in (
            ("models are named", [model.name for model in self.models]),
            ("models are served as", [model.api_name for model in self.models]),
            (
                "pools would be named",
                [self.pool_name(model, pool) for model in self.models for pool in self._pools(model)],
            ),
        ):
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"two {what} {repeated[0]!r}")
        for model in self.models:
            try:
                self._check_cell(
                    self._pools(model), model.slo or self.slo, model.default_slo_class or self.default_slo_class
                )
            except ValueError as error:
                raise ValueError(f"models.{model.name}: {error}") from None
            for pool in self._pools(model):
                if len(self.pool_name(model, pool)) > MAX_NAME_CHARS:
                    raise ValueError(
                        f"models.{model.name}: {self.pool_name(model, pool)!r} has more than {MAX_NAME_CHARS} "
                        "characters: workers are named by model and pool"
                    )
        return self

    def _pools(self, model: ModelConfig) -> tuple[PoolConfig, ...]:
        return model.pools or self.pools

    @staticmethod
    def pool_name(model: ModelConfig, pool: PoolConfig) -> str:
        """Of a pool of one of several models: unique in the cluster."""
        return f"{model.name}-{pool.name}"

    def _check_cell(
        self, pools: tuple[PoolConfig, ...], slo: dict[str, SloTargets], default_slo_class: str | None
    ) -> None:
        """What one model is served by. Raises ValueError."""
        repeated = [name for name, count in Counter(pool.name for pool in pools).items() if count > 1]
        if repeated:
            raise ValueError(f"two pools are named {repeated[0]!r}")
        named = {default_slo_class, *(tenant.slo_class for tenant in self.gateway.tenants)} - {None}
        if unknown := sorted(str(name) for name in named if name not in slo):
            raise ValueError(f"no SLO class is named {unknown[0]!r}; `slo` has {', '.join(sorted(slo)) or 'none'}")
        roles = {pool.role for pool in pools}
        if "mixed" not in roles and not {"prefill", "decode"} <= roles:
            missing = "decode" if "prefill" in roles else "prefill"
            raise ValueError(f"no pool has the role {missing!r} (or 'mixed'): requests could never finish")
