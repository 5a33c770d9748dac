"""Workload files: everything that a workload is, under a name. YAML, checked as a whole before anything is drawn."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from contracts.config import DurationS, parse_duration_s
from contracts.config_loader import read_mapping
from contracts.errors import ConfigError
from workload.drawn_chats import DEFAULT_THINK_S, MAX_SYSTEM_PROMPTS, MAX_TURNS, ChatShape
from workload.nearest import did_you_mean
from workload.spec import parse_arrivals, parse_outputs, parse_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic_core import ErrorDetails

#: In one workload; as many rows of a result are held in memory.
MAX_REQUESTS = 50_000_000

#: In an installed package the files lie inside it, in a checkout beside it.
_FOLDERS = (Path(__file__).parent / "shipped", Path(__file__).parents[1] / "configs" / "workloads")


def _form(parse: Callable[[str], object]) -> AfterValidator:
    def check(text: str) -> str:
        try:
            parse(text)
        except ConfigError as error:
            raise ValueError(error.message) from error
        return text

    return AfterValidator(check)


_Lengths = Annotated[str, _form(parse_outputs)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SystemPromptsSection(_Section):
    """Prompts begin with one of these, chosen by Zipf's law."""

    count: int = Field(ge=1, le=MAX_SYSTEM_PROMPTS)
    tokens: int = Field(ge=1, le=1 << 20)
    zipf: float = Field(default=1.0, ge=0, allow_inf_nan=False)


class ChatsSection(_Section):
    """Conversations; `prompts` are then the new tokens of each turn."""

    mean_turns: float | None = Field(default=None, ge=1, le=MAX_TURNS)
    """Of a chat; a file of conversations has its own."""

    max_turns: int = Field(default=32, ge=1, le=MAX_TURNS)

    think_s: float = Field(default=DEFAULT_THINK_S, ge=0, allow_inf_nan=False)
    """Mean of the time between an answer and the next turn."""

    @model_validator(mode="after")
    def _can_be(self) -> ChatsSection:
        if self.mean_turns is not None:
            ChatShape(mean_turns=self.mean_turns, max_turns=self.max_turns, mean_think_s=self.think_s)
        return self


class SloSection(_Section):
    """Targets of a class."""

    ttft_ms: _Positive
    tpot_ms: _Positive
    share: _Positive = 1.0
    """How many requests are of this class, relative to the other classes."""


class CancelSection(_Section):
    """Clients that go away."""

    share: float = Field(gt=0, le=1)
    after_tokens: _Lengths | None = None


class WorkloadFile(_Section):
    """What a workload is. A flag replaces the key of its name, and what the key's neighbour says of the same thing:
    `--requests` or `--duration` both of these, `--speed`, `--rate` or `--arrivals` also `speed` and `rate`.
    """

    description: str
    """One line, for people."""

    trace: str | None = None
    """Path of a trace, relative to this file; it says arrivals and lengths."""

    arrivals: Annotated[str, _form(parse_arrivals)] | None = None
    """How often requests come, turns of chats included."""

    prompts: Annotated[str, _form(parse_prompts)] | None = None
    """Lengths; after the system prompt, where there is one."""

    outputs: _Lengths | None = None
    system_prompts: SystemPromptsSection | None = None
    chats: ChatsSection | None = None
    slo: dict[str, SloSection] = Field(min_length=1)
    cancel: CancelSection | None = None
    requests: int | None = Field(default=None, ge=1, le=MAX_REQUESTS)
    start: Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(parse_duration_s)] | None = None
    duration: DurationS | None = None
    speed: _Positive | None = None
    rate: _Positive | None = None
    scale_lengths: float | None = Field(default=None, gt=0, le=1)
    max_context: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _fits_together(self) -> WorkloadFile:
        if self.trace is not None:
            for name in ("prompts", "outputs", "system_prompts"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: the trace says this already")
        elif self.start is not None:
            raise ValueError("start: needs a trace")
        elif self.chats is not None and self.chats.mean_turns is None:
            raise ValueError("chats.mean_turns: needed where there is no trace of conversations")
        if self.speed is not None and self.rate is not None:
            raise ValueError("speed and rate: give one of them")
        return self


def workload_names() -> tuple[str, ...]:
    """Of the workloads that come with Tandem."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def find_workload(name_or_file: str) -> Path:
    """The file of a workload that comes with Tandem, or the given one. Raises ConfigError for a name that none has."""
    if "/" in name_or_file or name_or_file.endswith((".yaml", ".yml")):
        return Path(name_or_file)
    names = workload_names()
    if name_or_file not in names:
        near = difflib.get_close_matches(name_or_file[:64], names, n=1)
        raise ConfigError(
            f"--workload {name_or_file}: neither a file (.yaml) nor one that comes with Tandem: {', '.join(names)}"
            f"{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    return _folder() / f"{name_or_file}.yaml"


def read_workload(path: Path) -> WorkloadFile:
    """Raises ConfigError with a line `file: key: what` for each thing that is wrong."""
    tree = read_mapping(path)
    try:
        return WorkloadFile.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(detail)}" for detail in error.errors())) from error


def _folder() -> Path:
    return next(folder for folder in _FOLDERS if folder.is_dir())


def _explain(detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    message = detail["msg"].removeprefix("Value error, ")
    if not path:
        return message
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(path[-1], _section_at(path[:-1]).model_fields)}"
    if detail["type"] == "missing":
        return f"{key}: this key is required"
    return f"{key} = {detail['input']!r}: {message}"


def _section_at(path: list[str]) -> type[BaseModel]:
    """Of the section that `path` leads to; classes of `slo` have names of the user's."""
    sections: dict[str, type[BaseModel]] = {
        "system_prompts": SystemPromptsSection,
        "chats": ChatsSection,
        "slo": SloSection,
        "cancel": CancelSection,
    }
    return sections[path[0]] if path else WorkloadFile
