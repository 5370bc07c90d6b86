"""One decoding step: the draft grows a tree of tokens, the target scores it, the accepted path is committed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from sequoia_kernels.decoding.host_step import HostStep
from sequoia_kernels.decoding.logits_hook import LogitsHook, NodePaths
from sequoia_kernels.decoding.logprobs import token_logprobs
from sequoia_kernels.drafts import (
    DecodingState,
    DraftLevel,
    DraftSource,
    StageClock,
    StepTree,
    TokenBuffers,
    TreeLayout,
)
from sequoia_kernels.errors import RankError
from sequoia_kernels.models import TreeModel, foreign_code_ran, prefill
from sequoia_kernels.ops import CacheTable, VerifiedPath, compact_kv_cache_, verify_tree
from sequoia_kernels.parallel import leading
from sequoia_kernels.tree import DEFAULT_RULE, ShapedTree, TokenTree, Topology

__all__ = ["DecodingStep", "EmittedTokens"]


class EmittedTokens(NamedTuple):
    """What one step gives to the host.

    Attributes:
        tokens: accepted tokens and the bonus token behind them, -1 behind the end. [B, levels] int64.
        nodes: the accepted path, for the statistics. [B, levels] int32.
        num_tokens: tokens emitted, 0 for an ended request. [B] int32.
        logprobs: log-probabilities of the tokens, where asked for. [B, levels] float32.
        logits: the target's logits that they were decided from, where asked for. [B, levels, vocab].
        scores: the same behind the hook, where asked for. [B, levels, vocab].
    """

    tokens: torch.Tensor
    nodes: torch.Tensor
    num_tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class DecodingStep:
    """Target and draft, their caches and the state of one batch; `run` is one speculative step on static buffers.

    Nothing in here waits for the device. A step reads and advances the state in place and works on buffers that live as
    long as this object, so it can be captured as a CUDA graph.

    Args:
        target: the target.
        draft: what proposes tokens; None decodes one token a step.
        state: the batch's state.
        max_cache_len: rows of the caches: committed tokens and the tree behind them.
        draft_cache_len: rows of the draft's, where it has lengths of its own in the state.
        rule: verification rule.
        logits_hook: changes the target's logits before tokens are decided from them.
        observer: is shown every step's tree with its tokens and draft logits, and the target's logits, before they are
            decided; it leaves them as they are, and steps that have one are not captured.
        shorten: gives the part of the accepted paths that is committed, the token behind it as the next one. Of an
            observer's steps only, for it is asked on the host.
        keeps: what of `EmittedTokens` is asked for: "logprobs" (of the target's own logits), "processed_logprobs" (of
            what tokens are drawn from; instead of the former), "logits", "scores".
        backend: backend of the ops.
        clock: adds up the times of the stages.
    """

    def __init__(
        self,
        target: TreeModel,
        draft: DraftSource | None,
        state: DecodingState,
        max_cache_len: int,
        *,
        draft_cache_len: int | None = None,
        rule: str = DEFAULT_RULE,
        logits_hook: LogitsHook | None = None,
        observer: Callable[[TokenBuffers, torch.Tensor], None] | None = None,
        shorten: Callable[[TokenBuffers, VerifiedPath], VerifiedPath] | None = None,
        keeps: Collection[str] = (),
        backend: str = "auto",
        clock: StageClock | None = None,
    ) -> None:
        self.target, self.draft, self.state, self.rule, self.backend = target, draft, state, rule, backend
        self.clock = clock or StageClock(enabled=False)
        self.logits_hook, self.observer, self.shorten = logits_hook, observer, shorten
        self.keeps = frozenset(keeps)
        batch_size = state.cache_lens.shape[0]
        self.target_cache = target.new_cache(batch_size, max_cache_len, beyond_positions=True)
        self.history: torch.Tensor | None = None  # committed tokens. [B, max_cache_len] int64
        if logits_hook is not None:
            self.history = torch.zeros(batch_size, max_cache_len, dtype=torch.int64, device=target.device)
        self.drafting = None
        draft_tensors: list[torch.Tensor] = []
        if draft is not None:
            rows = draft_cache_len or max_cache_len
            self.drafting = draft.start(target, state, rows, backend=backend, clock=self.clock)
            self.drafting.share(self.target_cache)
            draft_tensors = self.drafting.cache_tensors()
        # Each group of caches, with a table for every device, comes with the lengths that count its rows.
        parts = [(self.target_cache.tensors(), state.cache_lens)]
        if draft_tensors and state.has_own_draft_lens:
            parts.append((draft_tensors, state.draft_lens))
        else:
            parts[0][0].extend(draft_tensors)
        self._cache_parts = parts
        self.cache_tables = [(CacheTable.by_device(tensors), cache_lens) for tensors, cache_lens in parts]
        self._prepared: dict[StepTree, tuple[TreeLayout, TokenBuffers]] = {}
        on_cpu = all(table.entries.is_cpu for tables, _ in self.cache_tables for table in tables)
        self._on_host = on_cpu and logits_hook is None and HostStep.serves(backend, rule)
        self._host_steps: dict[StepTree, HostStep] = {}
        self._scored = torch.empty(0)  # where bound forwards leave their logits
        self._keeps_raw = logits_hook is not None and not self.keeps.isdisjoint({"logprobs", "logits"})
        self._num_steps = 0  # behind the prompts
        self._decided_from = (torch.empty(0), torch.empty(0))  # the newest step's logits before and behind the hook

    # Between steps

    def prepare(self, tree: StepTree) -> tuple[TreeLayout, TokenBuffers]:
        """Give a tree's index tensors and buffers; the first time allocates them, which must not be captured."""
        if tree not in self._prepared:
            target, draft = self.target, self.draft
            layout = TreeLayout.build(tree, target.device, self.state.cache_lens.shape[0])
            dtype = target.logits_dtype if draft is None else draft.logits_dtype
            batch_size = self.state.cache_lens.shape[0]
            vocabulary, draws, proposes, foretells = None, True, False, False
            if draft is not None:
                vocabulary, draws, proposes = draft.vocabulary, draft.draws_children(tree), draft.proposes
                is_shaped_so = isinstance(tree, ShapedTree) and tree.confidence.foretold
                foretells = draft.foretells and (is_shaped_so or self.observer is not None)
            buffers = TokenBuffers.allocate(
                layout, batch_size, target.vocab_size, dtype, target.device,
                vocabulary=vocabulary, draws=draws, proposes=proposes, foretells=foretells,
            )  # fmt: skip
            self._prepared[tree] = layout, buffers
            self._host_step(tree)
            if self.drafting is not None and layout.levels:
                self.drafting.prepare(layout, buffers)
        return self._prepared[tree]

    def _host_step(self, tree: StepTree) -> HostStep | None:
        """What goes past the ops for this tree, where something does; made when the tree is first met."""
        if not self._on_host:
            return None
        host = self._host_steps.get(tree)
        if host is None:
            layout, buffers = self.prepare(tree)
            host = HostStep(self.target, self.target_cache, self.state, layout, buffers, self.cache_tables, self.rule)
            self._host_steps[tree] = host
        return host

    def prefill(
        self, prompts: torch.Tensor, prompt_lens: torch.Tensor, draft_tokens: Sequence[list[int]] | None = None
    ) -> EmittedTokens:
        """Commit the prompts and draw each request's first token from the target, which becomes the root.

        Args:
            prompts: prompts, padded on the right. [B, longest] int64.
            prompt_lens: tokens of each prompt. [B] int32.
            draft_tokens: what the draft is given instead, where it cannot hold every prompt.

        Returns:
            The first tokens. They follow the same warping and random streams as every later one.
        """
        state = self.state
        with self.clock.stage("prefill"):
            hidden_states = self._wanted_states()
            logits = prefill(self.target, self.target_cache, prompts, prompt_lens, hidden_states=hidden_states)
            last_tokens = prompts.gather(1, (prompt_lens.to(torch.int64) - 1)[:, None])
            if self.history is not None:
                begin = getattr(self.logits_hook, "begin", None)
                if begin is not None:
                    begin(prompt_lens.tolist())
                self.history[:, : prompts.shape[1]].copy_(prompts)
                state.cache_lens.copy_(prompt_lens - 1)  # the prompts' last tokens are the nodes that were scored
            # The root's own token decides nothing, and a prompt may hold tokens that are never predicted.
            single = TokenTree.single()
            raw, scored = logits.clone() if self._keeps_raw else logits, logits
            buffers = TokenBuffers(torch.zeros_like(last_tokens), None)
            logits = self._hooked(last_tokens, logits, single)
            path = self._verify(buffers, logits, single)
            self._num_steps = 0
            self._compare_ranks(scored, buffers, last_tokens, single, path)
            next_token = path.next_token
            emitted = EmittedTokens(next_token[:, None], path.nodes, path.num_accepted)
            emitted = self._with_rows(emitted, raw, logits)
            state.cache_lens.copy_(prompt_lens)
            state.last_tokens.copy_(last_tokens[:, 0])
            state.root_tokens.copy_(next_token)
            state.offsets += 1
            if self.drafting is not None:
                tokens, lens = (prompts, prompt_lens) if draft_tokens is None else _padded(draft_tokens)
                self._prefill_draft(list(range(len(prompts))), tokens, lens, list(hidden_states.values()))
            return emitted

    def restart_draft(self, lanes: list[int], tokens: Sequence[list[int]]) -> None:
        """Let the draft's context of some requests consist of these tokens, the last ones that were committed."""
        with self.clock.stage("draft"):
            self._prefill_draft(lanes, *_padded(tokens), [])

    def _prefill_draft(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: list[torch.Tensor]
    ) -> None:
        assert self.drafting is not None  # whoever has tokens for a draft has a draft
        num_tokens = num_tokens.to(self.target.device)
        self.drafting.prefill(lanes, tokens.to(self.target.device), num_tokens, hidden_states)
        if self.state.has_own_draft_lens:
            self.state.draft_lens[lanes] = num_tokens

    def end_request(self, index: int) -> None:
        """Stop committing for a request; where its lane goes on, it does with caches of one row."""
        self.state.active[index] = 0
        self.state.cache_lens[index] = 1
        self.state.draft_lens[index] = 1

    def restart(self, state: DecodingState) -> None:
        """Begin another batch of the same shape: take over its state's values and forget the old rows."""
        self.state.copy_(state)
        for tensor in self.target_cache.tensors():  # a masked row has weight 0, and 0 times a left-over inf is NaN
            tensor.zero_()
        if self.drafting is not None:
            self.drafting.restart()

    def use(self, target: TreeModel | None, draft: DraftSource | None, clock: StageClock) -> None:
        """Go on with these objects of the same models; without any while nobody decodes, so that none is kept alive."""
        self.target, self.draft, self.clock = target, draft, clock  # type: ignore[assignment]
        self._host_steps.clear()  # they hold the models' weights
        if self.drafting is not None:
            self.drafting.use(draft, clock)

    # A step

    def run(self, tree: StepTree, draft_tokens: Callable[[StepTree], object] | None = None) -> EmittedTokens:
        """Draft, verify, commit.

        Args:
            tree: the tree to decode with, or one for each request.
            draft_tokens: does what the method of this name does: say, as a replayed graph.
        """
        (draft_tokens or self.draft_tokens)(tree)
        path, hidden_states = self.verify_tokens(tree)
        emitted = self.commit_path(tree, path, hidden_states)
        return self._with_rows(emitted, *self._decided_from) if self.keeps else emitted

    def draft_tokens(self, tree: StepTree) -> None:
        """Fill the buffers: the root's token is known, the others are drawn from the draft."""
        layout, buffers = self.prepare(tree)
        buffers.tokens[:, 0].copy_(self.state.root_tokens)
        if self.drafting is not None and layout.levels:
            self.drafting.logits_hook = self._draft_hook(layout.topology)
            self.drafting.grow(layout, buffers)
            if self.drafting.foreign:
                foreign_code_ran()

    def verify_tokens(self, tree: StepTree) -> tuple[VerifiedPath, list[torch.Tensor]]:
        """Score the tree with the target and decide which path of it is accepted.

        Mutates the target's cache rows behind the committed ones.

        Returns:
            The path, and the hidden states that the draft needs. [B, N, width] each.
        """
        layout, buffers = self.prepare(tree)
        host = self._host_step(tree)
        wanted = self._wanted_states()
        with self.clock.stage("target"):
            logits = None if host is None else self._score_in_place(host, wanted)
            if logits is None:
                # A token that could not be drawn is -1: it is fed as token 0 and never accepted. One that the target
                # has no embedding of is fed as the last one that it has.
                fed = buffers.tokens.clamp(0, self.target.num_embeddings - 1)
                logits = self.target.forward(
                    fed, self.target_cache, self.state.cache_lens, layout.target_step, hidden_states=wanted
                )
        scored = logits
        if self.observer is not None:
            self.observer(buffers, logits)
        with self.clock.stage("verify"):
            path = None if host is None else host.verify(logits)
            raw = logits
            if path is None:  # where a value is out of range, the op says which
                raw = logits.clone() if self._keeps_raw else logits
                logits = self._hooked(buffers.tokens, logits, layout.topology)
                path = self._verify(buffers, logits, layout.topology)
        self._num_steps += 1
        self._compare_ranks(scored, buffers, buffers.tokens, layout.topology, path)
        if self.shorten is not None:
            path = self.shorten(buffers, path)
        if self.keeps:
            self._decided_from = raw, logits
        return path, list(wanted.values())

    def _compare_ranks(
        self, scored: torch.Tensor, buffers: TokenBuffers, tokens: torch.Tensor, tree: TokenTree | Topology,
        path: VerifiedPath,
    ) -> None:  # fmt: skip
        """Where that is asked for, decide by the logits that other ranks of a split target have, and compare."""
        session = leading()
        if session is None or not session.checks:
            return
        active = self.state.active.bool()
        for rank, logits in session.others(scored):
            try:
                other = self._verify(buffers, self._hooked(tokens, logits, tree), tree)
            except ValueError as error:
                raise RankError(f"{session.where}: rank {rank} must have logits as rank 0 has, got {error}") from error
            session.compare(rank, self._num_steps, path[:3], other[:3], active)

    def _score_in_place(self, host: HostStep, wanted: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """Run the target's bound forward; None where there is none, or a length leaves no room.

        `wanted` takes hidden states, as in `TreeModel.forward`.
        """
        if host.forward is None:
            return None
        memory, logits = host.scored
        if memory is not self._scored:
            shape = host.forward.shape
            if self._scored.numel() < shape.numel():
                self._scored = torch.zeros(shape.numel(), dtype=self.target.logits_dtype)
            logits = self._scored[: shape.numel()].view(shape)
            host.scored = self._scored, logits
        if wanted and not host.hidden_states:
            sizes = (*logits.shape[:2], host.forward.width)
            host.hidden_states = {number: torch.zeros(sizes) for number in wanted}
        if not host.forward.run(logits, host.hidden_states):
            return None
        dtype = self.target.dtype  # copies: the next step writes them again
        wanted.update({number: states.to(dtype, copy=True) for number, states in host.hidden_states.items()})
        return logits

    def _wanted_states(self) -> dict[int, torch.Tensor]:
        """What a forward of the target is to leave for the draft; by the number of the hidden state."""
        return {} if self.draft is None else dict.fromkeys(self.draft.needs, torch.empty(0))

    def _hooked(
        self, tokens: torch.Tensor, logits: torch.Tensor, tree: TokenTree | Topology, nodes: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.logits_hook is None or self.history is None:
            return logits
        topology = tree.tensors(logits.device) if isinstance(tree, TokenTree) else tree
        state = self.state
        paths = NodePaths(self.history, state.cache_lens, tokens, topology, state.active, nodes)
        changed = self.logits_hook(paths, logits)
        foreign_code_ran()
        given = isinstance(changed, torch.Tensor) and (changed.shape, changed.device, changed.is_floating_point())
        if given != (logits.shape, logits.device, True):
            looks = f"{list(changed.shape)} {changed.dtype} on {changed.device}" if given else type(changed).__name__
            wanted = f"shape {list(logits.shape)} on {logits.device}"
            raise ValueError(f"generate: logits_hook must return logits of {wanted}, got {looks}")
        return changed

    def _draft_hook(
        self, tree: TokenTree | Topology
    ) -> Callable[[DraftLevel, torch.Tensor, TokenBuffers], torch.Tensor] | None:
        if not getattr(self.logits_hook, "hooks_draft", False):
            return None
        return lambda level, logits, buffers: self._hooked(buffers.tokens, logits, tree, level.nodes)

    def _with_rows(self, emitted: EmittedTokens, raw: torch.Tensor, processed: torch.Tensor) -> EmittedTokens:
        """Add what was asked for of the rows that the tokens were decided from. [B, N, vocab] each."""
        keeps, state = self.keeps, self.state
        if not keeps:
            return emitted
        places = emitted.nodes.clamp(min=0).to(torch.int64)[:, :, None].expand(-1, -1, raw.shape[2])
        rows = processed.gather(1, places)
        raw_rows = rows if processed is raw or keeps == {"processed_logprobs"} else raw.gather(1, places)
        logprobs = None
        if "processed_logprobs" in keeps:
            logprobs = token_logprobs(
                rows, emitted.tokens, state.temperature, state.top_k, state.top_p, backend=self.backend
            )
        elif "logprobs" in keeps:
            logprobs = token_logprobs(raw_rows, emitted.tokens, backend=self.backend)
        logits, scores = raw_rows if "logits" in keeps else None, None
        if "scores" in keeps:
            scales = torch.tensor(getattr(self.logits_hook, "scales", [1.0] * len(rows)), device=rows.device)
            scores = rows.to(torch.float32) / scales[:, None, None]
        return emitted._replace(logprobs=logprobs, logits=logits, scores=scores)

    def _verify(self, buffers: TokenBuffers, logits: torch.Tensor, tree: TokenTree | Topology) -> VerifiedPath:
        state = self.state
        return verify_tree(
            buffers.tokens, logits, buffers.draft_logits, tree, state.temperature, state.seeds, state.offsets,
            top_k=state.top_k, top_p=state.top_p, rule=self.rule, draft_to_target=buffers.vocabulary,
            certain=buffers.certain, backend=self.backend,
        )  # fmt: skip

    def commit_path(
        self, tree: StepTree, path: VerifiedPath, hidden_states: Sequence[torch.Tensor] = ()
    ) -> EmittedTokens:
        """Move the accepted rows behind the committed ones and advance the state in place.

        The emitted tokens are gathered before anything is overwritten.
        """
        state, (layout, buffers) = self.state, self.prepare(tree)
        tokens = buffers.tokens
        session = leading()
        if session is not None and layout.num_nodes > 1:
            session.note_commit(self._cache_parts, path.nodes, path.num_accepted * state.active)
        host = self._host_steps.get(tree)
        if host is not None and path is host.path:
            with self.clock.stage("commit"):
                committed = host.commit()
            if committed:
                if self.drafting is not None:
                    self.drafting.committed(path, hidden_states)
                return EmittedTokens(*host.emitted)
        with self.clock.stage("commit"):
            num_accepted = path.num_accepted * state.active
            if layout.num_nodes == 1:  # plain decoding: the root's row is in place already
                path_tokens, last_tokens, emitted = tokens, tokens[:, 0], path.next_token[:, None]
            else:
                path_tokens = tokens.gather(1, path.nodes.clamp(min=0).to(torch.int64))
                end = (path.num_accepted - 1).to(torch.int64)[:, None]
                last_tokens = path_tokens.gather(1, end)[:, 0]
                emitted = torch.full_like(path_tokens, -1)
                emitted[:, :-1] = torch.where(path.nodes[:, 1:] >= 0, path_tokens[:, 1:], -1)
                emitted.scatter_(1, end, path.next_token[:, None])
            if self.history is not None:  # what lies behind the committed tokens is written again by a later step
                places = state.cache_lens[:, None] + torch.arange(path_tokens.shape[1], device=tokens.device)
                self.history.scatter_(1, places.clamp_(max=self.history.shape[1] - 1).to(torch.int64), path_tokens)
            for tables, cache_lens in self.cache_tables:
                if layout.num_nodes == 1:
                    cache_lens += num_accepted
                else:
                    compact_kv_cache_(tables, path.nodes, num_accepted, cache_lens, backend=self.backend)
            state.last_tokens.copy_(last_tokens)
            state.root_tokens.copy_(path.next_token)
            state.offsets += layout.num_nodes
            emitted_tokens = EmittedTokens(emitted, path.nodes, num_accepted)
        if self.drafting is not None:
            self.drafting.committed(path, hidden_states)
        return emitted_tokens


def _padded(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, padded on the right. [R, longest] int64, and how many each has. [R] int32."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return tokens, torch.tensor([len(row) for row in rows], dtype=torch.int32)
