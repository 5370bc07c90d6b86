"""A tree grown by a native draft on the CPU: all levels in one call; see csrc/host/tree_growth.cpp."""

from __future__ import annotations

from typing import Any

import torch

import sequoia_kernels._host as _host
from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.levels import DraftLevel, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.shaping import LevelShape
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.drafts.vocabulary import TokenPairing
from sequoia_kernels.models import BoundForward, TreeCache, TreeModel
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.ops.backends import runs_own
from sequoia_kernels.ops.host_calls import address

__all__ = ["HostGrowth"]


class HostGrowth:
    """Grows one tree in its buffers, on what the state holds then.

    Args:
        prepared: the C++ object.
        bound: the forward of one of its levels, which knows where the weights lie.
        held: what its addresses lie in.
    """

    def __init__(self, prepared: Any, bound: BoundForward, held: list[Any]) -> None:
        self._prepared, self._bound, self._held = prepared, bound, held

    @classmethod
    def bind(
        cls, model: TreeModel, cache: TreeCache, state: DecodingState, layout: TreeLayout, buffers: TokenBuffers,
        backend: str, pairing: TokenPairing | None = None, feeds_last: bool = True,
    ) -> HostGrowth | None:  # fmt: skip
        """Prepare growing a tree; None where the draft's forwards or draws run elsewhere.

        `feeds_last`: whether the first forward feeds the last committed token before the root.
        """
        kept, tokens = buffers.draft_logits, buffers.tokens
        if kept is None or kept.dtype != model.logits_dtype or not tokens.is_cpu:
            return None
        if (buffers.vocabulary is None) != (pairing is None):
            return None
        if not runs_own(sample_without_replacement.__name__, backend, "cpu", "host"):
            return None
        batch_size = tokens.shape[0]
        first_lens = torch.zeros_like(state.draft_lens)
        last_row = torch.ones(batch_size, dtype=torch.int64)  # of the last committed token and the root, the root's
        held: list[Any] = [state, layout, buffers, first_lens]
        levels = []
        bound = None
        for index, level in enumerate(layout.levels):
            width = level.nodes.shape[0]
            with_last = index == 0 and feeds_last
            fed = torch.zeros(batch_size, 2 if with_last else width, dtype=torch.int64)
            if with_last:
                bound = model.bind(fed, cache, first_lens, layout.root_step, last_row=last_row)
            else:
                bound = model.bind(fed, cache, state.draft_lens, level.step)
            if bound is None:
                return None
            held += bound, fed
            levels.append(_fields(level, fed, bound.prepared))
        if bound is None:
            return None
        numbers: dict[str, Any] = {
            "batch_size": batch_size,
            "num_nodes": layout.num_nodes,
            "vocab": kept.shape[2],
            "levels": levels,
            "feeds_last": feeds_last,
        }
        tensors = {
            "tokens": tokens,
            "draft_logits": kept,
            "last_tokens": state.last_tokens,
            "root_tokens": state.root_tokens,
            "draft_lens": state.draft_lens,
            "first_lens": first_lens,
            "temperature": state.temperature,
            "seeds": state.seeds,
            "offsets": state.offsets,
        }
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        maps: tuple[Any, ...] = (None,) * 3
        if pairing is not None:
            maps = pairing.own_ids, pairing.vocabulary.draft_to_target, pairing.fed_ids
            held.extend(maps)
        addresses |= zip(("own_ids", "target_ids", "fed_ids"), map(address, maps))
        numbers["num_fed"] = 0 if pairing is None else len(pairing.fed_ids)
        return cls(_host.TreeGrowth(numbers | addresses), bound, held)

    def run(self, clock: StageClock) -> bool:
        """Grow the tree; False, and the tree is of no use, where a value is out of range."""
        grown = bool(self._prepared.run(self._bound.weights(), torch.get_num_threads()))
        if clock.enabled:
            clock.seconds["draft"] += self._prepared.forward_seconds
            clock.seconds["sample"] += self._prepared.draw_seconds
        return grown


def _fields(level: DraftLevel, fed: torch.Tensor, forward: Any) -> dict[str, Any]:
    return {
        "forward": forward,
        "fed": fed.data_ptr(),
        "nodes": level.nodes.data_ptr(),
        "width": level.nodes.shape[0],
        "adjacent": level.step.first_node is not None,
        "num_samples": level.num_samples,
        "first_child": level.first_child,
        "num_children": level.num_children,
        "drawn": level.drawn.data_ptr(),
        "drawn_per_request": level.drawn.dim() == 2,
        "shape": None if level.shape is None else _shape_fields(level.shape),
    }


def _shape_fields(shape: LevelShape) -> dict[str, int]:
    topology, shared = shape.topology, shape.shared
    tensors = {
        "parents": topology.parents,
        "ranks": topology.ranks,
        "first_child": topology.first_child,
        "num_children": topology.num_children,
        "ancestor_mask": topology.ancestor_mask,
        "reach": shared.reach,
        "drawn": shared.drawn,
        "undrawn": shared.undrawn,
        "edges": shared.edges,
        "own_mask": shape.own_mask,
    }
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    return {
        "num_nodes": shared.reach.shape[1],
        "num_words": topology.ancestor_mask.shape[-1],
        "max_children": shape.max_children,
        "num_ranks": len(shared.drawn),
        "num_edges": len(shared.edges),
        "first": shape.first,
        **{name: address(tensor) for name, tensor in tensors.items()},
    }
