"""DFlash and DSpark drafts as a source: one forward of a block a step, whatever the depth of the tree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.dflash.backbone import BlockBackbone, BoundBlock
from sequoia_kernels.drafts.dflash.forms import DFlashForm
from sequoia_kernels.drafts.dflash.heads import DSparkHeads
from sequoia_kernels.drafts.host_growth import ConfidenceHead, HostGrowth, MarkovHead
from sequoia_kernels.drafts.levels import DraftLevel, StepTree, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeModel, TreeStep
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["DFlashDraft"]


class DFlashDraft(DraftSource):
    """A DFlash or DSpark draft; made by `draft_from_folder` or `dflash_from_model`.

    One forward a step scores a block of rows, one for each depth of the tree, behind the target's hidden states of all
    committed tokens. A node's logits are its depth's row, to which DSpark's Markov head adds what the node's own token
    says. So a deeper tree costs draws and, with a Markov head, one small product a level.

    Args:
        form: what the draft is.
        weights: its weights by their common names, on the target's device and in its dtype.
        embedding: of tokens.
        head: likewise.
        vocabulary: which of the target's tokens are the head's rows; None where they are its first ones.

    Attributes:
        form: what the draft is.
        max_levels: levels of the deepest tree that a block has rows for.
    """

    def __init__(
        self, form: DFlashForm, weights: Mapping[str, torch.Tensor], embedding: nn.Module, head: nn.Module,
        vocabulary: VocabularyMap | None = None,
    ) -> None:  # fmt: skip
        self.form, self.vocabulary = form, vocabulary
        self.backbone = BlockBackbone(form, weights, embedding, head)
        self.heads = DSparkHeads(form, weights)
        model = self.backbone.model
        self.models = (model,)
        self.needs, self.max_levels = form.needs, form.max_levels
        self.device, self.vocab_size, self.logits_dtype = model.device, model.vocab_size, model.logits_dtype
        self.capturable, self.foretells = model.capturable, form.has_confidence

    def __repr__(self) -> str:
        head = "" if self.heads.kind is None else f", {self.heads.kind} Markov head of rank {self.heads.rank}"
        block = f"block of {self.form.block_size}"
        return f"DFlashDraft({self.form.name}, {self.num_parameters:,} parameters, {block}{head}, {self.device})"

    @property
    def num_parameters(self) -> int:
        """Numbers in all of its weights, shared ones included."""
        return self.backbone.num_parameters + sum(weight.numel() for weight in self.heads.weights)

    @property
    def graph_key(self) -> Hashable:
        """Where the weights lie that are none of its model's."""
        return tuple(weight.data_ptr() for weight in (*self.backbone.own_weights, *self.heads.weights))

    @property
    def identity(self) -> str:
        """A digest of what it is, and of a few numbers of the weights that are none of its model's."""
        digest = hashlib.sha256(repr(self.form).encode())
        for weight in (*self.backbone.own_weights, *self.heads.weights):
            middle = weight.detach().flatten()[weight.numel() // 2 :][:8]
            digest.update(f"{tuple(weight.shape)}".encode() + middle.double().cpu().numpy().tobytes())
        return f"{self.form.name}-{digest.hexdigest()[:20]}"

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Shapes of the backbone under a name of its own: its times are not a model's, and its caches are not moved."""
        config, heads = self.form.config, self.heads
        family = f"{self.form.name}-{self.form.block_size}"
        if heads.kind is not None:
            family += f"-{heads.kind}-{heads.rank}"
        return ModelFingerprint(
            family=family, dtype=str(self.logits_dtype).removeprefix("torch."), num_parameters=self.num_parameters,
            vocab_size=self.vocab_size, num_layers=0, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, num_heads=config.num_attention_heads, num_kv_heads=0,
            head_dim=config.head_dim,
        )  # fmt: skip

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where the target's hidden states or tokens are not what the draft was made for."""
        width = int(target.model.config.get_text_config(decoder=True).hidden_size)
        taken = self.backbone.fc.weight.shape[1]
        if taken != len(self.needs) * width:
            raise ValueError(
                f"DFlashDraft: target must have hidden states of width {taken / len(self.needs):g}, as fc takes "
                f"{len(self.needs)} of them as {taken} numbers, got {width}"
            )
        if max(self.needs) > target.num_layers:
            raise ValueError(
                f"DFlashDraft: target must have at least {max(self.needs)} layers, whose hidden states are read, got "
                f"{target.num_layers}"
            )
        if target.dtype != self.backbone.dtype:
            raise ValueError(
                f"DFlashDraft: target must have the dtype that the draft was loaded in, {self.backbone.dtype}, got "
                f"{target.dtype}; load the draft again"
            )
        if self.backbone.model.num_embeddings < target.num_embeddings:
            raise ValueError(
                f"DFlashDraft: target must have at most the {self.backbone.model.num_embeddings} tokens that the draft "
                f"can be fed, got {target.num_embeddings}"
            )

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch with an empty context."""
        return _DFlashDrafting(self, state, max_cache_len, backend, clock)


class _BoundHeads(NamedTuple):
    """The heads with memory for what a native step reads."""

    markov: MarkovHead | None
    confidence: ConfidenceHead | None


class _DFlashDrafting(Drafting):
    """A DFlash draft at work."""

    source: DFlashDraft
    foreign = False

    def __init__(
        self, source: DFlashDraft, state: DecodingState, max_cache_len: int, backend: str, clock: StageClock
    ) -> None:
        super().__init__(source, state, backend, clock)
        form, model, device = source.form, source.backbone.model, state.cache_lens.device
        batch_size = state.cache_lens.shape[0]
        # Behind the committed rows there is room for a block, and for what is written beyond a path's end.
        self.cache = model.new_cache(batch_size, max_cache_len + form.block_size)
        self.rotations = source.backbone.rotations(self.cache.max_cache_len)
        self.tokens = torch.full((batch_size, form.block_size), form.mask_token_id, dtype=torch.int64, device=device)
        self.first_rows = torch.arange(batch_size, device=device)[:, None] * self.cache.max_cache_len
        self.steps = torch.arange(self.cache.max_cache_len, device=device)
        self._bound: dict[int, BoundBlock | None] = {}  # by levels with children
        # By tree: what grows it in these buffers in one call, and the heads that it reads.
        self._grown: dict[StepTree, tuple[TokenBuffers, HostGrowth | None, _BoundHeads]] = {}

    def use(self, source: DraftSource | None, clock: StageClock) -> None:
        """Go on with a source of the same weights, or let go of it."""
        super().use(source, clock)
        self._bound.clear()  # they hold the weights
        self._grown.clear()

    def restart(self) -> None:
        """Forget the context of the batch before."""
        for tensor in self.cache.tensors():  # a masked row counts with weight 0, and 0 times a left-over inf is NaN
            tensor.zero_()

    # Committed rows

    def prefill(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> None:
        """Write the context of the prompts; what is padded lies behind it and is overwritten."""
        self.source.backbone.write_prompts(self.cache, lanes, hidden_states, self.rotations)

    def committed(self, path: VerifiedPath, hidden_states: Sequence[torch.Tensor]) -> None:
        """Write the context of what a step accepted, from the target's hidden states along the path.

        Rows of a path's unused end are written as well, behind the committed ones: so shapes are those of the tree.
        """
        with self.clock.stage("draft"):
            nodes, num_accepted = path.nodes, path.num_accepted
            if nodes.is_cpu:  # where it can be read without a wait
                nodes = nodes[:, : int(num_accepted.max())]
            places = nodes.clamp(min=0).to(torch.int64)[:, :, None]
            features = [states.gather(1, places.expand(-1, -1, states.shape[2])) for states in hidden_states]
            begins = self.state.cache_lens - num_accepted * self.state.active
            positions = begins.to(torch.int64)[:, None] + self.steps[: nodes.shape[1]]
            rows = (self.first_rows + positions).flatten()
            self.source.backbone.write_context(self.cache, features, positions, rows, self.rotations)

    # A step

    def prepare(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Bind the block's forward, where it is native."""
        self._host_growth(layout, buffers)

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Run the block, then draw level by level. Mutates the cache's rows behind the committed ones."""
        with self.clock.stage("draft"):
            logits, slots = self._block(len(layout.levels), buffers.foretold is not None)
        host, bound = self._host_growth(layout, buffers)
        if host is not None:
            self._give_slots(bound, slots, buffers)
            if host.run(self.clock):
                return  # where a value is out of range, the ops below say which
        states = self._first_states(layout, buffers, slots)
        first_slot = self.source.backbone.first_slot
        for depth, level in enumerate(layout.levels):
            with self.clock.stage("draft"):
                slot = first_slot + depth
                rows = self._level_rows(
                    layout, level, buffers, logits[:, depth : depth + 1],
                    None if slots is None else slots[:, slot : slot + 1], states,
                )  # fmt: skip
            self.draw_children(level, rows, buffers)

    def _host_growth(self, layout: TreeLayout, buffers: TokenBuffers) -> tuple[HostGrowth | None, _BoundHeads]:
        """What draws this tree from the block's rows in one call, where something does; made when it is first met."""
        bound, none = self.bound_block(len(layout.levels)), _BoundHeads(None, None)
        if bound is None or self.logits_hook is not None or not self._keeps_rows:
            return None, none
        if type(self).draw_children is not Drafting.draw_children or "draw_children" in vars(self):
            return None, none  # whoever replaced it wants to be called
        known = self._grown.get(layout.tree)
        if known is None or known[0] is not buffers:
            heads = _BoundHeads(self._markov_head(layout), self._confidence_head(buffers))
            host = HostGrowth.of_block(
                bound.logits, heads.markov, self.state, layout, buffers, self.backend, heads.confidence
            )
            known = self._grown[layout.tree] = buffers, host, heads
        return known[1:]

    @property
    def _keeps_rows(self) -> bool:
        """Whether a native block leaves its logits as they are drawn from, in the same memory in every step."""
        form = self.source.form
        return form.logit_scale == 1.0 and form.logit_softcap <= 0.0

    def _markov_head(self, layout: TreeLayout) -> MarkovHead | None:
        """The Markov head with memory for what it reads of a step with this tree."""
        heads, form = self.source.heads, self.source.form
        if heads.w1 is None or heads.w2 is None:
            return None
        if not heads.mixes_hidden:
            return MarkovHead(heads.w1, heads.w2.weight)
        batch_size = self.tokens.shape[0]
        slots = torch.zeros(batch_size, form.block_size, heads.slot_width)
        states = None
        if heads.kind == "rnn":
            states = torch.zeros(batch_size, layout.num_nodes + 1, heads.rank)
        first_slot = self.source.backbone.first_slot
        return MarkovHead(heads.w1, heads.w2.weight, heads.mixing, slots, states, first_slot)

    def _confidence_head(self, buffers: TokenBuffers) -> ConfidenceHead | None:
        """The confidence head with memory for what it reads of a step, where the buffers ask for it."""
        heads = self.source.heads
        if buffers.foretold is None or not heads.has_confidence:
            return None
        slots, first_slot = torch.zeros(self.tokens.shape), self.source.backbone.first_slot
        weight = heads.confidence_weight
        if weight is None:
            return ConfidenceHead(slots, first_slot)
        return ConfidenceHead(slots, first_slot, heads.w1, weight.float())

    def _give_slots(self, heads: _BoundHeads, slots: torch.Tensor | None, buffers: TokenBuffers) -> None:
        """Write what the heads read of a step: what is known of the slots, and what the root goes on from."""
        markov, confidence = heads
        if markov is not None and markov.slots is not None:
            assert slots is not None
            markov.slots.copy_(slots)
            if markov.states is not None:
                markov.states[:, 0].copy_(self._root_states(buffers, slots)[:, 0])
        if confidence is not None:
            assert slots is not None
            confidence.slots.copy_(slots[..., -1])

    def bound_block(self, num_levels: int) -> BoundBlock | None:
        """The block's native forward for trees of so many levels with children, where there is one."""
        if num_levels not in self._bound:
            backbone, state = self.source.backbone, self.state
            self._bound[num_levels] = backbone.bind(self.tokens, self.cache, state.cache_lens, num_levels)
        return self._bound[num_levels]

    def _block(self, num_levels: int, foretells: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give the logits of each level, and what the heads want of all slots' hidden states."""
        backbone, heads = self.source.backbone, self.source.heads
        self.tokens[:, 0].copy_(self.state.root_tokens)
        if self.source.vocab_size > backbone.model.num_embeddings:
            self.tokens.clamp_(max=backbone.model.num_embeddings - 1)
        wants_hidden = heads.mixes_hidden or foretells
        bound = self.bound_block(num_levels)
        scored = None if bound is None else bound.run(wants_hidden)
        if scored is None:  # where a length is out of range, the forward says which
            logits, hidden = backbone.block(self.tokens, self.cache, self.state.cache_lens, wants_hidden)
            logits = logits.narrow(1, backbone.first_slot, num_levels)
        else:
            logits, hidden = scored
        return logits, None if hidden is None else heads.slot_rows(hidden)

    def _first_states(
        self, layout: TreeLayout, buffers: TokenBuffers, slots: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Give the states of an "rnn" head, one for each node and in front of them what the root goes on from."""
        heads = self.source.heads
        if heads.kind != "rnn":
            return None
        batch_size = buffers.tokens.shape[0]
        states = torch.zeros(
            batch_size, layout.num_nodes + 1, heads.rank, dtype=self.source.logits_dtype, device=buffers.tokens.device
        )
        assert slots is not None
        states[:, :1] = self._root_states(buffers, slots)
        return states

    def _root_states(self, buffers: TokenBuffers, slots: torch.Tensor) -> torch.Tensor:
        """Give what the root of an "rnn" head goes on from. [B, 1, rank]."""
        heads, dtype = self.source.heads, self.source.logits_dtype
        none = torch.zeros(slots.shape[0], 1, heads.rank, dtype=dtype, device=slots.device)
        if self.source.form.sample_from_anchor:
            return none
        # The anchor's own slot tells nothing, but it was trained to be the chain's first link, with its own token.
        roots = buffers.tokens[:, :1].clamp(0, heads.num_tokens - 1)
        return heads.rows_states(roots, slots[:, :1], none)

    def _level_rows(
        self, layout: TreeLayout, level: DraftLevel, buffers: TokenBuffers, logits: torch.Tensor,
        slot: torch.Tensor | None, states: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Give the logits of a level's nodes. [B, W, vocab]."""
        heads, width = self.source.heads, level.nodes.shape[0]
        if heads.kind is None and buffers.foretold is None:
            return logits.expand(-1, width, -1)
        first = level.step.first_node
        tokens = buffers.tokens
        tokens = tokens.index_select(1, level.nodes) if first is None else tokens.narrow(1, first, width)
        tokens = tokens.clamp(0, heads.num_tokens - 1)  # one that could not be drawn is -1
        if buffers.foretold is not None:
            assert slot is not None  # whoever asks has seen that it foretells
            buffers.foretold.index_copy_(1, level.nodes, heads.confidence(tokens, slot))
        parents_states = None if states is None else self._parents_states(layout, level, states)
        rows = heads.rows(tokens, logits, slot, parents_states)
        if states is not None and rows.states is not None:
            states.index_copy_(1, level.nodes + 1, rows.states)
        return rows.logits

    @staticmethod
    def _parents_states(layout: TreeLayout, level: DraftLevel, states: torch.Tensor) -> torch.Tensor:
        """Give the states of the nodes' parents; of a shaped tree they are known when its level is drawn."""
        topology = layout.topology.tensors(states.device) if not isinstance(layout.topology, tuple) else layout.topology
        parents = topology.parents.index_select(-1, level.nodes).to(torch.int64) + 1  # the root's is -1
        if parents.dim() == 1:
            return states.index_select(1, parents)
        return states.gather(1, parents[:, :, None].expand(-1, -1, states.shape[2]))

    # What it costs

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        """Give what the Markov head does for a level; the block's forward is no level's, see `step_call`."""
        heads, batch_size = self.source.heads, self.state.cache_lens.shape[0]
        num_rows, device = step.node_ids.shape[0], self.tokens.device
        generator = torch.Generator().manual_seed(num_rows)
        tokens = torch.randint(heads.num_tokens or 1, (batch_size, num_rows), generator=generator).to(device)
        logits = torch.zeros(batch_size, 1, self.source.vocab_size, dtype=self.source.logits_dtype, device=device)
        slot, states = (
            torch.zeros(batch_size, count, width, dtype=logits.dtype, device=device)
            for count, width in ((1, heads.slot_width), (num_rows, heads.rank))
        )
        host = self._level_alone(tokens)
        if host is None:
            return lambda: heads.rows(tokens, logits, slot, states)
        level = len(_wide_tree(num_rows).widths) - 2  # the last with children
        return lambda: host.score_level(level)

    def _level_alone(self, tokens: torch.Tensor) -> HostGrowth | None:
        """What scores a level of nodes with these tokens as `_host_growth` does; None where nothing does."""
        (batch_size, width), source = tokens.shape, self.source
        if source.backbone.model.runs != "native" or not self._keeps_rows:
            return None
        layout = TreeLayout.build(_wide_tree(width), tokens.device)
        given = torch.zeros(batch_size, layout.num_nodes, dtype=torch.int64)
        given[:, layout.levels[-1].nodes] = tokens
        kept = torch.empty(batch_size, layout.num_nodes, source.vocab_size, dtype=source.logits_dtype)
        rows = torch.zeros(batch_size, len(layout.levels), source.vocab_size, dtype=source.logits_dtype)
        buffers, head = TokenBuffers(given, kept, source.vocabulary), self._markov_head(layout)
        if head is not None:
            head = replace(head, first_slot=0)  # the smallest block has slots for both levels, whose numbers are all 0
        return HostGrowth.of_block(rows, head, self.state, layout, buffers, self.backend)

    def step_call(self, context_len: int) -> Callable[[], object]:
        """Give what a step takes whatever its tree: the block's forward, and the context of a few accepted rows."""
        backbone, batch_size, device = self.source.backbone, self.state.cache_lens.shape[0], self.tokens.device
        lens = torch.full((batch_size,), context_len, dtype=torch.int32, device=device)
        positions = lens.to(torch.int64)[:, None] + self.steps[:_TYPICAL_ACCEPTED]
        rows = (self.first_rows + positions).flatten()
        width = backbone.fc.weight.shape[1] // len(self.source.needs)
        states = torch.ones(batch_size, _TYPICAL_ACCEPTED, width, dtype=backbone.dtype, device=device)
        features = [states] * len(self.source.needs)
        heads = self.source.heads
        wants_hidden = heads.mixes_hidden
        bound = backbone.bind(self.tokens, self.cache, lens, min(_TYPICAL_LEVELS, self.source.form.max_levels - 1))

        def call() -> object:
            backbone.write_context(self.cache, features, positions, rows, self.rotations)
            scored = (
                backbone.block(self.tokens, self.cache, lens, wants_hidden)
                if bound is None
                else bound.run(wants_hidden)
            )
            return scored if scored is None or scored[1] is None else heads.slot_rows(scored[1])

        return call


def _wide_tree(width: int) -> TokenTree:
    """Give a tree whose last level with children is so many nodes wide."""
    return TokenTree.chain(2) if width == 1 else TokenTree([-1, *[0] * width, *range(1, width + 1)])


_TYPICAL_ACCEPTED = 4  # tokens of a step
_TYPICAL_LEVELS = 6  # with children, of its tree
