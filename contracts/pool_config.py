"""The configuration of a pool: its workers, and how their number follows the load."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_serializer, model_validator

from contracts.config_fields import Count, DurationS, PoolName, PositiveFigure, Section, SizeBytes, format_size
from contracts.messages import Role


class WorkerRange(Section):
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


class ScaleConfig(Section):
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

    keep_alive: Literal["fixed", "lru", "histogram", "cost_aware"] = "fixed"
    """For how long an idle pool keeps its last worker, where `workers.min` is 0; see docs/models.md. `fixed`:
    `to_zero_after_s`. `histogram`: by the idle times seen, and a worker is started before it is asked for;
    `cost_aware`: while holding costs less than it is likely to save; `lru`: until another model needs the memory."""

    keep_bin_s: DurationS = 60.0
    """Width of the 240 bins in which idle times are counted."""

    keep_min_times: Count = 8
    """Idle times that must have been seen before anything is concluded from them."""

    keep_price: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Of `cost_aware`: seconds of waiting that are worth as much as one GiB held for one second."""

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


class PoolConfig(Section):
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
        if self.scale.keep_alive != "fixed" and self.min_workers > 0:
            raise ValueError(
                f"scale.keep_alive {self.scale.keep_alive} needs workers.min 0, and it is {self.min_workers}: "
                f"write workers: {{min: 0, max: {self.max_workers}}}"
            )
        if self.scale.keep_alive != "fixed" and self.scale.to_zero_after_s is not None:
            raise ValueError(
                f"scale.to_zero_after_s goes with keep_alive fixed; {self.scale.keep_alive} decides by itself"
            )
        return self

    @field_serializer("kv_memory", when_used="json")
    def _size_with_unit(self, size_bytes: int) -> str:
        return format_size(size_bytes)
