"""A small trained pair for demonstrations, tests and benchmarks: it writes Python; the package carries its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from sequoia_kernels.demo.corpus import held_out_prompts

__all__ = ["DemoPair", "demo_pair_folder", "held_out_prompts", "load_demo_pair"]


def demo_pair_folder() -> Path:
    """Return the folder with the pair's `target` and `draft`, each an ordinary Hugging Face model folder."""
    return Path(__file__).parent / "pair"


class DemoPair(NamedTuple):
    """Target, draft (Hugging Face Llama models) and their tokenizer."""

    target: Any
    draft: Any
    tokenizer: Any


def load_demo_pair(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DemoPair:
    """Load the demo pair. The weights are stored in bfloat16 and converted to `dtype`.

    Args:
        dtype: dtype of both models.
        device: device of both models.

    Returns:
        `DemoPair`, the models in evaluation mode.

    Raises:
        FileNotFoundError: the package was installed without its data files.

    Example:
        >>> pair = load_demo_pair()
        >>> pair.target.config.model_type, pair.draft.config.num_hidden_layers
        ('llama', 1)
    """
    folder = demo_pair_folder()
    for role in ("target", "draft"):
        if not (folder / role / "config.json").exists():
            raise FileNotFoundError(
                f"load_demo_pair: {folder / role} is missing; reinstall the package, or train the pair with "
                "`python -m sequoia_kernels.demo.train`"
            )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=dtype, trust_remote_code=False).to(device).eval()
        for role in ("target", "draft")
    ]
    return DemoPair(models[0], models[1], AutoTokenizer.from_pretrained(folder / "target", trust_remote_code=False))
