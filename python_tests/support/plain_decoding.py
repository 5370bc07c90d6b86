"""Greedy text of `generate` against transformers' own loop on the same model, near-ties told from errors."""

from __future__ import annotations

from typing import Any

import torch
from support.tolerances import NEAR_TIE
from transformers import DynamicCache

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.models.families import cache_argument

TREES = {
    "chain": TokenTree.chain(5),
    "star": TokenTree([-1, 0, 0, 0]),
    "tree": TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 10]),
}


def own_text(model: Any, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """What the model's own `generate` says behind a prompt [1, L]."""
    tokens = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=num_tokens,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return tokens[0, prompt.shape[1] :].tolist()


@torch.no_grad()
def _logits(model: Any, prompt: torch.Tensor, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits before each token of a text: all rows in one forward, and row by row. [tokens, vocab]."""
    rows = model(input_ids=torch.cat((prompt, torch.tensor([text])), 1)).logits[0, prompt.shape[1] - 1 : -1].float()
    cache, fed, single = DynamicCache(config=model.config), prompt, []
    for token in text:
        logits = model(input_ids=fed, use_cache=True, **{cache_argument(model): cache}).logits
        single.append(logits[0, -1].float())
        fed = torch.tensor([[token]])
    return rows, torch.stack(single)


def assert_is_own_text(
    model: Any, prompt: torch.Tensor, text: list[int], exactly: bool, expected: list[int] | None = None
) -> None:
    """Fail where a text is not the model's own greedy one (`expected`, where that is known).

    Unless `exactly`, a token may be another one than the likeliest by a near-tie of the model's own logits, of one row
    and of several rows at once: rounding, which a wrong position or mask exceeds by far.
    """
    if expected is None:
        expected = own_text(model, prompt, len(text))
    if exactly or text == expected:
        assert text == expected
        return
    for logits in _logits(model, prompt, text):
        behind = logits.max(-1).values - logits[torch.arange(len(text)), text]
        assert float(behind.max()) <= NEAR_TIE * float(logits.std())


def assert_trees_decode_as_alone(
    target: Any, model: Any, draft: Any, prompts: list[torch.Tensor], exactly: bool, num_tokens: int = 12
) -> dict[str, float]:
    """Compare every tree, for the first prompt alone and for all in one batch; give tokens per step by tree.

    Args:
        target: what `generate` is given.
        model: whose own loop is the oracle.
        prompts: [1, L] each, of different lengths.
    """
    width = max(prompt.shape[1] for prompt in prompts)
    padded, mask = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        padded[row, width - prompt.shape[1] :] = prompt[0]
        mask[row, width - prompt.shape[1] :] = 1
    expected = [own_text(model, prompt, num_tokens) for prompt in prompts]
    steps = {}
    for name, tree in TREES.items():
        settings = {"tree": tree, "max_new_tokens": num_tokens, "eos_token_id": ()}
        alone = generate(target, draft, prompts[0], **settings)
        assert_is_own_text(model, prompts[0], alone.new_tokens[0], exactly, expected[0])
        if len(prompts) > 1:
            together = generate(target, draft, padded, mask, **settings)
            for prompt, text, own in zip(prompts, together.new_tokens, expected, strict=True):
                assert_is_own_text(model, prompt, text, exactly, own)
        steps[name] = alone.stats.tokens_per_step
    return steps
