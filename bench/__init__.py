"""Benchmarks, run as modules from the top of the repository: `python -m bench.ops.bench_verify_tree --help`.

run.py      one command for all of them, or for a suite: `python bench/run.py --suite all --out results`
ops/        a script an op, bench_<op>.py: our backends against what users have instead, behind a correctness gate
systems/    whole decoding loops
planner/    searching, planning, and whether plans come true
tools/      what makes committed reports, tunes kernels and checks a GPU
common/     what they share: the harness of the ops, the main of all other scripts, clocks, pairs of models, rivals
results/    documents, by device
"""

import sys
from pathlib import Path

# Python puts the folder it was started in first, and there lies the package's source. What is measured is the installed
# package; that source only where none is installed.
if not getattr(sys.flags, "safe_path", False) and Path(sys.path[0]).resolve() == Path(__file__).resolve().parents[1]:
    sys.path.append(sys.path.pop(0))
