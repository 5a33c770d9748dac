"""One-line text forms of arrivals and lengths, for command lines: `gamma:4,cv=2`, `lognormal:mean=755,p95=2000`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from contracts.errors import ConfigError
from workload.arrivals import Constant, Diurnal, Gamma, Poisson, Ramp, Step
from workload.lengths import MAX_TOKENS, PUBLISHED_LENGTHS, Fixed, Histogram, LogNormal
from workload.nearest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from workload.arrivals import Arrivals
    from workload.lengths import Lengths

_Parsed = TypeVar("_Parsed")

#: For help texts; S are seconds, RPS requests per second.
ARRIVAL_FORMS = (
    "poisson:RPS",
    "gamma:RPS,cv=CV",
    "constant:RPS",
    "ramp:RPS-RPS,S",
    "step:RPS@S,RPS@S,…",
    "diurnal:RPS,amplitude=A,period=S",
)
LENGTH_FORMS = (
    "fixed:TOKENS",
    "lognormal:mean=TOKENS,p95=TOKENS,max=TOKENS",
    "lognormal:mean=TOKENS,sigma=S,max=TOKENS",
    "lognormal:median=TOKENS,sigma=S,max=TOKENS",
    "histogram:TOKENSxWEIGHT,TOKENSxWEIGHT,…",
    *PUBLISHED_LENGTHS,
)


def parse_arrivals(text: str) -> Arrivals:
    """One of `ARRIVAL_FORMS`. Raises ConfigError naming what is wrong, and the nearest match of a wrong name."""
    return _parse("arrivals", text, _ARRIVALS)


def parse_prompts(text: str) -> Lengths:
    """One of `LENGTH_FORMS`; a published name stands for its prompts. Raises ConfigError as `parse_arrivals`."""
    published = {name: _published(lengths.prompts) for name, lengths in PUBLISHED_LENGTHS.items()}
    return _parse("prompts", text, {**_LENGTHS, **published})


def parse_outputs(text: str) -> Lengths:
    """One of `LENGTH_FORMS`; a published name stands for its answers. Raises ConfigError as `parse_arrivals`."""
    published = {name: _published(lengths.outputs) for name, lengths in PUBLISHED_LENGTHS.items()}
    return _parse("outputs", text, {**_LENGTHS, **published})


@dataclass(frozen=True, slots=True)
class _Form(Generic[_Parsed]):
    build: Callable[[_Values], _Parsed]
    #: Values by name that it knows.
    names: tuple[str, ...] = ()


def _published(lengths: Lengths) -> _Form[Lengths]:
    def build(values: _Values) -> Lengths:
        return lengths

    return _Form(build)


def _parse(what: str, text: str, forms: Mapping[str, _Form[_Parsed]]) -> _Parsed:
    name, _, rest = text.partition(":")
    if name not in forms:
        raise ConfigError(f"{what} {text!r}: unknown form {name!r}{did_you_mean(name, forms)}")
    try:
        values = _Values(rest, forms[name].names)
        parsed = forms[name].build(values)
        values.require_all_taken()
    except ValueError as error:
        usage = [form for form in (*ARRIVAL_FORMS, *LENGTH_FORMS) if form.partition(":")[0] == name]
        raise ConfigError(f"{what} {text!r}: {error}; the form is {' or '.join(usage)}") from error
    return parsed


class _Values:
    """What stands after the colon: values by place, then values by name. Everything raises ValueError."""

    def __init__(self, text: str, names: tuple[str, ...]) -> None:
        self._by_place: list[str] = []
        self._by_name: dict[str, str] = {}
        for part in text.split(",") if text else ():
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if equals:
                self._put(name, value, names)
            elif self._by_name:
                raise ValueError(f"{name!r} stands after named values")
            else:
                self._by_place.append(name)

    def _put(self, name: str, value: str, names: tuple[str, ...]) -> None:
        if name not in names:
            raise ValueError(f"unknown value {name!r}{did_you_mean(name, names) if names else ''}")
        if name in self._by_name:
            raise ValueError(f"{name} is given twice")
        self._by_name[name] = value

    def take(self, what: str) -> str:
        """The next value by place."""
        if not self._by_place:
            raise ValueError(f"{what} is missing")
        return self._by_place.pop(0)

    def take_all(self, what: str) -> list[str]:
        """All values by place that are left, at least one."""
        taken = [self.take(what), *self._by_place]
        self._by_place.clear()
        return taken

    def named(self, name: str) -> str | None:
        return self._by_name.get(name)

    def number(self, name: str) -> float | None:
        text = self.named(name)
        return None if text is None else _number(text, name)

    def required(self, name: str) -> float:
        value = self.number(name)
        if value is None:
            raise ValueError(f"{name} is missing")
        return value

    def require_all_taken(self) -> None:
        if self._by_place:
            raise ValueError(f"{self._by_place[0]!r} is one value too many")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} must be a number, got {text!r}") from None


def _whole(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{what} must be a whole number, got {text!r}") from None


def _pair(text: str, separator: str, what: str) -> tuple[str, str]:
    first, found, second = text.partition(separator)
    if not found:
        raise ValueError(f"{what}, got {text!r}")
    return first, second


def _rate(values: _Values) -> float:
    return _number(values.take("the rate"), "the rate")


def _poisson(values: _Values) -> Poisson:
    return Poisson(_rate(values))


def _constant(values: _Values) -> Constant:
    return Constant(_rate(values))


def _gamma(values: _Values) -> Gamma:
    return Gamma(_rate(values), values.required("cv"))


def _ramp(values: _Values) -> Ramp:
    first, last = _pair(values.take("the rates"), "-", "the rates must be two with a dash between")
    return Ramp(
        _number(first, "the first rate"),
        _number(last, "the last rate"),
        _number(values.take("the length of the ramp"), "the length of the ramp"),
    )


def _step(values: _Values) -> Step:
    pairs = [_pair(each, "@", "a level must be RATE@SECOND") for each in values.take_all("the first level")]
    return Step(tuple((_number(from_s, "a level's second"), _number(rate, "a level's rate")) for rate, from_s in pairs))


def _diurnal(values: _Values) -> Diurnal:
    rate_rps, amplitude = _rate(values), values.required("amplitude")
    period_s = values.number("period")
    return Diurnal(rate_rps, amplitude) if period_s is None else Diurnal(rate_rps, amplitude, period_s)


def _fixed(values: _Values) -> Fixed:
    return Fixed(_whole(values.take("the length"), "the length"))


def _lognormal(values: _Values) -> LogNormal:
    mean, median, p95, sigma = (values.number(name) for name in ("mean", "median", "p95", "sigma"))
    longest = values.named("max")
    max_tokens = MAX_TOKENS if longest is None else _whole(longest, "max")
    match mean, median, p95, sigma:
        case float(), None, float(), None:
            return LogNormal.from_mean_p95(mean, p95, max_tokens)
        case float(), None, None, float():
            return LogNormal.from_mean(mean, sigma, max_tokens)
        case None, float(), None, float():
            return LogNormal(median, sigma, max_tokens)
        case _:
            raise ValueError("it needs mean and p95, mean and sigma, or median and sigma")


def _histogram(values: _Values) -> Histogram:
    pairs = [_pair(each, "x", "a bin must be TOKENSxWEIGHT") for each in values.take_all("the first bin")]
    return Histogram(tuple((_whole(tokens, "a length"), _number(weight, "a weight")) for tokens, weight in pairs))


_ARRIVALS: dict[str, _Form[Arrivals]] = {
    "poisson": _Form(_poisson),
    "gamma": _Form(_gamma, ("cv",)),
    "constant": _Form(_constant),
    "ramp": _Form(_ramp),
    "step": _Form(_step),
    "diurnal": _Form(_diurnal, ("amplitude", "period")),
}

_LENGTHS: dict[str, _Form[Lengths]] = {
    "fixed": _Form(_fixed),
    "lognormal": _Form(_lognormal, ("mean", "median", "p95", "sigma", "max")),
    "histogram": _Form(_histogram),
}
