"""Trained pairs: the demo pair, ready to decode, with what a benchmark measures of it first; checkpoints; texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sequoia_kernels import AcceptanceEstimate, HardwareProfile, estimate_acceptance, generate, measure_profile
from sequoia_kernels.decoding import PROBE_TREE, measure_overhead
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


class Demo:
    """The demo pair.

    Attributes:
        pair: the Hugging Face models and their tokenizer.
        target, draft: adapted.
        prompt_tokens: tokens of every prompt.
    """

    def __init__(self, device: torch.device, prompt_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.pair = load_demo_pair(dtype, device)
        self.target, self.draft = adapt(self.pair.target), adapt(self.pair.draft)
        self.prompt_tokens = prompt_tokens

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Token ids of texts, cut to the prompts' length. [1, prompt_tokens] each."""
        return encode_prompts(self.pair.tokenizer, texts, self.prompt_tokens, self.target.device)

    def texts(self, count: int) -> list[str]:
        """Held-out source code, enough of it for a prompt each."""
        return held_out_prompts(count, 4 * self.prompt_tokens)

    def profile(self, longest: int, **options: Any) -> HardwareProfile:
        """Measure the pair behind a prompt and behind the longest context, and what the loop takes beyond that."""
        contexts = (self.prompt_tokens, longest)
        profile = measure_profile(self.target, self.draft, context_lens=contexts, **options)
        return measure_overhead(self.target, self.draft, profile, context_len=self.prompt_tokens)

    def acceptance(self, prompts: Sequence[torch.Tensor], temperature: float, **options: Any) -> AcceptanceEstimate:
        """Estimate the acceptance vector from decoding other prompts than those that are timed."""
        options |= {"tree": PROBE_TREE, "temperature": temperature}
        runs = [generate(self.target, self.draft, ids, seed=n, **options).stats for n, ids in enumerate(prompts)]
        return estimate_acceptance(runs, temperature=temperature)
