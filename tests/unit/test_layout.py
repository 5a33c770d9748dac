"""The frame holds: packages, import floors, and what no room may do."""

from __future__ import annotations

import ast
import importlib
import re
from typing import TYPE_CHECKING

import pytest

from tests.support.layout import FLOORS, ROOT, imports, packages, pyproject, source_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Rooms where time and chance are arguments.
BELOW_CLUSTER = sorted(name for name, floor in FLOORS.items() if floor < FLOORS["cluster"])

#: Folders with code that runs from a checkout only.
UNPACKAGED = {"benchmarks", "tests"}

#: Who reads the machine's clock below `cluster/`: the live clocks of servers and of the load test, and the kernels,
#: which are timed against each other once, when weights are packed.
CLOCK_FILES = (ROOT / "rpc" / "clock.py", ROOT / "loadtest" / "machine.py", ROOT / "engine" / "ops" / "cpu_ops.py")

#: Offline tools inside a room, not part of a serving process.
TOOLS = (ROOT / "engine" / "demo",)

CLOCK_CALLS = {"time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns", "sleep"}

#: Of the module `random`, only the seeded generator may be named.
SEEDED = {"Random"}


@pytest.mark.parametrize("name", packages())
def test_package_is_imported_from_this_repository(name: str) -> None:
    assert importlib.import_module(name).__file__ == str(ROOT / name / "__init__.py")


def test_every_folder_with_code_is_packaged_and_has_a_floor() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - UNPACKAGED
    assert folders == set(packages()) == set(FLOORS)


def test_checkers_look_at_every_package() -> None:
    tool = pyproject()["tool"]
    wanted = {*packages(), *UNPACKAGED}
    assert set(tool["mypy"]["files"]) == wanted
    assert set(tool["pyright"]["include"]) == wanted
    assert set(tool["ruff"]["lint"]["isort"]["known-first-party"]) == wanted


@pytest.mark.parametrize("name", packages())
def test_a_package_imports_only_from_lower_floors(name: str) -> None:
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {name} (floor {FLOORS[name]}) imports {module}"
        for path in source_files(name)
        for line, module in imports(path)
        if (other := module.split(".")[0]) in FLOORS and other != name and FLOORS[other] >= FLOORS[name]
    ]
    assert not upward, "\n".join(upward)


def test_no_package_imports_tests_or_benchmarks() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for name in packages()
        for path in source_files(name)
        for line, module in imports(path)
        if module.split(".")[0] in ("tests", "benchmarks")
    ]
    assert not found, found


def test_no_pickle() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for name in packages()
        for path in source_files(name)
        for line, module in imports(path)
        if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")
    ]
    assert not found, found


@pytest.mark.parametrize("module", ["transformers", "pandas"])
def test_no_package_imports_what_takes_seconds_to_load(module: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for name in packages()
        for path in source_files(name)
        for line, imported in imports(path)
        if imported.split(".")[0] == module
    ]
    assert not found, found


@pytest.mark.parametrize("name", BELOW_CLUSTER)
def test_time_and_chance_are_arguments_below_cluster(name: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in source_files(name)
        if path not in CLOCK_FILES and not any(path.is_relative_to(tool) for tool in TOOLS)
        for line, what in _clock_and_chance(path)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", packages())
def test_no_exception_is_swallowed(name: str) -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in source_files(name) for line in _swallowing_handlers(path)]
    assert not found, found


def test_readme_shows_the_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown = {name: int(floor) for floor, cell in rows for name in re.findall(r"`(\w+)/`", cell)}
    assert shown == FLOORS


def _clock_and_chance(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if (module == "time" and name in CLOCK_CALLS) or (module == "random" and name not in SEEDED):
                yield node.lineno, f"{module}.{name}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "random"):
            names = {alias.name for alias in node.names} - SEEDED
            yield from ((node.lineno, f"{node.module}.{name}") for name in sorted(names))


def _swallowing_handlers(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or (
            isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
        )
        if broad and all(isinstance(step, ast.Pass) for step in node.body):
            yield node.lineno
