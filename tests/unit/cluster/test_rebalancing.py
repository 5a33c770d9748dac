"""A cluster file's words about migration, and what the coordinator makes of them."""

from __future__ import annotations

import pytest

from cluster.rebalancing import rebalance_settings
from contracts.config_loader import load_config
from contracts.errors import ConfigError
from coordinator.policy.move_terms import PURPOSES, MoveRules
from coordinator.policy.virtual_usage import UsageRules
from coordinator.rebalancer import RebalanceSettings


def _settings(text: str | None = None) -> RebalanceSettings | None:
    overrides = [] if text is None else [("coordinator.migration", text)]
    return rebalance_settings(load_config(None, {}, {}, overrides=overrides).config)


def test_every_key_arrives() -> None:
    settings = _settings(
        "{purposes: [memory, prompts], interval_s: 1, low_tokens: 32, high_tokens: 99, "
        "headroom_tokens: {2: 640, 4: 0}, max_moving: 2, max_moving_draining: 3, max_moving_total: 7, cooldown_s: 5, "
        "prompt_gain_s: 0.25}"
    )
    assert settings == RebalanceSettings(
        rules=MoveRules(
            usage=UsageRules(headroom_tokens={2: 640, 4: 0}),
            low_tokens=32.0,
            high_tokens=99.0,
            purposes=frozenset({"draining", "memory", "prompts"}),
            max_moving=2,
            max_moving_draining=3,
            max_moving_total=7,
            cooldown_s=5.0,
            prompt_gain_s=0.25,
        ),
        interval_s=1.0,
    )


def test_by_default_requests_move_as_the_rules_say() -> None:
    settings = _settings()
    assert settings == RebalanceSettings(rules=MoveRules())
    assert settings is not None
    assert settings.rules.purposes == frozenset(PURPOSES)


def test_modes() -> None:
    assert _settings("{mode: off}") is None
    assert _settings('{mode: "off"}') is None
    assert _settings("{mode: on}") == _settings()
    only = _settings("{mode: drain_only, purposes: [balance]}")
    assert only is not None
    assert only.rules.purposes == frozenset({"draining"})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{low_tokens: 600}", r"migration.*low_tokens \(600\) must be below high_tokens \(512\)"),
        ("{max_moving: 9}", r"migration.*max_moving \(9\)"),
        ("{headroom_tokens: {7: 100}}", "headroom_tokens"),
        ("{purposes: [draining]}", "purposes"),
        ("{low_token: 1}", "low_tokens"),
    ],
    ids=["thresholds", "bounds", "priority", "purpose", "typing error"],
)
def test_what_cannot_be_is_refused_by_name(text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        _settings(text)
