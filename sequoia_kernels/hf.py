"""transformers' own `generate` with trees: `model.generate(..., custom_generate=sequoia_kernels.hf.custom_generate)`.

transformers prepares the call as ever: generation settings, processors, stopping criteria, masks and special tokens are
its own objects. What decodes is the loop of this package.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput, logits_process, stopping_criteria

from sequoia_kernels.decoding import GenerateOutput, GenerateStats
from sequoia_kernels.decoding.arguments import GenerationArguments, check_arguments
from sequoia_kernels.decoding.generation import run_generation, tree_of, with_processor_hook
from sequoia_kernels.decoding.loop import on_target_device
from sequoia_kernels.decoding.processors import check_processors
from sequoia_kernels.decoding.settings import GenerationSettings
from sequoia_kernels.drafts import DraftSource, draft_source
from sequoia_kernels.models import TreeModel, adapt, agree_on_changes, described_once
from sequoia_kernels.parallel import preparing

__all__ = ["TreeDecoderOnlyOutput", "custom_generate"]

WHERE = "custom_generate"

# What transformers hands to every decoding method beside its arguments: it changes nothing here. `cache_position` and
# the caches are its own; ours are made for trees.
HANDED_ON = {"use_cache", "logits_to_keep", "cache_position", "position_ids", "return_dict"}


@dataclass
class TreeDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """transformers' output of a decoder-only model, with what a tree gave.

    Attributes:
        stats: counts and times of the steps.
        finish_reasons: why each request ended, as in `GenerateOutput`.
    """

    stats: GenerateStats | None = None
    finish_reasons: list[str] | None = None


class CustomGenerate:
    """Callable for `model.generate(custom_generate=...)`: decodes with trees, under transformers' own settings.

    Arguments beside those of `model.generate` (all optional):
        draft: what proposes tokens, as in `sequoia_kernels.generate`; `assistant_model` is another name for it, which
            transformers does not take together with `num_return_sequences`. Without one a token is decoded a step.
        tree: as in `sequoia_kernels.generate`: "auto", a tree, a plan, or the path of one.
        seed: of the random streams, one integer or one for each request; None draws one from torch's generator, so that
            `transformers.set_seed` governs it.
        acceptance: recorded steps or an acceptance vector for tree="auto".
        profile: hardware profile for it.
        rule: verification rule.
        logits_hook: as in `sequoia_kernels.generate`; it runs before the processors.
        backend: backend of the ops.
        cuda_graphs: on CUDA, capture each step once and replay it.

    Returns:
        What `model.generate` returns: sequences [B, L] int64, or with `return_dict_in_generate` a
        `TreeDecoderOnlyOutput` with `scores` and `logits` where these were asked for; rows of requests that have ended
        hold zeros there. It has no attentions, hidden states or cache.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a setting that trees cannot honour (beams, contrastive search, guidance, a cache of the caller's),
            or any that `sequoia_kernels.generate` refuses.

    Notes:
        With sampling, output is distributed as transformers' own loop would have it; the draws are others. Processors
        must depend on input_ids and scores alone; those of a checkpoint or call do.

    Example:
        >>> from sequoia_kernels import TokenTree
        >>> from sequoia_kernels.demo import load_demo_pair
        >>> pair = load_demo_pair()
        >>> inputs = pair.tokenizer("def main(", return_tensors="pt")
        >>> ours = pair.target.generate(
        ...     **inputs, max_new_tokens=8, custom_generate=custom_generate, assistant_model=pair.draft,
        ...     tree=TokenTree([-1, 0, 0, 1]),
        ... )
        >>> ours.tolist() == pair.target.generate(**inputs, max_new_tokens=8).tolist()
        True
    """

    @property
    def __signature__(self) -> inspect.Signature:
        """What transformers takes out of its arguments for this callable.

        transformers hands a callable only those arguments that it does not know itself: `assistant_model`, `tokenizer`
        and `streamer` are dropped. They are known where it asks for this signature, and put back there.
        """
        parameters = list(inspect.signature(type(self).__call__).parameters.values())[1:]
        caller = sys._getframe(1)
        while caller is not None and caller.f_code.co_name != "_extract_generation_mode_kwargs":
            caller = caller.f_back  # type: ignore[assignment]
        if caller is not None:
            known, kwargs = caller.f_locals.get("generation_mode_kwargs"), caller.f_locals.get("kwargs")
            if isinstance(known, dict) and isinstance(kwargs, dict):
                names = {"assistant_model": "assistant_model", "tokenizer": "tokenizer", "streamer": "token_streamer"}
                names["assistant_tokenizer"] = "assistant_tokenizer"
                kwargs.update({names[name]: value for name, value in known.items() if name in names})
                given = kwargs.get("past_key_values", kwargs.get("cache"))
                if given is not None:
                    raise ValueError(
                        f"{WHERE}: past_key_values must not be given, got {type(given).__name__}: trees have caches of "
                        "their own, which begin with the prompt"
                    )
        return inspect.Signature(parameters)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Sequence[Callable[..., torch.Tensor]] = (),
        stopping_criteria: Sequence[Callable[..., Any]] = (),
        generation_config: Any | None = None,
        synced_gpus: bool = False,
        streamer: Any | None = None,
        *,
        draft: Any | None = None,
        assistant_model: Any | None = None,
        tokenizer: Any | None = None,
        assistant_tokenizer: Any | None = None,
        token_streamer: Any | None = None,
        lookup: bool = False,
        tree: Any = "auto",
        seed: int | Sequence[int] | None = None,
        acceptance: Any | None = None,
        profile: Any | None = None,
        rule: str | None = None,
        logits_hook: Any | None = None,
        backend: str = "auto",
        cuda_graphs: bool = True,
        **model_kwargs: Any,
    ) -> Any:
        """Decode; transformers calls this."""
        if draft is not None and assistant_model is not None:
            raise ValueError(f"{WHERE}: draft must be given once, got draft and assistant_model")
        if synced_gpus:
            raise ValueError(
                f"{WHERE}: synced_gpus must be False, got True: shards of ZeRO-3 or FSDP are not supported, models "
                "that tensor parallelism has split are"
            )
        config = GenerationSettings(model, generation_config).config  # refuses what trees cannot honour
        _check_model_kwargs(model_kwargs, input_ids)
        output = _generate(
            model, draft if draft is not None else assistant_model, tree=tree_of(tree), acceptance=acceptance,
            profile=profile, input_ids=input_ids, attention_mask=model_kwargs.get("attention_mask"), config=config,
            processors=logits_processor, criteria=stopping_criteria, streamer=token_streamer or streamer,
            pad_token_id=_pad_token_id(generation_config), seed=seed, rule=rule, logits_hook=logits_hook,
            backend=backend, cuda_graphs=cuda_graphs, lookup=lookup, tokenizer=tokenizer,
            draft_tokenizer=assistant_tokenizer,
        )  # fmt: skip
        return _as_transformers_returns(output, config)


custom_generate = CustomGenerate()


@on_target_device
@described_once()
def _generate(
    model: Any, draft: Any, *, tree: Any, acceptance: Any, profile: Any, lookup: bool, tokenizer: Any,
    draft_tokenizer: Any, **given: Any,
) -> GenerateOutput:  # fmt: skip
    """Do what `sequoia_kernels.generate` does, with what transformers has prepared; the rest as in `_arguments`."""
    with torch.inference_mode():
        agree_on_changes(model, draft)
        target = adapt(model)
        with preparing(target, "generate"):
            source = draft_source(
                draft, target, lookup=lookup, tokenizer=tokenizer if draft_tokenizer is not None else None,
                draft_tokenizer=draft_tokenizer,
            )  # fmt: skip
            arguments = _arguments(target, source, tree=tree, acceptance=acceptance, profile=profile, **given)
    return run_generation(target, source, arguments, tree, acceptance=acceptance, profile=profile)


class _WithoutPrompt:
    """A streamer that transformers has given the prompt already."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.is_first = streamer, True

    def put(self, tokens: torch.Tensor) -> None:
        if not self.is_first:
            self.streamer.put(tokens)
        self.is_first = False

    def end(self) -> None:
        self.streamer.end()


def _check_model_kwargs(model_kwargs: dict[str, Any], input_ids: torch.Tensor) -> None:
    """Refuse what a forward of a tree cannot be given, before anything runs."""
    for name, value in model_kwargs.items():
        if value is None or name in HANDED_ON or name == "attention_mask":
            continue
        if name in ("past_key_values", "cache"):
            if value.get_seq_length():
                raise ValueError(f"{WHERE}: {name} must be empty, got {value.get_seq_length()} tokens")
            continue
        if name.startswith("output_") and value is False:
            continue
        if name == "token_type_ids" and not bool(value.any()):
            continue
        raise ValueError(f"{WHERE}: {name} must not be given: forwards of trees take tokens only")
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is not None:
        ones = torch.ones_like(input_ids) if mask is None else mask
        wanted = (ones.cumsum(-1) - 1).clamp(min=0)
        if positions.shape != wanted.shape or not torch.equal(positions * ones, wanted.to(positions.dtype) * ones):
            raise ValueError(f"{WHERE}: position_ids must count the prompt's tokens from 0, got others")


def _arguments(
    target: TreeModel, draft: DraftSource | None, *, input_ids: torch.Tensor, attention_mask: torch.Tensor | None,
    config: Any, processors: Sequence[Any], criteria: Sequence[Any], streamer: Any | None, pad_token_id: int | None,
    seed: Any, **options: Any,
) -> GenerationArguments:  # fmt: skip
    """Turn what transformers has prepared into arguments of the loop."""
    processors = check_processors(processors)
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    if not config.do_sample:
        temperature = 0.0
    wants_scores = bool(config.return_dict_in_generate and config.output_scores)
    top_k = top_p = None
    in_ops = None if wants_scores else _left_to_the_ops(processors, temperature)
    if in_ops is not None:
        processors, top_k, top_p = in_ops
    max_new_tokens, eos_token_ids, left = _limits(criteria, config, input_ids.shape[1])
    eos_token_ids = [token for token in eos_token_ids if 0 <= token < target.vocab_size]  # -1 is a way to say none
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    if attention_mask is None:  # transformers drops one without padding
        attention_mask = torch.ones_like(input_ids)
    arguments = check_arguments(
        target, draft, input_ids.to(target.device), attention_mask.to(target.device), max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, eos_token_id=eos_token_ids,
        pad_token_id=pad_token_id, seed=seed, stop_strings=None, tokenizer=None,
        streamer=None if streamer is None else _WithoutPrompt(streamer), max_cache_len=None,
        stopping_criteria=left, **options,
    )  # fmt: skip
    asked = {"scores": wants_scores, "logits": bool(config.return_dict_in_generate and config.output_logits)}
    arguments = replace(arguments, keeps=frozenset(name for name, wanted in asked.items() if wanted))
    if not processors and not wants_scores:
        return arguments
    batch_size = arguments.batch_size
    scale = temperature if in_ops is None and temperature else 1.0
    return with_processor_hook(target, arguments, [processors] * batch_size, [scale] * batch_size)


def _left_to_the_ops(
    processors: Sequence[Any], temperature: float
) -> tuple[list[Any], int | None, float | None] | None:
    """Split a list that ends with temperature, top-k and top-p into what is before them, and these two.

    None where it ends with anything else that the ops do not know: then the list is run as it is.
    """
    if not temperature:
        return list(processors), None, None
    left = list(processors)
    while left and type(left[-1]) is logits_process.LogitNormalization:  # changes no probability
        left.pop()
    kinds = logits_process.TemperatureLogitsWarper, logits_process.TopKLogitsWarper, logits_process.TopPLogitsWarper
    found: dict[type, Any] = {}
    for kind in reversed(kinds):
        if left and type(left[-1]) is kind:
            found[kind] = left.pop()
    warper, top_k, top_p = (found.get(kind) for kind in kinds)
    if (1.0 if warper is None else warper.temperature) != temperature:
        return None
    for entry in (top_k, top_p):
        if entry is not None and (entry.filter_value != -float("inf") or getattr(entry, "min_tokens_to_keep", 1) != 1):
            return None
    k, p = None if top_k is None else int(top_k.top_k), None if top_p is None else float(top_p.top_p)
    return (left, 1, None) if p == 0 else (left, k, p)


def _limits(criteria: Sequence[Any], config: Any, width: int) -> tuple[int, list[int], list[Any]]:
    """Take lengths and EOS ids out of the criteria; what is left is asked behind every token."""
    lengths, eos, left = [], set(), []
    for criterion in criteria:
        if type(criterion) is stopping_criteria.MaxLengthCriteria:
            lengths.append(criterion.max_length - width)
        elif type(criterion) is stopping_criteria.EosTokenCriteria:
            eos |= set(criterion.eos_token_id.flatten().tolist())
        else:
            left.append(criterion)
    lengths = lengths or [config.max_length - width]
    return min(lengths), sorted(eos), left


def _pad_token_id(prepared: Any) -> int | None:
    """What transformers pads with, from the configuration that it has prepared."""
    pad = getattr(prepared, "_pad_token_tensor", None)
    return prepared.pad_token_id if pad is None else int(pad)


def _as_transformers_returns(output: GenerateOutput, config: Any) -> Any:
    if not config.return_dict_in_generate:
        return output.sequences
    longest = max(map(len, output.new_tokens))
    return TreeDecoderOnlyOutput(
        sequences=output.sequences, scores=_by_step(output.scores, longest), logits=_by_step(output.logits, longest),
        stats=output.stats, finish_reasons=output.finish_reasons,
    )  # fmt: skip


def _by_step(rows: list[torch.Tensor] | None, longest: int) -> tuple[torch.Tensor, ...] | None:
    """[new tokens, vocab] of each request -> [B, vocab] of each token."""
    if rows is None:
        return None
    padded = [torch.nn.functional.pad(part.to(torch.float32), (0, 0, 0, longest - len(part))) for part in rows]
    return tuple(torch.stack(padded, dim=1))
