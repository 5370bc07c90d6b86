"""This package's loop: token by token, and with the tree that the planner picks for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.common.runtimes.base import DRAFT, Pair, Request, Runtime, Tokens
from sequoia_kernels import TreePlan, estimate_acceptance, generate, measure_profile, plan_tree
from sequoia_kernels.decoding import PROBE_TREE, measure_overhead, record_steps
from sequoia_kernels.models import adapt

NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class OwnLoop(Runtime):
    """`generate`, whose forwards must be the native ones."""

    modules = {"sequoia_kernels": "sequoia-kernels", "torch": "torch"}  # noqa: RUF012
    batched_draft = True
    tuned = False

    def __init__(self, pair: Pair, threads: int, folder: Path) -> None:
        super().__init__(pair, threads, folder)
        torch.set_num_threads(threads)
        self.models = {role: adapt(pair.load(role)) for role in pair.roles()}
        for role, model in self.models.items():
            if model.runs != "native":
                raise RuntimeError(f"the {role}'s forwards are not native: {model.not_native}")
        self.profiles: dict[int, Any] = {}  # by batch size
        self.plans: dict[tuple[int, float], TreePlan] = {}  # by batch size and temperature

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"forwards": {role: model.runs for role, model in self.models.items()}}

    def prepare(self, request: Request, seconds: float | None) -> dict[str, Any]:
        """Plan: a profile of the pair once a batch size, acceptance from decoding the calibration's prompts."""
        if self.pair.draft is None:
            return {}
        batch, length = len(request.prompts), len(request.prompts[0])
        context_len = length + request.num_tokens // 2
        pair = (self.models["target"], self.models["draft"])
        if batch not in self.profiles:
            sizes = {"context_lens": (length, length + request.num_tokens), "node_counts": NODE_COUNTS}
            profile = measure_profile(*pair, **sizes, batch_size=batch, seconds=seconds, bandwidth=False)
            self.profiles[batch] = measure_overhead(*pair, profile, context_len=context_len, batch_size=batch)
        calibration = request.calibration or request.prompts
        if request.temperature == 0:
            asked = [request._replace(prompts=[prompt]) for prompt in calibration]
            runs = [self._generate(one, pair[1], tree=PROBE_TREE).stats for one in asked]
            evidence: Any = estimate_acceptance(runs, temperature=request.temperature)
        else:
            prompts = [torch.tensor([prompt]) for prompt in calibration]
            sampling = {"max_new_tokens": request.num_tokens, "temperature": request.temperature, "seed": request.seed}
            evidence = record_steps(*pair, prompts, **sampling)
        settings: dict[str, Any] = {"context_len": context_len, "batch_size": batch, "temperature": request.temperature}
        plan = self.plans[batch, request.temperature] = plan_tree(
            evidence, self.profiles[batch], shaped=False, **settings
        )
        return {
            "tree": {"nodes": plan.tree.num_nodes, "levels": plan.tree.num_levels, "parents": list(plan.tree.parents)},
            "acceptance": [round(float(value), 4) for value in plan.acceptance[:8]],
            "predicted_tokens_per_step": plan.tokens_per_step,
        }

    def decode(self, request: Request) -> Tokens:
        if request.mode != DRAFT:
            return self._generate(request, None).new_tokens
        # a plan does not depend on the prompts; for another batch than was planned for, any other of its tree serves
        plans = self.plans
        plan = plans.get((len(request.prompts), request.temperature)) or next(iter(plans.values()))
        return self._generate(request, self.models["draft"], tree=plan).new_tokens

    def _generate(self, request: Request, draft: Any, **options: Any) -> Any:
        prompts = torch.tensor(request.prompts)
        options |= {"max_new_tokens": request.num_tokens, "temperature": request.temperature, "eos_token_id": ()}
        mask = torch.ones_like(prompts)
        return generate(self.models["target"], draft, prompts, attention_mask=mask, seed=request.seed, **options)
