"""A request attains its SLO when it meets both targets."""

from __future__ import annotations

import pytest

from contracts.errors import ConfigError
from workload import PUBLISHED_SLOS, SloClass, parse_slo


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "attained"),
    [
        (0.3, 0.05, True),
        (0.301, 0.05, False),
        (0.3, 0.051, False),
        (0.301, 0.051, False),
        (0.3, None, True),
        (0.301, None, False),
    ],
)
def test_both_targets_count(ttft_s: float, tpot_s: float | None, attained: bool) -> None:
    assert SloClass("interactive", 300, 50).attained(ttft_s=ttft_s, tpot_s=tpot_s) is attained


def test_text_form() -> None:
    assert parse_slo("interactive:300,50") == SloClass("interactive", 300, 50)
    assert parse_slo("batch:1e4,200.5") == SloClass("batch", 10_000, 200.5)


def test_targets_by_name_have_units() -> None:
    assert parse_slo("ttft=250ms,tpot=0.1") == SloClass("default", 250, 100)
    assert parse_slo("chat: ttft = 2s, tpot = 50ms") == SloClass("chat", 2000, 50)


def test_published_classes_are_known_by_name() -> None:
    assert parse_slo("distserve-chat-opt-13b") == SloClass("distserve-chat-opt-13b", 250, 100)
    assert all(parse_slo(name).name == name for name in PUBLISHED_SLOS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interactive:300", "SLO 'interactive:300': not NAME:TTFT_MS,TPOT_MS, as in interactive:300,50"),
        ("interactive:300,50,1", "could not convert string to float: '50,1'"),
        ("interactive:0,50", "ttft_ms must be finite and > 0, got 0"),
        (":300,50", "an SLO class needs a name"),
        ("distserve-chat-opt-13", "did you mean 'distserve-chat-opt-13b'?"),
        ("tpot=1s,ttft=1s", "'tpot=1s' stands where ttft= should"),
        ("ttft=1s", "SLO 'ttft=1s': not NAME:TTFT_MS,TPOT_MS"),
        ("chat:ttft=1s,50", "'50' stands where tpot= should"),
        ("ttft=1y,tpot=1s", "'1y' is not a number with a unit"),
        ("x", "known are distserve-chat-opt-13b, distserve-chat-opt-175b"),
    ],
)
def test_bad_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_slo(text)
    assert message in str(caught.value)
