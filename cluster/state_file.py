"""What a running cluster tells about itself to those who may look: a file that only its owner can read.

It holds the cluster token, so whoever can read it can call every worker. Replaced as a whole with each
change, so that a reader never sees half of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import ConfigError
from contracts.ids import Incarnation, WorkerId
from contracts.messages import MemberRole

if TYPE_CHECKING:
    from pathlib import Path

#: Its name in the cluster's runtime folder.
STATE_FILE = "state.json"


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    role: MemberRole
    #: A value of `cluster.supervision.State`.
    state: str
    incarnation: Incarnation
    pid: int | None
    address: str | None
    problem: str | None = None


class CellState(msgspec.Struct, frozen=True, kw_only=True):
    """One of several models."""

    #: As configured.
    name: str
    #: What clients ask for.
    model_name: str
    coordinator_address: str
    #: All slots, whether somebody runs there or not.
    worker_ids: tuple[WorkerId, ...]


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    base_url: str
    #: Where there are several models, the first one's; as `coordinator_address`.
    model_name: str
    coordinator_address: str
    cluster_token: str
    runtime_dir: str
    log_dir: str
    #: Every worker is ready (or was given up while the others can serve).
    ready: bool
    workers: tuple[WorkerState, ...]
    #: Where there are several models.
    cells: tuple[CellState, ...] = ()


def write_state(path: Path, state: ClusterState) -> None:
    """Raises OSError."""
    temporary = path.with_name(f"{path.name}.{state.pid}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state), indent=2))
    temporary.replace(path)


def read_state(path: Path) -> ClusterState:
    """Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ClusterState)
    except OSError as error:
        raise ConfigError(f"state file {path}: cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"state file {path}: {error}") from error
