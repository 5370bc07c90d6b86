"""The host's memory: blocks, what is left of it inside and outside of a container, and page-locking."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sequoia_kernels.offload import host_memory
from sequoia_kernels.offload.link import _locked_blocks


def anonymous_bytes() -> int:
    """Memory of this process that is neither a file nor shared."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_blocks_are_aligned_to_pages_and_exact() -> None:
    for num_bytes in (1, 4097, 300_000):
        block = host_memory.allocate_block(num_bytes)
        assert block.numel() == num_bytes
        assert block.data_ptr() % mmap.PAGESIZE == 0
        assert not block.any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
def test_blocks_are_the_process_own_memory_and_go_back_at_once() -> None:
    before = anonymous_bytes()
    block = host_memory.allocate_block(64 << 20).fill_(1)
    during = anonymous_bytes()
    del block
    assert during - before >= 60 << 20
    assert anonymous_bytes() - before <= 4 << 20


# What is left


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def group(limit: object, used: int, file_pages: int, version: int = 2) -> dict[str, object]:
    if version == 2:
        statistics = f"anon 5\ninactive_file {file_pages}\nactive_file 0\nshmem 7"
        return {"memory__max": limit, "memory__current": used, "memory__stat": statistics}
    statistics = f"inactive_file 1\ntotal_inactive_file {file_pages}\ntotal_active_file 0"
    return {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used, "memory__stat": statistics}


def test_the_tightest_control_group_counts_and_file_pages_are_free(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/outer/inner\n")
    write(tmp_path / "root", memory__stat="anon 5")  # the top has no limit
    write(tmp_path / "root" / "outer", **group(1000, 700, 100))
    write(tmp_path / "root" / "outer" / "inner", **group("max", 600, 0))
    assert host_memory._cgroup_room(tmp_path / "membership", tmp_path / "root") == 400
    write(tmp_path / "root" / "outer" / "inner", **group(650, 600, 10))
    assert host_memory._cgroup_room(tmp_path / "membership", tmp_path / "root") == 60


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("9:name=systemd:/\n4:hugetlb,memory:/of/the/host\n3:cpuset:/\n0::/\n")
    write(tmp_path / "root" / "memory", **group(1000, 900, 50, version=1))  # a container's own group, at the top
    assert host_memory._cgroup_room(tmp_path / "membership", tmp_path / "root") == 150


def test_no_limits_no_files_and_other_systems(tmp_path: Path) -> None:
    assert host_memory._cgroup_room(tmp_path / "none", tmp_path) is None
    assert host_memory._system_room(tmp_path / "none") is None
    (tmp_path / "membership").write_text("0::/\n")
    assert host_memory._cgroup_room(tmp_path / "membership", tmp_path) is None
    write(tmp_path, memory__max="max", memory__current="not a number", memory__stat="")
    assert host_memory._cgroup_room(tmp_path / "membership", tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    3 kB\n")
    assert host_memory._system_room(tmp_path / "meminfo") == 3072


@pytest.mark.parametrize(
    ("system", "container", "expected"), [(10, None, 10), (10, 4, 4), (3, 4, 3), (None, None, None)]
)
def test_a_container_gets_what_its_limit_leaves(
    monkeypatch: pytest.MonkeyPatch, system: int | None, container: int | None, expected: int | None
) -> None:
    monkeypatch.setattr(host_memory, "_system_room", lambda meminfo: system)
    monkeypatch.setattr(host_memory, "_cgroup_room", lambda membership, root: container)
    assert host_memory.available_host_bytes() == expected


# Page-locking


class _Runtime:
    """Stands in for the CUDA runtime: registers blocks until `limit` bytes are locked."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.registered: dict[int, tuple[int, int]] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if sum(size for size, _ in self.registered.values()) + num_bytes > self.limit:
            return 2
        self.registered[address] = num_bytes, flags
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else 62


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> _Runtime:
    found = _Runtime(limit=10_000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


def test_exactly_the_blocks_bytes_are_registered_for_all_devices(runtime: _Runtime) -> None:
    lock, block = host_memory.CudaPageLock(), host_memory.allocate_block(5000)
    lock.lock(block)
    assert runtime.registered == {block.data_ptr(): (5000, 1)}
    lock.unlock(block)
    assert runtime.registered == {}


def test_a_failed_registration_leaves_no_error_behind(runtime: _Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime remembers the error of a call, and torch would raise it at the next launch."""
    forgotten: list[Any] = []
    monkeypatch.setattr(host_memory, "_forget_cuda_error", lambda: forgotten.append(None))
    with pytest.raises(RuntimeError, match="cudaHostRegister failed with error 2"):
        host_memory.CudaPageLock().lock(host_memory.allocate_block(10_001))
    assert len(forgotten) == 1
    host_memory.CudaPageLock().unlock(host_memory.allocate_block(1))  # registered by nobody
    assert len(forgotten) == 2


def test_pages_are_locked_and_unlocked_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing runs in a thread of its own, whose current device is the machine's first."""
    current, seen = [0], []

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    runtime = SimpleNamespace(
        cudaHostRegister=lambda *arguments: seen.append(current[-1]) or 0,
        cudaHostUnregister=lambda *arguments: seen.append(current[-1]) or 1,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(host_memory, "_forget_cuda_error", lambda: seen.append(current[-1]))
    block = host_memory.HostBlock(5000, host_memory.CudaPageLock(torch.device("cuda", 1)))
    block.allocate()
    host_memory.close_all([block])
    assert seen == [1, 1, 1]
    assert block.block is None


def test_forgetting_swallows_the_error_that_the_next_launch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(value: float) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: SimpleNamespace(fill_=launch))
    host_memory._forget_cuda_error()


def test_staging_blocks_are_locked_all_or_none(runtime: _Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_forget_cuda_error", lambda: None)
    assert [block.num_bytes for block in _locked_blocks(5000, 2, host_memory.CudaPageLock())] == [5000, 5000]
    assert runtime.registered == {}  # dropped
    message = r"the host must have 15.62 KiB of memory that can be page-locked for staging, got 7.81 KiB \(cudaHost"
    with pytest.raises(RuntimeError, match=message):
        _locked_blocks(8000, 2, host_memory.CudaPageLock())
    assert runtime.registered == {}
