"""generate() samples the target's own joint distribution, end to end with real models and caches."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from support.tiny_models import noisy_copy, sequence_probabilities, tiny_llama

from sequoia_kernels import TokenTree, generate

VOCAB, LENGTH, NUM_REQUESTS = 5, 4, 6000
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


def warp(temperature: float, top_k: int | None = None, top_p: float | None = None):
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        logits = logits / temperature
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        if top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            dropped = ordered.cumsum(-1) - ordered >= top_p
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
        return logits.softmax(-1)

    return probabilities


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.7, "top_k": 3}],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
@pytest.mark.parametrize("kind", ["close draft", "unrelated draft", "draft = target", "no draft"])
def test_joint_distribution(settings, kind):
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=8.0)
    draft = {
        "close draft": noisy_copy(target, 0.4),
        "unrelated draft": tiny_llama(8, vocab_size=VOCAB, sharpness=8.0),
        "draft = target": target,
        "no draft": None,
    }[kind]
    prompt = torch.tensor([2, 0, 4])
    output = generate(
        target, draft, prompt.repeat(NUM_REQUESTS, 1), tree=TREE, max_new_tokens=LENGTH,
        seed=range(1000, 1000 + NUM_REQUESTS), **settings,
    )  # fmt: skip
    codes = torch.tensor(output.new_tokens) @ torch.tensor([VOCAB**power for power in reversed(range(LENGTH))])
    counts = torch.bincount(codes, minlength=VOCAB**LENGTH).double()
    expected = sequence_probabilities(target, prompt, LENGTH, warp(**settings)) * NUM_REQUESTS
    assert counts[expected == 0].sum() == 0  # nothing that the target would never say
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    kept = wanted > 0
    assert stats.chisquare(observed[kept].numpy(), wanted[kept].numpy()).pvalue > 1e-4
