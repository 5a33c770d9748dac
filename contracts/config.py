"""The configuration tree: every key that an operator can set, its type, default and meaning.

Schema only. Reading files, environment and flags, and saying where a value came from, is
`contracts.config_loader`'s. Unknown keys are refused. Each key acts: nothing here is accepted and ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    WithJsonSchema,
    field_serializer,
    model_validator,
)

from contracts.messages import Role
from contracts.requests import MOST_PRIORITY

SIZE_UNITS: dict[str, Fraction] = {
    "": Fraction(1),
    "B": Fraction(1),
    "KB": Fraction(10**3),
    "MB": Fraction(10**6),
    "GB": Fraction(10**9),
    "TB": Fraction(10**12),
    "KiB": Fraction(2**10),
    "MiB": Fraction(2**20),
    "GiB": Fraction(2**30),
    "TiB": Fraction(2**40),
}

DURATION_UNITS_S: dict[str, Fraction] = {
    "": Fraction(1),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}

_QUANTITY = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*")


def _quantity(text: str, units: dict[str, Fraction], example: str) -> Fraction:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{text!r} is not a number with a unit of {known}; write for example {example}")
    return Fraction(match[1]) * units[match[2]]


def parse_size(value: object) -> object:
    """'2GiB' -> 2147483648 (bytes, rounded down). A number is bytes; other types are left to the schema."""
    if not isinstance(value, str):
        return value
    return int(_quantity(value, SIZE_UNITS, "2GiB"))


def format_size(size_bytes: int) -> str:
    """The shortest exact spelling: the inverse of `parse_size`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        count, rest = divmod(size_bytes, int(SIZE_UNITS[unit]))
        if count and not rest:
            return f"{count}{unit}"
    return f"{size_bytes}B"


def parse_duration_s(value: object) -> object:
    """'500ms' -> 0.5 (seconds). A number is seconds; other types are left to the schema."""
    if not isinstance(value, str):
        return value
    return float(_quantity(value, DURATION_UNITS_S, "500ms"))


SizeBytes = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? *([KMGT]?B|[KMGT]iB)?$"},
            ]
        }
    ),
]

DurationS = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    BeforeValidator(parse_duration_s),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? *(ms|s|min|h)?$"},
            ]
        }
    ),
]

#: Becomes part of worker ids, log file names and environment variables.
PoolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]

Count = Annotated[int, Field(ge=1)]

PositiveFigure = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class WorkerRange(_Section):
    """How many workers a pool has, where that follows the load: see docs/scaling.md."""

    initial: Annotated[int, Field(ge=0, le=256)] | None = None
    """At the start; default: `min`."""

    min: Annotated[int, Field(ge=0, le=256)] = 1
    """At least; 0: the pool may be empty, and wakes for the first request."""

    max: Annotated[int, Field(ge=1, le=256)] = 1
    """At most."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must be at most max ({self.max})")
        if self.initial is not None and not self.min <= self.initial <= self.max:
            raise ValueError(f"initial ({self.initial}) must be from min ({self.min}) to max ({self.max})")
        return self


def _kind_of_workers(value: object) -> str:
    """Written like the other parts of a location that are no keys."""
    return "(range)" if isinstance(value, dict | WorkerRange) else "(count)"


class ScaleConfig(_Section):
    """When a pool grows and shrinks between `workers.min` and `workers.max`: see docs/scaling.md."""

    target_attainment: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of its requests that should meet the target that depends on this pool: that of TTFT where prompts are read,
    of TPOT where answers are written."""

    queue_delay_s: DurationS | None = None
    """What a prompt may wait to be begun; default: half of the shortest TTFT target, 1 s without targets."""

    freeness_low: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Tokens by which each answer should be able to grow, on average over the pool: with less it grows."""

    freeness_high: PositiveFigure = 60.0
    """With no more than this it does not shrink."""

    cooldown_s: DurationS = 60.0
    """After any change, before the pool shrinks."""

    cooldown_up_s: DurationS = 10.0
    """After any change, before it grows."""

    max_step_up: Count = 4
    """Workers that are added at once, at most."""

    max_step_down: Count = 1
    """Workers that are removed at once, at most."""

    to_zero_after_s: DurationS | None = None
    """Without a request for so long the last worker goes; needs `workers.min` 0. Default: it stays."""

    flip: bool = True
    """A worker that another pool can spare changes its role where that is faster than a start."""

    window_s: DurationS = 60.0
    """Load must have been low for so long before the pool shrinks; attainment is judged over it."""

    recover_s: DurationS = 15.0
    """Within which a queue that is too long is to be worked off: the shorter, the more workers are added for it."""

    @model_validator(mode="after")
    def _band_is_one(self) -> ScaleConfig:
        if self.freeness_low >= self.freeness_high:
            raise ValueError(
                f"freeness_low ({self.freeness_low:g}) must be below freeness_high ({self.freeness_high:g})"
            )
        return self


class PoolConfig(_Section):
    """Workers of one role and model."""

    name: PoolName
    """Prefix of the worker ids; a pool file's default is its file name."""

    role: Role
    """What its workers do: read prompts, write answers, or both in one process."""

    workers: Annotated[
        Annotated[int, Field(ge=1, le=256), Tag("(count)")] | Annotated[WorkerRange, Tag("(range)")],
        Discriminator(_kind_of_workers),
    ] = 1
    """How many worker processes; or a section of `initial`, `min` and `max`: then they follow the load."""

    scale: ScaleConfig = ScaleConfig()

    kv_memory: SizeBytes = 2**29
    """Memory of each worker's paged KV pool, for example 2GiB."""

    kv_blocks: Count | None = None
    """Exact number of blocks of each worker's KV pool, instead of `kv_memory`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU where there is one."""

    cores: tuple[Annotated[int, Field(ge=0)], ...] | Literal["auto"] = "auto"
    """Processor cores that the pool's workers divide among themselves; auto: a fair part of the machine."""

    threads: Count | Literal["auto"] = "auto"
    """Compute threads of each worker; auto: one for each of its cores."""

    max_batch_tokens: Count | None = None
    """Token budget of one step for this pool, instead of `engine.max_batch_tokens`."""

    max_sequences: Count | None = None
    """Running sequences for each worker of this pool, instead of `engine.max_sequences`."""

    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Devices that share each layer of one worker. Plans may name more than 1; serving it is refused for now."""

    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Devices that take turns at the layers of one worker. Plans may name more than 1; serving it is refused for
    now."""

    @property
    def initial_workers(self) -> int:
        """At the start."""
        if isinstance(self.workers, int):
            return self.workers
        return self.workers.min if self.workers.initial is None else self.workers.initial

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def is_scaled(self) -> bool:
        """Its number of workers follows the load."""
        return self.min_workers < self.max_workers

    @model_validator(mode="after")
    def _may_be_empty(self) -> PoolConfig:
        if self.scale.to_zero_after_s is not None and self.min_workers > 0:
            raise ValueError(
                f"scale.to_zero_after_s ({self.scale.to_zero_after_s:g}) needs workers.min 0, and it is "
                f"{self.min_workers}: write workers: {{min: 0, max: {self.max_workers}}}"
            )
        return self

    @field_serializer("kv_memory", when_used="json")
    def _size_with_unit(self, size_bytes: int) -> str:
        return format_size(size_bytes)


class SloTargets(_Section):
    """What a request of this class is to meet; both jointly."""

    ttft_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Time to first token, at most, from when its client asked."""

    tpot_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Mean time per output token after the first, at most."""


#: Becomes part of metric labels and header values.
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class TenantConfig(_Section):
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


class GatewayConfig(_Section):
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


class TransferConfig(_Section):
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


DispatchPolicyName = Literal["random", "round_robin", "least_loaded", "freeness", "prefix_only", "ttft_min"]
AdmissionForm = Literal["none", "current", "predicted"]


class DispatchConfig(_Section):
    """Which workers a request gets."""

    policy: DispatchPolicyName = "ttft_min"
    """`ttft_min`: the shortest predicted time to first token over transfer, queue and compute. The others are for
    comparison."""

    decode: Literal["spread", "pack"] = "spread"
    """`spread`: the decode worker with the lowest predicted TPOT. `pack`: the highest that still meets the
    request's target, so that others stay free."""

    fetch_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.5
    """What another worker that reads prompts holds of a prefix is copied from it only where that is more than so many
    times as much. Stores, and decode workers, need only hold more."""

    replica_share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Of a prefill worker's KV memory: what it may copy within a minute of what other prefill workers hold. So hot
    prefixes spread, and pools do not fill with copies. 0: nothing."""

    local_prefill_tokens: Annotated[int, Field(ge=0)] = 0
    """Prompts with at most so many uncached tokens may be read by the worker that writes their answer, where that is
    predicted to be faster; only workers of role mixed can. 0: prompts of any length."""

    profile: str | None = None
    """Latency profile (tandem profile) that predictions rest on; without it, on what the workers' own steps took."""


class AdmissionConfig(_Section):
    """Which requests are refused at once with 429 because they would miss their targets. Only requests of classes
    with targets are."""

    form: AdmissionForm = "predicted"
    """`predicted`: decode load as forecast for when the prompt will have been read (Mooncake); `current`: as it is;
    `none`: nothing is refused for its targets."""

    ttft_share: Annotated[float, Field(gt=0, le=10)] = 1.0
    """A request is refused where its predicted TTFT is more than this share of its target."""

    tpot_share: Annotated[float, Field(gt=0, le=10)] = 1.0
    """The same for TPOT."""

    hysteresis: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Once a class is refused somewhere, its shares shrink by this part until one is accepted."""

    miss_share: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Of the accepted requests of a class, so many may miss the TTFT target: where more do, predictions may reach less
    of it, down to half. 0: predictions are taken at their word."""


class QueueConfig(_Section):
    """In which order prompts are read."""

    order: Literal["fcfs", "shortest", "edf"] = "fcfs"
    """`fcfs`: first come, first served: what admission foresees best. `edf`: the one whose first token is due next;
    where classes with far targets fill the queue, what a close one meets is foreseen coarsely. `shortest`: fewest
    uncached tokens first, with ageing."""

    ageing_s: DurationS = 10.0
    """A prompt that waited this much longer goes before one with half its tokens (`shortest`), and before one with
    one priority more."""

    fair: bool = True
    """Between tenants: whoever got the least, by weight, goes first (virtual token counters; uncached tokens
    count)."""

    saturation_tokens: Count | None = None
    """Prompt tokens that fill a step: several short prompts share a step up to it, a longer one has its own;
    default: no such limit, prompts are cut where a step is full."""

    tpot_chunks: bool = True
    """Mixed workers cut prompts so that a step stays within the tightest TPOT target among its answers."""


class ExpectedWorkload(_Section):
    """The workload that the pools were planned for, as `tandem plan` writes it. What is not said is that of the first
    two windows in a row that are alike and have enough requests."""

    rate_rps: PositiveFigure | None = None
    """Requests a second."""

    prompt_tokens: PositiveFigure | None = None
    """Mean length of prompts."""

    p95_prompt_tokens: PositiveFigure | None = None
    """95th percentile of the lengths of prompts."""

    answer_tokens: PositiveFigure | None = None
    """Mean length of answers."""


class ReplanConfig(_Section):
    """What happens when the workload is no longer the one that was planned for."""

    mode: Literal["off", "propose", "apply"] = "propose"
    """`propose` logs a better split of the workers; `apply` carries it out too: workers change their roles, one after
    the other."""

    window_s: DurationS = 600.0
    """What is observed to be compared with the plan."""

    drift: Annotated[float, Field(gt=0)] = 0.25
    """Relative change of rate, prompt or answer length that counts as drift."""

    expected: ExpectedWorkload = ExpectedWorkload()


class AutoscaleConfig(_Section):
    """Growing and shrinking of the pools whose `workers` is a section: see docs/scaling.md."""

    mode: Literal["off", "propose", "apply"] = "apply"
    """`propose` logs what it would do, and why; `apply` does it."""

    interval_s: DurationS = 2.0
    """How often it looks."""

    start_s: DurationS = 20.0
    """How long a worker is taken to start until one was seen to."""

    flip_s: DurationS = 5.0
    """The same for a change of role."""


class LendConfig(_Section):
    """Workers that help the other phase while the load has shifted, and go home again: see docs/scaling.md."""

    mode: Literal["off", "propose", "apply"] = "off"
    """`propose` logs what it would do, and why; `apply` does it."""

    lend_as: Literal["mixed", "other"] = "mixed"
    """What a lent worker does: both phases, or the other one alone."""

    queue_delay_high_s: DurationS = 1.0
    """A worker is borrowed for reading where even the shortest queue of prompts is longer."""

    queue_delay_low_s: DurationS = 0.25
    """It goes home where the queues are shorter than this without it."""

    memory_high: Annotated[float, Field(gt=0, le=1)] = 0.9
    """A worker is borrowed for writing where even the emptiest uses more of its KV memory."""

    memory_low: Annotated[float, Field(gt=0, le=1)] = 0.6
    """It goes home where less is used without it."""

    min_stay_s: DurationS = 20.0
    """Between two changes of one worker's role, at least."""

    @model_validator(mode="after")
    def _gaps_are_there(self) -> LendConfig:
        for low, high in (("queue_delay_low_s", "queue_delay_high_s"), ("memory_low", "memory_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low):g}) must be below {high} ({getattr(self, high):g})")
        return self


MovePurpose = Literal["memory", "priority", "defragment", "balance", "prompts"]
_MOVE_PURPOSES: tuple[MovePurpose, ...] = ("memory", "priority", "defragment", "balance", "prompts")


def _word_of_switch(value: object) -> object:
    """YAML reads a bare on or off as true or false."""
    return ("on" if value else "off") if isinstance(value, bool) else value


MovedPriority = Annotated[int, Field(ge=-6, le=6)]


class MigrationConfig(_Section):
    """When requests move from one worker to another, while they go on: see docs/rebalancing.md."""

    mode: Annotated[Literal["off", "drain_only", "on"], BeforeValidator(_word_of_switch)] = "on"
    """`drain_only`: only away from workers that drain. `off`: not even these; a drain then waits for what runs."""

    purposes: tuple[MovePurpose, ...] = _MOVE_PURPOSES
    """What for, besides draining. `memory`: answers that lost their blocks, or are about to; `priority`: low ones away
    from high ones that lack their headroom; `defragment`: room for the first in line; `balance`: from full workers to
    empty ones; `prompts`: waiting prompts to where they are read sooner."""

    interval_s: DurationS = 0.2
    """How often it is looked."""

    low_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 128.0
    """A worker gives answers away where each of them has room for fewer more tokens than this (its freeness)."""

    high_tokens: PositiveFigure = 512.0
    """A worker may be given answers where each of its own has room for more."""

    headroom_tokens: dict[MovedPriority, Annotated[int, Field(ge=0)]] = {1: 1600}
    """Kept free on a worker while answers of this priority, or of one up to the next here, run there; by priority.
    Never more than half of its memory."""

    max_moving: Count = 1
    """Answers that a worker gives away, and is given, at a time."""

    max_moving_draining: Count = 4
    """The same of a worker that drains."""

    max_moving_total: Count = 32
    """Of all workers."""

    cooldown_s: DurationS = 10.0
    """After a move from one worker to another none goes the other way for so long, unless memory runs out."""

    prompt_gain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """What a waiting prompt must be predicted to gain elsewhere."""

    @model_validator(mode="after")
    def _can_rest(self) -> MigrationConfig:
        if not self.low_tokens < self.high_tokens:
            raise ValueError(f"low_tokens ({self.low_tokens:g}) must be below high_tokens ({self.high_tokens:g})")
        if self.max_moving > self.max_moving_draining:
            raise ValueError(
                f"max_moving ({self.max_moving}) must be at most max_moving_draining ({self.max_moving_draining})"
            )
        return self


class CoordinatorConfig(_Section):
    """Membership, placement, admission."""

    heartbeat_interval_s: DurationS = 0.5
    """How often workers report their load."""

    suspect_after_s: DurationS | None = None
    """Silence after which a worker gets requests only where no other can take them; default: half of
    `dead_after_s`."""

    dead_after_s: DurationS = 3.0
    """Silence after which a worker gets no more requests."""

    dispatch: DispatchConfig = DispatchConfig()
    admission: AdmissionConfig = AdmissionConfig()
    replan: ReplanConfig = ReplanConfig()
    migration: MigrationConfig = MigrationConfig()
    autoscale: AutoscaleConfig = AutoscaleConfig()
    lend: LendConfig = LendConfig()

    max_directory_blocks: Annotated[int, Field(ge=1, le=100_000_000)] = 16_000_000
    """Blocks of prefix caches that are kept track of; further ones are not, and count as not there."""

    decision_log: str | None = None
    """File to which every decision is written with its inputs, one JSON object a line; `tandem rejects` reads it."""

    decision_log_size: SizeBytes = 256 * 2**20
    """A file larger than this becomes `.1`, in place of an earlier one."""

    @model_validator(mode="after")
    def _some_beats_may_be_lost(self) -> CoordinatorConfig:
        if self.dead_after_s < 2 * self.heartbeat_interval_s:
            raise ValueError(
                f"dead_after_s ({self.dead_after_s:g}) must be at least twice "
                f"heartbeat_interval_s ({self.heartbeat_interval_s:g})"
            )
        suspect_after_s = self.suspect_after_s
        if suspect_after_s is not None and not self.heartbeat_interval_s < suspect_after_s <= self.dead_after_s:
            raise ValueError(
                f"suspect_after_s ({suspect_after_s:g}) must be above heartbeat_interval_s "
                f"({self.heartbeat_interval_s:g}) and at most dead_after_s ({self.dead_after_s:g})"
            )
        return self

    @field_serializer("decision_log_size", when_used="json")
    def _size_with_unit(self, size_bytes: int) -> str:
        return format_size(size_bytes)


class EngineConfig(_Section):
    """Limits of one engine step, for every pool that does not set its own."""

    max_batch_tokens: Count = 512
    """Token budget of one step: running sequences first, then chunks of prompts."""

    max_sequences: Count = 64
    """Sequences that run at once in one worker."""

    prefix_cache: bool = True
    """Workers keep the KV of prompts while nobody needs its memory, for prompts that begin alike."""

    queue: QueueConfig = QueueConfig()


class SupervisorConfig(_Section):
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


class SsdConfig(_Section):
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


class StoreConfig(_Section):
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


DEFAULT_POOLS = (PoolConfig(name="prefill", role="prefill"), PoolConfig(name="decode", role="decode"))


class ClusterConfig(_Section):
    """One cluster serving one model."""

    model: str = "demo"
    """`demo`, a folder with a checkpoint in Hugging Face layout, or a hub id such as org/name."""

    served_model_name: str | None = None
    """Name in the API; the default is the folder's name or the hub id."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
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

    slo: dict[Label, SloTargets] = {}
    """Targets by SLO class, for example {interactive: {ttft_ms: 300, tpot_ms: 50}}. Requests name a class with
    `slo_class`."""

    default_slo_class: Label | None = None
    """Class of requests that name none; without it they have no targets."""

    gateway: GatewayConfig = GatewayConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    engine: EngineConfig = EngineConfig()
    supervisor: SupervisorConfig = SupervisorConfig()

    node: PoolName | None = None
    """Name of this machine, different from those of the cluster's others; default: its host name."""

    log_dir: str | None = None
    """Folder for the workers' logs; the default is a temporary one that goes when all ended well."""

    @model_validator(mode="after")
    def _pools_can_serve(self) -> ClusterConfig:
        repeated = [name for name, count in Counter(pool.name for pool in self.pools).items() if count > 1]
        if repeated:
            raise ValueError(f"two pools are named {repeated[0]!r}")
        named = {self.default_slo_class, *(tenant.slo_class for tenant in self.gateway.tenants)} - {None}
        if unknown := sorted(str(name) for name in named if name not in self.slo):
            raise ValueError(f"no SLO class is named {unknown[0]!r}; `slo` has {', '.join(sorted(self.slo)) or 'none'}")
        tenants = Counter(tenant.name for tenant in self.gateway.tenants)
        if repeated := [name for name, count in tenants.items() if count > 1]:
            raise ValueError(f"two tenants are named {repeated[0]!r}")
        keys = Counter(
            key.get_secret_value()
            for key in (*self.gateway.api_keys, *(key for tenant in self.gateway.tenants for key in tenant.api_keys))
        )
        if any(count > 1 for count in keys.values()):
            raise ValueError("an API key stands twice in gateway.api_keys and gateway.tenants")
        roles = {pool.role for pool in self.pools}
        if "mixed" not in roles and not {"prefill", "decode"} <= roles:
            missing = "decode" if "prefill" in roles else "prefill"
            raise ValueError(f"no pool has the role {missing!r} (or 'mixed'): requests could never finish")
        return self
