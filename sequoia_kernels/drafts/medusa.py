"""Medusa heads as a draft: each predicts one position further from the target's last hidden state.

The newest committed token's hidden state f_t, behind the target's final norm, is known when a step begins; the token
behind it is the tree's root. Head k (from 0) was trained for the token k + 2 positions behind t, so its row is that of
every node at depth k: all nodes of a depth share one row, and a tree has at most one level more than there are heads.

Computes, for head k: x = f_t; for each block x <- x + silu(W x + b); logits = H x. All heads in one batched product.

Source: arXiv 2401.10774 (Medusa), whose tree verification by a typical acceptance is not lossless and is not used here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.folders import DraftFolder, DraftFormat, register_format
from sequoia_kernels.drafts.levels import TokenBuffers, TreeLayout
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeModel, TreeStep
from sequoia_kernels.ops import VerifiedPath

__all__ = ["MedusaDraft", "MedusaHeads"]

_PREFIX = "medusa_head."  # of every weight in files that hold the whole module
_DIGEST_ELEMENTS = 64  # of each weight


class MedusaHeads(NamedTuple):
    """Weights of all heads, stacked. K heads, H the target's width, V tokens.

    Attributes:
        weights: of each block. [K, H, H].
        biases: of each block. [K, 1, H].
        head: [K, V, H].
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    head: torch.Tensor

    def logits(self, hidden: torch.Tensor, num_heads: int | None = None) -> torch.Tensor:
        """Give the rows of the first heads. [B, H] -> [K, B, V]."""
        count = self.head.shape[0] if num_heads is None else num_heads
        states = hidden.expand(count, -1, -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            states = states + F.silu(torch.baddbmm(bias[:count], states, weight[:count].transpose(1, 2)))
        return torch.bmm(states, self.head[:count].transpose(1, 2))

    def tensors(self) -> list[torch.Tensor]:
        """Give all weights."""
        return [*self.weights, *self.biases, self.head]


class MedusaDraft(DraftSource):
    """Medusa heads as the draft; made by `from_folder` or `draft_from_folder`.

    Args:
        heads: their weights, on the target's device and in its dtype.
        target_layers: layers of the target, whose last hidden state they read.
        name: what to call them, a path say.

    Attributes:
        heads: as given.
        max_levels: levels of the deepest tree that there are heads for.
    """

    def __init__(self, heads: MedusaHeads, target_layers: int, name: str = "") -> None:
        self.heads, self.name = heads, name
        count, self.vocab_size, self._width = heads.head.shape
        self.num_heads, self.max_levels = count, count + 1
        self.needs = (target_layers,)
        self.device, self.logits_dtype = heads.head.device, heads.head.dtype
        self._digest = _digest(heads)

    @classmethod
    def from_folder(cls, path_or_id: str | os.PathLike[str], target: TreeModel) -> MedusaDraft:
        """Load heads.

        Args:
            path_or_id: their folder, with config.json and medusa_lm_head.safetensors or .pt, or a hub id.
            target: the target that they were trained for; they run on its device in its dtype.

        Raises:
            FileNotFoundError: no such folder, none with a config.json and weights, or the id is neither cached nor
                reachable.
            ValueError: an option is not understood, a weight is missing, left over or of another shape.

        Example:
            draft = MedusaDraft.from_folder("heads/medusa-vicuna-7b-v1.3", adapt(target))
            generate(target, draft, input_ids, tree="auto", max_new_tokens=200)
        """
        folder = DraftFolder.open(path_or_id, "MedusaDraft.from_folder")
        if not _is_medusa(folder.config):
            raise ValueError(f"{folder}: must have medusa_num_heads in its config.json, got none")
        return _load(folder, target)

    def __repr__(self) -> str:
        return f"MedusaDraft({self.num_heads} heads, {self.num_parameters:,} parameters, {self.name or self.device})"

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights."""
        return sum(weight.numel() for weight in self.heads.tensors())

    @property
    def graph_key(self) -> Hashable:
        """Where its weights lie, which a captured step reads."""
        return tuple(weight.data_ptr() for weight in self.heads.tensors())

    @property
    def identity(self) -> str:
        """The heads by their weights."""
        return f"medusa-{self._digest}"

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Shapes of the heads; they keep no cache."""
        return ModelFingerprint(
            family=f"medusa-{self.num_heads}-{len(self.heads.weights)}",
            dtype=str(self.logits_dtype).removeprefix("torch."), num_parameters=self.num_parameters,
            vocab_size=self.vocab_size, num_layers=0, hidden_size=self._width, intermediate_size=None, num_heads=0,
            num_kv_heads=0, head_dim=0,
        )  # fmt: skip

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where the target's last hidden state is not what the heads read."""
        width = int(target.model.config.get_text_config(decoder=True).hidden_size)
        if (width, target.num_layers) != (self._width, self.needs[0]):
            raise ValueError(
                f"MedusaDraft: target must have {self.needs[0]} layers of width {self._width}, got "
                f"{target.num_layers} of width {width}"
            )

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch."""
        return _MedusaDrafting(self, state, backend, clock)


class _MedusaDrafting(Drafting):
    """Heads at work.

    Attributes:
        hidden: the target's hidden state of each request's newest committed token. [B, H].
    """

    source: MedusaDraft
    foreign = False

    def __init__(self, source: MedusaDraft, state: DecodingState, backend: str, clock: StageClock) -> None:
        super().__init__(source, state, backend, clock)
        shape = (state.cache_lens.shape[0], source.heads.head.shape[2])
        with torch.inference_mode(False):
            self.hidden = torch.zeros(shape, dtype=source.logits_dtype, device=source.device)
        state.carried.append(self.hidden)

    def restart(self) -> None:
        """Forget the batch before."""
        self.hidden.zero_()

    def prefill(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> None:
        """Keep the prompts' last hidden states."""
        ends = (num_tokens.to(torch.int64) - 1)[:, None, None]
        self.hidden[lanes] = hidden_states[0].take_along_dim(ends, 1)[:, 0].to(self.hidden.dtype)

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Run the heads of the tree's levels, then draw level by level."""
        with self.clock.stage("draft"):
            rows = self.source.heads.logits(self.hidden, len(layout.levels))
        for logits, level in zip(rows, layout.levels, strict=True):
            self.draw_children(level, logits[:, None].expand(-1, level.nodes.shape[0], -1), buffers)

    def committed(self, path: VerifiedPath, hidden_states: Sequence[torch.Tensor]) -> None:
        """Keep the hidden states of the newest accepted tokens."""
        ends = (path.num_accepted.to(torch.int64) - 1)[:, None]
        newest = path.nodes.to(torch.int64).gather(1, ends).clamp(min=0)[:, :, None]
        self.hidden.copy_(hidden_states[0].take_along_dim(newest, 1)[:, 0])

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        """Give nothing to do: the heads' rows are there already, see `step_call`."""
        return lambda: None

    def step_call(self, context_len: int) -> Callable[[], object]:
        """Give the product of all heads."""
        heads, hidden = self.source.heads, torch.ones_like(self.hidden)
        return lambda: heads.logits(hidden)


def _is_medusa(config: Mapping[str, Any]) -> bool:
    return "medusa_num_heads" in config


def _load(folder: DraftFolder, target: TreeModel) -> MedusaDraft:
    numbers = []
    for name, default in (("medusa_num_heads", None), ("medusa_num_layers", 1)):
        value = folder.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < (default is None):
            raise ValueError(f"{folder}: {name} must be an integer of at least {int(default is None)}, got {value!r}")
        numbers.append(value)
    num_heads, num_blocks = numbers
    # Some published configs say fewer than there are.
    while any(f"{prefix}{num_heads}.{num_blocks}.weight" in folder for prefix in ("", _PREFIX)):
        num_heads += 1
    width = int(target.model.config.get_text_config(decoder=True).hidden_size)

    def stacked(name: str, *shape: int | None) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for head in range(num_heads):
            own = f"{head}.{name}"
            # All heads are of one shape: the first one's.
            parts.append(folder.need(own, _PREFIX + own, shape=parts[0].shape if parts else shape))
        return torch.stack([part.to(target.device, target.dtype) for part in parts])

    blocks = range(num_blocks)
    heads = MedusaHeads(
        tuple(stacked(f"{block}.linear.weight", width, width) for block in blocks),
        tuple(stacked(f"{block}.linear.bias", width)[:, None] for block in blocks),
        stacked(f"{num_blocks}.weight", None, width),
    )
    folder.check_all_taken()
    return MedusaDraft(heads, target.num_layers, str(folder.path))


def _digest(heads: MedusaHeads) -> str:
    """Tell heads apart cheaply: shapes, and a few elements from the middle of every weight."""
    digest = hashlib.sha256()
    for weight in heads.tensors():
        middle = weight.detach().flatten()[weight.numel() // 2 :][:_DIGEST_ELEMENTS]
        digest.update(f"{tuple(weight.shape)}".encode() + middle.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


register_format(DraftFormat("medusa", _is_medusa, _load))
