"""What an emulated launch found wrong, one entry for each kind of fault and instruction."""

from __future__ import annotations

from dataclasses import dataclass

from support.ptx.parser import Instruction

__all__ = ["Finding", "KernelStoppedError", "Report", "UnsupportedError"]


class UnsupportedError(NotImplementedError):
    """The emulator does not know this instruction, operand or use; nothing is guessed."""


class KernelStoppedError(RuntimeError):
    """A kernel ended itself: a device assertion failed, or a launch does not come to an end."""


@dataclass
class Finding:
    """One fault, at one instruction of one kernel."""

    kind: str
    kernel: str
    location: str
    """file and line of the kernel's source, where the PTX tells it"""
    instruction: str
    detail: str
    """of the first time"""
    count: int = 1

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        return f"{self.kind}: {self.kernel}{where} `{self.instruction}`: {self.detail} ({self.count} times)"


class Report:
    """The findings of any number of launches.

    Example:
        >>> report = Report()
        >>> report.add("out of bounds", None, "a store behind the tensor `out`")
        >>> report.kinds()
        {'out of bounds'}
    """

    def __init__(self) -> None:
        self.kernel = ""
        """the kernel that runs now"""
        self._findings: dict[tuple[str, str, str, int], Finding] = {}

    def add(self, kind: str, instruction: Instruction | None, detail: str) -> None:
        """Note a fault; the same one at the same instruction is counted."""
        location, text, line = "", "", 0
        if instruction is not None:
            location, text, line = instruction.location, instruction.text, instruction.line
        key = (kind, self.kernel, location, line)
        if key in self._findings:
            self._findings[key].count += 1
        else:
            self._findings[key] = Finding(kind, self.kernel, location, text, detail)

    def findings(self) -> list[Finding]:
        """All of them, in the order of their first time."""
        return list(self._findings.values())

    def kinds(self) -> set[str]:
        """Which kinds of faults there were."""
        return {finding.kind for finding in self._findings.values()}

    def clear(self) -> None:
        """Forget all."""
        self._findings.clear()
