"""What an engine computes in. Without torch: whoever converts weights for an engine asks too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from contracts.errors import ConfigError
from engine.safetensors_files import stored_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from contracts.layout import KvDtype
    from engine.model_config import ModelConfig
    from engine.safetensors_files import LoadFormat, StoredDtype

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]


def compute_dtype(
    model_dir: Path,
    config: ModelConfig,
    choice: DtypeChoice,
    *,
    on_cpu: bool,
    load_format: LoadFormat = "auto",
    stored: StoredDtype | None = None,
) -> KvDtype:
    """What weights and KV are held and computed in.

    auto: what the config names, else what the weights are stored in; float32 for float16 on a CPU. `stored`: what they
    are stored in, where that is known; else the folder's files are asked. Raises ConfigError.
    """
    if choice == "float16" and on_cpu:
        raise ConfigError("dtype float16 is not computed on CPUs; choose bfloat16 or float32")
    if choice != "auto":
        return choice
    dtype = config.dtype
    if dtype is None:
        dtype = "float32" if load_format == "dummy" else _computed(stored or stored_dtype(model_dir))
    # Without loss, unlike bfloat16, which is there for those who ask.
    return "float32" if dtype == "float16" and on_cpu else dtype


def _computed(stored: StoredDtype) -> KvDtype:
    """Eight bits are a way to store: bfloat16 holds all of their values."""
    match stored:
        case "float32" | "bfloat16" | "float16":
            return stored
        case _:
            return "bfloat16"
