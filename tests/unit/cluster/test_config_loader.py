"""The four layers: what wins, where values came from, and how mistakes are told."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, cast

import pytest

from cluster.flags import flag_keys
from contracts.config import ClusterConfig
from contracts.config_loader import RESERVED_ENV, file_schema, load_config
from contracts.config_paths import spell
from contracts.errors import ConfigError
from tests.support.layout import ROOT, packages, source_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from contracts.config_loader import LoadedConfig
    from contracts.config_paths import KeyPath

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
    configs = [load(path).config for path in CONFIGS]
    pools = [
        pool for config in configs for own in (config.pools, *(each.pools for each in config.models)) for pool in own
    ]
    used = {f"{pool.name}.yaml" for pool in pools}
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


TENANTS_AND_CLASSES = """
slo:
  interactive: {ttft_ms: 300, tpot_ms: 50}
  very-long.1: {ttft_ms: 30000, tpot_ms: 200}
default_slo_class: interactive
gateway:
  api_keys: [sk-default]
  tenants:
  - {name: acme, api_keys: [sk-a, sk-b], weight: 2.5, slo_class: interactive}
  - {name: Big-Co, api_keys: [sk-c]}
"""


@pytest.mark.parametrize("with_tenants", [False, True])
def test_every_key_can_be_a_variable(tmp_path: Path, with_tenants: bool) -> None:
    """Taking each value that is shown as the variable of its key gives the same configuration."""
    path = ROOT / "configs" / "2p2d.yaml"
    if with_tenants:
        path = write(tmp_path / "c.yaml", TENANTS_AND_CLASSES)
    loaded = load(path)

    def is_told(key: str, value: str) -> bool:
        return not key.endswith(".name") and "redacted" not in value

    environ = {
        "TANDEM_" + row.key.upper().replace("-", "_").replace(".", "__"): row.value
        for row in loaded.rows()
        if is_told(row.key, row.value)
    }
    again = load(path, environ)
    assert again.config == loaded.config
    assert {row.source.kind for row in again.rows() if is_told(row.key, row.value)} == {"env"}


def test_nested_sections_classes_and_tenants_can_be_set_and_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", TENANTS_AND_CLASSES)
    environ = {
        "TANDEM_COORDINATOR__ADMISSION__FORM": "current",
        "TANDEM_SLO__INTERACTIVE__TTFT_MS": "250",
        "TANDEM_SLO__VERY_LONG__1__TPOT_MS": "150",
        "TANDEM_SLO__NEW": "{ttft_ms: 1, tpot_ms: 2}",
        "TANDEM_SLO__NEW__TPOT_MS": "3",
        "TANDEM_GATEWAY__TENANTS__BIG_CO__API_KEYS": "[sk-x, sk-y, sk-z]",
        "TANDEM_GATEWAY__TENANTS__ACME__WEIGHT": "4",
    }
    overrides = [("engine.queue.order", "shortest"), ("gateway.tenants.*.max_priority", "7")]
    loaded = load(path, environ, overrides=overrides)
    config, shown = loaded.config, rows(loaded)
    assert config.coordinator.admission.form == "current"
    assert {name: (one.ttft_ms, one.tpot_ms) for name, one in config.slo.items()} == {
        "interactive": (250, 50),
        "very-long.1": (30000, 150),
        "new": (1, 3),
    }
    assert [(one.weight, one.max_priority, len(one.api_keys)) for one in config.gateway.tenants] == [
        (4, 7, 2),
        (1, 7, 3),
    ]
    assert config.engine.queue.order == "shortest"
    assert shown["coordinator.admission.form"] == ("current", "TANDEM_COORDINATOR__ADMISSION__FORM")
    assert shown["coordinator.admission.hysteresis"] == ("0.02", "default")
    assert shown["slo.interactive.ttft_ms"] == ("250.0", "TANDEM_SLO__INTERACTIVE__TTFT_MS")
    assert shown["slo.interactive.tpot_ms"] == ("50.0", str(path))
    assert shown["slo.new.ttft_ms"] == ("1.0", "TANDEM_SLO__NEW")
    assert shown["gateway.tenants.Big-Co.max_priority"] == ("7", "--set gateway.tenants.*.max_priority")
    assert shown["gateway.tenants.Big-Co.api_keys"] == ("(3 redacted)", "TANDEM_GATEWAY__TENANTS__BIG_CO__API_KEYS")
    assert not any("sk-" in value for value, _ in shown.values())


def test_a_section_set_as_a_whole_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "gateway: {port: 1, host: h}\nslo: {a: {ttft_ms: 1, tpot_ms: 1}}\n")
    loaded = load(path, {"TANDEM_GATEWAY": "{port: 2}", "TANDEM_SLO": "{}"})
    shown = rows(loaded)
    assert (loaded.config.gateway.host, loaded.config.slo) == ("127.0.0.1", {})
    assert shown["gateway.host"] == ("127.0.0.1", "default")
    assert shown["gateway.port"] == ("2", "TANDEM_GATEWAY")
    assert shown["slo"] == ("{}", "TANDEM_SLO")


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
        (
            "coordinator: {admission: {from: none}}",
            "{file}: coordinator.admission.from: unknown key; did you mean 'form'?",
        ),
        ("slo: {chat: {ttft: 3}}", "{file}: slo.chat.ttft_ms: this key is required"),
        ("slo: {chat: }", "{file}: slo.chat = null: Input should be a section with ttft_ms and tpot_ms"),
        ("slo:", "{file}: slo = null: Input should be a section of labels, each a section with ttft_ms and tpot_ms"),
        ("pools:", "{file}: pools = null: Input should be a list"),
        ("gateway: {tenants: }", "{file}: gateway.tenants = null: Input should be a list"),
        ("gateway: {tenants: [null]}", "{file}: gateway.tenants.0 = null: Input should be a section with name and"),
        ("coordinator: {admission: }", "{file}: coordinator.admission = null: Input should be a section of form, "),
        ("slo: {[chat]: {}}", "{file}: line 1: a key must be a name"),
        ("engine: {queue: 3}", "{file}: engine.queue = 3: Input should be a section of order, ageing_s,"),
        (
            "coordinator: {max_directory_blocks: 100000001}",
            "{file}: coordinator.max_directory_blocks = 100000001: Input should be less than or equal to 100000000",
        ),
        ("slo: {chat: {ttft_ms: 3, tpot_ms: 0}}", "{file}: slo.chat.tpot_ms = 0: Input should be greater than 0"),
        ("gateway: {tenants: [{name: a}]}", "{file}: gateway.tenants.a.api_keys: this key is required"),
        ("gateway: {tenants: [{name: a, wieght: 2}]}", "{file}: gateway.tenants.a.api_keys: this key is required"),
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


def everything_in(tree: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    entries: list[tuple[str | int, object]] = []
    if isinstance(tree, dict):
        entries = list(cast("dict[str | int, object]", tree).items())
    elif isinstance(tree, list):
        entries = list(enumerate(cast("list[object]", tree)))
    for part, inner in entries:
        yield (*path, part)
        yield from everything_in(inner, (*path, part))


def alone(path: KeyPath, value: object) -> object:
    """A tree with nothing else in it; lists have one element."""
    for part in reversed(path):
        value = {part: value} if isinstance(part, str) else [value]
    return value


@pytest.mark.parametrize("value", [None, "", 3, [], {}, [None], {"x": None}], ids=json.dumps)
def test_whatever_stands_at_a_key_is_taken_or_refused_by_name(tmp_path: Path, value: object) -> None:
    tree = load(write(tmp_path / "c.yaml", TENANTS_AND_CLASSES)).config.model_dump(mode="json")
    # Of lists the first elements: `alone` makes no others.
    paths = [path for path in everything_in(tree) if not any(isinstance(part, int) and part for part in path)]
    assert {("slo", "interactive"), ("gateway", "tenants", 0), ("coordinator", "dispatch", "policy")} < set(paths)
    for path in paths:
        given = alone(path, value)
        file = write(tmp_path / "one.yaml", json.dumps(given))
        try:
            load(file).rows()
        except ConfigError as error:
            problems = error.message.splitlines()
        else:
            problems = []
        # Elsewhere what is required and missing is told instead.
        if value is None and problems and 0 not in path[:-1]:
            assert any(problem.startswith(f"{file}: {spell(path, given)} = ") for problem in problems), problems


def test_a_mistake_in_a_pool_file_names_that_file(tmp_path: Path) -> None:
    pool = write(tmp_path / "pools" / "p.yaml", "role: mixed\nworkers: 0\n")
    path = write(tmp_path / "c.yaml", "pools: [pools/p.yaml]")
    assert refusal(path).startswith(f"{pool}: pools.p.workers = 0: Input should be greater than")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TANDEM_GATEWAY__TENANTS", "{name: acme, api_keys: [sk-hidden]}"),
        ("TANDEM_GATEWAY__TENANTS", "sk-hidden"),
        ("TANDEM_GATEWAY", "sk-hidden"),
        ("TANDEM_GATEWAY__TENANTS", "[[sk-hidden]]"),
        ("TANDEM_GATEWAY__TENANTS", "[{name: acme, api_keys: {sk-hidden: 1}}]"),
        ("TANDEM_GATEWAY", "{api_keys: [same-sk-hidden, same-sk-hidden]}"),
    ],
)
def test_secrets_in_misshapen_values_are_not_repeated(variable: str, value: str) -> None:
    message = refusal(None, {variable: value})
    assert message.startswith(variable)
    assert "sk-hidden" not in message


def test_yaml_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "gateway: &g {host: *g}\nslo: &s {a: *s}\npools: &p [*p]\n")
    assert "pools" in refusal(path)


def test_what_the_whole_tree_must_agree_on_names_all_it_compared(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "slo: {chat: {ttft_ms: 1, tpot_ms: 1}}\n")
    message = refusal(path, {"TANDEM_DEFAULT_SLO_CLASS": "caht"})
    assert message == f"{path}, TANDEM_DEFAULT_SLO_CLASS: no SLO class is named 'caht'; `slo` has chat"


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
        ("TANDEM_GATEWAY__PORT__X", "unknown key 'gateway.port.x'; gateway.port is a value"),
        ("TANDEM_COORDINATOR__DISPATCH__POLCY", "unknown key 'coordinator.dispatch.polcy'; did you mean 'policy'?"),
        ("TANDEM_SLO__CHAT__TTFT", "unknown key 'slo.chat.ttft'; did you mean 'ttft_ms'?"),
        ("TANDEM_GATEWAY__TENANTS__ACME__WEIGHT", "there is no tenant 'acme'; known are none"),
        ("TANDEM_POOLS__DECODE", "pools.decode cannot be set as a whole; name one of its keys"),
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


def test_a_pools_workers_may_be_a_range(tmp_path: Path) -> None:
    write(
        tmp_path / "pools" / "out.yaml",
        "role: decode\nworkers: {initial: 2, min: 1, max: 4}\nscale: {cooldown_s: 1min}\n",
    )
    path = write(tmp_path / "c.yaml", "pools:\n- pools/out.yaml\n- {name: in, role: prefill, workers: {max: 3}}\n")
    loaded = load(path, {"TANDEM_POOLS__IN__SCALE__FLIP": "false"}, None, [("pools.out.workers.max", "5")])
    out, inward = loaded.config.pools
    assert (out.initial_workers, out.min_workers, out.max_workers, out.is_scaled) == (2, 1, 5, True)
    assert (inward.initial_workers, inward.min_workers, inward.max_workers) == (1, 1, 3)
    assert (out.scale.cooldown_s, out.scale.flip, inward.scale.flip) == (60.0, True, False)
    shown = rows(loaded)
    assert shown["pools.out.workers.initial"] == ("2", str(tmp_path / "pools" / "out.yaml"))
    assert shown["pools.out.workers.max"] == ("5", "--set pools.out.workers.max")
    assert shown["pools.in.workers.min"] == ("1", "default")
    assert shown["pools.in.scale.flip"] == ("false", "TANDEM_POOLS__IN__SCALE__FLIP")
    # What is shown is a file that means the same.
    again = ClusterConfig.model_validate(loaded.config.model_dump(mode="json"))
    assert again == loaded.config


def test_a_number_of_workers_is_a_range_of_one() -> None:
    (pool,) = load(None, {"TANDEM_POOLS": "[{name: all, role: mixed, workers: 3}]"}).config.pools
    assert (pool.initial_workers, pool.min_workers, pool.max_workers, pool.is_scaled) == (3, 3, 3, False)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ("workers: {min: 3, max: 2}", "pools.p.workers = {'min': 3, 'max': 2}: min (3) must be at most max (2)"),
        ("workers: {initial: 5, max: 4}", "initial (5) must be from min (1) to max (4)"),
        ("workers: {max: 4, mxa: 3}", "pools.p.workers.mxa: unknown key; did you mean 'max'?"),
        ("workers: {max: 0}", "pools.p.workers.max = 0: Input should be greater than or equal to 1"),
        ("workers: many", "pools.p.workers = 'many': Input should be a valid integer"),
        ("workers: {max: 4}\nscale: {to_zero_after_s: 5min}", "scale.to_zero_after_s (300) needs workers.min 0"),
        ("scale: {freeness_low: 60}", "freeness_low (60) must be below freeness_high (60)"),
        ("scale: {cooldown: 5}", "pools.p.scale.cooldown: unknown key; did you mean 'cooldown_s'?"),
        ("scale: {cooldown_s: 5parsecs}", "pools.p.scale.cooldown_s = '5parsecs'"),
        ("scale: {target_attainment: 95}", "pools.p.scale.target_attainment = 95: Input should be less than"),
    ],
)
def test_mistakes_in_how_a_pool_scales_name_the_key(tmp_path: Path, pool: str, message: str) -> None:
    file = write(tmp_path / "pools" / "p.yaml", f"role: mixed\n{pool}\n")
    refused = refusal(write(tmp_path / "c.yaml", "pools: [pools/p.yaml]"))
    assert refused.startswith(f"{file}: pools.p")
    assert message in refused


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TANDEM_COORDINATOR__LEND__MEMORY_LOW", "0.95", "memory_low (0.95) must be below memory_high (0.9)"),
        ("TANDEM_COORDINATOR__LEND__MODE", "on", "coordinator.lend.mode = 'on'"),
        ("TANDEM_COORDINATOR__AUTOSCALE__INTERVAL_S", "0", "coordinator.autoscale.interval_s = 0.0"),
        ("TANDEM_POOLS__DECODE__WORKERS__MAX__X", "1", "unknown key 'pools.decode.workers.max.x'"),
    ],
)
def test_mistakes_in_scaling_and_lending_are_told(name: str, value: str, message: str) -> None:
    assert message in refusal(None, {name: value})
