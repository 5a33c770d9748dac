"""Sizes and durations with units; what a configuration may not be."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from contracts.config import (
    DURATION_UNITS_S,
    SIZE_UNITS,
    ClusterConfig,
    CoordinatorConfig,
    DurationS,
    GatewayConfig,
    PoolConfig,
    SizeBytes,
    StoreConfig,
    format_size,
    parse_duration_s,
    parse_size,
)
from contracts.config_fields import Section

SIZE: TypeAdapter[int] = TypeAdapter(SizeBytes)
DURATION: TypeAdapter[float] = TypeAdapter(DurationS)


@given(st.integers(1, 2**60))
def test_formatting_a_size_loses_nothing(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(1, 10_000), st.sampled_from(sorted(SIZE_UNITS)), st.sampled_from(["", " ", "  "]))
def test_a_size_is_its_number_times_its_unit(count: int, unit: str, space: str) -> None:
    assert SIZE.validate_python(f"{count}{space}{unit}") == count * SIZE_UNITS[unit]


@given(st.integers(1, 10_000), st.sampled_from(sorted(DURATION_UNITS_S)))
def test_a_duration_is_its_number_times_its_unit(count: int, unit: str) -> None:
    assert DURATION.validate_python(f"{count}{unit}") == float(count * DURATION_UNITS_S[unit])


@given(st.text(max_size=12))
def test_any_other_text_is_refused_and_never_a_crash(text: str) -> None:
    for adapter in (SIZE, DURATION):
        with contextlib.suppress(ValidationError):
            assert adapter.validate_python(text) > 0


@pytest.mark.parametrize("text", ["2 GB", "2GB", "2000MB"])
def test_decimal_units_are_decimal(text: str) -> None:
    assert parse_size(text) == 2_000_000_000


@pytest.mark.parametrize("text", ["2gib", "2 giga", "-1GiB", "GiB", "1e9", "1GiB2", "٣GiB"])
def test_odd_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="2GiB"):
        parse_size(text)


@pytest.mark.parametrize("value", [0, "0", "0GiB", 0.0])
def test_nothing_is_no_size(value: object) -> None:
    with pytest.raises(ValidationError):
        SIZE.validate_python(value)


@pytest.mark.parametrize("value", [0, -1, "0s", float("nan"), float("inf")])
def test_no_time_is_no_duration(value: object) -> None:
    with pytest.raises(ValidationError):
        DURATION.validate_python(value)


def test_a_bare_duration_is_seconds() -> None:
    assert parse_duration_s("1.5") == DURATION.validate_python(1.5) == 1.5


def test_the_defaults_are_one_prefill_and_one_decode_worker() -> None:
    assert [(pool.name, pool.role, pool.workers) for pool in ClusterConfig().pools] == [
        ("prefill", "prefill", 1),
        ("decode", "decode", 1),
    ]


@pytest.mark.parametrize("roles", [["prefill"], ["decode"], ["decode", "decode"]])
def test_pools_that_could_not_finish_a_request_are_refused(roles: list[str]) -> None:
    pools = [{"name": f"pool-{index}", "role": role} for index, role in enumerate(roles)]
    with pytest.raises(ValidationError, match="requests could never finish"):
        ClusterConfig.model_validate({"pools": pools})


@pytest.mark.parametrize("roles", [["mixed"], ["prefill", "mixed"], ["prefill", "decode", "decode"]])
def test_pools_that_can_finish_requests_are_fine(roles: list[str]) -> None:
    pools = [{"name": f"pool-{index}", "role": role} for index, role in enumerate(roles)]
    assert len(ClusterConfig.model_validate({"pools": pools}).pools) == len(roles)


def test_two_pools_of_one_name_are_refused() -> None:
    pool = {"name": "same", "role": "mixed"}
    with pytest.raises(ValidationError, match="two pools are named 'same'"):
        ClusterConfig.model_validate({"pools": [pool, pool]})


def test_one_lost_heartbeat_must_not_kill_a_worker() -> None:
    with pytest.raises(ValidationError, match="at least twice"):
        CoordinatorConfig(heartbeat_interval_s=2.0, dead_after_s=3.0)


def test_api_keys_do_not_show() -> None:
    gateway = GatewayConfig.model_validate({"api_keys": ["very-secret"]})
    assert "very-secret" not in repr(gateway)
    assert "very-secret" not in gateway.model_dump_json()
    assert gateway.api_keys[0].get_secret_value() == "very-secret"


def test_every_key_is_explained() -> None:
    waiting: list[type[Section]] = [ClusterConfig, PoolConfig]
    seen = set[type[Section]]()
    while waiting:
        section = waiting.pop()
        seen.add(section)
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                waiting += [kind] if kind not in seen else []
            else:
                assert field.description, f"{section.__name__}.{name} has no explanation"
    assert {StoreConfig, CoordinatorConfig, GatewayConfig} < seen
