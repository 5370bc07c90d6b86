"""Decoding the same pair of models with the runtimes that people use on CPUs, each in a process of its own.

A module a runtime, ours among them; `base` is what they have in common, `process` runs one, `exactness` checks their
output. A runtime is imported by its process only, so that none needs to be installed.
"""

from __future__ import annotations

RUNTIMES = {  # name -> module and class; ours first
    "sequoia-kernels": ("own_loop", "OwnLoop"),
    "transformers": ("transformers_generate", "TransformersGenerate"),
    "openvino-genai": ("openvino_pipeline", "OpenVinoPipeline"),
    "onnxruntime-genai": ("onnxruntime_generator", "OnnxRuntimeGenerator"),
    "llama.cpp": ("llama_cpp_loop", "LlamaCppLoop"),
    "ctranslate2": ("ctranslate2_generator", "CTranslate2Generator"),
}
OURS = "sequoia-kernels"
