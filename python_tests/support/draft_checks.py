"""A draft source at work for a few steps, and what every source must keep: the target's text, request by request."""

from __future__ import annotations

from typing import Any

import torch

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.decoding.step import DecodingStep
from sequoia_kernels.drafts import DecodingState, StepTree, TokenBuffers
from sequoia_kernels.tree import ShapedTree

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


class Growth:
    """The prompts are committed, and some steps are behind them; then one more tree is grown.

    Attributes:
        texts: each request's committed tokens and its root.
        buffers: of the tree.
        step: the step, between its draft and its target.
    """

    def __init__(
        self, target: Any, source: Any, prompts: torch.Tensor, lens: list[int], tree: StepTree, num_steps: int = 0,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        model, count = adapt(target), len(lens)
        state = DecodingState.create(
            count, model.device, seeds=range(count), temperature=[temperature] * count, top_k=None, top_p=None
        )
        self.step = DecodingStep(model, source, state, 128)
        first = self.step.prefill(prompts, torch.tensor(lens, dtype=torch.int32))
        self.texts = [
            [*prompt[:length].tolist(), *new] for prompt, length, new in zip(prompts, lens, first.tokens.tolist())
        ]
        for _ in range(num_steps):
            emitted = self.step.run(tree)
            for text, new, length in zip(self.texts, emitted.tokens.tolist(), emitted.num_tokens.tolist()):
                text.extend(new[:length])
        self.step.draft_tokens(tree)
        self.buffers: TokenBuffers = self.step.prepare(tree)[1]

    def paths(self, tree: TokenTree) -> list[tuple[int, int, list[int]]]:
        """Give (request, node, tokens of its path behind the root) of every node with children."""
        found = []
        for request in range(len(self.texts)):
            for node in range(tree.num_nodes):
                if tree.num_children[node]:
                    path, at = [], node
                    while at > 0:
                        path.append(int(self.buffers.tokens[request, at]))
                        at = tree.parents[at]
                    found.append((request, node, path[::-1]))
        return found


def check_text(target: Any, source: Any, prompts: torch.Tensor, tree: Any = TREE, **options: Any) -> Any:
    """Greedy text is the target's own, whatever the source says; give the output."""
    options = {"max_new_tokens": 40, **options}
    plain = generate(target, None, prompts, **{**options, "lookup": False}).new_tokens
    output = generate(target, source, prompts, tree=tree, **options)
    assert output.new_tokens == plain
    return output


def check_batches(target: Any, source: Any, prompts: torch.Tensor, lens: list[int], tree: StepTree = TREE) -> None:
    """Requests of a batch, whose steps accept as they will, are what they are alone; some end long before others."""
    mask = torch.zeros_like(prompts)
    for request, length in enumerate(lens):
        mask[request, :length] = 1
    limits = {"max_new_tokens": 30, "temperature": 0.7, "eos_token_id": 3, "tree": tree}
    seeds = list(range(len(lens)))
    together = generate(target, source, prompts, mask, seed=seeds, **limits)
    assert len({len(tokens) for tokens in together.new_tokens}) > 1
    for request, length in enumerate(lens):
        alone = generate(target, source, prompts[request : request + 1, :length], seed=seeds[request], **limits)
        assert alone.new_tokens[0] == together.new_tokens[request]
        assert alone.stats.request_steps[0] == together.stats.request_steps[request]


def trees_of_all_kinds(shaped: ShapedTree) -> list[Any]:
    """A tree, a chain, a star, a tree for each of two requests, and a shaped one."""
    return [TREE, TokenTree.chain(4), TokenTree([-1, 0, 0, 0]), [TREE, TokenTree([-1, 0, 0, 0, 1, 2, 2, 4])], shaped]


def check_kept_engines(target: Any, source: Any, prompts: torch.Tensor, monkeypatch: Any) -> None:
    """A kept engine serves other prompts of the same shapes as a new one does; steps run as they are, uncaptured."""
    made = []

    class Replayed(engines.GraphedSteps):
        def __init__(self, run_step, state):
            self.run_step, self._captured = run_step, {}

        def capture(self, tree):
            self._captured[tree] = None

    def options(seed: int) -> dict[str, Any]:
        return {"tree": TREE, "max_new_tokens": 20, "temperature": 0.8, "seed": seed}

    batches = [(prompts, 1), (prompts.flip(1), 2), (prompts, 1)]
    wanted = [generate(target, source, batch, **options(seed)).new_tokens for batch, seed in batches]
    plain = engines.DecodingEngine.__init__
    monkeypatch.setattr(engines, "can_capture", lambda target, draft: True)
    monkeypatch.setattr(engines, "GraphedSteps", Replayed)
    monkeypatch.setattr(engines.DecodingEngine, "__init__", lambda self, *args: made.append(self) or plain(self, *args))
    engines.release_engines()
    try:
        for (batch, seed), tokens in zip(batches, wanted, strict=True):
            assert generate(target, source, batch, **options(seed)).new_tokens == tokens
        assert len(made) == 1 and made[0].eager.drafting.source is None
    finally:
        engines.release_engines()
