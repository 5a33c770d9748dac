"""The cells of a cluster: what serves one model each. Pure.

A cell has a coordinator of its own and its own pools; the process, the HTTP front, the node agents, the weight cache
and the processes that stand by are everybody's. A cluster of one model is one cell, named "".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.config import ClusterConfig
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from contracts.config import CoordinatorConfig, ModelConfig, StoreConfig


@dataclass(frozen=True, slots=True)
class Cell:
    #: Of the model; "" where there is but one.
    name: str
    #: As that of a cluster of this model alone. Its pools' names begin with the model's.
    config: ClusterConfig


def cells_of(config: ClusterConfig) -> tuple[Cell, ...]:
    """In the order of the configuration."""
    if not config.models:
        return (Cell("", config),)
    return tuple(Cell(model.name, _cell_config(config, model)) for model in config.models)


def cell_named(config: ClusterConfig, name: str | None) -> ClusterConfig:
    """The configuration of one model's cell; `name` may be left out where there is but one. Raises ConfigError."""
    if not config.models:
        if name is not None:
            raise ConfigError(f"there is no cell {name!r}: the configuration has one model, and no `models`")
        return config
    found = next((cell.config for cell in cells_of(config) if cell.name == name), None)
    if found is None:
        said = "which model?" if name is None else f"there is no model {name!r};"
        raise ConfigError(f"{said} `models` has {', '.join(model.name for model in config.models)}")
    return found


def _cell_config(config: ClusterConfig, model: ModelConfig) -> ClusterConfig:
    pools = tuple(
        pool.model_copy(update={"name": config.pool_name(model, pool)}) for pool in model.pools or config.pools
    )
    return ClusterConfig.model_validate(
        {
            **dict(config),
            "models": (),
            "model": model.model,
            "served_model_name": model.api_name,
            "dtype": model.dtype or config.dtype,
            "max_model_len": model.max_model_len or config.max_model_len,
            "pools": pools,
            "slo": model.slo or config.slo,
            "default_slo_class": model.default_slo_class or config.default_slo_class,
            "store": _store_part(config.store, model.name, len(config.models)),
            "coordinator": _coordinator(config.coordinator, model),
        }
    )


def _store_part(store: StoreConfig, name: str, num_models: int) -> StoreConfig:
    """A store holds the KV of one model: each has an equal part, on disk in a folder of its own."""
    ssd = store.ssd
    if ssd.path is not None:
        ssd = ssd.model_copy(update={"path": str(Path(ssd.path) / name), "size": max(1, ssd.size // num_models)})
    dram = None if store.dram is None else max(1, store.dram // num_models)
    return store.model_copy(update={"dram": dram, "ssd": ssd})


def _coordinator(coordinator: CoordinatorConfig, model: ModelConfig) -> CoordinatorConfig:
    dispatch = coordinator.dispatch.model_copy(update={"profile": model.profile})
    log = coordinator.decision_log
    if log is not None:
        path = Path(log)
        log = str(path.with_name(f"{path.stem}-{model.name}{path.suffix}"))
    return coordinator.model_copy(update={"dispatch": dispatch, "decision_log": log})
