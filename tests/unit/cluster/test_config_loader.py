"""The four layers: what wins, where values came from, and how mistakes are told."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from cluster.flags import flag_keys
from contracts.config import ClusterConfig
from contracts.config_loader import RESERVED_ENV, file_schema, load_config
from contracts.errors import ConfigError
from tests.support.layout import ROOT, packages, source_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from contracts.config_loader import LoadedConfig

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
POOL_FILES = sorted((ROOT / "configs" / "pools").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, tuple[str, object]] | None = None,
    overrides: list[tuple[str, str]] | None = None,
) -> LoadedConfig:
    return load_config(path, environ or {}, flags or {}, overrides=overrides or [])


def refusal(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: list[tuple[str, str]] | None = None,
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ, overrides=overrides)
    return caught.value.message


def rows(loaded: LoadedConfig) -> dict[str, tuple[str, str]]:
    return {row.key: (row.value, str(row.source)) for row in loaded.rows()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load(path).config.pools


def test_every_shipped_pool_file_is_used_by_a_configuration() -> None:
    used = {f"{pool.name}.yaml" for path in CONFIGS for pool in load(path).config.pools}
    assert used == {path.name for path in POOL_FILES}


def test_the_local_configuration_says_what_the_defaults_are() -> None:
    assert load(ROOT / "configs" / "local.yaml").config == ClusterConfig()


def test_later_layers_win_and_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "gateway: {host: h-file, port: 1}\nblock_tokens: 32\ndtype: float32\n")
    environ = {"TANDEM_GATEWAY__PORT": "2", "TANDEM_BLOCK_TOKENS": "64"}
    loaded = load(path, environ, {"gateway.port": ("--port", 3), "model": ("--model", None)})
    assert (loaded.config.gateway.host, loaded.config.gateway.port) == ("h-file", 3)
    shown = rows(loaded)
    assert shown["gateway.port"] == ("3", "--port")
    assert shown["gateway.host"] == ("h-file", str(path))
    assert shown["gateway.strict_fields"] == ("false", "default")
    assert shown["block_tokens"] == ("64", "TANDEM_BLOCK_TOKENS")
    assert shown["dtype"] == ("float32", str(path))
    assert shown["model"] == ("demo", "default")


def test_pool_files_stand_beside_inline_pools(tmp_path: Path) -> None:
    write(tmp_path / "pools" / "big.yaml", "role: prefill\nkv_memory: 3GiB\n")
    path = write(tmp_path / "c.yaml", "pools:\n- pools/big.yaml\n- {name: out, role: decode, workers: 2}\n")
    loaded = load(path)
    assert [(pool.name, pool.workers) for pool in loaded.config.pools] == [("big", 1), ("out", 2)]
    assert loaded.config.pools[0].kv_memory == 3 * 2**30
    shown = rows(loaded)
    assert shown["pools.big.kv_memory"] == ("3GiB", str(tmp_path / "pools" / "big.yaml"))
    assert shown["pools.big.workers"] == ("1", "default")
    assert shown["pools.out.workers"] == ("2", str(path))


def test_variables_and_overrides_reach_pools_by_name() -> None:
    environ = {"TANDEM_POOLS__DECODE__WORKERS": "3", "TANDEM_POOLS__PREFILL__CORES": "[0, 1]"}
    loaded = load(None, environ, {"pools.*.device": ("--device", "cpu")}, [("pools.prefill.threads", "2")])
    prefill, decode = loaded.config.pools
    assert (prefill.cores, prefill.threads, prefill.device) == ((0, 1), 2, "cpu")
    assert (decode.workers, decode.threads, decode.device) == (3, "auto", "cpu")
    assert rows(loaded)["pools.decode.workers"] == ("3", "TANDEM_POOLS__DECODE__WORKERS")


def test_a_variable_can_replace_the_list_of_pools() -> None:
    environ = {"TANDEM_POOLS": "[{name: all-in-one, role: mixed}]", "TANDEM_POOLS__ALL_IN_ONE__WORKERS": "2"}
    (pool,) = load(None, environ).config.pools
    assert (pool.name, pool.role, pool.workers) == ("all-in-one", "mixed", 2)


def test_every_key_can_be_a_variable() -> None:
    """Taking each value that is shown as the variable of its key gives the same configuration."""
    loaded = load(ROOT / "configs" / "2p2d.yaml")
    environ = {
        "TANDEM_" + row.key.upper().replace("-", "_").replace(".", "__"): row.value
        for row in loaded.rows()
        if not row.key.endswith(".name")
    }
    again = load(ROOT / "configs" / "2p2d.yaml", environ)
    assert again.config == loaded.config
    assert {row.source.kind for row in again.rows() if not row.key.endswith(".name")} == {"env"}


def test_secrets_are_counted_and_not_shown() -> None:
    loaded = load(None, {"TANDEM_GATEWAY__API_KEYS": "[sk-one, sk-two]"})
    assert rows(loaded)["gateway.api_keys"] == ("(2 redacted)", "TANDEM_GATEWAY__API_KEYS")
    assert "sk-one" not in repr(loaded)


def test_a_secret_of_the_wrong_type_is_not_repeated() -> None:
    message = refusal(None, {"TANDEM_GATEWAY__API_KEYS": "sk-forgot-the-brackets"})
    assert message.startswith("TANDEM_GATEWAY__API_KEYS: gateway.api_keys = (not shown): ")
    assert "sk-forgot" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gatway: {}", "{file}: gatway: unknown key; did you mean 'gateway'?"),
        ("gateway: {prot: 1}", "{file}: gateway.prot: unknown key; did you mean 'port'?"),
        ("gateway: {port: ten}", "{file}: gateway.port = 'ten': Input should be a valid integer"),
        ("gateway: {port: 70000}", "{file}: gateway.port = 70000: Input should be less than"),
        ("gateway: 8000", "{file}: gateway = 8000: Input should be"),
        ("pools: [{name: a, role: mixed, wrokers: 2}]", "{file}: pools.a.wrokers: unknown key; did you mean"),
        ("pools: [{role: mixed}]", "{file}: pools.0.name: this key is required"),
        ("pools: [{name: a, role: mixd}]", "{file}: pools.a.role = 'mixd': Input should be 'prefill'"),
        ("pools: [{name: a, role: mixed, kv_memory: 2 gigs}]", "{file}: pools.a.kv_memory = '2 gigs': "),
        ("pools: [{name: a, role: prefill}]", "{file}: no pool has the role 'decode'"),
        ("pools: []", "{file}: pools = []: Tuple should have at least 1 item"),
        ("pools: [none.yaml]", "{folder}/none.yaml: cannot be read: No such file or directory"),
        ("a: 1\na: 2", "{file}: line 2: the key 'a' stands twice"),
        ("- 1", "{file}: must be a mapping of keys to values"),
        ("a: [", "{file}: line 1: "),
        ("\x00", "{file}: not YAML: "),
    ],
)
def test_mistakes_in_a_file_are_told_with_file_key_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    assert refusal(path).startswith(message.format(file=path, folder=tmp_path))


def test_a_mistake_in_a_pool_file_names_that_file(tmp_path: Path) -> None:
    pool = write(tmp_path / "pools" / "p.yaml", "role: mixed\nworkers: 0\n")
    path = write(tmp_path / "c.yaml", "pools: [pools/p.yaml]")
    assert refusal(path).startswith(f"{pool}: pools.p.workers = 0: Input should be greater than")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: cannot be read: No such file or directory"
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert refusal(binary) == f"{binary}: cannot be read: not UTF-8 text"
    assert "larger than" in refusal(write(tmp_path / "l.yaml", "# " + "x" * (1 << 20)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TANDEM_GATEWAY__PROT", "TANDEM_GATEWAY__PROT: unknown key 'gateway.prot'; did you mean 'port'?"),
        ("TANDEM_MODLE", "TANDEM_MODLE: unknown key 'modle'; did you mean 'model'?"),
        ("TANDEM_POOLS__DECOD__WORKERS", "there is no pool 'decod'; did you mean 'decode'?"),
        ("TANDEM_POOLS__DECODE__WORKER", "unknown key 'pools.decode.worker'; did you mean 'workers'?"),
        ("TANDEM_GATEWAY__PORT", "TANDEM_GATEWAY__PORT: gateway.port = 'x': Input should be a valid integer"),
    ],
)
def test_mistakes_in_variables_are_told(name: str, message: str) -> None:
    assert message in refusal(None, {name: "x"})


def test_mistakes_in_overrides_are_told() -> None:
    assert "--set engine.max: unknown key 'engine.max'" in refusal(overrides=[("engine.max", "1")])
    assert "--set pools: unknown" not in refusal(overrides=[("pools", "[]")])


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "gateway: {port: x}\nblock_tokens: 0\nnonsense: 1\n")
    assert len(refusal(path).splitlines()) == 3


def test_every_flag_sets_a_key_that_exists() -> None:
    for flag, key in flag_keys().values():
        value: object = {"gateway.port": 1, "max_model_len": 1}.get(key)
        load(None, {}, {key: (flag, value)})
        with pytest.raises(ConfigError, match="unknown key"):
            load(None, {}, {f"{key}x": (flag, 1)})


def test_the_published_schema_is_current() -> None:
    published = ROOT / "docs" / "config.schema.json"
    assert json.loads(published.read_text()) == file_schema(), (
        "write it anew: tandem config schema > docs/config.schema.json"
    )


def test_every_variable_of_ours_in_the_code_is_a_key_or_reserved() -> None:
    named = {
        name
        for package in packages()
        for path in source_files(package)
        for name in re.findall(r"\bTANDEM_[A-Z][A-Z0-9_]*[A-Z0-9]\b", path.read_text())
    }
    keys = {"TANDEM_" + row.key.upper().replace(".", "__") for row in load().rows()} | {"TANDEM_POOLS"}
    assert named - keys <= RESERVED_ENV
