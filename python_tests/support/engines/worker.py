"""The tree worker with handles for tests: which tree a step takes, and parts that can be broken."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from vllm.distributed import get_tp_group
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm import drafting, runner
from sequoia_kernels.vllm.attention import TreeMetadataBuilder
from sequoia_kernels.vllm.runner import TreeRunnerMixin, TreeWorker


class Chosen:
    """In place of a plan by load: one tree always, or another one in every step, none among them."""

    def __init__(self, trees: list[TokenTree], index: int | None) -> None:
        self._trees, self._index, self._random = trees, index, random.Random(0)

    def choose(self, *_: Any) -> TokenTree | None:
        if self._index is not None:
            return self._trees[self._index]
        return self._random.choice([None, *self._trees])

    def observe_step(self, *_: Any) -> None: ...

    def observe_path(self, *_: Any) -> None: ...

    def report(self) -> dict[str, Any]:
        return {}


def no_compaction() -> Any:
    """Accepted rows of the target stay where they were."""
    return patch.object(runner, "compact_kv_cache_", lambda *args, **settings: None)


def no_draft_compaction() -> Any:
    """Accepted rows of the draft stay where they were."""
    return patch.object(drafting, "compact_kv_cache_", lambda *args, **settings: None)


def linear_positions() -> Any:
    """A tree's nodes are at the positions of their rows."""
    prepare = TreeRunnerMixin._prepare_inputs

    def prepare_linear(self: Any, *args: Any) -> Any:
        prepared = prepare(self, *args)
        CPUModelRunner._prepare_inputs(self, *args)
        return prepared

    return patch.object(TreeRunnerMixin, "_prepare_inputs", prepare_linear)


def chain_mask() -> Any:
    """A tree's nodes see all nodes before them."""
    build = TreeMetadataBuilder.build

    def build_chains(self: Any, *args: Any, **settings: Any) -> Any:
        kept, self.step_trees = self.step_trees, None
        try:
            return build(self, *args, **settings)
        finally:
            self.step_trees = kept

    return patch.object(TreeMetadataBuilder, "build", build_chains)


MUTATIONS: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (no_compaction, no_draft_compaction, linear_positions, chain_mask)
}


class ProbedWorker(TreeWorker):
    """The tree worker, driven by tests."""

    def decode_with(self, choice: int | str) -> None:
        """Decode with one of the trees, with another in every step ("random"), or as the plan by load says ("plan")."""
        model_runner = self.model_runner
        if not hasattr(self, "_own_plan"):
            self._own_plan = model_runner.load_plan
        if choice == "plan":
            model_runner.load_plan = self._own_plan
            return
        model_runner.load_plan = Chosen(model_runner._candidates, choice if isinstance(choice, int) else None)

    def verify_by(self, rule: str) -> None:
        """Verify by another rule."""
        self.model_runner.settings = replace(self.model_runner.settings, rule=rule)

    def limit_draft(self, max_positions: int | None) -> None:
        """Let the draft have so many positions; None gives it its own again."""
        drafter = self.model_runner.trees
        if not hasattr(self, "_own_positions"):
            self._own_positions = drafter._max_positions
        drafter._max_positions = self._own_positions if max_positions is None else max_positions

    def mutate(self, name: str | None) -> None:
        """Break a part; None mends it."""
        if not hasattr(self, "_mutations"):
            self._mutations = ExitStack()
        self._mutations.close()
        if name is not None:
            self._mutations.enter_context(MUTATIONS[name]())

    def disturb(self, rank: int, what: str) -> None:
        """Let one rank's logits of trees differ, or its draft."""
        if get_tp_group().rank_in_group != rank:
            return
        model_runner = self.model_runner
        if what == "draft":
            with torch.no_grad():
                for parameter in model_runner.drafter.model.model.parameters():
                    parameter.neg_()
            return
        sample = model_runner._sample

        def sample_disturbed(logits: torch.Tensor, metadata: Any) -> Any:
            if metadata is not None:
                num_rows = torch.tensor([drafted + 1 for drafted in metadata.num_draft_tokens])
                of_trees = (num_rows > 1).repeat_interleave(num_rows)
                logits = logits.clone()
                logits[of_trees] = -logits[of_trees]
            return sample(logits, metadata)

        model_runner._sample = sample_disturbed

    def break_logits(self, prompt_length: int | None) -> None:
        """Let the logits of requests with a prompt of so many tokens be NaN in one of their steps with a tree.

        None mends them.
        """
        model_runner = self.model_runner
        vars(model_runner).pop("_sample", None)
        if prompt_length is None:
            return
        sample, broken = model_runner._sample, set()

        def sample_broken(logits: torch.Tensor, metadata: Any) -> Any:
            if metadata is not None:
                batch, first = model_runner.input_batch, 0
                logits = logits.clone()
                for index, drafted in enumerate(metadata.num_draft_tokens):
                    request = batch.req_ids[index]
                    if batch.num_prompt_tokens[index] == prompt_length and drafted and request not in broken:
                        broken.add(request)
                        logits[first : first + drafted + 1] = torch.nan
                    first += drafted + 1
            return sample(logits, metadata)

        model_runner._sample = sample_broken


class OtherBlocksWorker(ProbedWorker):
    """As if vLLM had made blocks of another size for a group's kernels."""

    def compile_or_warm_up_model(self) -> Any:
        """Warm up."""
        for groups in self.model_runner.attn_groups:
            for group in groups:
                group.kernel_block_size = 8
        return super().compile_or_warm_up_model()
