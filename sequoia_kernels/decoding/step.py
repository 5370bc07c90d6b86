"""One decoding step: the draft grows a tree of tokens, the target scores it, the accepted path is committed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sequoia_kernels.decoding.layout import DraftLevel, TreeLayout
from sequoia_kernels.decoding.state import DecodingState
from sequoia_kernels.decoding.stats import StageClock
from sequoia_kernels.models import TreeModel, prefill
from sequoia_kernels.ops import CacheTable, VerifiedPath, compact_kv_cache_, sample_without_replacement, verify_tree
from sequoia_kernels.tree import TokenTree

__all__ = ["DecodingStep", "EmittedTokens", "TokenBuffers"]


@dataclass
class TokenBuffers:
    """What the draft leaves for the target. N nodes, allocated once a tree and batch.

    Attributes:
        tokens: token of every node. [B, N] int64.
        draft_logits: the draft's logits at every internal node, as wide as the target's; tokens that the draft does not
            know hold -inf, rows of leaves are never read. [B, N, vocab], the dtype of its logits. None without a draft.
        draft_lacks_tokens: whether the draft may meet tokens of the target that it has no embedding of.
    """

    tokens: torch.Tensor
    draft_logits: torch.Tensor | None
    draft_lacks_tokens: bool = False

    @classmethod
    def allocate(cls, layout: TreeLayout, batch_size: int, target: TreeModel, draft: TreeModel | None) -> TokenBuffers:
        """Allocate the buffers of a tree and batch on the target's device."""
        num_nodes = layout.tree.num_nodes
        tokens = torch.zeros(batch_size, num_nodes, dtype=torch.int64, device=target.device)
        if draft is None or layout.root_level is None:
            return cls(tokens, None)
        shape = (batch_size, num_nodes, target.vocab_size)
        return cls(
            tokens,
            torch.full(shape, -torch.inf, dtype=draft.logits_dtype, device=target.device),
            draft.num_embeddings < max(target.num_embeddings, target.vocab_size),
        )


class EmittedTokens(NamedTuple):
    """What one step gives to the host.

    Attributes:
        tokens: accepted tokens and the bonus token behind them, -1 behind the end. [B, levels] int64.
        nodes: the accepted path, for the statistics. [B, levels] int32.
        num_tokens: tokens emitted, 0 for an ended request. [B] int32.
    """

    tokens: torch.Tensor
    nodes: torch.Tensor
    num_tokens: torch.Tensor


class DecodingStep:
    """Two models, their caches and the state of one batch; `run` is one speculative step on static buffers.

    Nothing in here waits for the device. A step reads and advances the state in place and works on buffers that live as
    long as this object, so it can be captured as a CUDA graph.

    Args:
        target: the target.
        draft: the draft; None decodes one token a step.
        state: the batch's state.
        max_cache_len: rows of the caches: committed tokens and the tree behind them.
        draft_cache_len: rows of the draft's, where it has lengths of its own in the state.
        backend: backend of the ops.
        clock: adds up the times of the stages.
    """

    def __init__(
        self,
        target: TreeModel,
        draft: TreeModel | None,
        state: DecodingState,
        max_cache_len: int,
        *,
        draft_cache_len: int | None = None,
        backend: str = "auto",
        clock: StageClock | None = None,
    ) -> None:
        self.target, self.draft, self.state, self.backend = target, draft, state, backend
        self.clock = clock or StageClock(enabled=False)
        batch_size = state.cache_lens.shape[0]
        self.target_cache = target.new_cache(batch_size, max_cache_len, beyond_positions=True)
        self.draft_cache = None
        if draft is not None:
            self.draft_cache = draft.new_cache(batch_size, draft_cache_len or max_cache_len, beyond_positions=True)
        target_tensors = self.target_cache.tensors()
        draft_tensors = [] if self.draft_cache is None else self.draft_cache.tensors()
        self._tensors = target_tensors + draft_tensors
        if draft_tensors and state.has_own_draft_lens:
            parts = [(target_tensors, state.cache_lens), (draft_tensors, state.draft_lens)]
        else:
            parts = [(self._tensors, state.cache_lens)]
        # Each group of caches, with a table for every device, comes with the lengths that count its rows.
        self.cache_tables = [(CacheTable.by_device(tensors), cache_lens) for tensors, cache_lens in parts]
        self._prepared: dict[TokenTree, tuple[TreeLayout, TokenBuffers]] = {}

    # Between steps

    def prepare(self, tree: TokenTree) -> tuple[TreeLayout, TokenBuffers]:
        """Give a tree's index tensors and buffers; the first time allocates them, which must not be captured."""
        if tree not in self._prepared:
            layout = TreeLayout.build(tree, self.target.device)
            batch_size = self.state.cache_lens.shape[0]
            self._prepared[tree] = layout, TokenBuffers.allocate(layout, batch_size, self.target, self.draft)
        return self._prepared[tree]

    def prefill(
        self, prompts: torch.Tensor, prompt_lens: torch.Tensor, draft_tokens: Sequence[list[int]] | None = None
    ) -> torch.Tensor:
        """Commit the prompts and draw each request's first token from the target, which becomes the root.

        Args:
            prompts: prompts, padded on the right. [B, longest] int64.
            prompt_lens: tokens of each prompt. [B] int32.
            draft_tokens: what the draft is given instead, where it cannot hold every prompt.

        Returns:
            The first tokens. [B] int64. They follow the same warping and random streams as every later one.
        """
        state = self.state
        with self.clock.stage("prefill"):
            logits = prefill(self.target, self.target_cache, prompts, prompt_lens)  # [B, 1, vocab]
            last_tokens = prompts.gather(1, (prompt_lens.to(torch.int64) - 1)[:, None])
            # The root's own token decides nothing, and a prompt may hold tokens that are never predicted.
            next_token = self._verify(torch.zeros_like(last_tokens), logits, None, TokenTree.single()).next_token
            state.cache_lens.copy_(prompt_lens)
            state.last_tokens.copy_(last_tokens[:, 0])
            state.root_tokens.copy_(next_token)
            state.offsets += 1
            lanes = list(range(len(prompts)))
            if draft_tokens is not None:
                self._prefill_draft(lanes, *_padded(draft_tokens))
            elif self.draft is not None:
                self._prefill_draft(lanes, prompts, prompt_lens)
            return next_token

    def restart_draft(self, lanes: list[int], tokens: Sequence[list[int]]) -> None:
        """Let the draft's context of some requests consist of these tokens, the last ones that were committed."""
        with self.clock.stage("draft"):
            self._prefill_draft(lanes, *_padded(tokens))

    def _prefill_draft(self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Fill the draft's context of some requests, in increasing order; the other requests keep theirs."""
        draft, cache = self.draft, self.draft_cache
        assert draft is not None and cache is not None  # whoever has tokens for a draft has a draft
        tokens = tokens.to(draft.device).clamp(max=draft.num_embeddings - 1)  # see `draft_tokens`
        num_tokens = num_tokens.to(draft.device)
        if len(lanes) == cache.batch_size:
            prefill(draft, cache, tokens, num_tokens)
        else:
            part = draft.new_cache(*tokens.shape)
            prefill(draft, part, tokens, num_tokens)
            for whole, rows in zip(cache.tensors(), part.tensors(), strict=True):
                whole[lanes, : rows.shape[1]] = rows
        if self.state.has_own_draft_lens:
            self.state.draft_lens[lanes] = num_tokens

    def end_request(self, index: int) -> None:
        """Stop committing for a request; its lane goes on with caches of one row."""
        self.state.active[index] = 0
        self.state.cache_lens[index] = 1
        self.state.draft_lens[index] = 1

    def restart(self, state: DecodingState) -> None:
        """Begin another batch of the same shape: take over its state's values and forget the old rows."""
        self.state.copy_(state)
        for tensor in self._tensors:  # a masked row counts with weight 0, and 0 times a left-over inf is NaN
            tensor.zero_()

    # A step

    def run(self, tree: TokenTree, draft_tokens: Callable[[TokenTree], object] | None = None) -> EmittedTokens:
        """Draft, verify, commit.

        Args:
            tree: the tree to decode with.
            draft_tokens: does what the method of this name does: say, as a replayed graph.
        """
        (draft_tokens or self.draft_tokens)(tree)
        return self.commit_path(tree, self.verify_tokens(tree))

    def draft_tokens(self, tree: TokenTree) -> None:
        """Fill the buffers with tokens drawn from the draft, level by level; leaves are never fed.

        A token that the draft has no embedding of is fed as the last one that it has: what grows behind it is a worse
        guess, and verified like any other. Mutates the draft's cache rows behind the committed ones.
        """
        layout, buffers = self.prepare(tree)
        state, draft, cache = self.state, self.draft, self.draft_cache
        buffers.tokens[:, 0].copy_(state.root_tokens)
        if draft is None or cache is None or layout.root_level is None:
            return
        with self.clock.stage("draft"):
            fed = torch.stack((state.last_tokens, state.root_tokens), dim=1)
            if buffers.draft_lacks_tokens:
                fed.clamp_(max=draft.num_embeddings - 1)
            logits = draft.forward(fed, cache, state.draft_lens - 1, layout.root_step)[:, 1:]
        self._draw_children(layout.root_level, logits, buffers)
        for level in layout.levels:
            with self.clock.stage("draft"):
                fed = buffers.tokens.index_select(1, level.nodes)
                fed.clamp_(0, draft.num_embeddings - 1)  # one that could not be drawn is -1
                logits = draft.forward(fed, cache, state.draft_lens, level.step)
            self._draw_children(level, logits, buffers)

    def _draw_children(
        self,
        level: DraftLevel,
        logits: torch.Tensor,  # [B, width, draft vocab]
        buffers: TokenBuffers,
    ) -> None:
        assert buffers.draft_logits is not None  # allocated with every tree that has a level to draw
        with self.clock.stage("sample"):
            batch_size, width, _ = logits.shape
            vocab = min(logits.shape[2], buffers.draft_logits.shape[2])
            # drawn from the very numbers that are kept for the verification
            logits = logits[:, :, :vocab].to(buffers.draft_logits.dtype)
            if level.step.first_node is not None:
                kept = buffers.draft_logits.narrow(1, level.step.first_node, width).narrow(2, 0, vocab)
                kept.copy_(logits)
            else:
                buffers.draft_logits[:, :, :vocab].index_copy_(1, level.nodes, logits)
            drawn = sample_without_replacement(
                logits.flatten(0, 1),
                level.num_samples,
                self.state.temperature.repeat_interleave(width),
                self.state.seeds.repeat_interleave(width),
                (self.state.offsets[:, None] + level.nodes).flatten(),
                backend=self.backend,
            ).tokens.view(batch_size, -1)
            children = buffers.tokens.narrow(1, level.first_child, level.num_children)
            torch.index_select(drawn, 1, level.drawn, out=children) if batch_size == 1 else children.copy_(
                drawn.index_select(1, level.drawn)
            )

    def verify_tokens(self, tree: TokenTree) -> VerifiedPath:
        """Score the tree with the target and decide which path of it is accepted.

        Mutates the target's cache rows behind the committed ones.
        """
        layout, buffers = self.prepare(tree)
        with self.clock.stage("target"):
            # A token that could not be drawn is -1: it is fed as token 0 and never accepted. One that the target has no
            # embedding of is fed as the last one that it has.
            fed = buffers.tokens.clamp(0, self.target.num_embeddings - 1)
            logits = self.target.forward(fed, self.target_cache, self.state.cache_lens, layout.target_step)
        with self.clock.stage("verify"):
            return self._verify(buffers.tokens, logits, buffers.draft_logits, tree)

    def _verify(
        self, tokens: torch.Tensor, logits: torch.Tensor, draft_logits: torch.Tensor | None, tree: TokenTree
    ) -> VerifiedPath:
        state = self.state
        return verify_tree(
            tokens,
            logits,
            draft_logits,
            tree,
            state.temperature,
            state.seeds,
            state.offsets,
            top_k=state.top_k,
            top_p=state.top_p,
            backend=self.backend,
        )

    def commit_path(self, tree: TokenTree, path: VerifiedPath) -> EmittedTokens:
        """Move the accepted rows behind the committed ones and advance the state in place.

        The emitted tokens are gathered before anything is overwritten.
        """
        state, tokens = self.state, self.prepare(tree)[1].tokens
        with self.clock.stage("commit"):
            num_accepted = path.num_accepted * state.active
            if tree.num_nodes == 1:  # plain decoding: the root's row is in place already
                emitted = path.next_token[:, None]
                last_tokens = tokens[:, 0]
                for _, cache_lens in self.cache_tables:
                    cache_lens += num_accepted
            else:
                path_tokens = tokens.gather(1, path.nodes.clamp(min=0).to(torch.int64))
                end = (path.num_accepted - 1).to(torch.int64)[:, None]
                last_tokens = path_tokens.gather(1, end)[:, 0]
                emitted = torch.full_like(path_tokens, -1)
                emitted[:, :-1] = torch.where(path.nodes[:, 1:] >= 0, path_tokens[:, 1:], -1)
                emitted.scatter_(1, end, path.next_token[:, None])
                for tables, cache_lens in self.cache_tables:
                    compact_kv_cache_(tables, path.nodes, num_accepted, cache_lens, backend=self.backend)
            state.last_tokens.copy_(last_tokens)
            state.root_tokens.copy_(path.next_token)
            state.offsets += tree.num_nodes
            return EmittedTokens(emitted, path.nodes, num_accepted)


def _padded(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, padded on the right. [R, longest] int64, and how many each has. [R] int32."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return tokens, torch.tensor([len(row) for row in rows], dtype=torch.int32)
