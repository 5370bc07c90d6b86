"""transformers' generation settings: which ones a call and its model ask for, and what they make of the logits."""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation import logits_process

from sequoia_kernels import checks
from sequoia_kernels.decoding.processors import REFUSED, Processor
from sequoia_kernels.documents import is_integer, is_number

__all__ = ["GenerationSettings", "SettingProcessors", "warn_once"]

logger = logging.getLogger("sequoia_kernels")

_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_once(model: Any, text: str) -> None:
    """Log a warning, once for each model and text."""
    texts = _warned.setdefault(model, set())
    if text not in texts:
        texts.add(text)
        logger.warning("%s", text)


# What trees cannot honour, with the values (besides None) that ask for nothing, and why.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "beams are not sampled from the target's distribution"),
    "num_beam_groups": ((1,), "beams are not sampled from the target's distribution"),
    "diversity_penalty": ((0,), "it belongs to beams"),
    "constraints": (([],), "they belong to beams; a GrammarHook constrains what is sampled"),
    "force_words_ids": (([],), "they belong to beams; a GrammarHook constrains what is sampled"),
    "penalty_alpha": ((0,), "contrastive search is not sampling"),
    "dola_layers": ((), "it compares layers of the target"),
    "guidance_scale": ((1,), "it runs the target a second time for every token"),
    "token_healing": ((False,), "it changes the prompt; heal it before"),
    "prompt_lookup_num_tokens": ((), 'draft="lookup" looks tokens up, as many as promise to pay'),
    "assistant_early_exit": ((), 'draft="layers:8" drafts with the target\'s own first layers'),
    "use_mtp": ((False,), 'draft="mtp" drafts with the target\'s modules'),
    "output_attentions": ((False,), "forwards of trees do not keep attention weights"),
    "output_hidden_states": ((False,), "forwards of trees do not keep hidden states"),
    "assistant_ensemble_weight": ((0, 1), "it changes what is verified"),
}  # fmt: skip

# Arguments of `generate` under transformers' names, and settings that change no token here: transformers' own cache,
# compilation, beams that are refused already, drafts of its own assisted generation, and form of its output.
_ARGUMENTS = {
    "do_sample", "eos_token_id", "max_length", "max_new_tokens", "max_time", "num_return_sequences", "pad_token_id",
    "stop_strings", "temperature", "top_k", "top_p", "output_logits", "output_scores",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "assistant_confidence_threshold", "assistant_lookbehind", "bos_token_id", "cache_config", "cache_implementation",
    "compile_config", "continuous_batching_config", "decoder_start_token_id", "disable_compile", "early_stopping",
    "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "prefill_chunk_size", "return_dict_in_generate", "speculation_type",
    "target_lookbehind", "transformers_version", "use_cache",
}  # fmt: skip

# Filters of drawn tokens that the ops do not know. Where one is on, the ops' own filters run among them.
_OTHER_FILTERS: dict[str, Callable[[Any], bool]] = {
    "top_h": lambda value: True,
    "min_p": lambda value: value != 0,
    "typical_p": lambda value: value < 1,
    "epsilon_cutoff": lambda value: 0 < value < 1,
    "eta_cutoff": lambda value: 0 < value < 1,
}
_OF_PROCESSORS = {
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias",
    "suppress_tokens", "watermarking_config",
}  # fmt: skip
# What processors compare with as it is: a NaN would ask for nothing, a string fail without a name.
_NUMBERS = (
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "max_time", "min_p", "repetition_penalty", "top_h",
    "typical_p",
)  # fmt: skip
_A_NUMBER = checks.Rule("be a number", lambda value: not math.isnan(value))
KNOWN = _ARGUMENTS | _WITHOUT_EFFECT | set(UNSUPPORTED) | set(_OTHER_FILTERS) | _OF_PROCESSORS


class SettingProcessors(NamedTuple):
    """What settings make of a batch's logits.

    Attributes:
        processors: for each request; the same list for all where they share it. [B]
        scales: the temperature that the processors divide by, where they do, else 1. [B]
        filters_in_ops: whether top-k and top-p are left to the ops.
    """

    processors: list[list[Processor]]
    scales: list[float]
    filters_in_ops: bool


class GenerationSettings:
    """The generation settings of one call: the model's, with those of a configuration and of the call on top.

    Args:
        model: the Hugging Face model.
        config: the call's configuration; what it leaves open is the model's.
        settings: the call's own settings by name; None leaves one open.

    Raises:
        TypeError: a setting that transformers does not know, one of another type, or a configuration that is none.
        ValueError: a setting that trees cannot honour, or out of range.
    """

    def __init__(self, model: Any, config: Any | None = None, settings: dict[str, Any] | None = None) -> None:
        if config is not None and not isinstance(config, GenerationConfig):
            name = type(config).__name__
            raise TypeError(f"generate: generation_config must be transformers' GenerationConfig, got {name}")
        self.model = model
        own = getattr(model, "generation_config", None)
        self.config = GenerationConfig() if own is None else copy.deepcopy(own)
        self.given = {name for name, value in (settings or {}).items() if value is not None}
        for name in sorted(settings or {}):
            if name not in KNOWN:
                close = difflib.get_close_matches(name, KNOWN, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"generate: {name!r} is no argument and no generation setting of transformers{hint}")
        theirs = {} if config is None else vars(config)
        for values in (theirs, settings or {}):
            for name, value in values.items():
                if value is not None and not name.startswith("_"):
                    setattr(self.config, name, value)
        for name, (neutral, reason) in UNSUPPORTED.items():
            value = getattr(self.config, name, None)
            if value is None or any(value == entry for entry in neutral):
                continue
            origin = "" if name in self.given else " from the generation_config"
            rule = f"be {neutral[0]!r}" if neutral else "not be set"
            raise ValueError(f"generate: {name} must {rule}, got {value!r}{origin}: {reason}")
        self._check_values()

    def _check_values(self) -> None:
        """Refuse by name what processors would fail at in the middle of decoding, or in words of Python's own."""
        for name in _NUMBERS:
            if self[name] is not None:
                checks.real_number("generate", name, self[name], _A_NUMBER)
        decay = self["exponential_decay_length_penalty"]
        if decay is not None:
            is_pair = isinstance(decay, (tuple, list)) and len(decay) == 2
            if not is_pair or not is_integer(decay[0]) or not is_number(decay[1]):
                rule = "be a pair of a length and a factor"
                checks.fail_range("generate", "exponential_decay_length_penalty", rule, repr(decay))
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if self[name] is None:
                continue
            vocab = self.model.config.get_text_config(decoder=True).vocab_size
            for token in self[name] if isinstance(self[name], (tuple, list)) else [self[name]]:
                if not is_integer(token) or not 0 <= token < vocab:
                    checks.fail_range("generate", name, f"hold tokens in [0, {vocab})", repr(token))

    def __getitem__(self, name: str) -> Any:
        return getattr(self.config, name, None)

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.config.do_sample)

    def temperature(self) -> float:
        """The temperature that they ask for: 0 where tokens are not drawn."""
        if not self.do_sample:
            return 0.0
        value = self.config.temperature
        return 1.0 if value is None else value

    def max_new_tokens(self, prompt_width: int, otherwise: int) -> int:
        """How many tokens they ask for, behind prompts of this width, padding included."""
        if self.config.max_new_tokens is not None:
            return self.config.max_new_tokens
        length = self.config.max_length
        if length is None:
            return otherwise
        if length <= prompt_width:
            raise ValueError(f"generate: max_length must be above the prompt's {prompt_width} tokens, got {length}")
        return length - prompt_width

    def filters(self, temperatures: Sequence[float]) -> bool:
        """Whether a filter of drawn tokens is on that the ops do not know."""
        return any(temperatures) and any(
            self[name] is not None and is_on(self[name]) for name, is_on in _OTHER_FILTERS.items()
        )

    def processors(
        self, *, temperatures: Sequence[float], top_k: Sequence[int] | None, top_p: Sequence[float] | None,
        prompts: torch.Tensor, padding: torch.Tensor | None, eos_token_ids: Sequence[int], max_new_tokens: int,
        custom: Sequence[Processor], prefix_allowed_tokens_fn: Callable[..., Any] | None, all_in_processors: bool,
    ) -> SettingProcessors:  # fmt: skip
        """Make the processors, in transformers' order.

        Args:
            temperatures: of each request.
            top_k: of each request; 0 is off.
            top_p: of each request; 1 is off.
            prompts: with their padding, on the left. [B, W] int64.
            padding: how much of each prompt that is, where there is any. [B] int64.
            eos_token_ids: tokens that end a request.
            max_new_tokens: tokens that a request emits at most.
            custom: the caller's processors. They run behind those of settings, and one of the same class replaces it.
            prefix_allowed_tokens_fn: as in transformers.
            all_in_processors: leave nothing to the ops, so that scores are those of transformers' loop.
        """
        shared = self._logits_processors(
            prompts, padding, list(eos_token_ids), max_new_tokens, prefix_allowed_tokens_fn
        )
        shared = _merged(shared, custom)
        last: list[Processor] = []
        if self["watermarking_config"] is not None:
            watermark = self["watermarking_config"]
            if isinstance(watermark, dict):
                watermark = transformers.generation.WatermarkingConfig(**watermark)
            vocab = self.model.config.get_text_config(decoder=True).vocab_size
            last.append(watermark.construct_processor(vocab, prompts.device))
            name = type(last[0]).__name__
            if name in REFUSED:
                raise ValueError(f"generate: watermarking_config must not ask for {name}: {REFUSED[name]}")
        # A watermark, as all that comes behind the filters, wants them before it.
        if not (self.filters(temperatures) or all_in_processors or (last and any(temperatures))):
            return SettingProcessors([shared + last] * len(temperatures), [1.0] * len(temperatures), True)
        if self["renormalize_logits"]:
            last.append(logits_process.LogitNormalization())
        lists: dict[tuple[Any, ...], list[Processor]] = {}
        chosen, scales = [], []
        for index, temperature in enumerate(temperatures):
            k = 0 if top_k is None or not temperature else top_k[index]
            p = 1.0 if top_p is None or not temperature else top_p[index]
            key = temperature, k, p
            if key not in lists:
                lists[key] = shared + self._filters(temperature, k, p, prompts.device) + last
            chosen.append(lists[key])
            scales.append(temperature or 1.0)
        return SettingProcessors(chosen, scales, False)

    def _logits_processors(
        self, prompts: torch.Tensor, padding: torch.Tensor | None, eos: list[int], max_new_tokens: int,
        prefix_allowed_tokens_fn: Callable[..., Any] | None,
    ) -> list[Processor]:  # fmt: skip
        made: list[Processor] = []
        device, width = prompts.device, prompts.shape[1]
        if self["sequence_bias"]:
            made.append(logits_process.SequenceBiasLogitsProcessor(sequence_bias=self["sequence_bias"]))
        if self["encoder_repetition_penalty"] not in (None, 1.0):
            made.append(
                logits_process.EncoderRepetitionPenaltyLogitsProcessor(
                    penalty=self["encoder_repetition_penalty"], encoder_input_ids=prompts
                )
            )
        if self["repetition_penalty"] not in (None, 1.0):
            made.append(_repetition_penalty(self["repetition_penalty"], padding))
        if self["no_repeat_ngram_size"]:
            made.append(logits_process.NoRepeatNGramLogitsProcessor(self["no_repeat_ngram_size"]))
        if self["encoder_no_repeat_ngram_size"]:
            made.append(
                logits_process.EncoderNoRepeatNGramLogitsProcessor(self["encoder_no_repeat_ngram_size"], prompts)
            )
        if self["bad_words_ids"]:
            made.append(logits_process.NoBadWordsLogitsProcessor(self["bad_words_ids"], eos or None))
        if self["min_length"] and eos:
            made.append(logits_process.MinLengthLogitsProcessor(self["min_length"], eos, device=device))
        if self["min_new_tokens"] and eos:
            made.append(
                logits_process.MinNewTokensLengthLogitsProcessor(width, self["min_new_tokens"], eos, device=device)
            )
        if prefix_allowed_tokens_fn is not None:
            copies = self["num_return_sequences"] or 1
            made.append(logits_process.PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, copies))
        if self["forced_bos_token_id"] is not None:
            made.append(logits_process.ForcedBOSTokenLogitsProcessor(self["forced_bos_token_id"]))
        if self["forced_eos_token_id"] is not None:
            made.append(
                logits_process.ForcedEOSTokenLogitsProcessor(
                    width + max_new_tokens, self["forced_eos_token_id"], device=device
                )
            )
        if self["remove_invalid_values"]:
            made.append(logits_process.InfNanRemoveLogitsProcessor())
        if self["exponential_decay_length_penalty"] is not None and eos:
            made.append(
                logits_process.ExponentialDecayLengthPenalty(
                    self["exponential_decay_length_penalty"], torch.tensor(eos, device=device), width
                )
            )
        if self["suppress_tokens"]:
            made.append(logits_process.SuppressTokensLogitsProcessor(self["suppress_tokens"], device=device))
        if self["begin_suppress_tokens"]:
            begin = width if width > 1 or self["forced_bos_token_id"] is None else width + 1
            made.append(
                logits_process.SuppressTokensAtBeginLogitsProcessor(self["begin_suppress_tokens"], begin, device=device)
            )
        return made

    def _filters(self, temperature: float, top_k: int, top_p: float, device: torch.device) -> list[Processor]:
        if not temperature:
            return []
        made: list[Processor] = [logits_process.TemperatureLogitsWarper(float(temperature))]
        if self["top_h"] is not None:
            made.append(logits_process.TopHLogitsWarper(self["top_h"]))
        if top_k:
            made.append(logits_process.TopKLogitsWarper(int(top_k)))
        if top_p < 1:
            made.append(logits_process.TopPLogitsWarper(float(top_p)))
        if self["min_p"]:
            made.append(logits_process.MinPLogitsWarper(self["min_p"]))
        if self["typical_p"] is not None and self["typical_p"] < 1:
            made.append(logits_process.TypicalLogitsWarper(mass=self["typical_p"]))
        if self["epsilon_cutoff"] is not None and 0 < self["epsilon_cutoff"] < 1:
            made.append(logits_process.EpsilonLogitsWarper(epsilon=self["epsilon_cutoff"]))
        if self["eta_cutoff"] is not None and 0 < self["eta_cutoff"] < 1:
            made.append(logits_process.EtaLogitsWarper(epsilon=self["eta_cutoff"], device=device))
        return made


def _repetition_penalty(penalty: float, padding: torch.Tensor | None) -> Processor:
    """Make the processor; older versions of transformers have it penalise the pad token with all others."""
    make = logits_process.RepetitionPenaltyLogitsProcessor
    if padding is not None:
        try:
            return make(penalty=penalty, prompt_ignore_length=padding)
        except ValueError:
            pass
    return make(penalty=penalty)


def _merged(made: Sequence[Processor], custom: Sequence[Processor]) -> list[Processor]:
    """Put the caller's processors behind those of settings; one of the same class takes that one's place."""
    merged = [next((own for own in custom if type(own) is type(default)), default) for default in made]
    return merged + [own for own in custom if not any(own is entry for entry in merged)]
