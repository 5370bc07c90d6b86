"""tree="auto" and "adaptive": measure what is not known yet, then take the planner's pick or picks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from sequoia_kernels.decoding.arguments import GenerationArguments
from sequoia_kernels.decoding.probe import PROBE_TREE
from sequoia_kernels.decoding.stats import GenerateStats
from sequoia_kernels.measure import measure_profile
from sequoia_kernels.models import TreeModel
from sequoia_kernels.planner import (
    AcceptanceEstimate,
    AdaptivePlan,
    HardwareProfile,
    TreePlan,
    estimate_acceptance,
    plan_adaptive,
    plan_tree,
)
from sequoia_kernels.tree import TokenTree

logger = logging.getLogger("sequoia_kernels")

# what was measured, by target and draft model
_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, Any]]] = WeakKeyDictionary()


def choose_tree(
    target: TreeModel,
    draft: TreeModel,
    arguments: GenerationArguments,
    *,
    acceptance: AcceptanceEstimate | Sequence[float] | None,
    profile: HardwareProfile | None,
    probe: Callable[[TokenTree], GenerateStats],
    calibrate: Callable[[HardwareProfile], HardwareProfile],
    adaptive: bool = False,
) -> TreePlan | AdaptivePlan:
    """Plan a tree for these models, requests and machine.

    Args:
        target: the target.
        draft: the draft.
        arguments: the call's checked arguments.
        acceptance: acceptance vector; None estimates it by generating from the call's own prompts with `PROBE_TREE`.
        profile: hardware profile; None measures the two models on their device.
        probe: generates with a tree and gives the statistics.
        calibrate: adds the loop's own overhead to a profile.
        adaptive: plan several trees to switch between.

    Returns:
        The plan. What was measured is kept for as long as the target lives, for the same draft, batch size and
        sampling settings.
    """
    context_len = max(arguments.prompt_lens) + arguments.max_new_tokens // 2
    memory = _known.setdefault(target.model, WeakKeyDictionary()).setdefault(draft.model, {})
    if profile is None:
        modes = (target.compile_mode, draft.compile_mode)
        key: tuple[object, ...] = ("profile", arguments.batch_size, context_len.bit_length(), modes)
        if key not in memory:
            logger.info("measuring the models' forward times, once; pass profile= to skip this")
            memory[key] = calibrate(
                measure_profile(target, draft, context_lens=(context_len,), batch_size=arguments.batch_size, quick=True)
            )
        profile = memory[key]
    if acceptance is None:
        settings = (arguments.temperature, arguments.top_k, arguments.top_p)
        key = ("acceptance", repr(settings))
        if key not in memory:
            logger.info("estimating the acceptance vector, once; pass acceptance= to skip this")
            memory[key] = estimate_acceptance(probe(PROBE_TREE), temperature=max(arguments.temperature))
        acceptance = memory[key]
    plan = (plan_adaptive if adaptive else plan_tree)(
        acceptance, profile, context_len=context_len, batch_size=arguments.batch_size, target=target, draft=draft,
        temperature=max(arguments.temperature),
    )  # fmt: skip
    logger.info("tree=%r: %s", "adaptive" if adaptive else "auto", plan.describe())
    return plan
