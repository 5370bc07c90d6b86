"""Drives CMake and ninja for the native modules; everything else about the package is in pyproject.toml.

Environment:
    SEQUOIA_CUDA        0, 1 or auto (default): build `sequoia_kernels._cuda` never, always, or where nvcc works.
    SEQUOIA_CUDA_ARCHS  architectures in CMake's notation, separated by spaces, commas or semicolons.
    SEQUOIA_SANITIZE    1: build `sequoia_kernels._host` with sanitizers; see python_tests/sanitize_host.py.
    CXX, CUDACXX        compilers, as CMake reads them.
    CMAKE_BUILD_PARALLEL_LEVEL  number of parallel compile jobs.

No GPU is looked for and torch is not needed: the modules take raw pointers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_SETUPTOOLS = 77  # reads the license fields of pyproject.toml
MIN_CMAKE = (3, 26)
ARCH_PATTERN = re.compile(r"[1-9][0-9]{1,2}[af]?(-real|-virtual)?")


class BuildError(SystemExit):
    """A build that cannot go on; the message names the fix and is printed without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nerror: sequoia-kernels: {message}\n")


def check_setuptools(version: str) -> None:
    """Refuse a setuptools that would stumble over pyproject.toml with a longer story."""
    if int(version.split(".")[0]) < MIN_SETUPTOOLS:
        raise BuildError(
            f"setuptools {version} is too old, {MIN_SETUPTOOLS} or newer is needed; "
            f'run `pip install "setuptools>={MIN_SETUPTOOLS}"`, or build without --no-build-isolation'
        )


def find_tool(name: str) -> str:
    """Return the path of a build tool, preferring the one installed beside the running Python."""
    fix = f"run `pip install {name}`, or build without --no-build-isolation"
    beside = shutil.which(name, path=sysconfig.get_path("scripts"))
    found = beside or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} was not found; {fix}")
    try:
        result = subprocess.run([found, "--version"], check=True, stdout=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{found} does not run ({error}); {fix}") from None
    version = re.search(r"(\d+)\.(\d+)", result.stdout)
    if name == "cmake" and version and tuple(map(int, version.groups())) < MIN_CMAKE:
        raise BuildError(f"{found} is version {version[0]}, {MIN_CMAKE[0]}.{MIN_CMAKE[1]} or newer is needed; {fix}")
    return found


def find_compiler() -> str:
    """Return the C++ compiler that CMake would take."""
    asked = os.environ.get("CXX")
    for candidate in [asked.split()[0]] if asked and asked.split() else ["c++", "g++", "clang++"]:
        if found := shutil.which(candidate):
            return found
    what = f"CXX={asked} does not exist" if asked else "no C++ compiler was found (looked for c++, g++, clang++)"
    raise BuildError(
        f"{what}; install one with C++17 (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
        "macOS: xcode-select --install) or set CXX to its path"
    )


def find_pybind11() -> str:
    """Return pybind11's CMake directory."""
    try:
        import pybind11
    except ImportError:
        raise BuildError(
            "the Python package pybind11 is missing; run `pip install pybind11`, or build without --no-build-isolation"
        ) from None
    return pybind11.get_cmake_dir()


def cuda_options() -> list[str]:
    """Translate SEQUOIA_CUDA and SEQUOIA_CUDA_ARCHS into CMake definitions."""
    mode = os.environ.get("SEQUOIA_CUDA", "auto").strip().lower() or "auto"
    if mode not in {"0", "1", "auto"}:
        raise BuildError(f"SEQUOIA_CUDA must be 0, 1 or auto, got {mode!r}")
    archs = [arch for arch in re.split(r"[\s,;]+", os.environ.get("SEQUOIA_CUDA_ARCHS", "")) if arch]
    for arch in archs:
        if not ARCH_PATTERN.fullmatch(arch):
            raise BuildError(
                "SEQUOIA_CUDA_ARCHS must list architectures such as `80-real 90a-real 90-virtual`, "
                f"got {arch!r}; the GPU of the build machine is never probed, so name each one"
            )
    return [f"-DSEQUOIA_CUDA={mode}", f"-DSEQUOIA_CUDA_ARCHS={';'.join(archs)}"]


@contextlib.contextmanager
def locked(directory: Path):
    """Hold a lock on a build directory, so that two builds of one tree do not write over each other."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.lock", "w") as lock:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class CMakeBuild(build_ext):
    """Builds all extensions in one CMake run, in a build directory that is kept between runs."""

    def build_extensions(self) -> None:
        compiler = find_compiler()
        sanitize = os.environ.get("SEQUOIA_SANITIZE", "0") == "1"
        cmake = find_tool("cmake")
        ninja = find_tool("ninja")
        options = [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={find_pybind11()}",
            *cuda_options(),
            f"-DSEQUOIA_SANITIZE={'ON' if sanitize else 'OFF'}",
        ]
        # One directory per interpreter. A change of tools (build isolation makes new paths each time) starts afresh,
        # since a CMake cache full of paths that are gone fails in ways that are hard to read.
        kind = "sanitized" if sanitize else "cmake"
        work = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        seen = [
            os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH")
        ]
        seen += [compiler, cmake, shutil.which("nvcc") or "no nvcc"]
        key = hashlib.sha256("\n".join([*options, *seen]).encode()).hexdigest()
        stamp = work / "sequoia-options"
        with locked(work):
            if not stamp.exists() or stamp.read_text() != key:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                stamp.write_text(key)
            self._run([cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja", *options], "configuring")
            self._run([cmake, "--build", str(work)], "compiling")
            self._collect(work / "modules")

    def _run(self, command: list[str], stage: str) -> None:
        """Run one build step; its own output stays above the closing message."""
        # stdout and stderr in one pipe keep the order of CMake's status lines and errors.
        result = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if result.returncode != 0 or self.verbose:
            sys.stdout.write(result.stdout)
            sys.stdout.flush()
        if result.returncode != 0:
            raise BuildError(f"{stage} the native modules failed; the lines above give the reason")

    def _collect(self, modules: Path) -> None:
        """Copy the built modules to where setuptools expects them, and forget the ones this build leaves out."""
        built = []
        for extension in self.extensions:
            source = next(modules.glob(extension.name.rpartition(".")[2] + ".*"), None)
            target = Path(self.get_ext_fullpath(extension.name))
            if source is None:
                target.unlink(missing_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(source, target)
            built.append(extension)
        self.extensions = built

    def copy_extensions_to_source(self) -> None:
        """Copy into the package for --inplace; a stale module that is no longer built is removed."""
        built = {extension.name for extension in self.extensions}
        build_py = self.get_finalized_command("build_py")
        for extension in self.distribution.ext_modules:
            package, _, _ = extension.name.rpartition(".")
            regular = Path(self.get_ext_fullpath(extension.name))
            inplace = Path(build_py.get_package_dir(package)) / regular.name
            if extension.name in built:
                replace_file(Path(self.build_lib) / self.get_ext_filename(extension.name), inplace)
            else:
                inplace.unlink(missing_ok=True)


class CleanBuild(build):
    """Empties build/lib first: setuptools would ship modules that are left there from an older tree."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def replace_file(source: Path, target: Path) -> None:
    """Copy a module by rename: a process that has the old one mapped keeps it whole."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.copy2(source, partial)
    os.replace(partial, target)


check_setuptools(setuptools.__version__)
setup(
    ext_modules=[Extension("sequoia_kernels._host", []), Extension("sequoia_kernels._cuda", [], optional=True)],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
