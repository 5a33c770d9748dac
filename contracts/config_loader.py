"""Reads the configuration from its four layers and remembers where every value came from.

flag > environment > file > default. A cluster file names its pools inline or by the path of a pool file; a
later layer addresses a pool by its name (`pools.decode.workers`, `TANDEM_POOLS__DECODE__WORKERS`). The
schema is `contracts.config`'s; each problem is a `ConfigError` that names source, key and value.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from pydantic import BaseModel, ValidationError

from contracts.config import DEFAULT_POOLS, ClusterConfig, PoolConfig
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic_core import ErrorDetails

ENV_PREFIX = "TANDEM_"

#: Variables of this prefix that are not configuration keys.
RESERVED_ENV = frozenset({"TANDEM_CLUSTER_TOKEN", "TANDEM_CONFIG"})

#: Largest configuration file that is read.
MAX_FILE_BYTES = 1 << 20

#: Keys and list positions from the root of the tree.
KeyPath = tuple[str | int, ...]

Tree = dict[str, Any]


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
            Row(_spell(path, self.config), _show(value), self.sources.get(path, DEFAULT))
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
    key such as "pools.*.device" sets every pool. `overrides` are the pairs of `--set key=value`, read as
    variables are. Raises ConfigError.
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
    pools = schema["properties"]["pools"]
    pools["items"] = {"anyOf": [pools["items"], {"type": "string", "description": "Path of a pool file."}]}
    schema["title"] = "Tandem cluster file"
    return schema


class _Layers:
    """The tree under construction. Later calls win over earlier ones."""

    def __init__(self) -> None:
        self._tree: Tree = {"pools": [_plain(pool) for pool in DEFAULT_POOLS]}
        #: Of every value set so far; a section's entry holds for what is below it.
        self.sources: dict[KeyPath, Source] = {}

    def add_file(self, path: Path) -> None:
        source = Source("file", str(path))
        for key, value in read_mapping(path).items():
            self._tree[key] = value
            self.sources[key,] = source
            for name in cast("Tree", value) if isinstance(value, dict) else ():
                self.sources[key, name] = source
        self._expand_pools(path.parent)

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """The whole list of pools first, so that the variables of single pools apply to it."""
        names = [name for name in environ if name.startswith(ENV_PREFIX) and name not in RESERVED_ENV]
        for name in sorted(names, key=lambda name: (name != f"{ENV_PREFIX}POOLS", name)):
            source = Source("env", name)
            segments = [part.lower() for part in name.removeprefix(ENV_PREFIX).split("__")]
            self.set_key(segments, _from_text(environ[name], source), source)
            if segments == ["pools"]:
                self._expand_pools(Path())

    def set_key(self, segments: Sequence[str], value: object, source: Source) -> None:
        for path in self._resolve(list(segments), source):
            self._set(path, value, source)

    def validated(self) -> ClusterConfig:
        try:
            return ClusterConfig.model_validate(self._tree)
        except ValidationError as error:
            raise ConfigError("\n".join(self._explain(detail) for detail in error.errors())) from error

    # --- building ---------------------------------------------------------------------------------

    def _set(self, path: KeyPath, value: object, source: Source) -> None:
        target: Any = self._tree
        for key in path[:-1]:
            target = target[key] if isinstance(key, int) else target.setdefault(key, {})
            if isinstance(target, str | int | float | None):
                raise ConfigError(f"{source}: cannot set {path[-1]!r}: {key} is a value, not a section")
        target[path[-1]] = value
        self.sources[path] = source

    def _expand_pools(self, folder: Path) -> None:
        """Reads the pool files, unless the defaults still stand."""
        pools = self._pools() if ("pools",) in self.sources else []
        for index, entry in enumerate(pools):
            if isinstance(entry, str):
                path = folder / entry
                pools[index] = {"name": path.stem, **read_mapping(path)}
                self._note_pool(index, Source("file", str(path)))
            else:
                self._note_pool(index, self.sources["pools",])

    def _note_pool(self, index: int, source: Source) -> None:
        self.sources["pools", index] = source
        pool = self._pools()[index]
        for key in cast("Tree", pool) if isinstance(pool, dict) else ():
            self.sources["pools", index, key] = source

    # --- naming -----------------------------------------------------------------------------------

    def _resolve(self, segments: list[str], source: Source) -> list[KeyPath]:
        """The places that a key names: several for `pools.*`, which is nothing but every pool by name."""
        if segments[0] != "pools" or len(segments) == 1:
            self._check_known(segments, source)
            return [tuple(segments)]
        names = [self._pool_name(index) for index in range(len(self._pools()))]
        wanted = segments[1].replace("_", "-")
        chosen = [index for index, name in enumerate(names) if wanted in ("*", name)]
        if not chosen:
            raise ConfigError(f"{source}: there is no pool {wanted!r}{_did_you_mean(wanted, names)}")
        _check_key(PoolConfig, segments[2:], ".".join(segments[:2]), source)
        return [("pools", index, *segments[2:]) for index in chosen]

    def _pools(self) -> list[object]:
        pools = self._tree["pools"]
        return cast("list[object]", pools) if isinstance(pools, list) else []

    def _pool_name(self, index: int) -> str:
        """Its position, where it has no usable name."""
        pool = self._pools()[index]
        name = cast("Tree", pool).get("name") if isinstance(pool, dict) else None
        return name if isinstance(name, str) else str(index)

    def _check_known(self, segments: list[str], source: Source) -> None:
        section = ClusterConfig.model_fields.get(segments[0])
        model = None if section is None else section.annotation
        if len(segments) > 1 and isinstance(model, type) and issubclass(model, BaseModel):
            _check_key(model, segments[1:], segments[0], source)
        else:
            _check_key(ClusterConfig, segments, "", source)

    # --- explaining -------------------------------------------------------------------------------

    def _explain(self, detail: ErrorDetails) -> str:
        path = tuple(part for part in detail["loc"] if not _is_union_tag(part))
        source = _source_of(path, self.sources)
        key = ".".join(map(str, self._with_pool_name(path)))
        if detail["type"] == "extra_forbidden":
            nearest = _did_you_mean(str(path[-1]), list(_model_at(path[:-1]).model_fields))
            return f"{source}: {key}: unknown key{nearest}"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "missing":
            return f"{source}: {key}: this key is required"
        if not path:
            return f"{self.sources.get(('pools',), source)}: {message}"
        shown = "(not shown)" if "api_keys" in path else repr(detail["input"])
        return f"{source}: {key} = {shown}: {message}"

    def _with_pool_name(self, path: KeyPath) -> KeyPath:
        if len(path) > 1 and path[0] == "pools" and isinstance(path[1], int):
            return ("pools", self._pool_name(path[1]), *path[2:])
        return path


def _source_of(path: KeyPath, sources: Mapping[KeyPath, Source]) -> Source:
    """The most particular entry that covers `path`."""
    prefixes = (path[:length] for length in range(len(path), 0, -1))
    return next((sources[prefix] for prefix in prefixes if prefix in sources), DEFAULT)


def _check_key(model: type[BaseModel], segments: Sequence[str], prefix: str, source: Source) -> None:
    if len(segments) == 1 and segments[0] in model.model_fields:
        return
    wanted = ".".join(segments)
    full = f"{prefix}.{wanted}" if prefix else wanted
    raise ConfigError(f"{source}: unknown key {full!r}{_did_you_mean(wanted, list(model.model_fields))}")


def _did_you_mean(wanted: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(wanted, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"


def _is_union_tag(part: str | int) -> bool:
    """Pydantic puts the alternative of a union it tried into the location of an error."""
    return isinstance(part, str) and any(mark in part for mark in "[('")


def _model_at(path: KeyPath) -> type[BaseModel]:
    if not path:
        return ClusterConfig
    if path[0] == "pools":
        return PoolConfig
    section = ClusterConfig.model_fields[str(path[0])].annotation
    assert isinstance(section, type), f"{path} is not a section"
    return cast("type[BaseModel]", section)


def _plain(pool: PoolConfig) -> Tree:
    return pool.model_dump(include={"name", "role"})


# --- reading ----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(str(key_node.value))
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
        child = getattr(section, name)
        if isinstance(child, BaseModel):
            yield from _leaves(child, (*path, name))
        elif name == "pools":
            for index, pool in enumerate(cast("tuple[PoolConfig, ...]", child)):
                yield from _leaves(pool, (*path, name, index))
        elif name == "api_keys":
            yield (*path, name), f"({len(plain[name])} redacted)" if plain[name] else []
        else:
            yield (*path, name), plain[name]


def _spell(path: KeyPath, config: ClusterConfig) -> str:
    named = (config.pools[part].name if isinstance(part, int) else part for part in path)
    return ".".join(named)


def _show(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
