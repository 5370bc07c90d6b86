"""OpenVINO GenAI: its pipeline over stateful models, and its continuous batching with a draft.

Weights are written by `openvino_model`. What a bfloat16 model's products then read is the plugin's choice for the
processor; keys and values are float32. Without a draft the faster of its two pipelines is taken: both are timed on the
prompts that `prepare` is given.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.common.runtimes.base import DRAFT, PLAIN, Pair, Request, Runtime, Tokens
from bench.common.runtimes.openvino_model import save_openvino_model
from sequoia_kernels.demo import demo_pair_folder

CACHE_GB = 2
EVERY_TOKEN = 1 << 30  # as top-k: none is left out


class OpenVinoPipeline(Runtime):
    """`LLMPipeline`."""

    modules = {  # noqa: RUF012
        "openvino": "openvino",
        "openvino_genai": "openvino-genai",
        "openvino_tokenizers": "openvino-tokenizers",
    }
    batched_draft = True

    def __init__(self, pair: Pair, threads: int, folder: Path) -> None:
        super().__init__(pair, threads, folder)
        self.root = self.converted("openvino", self._convert)
        self.properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.properties |= {"ENABLE_CPU_PINNING": False}
        self.pipelines: dict[str, Any] = {}
        self.plain_pipeline: dict[int, str] = {}  # the faster one by batch size

    def _convert(self, role: str, folder: Path) -> None:
        import openvino
        import openvino_tokenizers
        from transformers import AutoTokenizer

        model = self.pair.load(role)
        save_openvino_model(model, folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        # Token ids go in and come out, but the pipelines with a draft do not start without a tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(demo_pair_folder() / "target", trust_remote_code=False)
        parts = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
        for part, name in zip(parts, ("openvino_tokenizer.xml", "openvino_detokenizer.xml")):
            openvino.save_model(part, folder / name)

    def _pipeline(self, kind: str) -> Any:
        """ "stateful", "paged" or with a draft, built at its first use."""
        import openvino_genai

        if kind not in self.pipelines:
            options: dict[str, Any] = dict(self.properties)
            if kind != "stateful":
                options["scheduler_config"] = openvino_genai.SchedulerConfig()
                options["scheduler_config"].cache_size = CACHE_GB
                options["scheduler_config"].enable_prefix_caching = False  # or a second run would skip the prompt
            else:
                options["ATTENTION_BACKEND"] = "SDPA"
            if kind == DRAFT:
                draft = openvino_genai.draft_model(str(self.root / "draft"), "CPU", **self.properties)
                options["draft_model"] = draft
            self.pipelines[kind] = openvino_genai.LLMPipeline(str(self.root / "target"), "CPU", **options)
        return self.pipelines[kind]

    def prepare(self, request: Request, seconds: float | None) -> dict[str, Any]:
        times = {}
        for kind in ("stateful", "paged"):
            took = []
            for _ in range(3):
                started = time.perf_counter()
                self._run(kind, request._replace(mode=PLAIN))
                took.append(time.perf_counter() - started)
            times[kind] = min(took[1:])
        chosen = self.plain_pipeline[len(request.prompts)] = min(times, key=lambda kind: times[kind])
        return {"plain pipeline": chosen}

    def decode(self, request: Request) -> Tokens:
        kind = DRAFT if request.mode == DRAFT else self.plain_pipeline.get(len(request.prompts), "stateful")
        return self._run(kind, request)

    def _run(self, kind: str, request: Request) -> Tokens:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.num_tokens
        config.ignore_eos = True
        config.do_sample = request.temperature > 0
        if request.temperature > 0:
            config.temperature, config.top_k, config.top_p = request.temperature, EVERY_TOKEN, 1.0
            config.rng_seed = request.seed
        if kind == DRAFT:
            config.num_assistant_tokens = request.draft_tokens
        prompts = np.array(request.prompts, dtype=np.int64)
        tensors = (openvino.Tensor(values) for values in (prompts, np.ones_like(prompts)))
        result = self._pipeline(kind).generate(openvino_genai.TokenizedInputs(*tensors), config)
        return [list(tokens) for tokens in result.tokens]
