"""Decode with a large tree and keep of every step what values smaller trees: see `planner.step_records`.

Where steps begin depends on the tree: a large one ends where the text is hard to guess, and there its next step
begins; a short chain ends in the midst of easy text most of the time. So in every other stretch of a text steps are
committed only as far as a short chain would have come: up to the first accepted token that is none of its nodes, which
is what it would have drawn itself. That token was decided by all before it alone, so the output stays the target's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sequoia_kernels import checks
from sequoia_kernels.decoding.arguments import check_arguments
from sequoia_kernels.decoding.loop import decode, on_target_device
from sequoia_kernels.decoding.overhead import growable_part
from sequoia_kernels.drafts import TokenBuffers, draft_source
from sequoia_kernels.models import adapt, agree_on_changes, described_once
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.ops.warping import warped_probs
from sequoia_kernels.parallel import digest, is_follower, preparing, together
from sequoia_kernels.planner import StepRecords, estimate_acceptance, optimal_tree
from sequoia_kernels.planner.evidence import visits_by_rank
from sequoia_kernels.planner.step_records import EXCESS_RATIOS, NodeRecords
from sequoia_kernels.tree import MAX_STEP_ROWS, TokenTree

__all__ = ["RECORD_TREE", "record_steps"]

SHORT_LEVELS = 4  # of the chain that half of the steps are cut to, about what is fastest on a CPU
TOKENS_IN_TURN = 32  # of a text, easy and hard ones alike, in which steps are cut, and then as many in which none is


def _joined(*trees: TokenTree) -> TokenTree:
    """The smallest tree that all of these lie within."""
    counts: dict[tuple[int, ...], int] = {}  # children by path of ranks
    for tree in trees:
        paths: list[tuple[int, ...]] = [()]
        for node, parent in enumerate(tree.parents[1:], start=1):
            paths.append((*paths[parent], node - tree.first_child[parent]))
        for path, count in zip(paths, tree.num_children):
            counts[path] = max(counts.get(path, 0), count)
    parents: list[int] = [-1]
    queue: list[tuple[int, ...]] = [()]
    for index, path in enumerate(queue):
        for rank in range(counts[path]):
            parents.append(index)
            queue.append((*path, rank))
    return TokenTree(parents)


# The optimal one of a good pair, which the best trees of others lie within, or nearly; and a chain.
RECORD_TREE = _joined(optimal_tree((0.7, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.007), 96), TokenTree.chain(16))


@on_target_device
@torch.inference_mode()
@described_once()
def record_steps(
    target: Any,
    draft: Any,
    prompts: Sequence[torch.Tensor],
    *,
    tree: TokenTree | None = None,
    in_turns: bool = True,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    backend: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> StepRecords:
    """Decode prompts with a large tree, and keep of every step what tells the worth of every smaller tree.

    Args:
        target: the model whose output is wanted: a Hugging Face decoder-only model or a `TreeModel`.
        draft: what proposes tokens: a smaller model of the same vocabulary, or any other `DraftSource`.
        prompts: token ids. [1, L] int64 each, on the target's device.
        tree: the tree to decode with; the trees within it can be valued. `RECORD_TREE` when
            None, of which as many levels as the draft can grow.
        in_turns: commit of the steps in every other stretch of 32 tokens only what a short chain would have; otherwise
            every step as it is, and all steps that small trees are valued in begin where a large one ended.
        max_new_tokens: tokens to decode behind each prompt.
        temperature: as in `generate`, like the next three.
        top_k: see there.
        top_p: see there.
        seed: of the first prompt; the others count on from it.
        backend: backend of the ops.
        progress: called with (prompts done, prompts, what is being done).

    Returns:
        `StepRecords`, which `plan_tree` takes in place of an acceptance vector.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or there are no prompts.

    Notes:
        Decodes without CUDA graphs: for what steps are worth, not for what they take. Some 10 kB a step are kept.

    Example:
        >>> from sequoia_kernels.demo import load_demo_pair
        >>> pair = load_demo_pair()
        >>> prompt = pair.tokenizer("def main(", return_tensors="pt").input_ids
        >>> records = record_steps(pair.target, pair.draft, [prompt], max_new_tokens=16, temperature=0.6)
        >>> 1 < records.tokens_per_step(TokenTree.chain(4), "traversal") < 4
        True
    """
    where = "record_steps"
    given = RECORD_TREE if tree is None else tree
    if not isinstance(given, TokenTree):
        raise TypeError(f"{where}: tree must be a TokenTree, got {type(given).__name__}")
    if not 1 < given.num_nodes <= MAX_STEP_ROWS:
        checks.fail_range(where, "tree", f"have 2 to {MAX_STEP_ROWS} nodes", given.num_nodes)
    if not isinstance(prompts, Sequence):
        raise TypeError(f"{where}: prompts must be a sequence of tensors, got {type(prompts).__name__}")
    if not prompts:
        checks.fail_range(where, "prompts", "be at least one", "none")
    checks.whole_number(where, "seed", seed, rule=checks.at_least(0))
    agree_on_changes(target, draft)
    target = adapt(target)
    with preparing(target, where):
        source = draft_source(draft, target)
        # a whole draft is run by rank 0 alone
        if source.proposes if source is not None else not is_follower((target,)):
            raise TypeError(f"{where}: draft must be one that draws its tokens, got {draft!r}")
    tree = growable_part(RECORD_TREE, source) if tree is None else given

    def recorded() -> StepRecords:
        assert source is not None  # on the rank that does it
        recorder = _Recorder(tree, _short_part(tree) if in_turns else None)
        for index, prompt in enumerate(prompts):
            if progress is not None:
                progress(index, len(prompts), f"prompt {index + 1}")
            arguments = check_arguments(
                target, source, prompt, torch.ones_like(prompt), max_new_tokens=max_new_tokens,
                temperature=temperature, top_k=top_k, top_p=top_p, eos_token_id=(), pad_token_id=0, seed=seed + index,
                stop_strings=None, tokenizer=None, streamer=None, max_cache_len=None, tree=tree, acceptance=None,
                profile=None, rule="sequoia", logits_hook=None, backend=backend, cuda_graphs=False,
            )  # fmt: skip
            source.meet_prompts(target, arguments.prompts, arguments.prompt_lens)
            recorder.begin(index, arguments.temperature, arguments.top_k, arguments.top_p, target.device)
            arguments = dataclasses.replace(arguments, observer=recorder, shorten=recorder.shorten)
            decode(target, source, tree, arguments)
        if progress is not None:
            progress(len(prompts), len(prompts), "done")
        acceptance = estimate_acceptance(recorder.visits, temperature=temperature, top_k=top_k, top_p=top_p)
        return recorder.records(acceptance)

    models = (target,) if source is None else (target, *source.models)
    return together(models, recorded, where=where, alike=lambda: {"prompts": digest(*prompts)})


def _short_part(tree: TokenTree) -> TokenTree | None:
    """The chain within a tree that steps are cut to, None where that leaves nothing out."""
    levels = min(SHORT_LEVELS, tree.num_levels)
    while levels > 1 and _along_first_children(tree, levels)[-1] < 0:
        levels -= 1
    return TokenTree.chain(levels) if 1 < levels < tree.num_nodes else None


def _along_first_children(tree: TokenTree, num_nodes: int) -> list[int]:
    nodes = [0]
    while len(nodes) < num_nodes:
        nodes.append(tree.first_child[nodes[-1]] if nodes[-1] >= 0 else -1)
    return nodes


class _Recorder:
    """Takes every step's logits, and keeps little of them; says how much of the step is committed.

    Args:
        tree: the tree.
        short: the chain that every other few steps are cut to; None cuts none.

    Attributes:
        visits: what the accepted paths, uncut, tell of acceptance: for each request both counts by rank.
    """

    def __init__(self, tree: TokenTree, short: TokenTree | None = None) -> None:
        self.tree, self.short = tree, short
        self.kept = frozenset(_along_first_children(tree, short.num_nodes) if short else range(tree.num_nodes))
        self.visits: list[dict[str, list[int]]] = []
        self.internal = [node for node, count in enumerate(tree.num_children) if count]
        self.steps: list[list[torch.Tensor]] = []
        self.foretold: list[torch.Tensor] = []
        self.requests: list[int] = []
        self.given: list[int] = []

    def begin(
        self, request: int, temperature: list[float], top_k: list[int] | None, top_p: list[float] | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Say whose steps come next."""
        self.request, self.num_tokens = request, 0
        self.visits.append({"visited_by_rank": [], "accepted_by_rank": []})
        rows = len(self.internal)
        of_rows = [(temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32)]
        self.warps: list[Any] = [
            None if values is None else torch.tensor(values, dtype=dtype, device=device).expand(rows)
            for values, dtype in of_rows
        ]
        self.parents = torch.tensor([self.internal.index(parent) for parent in self.tree.parents[1:]], device=device)
        self.ratios = torch.tensor(EXCESS_RATIOS, device=device)

    def __call__(self, buffers: TokenBuffers, target_logits: torch.Tensor) -> None:
        """Take one step of one request. target_logits: [1, N, vocab]."""
        draft_logits = buffers.draft_logits
        assert draft_logits is not None  # there is a draft
        if buffers.vocabulary is not None:
            draft_logits = buffers.vocabulary.widened(draft_logits)
        temperature = self.warps[0]
        target = warped_probs(target_logits[0, self.internal].double(), *self.warps)
        draft = torch.softmax(draft_logits[0, self.internal].double() / temperature.clamp(min=1e-5)[:, None], dim=1)
        tokens = buffers.tokens[0, 1:]
        places = self.parents, tokens.clamp(min=0)
        is_draw = tokens >= 0
        at_nodes = [
            torch.cat((values.new_zeros(1), torch.where(is_draw, values[places], 0))) for values in (target, draft)
        ]
        outside = [values.index_put(places, torch.where(is_draw, 0.0, values[places])) for values in (target, draft)]
        ratio = torch.where(outside[0] > 0, outside[0] / outside[1], 0)
        place = torch.bucketize(ratio, self.ratios)  # how many of the ratios it exceeds
        sums = [
            values.new_zeros(len(values), len(self.ratios) + 1).scatter_add_(1, place, values)
            .flip(1).cumsum(1).flip(1)[:, 1:]
            for values in outside
        ]  # fmt: skip
        excess = sums[0] - self.ratios * sums[1]
        slope = torch.cat((outside[1].sum(dim=1, keepdim=True), sums[1][:, 1:]), dim=1)
        likelihood, peak = at_nodes[1], draft.amax(dim=1)
        if not bool(temperature.all()):  # greedy: how sure the draft is shows at temperature 1 only
            sure = torch.softmax(draft_logits[0, self.internal].double(), dim=1)
            chances = torch.where(is_draw, sure[places], 0)
            likelihood, peak = torch.cat((sure.new_zeros(1), chances)), sure.amax(dim=1)
        parts = (*at_nodes, excess.clamp(min=0), slope, likelihood, peak)
        self.steps.append([part.float().cpu() for part in parts])
        if buffers.foretold is not None:
            self.foretold.append(buffers.foretold[0, self.internal].cpu())
        self.requests.append(self.request)

    def shorten(self, buffers: TokenBuffers, path: VerifiedPath) -> VerifiedPath:
        """Give the part of the accepted path that is committed, and count all of it. [1, levels]"""
        nodes, num_accepted = path.nodes[0].tolist(), int(path.num_accepted[0])
        for total, part in zip(self.visits[-1].values(), visits_by_rank(self.tree, nodes, num_accepted)):
            total.extend([0] * (len(part) - len(total)))
            for rank, count in enumerate(part):
                total[rank] += count
        end = num_accepted
        if self._is_cut():
            end = next((place for place in range(num_accepted) if nodes[place] not in self.kept), num_accepted)
        self.num_tokens += end
        self.given.append(end)
        if end == num_accepted:
            return path
        kept = path.nodes.clone()
        kept[:, end:] = -1
        return VerifiedPath(kept, path.num_accepted.clone().fill_(end), buffers.tokens[:, nodes[end]].clone())

    def _is_cut(self) -> bool:
        """Whether the request's next step is cut; the first ones of every other request are."""
        return self.short is not None and (self.num_tokens // TOKENS_IN_TURN + self.request) % 2 == 1

    def records(self, acceptance: Any) -> StepRecords:
        """Give what was recorded."""
        parts = (torch.stack(part).numpy() for part in zip(*self.steps))
        requests, given = (np.asarray(part, dtype=np.int64) for part in (self.requests, self.given))
        foretold = torch.stack(self.foretold).numpy() if self.foretold else None
        return StepRecords(
            self.tree, NodeRecords(*parts), requests, acceptance, given if len(given) else None, foretold
        )
