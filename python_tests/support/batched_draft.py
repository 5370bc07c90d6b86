"""The batched draft against the ordinary loop's, and requests whose targets accept at random."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from sequoia_kernels.drafts import DecodingState, ModelDraft, StageClock, TokenBuffers, TreeLayout
from sequoia_kernels.models import TreeModel
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm.drafting import DraftedBatch, DraftRequest, TreeDrafter

__all__ = ["Request", "Requests", "accepted_path", "drafter_of", "grown_alone"]

CPU = torch.device("cpu")
# Logits of the same rows from products of other shapes; an unmoved or foreign row is off by far more.
TOLERANCE = 2e-4


def drafter_of(model: TreeModel, **settings: int) -> TreeDrafter:
    """A drafter with room for all, where nothing else is said."""
    limits = {"max_requests": 8, "max_tokens": 96, "max_nodes": 12, "pool_tokens": 10_000, "max_rows": 200}
    vocab = {"vocab_size": model.vocab_size, "target_embeddings": model.vocab_size}
    return TreeDrafter(model, **{**limits, **vocab, **settings})


@torch.inference_mode()
def grown_alone(
    model: TreeModel, tree: TokenTree, tokens: np.ndarray, temperature: float, seed: int, offset: int
) -> TokenBuffers:
    """Grow a request's tree as the ordinary loop does, with a cache of its own that is filled anew."""
    state = DecodingState.create(1, CPU, seeds=[seed], temperature=[temperature], top_k=None, top_p=None)
    text = torch.from_numpy(tokens.astype(np.int64))[None]
    committed = len(tokens) - 1
    drafting = ModelDraft(model).start(
        model, state, len(tokens) + tree.num_nodes, backend="auto", clock=StageClock(enabled=False)
    )
    drafting.prefill([0], text[:, :-1], torch.tensor([committed]), [])
    state.cache_lens.fill_(committed)
    state.root_tokens.copy_(text[:, -1])
    state.last_tokens.copy_(text[:, -2])
    state.offsets.fill_(offset)
    layout = TreeLayout.build(tree, CPU)
    buffers = TokenBuffers.allocate(layout, 1, model.vocab_size, model.logits_dtype, CPU)
    buffers.tokens[:, 0].copy_(state.root_tokens)
    drafting.grow(layout, buffers)
    return buffers


def accepted_path(tree: TokenTree, rng: random.Random) -> list[int]:
    """A path that some target may accept: from the root down, to a leaf or not as far."""
    path = [0]
    while (children := tree.children(path[-1])) and rng.random() < 0.75:
        path.append(rng.choice(children))
    return path


@dataclass
class Request:
    """A request as its owner knows it."""

    tokens: list[int]
    temperature: float
    seed: int
    offset: int = 0  # how far its random stream must be


@dataclass
class Requests:
    """Requests of a drafter, each compared with the ordinary loop's draft in every step."""

    drafter: TreeDrafter
    model: TreeModel
    rng: random.Random
    requests: dict[str, Request] = field(default_factory=dict)
    num_compared: int = 0

    def add(self, name: str, num_tokens: int, temperature: float = 0.0) -> None:
        """Let a request arrive."""
        tokens = [self.rng.randrange(self.model.vocab_size) for _ in range(num_tokens)]
        self.requests[name] = Request(tokens, temperature, self.rng.randrange(1 << 40))

    def end(self, name: str) -> None:
        """Let it end."""
        del self.requests[name]
        self.drafter.forget([name])

    def entry(self, name: str, must_draft: bool = False) -> DraftRequest:
        """What the drafter is told of it."""
        request = self.requests[name]
        return DraftRequest(name, np.array(request.tokens, np.int32), request.temperature, request.seed, must_draft)

    def plain_step(self, names: list[str]) -> None:
        """Let requests decode a token that no tree had."""
        for name in names:
            self.requests[name].tokens.append(self.rng.randrange(self.model.vocab_size))

    def step(
        self,
        wanted: dict[TokenTree, list[str]],
        *,
        committed: float = 1.0,
        must_draft: bool = False,
        compared: bool = True,
    ) -> list[DraftedBatch]:
        """Grow, compare with the ordinary loop, accept at random and commit a share of the requests.

        Requests without a tree, and those that are not committed, go on by one token.
        """
        grown = self.drafter.grow({t: [self.entry(n, must_draft) for n in names] for t, names in wanted.items()})
        accepted: dict[str, list[int]] = {}
        for drafted in grown:
            assert {*drafted.place} <= {*wanted[drafted.tree]}
            for name, place in drafted.place.items():
                request = self.requests[name]
                if compared:
                    self._compare(drafted, name, place)
                request.offset += drafted.tree.num_nodes
                if self.rng.random() < committed:
                    accepted[name] = accepted_path(drafted.tree, self.rng)
        for drafted in grown:
            self._commit(drafted, {name: accepted[name] for name in drafted.place if name in accepted})
        self.plain_step([name for names in wanted.values() for name in names if name not in accepted])
        return grown

    def _compare(self, drafted: DraftedBatch, name: str, place: int) -> None:
        request = self.requests[name]
        tokens = np.array(request.tokens)
        alone = grown_alone(self.model, drafted.tree, tokens, request.temperature, request.seed, request.offset)
        assert drafted.num_tokens[place] == len(tokens)
        assert int(drafted.offsets[place]) == request.offset
        inner = [node for level in range(drafted.tree.num_levels) for node in drafted.tree.internal_nodes(level)]
        assert alone.draft_logits is not None
        torch.testing.assert_close(
            drafted.draft_logits[place, inner], alone.draft_logits[0, inner], rtol=0, atol=TOLERANCE
        )
        assert drafted.tokens[place].tolist() == alone.tokens[0].tolist()
        self.num_compared += 1

    def _commit(self, drafted: DraftedBatch, accepted: dict[str, list[int]]) -> None:
        if not accepted:
            return
        names = [*accepted]
        self.rng.shuffle(names)
        levels = drafted.tree.num_levels
        nodes = torch.tensor([accepted[name] + [-1] * (levels - len(accepted[name])) for name in names])
        counts = torch.tensor([len(accepted[name]) for name in names], dtype=torch.int32)
        next_tokens = [self.rng.randrange(self.model.vocab_size) for _ in names]
        path = VerifiedPath(nodes.int(), counts, torch.tensor(next_tokens))
        committed = torch.tensor([len(self.requests[name].tokens) - 1 for name in names], dtype=torch.int32)
        before = committed.clone()
        emitted = [drafted.tokens[drafted.place[name], accepted[name][1:]].tolist() for name in names]
        self.drafter.commit(names, path, committed)
        assert torch.equal(committed, before)
        for name, tokens, token in zip(names, emitted, next_tokens):
            self.requests[name].tokens += [*tokens, token]
