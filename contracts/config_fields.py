"""What the keys of the configuration are made of: sizes and durations with units, names, the base of sections."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

SIZE_UNITS: dict[str, Fraction] = {
    "": Fraction(1),
    "B": Fraction(1),
    "KB": Fraction(10**3),
    "MB": Fraction(10**6),
    "GB": Fraction(10**9),
    "TB": Fraction(10**12),
    "KiB": Fraction(2**10),
    "MiB": Fraction(2**20),
    "GiB": Fraction(2**30),
    "TiB": Fraction(2**40),
}

DURATION_UNITS_S: dict[str, Fraction] = {
    "": Fraction(1),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}

_QUANTITY = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*")


def _quantity(text: str, units: dict[str, Fraction], example: str) -> Fraction:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{text!r} is not a number with a unit of {known}; write for example {example}")
    return Fraction(match[1]) * units[match[2]]


def parse_size(value: object) -> object:
    """'2GiB' -> 2147483648 (bytes, rounded down). A number is bytes; other types are left to the schema."""
    if not isinstance(value, str):
        return value
    return int(_quantity(value, SIZE_UNITS, "2GiB"))


def format_size(size_bytes: int) -> str:
    """The shortest exact spelling: the inverse of `parse_size`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        count, rest = divmod(size_bytes, int(SIZE_UNITS[unit]))
        if count and not rest:
            return f"{count}{unit}"
    return f"{size_bytes}B"


def parse_duration_s(value: object) -> object:
    """'500ms' -> 0.5 (seconds). A number is seconds; other types are left to the schema."""
    if not isinstance(value, str):
        return value
    return float(_quantity(value, DURATION_UNITS_S, "500ms"))


SizeBytes = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? *([KMGT]?B|[KMGT]iB)?$"},
            ]
        }
    ),
]

DurationS = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    BeforeValidator(parse_duration_s),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? *(ms|s|min|h)?$"},
            ]
        }
    ),
]

#: Becomes part of worker ids, log file names and environment variables.
PoolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]

#: Becomes part of metric labels and header values.
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]

Count = Annotated[int, Field(ge=1)]

PositiveFigure = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the tree: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
