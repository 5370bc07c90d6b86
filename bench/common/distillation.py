"""Texts that a target wrote, with what its head got at every token; and a loss that compares a draft with it there.

A target's distribution is its head applied to its last hidden state. So a text with those states, 1 kB a token and not
a row of the vocabulary, holds all that a draft can be taught on it: the head makes the distribution anew. Drafts that
read further hidden states of the target get them from the same forwards, kept beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sequoia_kernels.documents import write_bytes
from sequoia_kernels.models import TreeModel, causal_step, prefill
from sequoia_kernels.ops import sample_without_replacement

# Of the draft from the target: Kullback-Leibler divergence in nats; 1 - total variation, which is how often the first
# drawn child is accepted at temperature 1; whether both have the same most probable token.
MEASURES = ("divergence", "overlap", "same_first")
LOSS_ROWS = 64  # of the vocabulary, alive at once: some tens of megabytes, which caches hold


class Texts(NamedTuple):
    """Texts one behind the other, each a prompt and what was written behind it."""

    tokens: Tensor  # of all texts. [T] int64
    hidden: Tensor  # what the target's head got at each of them. [T, width] bfloat16
    lens: Tensor  # tokens of each text. [P] int64
    prompt_lens: Tensor  # of them the prompt's. [P] int64
    features: Tensor = torch.empty(0, 0)  # hidden states that a draft reads, side by side. [T, layers * width] bfloat16
    log_normalisers: Tensor = torch.empty(0, 0)  # of the target at some temperatures. [T, temperatures] float32

    @property
    def num_written(self) -> int:
        """Tokens that the target wrote."""
        return int((self.lens - self.prompt_lens).sum())

    def part(self, first: int, last: int) -> Texts:
        """Some of the texts."""
        rows = slice(int(self.lens[:first].sum()), int(self.lens[:last].sum()))
        of_tokens = {
            name: getattr(self, name)[rows] for name in ("tokens", "hidden", "features", "log_normalisers")
        }  # fmt: skip
        return self._replace(**of_tokens, lens=self.lens[first:last], prompt_lens=self.prompt_lens[first:last])

    @property
    def written(self) -> Tensor:
        """Where the target chose the next token, so that a draft has to foretell it. [T] bool."""
        places = [torch.arange(count) >= asked - 1 for count, asked in zip(self.lens.tolist(), self.prompt_lens)]
        return torch.cat(places)

    def save(self, path: Path, settings: str, minutes: float) -> None:
        """Write a file, whole or not at all: `settings` say how the texts came about, `minutes` how long it took."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(self._asdict(), {"settings": settings, "minutes": str(minutes)}))

    @classmethod
    def load(cls, path: Path, settings: str) -> tuple[Texts, float] | None:
        """Read a file and give texts and minutes; None where there is none, or one with other settings."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("settings") != settings:
                return None
            return cls(*(file.get_tensor(name) for name in cls._fields)), float(facts["minutes"])


class Batch(NamedTuple):
    """Some texts side by side, padded on the right."""

    tokens: Tensor  # [B, L] int64
    written: Tensor  # where the target chose the next token, so that a draft has to foretell it. [B, L] bool
    hidden: Tensor  # the target's, at these places in order of rows. [written, width] float32
    features: Tensor  # what a draft reads, 0 behind a text's end. [B, L, layers * width] bfloat16
    log_normalisers: Tensor  # at the places of `hidden`. [written, temperatures] float32

    @classmethod
    def of(cls, texts: Texts, chosen: Sequence[int]) -> Batch:
        """Put the chosen texts side by side."""
        begins = texts.lens.cumsum(0) - texts.lens
        length = int(texts.lens[list(chosen)].max())
        tokens = torch.zeros(len(chosen), length, dtype=torch.int64)
        written = torch.zeros(len(chosen), length, dtype=torch.bool)
        features = texts.features.new_zeros(len(chosen), length, texts.features.shape[1])
        hidden, normalisers = [], []
        for row, index in enumerate(chosen):
            begin, count, asked = (int(values[index]) for values in (begins, texts.lens, texts.prompt_lens))
            tokens[row, :count] = texts.tokens[begin : begin + count]
            written[row, asked - 1 : count] = True
            chose = slice(begin + asked - 1, begin + count)
            hidden.append(texts.hidden[chose])
            normalisers.append(texts.log_normalisers[chose])
            if features.shape[2]:
                features[row, :count] = texts.features[begin : begin + count]
        return cls(tokens, written, torch.cat(hidden).float(), features, torch.cat(normalisers))


@torch.no_grad()
def write_texts(
    target: TreeModel,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    num_tokens: int,
    layers: Sequence[int] = (),
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda tokens: None,
    go_on: Callable[[], bool] = lambda: True,
) -> Texts:
    """Let a target write behind prompts, and keep what its head got.

    Args:
        target: the target.
        prompts: token ids of each prompt.
        temperatures: taken in turn.
        num_tokens: tokens written behind each prompt, past an end-of-text token as well.
        layers: hidden states to keep beside, numbered as transformers' `hidden_states`.
        batch_size: prompts at work together.
        seed: of the first prompt; the others count on from it. What is written does not depend on the batch.
        progress: called with the tokens written since the last call.
        go_on: asked before each batch behind the first; the texts end where it says no.

    Returns:
        The texts. The last token written has no hidden state and is left out.
    """
    parts = []
    for first in range(0, len(prompts), batch_size):
        if parts and not go_on():
            break
        group = prompts[first : first + batch_size]
        numbers = range(first, first + len(group))
        of_group = torch.tensor([temperatures[number % len(temperatures)] for number in numbers])
        parts.append(_write_batch(target, group, of_group, torch.tensor(numbers) + seed, num_tokens, layers, progress))
    return Texts(*(torch.cat(tensors) for tensors in zip(*parts)))


def _write_batch(
    target: TreeModel, prompts: Sequence[Sequence[int]], temperatures: Tensor, seeds: Tensor, num_tokens: int,
    layers: Sequence[int], progress: Callable[[int], Any],
) -> Texts:  # fmt: skip
    batch_size, longest = len(prompts), max(map(len, prompts))
    device, last = target.device, target.num_layers
    lens = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(batch_size, longest + num_tokens, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    cache = target.new_cache(batch_size, longest + num_tokens)
    cache_lens = lens.to(device, torch.int32)
    states: dict[int, Tensor] = {number: torch.empty(0) for number in (last, *layers)}
    logits = prefill(target, cache, tokens[:, :longest].to(device), cache_lens, hidden_states=states)
    hidden = torch.zeros(batch_size, longest + num_tokens, states[last].shape[-1], dtype=torch.bfloat16)
    hidden[:, :longest] = states[last].to("cpu", torch.bfloat16)
    features = hidden.new_zeros(*hidden.shape[:2], len(layers) * hidden.shape[2])

    def keep_features(rows: Any, places: Any) -> None:
        if layers:
            read = torch.cat([states[number] for number in layers], -1).to("cpu", torch.bfloat16)
            features[rows, places] = read if isinstance(places, slice) else read[:, 0]

    keep_features(slice(None), slice(0, longest))
    rows, temperatures, seeds = torch.arange(batch_size), temperatures.to(device), seeds.to(device)
    for count in range(num_tokens):
        offsets = torch.full((batch_size,), count, dtype=torch.int64, device=device)
        drawn = sample_without_replacement(logits[:, -1], 1, temperatures, seeds, offsets).tokens
        places = lens + count
        tokens[rows, places] = drawn[:, 0].cpu()
        progress(batch_size)
        if count + 1 == num_tokens:
            break
        logits = target.forward(drawn, cache, cache_lens, causal_step(1, device), hidden_states=states)
        hidden[rows, places] = states[last][:, 0].to("cpu", torch.bfloat16)
        keep_features(rows, places)
        cache_lens += 1
    fed = lens + num_tokens - 1
    kept = torch.arange(longest + num_tokens) < fed[:, None]
    return Texts(tokens[kept], hidden[kept], fed, lens, features[kept])


class Candidates(NamedTuple):
    """The part of the vocabulary that a loss looks at: some tokens always, and a sample that stands for the others."""

    head: Tensor  # their rows of the head. [tokens, width]; products are made in its dtype
    log_weights: (
        Tensor  # of each: 0, or the logarithm of how many tokens one of the sample stands for. [tokens] float32
    )

    @classmethod
    def all_of(cls, head: Tensor) -> Candidates:
        """The whole vocabulary."""
        return cls(head, torch.zeros(len(head)))

    @classmethod
    def drawn(cls, head: Tensor, always: Tensor, num_others: int, generator: torch.Generator) -> Candidates:
        """The tokens where `always`, [vocab] bool, is true, and some of the others, or all if there are no more."""
        kept, others = always.nonzero()[:, 0], (~always).nonzero()[:, 0]
        if num_others >= len(others):
            return cls.all_of(head)
        sample = others[torch.randperm(len(others), generator=generator)[:num_others]]
        weights = torch.zeros(len(kept) + num_others)
        weights[len(kept) :] = math.log(len(others) / num_others)
        return cls(head[torch.cat((kept, sample))], weights)


class HeadLoss(torch.autograd.Function):
    """How far a draft is from its target through the one frozen head, and the gradient in closed form.

    For a row with target probabilities t and draft probabilities d, the divergence's gradient to the draft's logits is
    d - t, and that of 1 - overlap is -d (b - sum(d b)), where b is 1 where d < t and else 0. So no row of the
    vocabulary outlives its chunk, and the head costs three products: two forwards and one backward. Of a sampled
    candidate both probabilities are those of all that it stands for.
    """

    @staticmethod
    def forward(
        ctx: Any, drafted: Tensor, wanted: Tensor, candidates: Candidates, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Give the loss, a mean over rows, and sums over rows of `MEASURES`, [3].

        drafted, wanted: what the head gets of draft and target, [R, width]. weights: of the divergence and of
        1 - overlap in the loss.
        """
        head, log_weights = candidates
        gradient, sums = torch.empty_like(drafted, dtype=torch.float32), torch.zeros(3)
        for start in range(0, len(drafted), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            target, draft = (
                (states[rows].to(head.dtype) @ head.T).float() + log_weights for states in (wanted, drafted)
            )
            sums[2] += (target.argmax(-1) == draft.argmax(-1)).sum()
            target, draft = target.log_softmax(-1), draft.log_softmax(-1)
            target_probs, draft_probs = target.exp(), draft.exp()
            sums[0] += target.sub_(draft).mul_(target_probs).sum()
            sums[1] += torch.minimum(target_probs, draft_probs).sum()
            below = torch.where(draft_probs < target_probs, draft_probs, 0)
            slope = draft_probs.mul_(weights[0] + weights[1] * below.sum(-1, keepdim=True))
            slope.sub_(target_probs, alpha=weights[0]).sub_(below, alpha=weights[1])
            gradient[rows] = (slope.to(head.dtype) @ head).float()
        ctx.save_for_backward(gradient.div_(len(drafted)).to(drafted.dtype))
        ctx.mark_non_differentiable(sums)
        loss = (weights[0] * sums[0] + weights[1] * (len(drafted) - sums[1])) / len(drafted)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, loss: Tensor, sums: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient was made in the forward."""
        (gradient,) = ctx.saved_tensors
        return gradient * loss, None, None, None
