"""Text forms give what they say, and bad ones say what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contracts.errors import ConfigError
from workload import (
    PUBLISHED_LENGTHS,
    Constant,
    Diurnal,
    Fixed,
    Gamma,
    Histogram,
    LogNormal,
    Poisson,
    Ramp,
    Step,
    parse_arrivals,
    parse_outputs,
    parse_prompts,
)

if TYPE_CHECKING:
    from workload import Arrivals, Lengths


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        ("poisson:4", Poisson(4)),
        ("gamma:4,cv=2", Gamma(4, 2)),
        ("constant:0.5", Constant(0.5)),
        ("ramp:1-8,60", Ramp(1, 8, 60)),
        ("step:2@0,8@60, 2@120", Step(((0, 2), (60, 8), (120, 2)))),
        ("diurnal:4,amplitude=0.5", Diurnal(4, 0.5)),
        ("diurnal:4, period=600, amplitude=0.5", Diurnal(4, 0.5, 600)),
    ],
)
def test_arrivals(text: str, arrivals: Arrivals) -> None:
    assert parse_arrivals(text) == arrivals


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("fixed:512", Fixed(512)),
        ("lognormal:mean=755,p95=2000", LogNormal.from_mean_p95(755, 2000)),
        ("lognormal:mean=755,sigma=1,max=2048", LogNormal.from_mean(755, 1, 2048)),
        ("lognormal:median=300,sigma=0.8,max=4096", LogNormal(300, 0.8, 4096)),
        ("histogram:16x1,64x2.5", Histogram(((16, 1), (64, 2.5)))),
    ],
)
def test_lengths(text: str, lengths: Lengths) -> None:
    assert parse_prompts(text) == parse_outputs(text) == lengths


@pytest.mark.parametrize("name", list(PUBLISHED_LENGTHS))
def test_a_published_name_stands_for_its_prompts_and_its_answers(name: str) -> None:
    assert parse_prompts(name) == PUBLISHED_LENGTHS[name].prompts
    assert parse_outputs(name) == PUBLISHED_LENGTHS[name].outputs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poison:4", "arrivals 'poison:4': unknown form 'poison'; did you mean 'poisson'?"),
        ("trace", "known are constant, diurnal, gamma, poisson, ramp, step"),
        ("poisson", "the rate is missing; the form is poisson:RPS"),
        ("poisson:four", "the rate must be a number, got 'four'; the form is poisson:RPS"),
        ("poisson:-1", "rate_rps must be finite and > 0, got -1"),
        ("poisson:4,5", "'5' is one value too many"),
        ("poisson:4,cv=2", "unknown value 'cv'; the form is poisson:RPS"),
        ("gamma:4", "cv is missing; the form is gamma:RPS,cv=CV"),
        ("gamma:4,cv=2,cv=3", "cv is given twice"),
        ("gamma:cv=2,4", "'4' stands after named values"),
        ("diurnal:4,amplitud=1", "unknown value 'amplitud'; did you mean 'amplitude'?"),
        ("ramp:8,60", "the rates must be two with a dash between, got '8'"),
        ("step:2,8@60", "a level must be RATE@SECOND, got '2'"),
    ],
)
def test_bad_arrivals_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arrivals(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sharegp", "prompts 'sharegp': unknown form 'sharegp'; did you mean 'sharegpt'?"),
        ("sharegpt:5", "'5' is one value too many"),
        ("fixed:1.5", "the length must be a whole number, got '1.5'; the form is fixed:TOKENS"),
        (
            "lognormal:mean=755",
            "it needs mean and p95, mean and sigma, or median and sigma; the form is lognormal:mean",
        ),
        ("lognormal:mean=755,p95=700", "no log-normal has mean 755.0 and 95th percentile 700.0"),
        ("histogram:16,64x2", "a bin must be TOKENSxWEIGHT, got '16'"),
        ("histogram:", "the first bin is missing"),
    ],
)
def test_bad_lengths_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_prompts(text)
    assert message in str(caught.value)
