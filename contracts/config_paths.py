"""Paths in the configuration tree: which there are, which one a name means, and how one is spelled.

A path leads through sections (by field), maps of sections (by label, and a label may be new) and lists of sections
(by position). People and variables name an element of a list by its `name`: `pools.decode.workers`. Variables know
neither dashes nor small letters: where nothing is named exactly so, what is spelled alike is meant.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, SecretStr

from contracts.config import ClusterConfig
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Keys and list positions from the root of the tree.
KeyPath = tuple[str | int, ...]

#: What files, variables and flags say, before it is checked.
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Many:
    """Several sections of one type."""

    section: type[BaseModel]
    by: Literal["position", "label"]


#: What stands at a path; None: a value.
Kind = type[BaseModel] | Many | None


def kind_of(section: type[BaseModel], field: str) -> Kind:
    """Raises KeyError when the section has no such field."""
    annotation = section.model_fields[field].annotation
    parts = get_args(annotation)
    if get_origin(annotation) is tuple and _is_section(parts[0]):
        return Many(cast("type[BaseModel]", parts[0]), "position")
    if get_origin(annotation) is dict and _is_section(parts[1]):
        return Many(cast("type[BaseModel]", parts[1]), "label")
    if _is_section(annotation):
        return cast("type[BaseModel]", annotation)
    # A value that may be written as a section too.
    return next((cast("type[BaseModel]", each) for each in map(_bare, parts) if _is_section(each)), None)


def kind_at(path: KeyPath) -> Kind:
    """None also for a path that leads nowhere."""
    kind: Kind = ClusterConfig
    for part in path:
        if isinstance(kind, Many):
            kind = kind.section
        elif kind is not None and part in kind.model_fields:
            kind = kind_of(kind, str(part))
        else:
            return None
    return kind


def holds_secrets(kind: Kind) -> bool:
    """Whether a value below is to be shown to nobody."""
    section = kind.section if isinstance(kind, Many) else kind
    if section is None:
        return False
    return any(
        SecretStr in get_args(field.annotation) or holds_secrets(kind_of(section, name))
        for name, field in section.model_fields.items()
    )


def resolve(tree: Tree, segments: Sequence[str], where: object) -> list[KeyPath]:
    """The places in `tree` that a dotted name means: several for `*`, every element of a list.

    Raises ConfigError that begins with `where`.
    """
    return list(_places(ClusterConfig, tree, (), (), tuple(segments), where))


def paths_in(path: KeyPath, value: object) -> Iterator[KeyPath]:
    """This one, and those of what is given below it; no further down than the schema goes."""
    yield path
    kind = kind_at(path)
    if isinstance(kind, Many) and kind.by == "position":
        elements = cast("list[object]", value) if isinstance(value, list) else []
        for index, element in enumerate(elements):
            yield from paths_in((*path, index), element)
    elif kind is not None and isinstance(value, dict):
        for key, inner in cast("dict[object, object]", value).items():
            yield from paths_in((*path, str(key)), inner)


def spell(path: KeyPath, tree: object) -> str:
    """The dotted name of a path; `tree` is what it leads through, checked or not."""
    parts: list[str] = []
    for part in path:
        parts.append(part if isinstance(part, str) else name_of(tree, part))
        tree = _step(tree, part)
    return ".".join(parts)


def name_of(elements: object, index: int) -> str:
    """An element's name; its position, where it has no usable one."""
    name = _step(_step(elements, index), "name")
    return name if isinstance(name, str) else str(index)


def did_you_mean(wanted: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(wanted, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known) or 'none'}"


def _bare(annotation: object) -> object:
    """Without what is said about it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _step(tree: object, part: str | int) -> object:
    """What stands one further; None where nothing does."""
    if isinstance(tree, BaseModel):
        return getattr(tree, str(part), None)
    if isinstance(tree, dict):
        return cast("dict[object, object]", tree).get(part)
    if isinstance(tree, list | tuple) and isinstance(part, int):
        elements = cast("Sequence[object]", tree)
        return elements[part] if part < len(elements) else None
    return None


def _places(
    kind: Kind, value: object, path: KeyPath, said: tuple[str, ...], rest: tuple[str, ...], where: object
) -> Iterator[KeyPath]:
    """`value` stands at `path`, to which `said` led; `rest` leads on."""
    if not rest:
        yield path
    elif isinstance(kind, Many) and kind.by == "position":
        for index in _chosen(value, said, rest, where):
            step = _step(value, index)
            yield from _places(kind.section, step, (*path, index), (*said, rest[0]), rest[1:], where)
    elif isinstance(kind, Many):
        label, used = _label(value, rest)
        step = _step(value, label)
        yield from _places(kind.section, step, (*path, label), (*said, *rest[:used]), rest[used:], where)
    elif kind is not None and rest[0] in kind.model_fields:
        step = _step(value, rest[0])
        yield from _places(kind_of(kind, rest[0]), step, (*path, rest[0]), (*said, rest[0]), rest[1:], where)
    else:
        fields = None if kind is None else list(kind.model_fields)
        hint = f"; {'.'.join(said)} is a value" if fields is None else did_you_mean(".".join(rest), fields)
        raise ConfigError(f"{where}: unknown key {'.'.join((*said, *rest))!r}{hint}")


def _chosen(elements: object, said: tuple[str, ...], rest: tuple[str, ...], where: object) -> list[int]:
    """Positions of the elements that are named."""
    given = cast("list[object]", elements) if isinstance(elements, list) else []
    names = [name_of(given, index) for index in range(len(given))]
    wanted = rest[0]
    if len(rest) == 1:
        raise ConfigError(f"{where}: {'.'.join(said)}.{wanted} cannot be set as a whole; name one of its keys")
    chosen = [index for index, name in enumerate(names) if wanted in ("*", name)] or [
        index for index, name in enumerate(names) if _plain(name) == _plain(wanted)
    ]
    if not chosen:
        one = said[-1].removesuffix("s")
        raise ConfigError(f"{where}: there is no {one} {_plain(wanted)!r}{did_you_mean(_plain(wanted), names)}")
    return chosen


def _label(sections: object, rest: tuple[str, ...]) -> tuple[str, int]:
    """The label meant, and how many segments it takes: a label may hold dots."""
    known = [str(label) for label in cast("dict[object, object]", sections)] if isinstance(sections, dict) else []
    for num_used in range(1, len(rest) + 1):
        wanted = ".".join(rest[:num_used])
        alike = [label for label in known if label == wanted] or [
            label for label in known if _plain(label) == _plain(wanted)
        ]
        if alike:
            return alike[0], num_used
    return rest[0], 1


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
