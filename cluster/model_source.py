"""Where the checkpoint comes from: the built-in demo model, a local folder, an object store, or the Hugging Face hub.

From a hub only what is read is fetched: safetensors, JSON, and tokenizer and template files; never code or
pickled weights. `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean everywhere.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.remote_model import is_remote, reach_model
from coldstart.format import INDEX_NAME, is_converted
from contracts.config import WeightTierConfig
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.tier_handles import Entry
    from engine.compute_dtype import DtypeChoice

DEMO = "demo"

#: What a served checkpoint consists of.
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")

#: Alternative formats in the same repository that nobody here reads.
HUB_NOT_FILES = ("*/*", "consolidated*.safetensors")

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    folder: Path
    #: Name in the API, unless the configuration says otherwise.
    name: str
    #: Keeps the folder where it is, as long as the process uses it.
    pin: Entry | None = None


def resolve_model(
    model: str,
    say: Callable[[str], None],
    *,
    dtype: DtypeChoice = "auto",
    tier: WeightTierConfig | None = None,
    stream: bool = False,
) -> ModelSource:
    """Raises ConfigError that names `model` and what to do, and LoadError for an object store that does not give it.
    Blocks while it downloads. What comes from an object store goes to `tier`, in the form for `dtype`; with `stream`
    its weights may come only when they are loaded."""
    if model == DEMO:
        return ModelSource(_demo_folder(), DEMO)
    if is_remote(model):
        folder, entry = reach_model(model, dtype, tier or WeightTierConfig(), say, stream=stream)
        return ModelSource(_checked(folder), model.rstrip("/").rpartition("/")[2], entry)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return ModelSource(_checked(folder.resolve()), folder.resolve().name)
    if folder.exists():
        raise ConfigError(f"model {model}: this is a file; name the folder that holds config.json")
    if model.startswith((".", "/", "~")) or _HUB_ID.fullmatch(model) is None:
        raise ConfigError(f"model {model}: no such folder")
    return ModelSource(_checked(_download(model, say)), model)


def _demo_folder() -> Path:
    """Beside the code of the engine, without importing it."""
    spec = importlib.util.find_spec("engine")
    assert spec is not None, "the engine is part of this installation"
    assert spec.submodule_search_locations, "the engine is a package"
    return _checked(Path(spec.submodule_search_locations[0]) / "demo")


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model folder {folder}: it has no config.json")
    if not is_converted(folder) and not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model folder {folder}: it has neither a *.safetensors file nor {INDEX_NAME}")
    return folder


def _download(model: str, say: Callable[[str], None]) -> Path:
    # Takes a moment to import, and only a hub id needs it.
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    say(f"model {model}: fetching from the hub what is not here yet")
    try:
        folder = snapshot_download(model, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_NOT_FILES))
    except GatedRepoError as error:
        raise ConfigError(
            f"model {model}: access is restricted; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model {model}: neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model {model}: not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        ) from error
    except HfHubHTTPError as error:
        raise ConfigError(f"model {model}: the hub answered with an error: {error}") from error
    except OSError as error:
        raise ConfigError(f"model {model}: the download failed: {error}") from error
    return Path(folder)
