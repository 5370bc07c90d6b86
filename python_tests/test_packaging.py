"""The build and what it ships: messages that name the fix, the contents of sdist and wheel, the installed metadata."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import run_process

import sequoia_kernels

REPOSITORY = Path(__file__).resolve().parents[1]
VENV = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt"
DEMO_COMMAND = f"{VENV} . && .venv/bin/sequoia-kernels demo"
TEST_COMMAND = f'{VENV} ".[test]" && .venv/bin/python python_tests/run.py'


# ---- the installed package


def test_native_module_lies_in_the_package() -> None:
    from sequoia_kernels import _host

    assert Path(_host.__file__).parent == Path(sequoia_kernels.__file__).parent


def test_package_data_is_installed() -> None:
    package = Path(sequoia_kernels.__file__).parent
    assert (package / "py.typed").is_file()
    for model in ("target", "draft"):
        assert (package / "demo" / "pair" / model / "config.json").is_file()
        assert (package / "demo" / "pair" / model / "model.safetensors").is_file()


def test_readme_has_the_two_commands() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert DEMO_COMMAND in readme
    assert TEST_COMMAND in readme


def test_metadata_of_the_distribution() -> None:
    try:
        distribution = importlib.metadata.distribution("sequoia-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sequoia_kernels is on PYTHONPATH, not installed")
    assert distribution.version == sequoia_kernels.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert scripts == {"sequoia-kernels": "sequoia_kernels.cli:main"}


# ---- setup.py: what it refuses, and how


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py's functions, without running a build."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("CXX", "SEQUOIA_CUDA", "SEQUOIA_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "setup.py")))


def _refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    return str(caught.value)


def test_missing_compiler_names_the_fix(setup_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = _refusal(setup_module.find_compiler)
    assert "no C++ compiler" in message
    assert "apt install g++" in message


def test_wrong_cxx_is_named(setup_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert "CXX=no-such-compiler -O1 does not exist" in _refusal(setup_module.find_compiler)


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_missing_tool_names_the_fix(
    setup_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    message = _refusal(setup_module.find_tool, tool)
    assert f"{tool} was not found" in message
    assert f"pip install {tool}" in message


def test_tool_that_does_not_run_is_refused(setup_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cmake"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: str(broken))
    assert "does not run" in _refusal(setup_module.find_tool, "cmake")


def test_old_cmake_is_refused(setup_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "cmake"
    old.write_text("#!/bin/sh\necho cmake version 3.25.1\n")
    old.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: str(old))
    message = _refusal(setup_module.find_tool, "cmake")
    assert "is version 3.25, 3.26 or newer is needed; run `pip install cmake`" in message


def test_old_setuptools_names_the_fix(setup_module: Any) -> None:
    assert 'pip install "setuptools>=77"' in _refusal(setup_module.check_setuptools, "65.5.0")


def test_missing_pybind11_names_the_fix(setup_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "pip install pybind11" in _refusal(setup_module.find_pybind11)


@pytest.mark.parametrize("mode", ["2", "yes", "on"])
def test_unknown_cuda_mode_is_refused(setup_module: Any, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("SEQUOIA_CUDA", mode)
    assert f"must be 0, 1 or auto, got {mode!r}" in _refusal(setup_module.cuda_options)


@pytest.mark.parametrize("archs", ["native", "80-real sm_90", "8.0", "80;rm -rf"])
def test_bad_architecture_is_refused(setup_module: Any, monkeypatch: pytest.MonkeyPatch, archs: str) -> None:
    monkeypatch.setenv("SEQUOIA_CUDA_ARCHS", archs)
    assert "SEQUOIA_CUDA_ARCHS must list" in _refusal(setup_module.cuda_options)


@pytest.mark.parametrize("archs", ["80-real 90a-real 90-virtual", "80-real,90a-real,90-virtual"])
def test_architectures_reach_cmake(setup_module: Any, monkeypatch: pytest.MonkeyPatch, archs: str) -> None:
    monkeypatch.setenv("SEQUOIA_CUDA", "1")
    monkeypatch.setenv("SEQUOIA_CUDA_ARCHS", archs)
    assert setup_module.cuda_options() == [
        "-DSEQUOIA_CUDA=1",
        "-DSEQUOIA_CUDA_ARCHS=80-real;90a-real;90-virtual",
    ]


# ---- CMake


def _configure(build: Path, mode: str, nvcc: Path) -> subprocess.CompletedProcess[str]:
    cmake = pytest.importorskip("cmake")
    pybind11 = pytest.importorskip("pybind11")
    ninja = pytest.importorskip("ninja")
    command = [
        os.path.join(cmake.CMAKE_BIN_DIR, "cmake"),
        *("-S", str(REPOSITORY), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={os.path.join(ninja.BIN_DIR, 'ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DSEQUOIA_CUDA={mode}",
    ]
    environment = {**os.environ, "CUDACXX": str(nvcc)}
    return run_process(command, env=environment, check=False)


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> Path:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'no toolkit here' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc


def test_auto_leaves_cuda_out_where_nvcc_does_not_work(tmp_path: Path, broken_nvcc: Path) -> None:
    result = _configure(tmp_path / "build", "auto", broken_nvcc)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sequoia_kernels._cuda is left out: no working nvcc" in result.stdout


def test_cuda_asked_for_is_an_error_where_nvcc_does_not_work(tmp_path: Path, broken_nvcc: Path) -> None:
    result = _configure(tmp_path / "build", "1", broken_nvcc)
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "SEQUOIA_CUDA=1, but no working nvcc" in message
    assert "set CUDACXX" in message


# ---- sdist and wheel


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of this tree and the wheel that is built from it, without isolation and without CUDA."""
    for tool in ("build", "cmake", "ninja", "pybind11", "setuptools"):
        pytest.importorskip(tool)
    outdir = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(outdir), str(REPOSITORY)]
    # An unoptimised build: what lies where is of interest here, and it compiles in a third of the time.
    environment = {**os.environ, "SEQUOIA_CUDA": "0", "CMAKE_BUILD_TYPE": "Debug", "PYTHONSAFEPATH": ""}
    run_process(command, env=environment)
    return next(outdir.glob("*.tar.gz")), next(outdir.glob("*.whl"))


@pytest.mark.slow
def test_sdist_carries_everything_a_build_needs(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "setup.py",
        "CMakeLists.txt",
        "constraints.txt",
        "LICENSE",
        "csrc/host/module.cpp",
        "csrc/cuda/launch.h",
    ):
        assert needed in names
    assert {"python_tests/run.py", "docs/own_loop.md", "examples/plain_tensors.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith("build/")]


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"sequoia_kernels", f"sequoia_kernels-{sequoia_kernels.__version__}.dist-info"}
    modules = [name for name in names if name.endswith(".so")]
    assert len(modules) == 1
    assert modules[0].startswith("sequoia_kernels/_host.")
    package = Path(sequoia_kernels.__file__).parent
    shipped = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert {f"sequoia_kernels/{name}" for name in shipped} == {name for name in names if name.endswith(".py")}
    assert "sequoia_kernels/py.typed" in names
    assert [name for name in names if name.startswith("sequoia_kernels/demo/pair/")]


@pytest.mark.slow
def test_wheel_is_tagged_for_this_python_and_platform(distributions: tuple[Path, Path]) -> None:
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    _, _, python_tag, abi_tag, platform_tag = distributions[1].stem.split("-")
    assert (python_tag, abi_tag) == (version, version)
    assert platform_tag != "any"


@pytest.mark.slow
def test_wheel_imports_without_any_dependency(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.append(sys.argv[1]); from sequoia_kernels import _host; sys.stdout.write(_host.__file__)"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path)]
    result = run_process(command)
    assert Path(result.stdout).parent == tmp_path / "sequoia_kernels"


# ---- the CUDA module, where it was built


def _cuda_module() -> Any:
    if importlib.util.find_spec("sequoia_kernels._cuda") is None:
        pytest.skip("sequoia_kernels._cuda is not built")
    from sequoia_kernels import _cuda

    return _cuda


def _compaction_arguments(**changes: int) -> dict[str, int]:
    names = re.findall(r"(\w+): (?:int|typing)", _cuda_module().compact_kv_cache.__doc__)
    return {**dict.fromkeys(names, 0), "num_levels": 4, "num_slices": 1, "batch_size": 1, **changes}


def test_cuda_module_tells_what_it_was_built_for() -> None:
    cuda = _cuda_module()
    assert cuda.architectures
    assert cuda.toolkit_version >= 12000


def test_cuda_launch_without_a_driver_says_so() -> None:
    cuda = _cuda_module()
    reason = cuda.unavailable_reason()
    if reason is None:
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(RuntimeError, match=r"compact_kv_cache: .*(driver|device)"):
        cuda.compact_kv_cache(**_compaction_arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 65}, r"num_levels must be in \[1, 64\], got 65"),
        ({"num_levels": 0}, r"num_levels must be in \[1, 64\], got 0"),
        ({"num_caches": 65536}, r"num_caches must be in \[0, 65535\], got 65536"),
        ({"batch_size": 65536}, r"batch_size must be in \[0, 65535\], got 65536"),
        ({"num_slices": 0}, r"num_slices must be in \[1, 65535\], got 0"),
        ({"length_bits": 31}, r"length_bits must be in \[0, 30\], got 31"),
        (
            {"length_bits": 29, "num_caches": 4},
            r"length_bits must leave bits to count num_slices \* num",
        ),
        ({"block_table": 64}, r"page_size must be at least 1, got 0"),
    ],
)
def test_cuda_launch_refuses_sizes_it_cannot_take(changes: dict[str, int], message: str) -> None:
    cuda = _cuda_module()
    with pytest.raises(ValueError, match=message):
        cuda.compact_kv_cache(**_compaction_arguments(**changes))


def test_cuda_launch_of_an_empty_batch_does_nothing() -> None:
    assert _cuda_module().compact_kv_cache(**_compaction_arguments(batch_size=0)) is None
