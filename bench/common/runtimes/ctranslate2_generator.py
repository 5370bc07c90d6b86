"""CTranslate2: its generator; it has no speculative decoding.

Weights go through its converter for transformers' models. On a CPU it computes in float32 or integers: bfloat16
weights, which float32 holds exactly, are computed with as float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.common.runtimes.base import PLAIN, Pair, Request, Runtime, Tokens


class CTranslate2Generator(Runtime):
    """`Generator`."""

    modules = {"ctranslate2": "ctranslate2"}  # noqa: RUF012

    def __init__(self, pair: Pair, threads: int, folder: Path) -> None:
        import ctranslate2

        super().__init__(pair._replace(draft=None), threads, folder)
        folder = self.converted("ctranslate2", self._convert) / "target"
        threading = {"inter_threads": 1, "intra_threads": threads}
        self.generator = ctranslate2.Generator(str(folder), device="cpu", compute_type="float32", **threading)
        self.vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"computes with": "float32 weights"}

    def modes(self, batch_size: int) -> list[str]:
        return [PLAIN]

    def _convert(self, role: str, folder: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(self.pair.roles()[role])).convert(str(folder), force=True)

    def decode(self, request: Request) -> Tokens:
        import ctranslate2

        options: dict[str, Any] = {"sampling_topk": 1}
        if request.temperature > 0:
            ctranslate2.set_random_seed(request.seed)
            options = {"sampling_topk": 0, "sampling_temperature": request.temperature}
        options |= {"max_length": request.num_tokens, "min_length": request.num_tokens, "end_token": []}
        options["include_prompt_in_result"] = False
        prompts = [[self.vocabulary[token] for token in prompt] for prompt in request.prompts]
        return [result.sequences_ids[0] for result in self.generator.generate_batch(prompts, **options)]
