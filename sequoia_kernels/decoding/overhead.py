"""What the loop costs beyond the forwards and ops that a hardware profile knows: measured, and added to the profile."""

from __future__ import annotations

from typing import Any

import torch

from sequoia_kernels.decoding.arguments import GenerationArguments
from sequoia_kernels.decoding.loop import decode
from sequoia_kernels.drafts import draft_source, request_seeds
from sequoia_kernels.models import adapt
from sequoia_kernels.planner import CostModel, HardwareProfile
from sequoia_kernels.tree import TokenTree

# Wide enough to see a fifth child, deep enough to be accepted often: about the optimal 24 nodes for a middling pair.
PROBE_TREE = TokenTree([-1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 6, 6, 6, 7, 10, 13, 13, 14, 18, 18, 21])


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
        The profile with `step_overhead_ms` and `level_overhead_ms` set. The median run counts. The draft's
        draws that take longer than the op alone are charged to the levels, the rest to the step. Where stages cannot
        be timed apart (CUDA), the whole difference is charged to the step.

    Notes:
        The forwards' own times are not corrected: on a CPU only what happens outside of them counts. Beside a pass of
        a target that streams its layers to a GPU the rest is next to nothing, and would take hundreds of passes to
        measure: it is left at 0.
    """
    target = adapt(target)
    if target.device.type == "cuda" and not target.capturable:  # it streams its layers
        return profile.with_overhead(0.0)
    draft = draft_source(draft) if draft is not None else None
    speculates: dict[str, Any] = {} if draft is None else {"draft": draft.fingerprint, "temperature": 1.0}
    cost = CostModel(profile.with_overhead(0.0), batch_size=batch_size, target=target, **speculates)
    if target.max_positions is not None:
        context_len = min(context_len, max(target.max_positions // 2, 1))
        num_tokens = min(num_tokens, target.max_positions - context_len)
    tree = TokenTree(PROBE_TREE.parents[: cost.max_nodes])  # no larger than what was measured
    overheads = []
    for run in range(num_runs + 1):  # the first one warms up
        generator = torch.Generator().manual_seed(run)
        prompts = torch.randint(0, target.num_embeddings, (batch_size, context_len), generator=generator)
        arguments = GenerationArguments(
            prompts, prompts, [context_len] * batch_size, num_tokens,
            temperature=[1.0] * batch_size, top_k=None, top_p=None, eos_token_ids=frozenset(), pad_token_id=0,
            seeds=request_seeds(run, batch_size), max_cache_len=target.max_positions,
        )  # fmt: skip
        stats = decode(target, draft, tree, arguments).stats
        assert stats.tree is not None
        known = cost.stages(stats.tree, context_len + num_tokens / 2)
        step_ms = 1e3 * stats.decode_seconds / stats.num_steps
        num_draws = stats.tree.num_levels - 1
        if not stats.stage_seconds:
            overheads.append((max(0.0, step_ms - sum(known.values())), 0.0))
            continue
        measured = {name: 1e3 * seconds / stats.num_steps for name, seconds in stats.stage_seconds.items()}
        draws = max(0.0, measured.get("sample", 0.0) - known["sample"])
        outside = step_ms - measured["target"] - measured.get("draft", 0.0) - measured.get("sample", 0.0)
        rest = max(0.0, outside - known["verify"] - known["commit"])
        overheads.append((rest, draws / num_draws if num_draws else 0.0))
    step_ms, level_ms = sorted(overheads[1:])[num_runs // 2]
    return profile.with_overhead(step_ms, level_ms)
