"""What a start is decided from, and what is decided: values without behaviour but for their sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.estimate import Tier

#: `idle`: loaded, without a request. `running`: has a request and may be moved. `fixed`: loads, moves or must stay.
InstanceState = Literal["idle", "running", "fixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTerms:
    """What placement must know of a model."""

    num_bytes: int
    #: Of one node.
    num_devices: int
    #: After its bytes are in place.
    init_s: float = 0.0
    #: Seconds to go on elsewhere with n tokens: `resume_s_per_token * n + resume_s` (ServerlessLLM's a and b).
    resume_s_per_token: float
    resume_s: float
    #: Between two tokens of an answer.
    token_s: float

    def __post_init__(self) -> None:
        if self.num_bytes <= 0 or self.num_devices <= 0 or self.token_s <= 0:
            raise ValueError(f"a model has bytes and devices, and tokens take time: {self}")
        if min(self.init_s, self.resume_s_per_token, self.resume_s) < 0:
            raise ValueError(f"times must not be negative: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A model on devices of a node."""

    instance_id: str
    model: str
    state: InstanceState
    #: Of the request that runs.
    prompt_tokens: int = 0
    #: Since its first token: the scheduler sees no tokens, and takes this over the time for one.
    elapsed_s: float = 0.0
    #: What letting go of an idle one is expected to cost later (`coldstart.keep_alive.loss_s`).
    eviction_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    node_id: str
    #: With nothing on them, and promised to nobody.
    free_devices: int
    #: By model: the nearest tier where the node has the whole checkpoint; else it is remote.
    tiers: Mapping[str, Tier] = field(default_factory=dict[str, "Tier"])
    #: By tier, of the path to the device (`LoadHistory.path`); missing or 0: nothing can be loaded from there.
    bytes_per_s: Mapping[Tier, float]
    #: By tier: seconds of loads in line (`coldstart.estimate.queue_s`).
    queue_s: Mapping[Tier, float] = field(default_factory=dict["Tier", float])
    instances: tuple[Instance, ...] = ()
    #: False for a node that drains: it gets nothing new.
    takes_starts: bool = True

    def tier_of(self, model: str) -> Tier:
        return self.tiers.get(model, "remote")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    #: By node id.
    nodes: tuple[NodeView, ...]
    #: Of all models that are asked for or have instances.
    models: Mapping[str, ModelTerms]

    def __post_init__(self) -> None:
        ids = [node.node_id for node in self.nodes]
        if ids != sorted(set(ids)):
            raise ValueError(f"nodes must be in the order of their ids, each once, got {ids}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    #: Whether running instances may be moved away.
    migrate: bool = True
    #: A plan with moves must be better than one without by this.
    min_gain_s: float = 0.0
    #: For so long after it came a start that waits for devices lets later ones take what it cannot use. After that
    #: they wait too, so that a start that needs many devices is not overtaken for ever.
    overtake_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A running instance that goes elsewhere: where its checkpoint comes from there, and which idle ones make room."""

    instance_id: str
    model: str
    target: str
    tier: Tier
    #: On the target, in line included.
    load_s: float
    resume_s: float
    evict: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartDecision:
    """`start`: on a node, after what is listed. `reuse`: an idle instance of the model. `wait`: ask again when devices
    are let go."""

    kind: Literal["start", "reuse", "wait"]
    #: For `wait`: the node that is waited for, if it is a certain one.
    node_id: str | None = None
    instance_id: str | None = None
    tier: Tier | None = None
    #: Idle instances to let go of, on the node.
    evict: tuple[str, ...] = ()
    #: Carried out side by side; the load begins when all are done.
    moves: tuple[Move, ...] = ()
    #: Running instances, on the node, that are stopped: their requests start again like new ones, with their old place
    #: in line. Only baselines do that.
    stop: tuple[str, ...] = ()
    #: Of the model itself, in line and initialisation included.
    load_s: float = math.inf
    #: What was minimised: its own load, and what moves and evictions cost others.
    cost_s: float = math.inf
    #: False: there were so many ways to make room that not all were looked at.
    is_exact: bool = True
    reason: str

    @property
    def ready_s(self) -> float:
        """Expected seconds from now until the model is ready; less than `cost_s` where several move side by side."""
        if not self.moves:
            return self.load_s
        return max(move.load_s + move.resume_s for move in self.moves) + self.load_s


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingStart:
    start_id: str
    model: str
    arrived_s: float


#: Which node starts the model now. Pure, but for the generator of a random one.
Place = Callable[[ClusterView, str], StartDecision]
