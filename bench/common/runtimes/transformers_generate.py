"""transformers' `generate`, and its assisted generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.common.runtimes.base import DRAFT, Pair, Request, Runtime, Tokens, new_tokens


class TransformersGenerate(Runtime):
    """Eager torch in the weights' own dtype."""

    modules = {"transformers": "transformers", "torch": "torch"}  # noqa: RUF012

    def __init__(self, pair: Pair, threads: int, folder: Path) -> None:
        super().__init__(pair, threads, folder)
        torch.set_num_threads(threads)
        self.models = {role: pair.load(role) for role in pair.roles()}

    @torch.inference_mode()
    def decode(self, request: Request) -> Tokens:
        torch.manual_seed(request.seed)
        prompts = torch.tensor(request.prompts)
        options: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            options = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
        if request.mode == DRAFT:
            options["assistant_model"] = assistant = self.models["draft"]
            assistant.generation_config.num_assistant_tokens = request.draft_tokens
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
        options |= {"max_new_tokens": request.num_tokens, "min_new_tokens": request.num_tokens, "pad_token_id": 0}
        output = self.models["target"].generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return new_tokens(output.tolist(), request.prompts)
