"""Every mutant of the attention kernels and of the native forward in turn: which faults does the emulator miss?

    python python_tests/emulate_ptx.py --mutations
    python python_tests/emulate_ptx.py --mutations forward sm_90    # calls whose names have these words

Writes a line a mutant and ends with how many were noticed. Instructions that a call does not come to are left alone. A
mutant that nothing noticed is for a person to look at: could the kernel do without that instruction in this call?
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from support.few_rows_forwards import CASES
from support.ptx.calls import Call, FewRowsForward, attention_call
from support.ptx.emulator import Emulator
from support.ptx.launch import Options
from support.ptx.mutations import Outcome, mutants, run_mutant

__all__ = ["outcomes"]

FORWARD = FewRowsForward(CASES["a group"], shared_bytes=68 << 10)
CALLS: dict[str, tuple[int, Callable[[], Call | FewRowsForward]]] = {
    "attention on sm_80": (80, lambda: attention_call(torch.bfloat16, 9, 64, [300], 340, (3, 1))),
    "attention on sm_90": (90, lambda: attention_call(torch.bfloat16, 40, 64, [300], 350, (4, 1))),
    "forward of few rows on sm_80": (80, lambda: FORWARD),
    "forward of few rows on sm_90": (90, lambda: FORWARD),
}
"""name -> capability, and the call whose kernels are changed: cp.async, ldmatrix and mma there, wgmma here, both
pipelined; mbarriers, blocks that wait for each other, cp.async there and cp.async.bulk here"""

OPTIONS = Options(max_pieces=2 * 10**4)


def outcomes(name: str) -> Iterator[Outcome]:
    """Run the mutants of one call's kernels.

    Raises:
        RuntimeError: the kernels as they are have findings or wrong results.
    """
    capability, make = CALLS[name]
    call = make()
    plain = Emulator(OPTIONS)
    if not call.is_right(plain, capability) or plain.report.findings():
        raise RuntimeError(f"the kernels must run without findings, got {plain.report.findings()}")
    for ptx in plain.texts():
        reached = plain.program(ptx).lines_run()
        for mutant in mutants(ptx):
            if mutant.line not in reached:
                continue
            yield run_mutant(ptx, mutant, lambda emulator: call.is_right(emulator, capability), OPTIONS)


def main() -> None:
    """Run all and write what came of each."""
    noticed = total = 0
    for name in [name for name in CALLS if all(word in name for word in sys.argv[1:])]:
        for outcome in outcomes(name):
            total += 1
            noticed += outcome.noticed
            told = ", ".join(sorted(outcome.findings)) or ("nothing" if outcome.is_right else "wrong results")
            mutant = outcome.mutant
            sys.stdout.write(f"{name}, line {mutant.line}: {mutant.name}: {told}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{noticed} of {total} noticed\n")


if __name__ == "__main__":
    main()
