"""What the loop costs beyond the forwards and ops that a hardware profile knows: measured, and added to the profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sequoia_kernels.decoding.arguments import GenerationArguments
from sequoia_kernels.decoding.loop import decode
from sequoia_kernels.decoding.stats import GenerateStats
from sequoia_kernels.drafts import DraftSource, draft_source, request_seeds
from sequoia_kernels.models import TreeModel, adapt, agree_on_changes
from sequoia_kernels.parallel import preparing, together
from sequoia_kernels.planner import CostModel, HardwareProfile
from sequoia_kernels.tree import TokenTree

# Wide enough to see a fifth child, deep enough to be accepted often: about the optimal 24 nodes for a middling pair.
PROBE_TREE = TokenTree([-1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 6, 6, 6, 7, 10, 13, 13, 14, 18, 18, 21])


def probe_tree(draft: DraftSource | None = None) -> TokenTree:
    """Give a tree whose run tells the acceptance of all ranks that matter, no deeper than a draft can grow."""
    return growable_part(PROBE_TREE, draft)


def growable_part(tree: TokenTree, draft: DraftSource | None) -> TokenTree:
    """Give the levels of a tree that a draft can grow."""
    limit = None if draft is None else draft.max_levels
    if limit is None or limit >= tree.num_levels:
        return tree
    return TokenTree(tree.parents[: sum(depth < limit for depth in tree.depths)])


def measure_overhead(
    target: Any,
    draft: Any | None,
    profile: HardwareProfile,
    *,
    context_len: int = 64,
    batch_size: int = 1,
    num_tokens: int = 96,
    num_runs: int = 3,
) -> HardwareProfile:
    """Run the loop on random tokens and give the profile with what its steps took beyond the profile's own times.

    Args:
        target: the target, a Hugging Face model or a `TreeModel`.
        draft: the draft, likewise or a `DraftSource`; None measures plain decoding.
        profile: times of the two models on this device.
        context_len: tokens of the random prompts; half of the target's positions at most.
        batch_size: requests decoded together.
        num_tokens: tokens of each run, as far as the target's positions go.
        num_runs: runs behind one that warms up.

    Returns:
        The profile with its overheads set. The median run counts. What plain decoding takes is charged to the step,
        what two trees of different depth take beyond it to having a draft and to its forwards. Where stages cannot be
        timed apart (CUDA), the whole difference is charged to the step.

    Notes:
        The target's own times are not corrected: on a CPU only what happens outside of its forwards counts. What the
        draft's take beyond the profile's is overhead: the first one of a step finds the caches full of the target's
        weights. Beside a pass of a target that streams its layers to a GPU the rest is next to nothing, and
        would take hundreds of passes to measure: it is left at 0.
    """
    agree_on_changes(target, draft)
    target = adapt(target)
    if target.device.type == "cuda" and not target.capturable:  # it streams its layers
        return profile.with_overhead(0.0)
    with preparing(target, "measure_overhead"):
        draft = draft_source(draft)
        speculates: dict[str, Any] = {} if draft is None else {"draft": draft.fingerprint, "temperature": 1.0}
        cost = CostModel(profile.with_overhead(0.0), batch_size=batch_size, target=target, **speculates)
        if target.max_positions is not None:
            context_len = min(context_len, max(target.max_positions // 2, 1))
            num_tokens = min(num_tokens, target.max_positions - context_len)
        # No larger than what was measured. The small one tells what is once a step from what is once a level.
        probe = probe_tree(draft)
        largest = min(probe.num_nodes, cost.max_nodes)
        trees = [TokenTree(probe.parents[: min(nodes, largest)]) for nodes in (largest, 4)]
    models = (target,) if draft is None else (target, *draft.models)
    overheads = together(
        models, lambda: _overheads(target, draft, cost, trees, context_len, batch_size, num_tokens, num_runs),
        where="measure_overhead",
    )  # fmt: skip
    return profile.with_overhead(*(sorted(parts[1:])[num_runs // 2] for parts in zip(*overheads)))


def _overheads(
    target: TreeModel, draft: DraftSource | None, cost: CostModel, trees: Sequence[TokenTree], context_len: int,
    batch_size: int, num_tokens: int, num_runs: int,
) -> list[tuple[float, float, float]]:  # fmt: skip
    """Give what a step, its draft and each level took beyond what is known, in milliseconds, of every run."""
    overheads = []
    for run in range(num_runs + 1):  # the first one warms up
        generator = torch.Generator().manual_seed(run)
        prompts = torch.randint(0, target.num_embeddings, (batch_size, context_len), generator=generator)
        arguments = GenerationArguments(
            prompts, prompts, [context_len] * batch_size, num_tokens,
            temperature=[1.0] * batch_size, top_k=None, top_p=None, eos_token_ids=frozenset(), pad_token_id=0,
            seeds=request_seeds(run, batch_size), max_cache_len=target.max_positions,
        )  # fmt: skip
        means = context_len + num_tokens / 2
        stats = decode(target, draft, trees[0], arguments).stats
        step_ms, level_ms, draft_ms = _overhead(stats, cost, means), 0.0, 0.0
        if draft is not None and stats.stage_seconds:
            small = _overhead(decode(target, draft, trees[1], arguments).stats, cost, means)
            plain = _overhead(decode(target, None, TokenTree.single(), arguments).stats, cost, means)
            if trees[0].num_levels > trees[1].num_levels:
                level_ms = max(0.0, (step_ms - small) / (trees[0].num_levels - trees[1].num_levels))
            draft_ms = max(0.0, small - plain - level_ms * (trees[1].num_levels - 1))
            step_ms = plain
        overheads.append((step_ms, level_ms, draft_ms))
    return overheads


def _overhead(stats: GenerateStats, cost: CostModel, context_len: float) -> float:
    """Give the milliseconds that one run's steps took beyond what is known of their forwards and ops."""
    assert isinstance(stats.tree, TokenTree)
    known = cost.stages(stats.tree, context_len)
    step_ms = 1e3 * stats.decode_seconds / stats.num_steps
    if stats.stage_seconds:  # the target's own time is what it was
        known["target"] = 1e3 * stats.stage_seconds["target"] / stats.num_steps
    return max(0.0, step_ms - sum(known.values()))
