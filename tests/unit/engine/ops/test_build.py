from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.ops import TorchOps, select_ops
from engine.ops.build import BuildError, load_kernels

if TYPE_CHECKING:
    from engine.ops.cpu_ops import CpuOps

#: A compiler that counts its calls, answers --version, and writes what it is told: fast and observable.
FAKE_COMPILER = """#!{python}
import pathlib, sys, time
if "--version" in sys.argv:
    print("fake 1.0")
    sys.exit()
log = pathlib.Path({log!r})
with log.open("a") as file:
    file.write("call\\n")
time.sleep(0.05)
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes({output!r})
"""


def fake_compiler(folder: Path, output: bytes) -> tuple[str, Path]:
    log = folder / "calls"
    program = folder / "fake-c++"
    program.write_text(FAKE_COMPILER.format(python=sys.executable, log=str(log), output=output))
    program.chmod(0o755)
    return str(program), log


def test_a_missing_compiler_falls_back_to_torch_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    ops = select_ops("cpu", log=lines.append)
    assert isinstance(ops, TorchOps)
    assert ops.name == "cpu-torch"
    assert len(lines) == 1
    assert "cpu-torch" in lines[0]
    assert "/nonexistent/c++" in lines[0]


def test_a_folder_that_cannot_be_written_falls_back_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    lines: list[str] = []
    assert isinstance(select_ops("cpu", log=lines.append), TorchOps)
    assert "NotADirectoryError" in lines[0]


def test_the_kernels_are_chosen_where_they_can_be_built(native_ops: CpuOps) -> None:
    lines: list[str] = []
    ops = select_ops("cpu", log=lines.append)
    assert ops.name == native_ops.name
    assert lines == [f"operators: {ops.name} (compiled for this CPU)"]


def test_the_compilers_message_is_kept(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no-such-cpu"):
        load_kernels(machine_flags=["-march=no-such-cpu"], cache_dir=tmp_path)
    assert not list(tmp_path.glob("build-*")), "left its temporary folder"


def test_workers_that_start_together_compile_once(tmp_path: Path, native_library: Path) -> None:
    compiler, log = fake_compiler(tmp_path, native_library.read_bytes())
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        starts = [pool.submit(load_kernels, compiler=compiler, cache_dir=cache) for _ in range(4)]
        assert all(start.result().tandem_lanes() > 0 for start in starts)
    calls = log.read_text().count("call")
    assert calls == 4, "three files and one link, by one of the four"
    load_kernels(compiler=compiler, cache_dir=cache)
    assert log.read_text().count("call") == calls, "a later start compiles nothing"


def test_flags_and_compiler_are_part_of_the_name(tmp_path: Path, native_library: Path) -> None:
    compiler, _ = fake_compiler(tmp_path, native_library.read_bytes())
    cache = tmp_path / "cache"
    load_kernels(compiler=compiler, cache_dir=cache)
    load_kernels(compiler=compiler, machine_flags=["-mother"], cache_dir=cache)
    load_kernels(compiler=f"{compiler} --more", cache_dir=cache)
    assert len(list(cache.glob("*.so"))) == 3


def test_a_worker_killed_while_it_compiles_leaves_no_lock(tmp_path: Path, native_library: Path) -> None:
    compiler, _ = fake_compiler(tmp_path, native_library.read_bytes())
    cache = tmp_path / "cache"
    cache.mkdir()
    program = (
        "import sys, pathlib\n"
        "from engine.ops import build\n"
        "def stop(*_):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
        "build._build = stop\n"
        f"build.load_kernels(compiler={compiler!r}, cache_dir=pathlib.Path({str(cache)!r}))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "locked\n"
        worker.kill()
        worker.wait()
    assert load_kernels(compiler=compiler, cache_dir=cache).tandem_lanes() > 0


def test_a_library_that_cannot_be_loaded_is_a_build_error(tmp_path: Path) -> None:
    compiler, _ = fake_compiler(tmp_path, b"not a library")
    with pytest.raises(BuildError, match="OSError"):
        load_kernels(compiler=compiler, cache_dir=tmp_path / "cache")


def test_torch_and_the_kernels_share_one_openmp_runtime(native_ops: CpuOps) -> None:
    """A second runtime would keep a second team of threads, which spins against the first."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    mapped = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    runtimes = {path for path in mapped if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes
