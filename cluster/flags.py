"""The flags of `tandem serve` and its relatives: each sets one key of the configuration tree.

Named as vLLM names them, where vLLM has the same. The key stands beside the flag, so that help, precedence
and `tandem config show` cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)
from typing import Annotated, Literal, get_args, get_type_hints

from cyclopts import Group, Parameter

from contracts.config import AdmissionForm, DispatchPolicyName  # noqa: TC001 (as above)
from contracts.config_loader import LoadedConfig, load_config
from contracts.errors import ConfigError

MODEL_GROUP = Group("Model", sort_key=1)
ENGINE_GROUP = Group("Engine", sort_key=2)
GATEWAY_GROUP = Group("Gateway", sort_key=3)
COORDINATOR_GROUP = Group("Coordinator", sort_key=4)
OTHER_GROUP = Group("Configuration", sort_key=5)


@dataclass(frozen=True, slots=True)
class Key:
    """The place in the tree that a flag sets."""

    path: str


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFlags:
    """None says: not given."""

    config: Annotated[
        Path | None,
        Parameter(name="--config", group=OTHER_GROUP, env_var="TANDEM_CONFIG", help="Cluster file (YAML)."),
    ] = None

    model: Annotated[
        str | None,
        Key("model"),
        Parameter(name="--model", group=MODEL_GROUP, help="demo, a checkpoint folder, or a hub id."),
    ] = None

    served_model_name: Annotated[
        str | None,
        Key("served_model_name"),
        Parameter(name="--served-model-name", group=MODEL_GROUP, help="Name of the model in the API."),
    ] = None

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        Key("dtype"),
        Parameter(name="--dtype", group=MODEL_GROUP, help="Type of weights and KV."),
    ] = None

    max_model_len: Annotated[
        int | None,
        Key("max_model_len"),
        Parameter(name="--max-model-len", group=MODEL_GROUP, help="Longest prompt plus answer, in tokens."),
    ] = None

    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        Key("pools.*.device"),
        Parameter(name="--device", group=ENGINE_GROUP, help="Device of every pool."),
    ] = None

    block_size: Annotated[
        int | None,
        Key("block_tokens"),
        Parameter(name="--block-size", group=ENGINE_GROUP, help="Tokens of one KV block."),
    ] = None

    kv_cache_memory_bytes: Annotated[
        str | None,
        Key("pools.*.kv_memory"),
        Parameter(name="--kv-cache-memory-bytes", group=ENGINE_GROUP, help="KV pool of each worker, such as 2GiB."),
    ] = None

    max_num_batched_tokens: Annotated[
        int | None,
        Key("engine.max_batch_tokens"),
        Parameter(name="--max-num-batched-tokens", group=ENGINE_GROUP, help="Token budget of one step."),
    ] = None

    max_num_seqs: Annotated[
        int | None,
        Key("engine.max_sequences"),
        Parameter(name="--max-num-seqs", group=ENGINE_GROUP, help="Sequences that run at once in a worker."),
    ] = None

    host: Annotated[
        str | None,
        Key("gateway.host"),
        Parameter(name="--host", group=GATEWAY_GROUP, help="Address to listen on."),
    ] = None

    port: Annotated[
        int | None,
        Key("gateway.port"),
        Parameter(name="--port", group=GATEWAY_GROUP, help="TCP port; 0 takes a free one."),
    ] = None

    api_key: Annotated[
        list[str] | None,
        Key("gateway.api_keys"),
        Parameter(
            name="--api-key",
            group=GATEWAY_GROUP,
            negative="",
            help="Key that clients must send; repeatable. Others on this machine can see flags: prefer "
            "TANDEM_GATEWAY__API_KEYS or the cluster file.",
        ),
    ] = None

    strict_fields: Annotated[
        bool | None,
        Key("gateway.strict_fields"),
        Parameter(name="--strict-fields", group=GATEWAY_GROUP, help="Refuse requests with unknown fields."),
    ] = None

    dispatch_policy: Annotated[
        DispatchPolicyName | None,
        Key("coordinator.dispatch.policy"),
        Parameter(name="--dispatch-policy", group=COORDINATOR_GROUP, help="How workers are chosen for a request."),
    ] = None

    admission: Annotated[
        AdmissionForm | None,
        Key("coordinator.admission.form"),
        Parameter(
            name="--admission",
            group=COORDINATOR_GROUP,
            help="By which prediction requests that would miss their SLO class's targets are refused.",
        ),
    ] = None

    default_slo_class: Annotated[
        str | None,
        Key("default_slo_class"),
        Parameter(name="--default-slo-class", group=COORDINATOR_GROUP, help="Class of requests that name none."),
    ] = None

    log_dir: Annotated[
        str | None,
        Key("log_dir"),
        Parameter(name="--log-dir", group=OTHER_GROUP, help="Folder for the workers' logs."),
    ] = None

    set_: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            group=OTHER_GROUP,
            negative="",
            help="Any other key, such as pools.decode.workers=2; repeatable.",
        ),
    ] = None


def flag_keys() -> dict[str, tuple[str, str]]:
    """Attribute of ConfigFlags -> (flag, key)."""
    hints = get_type_hints(ConfigFlags, include_extras=True)
    found: dict[str, tuple[str, str]] = {}
    for field in fields(ConfigFlags):
        extras = get_args(hints[field.name])[1:]
        key = next((extra.path for extra in extras if isinstance(extra, Key)), None)
        if key is not None:
            found[field.name] = (f"--{field.name.replace('_', '-')}", key)
    return found


def load(flags: ConfigFlags | None, environ: dict[str, str], *, model: str | None = None) -> LoadedConfig:
    """All four layers. `model` is the positional argument. Raises ConfigError."""
    flags = flags or ConfigFlags()
    given = {key: (flag, getattr(flags, name)) for name, (flag, key) in flag_keys().items()}
    if model is not None:
        if flags.model not in (None, model):
            raise ConfigError(f"two models are named: {model} and --model {flags.model}")
        given["model"] = ("MODEL", model)
    return load_config(flags.config, environ, given, overrides=_overrides(flags.set_ or []))


def _overrides(texts: list[str]) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in texts]
    for text, (key, equals, _) in zip(texts, pairs, strict=True):
        if not key or not equals:
            raise ConfigError(f"--set {text}: write --set key=value")
    return [(key, value) for key, _, value in pairs]
