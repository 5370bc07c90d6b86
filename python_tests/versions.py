"""Test the installed package with other versions of what it depends on, the oldest and the newest supported ones, and
beside libraries that it works with and does not depend on.

Each set of versions is installed into a folder of its own that is laid over this environment (PYTHONPATH), so nothing
is built again and the environment stays as it is; `run.py` then runs there. Sets that come to what is installed anyway
are skipped. Sets with "torch" in their name download several GB where the index has CUDA builds of it. The set
"quantisers" (torchao, quanto, bitsandbytes, peft) runs the tests of those alone.

    python python_tests/versions.py                                          the whole suite, all sets
    python python_tests/versions.py --quick --set transformers-oldest        what CI runs
    python python_tests/versions.py --set torch-oldest python_tests/ops      some tests only
    python python_tests/versions.py --set quantisers                         quantised and adapted models
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Requirements of each set. What else they need comes along; all other packages stay at their installed versions.
SETS: dict[str, tuple[str, ...]] = {
    "transformers-oldest": ("transformers==5.17.0",),
    "transformers-newest": ("transformers",),
    "torch-oldest": ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy<2.4"),
    "torch-newest": ("torch", "triton", "transformers"),
    "quantisers": ("torchao", "optimum-quanto", "bitsandbytes", "peft", "accelerate", "psutil"),
}
# Sets that name all that is missing here: with their dependencies a torch of another build would come along.
WITHOUT_DEPENDENCIES = frozenset({"quantisers"})
# What a set runs where no tests are named.
TESTS = {"quantisers": ("python_tests/models/test_quantisers.py", "python_tests/models/test_peft.py")}
# Packages that a set may move besides those it names.
FREE = frozenset({"huggingface-hub", "tokenizers", "safetensors"})

# What rests on the inner workings of transformers.
QUICK = (
    "python_tests/models/test_adapter.py",
    "python_tests/models/test_families.py",
    "python_tests/models/test_prefill.py",
    "python_tests/offload/test_model.py",
    "python_tests/decoding/test_generate.py",
    "python_tests/test_hf.py",
    "python_tests/test_parallel.py",
)


def installed_versions() -> dict[str, str]:
    """Return the version of every distribution in this environment, by its normalised name."""
    return {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
    }


def _name(requirement: str) -> str:
    return requirement.split("=")[0].split("<")[0]


def install(requirements: tuple[str, ...], folder: Path, dependencies: bool = True) -> dict[str, str]:
    """Install a set into a folder, all else held at its installed version. Returns the versions that are there."""
    named = {_name(requirement) for requirement in requirements}
    held = [
        f"{name}=={version}"
        for name, version in installed_versions().items()
        # a torch of another version brings libraries of its own, and a local build has no place on an index
        if name not in named | FREE | {"sequoia-kernels"} and "+" not in version and not name.startswith("nvidia-")
    ]
    constraints = folder.with_suffix(".txt")
    constraints.write_text("\n".join(held) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not dependencies:
        command.append("--no-deps")
    subprocess.run([*command, "--target", str(folder), "-c", str(constraints), *requirements], check=True)
    found = importlib.metadata.distributions(path=[str(folder)])
    return {distribution.metadata["Name"].lower().replace("_", "-"): distribution.version for distribution in found}


def main() -> int:
    """Run the sets and return 0 if all passed."""
    parser = argparse.ArgumentParser(
        prog="python python_tests/versions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--set", dest="sets", action="append", choices=SETS, help="this set only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only the tests that rest on transformers' inner workings")
    options, pytest_arguments = parser.parse_known_args()
    outcomes = {}
    for name in options.sets or SETS:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / name
            versions = install(SETS[name], folder, name not in WITHOUT_DEPENDENCIES)
            changed = {key: versions[key] for key in map(_name, SETS[name])}
            text = ", ".join(f"{key} {version}" for key, version in changed.items())
            if changed.items() <= installed_versions().items():
                print(f"== {name}: {text}: what is installed anyway", flush=True)
                continue
            print(f"== {name}: {text}", flush=True)
            chosen = TESTS.get(name, QUICK if options.quick else ())
            if name in TESTS and any((ROOT / argument.split("::")[0]).exists() for argument in pytest_arguments):
                chosen = ()  # others are named
            arguments = [*pytest_arguments, *chosen]
            path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
            command = [sys.executable, str(ROOT / "python_tests" / "run.py"), "--no-lint", *arguments]
            result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False)
            outcomes[f"{name} ({text})"] = result.returncode
    for name, code in outcomes.items():
        print(f"{name}: {'passed' if code == 0 else f'failed, exit status {code}'}")
    return 1 if any(outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
