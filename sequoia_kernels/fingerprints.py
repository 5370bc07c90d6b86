"""Fingerprints: what times belong to, a device or the shapes of a model, and how both are read.

Whoever keeps times (the planner's profiles) has fingerprints as values only; what is known of processors and of
transformers' models is known here. transformers is imported where a model or a configuration is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["DeviceFingerprint", "ModelFingerprint", "largest_cache_bytes"]

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # as Linux tells of them


@dataclass(frozen=True)
class DeviceFingerprint:
    """What a profile's times belong to."""

    type: str  # torch device type, "cpu" or "cuda"
    name: str  # the processor's or the GPU's own
    num_threads: int | None  # torch's within an op on a CPU, None elsewhere. Times at another number are other times
    memory_bytes: int | None  # of the device, None where it cannot be read. Not compared
    compute_capability: str | None  # of a GPU, e.g. "9.0"; None elsewhere
    torch_version: str  # not compared, but a difference is logged

    @classmethod
    def of(cls, device: torch.device | str) -> DeviceFingerprint:
        """Read the fingerprint of a device of this machine.

        Raises:
            ValueError: there is no such device here, or its type is neither "cpu" nor "cuda".
        """
        device = torch.device(device)
        if device.type == "cpu":
            return cls("cpu", _cpu_name(), torch.get_num_threads(), _cpu_memory(), None, torch.__version__)
        if device.type != "cuda":
            raise ValueError(f"DeviceFingerprint.of: device must be of type cpu or cuda, got {device}")
        if not torch.cuda.is_available():
            raise ValueError(f"DeviceFingerprint.of: device must be present, got {device} on a machine without CUDA")
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        return cls("cuda", properties.name, None, properties.total_memory, capability, torch.__version__)

    def same_device(self, other: DeviceFingerprint) -> bool:
        """Tell whether times of the one may be used on the other."""
        return (self.type, self.name, self.num_threads) == (other.type, other.name, other.num_threads)

    def __str__(self) -> str:
        threads = "" if self.num_threads is None else f", {self.num_threads} threads"
        return f"{self.type}: {self.name}{threads}"


@dataclass(frozen=True)
class ModelFingerprint:
    """The shapes that decide a model's forward time. Equal fingerprints share their times."""

    family: str  # the architecture's name in transformers, e.g. "llama"
    dtype: str  # of the weights, e.g. "bfloat16"
    num_parameters: int  # all of them
    vocab_size: int  # rows of the language-model head
    num_layers: int  # decoder layers
    hidden_size: int  # width of the residual stream
    intermediate_size: int | None  # width of the feed-forward layer, None where the config does not say
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads
    head_dim: int  # width of a head
    # The linear layers, the head among them, as (inputs, outputs, how many of them); empty where unknown. A forward can
    # be composed of microbenchmarks where they are known.
    linears: tuple[tuple[int, int, int], ...] = ()
    streamed_bytes: int = 0  # weights that every forward copies from the host; 0 unless the model is offloaded

    @classmethod
    def of(cls, model: Any) -> ModelFingerprint:
        """Read the fingerprint of a model: a Hugging Face causal language model, or a `TreeModel` around one."""
        wrapped = not hasattr(model, "config")
        inner = getattr(model, "model", None) if wrapped else model
        config = getattr(inner, "config", None)
        if config is None:
            raise TypeError(
                f"ModelFingerprint.of: model must have a config or wrap a model that has, got {type(model).__name__}"
            )
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        num_parameters = model.num_parameters() if callable(model.num_parameters) else model.num_parameters
        head = None if wrapped else model.get_output_embeddings()
        vocab_size = model.vocab_size if wrapped else config.vocab_size if head is None else head.weight.shape[0]
        num_heads = int(config.num_attention_heads)
        hidden_size = int(config.hidden_size)
        intermediate_size = _of_most_layers(config, "intermediate_size")
        return cls(
            family=str(config.model_type),
            dtype=str(model.dtype).removeprefix("torch."),
            num_parameters=int(num_parameters),
            vocab_size=int(vocab_size),
            num_layers=int(config.num_hidden_layers),
            hidden_size=hidden_size,
            intermediate_size=int(intermediate_size) if isinstance(intermediate_size, int) else None,
            num_heads=num_heads,
            num_kv_heads=int(_of_most_layers(config, "num_key_value_heads") or num_heads),
            head_dim=int(_of_most_layers(config, "head_dim") or hidden_size // num_heads),
            linears=_linear_layers(inner),
            streamed_bytes=int(getattr(getattr(model, "memory", None), "streamed_bytes", 0)),
        )

    @classmethod
    def from_config(
        cls, config: Any, dtype: torch.dtype | str | None = None, *, streamed_bytes: int = 0
    ) -> ModelFingerprint:
        """Read the fingerprint that a model of this configuration would have, without any weights.

        Args:
            config: a transformers configuration, a local model folder, or the path of a config.json.
            dtype: of the weights, e.g. "bfloat16"; the configuration's own when None, float32 where it has none.
            streamed_bytes: weights that every forward would copy from the host, for a model to be offloaded.

        Raises:
            TypeError: `config` or `dtype` is of the wrong type.
            ValueError: there is no such file, it is no configuration of a decoder-only language model, or there is no
                such dtype.

        Notes:
            Builds the model on the meta device: no weights, a second or two for a large one. Loading the same
            configuration with weights gives an equal fingerprint.

        Example:
            >>> from transformers import LlamaConfig
            >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2,
            ...                      num_attention_heads=2)
            >>> ModelFingerprint.from_config(config, "bfloat16").linears
            ((16, 16, 8), (16, 32, 1), (16, 48, 4), (48, 16, 2))
        """
        from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

        where = "ModelFingerprint.from_config"
        if isinstance(config, (str, os.PathLike)):
            path = Path(config)
            if not path.exists():
                raise ValueError(f"{where}: config must be a local folder or config.json, got {os.fspath(config)}")
            try:
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            except Exception as reason:  # transformers checks few of a configuration's values itself
                raise ValueError(f"{where}: {path} must hold a transformers configuration ({reason})") from None
        if not isinstance(config, PretrainedConfig):
            raise TypeError(
                f"{where}: config must be a transformers configuration or a path, got {type(config).__name__}"
            )
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None) or dtype
        chosen = dtype or getattr(config, "dtype", None) or torch.float32
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise ValueError(f"{where}: dtype must name a floating-point torch dtype, got {chosen!r}")
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
        except ValueError:
            raise ValueError(
                f"{where}: config must be that of a decoder-only language model, got {config.model_type}"
            ) from None
        return dataclasses.replace(cls.of(model), streamed_bytes=streamed_bytes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.num_parameters * _dtype_bytes(self.dtype)

    @property
    def key(self) -> str:
        """Name of the model in a profile: readable, and ending in a hash of every field."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:8]
        return f"{self.family}-{self.num_layers}x{self.hidden_size}-{self.dtype}-{digest}"

    @property
    def cache_row_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _dtype_bytes(self.dtype)


def _of_most_layers(config: Any, name: str) -> Any:
    """Read an attribute which layers may differ in (Gemma 4): then what most of them have. None where there is none."""
    if not getattr(config, "is_heterogeneous", False):
        return getattr(config, name, None)
    ((value, _),) = Counter(getattr(layer, name, None) for layer in config.per_layer_config).most_common(1)
    return value


def _linear_layers(model: Any) -> tuple[tuple[int, int, int], ...]:
    """Count the linear layers of a model by their shapes: torch's, and the transposed ones of GPT-2."""
    if not isinstance(model, torch.nn.Module):
        return ()
    found: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            found[module.in_features, module.out_features] += 1
        elif type(module).__name__ == "Conv1D":
            sizes: Any = module
            found[int(sizes.nx), int(sizes.nf)] += 1
    return tuple((inputs, outputs, count) for (inputs, outputs), count in sorted(found.items()))


def _dtype_bytes(name: str) -> int:
    dtype = getattr(torch, name, None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cpu_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no sysconf on this system
        return None


def largest_cache_bytes() -> int:
    """Give the size of the CPU's largest cache, as far as one core can use it; 32 MiB where the system does not say."""
    sizes = []
    for entry in CPU_CACHES.glob("index*/size"):
        with contextlib.suppress(OSError):  # a system may list what it does not tell
            match = re.fullmatch(r"(\d+)([KMG]?)", entry.read_text(encoding="utf-8").strip())
            if match:
                sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=32 << 20)
