"""The configuration of one model among several of a cluster, and of the targets of its requests."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from contracts.config_fields import Count, Label, PoolName, Section
from contracts.pool_config import PoolConfig

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class SloTargets(Section):
    """What a request of this class is to meet; both jointly."""

    ttft_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Time to first token, at most, from when its client asked."""

    tpot_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Mean time per output token after the first, at most."""


class ModelConfig(Section):
    """One of several models: see docs/models.md. What is not said is as the cluster has it."""

    name: PoolName
    """What clients ask for, and the beginning of its pools' and workers' names."""

    model: str
    """`demo`, a folder with a checkpoint in Hugging Face layout, or a hub id such as org/name."""

    served_model_name: str | None = None
    """Name in the API, instead of `name`."""

    dtype: DtypeName | None = None
    """Type of weights and KV."""

    max_model_len: Count | None = None
    """Longest prompt plus answer in tokens."""

    pools: tuple[PoolConfig, ...] = ()
    """Its pools; none: as the cluster's `pools`. In a file each may also be the path of a pool file."""

    slo: dict[Label, SloTargets] = Field(default={})
    """Targets by SLO class, instead of the cluster's."""

    default_slo_class: Label | None = None
    """Class of requests that name none."""

    profile: str | None = None
    """Latency profile of this model, as `coordinator.dispatch.profile`."""

    @property
    def api_name(self) -> str:
        """What clients ask for."""
        return self.served_model_name or self.name
