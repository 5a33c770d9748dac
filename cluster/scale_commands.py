"""`tandem autoscale`: how the pools of a running cluster follow the load, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cluster.cluster_flags import AsJson, ClusterFlags, Model, running_clusters

if TYPE_CHECKING:
    from cyclopts import App


def autoscale(
    *,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", negative="", help="What it would do now, and why; nothing is done.")
    ] = False,
    model: Model = None,
    where: ClusterFlags | None = None,
    as_json: AsJson = False,
) -> int:
    """How the pools of a running cluster follow the load, and what was done about it lately."""
    from cluster import scale_report

    return scale_report.print_scaling(running_clusters(where, model=model), dry_run=dry_run, as_json=as_json)


def add_scale_commands(app: App) -> None:
    app.command(autoscale)
