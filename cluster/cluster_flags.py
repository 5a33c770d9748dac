"""The flags that say which running cluster a command means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from cluster.cache import Cluster

Model = Annotated[
    str | None, Parameter(name="--model", help="Which one is meant, where a cluster serves several models.")
]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object instead of a table.")]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFlags:
    """None says: not given."""

    state_file: Annotated[
        Path | None, Parameter(name="--state-file", help="State file that the running cluster wrote (tandem serve).")
    ] = None
    coordinator: Annotated[str | None, Parameter(name="--coordinator", help="Or the address of its coordinator.")] = (
        None
    )
    token_file: Annotated[
        Path | None,
        Parameter(name="--token-file", help="File with the cluster token; else TANDEM_CLUSTER_TOKEN is read."),
    ] = None


def running_cluster(
    where: ClusterFlags | None, *, model: str | None = None, worker: str | None = None, url: str | None = None
) -> Cluster:
    """The one that is meant; of several models that of `model`, or of this worker. `url`: of its gateway, where no
    state file tells it. Raises ConfigError."""
    from cluster.cache import Cluster
    from cluster.tokens import cluster_token

    where = where or ClusterFlags()
    if where.state_file is not None:
        return Cluster.of_state(where.state_file, model, worker)
    if where.coordinator is None:
        raise ConfigError("which cluster? Give --state-file, or --coordinator and the token")
    return Cluster(coordinator=where.coordinator, token=cluster_token(where.token_file), base_url=url, model=model)


def running_clusters(where: ClusterFlags | None, *, model: str | None) -> list[Cluster]:
    """All models', unless one is named. Raises ConfigError."""
    from cluster.cache import Cluster

    if where is not None and where.state_file is not None and model is None:
        return Cluster.all_of_state(where.state_file)
    return [running_cluster(where, model=model)]
