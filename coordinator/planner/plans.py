"""What a plan is, what an evaluator answers about one, and what a search found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from contracts.messages import Role


@dataclass(frozen=True, slots=True, order=True)
class Parallelism:
    """How the devices of one worker share its model."""

    #: Devices that share each layer, all on one node.
    tensor: int = 1
    #: Devices that take turns at the layers.
    pipeline: int = 1

    @property
    def num_devices(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"TP {self.tensor}" + (f" PP {self.pipeline}" if self.pipeline > 1 else "")


@dataclass(frozen=True, slots=True, order=True)
class WorkerKind:
    """One way to be a worker of some role."""

    parallel: Parallelism
    #: Token budget of one of its steps.
    max_batch_tokens: int

    def __str__(self) -> str:
        return f"{self.parallel}, steps of {self.max_batch_tokens:,} tokens"


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers of one kind and role; at least one."""

    role: Role
    kind: WorkerKind
    num_workers: int

    @property
    def num_devices(self) -> int:
        return self.num_workers * self.kind.parallel.num_devices

    def __str__(self) -> str:
        return f"{self.num_workers} {self.role} ({self.kind.parallel})"


@dataclass(frozen=True, slots=True)
class Plan:
    """Pools that serve together. One pool of mixed workers: colocated. A pool of one phase alone: half a plan, whose
    other phase is taken to cost nothing."""

    pools: tuple[Pool, ...]
    #: So many times over, each copy with its own part of the requests: KV stays within a copy.
    copies: int = 1

    @property
    def num_devices(self) -> int:
        return self.copies * sum(pool.num_devices for pool in self.pools)

    @property
    def is_colocated(self) -> bool:
        return all(pool.role == "mixed" for pool in self.pools)

    def __str__(self) -> str:
        pools = " + ".join(str(pool) for pool in self.pools)
        return pools if self.copies == 1 else f"{self.copies} x ({pools})"


class Attained(NamedTuple):
    """Shares of all requests of a study."""

    #: That met both targets.
    joint: float
    ttft: float
    tpot: float


class Evaluator(Protocol):
    """Says what plans attain. Equal questions have equal answers."""

    def attained(self, plan: Plan, rate_rps: float) -> Attained:
        """Of a half plan `joint` is the share that meets that phase's target, no less than any whole plan with this
        pool attains. Asked about single copies only. Raises PlanDoesNotFit."""
        ...


class PlanDoesNotFit(Exception):
    """The plan cannot serve, for a reason that its message tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan with its goodput."""

    plan: Plan
    #: The highest rate, of all copies together, that was tried and met the target.
    goodput_rps: float
    #: What it attained there; and at the lowest rate that missed, which is that. None: no rate that was tried missed.
    attained: Attained
    missed: tuple[float, Attained] | None

    @property
    def goodput_per_device_rps(self) -> float:
        return self.goodput_rps / self.plan.num_devices


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something that was not considered further."""

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The answer of a search. None: there is no such plan."""

    best: Found | None
    runner_up: Found | None
    #: The best of mixed workers, and the best of prefill and decode workers; one of them is the best of all.
    colocated: Found | None
    split: Found | None
    target: float
    #: Rate that was asked for; None: the most that the devices can do.
    rate_rps: float | None
    #: Relative width of what counts as equal.
    tolerance: float
    num_plans: int
    #: How often the evaluator was asked: roughly for an order, about half plans, about whole plans.
    num_rough_runs: int
    num_phase_runs: int
    num_joint_runs: int
    dropped: tuple[Dropped, ...]
