"""On a CUDA device: layers that stream over its link, in order, without a host sync, within the budget.

Skipped, with the reason, where there is no device. Bodies that take a `device` run on the CPU as well, over a thread
instead of CUDA streams.
"""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from support.streamed_layers import decoder_layers
from support.tiny_families import tiny_model
from transformers import LlamaConfig

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.measure import calls
from sequoia_kernels.models import TreeStep, load_model, prefill
from sequoia_kernels.offload import CudaLink, ThreadLink, load_offloaded, normal_weights, random_offloaded
from sequoia_kernels.offload.host_memory import CudaPageLock, allocate_block
from sequoia_kernels.offload.host_weights import PackedLayer
from sequoia_kernels.offload.scheduler import LayerStreamer
from sequoia_kernels.offload.weights import MadeWeights

LAYERS = 5
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on_cuda(device):
    return torch.device(device).type == "cuda"


def numbered_layers(count, width, device):
    """Layers on the host, page-locked for CUDA, that hold their index everywhere."""
    layers = decoder_layers(count, widths=[width] * count)
    weights = MadeWeights(lambda name, tensor: tensor.fill_(int(name.split(".")[1])))
    lock = CudaPageLock() if on_cuda(device) else None
    names = {packed.name: packed.name for layer in layers for packed in layer.tensors}
    return layers, [PackedLayer(layer, lock).load(weights, names) for layer in layers]


def link_to(device, staging_bytes=0):
    return CudaLink(torch.device(device, 0), staging_bytes) if on_cuda(device) else ThreadLink()


class NoHostSync:
    """Raises where torch makes the host wait for the device."""

    def __init__(self, device):
        self.on = on_cuda(device)

    def __enter__(self):
        if self.on:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error):
        if self.on:
            torch.cuda.set_sync_debug_mode("default")


def run_passes(layers, streamer, device, passes, before, after):
    """Pass after pass, copy every layer's weights; returns them and what they should be."""
    seen, wanted = [], []
    with NoHostSync(device):
        for _ in range(passes):
            for index, layer in enumerate(layers):
                before(index)
                streamer.acquire(index)
                seen.append(layer.module.weight.clone())
                wanted.append(index)
                after(index)
                streamer.release()
    return seen, wanted


def busy(device, cycles):
    return lambda index: torch.cuda._sleep(cycles) if on_cuda(device) and index % 2 else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_buffers", [1, 2, 4])
@pytest.mark.parametrize("slow", ["nothing", "compute", "copies"])
def test_layers_arrive_before_they_run_and_are_not_overwritten_while_they_do(device, num_buffers, slow):
    """With long computations a copy must wait for its buffer, with long copies the computation for its layer."""
    width = 1 << 20 if on_cuda(device) and slow == "copies" else 1 << 10
    layers, sources = numbered_layers(LAYERS, width, device)
    streamer = LayerStreamer(layers, sources, num_buffers, torch.device(device), link_to(device))
    idle = busy(device, 0)
    long = busy(device, 20_000_000 if slow == "compute" else 0)
    seen, wanted = run_passes(layers, streamer, device, 4, idle, long)
    assert all(bool((weight == index).all()) for weight, index in zip(seen, wanted))
    streamer.close()


@pytest.mark.parametrize("device", DEVICES)
def test_another_stream_than_the_one_that_built_the_buffers(device):
    layers, sources = numbered_layers(LAYERS, 1 << 12, device)
    streamer = LayerStreamer(layers, sources, 2, torch.device(device), link_to(device))
    if on_cuda(device):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            seen, wanted = run_passes(layers, streamer, device, 3, busy(device, 0), busy(device, 1_000_000))
            streamer.close()  # waits for every stream before the buffers are freed
    else:
        seen, wanted = run_passes(layers, streamer, device, 3, busy(device, 0), busy(device, 0))
        streamer.close()
    assert all(bool((weight == index).all()) for weight, index in zip(seen, wanted))


# Page-locking


@pytest.mark.gpu
def test_blocks_are_locked_and_unlocked():
    lock, block = CudaPageLock(), allocate_block(3_000_000)
    assert not block.is_pinned()
    lock.lock(block)
    assert block.is_pinned()
    destination = torch.empty(3_000_000, dtype=torch.uint8, device="cuda")
    block.fill_(7)
    with NoHostSync("cuda"):
        destination.copy_(block, non_blocking=True)
    assert bool((destination == 7).all())
    lock.unlock(block)
    assert not block.is_pinned()


@pytest.mark.gpu
def test_a_failed_lock_leaves_nothing_for_the_next_launch_to_find():
    lock, block = CudaPageLock(), allocate_block(1 << 20)
    lock.lock(block)
    with pytest.raises(RuntimeError, match="cudaHostRegister failed"):
        lock.lock(block)  # twice
    assert int(torch.ones(3, device="cuda").sum()) == 3
    lock.unlock(block)
    lock.unlock(block)
    assert int(torch.ones(3, device="cuda").sum()) == 3


# Models


def config(layers=LAYERS, **more):
    return tiny_model("llama", num_hidden_layers=layers, **more).config


def resident_twin(device, dtype=torch.float32):
    return random_offloaded(config(), fill=normal_weights(), resident_layers=LAYERS, dtype=dtype, device=device)


def outputs(model, device, rows=10):
    """Prefill two prompts and score a tree behind each."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, model.vocab_size, (2, rows), generator=generator).to(device)
    lens = torch.tensor([rows, rows - 4], dtype=torch.int32, device=device)
    cache = model.new_cache(2, rows + TREE.num_nodes)
    first = prefill(model, cache, prompts, lens)
    nodes = torch.randint(0, model.vocab_size, (2, TREE.num_nodes), generator=generator).to(device)
    step = TreeStep.of(TREE.tensors(torch.device(device)))
    return [first, model.forward(nodes, cache, lens, step), *cache.tensors()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("resident_layers", "num_buffers"), [(0, 1), (0, 2), (2, 2), ([1, 4], 3)])
def test_outputs_equal_the_resident_twins_bit_for_bit(device, dtype, resident_layers, num_buffers):
    twin = resident_twin(device, dtype)
    options = {"resident_layers": resident_layers, "num_buffers": num_buffers, "dtype": dtype, "device": device}
    with random_offloaded(config(), fill=normal_weights(), **options) as model:
        for rows in (10, 60):
            for left, right in zip(outputs(model, device, rows), outputs(twin, device, rows), strict=True):
                assert torch.equal(left, right)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("host_memory", ["packed", "mapped"])
def test_a_checkpoint_streams_from_memory_and_from_its_files(tmp_path, device, host_memory):
    tiny_model("llama", num_hidden_layers=LAYERS).save_pretrained(tmp_path, max_shard_size="20KB")
    twin = adapt(load_model(tmp_path, device=device), forward="modules")
    with load_offloaded(tmp_path, device=device, resident_layers=1, host_memory=host_memory) as model:
        for _ in range(3):
            for left, right in zip(outputs(model, device, 60), outputs(twin, device, 60), strict=True):
                assert torch.equal(left, right)


@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_never_waits_for_the_device(device):
    with random_offloaded(config(), device=device, resident_layers=1) as model, torch.inference_mode():
        cache = model.new_cache(1, 64)
        call = calls.forward_call(model, cache, 16, calls.target_step(8, torch.device(device)))
        expected = call()
        if on_cuda(device):
            torch.cuda.synchronize()
        with NoHostSync(device):
            found = [call() for _ in range(3)]
        assert all(torch.equal(logits, expected) for logits in found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_equals_the_resident_twins(device, temperature, caplog):
    """With the draft's part captured and without; and no pass is launched that is not needed."""
    draft = adapt(tiny_model("llama", seed=3, num_hidden_layers=1).to(device))
    prompts = torch.tensor([[5, 9, 11, 2], [3, 3, 7, 8]], device=device)
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 7, "eos_token_id": ()}
    twin = resident_twin(device)
    expected = generate(twin, draft, prompts, tree=TREE, cuda_graphs=False, **options)
    with (
        random_offloaded(config(), fill=normal_weights(), resident_layers=2, device=device) as model,
        caplog.at_level(logging.INFO, logger="sequoia_kernels"),
    ):
        for graphs in (True, False, True):
            output = generate(model, draft, prompts, tree=TREE, cuda_graphs=graphs, **options)
            assert output.new_tokens == expected.new_tokens
        assert generate(model, None, prompts, **options).stats.num_steps == 23
    messages = [record.getMessage() for record in caplog.records]
    assert not [text for text in messages if "capture is off" in text]
    assert len([text for text in messages if "draft's part of a step only" in text]) == (1 if on_cuda(device) else 0)


@pytest.mark.gpu
def test_streamed_layers_are_not_captured():
    with random_offloaded(config(), device="cuda", resident_layers=1) as model, torch.inference_mode():
        call = calls.forward_call(model, model.new_cache(1, 64), 16, calls.target_step(8, torch.device("cuda")))
        expected = call()
        with (
            pytest.raises(RuntimeError, match="layers that stream from the host cannot be captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            call()
        torch.cuda.synchronize()
        assert torch.equal(call(), expected)


# Memory


@pytest.mark.gpu
@pytest.mark.parametrize("prompt_rows", [16, 3000])
def test_peak_device_memory_stays_within_the_budget_and_is_given_back(prompt_rows):
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=32, num_attention_heads=16,
        max_position_embeddings=4096, eos_token_id=None,
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rows = prompt_rows + 256
    options = {"dtype": torch.bfloat16, "max_cache_len": rows, "max_rows": 256, "device": "cuda"}
    with random_offloaded(shape, device_memory_budget="1GiB", **options) as model, torch.inference_mode():
        assert 0 < len(model.memory.streamed) < 32
        cache = model.new_cache(1, rows)
        prompt = torch.ones(1, prompt_rows, dtype=torch.int64, device="cuda")
        prefill(model, cache, prompt, torch.tensor([prompt_rows], device="cuda"))
        calls.forward_call(model, cache, prompt_rows, calls.target_step(256, torch.device("cuda")))()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= model.memory.total_bytes <= 1 << 30
    del model, cache
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 10 * (32 << 20)  # what cuBLAS keeps for its threads


@pytest.mark.gpu
def test_a_budget_beyond_the_free_memory_is_refused_before_anything_is_loaded():
    def unexpected(name, tensor):
        raise AssertionError(f"{name} was made")

    free = torch.cuda.mem_get_info()[0]
    with pytest.raises(RuntimeError, match=r"the device must have .* free for this plan"):
        random_offloaded(
            config(max_position_embeddings=1 << 20), fill=unexpected, device="cuda", resident_layers=0,
            max_cache_len=1 << 20, batch_size=free // (1 << 26),
        )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_closing_while_copies_are_under_way(device):
    layers, sources = numbered_layers(LAYERS, 1 << 18, device)
    streamer = LayerStreamer(layers, sources, 3, torch.device(device), link_to(device))
    streamer.acquire(0)
    streamer.close()
    assert all(source.block is None for source in sources)
    assert streamer.buffers == []
    with pytest.raises(RuntimeError, match="must be open"):
        streamer.acquire(1)
