"""Trained pairs: the demo pair, ready to decode, with what a benchmark measures of it first; checkpoints; texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.script import Run
from sequoia_kernels import AcceptanceEstimate, HardwareProfile, estimate_acceptance, generate, measure_profile
from sequoia_kernels.decoding import PROBE_TREE, GenerateStats, measure_overhead, record_steps
from sequoia_kernels.demo import DemoPair, held_out_prompts, load_demo_pair
from sequoia_kernels.models import adapt, load_model


def encode_prompts(tokenizer: Any, texts: Sequence[str], num_tokens: int, device: torch.device) -> list[torch.Tensor]:
    """The first tokens of each text. [1, at most num_tokens] each."""
    return [tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens].to(device) for text in texts]


def load_checkpoints(target: Any, draft: Any, dtype: torch.dtype, device: torch.device) -> DemoPair:
    """Load two models from their folders, with the target's tokenizer."""
    from transformers import AutoTokenizer

    models = [load_model(path, dtype, device) for path in (target, draft)]
    return DemoPair(*models, AutoTokenizer.from_pretrained(target, trust_remote_code=False))


def texts_of(file: Path | None, count: int, num_characters: int) -> list[str]:
    """Texts of a file, parted by two empty lines; without one, held-out source code. At most `count` of them."""
    if file is None:
        return held_out_prompts(count, num_characters)
    return [text for text in file.read_text(encoding="utf-8").split("\n\n\n") if text.strip()][:count]


Decode = Callable[[torch.Tensor, int], GenerateStats]  # prompt, seed


def take_turns(
    providers: Mapping[str, Decode], prompts: Sequence[torch.Tensor], first_seed: int = 0
) -> dict[str, list[GenerateStats]]:
    """Let everybody decode the same prompts, one after the other in turn, so that drift hits all alike.

    With each prompt another one begins: what an earlier turn leaves in the CPU's caches is nobody's to keep.
    """
    found: dict[str, list[GenerateStats]] = {name: [] for name in providers}
    names = list(providers)
    for index, prompt in enumerate(prompts):
        first = index % max(len(names), 1)
        for name in names[first:] + names[:first]:
            found[name].append(providers[name](prompt, first_seed + index))
    return found


def decoding_rate(runs: Sequence[GenerateStats]) -> float:
    """Tokens a second of several runs together, prefill aside."""
    return sum(sum(run.new_tokens) - len(run.new_tokens) for run in runs) / sum(run.decode_seconds for run in runs)


class TrainedPair:
    """A trained pair as a run's options ask for it: the Hugging Face models with their tokenizer, and both adapted.

    A subclass says which pair it is, and gives its prompts.
    """

    def __init__(self, bench: Run, pair: DemoPair) -> None:
        self.pair = pair
        self.target, self.draft = adapt(pair.target), adapt(pair.draft)
        self.prompt_tokens, self.new_tokens = bench.options.prompt_tokens, bench.options.new_tokens
        self.context_len = self.prompt_tokens + self.new_tokens // 2  # of a step, on average

    def prompts(self, options: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Prompts for the acceptance vector, and others that are timed. [1, length] each."""
        raise NotImplementedError

    def decoding(self, temperature: float) -> dict[str, Any]:
        """Options of `generate`."""
        return {"max_new_tokens": self.new_tokens, "temperature": temperature, "eos_token_id": ()}

    def profile(self, longest: int, **options: Any) -> HardwareProfile:
        """Measure the pair behind a prompt and behind the longest context, and what the loop takes beyond that."""
        contexts = (self.prompt_tokens, longest)
        profile = measure_profile(self.target, self.draft, context_lens=contexts, **options)
        return measure_overhead(self.target, self.draft, profile, context_len=self.prompt_tokens)

    def acceptance(self, prompts: Sequence[torch.Tensor], temperature: float, **options: Any) -> AcceptanceEstimate:
        """Estimate the acceptance vector from decoding other prompts than those that are timed."""
        options |= {"tree": PROBE_TREE, "temperature": temperature, "rule": "sequoia"}
        runs = [self._decode(self.draft, ids, n, **options) for n, ids in enumerate(prompts)]
        return estimate_acceptance(runs, temperature=temperature)

    def evidence(self, prompts: Sequence[torch.Tensor], temperature: float, **options: Any) -> Any:
        """What plans are made from: recorded steps; greedily a vector."""
        if temperature == 0:
            return self.acceptance(prompts, temperature, **options)
        settings = {"max_new_tokens": self.new_tokens, "temperature": temperature}
        return record_steps(self.target, self.draft, prompts, **settings)

    def decoder(self, tree: Any, **options: Any) -> Decode:
        """The loop with a tree or plan; None decodes without a draft."""
        model, chosen = (None, {}) if tree is None else (self.draft, {"tree": tree})
        return lambda ids, seed: self._decode(model, ids, seed, **chosen, **options)

    def _decode(self, draft: Any, ids: torch.Tensor, seed: int, **options: Any) -> GenerateStats:
        """Decode behind a prompt, in which a token that pads elsewhere is text."""
        mask = torch.ones_like(ids)
        return generate(self.target, draft, ids, attention_mask=mask, seed=seed, **options).stats


class Demo(TrainedPair):
    """The demo pair, on held-out source code."""

    def __init__(self, bench: Run, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(bench, load_demo_pair(dtype, bench.device))

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Token ids of texts, cut to the prompts' length. [1, prompt_tokens] each."""
        return encode_prompts(self.pair.tokenizer, texts, self.prompt_tokens, self.target.device)

    def prompts(self, options: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Prompts for the acceptance vector, and others that are timed."""
        ids = self.encode(self.texts(options.prompts + options.calibration_prompts))
        return ids[: options.calibration_prompts], ids[options.calibration_prompts :]

    def texts(self, count: int) -> list[str]:
        """Held-out source code, enough of it for a prompt each."""
        return held_out_prompts(count, 4 * self.prompt_tokens)
