"""Prefill of ragged prompts in chunks."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.sequential import last_logits, tree_logits
from support.tiny_families import VOCAB, tiny_model

from sequoia_kernels.models import TreeModel, adapt, causal_step, prefill

# By its name: the package's attribute of this name is the function.
prefill_module = importlib.import_module("sequoia_kernels.models.prefill")

TOLERANCE = 3e-5
LENGTHS = [13, 1, 8, 5, 4, 12]


@pytest.fixture(params=[3, 4, 512], ids=lambda rows: f"chunks of {rows}")
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(prefill_module, "_CHUNK_ROWS", request.param)
    return request.param


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("keeps_logits", [True, False], ids=["head on one row", "head on all rows"])
def test_last_logits_of_ragged_prompts(family: str, keeps_logits: bool, chunk_rows: int) -> None:
    """More requests than rows in a chunk as well as fewer; heads that can and cannot be told which rows to keep."""
    plain = tiny_model(family)
    model = adapt(plain)
    model = TreeModel(plain, model._plan._replace(takes_logits_to_keep=keeps_logits))
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    lens = torch.tensor(LENGTHS, dtype=torch.int32)
    cache = model.new_cache(len(LENGTHS), 20)
    logits = prefill(model, cache, prompts, lens)
    assert logits.shape == (len(LENGTHS), 1, VOCAB)
    for request, length in enumerate(LENGTHS):
        expected = last_logits(plain, prompts[request, :length].tolist())
        torch.testing.assert_close(logits[request, 0], expected, rtol=0, atol=TOLERANCE)

    # Rows past a prompt's end hold garbage by now; the next step must not see it.
    tokens = torch.randint(VOCAB, (len(LENGTHS), 3), generator=generator)
    scored = model.forward(tokens, cache, lens, causal_step(3))
    for request, length in enumerate(LENGTHS):
        expected = tree_logits(plain, prompts[request, :length].tolist(), tokens[request].tolist(), [-1, 0, 1])
        torch.testing.assert_close(scored[request], expected, rtol=0, atol=TOLERANCE)


def test_one_prompt_keeps_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model("llama")
    model = adapt(plain, forward="modules")
    cache = model.new_cache(1, 40)
    rows = []
    plain.lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(tuple(inputs[0].shape)))
    logits = prefill(model, cache, torch.arange(40)[None], torch.tensor([40]))
    assert rows == [(1, 1, 32)]
    torch.testing.assert_close(logits[0, 0], last_logits(plain, list(range(40))), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("tokens", "lens", "message"),
    [
        (torch.ones(1, 0, dtype=torch.int64), [1], r"input_ids must have shape \[batch, length\]"),
        (torch.ones(3, dtype=torch.int64), [1], r"input_ids must have shape \[batch, length\]"),
        (torch.ones(1, 9, dtype=torch.int64), [9], "input_ids must fit the cache of 8 rows, got 9 tokens"),
        (torch.ones(1, 4, dtype=torch.int64), [4, 4], r"prompt_lens must have shape \[batch\] = \[1\], got \[2\]"),
        (torch.ones(1, 4, dtype=torch.int64), [0], r"prompt_lens must be in 1\.\.4, got \[0\]"),
        (torch.ones(1, 4, dtype=torch.int64), [5], r"prompt_lens must be in 1\.\.4, got \[5\]"),
    ],
)
def test_bad_arguments(tokens: torch.Tensor, lens: list[int], message: str) -> None:
    model = adapt(tiny_model("llama"))
    cache = model.new_cache(1, 8)
    with pytest.raises(ValueError, match=f"prefill: {message}"):
        prefill(model, cache, tokens, torch.tensor(lens))
    assert all(not tensor.any() for tensor in cache.tensors())
