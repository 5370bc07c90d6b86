"""`generate`: checked arguments, a tree for them, the loop, and the output."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from sequoia_kernels import checks
from sequoia_kernels.decoding.arguments import (
    WORDS,
    GenerationArguments,
    GivenTree,
    check_arguments,
    largest_size,
)
from sequoia_kernels.decoding.auto import choose_lookup, choose_tree
from sequoia_kernels.decoding.logits_hook import LogitsHook
from sequoia_kernels.decoding.loop import decode, on_target_device
from sequoia_kernels.decoding.processors import ChainedHooks, ProcessorHook, check_processors
from sequoia_kernels.decoding.settings import GenerationSettings
from sequoia_kernels.decoding.stats import GenerateStats
from sequoia_kernels.drafts import DraftSource, LookupDraft, draft_source, shares_split_target
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import TreeModel, adapt, agree_on_changes, described_once
from sequoia_kernels.parallel import digest, is_follower, preparing, together
from sequoia_kernels.planner import (
    AcceptanceEstimate,
    AdaptivePlan,
    HardwareProfile,
    LookupCosts,
    StepRecords,
    TreeFollower,
    TreePlan,
    read_tree,
)
from sequoia_kernels.tree import ShapedTree, TokenTree

DEFAULT_NEW_TOKENS = 128  # where nothing says how many
# From here on a target's forward on a CPU is taken for most of a step. An estimate: processing the draft's logits costs
# some 3 ms a step; on the demo pair (5 M) it lost 14 to 31 % of the speed for 0 to 25 % more tokens a step.
SLOW_PARAMETERS = 100_000_000


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns. Indexing, length and iteration are those of `sequences`.

    Attributes:
        sequences: prompts as given with the new tokens behind them, padded on the right. [B, width + longest] int64.
        stats: counts and times.
        new_tokens: the new tokens of each request, without padding.
        finish_reasons: why each request ended: "eos", "length", "stop_string", "stopping_criteria", "max_time" or
            "cache_full".
        logprobs: the log-probability of each new token, where asked for. float32 each.
        logits: the target's logits that each new token was decided from, where asked for. A tensor [new tokens, vocab]
            for each request.
        scores: the same behind all processors and filters, as transformers' loop has them, where asked for. A tensor
            [new tokens, vocab] float32 for each request.
    """

    sequences: torch.Tensor
    stats: GenerateStats
    new_tokens: list[list[int]]
    finish_reasons: list[str]
    logprobs: list[list[float]] | None = None
    logits: list[torch.Tensor] | None = None
    scores: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.sequences[index]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.sequences)

    def texts(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """Decode the new tokens of each request.

        Args:
            tokenizer: has `decode(tokens, skip_special_tokens=...)`.
            skip_special_tokens: leave out what marks ends and the like.

        Example:
            >>> from sequoia_kernels.demo import load_demo_pair
            >>> pair = load_demo_pair()
            >>> prompt = pair.tokenizer("import ", return_tensors="pt").input_ids
            >>> output = generate(pair.target, pair.draft, prompt, tree=TokenTree.chain(3), max_new_tokens=4)
            >>> output.texts(pair.tokenizer) == [pair.tokenizer.decode(output[0, prompt.shape[1]:])]
            True
        """
        return [tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens) for tokens in self.new_tokens]


@on_target_device
@described_once()
def generate(
    target: Any,
    draft: Any | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    lookup: bool = False,
    tree: GivenTree | os.PathLike[str] = "auto",
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | Sequence[float] | None = None,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | Sequence[int] = 0,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any | None = None,
    draft_tokenizer: Any | None = None,
    streamer: Any | None = None,
    max_cache_len: int | None = None,
    acceptance: StepRecords | AcceptanceEstimate | Sequence[float] | None = None,
    profile: HardwareProfile | None = None,
    rule: str | None = None,
    logits_hook: LogitsHook | None = None,
    logits_processor: Sequence[Callable[..., torch.Tensor]] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
    generation_config: Any | None = None,
    num_return_sequences: int | None = None,
    return_logprobs: bool | str = False,
    output_logits: bool = False,
    output_scores: bool = False,
    backend: str = "auto",
    cuda_graphs: bool = True,
    compile: bool | str = False,
    **settings: Any,
) -> GenerateOutput:
    """Generate with tree speculative decoding, with exactly the target's distribution.

    Args:
        target: the model whose output is wanted: a Hugging Face decoder-only model or a `TreeModel`.
        draft: what proposes the tree's tokens: a smaller model (see `draft_tokenizer`) or a Gemma 4 assistant; any
            other `DraftSource`; "lookup", which copies what stood behind the same words earlier in a request's own text
            and needs no model;
            "layers:8", say, the target's own first layers; "mtp", its multi-token prediction modules; or the folder or
            hub id of a published head or a model, which is loaded for this call (load it once with
            `sequoia_kernels.drafts.draft_source` for several). None decodes one token a step. docs/choosing_a_draft.md
            has what there is.
        input_ids: prompts. [B, L] int64, on the target's device.
        attention_mask: 1 at prompt tokens, 0 at padding, which may stand on either side but not inside. [B, L]. None
            takes pad tokens for padding, as transformers does, unless they also end sequences.
        lookup: look tokens up in the text besides: in each step the loop takes whichever promises more, the draft's
            tree, with tokens from the text in it or not, or a path of them. It waits for each step's tokens.
        tree: a `TokenTree`, a sequence of one for each request (all of the same widths, level by level), a
            `ShapedTree`, which takes its shape in every step, a `TreePlan`, an `AdaptivePlan`, or one of two words:
            "auto" takes the planner's pick for this machine, these models and these sampling settings, and learns from
            every call; "adaptive" takes several picks and switches between them as acceptance drifts. Both measure the
            models' times where they are not given a `profile`, once a pair and machine: docs/planner.md says what is
            kept, and where. A `TreeFollower` (`plan.follow()`) given to several calls carries what it learnt from one
            to the next. A path is read as `sequoia-kernels generate --tree` reads it.
        max_new_tokens: tokens to emit for each request, at most; None takes the generation settings' (`max_new_tokens`
            or `max_length`), or 128.
        do_sample: draw tokens, or take the most probable ones; None does what `temperature` says, and without that the
            generation settings.
        temperature: 0 is greedy, else at least 1e-5; one value, or one for each request. None takes the generation
            settings': where they ask for sampling theirs, or 1, else 0.
        top_k: keep the k most probable tokens; 0 is off, None takes the generation settings' (not transformers' own
            default of 50).
        top_p: keep the smallest set of tokens with this probability, in (0, 1], where 1 is off; None takes the
            generation settings'.
        eos_token_id: ids that end a request; None takes the target's own, an empty list none at all.
        pad_token_id: fills `sequences` behind shorter requests; None takes the target's pad or first EOS id, or 0.
        seed: one integer (requests get seeds mixed from it), or one for each request.
        stop_strings: strings that end a request with the token that completes them; needs `tokenizer`. As in
            transformers one may begin in the prompt, and the token may go on behind it.
        tokenizer: decodes the tokens for `stop_strings`.
        draft_tokenizer: the draft's tokenizer, where it is another one than the target's `tokenizer`: the draft then
            proposes the tokens that both know, and is fed its own for the others. The output is the target's as ever.
        streamer: object with `put(tokens)` and `end()`, such as transformers' `TextStreamer`; for a batch one for each
            request, or one that takes a token of each request at a time ([B]), as transformers' loop gives them.
        max_cache_len: tokens that a request may hold in the target's cache, prompt included and the newest one left
            out, and positions of the target at most. A request that reaches this ends with "cache_full". The cache has
            rows for a tree more. The draft's positions limit nothing: where they are used up, it goes on with the
            newest tokens of a request (`stats.draft_restarts`).
        acceptance: recorded steps or an acceptance vector for tree="auto" and "adaptive".
        profile: hardware profile for them.
        rule: verification rule, "sequoia" or "traversal"; None takes the plan's, or the device's usual one: "traversal"
            on a CPU above temperature 0, else "sequoia". Outputs are distributed alike under both.
        logits_hook: changes the target's logits before tokens are decided from them (`LogitsHook`): own penalties,
            grammars (`GrammarHook`). The target's part of a step is then not captured.
        logits_processor: transformers' logits processors, or what is called as they are, with (input_ids, scores). Each
            node of a tree has the tokens before it as input_ids, so they must depend on nothing else. Where it pays,
            and for processors of one's own, the draft's logits go through them as well. Steps are not captured then.
        stopping_criteria: transformers' stopping criteria; each request is asked about by itself, [1, length].
        prefix_allowed_tokens_fn: as in transformers: from a request's index and its tokens to those allowed next.
        generation_config: transformers' `GenerationConfig`; what it leaves open, the target's own says.
        num_return_sequences: continuations of each prompt, which become requests of their own, next to one another.
        return_logprobs: give the log-probability of each new token: "raw" (or True) under the target's own logits,
            "processed" under what it was drawn from, behind processors, temperature and filters (of a greedy request:
            behind processors).
        output_logits: give the target's logits of each new token.
        output_scores: give them behind all processors and filters. Steps with either are not captured.
        backend: backend of the ops.
        cuda_graphs: on CUDA, capture each step once and replay it; models that cannot be captured fall back with one
            logged reason, the draft's part of a step still being captured where it can. Caches and graphs stay on the
            GPU for the next call with batch and lengths alike; `release_engines` frees them.
        compile: run the models' forwards of trees through `torch.compile`: True or a mode, as in `adapt`. Compiling
            takes minutes for a deep model, once a tree.
        settings: any other generation setting of transformers by its name, such as `min_p` or `repetition_penalty`.
            docs/transformers.md has the table. Those of the target's generation_config hold where nothing is given.

    Returns:
        `GenerateOutput` with sequences, statistics, new tokens and finish reasons, and what else was asked for.

    Raises:
        TypeError: an argument has the wrong type or dtype, or is none.
        ValueError: an argument has the wrong shape, range or device, the models do not make a pair, or a setting is one
            that trees cannot honour (beams, contrastive search, guidance).
        UnsupportedModelError: a model cannot decode trees; the message says why.
        RankError: of models that are split over ranks: another rank has ended or failed.

    Notes:
        Inputs are not mutated. With equal seeds the output is reproducible on one device and tree; at temperature 0 it
        equals the target's greedy output up to floating-point ties. With a fixed tree a request's tokens depend on its
        own seed, not on the batch around it, up to floating-point differences between batch shapes; the words and
        adaptive plans choose one tree for all requests, and at a temperature above 0 the tree decides which of the
        equally distributed outputs comes. Tokens that the draft has no embedding of are fed to it as another one.
        Models that transformers' tensor parallelism has split are decoded by the same call on every rank, in which rank
        0 decides for all (docs/several_gpus.md).

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
    tree = tree_of(tree)
    with torch.inference_mode():
        agree_on_changes(target, draft)
        target = adapt(target, compile=compile)
        with preparing(target, "generate"):
            draft = draft_source(
                draft, target, compile=compile, lookup=lookup, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer
            )
            chosen = GenerationSettings(
                target.model, generation_config, {**settings, "num_return_sequences": num_return_sequences}
            )
            if max_new_tokens is None and isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2:
                max_new_tokens = chosen.max_new_tokens(input_ids.shape[1], DEFAULT_NEW_TOKENS)
            temperature = _temperature(chosen, do_sample, temperature)
            is_drawn = isinstance(temperature, Sequence) or (isinstance(temperature, Real) and temperature != 0)
            input_ids, attention_mask = _expanded(input_ids, attention_mask, chosen["num_return_sequences"])
            max_time = chosen["max_time"]
            arguments = check_arguments(
                target, draft, input_ids, attention_mask,
                max_new_tokens=max_new_tokens, temperature=temperature,
                top_k=chosen["top_k"] if top_k is None and is_drawn else top_k,
                top_p=chosen["top_p"] if top_p is None and is_drawn else top_p,
                eos_token_id=_from_config(generation_config, "eos_token_id", eos_token_id),
                pad_token_id=_from_config(generation_config, "pad_token_id", pad_token_id), seed=seed,
                stop_strings=chosen["stop_strings"] if stop_strings is None else stop_strings, tokenizer=tokenizer,
                streamer=streamer, max_cache_len=max_cache_len, tree=tree, acceptance=acceptance, profile=profile,
                rule=rule, logits_hook=logits_hook, backend=backend, cuda_graphs=cuda_graphs,
                stopping_criteria=[] if stopping_criteria is None else stopping_criteria,
            )  # fmt: skip
            if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
                name = type(prefix_allowed_tokens_fn).__name__
                raise TypeError(f"generate: prefix_allowed_tokens_fn must be called with (index, tokens), got {name}")
            keeps = _keeps(return_logprobs, output_logits, output_scores)
            deadline = None if max_time is None else time.monotonic() + max_time
            arguments = dataclasses.replace(arguments, keeps=keeps, deadline=deadline)
            arguments = _with_processors(target, arguments, chosen, logits_processor, prefix_allowed_tokens_fn)
    return run_generation(target, draft, arguments, tree, acceptance=acceptance, profile=profile, started=started)


def tree_of(tree: Any) -> Any:
    """Read a tree that is given by its path; give any other as it is."""
    is_path = isinstance(tree, os.PathLike) or (isinstance(tree, str) and tree not in WORDS and os.path.isfile(tree))
    return read_tree(tree) if is_path else tree


def run_generation(
    target: TreeModel, draft: DraftSource | None, arguments: GenerationArguments, tree: Any, *,
    acceptance: Any = None, profile: HardwareProfile | None = None, started: float | None = None,
) -> GenerateOutput:  # fmt: skip
    """Decode checked arguments with a tree, or with what chooses one; see `generate`.

    Where a model is split over ranks, rank 0 does it for all of them.
    """
    started = time.perf_counter() if started is None else started
    with preparing(target, "generate"):
        if draft is not None and draft.shares_target and target.ranks is not None:
            raise UnsupportedModelError(shares_split_target(repr(draft)))
    models = (target,) if draft is None else (target, *draft.models)
    output = together(
        models, lambda: _generated(target, draft, arguments, tree, acceptance, profile, started), where="generate",
        alike=lambda: {"input_ids": digest(arguments.prompts, torch.tensor(arguments.prompt_lens))},
    )  # fmt: skip
    if arguments.streamer is not None and is_follower(models):
        for streamer in arguments.streamer if isinstance(arguments.streamer, Sequence) else [arguments.streamer]:
            streamer.end()  # whoever waits for tokens here shall not do so for ever
    return output


def _generated(
    target: TreeModel, draft: DraftSource | None, arguments: GenerationArguments, tree: Any, acceptance: Any,
    profile: HardwareProfile | None, started: float,
) -> GenerateOutput:  # fmt: skip
    learn = costs = None
    with torch.inference_mode():
        if draft is not None:
            draft.meet_prompts(target, arguments.prompts, arguments.prompt_lens)
        if draft is None:
            tree = TokenTree.single()  # whatever was asked for
        elif isinstance(draft, LookupDraft) and draft.base is None:
            if isinstance(tree, str):
                costs = choose_lookup(target, arguments, profile=profile)
            else:
                costs = LookupCosts.alike([TokenTree.single()], largest_size(tree), draft.siblings)
            tree = TokenTree.single()
        elif isinstance(tree, str):
            tree, learn, costs = choose_tree(
                target, draft, arguments, acceptance=acceptance, profile=profile, adaptive=tree == "adaptive"
            )
        if isinstance(tree, AdaptivePlan):
            tree = tree.follow()
        elif isinstance(tree, TreePlan):
            tree = tree.tree
        elif not isinstance(tree, (TokenTree, ShapedTree, TreeFollower)):
            tree = tuple(tree)
        if isinstance(draft, LookupDraft):
            trees = list(tree.plan.trees) if isinstance(tree, TreeFollower) else [tree]
            base = [entry for entry in trees if isinstance(entry, TokenTree)]
            if base and all(entry.num_nodes == 1 for entry in base):
                draft = LookupDraft(target)  # the other one is not worth asking
            if costs is None:
                costs = LookupCosts.alike(base, largest_size(tree), draft.siblings)
        requests, stats = decode(target, draft, tree, arguments, costs)
    check = getattr(arguments.logits_hook, "check", None)
    for index, request in enumerate(requests):
        if check is not None:
            check(index, request.new_tokens)
    stats.seconds = time.perf_counter() - started
    if learn is not None:
        learn(stats)
    new_tokens = [request.new_tokens for request in requests]
    width = max(map(len, new_tokens))
    rows = [tokens + [arguments.pad_token_id] * (width - len(tokens)) for tokens in new_tokens]
    input_ids = arguments.input_ids
    sequences = torch.cat((input_ids, torch.tensor(rows, dtype=torch.int64, device=input_ids.device)), dim=1)
    kept = [request.rows for request in requests]
    return GenerateOutput(
        sequences, stats, new_tokens, [request.finish_reason or "length" for request in requests],
        logprobs=None if kept[0].logprobs is None else [entry.logprobs or [] for entry in kept],
        logits=None if kept[0].logits is None else [torch.stack(entry.logits or []) for entry in kept],
        scores=None if kept[0].scores is None else [torch.stack(entry.scores or []) for entry in kept],
    )  # fmt: skip


def _temperature(settings: GenerationSettings, do_sample: bool | None, temperature: Any) -> Any:
    """The temperatures asked for, by the call or the generation settings."""
    if do_sample is not None and not isinstance(do_sample, bool):
        raise TypeError(f"generate: do_sample must be True, False or None, got {do_sample!r}")
    if temperature is not None:
        given = list(temperature) if isinstance(temperature, Sequence) else [temperature]
        if do_sample is not None and any(isinstance(entry, Real) and (entry != 0) != do_sample for entry in given):
            rule = "above 0 where do_sample=True" if do_sample else "0 where do_sample=False"
            raise ValueError(f"generate: temperature must be {rule}, got {temperature!r}")
        return temperature
    if do_sample is not None:
        settings.config.do_sample = do_sample
    return settings.temperature()


def _from_config(config: Any | None, name: str, given: Any) -> Any:
    """A token id that the call gives, by itself or in its generation_config; None leaves it to the target's."""
    return getattr(config, name, None) if given is None else given


def _expanded(input_ids: Any, attention_mask: Any, copies: Any) -> tuple[Any, Any]:
    """Give each prompt as often as continuations of it are wanted."""
    if copies is None or copies == 1:
        return input_ids, attention_mask
    checks.whole_number("generate", "num_return_sequences", copies, rule=checks.at_least(1))
    if isinstance(input_ids, torch.Tensor):
        input_ids = input_ids.repeat_interleave(copies, 0)
    if isinstance(attention_mask, torch.Tensor):
        attention_mask = attention_mask.repeat_interleave(copies, 0)
    return input_ids, attention_mask


def _keeps(return_logprobs: bool | str, output_logits: bool, output_scores: bool) -> frozenset[str]:
    """What steps leave besides tokens."""
    kinds = {False: [], True: ["logprobs"], "raw": ["logprobs"], "processed": ["processed_logprobs"]}
    if not isinstance(return_logprobs, (bool, str)) or return_logprobs not in kinds:
        raise ValueError(
            f'generate: return_logprobs must be True, False, "raw" or "processed", got {return_logprobs!r}'
        )
    checks.check_options("generate", "auto", output_logits=output_logits, output_scores=output_scores)
    rows = [name for name, wanted in (("logits", output_logits), ("scores", output_scores)) if wanted]
    return frozenset(kinds[return_logprobs] + rows)


def _with_processors(
    target: TreeModel,
    arguments: GenerationArguments,
    settings: GenerationSettings,
    custom: Any,
    prefix_allowed_tokens_fn: Any,
) -> GenerationArguments:
    """Add the hook that runs the processors of the settings and of the call, where there are any."""
    prompts, width = arguments.padded_prompts, arguments.input_ids.shape[1]
    padding = [width - length for length in arguments.prompt_lens]
    made = settings.processors(
        temperatures=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, prompts=prompts,
        padding=torch.tensor(padding, device=prompts.device) if any(padding) else None,
        eos_token_ids=sorted(arguments.eos_token_ids), max_new_tokens=arguments.max_new_tokens,
        custom=[] if custom is None else check_processors(custom), prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        all_in_processors="scores" in arguments.keeps,
    )  # fmt: skip
    if not made.filters_in_ops:
        arguments = dataclasses.replace(arguments, top_k=None, top_p=None)
    elif not any(made.processors):
        return arguments
    return with_processor_hook(target, arguments, made.processors, made.scales)


def with_processor_hook(
    target: TreeModel, arguments: GenerationArguments, processors: Sequence[Sequence[Any]], scales: Sequence[float]
) -> GenerationArguments:
    """Add the hook that runs these processors, behind the caller's own hook; arguments as in `ProcessorHook`."""
    # Where the target's forward is most of a step, more accepted tokens are worth a slower draft.
    is_slow = target.device.type == "cpu" and target.num_parameters >= SLOW_PARAMETERS
    hook: Any = ProcessorHook(
        processors, arguments.padded_prompts, arguments.prompt_lens, scales, arguments.eos_token_ids,
        arguments.max_new_tokens, hooks_draft=is_slow or not target.capturable,
    )  # fmt: skip
    if arguments.logits_hook is not None:
        hook = ChainedHooks([arguments.logits_hook, hook])
    return dataclasses.replace(arguments, logits_hook=hook)
