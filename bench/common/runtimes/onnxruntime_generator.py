"""ONNX Runtime GenAI: its generator, and its speculative decoding with a draft model.

Weights go through its own model builder. On a CPU it offers float32 and integers: bfloat16 weights, which float32 holds
exactly, are computed with as float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common.runtimes.base import DRAFT, Pair, Request, Runtime, Tokens, new_tokens


class OnnxRuntimeGenerator(Runtime):
    """`Generator`."""

    modules = {  # noqa: RUF012
        "onnxruntime": "onnxruntime",
        "onnxruntime_genai": "onnxruntime-genai",
        "onnx_ir": "onnx-ir",
    }

    def __init__(self, pair: Pair, threads: int, folder: Path) -> None:
        super().__init__(pair, threads, folder)
        self.root = self.converted("onnxruntime", self._convert)
        self._configure(threads)
        self.models: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"computes with": "float32 weights"}

    def _convert(self, role: str, folder: Path) -> None:
        source = self.pair.roles()[role]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder]
        command += ["-p", "fp32", "-e", "cpu", "-c", folder / "cache"]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, timeout=1200)
        (folder / "genai_config.json").rename(folder / "built_config.json")

    def _configure(self, threads: int) -> None:
        """Write a configuration of the target alone beside it, and one of both above them."""
        built = {role: json.loads((self.root / role / "built_config.json").read_text()) for role in self.pair.roles()}
        threading = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        for config in built.values():
            config["model"]["decoder"]["session_options"] |= threading
            config["model"]["eos_token_id"] = []
        alone, together = self.root / "target" / "genai_config.json", self.root / "genai_config.json"
        alone.write_text(json.dumps(built["target"]))
        if self.pair.draft is not None:
            for role, config in built.items():
                config["model"]["decoder"]["filename"] = f"{role}/{config['model']['decoder']['filename']}"
            built["target"]["model"]["draft"] = built["draft"]["model"]["decoder"]
            built["target"]["speculative"] = {"max_draft_tokens": 4}
            together.write_text(json.dumps(built["target"]))

    def decode(self, request: Request) -> Tokens:
        import numpy as np
        import onnxruntime_genai

        if request.mode not in self.models:
            folder = self.root if request.mode == DRAFT else self.root / "target"
            self.models[request.mode] = onnxruntime_genai.Model(str(folder))
        model = self.models[request.mode]
        prompts = np.array(request.prompts, dtype=np.int32)
        count, length = prompts.shape
        search: dict[str, Any] = {"batch_size": count, "max_length": length + request.num_tokens, "do_sample": False}
        if request.temperature > 0:
            search |= {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
            search["random_seed"] = request.seed
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(**search)
        if request.mode == DRAFT:
            parameters.set_speculative_options(max_draft_tokens=request.draft_tokens)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompts)
        while not generator.is_done():
            generator.generate_next_token()
        return new_tokens([generator.get_sequence(index) for index in range(count)], request.prompts)
