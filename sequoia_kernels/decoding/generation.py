"""`generate`: checked arguments, a tree for them, the loop, and the output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sequoia_kernels.decoding.arguments import GivenTree, check_arguments
from sequoia_kernels.decoding.auto import choose_tree
from sequoia_kernels.decoding.logits_hook import LogitsHook
from sequoia_kernels.decoding.loop import decode, on_target_device
from sequoia_kernels.decoding.stats import GenerateStats
from sequoia_kernels.drafts import draft_source
from sequoia_kernels.models import adapt, described_once
from sequoia_kernels.planner import (
    AcceptanceEstimate,
    AdaptivePlan,
    HardwareProfile,
    StepRecords,
    TreeFollower,
    TreePlan,
)
from sequoia_kernels.tree import ShapedTree, TokenTree


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    Attributes:
        sequences: prompts as given with the new tokens behind them, padded on the right. [B, width + longest] int64.
        stats: counts and times.
        new_tokens: the new tokens of each request, without padding.
        finish_reasons: why each request ended: "eos", "length", "stop_string" or "cache_full".
    """

    sequences: torch.Tensor
    stats: GenerateStats
    new_tokens: list[list[int]]
    finish_reasons: list[str]


@on_target_device
@torch.inference_mode()
@described_once()
def generate(
    target: Any,
    draft: Any | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    tree: GivenTree = "auto",
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | Sequence[int] = 0,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any | None = None,
    streamer: Any | None = None,
    max_cache_len: int | None = None,
    acceptance: StepRecords | AcceptanceEstimate | Sequence[float] | None = None,
    profile: HardwareProfile | None = None,
    rule: str | None = None,
    logits_hook: LogitsHook | None = None,
    backend: str = "auto",
    cuda_graphs: bool = True,
    compile: bool | str = False,
) -> GenerateOutput:
    """Generate with tree speculative decoding, with exactly the target's distribution.

    Args:
        target: the model whose output is wanted: a Hugging Face decoder-only model or a `TreeModel`.
        draft: what proposes the tree's tokens: a smaller model of the same vocabulary, or any other `DraftSource`; None
            decodes one token a step.
        input_ids: prompts. [B, L] int64, on the target's device.
        attention_mask: 1 at prompt tokens, 0 at padding, which may stand on either side but not inside. [B, L]. None
            takes pad tokens for padding, as transformers does, unless they also end sequences.
        tree: a `TokenTree`, a sequence of one for each request (all of the same widths, level by level), a
            `ShapedTree`, which takes its shape in every step, a `TreePlan`, an `AdaptivePlan`, or one of two words:
            "auto" takes the planner's pick for this machine, these models and these sampling settings, and learns from
            every call; "adaptive" takes several picks and switches between them as acceptance drifts. Both measure the
            models' times where they are not given a `profile`, once a pair and machine: docs/planner.md says what is
            kept, and where. A `TreeFollower` (`plan.follow()`) given to several calls carries what it learnt from one
            to the next.
        max_new_tokens: tokens to emit for each request, at most.
        temperature: 0 is greedy, else at least 1e-5; one value, or one for each request. Settings of the target's
            generation_config are not applied: a warning names, once a model, those that would change the output.
        top_k: keep the k most probable tokens; None or 0 is off.
        top_p: keep the smallest set of tokens with this probability, in (0, 1]; None is off.
        eos_token_id: ids that end a request; None takes the target's own, an empty list none at all.
        pad_token_id: fills `sequences` behind shorter requests; None takes the target's pad or first EOS id, or 0.
        seed: one integer (requests get seeds mixed from it), or one for each request.
        stop_strings: strings that end a request with the token that completes them; needs `tokenizer`. As in
            transformers one may begin in the prompt, and the token may go on behind it.
        tokenizer: decodes the tokens for `stop_strings`.
        streamer: object with `put(tokens)` and `end()`, such as transformers' `TextStreamer`; one request only.
        max_cache_len: tokens that a request may hold in the target's cache, prompt included and the newest one left
            out, and positions of the target at most. A request that reaches this ends with "cache_full". The cache has
            rows for a tree more. The draft's positions limit nothing: where they are used up, it goes on with the
            newest tokens of a request (`stats.draft_restarts`).
        acceptance: recorded steps or an acceptance vector for tree="auto" and "adaptive".
        profile: hardware profile for them.
        rule: verification rule, "sequoia" or "traversal"; None takes the plan's, or the device's usual one: "traversal"
            on a CPU above temperature 0, else "sequoia". Outputs are distributed alike under both.
        logits_hook: changes the target's logits before tokens are decided from them (`LogitsHook`): penalties,
            grammars. The target's part of a step is then not captured.
        backend: backend of the ops.
        cuda_graphs: on CUDA, capture each step once and replay it; models that cannot be captured fall back with one
            logged reason, the draft's part of a step still being captured where it can. Caches and graphs stay on the
            GPU for the next call with batch and lengths alike; `release_engines` frees them.
        compile: run the models' forwards of trees through `torch.compile`: True or a mode, as in `adapt`. Compiling
            takes minutes for a deep model, once a tree.

    Returns:
        `GenerateOutput` with sequences, statistics, new tokens and finish reasons.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, range or device, or the models do not make a pair.
        UnsupportedModelError: a model cannot decode trees; the message says why.

    Notes:
        Inputs are not mutated. With equal seeds the output is reproducible on one device and tree; at temperature 0 it
        equals the target's greedy output up to floating-point ties. With a fixed tree a request's tokens depend on its
        own seed, not on the batch around it, up to floating-point differences between batch shapes; the words and
        adaptive plans choose one tree for all requests, and at a temperature above 0 the tree decides which of the
        equally distributed outputs comes. Tokens that the draft has no embedding of are fed to it as another one.

    Source:
        Sequoia (arXiv 2402.12374).

    Example:
        >>> from sequoia_kernels.demo import load_demo_pair
        >>> pair = load_demo_pair()
        >>> prompt = pair.tokenizer("def main(", return_tensors="pt").input_ids
        >>> output = generate(pair.target, pair.draft, prompt, tree=TokenTree([-1, 0, 0, 1]), max_new_tokens=8)
        >>> output.sequences.shape[1] - prompt.shape[1]
        8
    """
    started = time.perf_counter()
    target = adapt(target, compile=compile)
    draft = draft_source(draft, compile=compile) if draft is not None else None
    arguments = check_arguments(
        target, draft, input_ids, attention_mask,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos_token_id=eos_token_id,
        pad_token_id=pad_token_id, seed=seed, stop_strings=stop_strings, tokenizer=tokenizer, streamer=streamer,
        max_cache_len=max_cache_len, tree=tree, acceptance=acceptance, profile=profile, rule=rule,
        logits_hook=logits_hook, backend=backend, cuda_graphs=cuda_graphs,
    )  # fmt: skip
    learn = None
    if draft is None:
        tree = TokenTree.single()  # whatever was asked for
    elif isinstance(tree, str):
        tree, learn = choose_tree(
            target, draft, arguments, acceptance=acceptance, profile=profile, adaptive=tree == "adaptive"
        )
    if isinstance(tree, AdaptivePlan):
        tree = tree.follow()
    elif isinstance(tree, TreePlan):
        tree = tree.tree
    elif not isinstance(tree, (TokenTree, ShapedTree, TreeFollower)):
        tree = tuple(tree)
    requests, stats = decode(target, draft, tree, arguments)
    stats.seconds = time.perf_counter() - started
    if learn is not None:
        learn(stats)
    new_tokens = [request.new_tokens for request in requests]
    width = max(map(len, new_tokens))
    rows = [tokens + [arguments.pad_token_id] * (width - len(tokens)) for tokens in new_tokens]
    sequences = torch.cat((input_ids, torch.tensor(rows, dtype=torch.int64, device=input_ids.device)), dim=1)
    return GenerateOutput(sequences, stats, new_tokens, [request.finish_reason or "length" for request in requests])
