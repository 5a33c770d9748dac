"""Where commands find the cluster token."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def cluster_token(file: Path | None) -> str:
    """From the file, or else from TANDEM_CLUSTER_TOKEN. Raises ConfigError."""
    if file is None:
        token = os.environ.get("TANDEM_CLUSTER_TOKEN", "")
        if not token:
            raise ConfigError("no cluster token: set TANDEM_CLUSTER_TOKEN or give --token-file")
        return token
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {file}: cannot be read: {error}") from error
    if not token:
        raise ConfigError(f"token file {file}: it is empty")
    return token
