"""The configuration of what the coordinator decides: dispatch, admission, queues, scaling, moves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from contracts.config_fields import Count, DurationS, PositiveFigure, Section, SizeBytes, format_size

DispatchPolicyName = Literal["random", "round_robin", "least_loaded", "freeness", "prefix_only", "ttft_min"]
AdmissionForm = Literal["none", "current", "predicted"]


class DispatchConfig(Section):
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


class AdmissionConfig(Section):
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


class QueueConfig(Section):
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


class ExpectedWorkload(Section):
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


class ReplanConfig(Section):
    """What happens when the workload is no longer the one that was planned for."""

    mode: Literal["off", "propose", "apply"] = "propose"
    """`propose` logs a better split of the workers; `apply` carries it out too: workers change their roles, one after
    the other."""

    window_s: DurationS = 600.0
    """What is observed to be compared with the plan."""

    drift: Annotated[float, Field(gt=0)] = 0.25
    """Relative change of rate, prompt or answer length that counts as drift."""

    expected: ExpectedWorkload = ExpectedWorkload()


class AutoscaleConfig(Section):
    """Growing and shrinking of the pools whose `workers` is a section: see docs/scaling.md."""

    mode: Literal["off", "propose", "apply"] = "apply"
    """`propose` logs what it would do, and why; `apply` does it."""

    interval_s: DurationS = 2.0
    """How often it looks."""

    start_s: DurationS = 20.0
    """How long a worker is taken to start until one was seen to."""

    flip_s: DurationS = 5.0
    """The same for a change of role."""


class LendConfig(Section):
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


class MigrationConfig(Section):
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

    headroom_tokens: dict[MovedPriority, Annotated[int, Field(ge=0)]] = Field(default={1: 1600})
    """Kept free on a worker while answers of this priority, or of one up to the next here, run there; by priority.
    Never more than half of its memory."""

    max_moving: Count = 2
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


class CoordinatorConfig(Section):
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
