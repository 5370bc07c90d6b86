"""Tokens per step of any lossless sampler and any tree, from one text of the target.

A lossless loop emits the target's distribution whatever its sampler and tree, so one text serves for all of them: in
how many steps would the loop have emitted it? docs/robustness.md tells how the place in the tree moves along the text.
The expected number of steps follows without drawing a coin, and samplers and trees are compared on the very same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common.samplers import Sampler, cut_draft
from sequoia_kernels import TokenTree, generate
from sequoia_kernels.models import TreeModel, causal_step
from sequoia_kernels.ops.warping import warped_probs

# Elements of one [contexts, vocab] float64 tensor; about a dozen are alive at once.
MAX_ELEMENTS = 1 << 22


class Texts(NamedTuple):
    """Texts that the target wrote."""

    sequences: Tensor  # prompts and what was written behind them. [P, prompt_len + written] int64.
    prompt_len: int  # tokens of every prompt
    temperature: float  # of target and draft
    top_p: float  # of the target; 1 is off

    @property
    def num_positions(self) -> int:
        """Emitted tokens behind the first one, which the prefill gives."""
        return self.sequences.shape[1] - self.prompt_len - 1


def write_texts(
    target: TreeModel, prompts: Tensor, num_positions: int, temperature: float, top_p: float, seed: int
) -> Texts:
    """Let the target write, one token a step. Prompts are [P, length], all of the same length."""
    output = generate(
        target, None, prompts, max_new_tokens=num_positions + 1, temperature=temperature, top_p=top_p,
        eos_token_id=(), seed=seed,
    )  # fmt: skip
    return Texts(output.sequences, prompts.shape[1], temperature, top_p)


@torch.inference_mode()
def acceptance_of_texts(
    texts: Texts, target: TreeModel, draft: TreeModel, samplers: Sequence[Sampler], num_ranks: int, seed: int
) -> list[Tensor]:
    """Give `acceptance_of_emitted` at every position, for each sampler. [P, positions, num_ranks] float64, on CPU."""
    width = target.vocab_size
    num_prompts, length = texts.sequences.shape
    rows = max(1, MAX_ELEMENTS // (texts.num_positions * width))
    per_chunk: list[list[Tensor]] = [[] for _ in samplers]
    for start in range(0, num_prompts, rows):
        sequences = texts.sequences[start : start + rows]
        kept = slice(texts.prompt_len, length - 1)
        target_logits = _logits(target, sequences)[:, kept].flatten(0, 1).double()
        draft_logits = _logits(draft, sequences)[:, kept].flatten(0, 1).double()
        if draft_logits.shape[1] < width:  # tokens that the draft does not know
            draft_logits = torch.nn.functional.pad(draft_logits, (0, width - draft_logits.shape[1]), value=-torch.inf)
        draft_logits = draft_logits[:, :width]
        settings = (torch.full((len(target_logits),), value) for value in (texts.temperature, texts.top_p))
        temperature, top_p = (value.to(target_logits.device) for value in settings)
        probs = warped_probs(target_logits, temperature, None, top_p)
        emitted = sequences[:, texts.prompt_len + 1 :].flatten()
        for index, sampler in enumerate(samplers):
            generator = torch.Generator(target_logits.device).manual_seed(seed + start)
            drafted = draft_logits
            if sampler.cuts_draft and texts.temperature > 0:
                drafted = cut_draft(draft_logits, texts.temperature, texts.top_p)
            acceptance = sampler.acceptance_of_emitted(probs, drafted, texts.temperature, emitted, num_ranks, generator)
            per_chunk[index].append(acceptance.view(len(sequences), -1, num_ranks).cpu())
    return [torch.cat(chunks) for chunks in per_chunk]


def _logits(model: TreeModel, sequences: Tensor) -> Tensor:
    """Logits behind every token. [P, length, vocab]."""
    batch_size, length = sequences.shape
    cache_lens = torch.zeros(batch_size, dtype=torch.int32, device=sequences.device)
    cache = model.new_cache(batch_size, length)
    return model.forward(sequences, cache, cache_lens, causal_step(length, sequences.device))


class Replay(NamedTuple):
    """Expected counts of each text. [P] float64."""

    tokens: Tensor  # emitted by the steps that were begun
    steps: Tensor  # begun
    cut: Tensor  # steps that the end of the text cut short; their tokens so far count


def replay(tree: TokenTree, acceptance: Tensor, num_starts: int) -> Replay:
    """Follow the place in the tree through the texts, of which `acceptance` is [P, positions, ranks].

    Steps begin at the first `num_starts` positions; those behind only end what was begun, so that long steps count as
    much as short ones.
    """
    num_texts, num_positions, num_ranks = acceptance.shape
    if tree.max_branching > num_ranks:
        raise ValueError(f"replay: tree must have at most {num_ranks} children a node, got {tree.max_branching}")
    parents = torch.tensor(tree.parents[1:], dtype=torch.int64)
    ranks = torch.tensor([tree.rank(node) for node in range(1, tree.num_nodes)], dtype=torch.int64)
    place = torch.zeros(num_texts, tree.num_nodes, dtype=torch.float64)  # probability of being at each node
    place[:, 0] = 1
    tokens, steps = (torch.zeros(num_texts, dtype=torch.float64) for _ in range(2))
    for position in range(num_positions):
        on_the_way = place.sum(dim=1)
        steps += place[:, 0]
        tokens += on_the_way
        accepted = place[:, parents] * acceptance[:, position, ranks]
        place[:, 1:] = accepted
        place[:, 0] = (on_the_way - accepted.sum(dim=1)).clamp(min=0) if position + 1 < num_starts else 0
    return Replay(tokens, steps, place[:, 1:].sum(dim=1))


class Estimate(NamedTuple):
    """A ratio of sums over texts."""

    mean: float  # the ratio
    se: float  # its standard error over the texts
    influence: Tensor  # what each text adds to its deviation; differences of these give paired standard errors. [P].


def ratio(tokens: Tensor, steps: Tensor) -> Estimate:
    """Tokens per step with its standard error, texts being independent."""
    mean = float(tokens.sum() / steps.sum())
    influence = (tokens - mean * steps) / steps.mean()
    return Estimate(mean, _standard_error(influence), influence)


def difference(first: Estimate, second: Estimate) -> tuple[float, float]:
    """first - second on the same texts, and its paired standard error."""
    return first.mean - second.mean, _standard_error(first.influence - second.influence)


def _standard_error(influence: Tensor) -> float:
    return float(influence.std()) / math.sqrt(len(influence)) if len(influence) > 1 else math.nan


def as_row(estimate: Estimate) -> dict[str, Any]:
    """For the document."""
    return {"mean": estimate.mean, "se": estimate.se}
