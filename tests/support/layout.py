"""The rooms of the repository: folders, floors, and a reader of their imports."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

#: A package imports only from lower floors. The README shows the same table.
FLOORS: dict[str, int] = {
    "cluster": 6,
    "simulator": 6,
    "gateway": 5,
    "loadtest": 5,
    "worker": 5,
    "coordinator": 4,
    "prefill": 4,
    "decode": 4,
    "coldstart": 3,
    "kvstore": 3,
    "kvtransfer": 2,
    "engine": 1,
    "rpc": 1,
    "workload": 1,
    "contracts": 0,
}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages() -> list[str]:
    names: list[str] = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return names


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.lineno, node.module or ""
