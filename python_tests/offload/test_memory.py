"""Which layers stay on the device, what it all adds up to, and sizes as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_families import tiny_model

from sequoia_kernels.offload import memory_plan, plan_memory
from sequoia_kernels.offload.memory import format_bytes, parse_bytes, spread_layers


@pytest.mark.parametrize("num_resident", range(9))
def test_a_number_of_layers_stays_and_the_rest_is_spread_evenly(num_resident: int) -> None:
    plan = plan_memory([10] * 8, 7, resident_layers=num_resident, num_buffers=3)
    assert len(plan.resident) == num_resident
    assert sorted(plan.resident + plan.streamed) == list(range(8))
    assert plan.num_buffers == min(3, 8 - num_resident)
    assert plan.total_bytes == 7 + 10 * (num_resident + plan.num_buffers)
    # No run of resident layers is longer than even spreading makes it.
    gaps = [after - before - 1 for before, after in zip(plan.streamed, [*plan.streamed[1:], 8])]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_budget_is_filled_and_never_exceeded() -> None:
    sizes = [30, 10, 20, 10, 20, 10, 30, 10]
    least = plan_memory(sizes, 5, resident_layers=0, kv_bytes=3, workspace_bytes=2).total_bytes
    for budget in range(least, sum(sizes) + 12):
        plan = plan_memory(sizes, 5, budget_bytes=budget, kv_bytes=3, workspace_bytes=2)
        assert plan.total_bytes <= budget
        assert plan.resident_bytes == sum(sizes[index] for index in plan.resident)
        assert plan.streamed_bytes == sum(sizes[index] for index in plan.streamed)
        assert plan.buffer_bytes == max((sizes[index] for index in plan.streamed), default=0)
        if len(plan.resident) < 8:
            more = plan_memory(sizes, 5, resident_layers=len(plan.resident) + 1, kv_bytes=3, workspace_bytes=2)
            assert more.total_bytes > budget
    assert plan.streamed == ()
    assert plan.num_buffers == 0


def test_a_budget_too_small_for_one_layer_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"device_memory_budget must be at least 235 bytes for this model, got 234"):
        plan_memory([100] * 4, 20, budget_bytes=234, kv_bytes=10, workspace_bytes=5)
    assert plan_memory([100] * 4, 20, budget_bytes=235, kv_bytes=10, workspace_bytes=5).resident == ()
    with pytest.raises(ValueError, match="at least 435 bytes"):
        plan_memory([100] * 4, 20, budget_bytes=300, resident_layers=2, kv_bytes=10, workspace_bytes=5)


@pytest.mark.parametrize(("arguments", "message"), [({"resident_layers": 5}, "in 0..4"), ({"num_buffers": 0}, "got 0")])
def test_numbers_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_memory([1] * 4, 0, **arguments)


def test_layers_that_stay_can_be_named() -> None:
    plan = plan_memory([10, 20, 30, 40], 7, resident_layers=[2, 0], num_buffers=3)
    assert plan.resident == (0, 2)
    assert plan.streamed == (1, 3)
    assert (plan.resident_bytes, plan.streamed_bytes, plan.num_buffers, plan.buffer_bytes) == (40, 60, 2, 40)
    with pytest.raises(ValueError, match="at least 127 bytes"):
        plan_memory([10, 20, 30, 40], 7, budget_bytes=126, resident_layers=[2, 0], num_buffers=3)


def test_shared_weights_take_host_memory_once_and_are_copied_every_time() -> None:
    plan = plan_memory([10] * 6, 7, resident_layers=[0, 4], weights_of=[0, 1, 1, 1, 1, 5])
    assert (plan.streamed_bytes, plan.host_bytes) == (40, 20)
    assert "host 20 B: 4 layers, 40 B copied in every pass" in plan.describe()
    assert plan_memory([10] * 6, 7, resident_layers=2).host_bytes == 40


def test_on_cuda_its_libraries_are_counted(tmp_path: Path) -> None:
    tiny_model("llama", max_position_embeddings=4096).save_pretrained(tmp_path)
    for rows, workspaces in ((100, 5), (4096, 12)):  # a thread and its workspace for each 512 tokens of a prompt
        plans = [memory_plan(tmp_path, device=device, max_cache_len=rows) for device in ("cpu", "cuda")]
        assert plans[1].total_bytes - plans[0].total_bytes == workspaces << 25
    assert plans[1].resident == ()


def test_spread_starts_with_the_first_layer() -> None:
    assert spread_layers(8, 3) == (0, 2, 5)
    assert spread_layers(8, 0) == ()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [(123, 123), ("123", 123), ("20GiB", 20 << 30), ("1.5 MiB", 3 << 19), ("2kb", 2000), ("3 GB", 3 * 10**9)],
)
def test_sizes_are_read(text: int | str, num_bytes: int) -> None:
    assert parse_bytes("size", text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "20 apples", "-1GiB", "0", 0, -5])
def test_no_size(text: int | str) -> None:
    with pytest.raises(ValueError, match="load_offloaded: size must be"):
        parse_bytes("size", text)


@pytest.mark.parametrize("value", [1.5, True, None])
def test_sizes_of_the_wrong_type(value: object) -> None:
    with pytest.raises(TypeError, match="load_offloaded: size must be a number of bytes or text"):
        parse_bytes("size", value)  # type: ignore[arg-type]


def test_sizes_are_written() -> None:
    assert [format_bytes(size) for size in (12, 2048, 3 << 19, 5 << 30)] == ["12 B", "2.00 KiB", "1.50 MiB", "5.00 GiB"]


def test_the_description_names_all_parts() -> None:
    text = plan_memory([1 << 20] * 4, 1 << 10, budget_bytes=4 << 20, kv_bytes=5, workspace_bytes=6).describe()
    for part in ("of 4.00 MiB: 1 of 4 layers 1.00 MiB", "2 buffers of 1.00 MiB", "values 5 B", "host 3.00 MiB"):
        assert part in text


def test_a_configuration_alone_is_planned_like_the_files(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    options = {"device": "cuda", "dtype": torch.bfloat16, "max_cache_len": 300, "resident_layers": 1}
    assert memory_plan(model.config, **options) == memory_plan(tmp_path, **options)
