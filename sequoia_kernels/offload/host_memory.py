"""The host's memory: how much of it can be had, blocks of it, and locking them for direct copies."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from sequoia_kernels.offload.threads import run_shielded

__all__ = ["CudaPageLock", "HostBlock", "PageLock", "allocate_block", "available_host_bytes", "close_all", "fill_all"]

_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device of the process
_CGROUPS = Path("/sys/fs/cgroup")
# Of a control group's version: its limit, its use, and which of its statistics count file pages, which can be dropped.
_CGROUP_FILES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


class Closeable(Protocol):
    """What holds memory until it is closed; idempotent."""

    def close(self) -> None:
        """Let go of memory."""


class PageLock(Protocol):
    """Locks host memory for direct copies by a device."""

    def lock(self, block: torch.Tensor) -> None:
        """Lock a block's pages; RuntimeError where that fails."""

    def unlock(self, block: torch.Tensor) -> None:
        """Unlock them; nothing happens where they are not locked."""


class CudaPageLock:
    """Page-locks with the CUDA runtime, on a device, or on the thread's own where None is given.

    A thread that has not chosen one would set up the first device of the machine. torch's own pinned allocator rounds
    sizes up to powers of two (a 1.7 GB layer would take 2.1 GB) and keeps what is freed; registering exactly the
    block's pages does neither.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def lock(self, block: torch.Tensor) -> None:
        """Lock a block's pages."""
        with self._on_device():
            status = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel(), _REGISTER_PORTABLE)
            if int(status) != 0:
                _forget_cuda_error()
                raise RuntimeError(f"cudaHostRegister failed with error {int(status)}")

    def unlock(self, block: torch.Tensor) -> None:
        """Unlock them."""
        with self._on_device():
            if int(torch.cuda.cudart().cudaHostUnregister(block.data_ptr())) != 0:
                _forget_cuda_error()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._device is None else torch.cuda.device(self._device)


def _forget_cuda_error() -> None:
    """Take back the error that a runtime call leaves behind: torch would blame the next kernel launch for it."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(1.0)


def allocate_block(num_bytes: int) -> torch.Tensor:
    """Allocate page-aligned memory that goes back to the system as soon as the tensor is gone. [num_bytes] uint8.

    Private and anonymous, so that it counts as this process's own memory, and on large pages where the system has
    them: a device then has fewer addresses to translate.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    mapping = mmap.mmap(-1, num_bytes, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


class HostBlock:
    """A block of host memory, page-locked or not; unlocked and given back when it is closed or dropped.

    Args:
        num_bytes: its size.
        page_lock: locks the block, None leaves it pageable.
    """

    block: torch.Tensor | None = None  # the memory, while there is some. [num_bytes] uint8

    def __init__(self, num_bytes: int, page_lock: PageLock | None) -> None:
        self.num_bytes = num_bytes
        self._page_lock = page_lock

    def allocate(self) -> torch.Tensor:
        """Allocate the memory, lock it and return it; apart from the constructor, so that its owner can close it."""
        self.block = allocate_block(self.num_bytes)
        if self._page_lock is not None:
            self._page_lock.lock(self.block)
        return self.block

    def close(self) -> None:
        """Unlock and free the block. Idempotent."""
        if self.block is not None:
            if self._page_lock is not None:
                self._page_lock.unlock(self.block)
            self.block = None

    def __del__(self) -> None:
        self.close()


Block = TypeVar("Block", bound=HostBlock)


def close_all(blocks: Collection[Closeable]) -> None:
    """Close blocks, or layers that have them, whatever interrupts that; what did is raised then."""

    def close() -> None:
        for block in blocks:
            block.close()

    if blocks:
        run_shielded(close, "sequoia-close")


def fill_all(
    blocks: Collection[Block], fill: Callable[[Block], object], message: Callable[[int, BaseException], str]
) -> None:
    """Let each block take its memory, all or nothing; else RuntimeError with `message(bytes there were, error)`."""
    done = 0
    try:
        for block in blocks:
            fill(block)
            done += block.num_bytes
    except BaseException as error:
        close_all(blocks)
        if isinstance(error, (RuntimeError, OSError, MemoryError)):
            raise RuntimeError(message(done, error)) from error
        raise


def available_host_bytes() -> int | None:
    """Memory that new allocations can have: what the system says and a container's limit leaves; None if unknown."""
    rooms = [_system_room(Path("/proc/meminfo")), _cgroup_room(Path("/proc/self/cgroup"), _CGROUPS)]
    return min((room for room in rooms if room is not None), default=None)


def _system_room(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_room(membership: Path, root: Path) -> int | None:
    """What the memory limits of this process's control groups leave, file pages counted as free."""
    try:
        entries = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    rooms = []
    for _, controllers, path in entries:
        version = 2 if controllers == "" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        top = root if version == 2 else root / "memory"
        # In a container the path may be the host's; the container's own group is then mounted at the top.
        group = top / path.strip("/")
        while True:
            rooms.append(_group_room(group, version))
            if group == top:
                break
            group = group.parent
    return min((room for room in rooms if room is not None), default=None)


def _group_room(group: Path, version: int) -> int | None:
    limit_file, usage_file, file_pages = _CGROUP_FILES[version]
    try:
        limit = (group / limit_file).read_text(encoding="ascii").strip()
        used = int((group / usage_file).read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return int(limit) - used + sum(int(statistics.get(name, 0)) for name in file_pages)
