"""The tree cache's storage."""

from __future__ import annotations

import torch
from support.tiny_families import tiny_model

from sequoia_kernels.models import adapt, causal_step


def test_tensors_are_the_layers_storage_in_order() -> None:
    cache = adapt(tiny_model("llama")).new_cache(3, 10)
    tensors = cache.tensors()
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 10, 2, 8)] * 4
    for index, layer in enumerate(cache.layers):
        assert tensors[2 * index] is layer.keys
        assert tensors[2 * index + 1] is layer.values
    assert all(not tensor.any() for tensor in tensors)
    assert (cache.batch_size, cache.max_cache_len) == (3, 10)


def test_keys_and_values_may_differ_in_width_and_layers_in_shape() -> None:
    latent = adapt(tiny_model("deepseek_v3")).new_cache(1, 4)
    assert [tensor.shape[-1] for tensor in latent.tensors()] == [16, 16, 16, 16]
    mixed = adapt(tiny_model("gemma4_text")).new_cache(1, 4)
    assert [layer.keys.shape[-1] for layer in mixed.layers] == [8, 16, 8, 16]


def test_a_cache_made_in_inference_mode_works_outside() -> None:
    model = adapt(tiny_model("llama"))
    with torch.inference_mode():
        cache = model.new_cache(1, 4)
    lens = torch.zeros(1, dtype=torch.int32)
    outside = model.forward(torch.tensor([[1, 2]]), cache, lens, causal_step(2))
    with torch.inference_mode():
        inside = model.forward(torch.tensor([[1, 2]]), cache, lens, causal_step(2))
    assert torch.equal(outside, inside)
    assert not any(tensor.is_inference() for tensor in cache.tensors())
    assert not outside.requires_grad


def test_reset_zeroes_in_place() -> None:
    model = adapt(tiny_model("llama"))
    cache = model.new_cache(1, 4)
    addresses = [tensor.data_ptr() for tensor in cache.tensors()]
    model.forward(torch.tensor([[1]]), cache, torch.zeros(1, dtype=torch.int32), causal_step(1))
    assert all(tensor.any() for tensor in cache.tensors())
    cache.reset()
    assert all(not tensor.any() for tensor in cache.tensors())
    assert [tensor.data_ptr() for tensor in cache.tensors()] == addresses
