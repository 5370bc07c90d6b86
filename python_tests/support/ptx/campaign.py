"""Every mutant of the attention kernels in turn: which faults does the emulator miss?

    python python_tests/emulate_ptx.py --mutations

Writes a line a mutant and ends with how many were noticed. A mutant that nothing noticed is listed with its line of
PTX: it is for a person to say whether the kernel could do without that instruction in this call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from support.ptx.calls import CALLS
from support.ptx.emulator import Emulator
from support.ptx.launch import Options
from support.ptx.mutations import Outcome, mutants, run_mutant

__all__ = ["outcomes"]

KERNELS = {80: "attention of few rows, bfloat16", 90: "attention of many rows, bfloat16"}
"""capability -> the call whose kernels are changed: cp.async, ldmatrix and mma there, wgmma here"""

OPTIONS = Options(max_pieces=10**5)


def outcomes(capability: int) -> Iterator[Outcome]:
    """Run the mutants of one device's kernels.

    Raises:
        RuntimeError: the kernels as they are have findings or wrong results.
    """
    call = CALLS[KERNELS[capability]]()
    plain = Emulator(OPTIONS)
    if not call.is_right(plain, capability) or plain.report.findings():
        raise RuntimeError(f"the kernels must run without findings, got {plain.report.findings()}")
    for ptx in plain.texts():
        for mutant in mutants(ptx):
            yield run_mutant(ptx, mutant, lambda emulator: call.is_right(emulator, capability), OPTIONS)


def main() -> None:
    """Run all and write what came of each."""
    noticed = total = 0
    for capability in KERNELS:
        for outcome in outcomes(capability):
            total += 1
            noticed += outcome.noticed
            told = ", ".join(sorted(outcome.findings)) or ("nothing" if outcome.is_right else "wrong results")
            mutant = outcome.mutant
            sys.stdout.write(f"sm_{capability}, line {mutant.line}: {mutant.name}: {told}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{noticed} of {total} noticed\n")


if __name__ == "__main__":
    main()
