"""The door between forward and verification: logits that are changed by what stands before each node."""

from __future__ import annotations

import pytest
import torch
from support.chi_square import p_value, sequence_counts
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import auto
from sequoia_kernels.decoding.logits_hook import NodePaths

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
VOCAB = 12


def own_path(paths: NodePaths, request: int, node: int) -> list[int]:
    """The committed tokens of a request, then the tokens from the root to a node."""
    tokens = []
    while node >= 0:
        tokens.append(int(paths.tokens[request, node]))
        node = int(paths.topology.parents[..., node].reshape(-1)[0])
    return paths.history[request, : int(paths.history_lens[request])].tolist() + tokens[::-1]


def no_repeats(window: int):
    """Forbid the last few tokens before each place: a rule that depends on the whole path of a node."""

    def hook(paths: NodePaths, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for request in range(logits.shape[0]):
            for node in range(logits.shape[1]):
                logits[
                    request, node, [max(token, 0) for token in own_path(paths, request, node)[-window:]]
                ] = -torch.inf
        return logits

    return hook


def sequentially(target, prompt: list[int], num_tokens: int, window: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = target(input_ids=torch.tensor([tokens])).logits[0, -1]
            logits[tokens[-window:]] = -torch.inf
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("window", [1, 5])
def test_greedy_text_equals_that_of_changed_logits_token_by_token(window):
    target = tiny_llama(3, vocab_size=VOCAB, sharpness=4.0)
    prompts = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    wanted = [
        sequentially(target, prompt[kept.bool()].tolist(), 30, window)
        for prompt, kept in zip(prompts, mask, strict=True)
    ]
    hook = no_repeats(window)
    for draft in (None, noisy_copy(target, 0.3)):
        output = generate(target, draft, prompts, mask, tree=TREE, max_new_tokens=30, logits_hook=hook)
        assert output.new_tokens == wanted
    assert output.stats.tokens_per_step > 1.05
    assert generate(target, None, prompts, mask, max_new_tokens=30).new_tokens != wanted  # the hook did something


def test_the_joint_distribution_is_that_of_the_changed_logits():
    target = tiny_llama(7, vocab_size=5, sharpness=8.0)
    prompt = torch.tensor([2, 0, 4])

    def drop_and_tilt(paths: NodePaths, logits: torch.Tensor) -> torch.Tensor:
        """Forbid the token before; favour token 0 behind an odd one."""
        before = paths.tokens.clamp(min=0)
        logits = logits.scatter(2, before[..., None], -torch.inf)
        logits[..., 0] += (before % 2).to(logits.dtype)
        return logits

    output = generate(
        target, noisy_copy(target, 0.4), prompt.repeat(6000, 1), seed=range(6000), tree=TREE, max_new_tokens=3,
        temperature=1.0, logits_hook=drop_and_tilt,
    )  # fmt: skip
    joint = torch.ones(1, dtype=torch.float64)
    prefixes = prompt[None]
    for _ in range(3):
        with torch.inference_mode():
            logits = target(input_ids=prefixes).logits[:, -1].double()
        logits = logits.scatter(1, prefixes[:, -1:], -torch.inf)
        logits[:, 0] += prefixes[:, -1] % 2
        joint = (joint[:, None] * logits.softmax(-1)).flatten()
        prefixes = torch.cat((prefixes.repeat_interleave(5, 0), torch.arange(5).repeat(len(prefixes))[:, None]), dim=1)
    assert p_value(sequence_counts(torch.tensor(output.new_tokens), 5), joint.view(5, 5, 5)) > 1e-4


@pytest.mark.parametrize(
    ("returns", "looks"),
    [
        (lambda paths, logits: None, "NoneType"),
        (lambda paths, logits: logits[..., :-1], r"\[1, 1, 31\] torch.float32 on cpu"),
        (lambda paths, logits: logits.long(), r"\[1, 1, 32\] torch.int64 on cpu"),
        (lambda paths, logits: logits.to("meta"), r"\[1, 1, 32\] torch.float32 on meta"),
    ],
)
def test_what_a_hook_must_return(returns, looks):
    message = rf"generate: logits_hook must return logits of shape \[1, 1, 32\] on cpu, got {looks}"
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(3), None, torch.tensor([[1, 2]]), logits_hook=returns)


def test_calls_with_a_hook_teach_nothing_about_others(monkeypatch):
    learnt = []
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_learn", lambda kept, key, stats: learnt.append(stats))
    target = tiny_llama(3, vocab_size=VOCAB)
    options = {"max_new_tokens": 8, "eos_token_id": ()}
    generate(
        target, noisy_copy(target, 0.3), torch.tensor([[1, 2]]), logits_hook=lambda paths, logits: -logits, **options
    )
    assert not learnt
    generate(target, noisy_copy(target, 0.3), torch.tensor([[1, 2]]), **options)
    assert len(learnt) == 1


def test_a_hook_that_cannot_be_called_is_refused():
    target = tiny_llama(3)
    with pytest.raises(TypeError, match=r"generate: logits_hook must be called with \(paths, logits\), got str"):
        generate(target, None, torch.tensor([[1, 2]]), logits_hook="no")
