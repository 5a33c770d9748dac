"""Several models in one configuration: what each one's cell is, and what cannot stand beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from contracts.cells import cell_named, cells_of
from contracts.config import ClusterConfig
from contracts.config_loader import load_config
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MIXED = {"name": "all", "role": "mixed"}


def config(*models: dict[str, Any], **sections: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"models": list(models), **sections})


def model(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "model": f"org/{name}", **keys}


def test_one_model_is_one_cell_as_it_stands() -> None:
    alone = ClusterConfig()
    (cell,) = cells_of(alone)
    assert (cell.name, cell.config) == ("", alone)
    assert cell_named(alone, None) is alone


def test_what_a_model_does_not_say_is_as_the_cluster_has_it() -> None:
    targets = {"chat": {"ttft_ms": 500, "tpot_ms": 50}}
    both = config(
        model("a", dtype="float32", pools=[MIXED]),
        model("b", served_model_name="org/b", max_model_len=100, slo={"batch": {"ttft_ms": 9e4, "tpot_ms": 900}}),
        dtype="bfloat16",
        slo=targets,
        store={"dram": "1GiB", "ssd": {"path": "/kv", "size": "10GiB"}},
        coordinator={"decision_log": "/log/decisions.jsonl"},
    )
    a, b = (cell.config for cell in cells_of(both))
    assert [pool.name for pool in a.pools] == ["a-all"]
    assert [pool.name for pool in b.pools] == ["b-prefill", "b-decode"]
    assert (a.model, a.served_model_name, b.served_model_name) == ("org/a", "a", "org/b")
    assert (a.dtype, b.dtype, a.max_model_len, b.max_model_len) == ("float32", "bfloat16", None, 100)
    assert (set(a.slo), set(b.slo)) == ({"chat"}, {"batch"})
    # No file and no memory is two models' at once.
    assert (a.store.dram, a.store.ssd.size, a.store.ssd.path) == (2**29, 5 * 2**30, "/kv/a")
    assert b.coordinator.decision_log == "/log/decisions-b.jsonl"
    assert cell_named(both, "b") == b


@pytest.mark.parametrize(
    ("models", "sections", "complaint"),
    [
        ([model("a"), model("a")], {}, "two models are named 'a'"),
        ([model("a"), model("b", served_model_name="a")], {}, "two models are served as 'a'"),
        (
            [model("a", pools=[{**MIXED, "name": "b-c"}]), model("a-b", pools=[{**MIXED, "name": "c"}])],
            {},
            "two pools would be named 'a-b-c'",
        ),
        ([model("a")], {"model": "demo"}, "`model` and `models` cannot both be set"),
        ([model("a", pools=[{"name": "p", "role": "prefill"}])], {}, "models.a: no pool has the role 'decode'"),
        ([model("a", default_slo_class="chat")], {}, "models.a: no SLO class is named 'chat'"),
        ([model("a", pools=[{**MIXED, "name": "p" * 39}])], {}, "has more than 40 characters"),
        ([model("a")], {"coordinator": {"dispatch": {"profile": "p.json"}}}, "set models.NAME.profile"),
    ],
)
def test_what_cannot_stand_beside_each_other_is_refused(
    models: list[dict[str, Any]], sections: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint.replace("`", ".")):
        config(*models, **sections)


@pytest.mark.parametrize(
    ("scale", "workers", "complaint"),
    [
        ({"keep_alive": "histogram"}, {"min": 1, "max": 2}, "keep_alive histogram needs workers.min 0"),
        ({"keep_alive": "lru", "to_zero_after_s": 5}, {"min": 0, "max": 2}, "goes with keep_alive fixed"),
    ],
)
def test_how_long_a_pool_is_kept_is_said_once(scale: dict[str, Any], workers: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ClusterConfig.model_validate({"pools": [{**MIXED, "workers": workers, "scale": scale}]})


def test_which_cell_is_meant_has_to_be_said_where_there_are_several() -> None:
    both = config(model("a"), model("b"))
    with pytest.raises(ConfigError, match=r"which model\? `models` has a, b"):
        cell_named(both, None)
    with pytest.raises(ConfigError, match="there is no model 'c'"):
        cell_named(both, "c")
    with pytest.raises(ConfigError, match="the configuration has one model"):
        cell_named(ClusterConfig(), "a")


def test_layers_reach_into_models(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("role: mixed\nworkers: {min: 0, max: 2}\n")
    path = tmp_path / "c.yaml"
    path.write_text("models:\n- {name: a, model: demo, pools: [both.yaml]}\n- {name: b, model: demo}\n")
    environ = {"TANDEM_MODELS__A__POOLS__BOTH__KV_MEMORY": "64MiB"}
    flags: dict[str, tuple[str, object]] = {"pools.*.device": ("--device", "cpu")}
    loaded = load_config(path, environ, flags, overrides=[("models.b.dtype", "float32")])
    a, b = loaded.config.models
    assert (a.pools[0].name, a.pools[0].max_workers, a.pools[0].kv_memory, b.dtype) == ("both", 2, 2**26, "float32")
    # A flag for all pools is for those of models too.
    assert {pool.device for pool in (*a.pools, *loaded.config.pools)} == {"cpu"}
    rows = {row.key: (row.value, str(row.source)) for row in loaded.rows()}
    assert rows["models.a.pools.both.role"] == ("mixed", str(tmp_path / "both.yaml"))
    assert rows["models.b.dtype"] == ("float32", "--set models.b.dtype")
    path.write_text("models:\n- {name: a, model: demo, dtipe: float32}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: models\.a\.dtipe: unknown key; did you mean 'dtype'"):
        load_config(path, {}, {})
