"""From the configuration to what coordinator and gateway are made of."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import engine
from cluster.services import (
    check_servable,
    conductor_settings,
    coordinator_service,
    gateway_settings,
    live_costs,
    slo_classes,
)
from contracts.config_loader import load_config
from contracts.errors import ConfigError
from coordinator.directory.directory import Directory
from coordinator.policy.settings import AdmissionRule
from gateway.terms import Tenant
from rpc import LiveClock, MemoryNetwork
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from contracts.config import ClusterConfig

DEMO = Path(engine.__file__).parent / "demo"


def config(*overrides: tuple[str, str], path: Path | None = None) -> ClusterConfig:
    return load_config(path, {}, {}, overrides=overrides).config


def test_every_key_of_dispatch_and_admission_arrives() -> None:
    settings = conductor_settings(
        config(
            ("coordinator.dispatch.policy", "prefix_only"),
            ("coordinator.dispatch.decode", "pack"),
            ("coordinator.dispatch.fetch_ratio", "3"),
            ("coordinator.dispatch.replica_share", "0.25"),
            ("coordinator.dispatch.local_prefill_tokens", "77"),
            ("coordinator.admission", "{form: current, ttft_share: 0.5, tpot_share: 0.25, hysteresis: 0.1}"),
            ("coordinator.max_directory_blocks", "99"),
            ("engine.queue.order", "shortest"),
            ("engine.queue.ageing_s", "2"),
            ("block_tokens", "8"),
        )
    )
    assert (settings.policy, settings.decode, settings.fetch_ratio) == ("prefix_only", "pack", 3.0)
    assert settings.replica_share == 0.25
    assert (settings.local_prefill_tokens, settings.max_directory_blocks, settings.block_tokens) == (77, 99, 8)
    assert settings.admission == AdmissionRule(form="current", ttft_share=0.5, tpot_share=0.25, hysteresis=0.1)
    assert (settings.queue_order, settings.priority_s) == ("shortest", 2.0)


def test_classes_and_tenants_arrive_at_the_gateway() -> None:
    given = config(
        (
            "gateway.tenants",
            "[{name: acme, api_keys: [sk-1, sk-2], slo_class: batch, max_priority: 3}, {name: b, api_keys: [sk-3]}]",
        ),
        ("gateway.snapshot_ttl_s", "7"),
        path=ROOT / "configs" / "slo.yaml",
    )
    settings = gateway_settings(given, DEMO, "demo")
    assert {key: tenant.name for key, tenant in settings.tenants_by_key()} == {
        "sk-1": "acme",
        "sk-2": "acme",
        "sk-3": "b",
    }
    assert settings.tenants[0].tenant == Tenant(name="acme", max_priority=3, slo_class="batch")
    assert settings.slos == slo_classes(given)
    assert (settings.slos["batch"].ttft_ms, settings.slos["batch"].tpot_ms) == (60_000, 1000)
    assert (settings.default_slo_class, settings.snapshot_ttl_s, settings.kv_class) == ("standard", 7.0, "exact")
    for lossy, kv_class in (("true", "lossy"), ("false", "exact")):
        set_so = config(("store", f"{{dram: 1GiB, lossy: {lossy}}}"))
        assert gateway_settings(set_so, DEMO, "demo").kv_class == kv_class


@pytest.mark.parametrize("key", ["tensor_parallel", "pipeline_parallel"])
def test_workers_of_several_devices_can_be_planned_not_served(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"pools\.decode\.{key} = 2: .* not served yet"):
        check_servable(config((f"pools.decode.{key}", "2")))
    check_servable(config())


def test_a_profile_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "no.json"
    with pytest.raises(ConfigError, match=str(missing)):
        live_costs(config(("coordinator.dispatch.profile", str(missing))))


def test_a_decision_log_that_cannot_be_written_is_told_at_start(tmp_path: Path) -> None:
    log = tmp_path / "missing" / "decisions.jsonl"

    async def start() -> None:
        network = MemoryNetwork(rng=random.Random(0), host="c")
        given = config(("coordinator.decision_log", str(log)))
        async with coordinator_service(given, network, LiveClock(), "c:1", lambda line: None):
            pytest.fail("it serves")

    with pytest.raises(ConfigError, match=rf"^coordinator\.decision_log {log}: cannot be written: No such file"):
        asyncio.run(start())


def test_the_largest_directory_that_may_be_asked_for_can_be_made() -> None:
    """No memory is used before blocks are known."""
    most = 100_000_000
    assert config(("coordinator.max_directory_blocks", str(most))).coordinator.max_directory_blocks == most
    assert Directory(most).max_blocks == most
    with pytest.raises(ConfigError, match=r"coordinator\.max_directory_blocks = '100000001': Input should be less"):
        config(("coordinator.max_directory_blocks", str(most + 1)))
