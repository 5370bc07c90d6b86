"""The backbone of DFlash drafts: a block of rows behind the target's features, as one forward of a tree model.

The layers are Qwen3's, so the backbone is a `Qwen3ForCausalLM` with the draft's layers between the target's embedding
and head, and `adapt` runs it like any other model. A block is a tree step whose mask shows every row of the block to
every other; its keys and values lie behind the committed rows, and the next block overwrites them. What is committed is
no text to it: keys and values of committed rows are projections of the target's features, written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config

from sequoia_kernels.drafts.dflash.forms import DFlashForm, LayerSight
from sequoia_kernels.models import BoundForward, FewRowsLinear, StepContext, TreeCache, TreeModel, TreeStep, adapt

__all__ = ["BlockBackbone", "BoundBlock", "block_step"]

_CHUNK_ROWS = 512  # of a prompt's features that are projected at a time


class BlockBackbone:
    """Layers, features and head of a DFlash draft.

    Args:
        form: what the draft is.
        weights: of the layers, the norm, `fc` and `hidden_norm`, on the target's device and in its dtype.
        embedding: of tokens, the target's as a rule.
        head: likewise.

    Attributes:
        model: the layers between embedding and head.
        fc: projects the target's features.
        hidden_norm: their norm behind it.
        device: where it runs.
        dtype: of its weights.
        first_slot: slot of a block that tells the root's children.
    """

    def __init__(
        self, form: DFlashForm, weights: Mapping[str, torch.Tensor], embedding: nn.Module, head: nn.Module
    ) -> None:
        # Half a second to import, for those who have such a draft.
        from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RotaryEmbedding

        self.form, self.first_slot = form, 1 - int(form.sample_from_anchor)
        self.fc, self.hidden_norm = FewRowsLinear(weights["fc.weight"]), weights["hidden_norm.weight"]
        self.device, self.dtype = self.hidden_norm.device, self.hidden_norm.dtype
        device = self.device
        seen = _in_tree_masks(form.sights, form.block_size)
        config = Qwen3Config(**form.config.to_dict())
        windows = [None] * len(form.sights) if seen is None else seen[1]
        config.layer_types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        config.sliding_window = max((window for window in windows if window is not None), default=None)
        with torch.device("meta"):  # without memory for what is replaced
            model = Qwen3ForCausalLM(config)
        stacked = self._stack(weights)
        named = {
            f"model.{name}": weight for name, weight in {**weights, **stacked}.items()
            if name.startswith("layers.") or name == "norm.weight"
        }  # fmt: skip
        model.load_state_dict(named, strict=False, assign=True)
        model.model.embed_tokens, model.lm_head = embedding, head
        model.model.rotary_emb = Qwen3RotaryEmbedding(config=config).to(device)
        model.requires_grad_(False)
        left = [name for name, weight in model.named_parameters() if weight.is_meta]
        assert not left, left  # whoever gathers the weights has checked
        is_causal = seen is not None and seen[0]
        attention = None if seen is not None else _BlockAttention(form.sights, form.block_size)
        self.model: TreeModel = adapt(model.eval(), attention=attention)
        self.step = block_step(form.block_size, is_causal, device)
        self._rotary = model.model.rotary_emb

    def _stack(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put what projects features to keys and values of all layers into one tensor, whose parts the layers have."""
        config = self.form.config
        stacked: dict[str, torch.Tensor] = {}
        parts: list[torch.Tensor | None] = []
        for kind in ("weight", "bias"):
            names = [
                f"layers.{index}.self_attn.{side}_proj.{kind}"
                for index in range(config.num_hidden_layers) for side in "kv"
            ]  # fmt: skip
            if names[0] not in weights:
                parts.append(None)
                continue
            whole = torch.cat([weights[name] for name in names])
            parts.append(whole)
            stacked |= zip(names, whole.chunk(len(names)), strict=True)
        assert parts[0] is not None
        self._kv = FewRowsLinear(parts[0], parts[1])
        norms = [weights[f"layers.{index}.self_attn.k_norm.weight"] for index in range(config.num_hidden_layers)]
        self._key_norms = torch.stack(norms)[:, None]  # [layers, 1, D]
        return stacked

    @property
    def own_weights(self) -> list[torch.Tensor]:
        """What a step reads beside the model's weights."""
        return [*self.fc.tensors, *self._kv.tensors, self.hidden_norm, self._key_norms]

    def rotations(self, num_positions: int) -> torch.Tensor:
        """Give what rotates keys at positions: cosines, then sines, those of the first half of a head negated.

        Returns:
            [num_positions, 2, D].
        """
        cosines, sines = self._rotary(self.hidden_norm, torch.arange(num_positions, device=self.device)[None])
        half = sines.shape[-1] // 2
        return torch.stack((cosines[0], torch.cat((-sines[0, :, :half], sines[0, :, half:]), 1)), 1)

    def write_context(
        self, cache: TreeCache, features: Sequence[torch.Tensor], positions: torch.Tensor, rows: torch.Tensor,
        rotations: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write the keys and values of committed rows into all layers of a cache.

        Args:
            cache: the model's.
            features: hidden states of the target. [R, T, width] each.
            positions: of the rows. [R, T] int64.
            rows: flat cache rows that they go to. [R * T] int64.
            rotations: as `rotations` gives them, for all of the positions.
        """
        cache.require_rows("DFlashDraft")
        config, head_dim = self.form.config, self.form.config.head_dim
        context = self.fc(torch.cat(list(features), dim=-1).to(self.dtype))
        context = F.rms_norm(context, (config.hidden_size,), self.hidden_norm, config.rms_norm_eps)
        shape = (rows.shape[0], config.num_hidden_layers, 2, config.num_key_value_heads, head_dim)
        keys, values = self._kv(context).view(shape).unbind(2)  # [R * T, layers, Hkv, D] each
        keys = F.rms_norm(keys, (head_dim,), eps=config.rms_norm_eps) * self._key_norms
        cosines, sines = rotations.index_select(0, positions.flatten())[:, :, None, None].unbind(1)
        keys = torch.addcmul(keys * cosines, keys.roll(head_dim // 2, -1), sines)
        for index, layer in enumerate(cache.layers):
            layer.flat_keys.index_copy_(0, rows, keys[:, index])
            layer.flat_values.index_copy_(0, rows, values[:, index])

    def write_prompts(
        self, cache: TreeCache, lanes: Sequence[int], features: Sequence[torch.Tensor], rotations: torch.Tensor
    ) -> None:
        """Write the context of whole prompts, from position 0 on.

        Args:
            cache: the model's.
            lanes: requests of the cache, R of them.
            features: hidden states of the target. [R, T, width] each.
            rotations: as for `write_context`.
        """
        length, device = features[0].shape[1], self.device
        first_rows = torch.tensor(lanes, device=device)[:, None] * cache.max_cache_len
        for start in range(0, length, _CHUNK_ROWS):
            positions = torch.arange(start, min(start + _CHUNK_ROWS, length), device=device).expand(len(lanes), -1)
            part = [states[:, start : start + _CHUNK_ROWS] for states in features]
            self.write_context(cache, part, positions, (first_rows + positions).flatten(), rotations)

    def block(
        self, tokens: torch.Tensor, cache: TreeCache, cache_lens: torch.Tensor, wants_hidden: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the block behind the committed rows.

        Args:
            tokens: the last token and masks. [B, block_size] int64.
            cache: the model's; its rows behind the committed ones are written.
            cache_lens: committed rows. [B] int32.
            wants_hidden: whether hidden states are asked for.

        Returns:
            Logits [B, block_size, vocab], and hidden states behind the last norm [B, block_size, hidden_size] or None.
        """
        last = self.model.num_layers
        hidden = {last: tokens} if wants_hidden else {}
        logits = self.model.forward(tokens, cache, cache_lens, self.step, hidden_states=hidden)
        return self._as_said(logits), hidden.get(last)

    def bind(
        self, tokens: torch.Tensor, cache: TreeCache, cache_lens: torch.Tensor, num_levels: int
    ) -> BoundBlock | None:
        """Prepare native forwards of what will lie in these tensors; None where there are none. See `block`.

        Args:
            tokens: as for `block`.
            cache: as for `block`.
            cache_lens: as for `block`.
            num_levels: levels with children of the tree that is grown: of no other slots are there logits.
        """
        slots = torch.arange(self.first_slot, self.first_slot + num_levels).repeat(tokens.shape[0], 1)
        bound = self.model.bind(tokens, cache, cache_lens, self.step, wanted_rows=slots)
        if bound is None:
            return None
        logits = torch.empty(bound.shape, dtype=self.model.logits_dtype)
        hidden = torch.empty(*tokens.shape, self.form.config.hidden_size)
        return BoundBlock(self, bound, logits, hidden)

    def _as_said(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap logits as the form says."""
        if self.form.logit_scale != 1.0:
            logits = logits * self.form.logit_scale
        if self.form.logit_softcap > 0.0:
            logits = torch.tanh(logits / self.form.logit_softcap) * self.form.logit_softcap
        return logits

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in all of its weights."""
        return self.model.num_parameters + self.fc.weight.numel() + self.hidden_norm.numel()


class BoundBlock(NamedTuple):
    """A native forward of a block on memory of its own; made by `BlockBackbone.bind`."""

    backbone: BlockBackbone
    forward: BoundForward
    logits: torch.Tensor  # [B, levels, vocab]
    hidden: torch.Tensor  # [B, block_size, hidden_size] float32

    def run(self, wants_hidden: bool) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Run the block; None, and nothing is written, where a length leaves no room in the cache.

        Returns:
            Logits of the levels [B, levels, vocab], and hidden states as of `BlockBackbone.block`; the next run may
            overwrite them.
        """
        hidden_states = {self.backbone.model.num_layers: self.hidden} if wants_hidden else None
        if not self.forward.run(self.logits, hidden_states):
            return None
        logits = self.backbone._as_said(self.logits)
        return logits, self.hidden.to(self.backbone.dtype) if wants_hidden else None


def _in_tree_masks(sights: Sequence[LayerSight], block_size: int) -> tuple[bool, list[int | None]] | None:
    """Say what layers see as one tree mask and windows: whether the mask is causal, and the window of each layer.

    A tree step counts a row's window from the number of slots that it sees. In a causal block that is its position; in
    another one all rows count as the block's last.

    Returns:
        None where it cannot be said so.
    """
    causal = {sight.causal for sight in sights}
    windows = {(sight.window, sight.from_anchor) for sight in sights if sight.window is not None}
    if len(causal) > 1 or len(windows) > 1:
        return None
    (is_causal,) = causal
    if any(from_anchor == is_causal for _, from_anchor in windows):
        return None
    longer = 0 if is_causal else block_size
    return is_causal, [None if sight.window is None else sight.window + longer for sight in sights]


def block_step(block_size: int, is_causal: bool, device: torch.device) -> TreeStep:
    """Give the tree step of a block: rows that all see one another, or each those before it."""
    words = -(-block_size // 32)
    slots = torch.arange(32 * words)
    rows = torch.arange(block_size)[:, None]
    seen = slots <= rows if is_causal else (slots < block_size).expand(block_size, -1)
    bits = seen.view(block_size, words, 32).to(torch.int64) << torch.arange(32)
    mask = bits.sum(-1).to(torch.int32)  # wraps where bit 31 is set
    ids = torch.arange(block_size, dtype=torch.int32, device=device)
    return TreeStep(mask.to(device), ids, ids, block_size, 0)


class _BlockAttention:
    """A `TreeAttention` for layers that see what one tree mask and one window cannot say.

    Reads the whole cache under a mask: exact, of static shapes, and slower than the op where caches are long.
    """

    def __init__(self, sights: Sequence[LayerSight], block_size: int) -> None:
        self.sights, self.block_size = tuple(sights), block_size

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: StepContext, *,
        scale: float | None, softcap: float | None, sliding_window: int | None, sinks: torch.Tensor | None,
        module: nn.Module,
    ) -> torch.Tensor:  # fmt: skip
        visible = self._visible(self.sights[module.layer_idx], query.shape[1], keys.shape[1], context.cache_lens)  # type: ignore[index]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible[:, None],
            scale=scale, enable_gqa=query.shape[2] != keys.shape[2],
        )  # fmt: skip
        return attended.transpose(1, 2)

    @staticmethod
    def _visible(sight: LayerSight, num_rows: int, num_slots: int, cache_lens: torch.Tensor) -> torch.Tensor:
        """Which cache rows each row of the block sees. [B, N, S] bool."""
        device = cache_lens.device
        anchors = cache_lens.to(torch.int64)[:, None, None]
        offsets = torch.arange(num_slots, device=device) - anchors  # [B, 1, S], from the anchor on
        rows = torch.arange(num_rows, device=device)[:, None]
        visible = offsets < (rows + 1 if sight.causal else num_rows)
        if sight.window is not None:
            if sight.from_anchor:
                visible = visible & (offsets >= -sight.window)
            else:
                visible = visible & ((rows - offsets).abs() < sight.window)
        return visible.expand(-1, num_rows, -1)
