"""Reads the configuration from its four layers and remembers where every value came from.

flag > environment > file > default. A cluster file names its pools inline or by the path of a pool file; a
later layer addresses a pool or a tenant by its name and an SLO class by its label (see `contracts.config_paths`).
The schema is `contracts.config`'s; each problem is a `ConfigError` that names source, key and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from pydantic import BaseModel, ValidationError

from contracts.config import DEFAULT_POOLS, ClusterConfig, PoolConfig
from contracts.config_paths import (
    KeyPath,
    Kind,
    Many,
    Tree,
    did_you_mean,
    holds_secrets,
    kind_at,
    kind_of,
    paths_in,
    resolve,
    spell,
)
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic_core import ErrorDetails

ENV_PREFIX = "TANDEM_"

#: Variables of this prefix that are not configuration keys.
RESERVED_ENV = frozenset({"TANDEM_API_KEY", "TANDEM_CLUSTER_TOKEN", "TANDEM_CONFIG"})

#: Largest configuration file that is read.
MAX_FILE_BYTES = 1 << 20

#: What the checks of the whole tree compare with each other.
_COMPARED: tuple[KeyPath, ...] = (
    ("model",),
    ("served_model_name",),
    ("models",),
    ("pools",),
    ("slo",),
    ("default_slo_class",),
    ("gateway", "api_keys"),
    ("gateway", "tenants"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from; `name` is the file, variable or flag."""

    kind: Literal["default", "file", "env", "flag"]
    name: str = ""

    def __str__(self) -> str:
        return self.name if self.name else self.kind


DEFAULT = Source("default")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `tandem config show`."""

    key: str
    value: str
    source: Source


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    config: ClusterConfig
    #: Of each value that is not a default.
    sources: Mapping[KeyPath, Source]

    def rows(self) -> list[Row]:
        """Every value in the order of the schema; secrets are redacted."""
        return [
            Row(spell(path, self.config), _show(value), self.sources.get(path, DEFAULT))
            for path, value in _leaves(self.config, ())
        ]


def load_config(
    path: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, tuple[str, object]],
    *,
    overrides: Sequence[tuple[str, str]] = (),
) -> LoadedConfig:
    """Merges the layers.

    `flags`: key such as "gateway.port" -> (the flag's name, its value); None says the flag was not given. A
    key such as "pools.*.device" sets every pool, those of `models` too. `overrides` are the pairs of `--set
    key=value`, read as variables are. Raises ConfigError.
    """
    layers = _Layers()
    if path is not None:
        layers.add_file(path)
    layers.add_environment(environ)
    for key, (flag, value) in flags.items():
        if value is not None:
            layers.set_key(key.split("."), value, Source("flag", flag))
    for key, text in overrides:
        source = Source("flag", f"--set {key}")
        layers.set_key(key.split("."), _from_text(text, source), source)
    return LoadedConfig(layers.validated(), layers.sources)


def file_schema() -> dict[str, Any]:
    """JSON schema of a cluster file, for editors; `$defs/PoolConfig` is that of a pool file."""
    schema = ClusterConfig.model_json_schema()
    for section in (schema, schema["$defs"]["ModelConfig"]):
        pools = section["properties"]["pools"]
        pools["items"] = {"anyOf": [pools["items"], {"type": "string", "description": "Path of a pool file."}]}
    schema["title"] = "Tandem cluster file"
    return schema


class _Layers:
    """The tree under construction. Later calls win over earlier ones."""

    def __init__(self) -> None:
        self._tree: Tree = {"pools": [_plain(pool) for pool in DEFAULT_POOLS]}
        #: Of every value set so far, and of the sections around it.
        self.sources: dict[KeyPath, Source] = {}

    def add_file(self, path: Path) -> None:
        source = Source("file", str(path))
        for key, value in read_mapping(path).items():
            self._tree[key] = value
            self._note((key,), value, source)
        self._expand_pools(path.parent)

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """Whole sections and lists first, so that the variables of what is in them apply to it."""
        names = [name for name in environ if name.startswith(ENV_PREFIX) and name not in RESERVED_ENV]
        for name in sorted(names, key=lambda name: (name.count("__"), name)):
            source = Source("env", name)
            segments = [part.lower() for part in name.removeprefix(ENV_PREFIX).split("__")]
            self.set_key(segments, _from_text(environ[name], source), source)
            if segments in (["pools"], ["models"]):
                self._expand_pools(Path())

    def set_key(self, segments: Sequence[str], value: object, source: Source) -> None:
        for path in resolve(self._tree, segments, source):
            self._set(path, value, source)
        if list(segments[:2]) == ["pools", "*"]:
            for index in range(len(self._model_entries())):
                for place in range(len(self._pool_entries(index))):
                    self._set(("models", index, "pools", place, *segments[2:]), value, source)

    def _model_entries(self) -> list[object]:
        given: object = self._tree.get("models")
        return cast("list[object]", given) if isinstance(given, list) else []

    def _pool_entries(self, index: int) -> list[object]:
        """Those of a model's own pools that are sections."""
        entry = self._model_entries()[index]
        given = cast("Tree", entry).get("pools") if isinstance(entry, dict) else None
        return cast("list[object]", given) if isinstance(given, list) else []

    def validated(self) -> ClusterConfig:
        try:
            return ClusterConfig.model_validate(self._tree)
        except ValidationError as error:
            raise ConfigError("\n".join(self._explain(detail) for detail in error.errors())) from error

    def _set(self, path: KeyPath, value: object, source: Source) -> None:
        target: object = self._tree
        for part, following in pairwise(path):
            if isinstance(target, list) and isinstance(part, int):
                target = cast("list[object]", target)[part]
            elif isinstance(target, dict):
                target = cast("Tree", target).setdefault(str(part), {})
            if not isinstance(target, list if isinstance(following, int) else dict):
                raise ConfigError(f"{source}: cannot set {path[-1]!r}: {part} is {_what(target)}, not a section")
        cast("Tree", target)[str(path[-1])] = value
        self._note(path, value, source)

    def _note(self, path: KeyPath, value: object, source: Source) -> None:
        """What stood there before is gone, wherever it came from."""
        for stale in [known for known in self.sources if known[: len(path)] == path]:
            del self.sources[stale]
        self.sources.update(dict.fromkeys(paths_in(path, value), source))

    def _expand_pools(self, folder: Path) -> None:
        """Reads the pool files, unless the defaults still stand."""
        given: object = self._tree["pools"] if ("pools",) in self.sources else []
        self._read_pools(("pools",), cast("list[object]", given) if isinstance(given, list) else [], folder)
        for index in range(len(self._model_entries())):
            self._read_pools(("models", index, "pools"), self._pool_entries(index), folder)

    def _read_pools(self, where: KeyPath, pools: list[object], folder: Path) -> None:
        for index, entry in enumerate(pools):
            if isinstance(entry, str):
                path = folder / entry
                pool = pools[index] = {"name": path.stem, **read_mapping(path)}
                self._note((*where, index), pool, Source("file", str(path)))

    def _explain(self, detail: ErrorDetails) -> str:
        path = tuple(part for part in detail["loc"] if not _is_union_tag(part))
        source = _source_of(path, self.sources)
        key = spell(path, self._tree)
        if detail["type"] == "extra_forbidden":
            section = kind_at(path[:-1])
            fields = list(section.model_fields) if isinstance(section, type) else []
            return f"{source}: {key}: unknown key{did_you_mean(str(path[-1]), fields)}"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "missing":
            return f"{source}: {key}: this key is required"
        if not path:
            compared = (self.sources[part] for part in _COMPARED if part in self.sources)
            return f"{', '.join(dict.fromkeys(map(str, compared))) or source}: {message}"
        if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
            message = f"Input should be {_section_in_words(kind_at(path))}"
        elif detail["type"] == "tuple_type":
            message = "Input should be a list"
        shown = "(not shown)" if _may_show_secrets(path, detail["input"]) else _shown_input(detail["input"])
        return f"{source}: {key} = {shown}: {message}"


def _source_of(path: KeyPath, sources: Mapping[KeyPath, Source]) -> Source:
    """The most particular entry that covers `path`."""
    prefixes = (path[:length] for length in range(len(path), 0, -1))
    return next((sources[prefix] for prefix in prefixes if prefix in sources), DEFAULT)


def _may_show_secrets(path: KeyPath, value: object) -> bool:
    return "api_keys" in path or (isinstance(value, str | list | dict) and holds_secrets(kind_at(path)))


def _section_in_words(kind: Kind) -> str:
    if isinstance(kind, Many):
        return f"a section of labels, each {_section_in_words(kind.section)}"
    if kind is None:
        return "a section"
    needed = [name for name, field in kind.model_fields.items() if field.is_required()]
    return f"a section with {' and '.join(needed)}" if needed else f"a section of {', '.join(kind.model_fields)}"


def _shown_input(value: object) -> str:
    return "null" if value is None else repr(value)


def _what(value: object) -> str:
    return "a list" if isinstance(value, list) else "a value"


def _is_union_tag(part: str | int) -> bool:
    """Pydantic puts the alternative of a union it tried into the location of an error."""
    return isinstance(part, str) and any(mark in part for mark in "[('")


def _plain(pool: PoolConfig) -> Tree:
    return pool.model_dump(include={"name", "role"})


# --- reading ----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> Tree:
    """A YAML file's mapping; an empty file has none. Raises ConfigError that names the file, and the line if known."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, not a configuration file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    tree = _parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict) or any(not isinstance(key, str) for key in cast("dict[object, Any]", tree)):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return cast("Tree", tree)


def _parse_yaml(text: str, where: str) -> object:
    try:
        return cast("object", yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" line {error.problem_mark.line + 1}:"
        raise ConfigError(f"{where}:{line} {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error


def _from_text(text: str, source: Source) -> object:
    """A variable's value: lists and mappings as YAML, `null`; anything else as it stands."""
    if text.startswith(("[", "{")):
        return _parse_yaml(text, str(source))
    return None if text in ("null", "~") else text


# --- showing ----------------------------------------------------------------------------------------


def _leaves(section: BaseModel, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    plain = section.model_dump(mode="json")
    for name in type(section).model_fields:
        child, kind = getattr(section, name), kind_of(type(section), name)
        if isinstance(kind, Many) and child:
            entries = child.items() if kind.by == "label" else enumerate(child)
            for part, inner in cast("Iterator[tuple[str | int, BaseModel]]", entries):
                yield from _leaves(inner, (*path, name, part))
        elif isinstance(child, BaseModel):
            yield from _leaves(child, (*path, name))
        elif name == "api_keys":
            yield (*path, name), f"({len(plain[name])} redacted)" if plain[name] else []
        else:
            yield (*path, name), plain[name]


def _show(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
