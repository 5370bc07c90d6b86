"""`load_offloaded`: a model whose decoder layers stream from the host, as a tree model like any other."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.adapter import ChunkInputs, TreeModel, adapt
from sequoia_kernels.models.cache import TreeCache
from sequoia_kernels.models.offload.checkpoint import Checkpoint
from sequoia_kernels.models.offload.host_weights import CudaPageLock, HostLayer, MappedLayer, load_layer, pack_layers
from sequoia_kernels.models.offload.layers import DecoderLayer, Place, find_layers
from sequoia_kernels.models.offload.link import CudaLink, Link, ThreadLink
from sequoia_kernels.models.offload.lockstep import Lockstep
from sequoia_kernels.models.offload.memory import MemoryPlan, format_bytes, parse_bytes, plan_memory
from sequoia_kernels.models.offload.scheduler import LayerStreamer

__all__ = ["OffloadedModel", "load_offloaded", "memory_plan"]

# Share of a GPU's free memory that is taken when neither a budget nor a number of layers is given.
_FREE_SHARE = 0.9
_DEFAULT_CACHE_LEN = 4096
_DEFAULT_ROWS = 1024
# Rows of a prompt that are prefilled in one pass over the weights; their hidden states are on the device meanwhile.
_MAX_PREFILL_ROWS = 8192


class OffloadedModel(TreeModel):
    """A tree model whose decoder layers stream from the host while it runs; made by `load_offloaded`.

    Embeddings, norms, head, resident layers and caches are on the device. A context manager; `close` frees the host's
    memory, page-locked or not, and stops the link.

    Attributes:
        memory: where everything is, and what it adds up to.
    """

    def __init__(
        self, model: PreTrainedModel, memory: MemoryPlan, streamer: LayerStreamer | None, checkpoint: Checkpoint
    ) -> None:
        self.memory = memory
        self.streamer = streamer
        self.capturable = streamer is None  # a graph would replay the copies, but not the order they were planned in
        self._lockstep = Lockstep()
        self._closing = weakref.finalize(self, _close, streamer, checkpoint)
        try:
            if streamer is not None:
                for position, layer in enumerate(streamer.layers):
                    _hook(layer.module, position, streamer, self._lockstep)
            super().__init__(model, adapt(model)._plan)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Offloaded{super().__repr__()[:-1]}, {len(self.memory.streamed)} of {self.num_layers} layers streamed)"

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop copies and free the host's memory; the model cannot run any more. Idempotent."""
        self._closing()

    def new_cache(self, batch_size: int, max_cache_len: int) -> TreeCache:
        """Allocate a cache; as `TreeModel.new_cache`, and refused where it would exceed the memory budget.

        Raises:
            ValueError: as there, or the budget has no room for the cache.
        """
        if batch_size >= 1 and max_cache_len >= 1 and self.memory.budget_bytes is not None:
            row_bytes = sum(
                spec.num_kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize for spec in self._plan.specs
            )
            needed = batch_size * max_cache_len * row_bytes
            room = self.memory.budget_bytes - self.memory.weight_bytes - self.memory.workspace_bytes
            if needed > room:
                raise ValueError(
                    f"new_cache: batch_size x max_cache_len = {batch_size} x {max_cache_len} must fit the "
                    f"{format_bytes(room)} that device_memory_budget leaves, got {format_bytes(needed)}; load the "
                    "model with these batch_size and max_cache_len, so that fewer layers stay on the device"
                )
        return super().new_cache(batch_size, max_cache_len)

    def forward_chunks(
        self, chunks: Sequence[ChunkInputs], cache: TreeCache, *, max_rows: int = _MAX_PREFILL_ROWS
    ) -> list[torch.Tensor]:
        """Run forwards whose chunks build on one another, in one pass over the weights for every `max_rows` rows.

        As `TreeModel.forward_chunks`; the chunks of a pass go through the model layer by layer side by side, so the
        device holds all of their hidden states.
        """
        if self.streamer is None:
            return super().forward_chunks(chunks, cache)
        results: list[torch.Tensor] = []
        start = 0
        while start < len(chunks):
            end, rows = start, 0
            while end < len(chunks) and (end == start or rows + chunks[end].input_ids.numel() <= max_rows):
                rows += chunks[end].input_ids.numel()
                end += 1
            results += self._one_pass(chunks[start:end], cache)
            start = end
        return results

    def _one_pass(self, chunks: Sequence[ChunkInputs], cache: TreeCache) -> list[torch.Tensor]:
        assert self.streamer is not None
        for chunk in chunks:
            self._check_forward(chunk.input_ids, cache, chunk.cache_lens, chunk.step, chunk.last_row)
        with self._switch:
            try:
                return self._lockstep.run([partial(self._run, *chunk, cache) for chunk in chunks], self.device)
            finally:
                cache.context = None
                self.streamer.release()


def _hook(module: nn.Module, position: int, streamer: LayerStreamer, lockstep: Lockstep) -> None:
    """Bind a layer's weights before it runs and release them behind it; the layer's own code stays as it is."""

    def before(module: nn.Module, inputs: Any, arguments: dict[str, Any]) -> None:
        if lockstep.inside:
            cache = arguments.get("past_key_values")
            context = getattr(cache, "context", None)
            lockstep.barrier()
            if cache is not None:
                cache.context = context  # the chunks' forwards share the cache, and each has its own context
        streamer.acquire(position)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if not lockstep.inside:  # else the next chunk wants the same layer, and `acquire` of another one releases it
            streamer.release()

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)


def _close(streamer: LayerStreamer | None, checkpoint: Checkpoint) -> None:
    if streamer is not None:
        streamer.close()
    checkpoint.close()


def load_offloaded(
    path_or_id: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    device_memory_budget: int | str | None = None,
    resident_layers: int | None = None,
    dtype: torch.dtype | None = None,
    num_buffers: int = 2,
    link: Link | None = None,
    host_memory: str = "packed",
    batch_size: int = 1,
    max_cache_len: int | None = None,
    max_rows: int = _DEFAULT_ROWS,
) -> OffloadedModel:
    """Load a model that does not fit the device: its decoder layers stay on the host and stream while it runs.

    Args:
        path_or_id: a folder of safetensors files written by `save_pretrained`, sharded or not, or a hub id.
        device: where the model computes.
        device_memory_budget: device memory that this model may take with its caches and activations: bytes or text
            such as "20GiB". As many layers as fit stay on the device. A draft model's memory is not part of it.
        resident_layers: how many layers stay on the device, instead. With neither, CUDA devices give 90 % of what is
            free, and a CPU keeps no layer.
        dtype: dtype of the weights; None keeps the one they are stored in.
        num_buffers: device buffers that streamed layers take turns in; 2 overlap copies with compute.
        link: does the copies; None takes CUDA streams, or a thread on a CPU.
        host_memory: "packed" keeps streamed layers in memory, page-locked for CUDA; "mapped" leaves them in
            memory-mapped files and reads ahead, for hosts that are smaller than the model.
        batch_size: requests to reserve keys and values for.
        max_cache_len: rows of each of them; None takes 4096, or the model's positions where they are fewer.
        max_rows: tokens of the largest forward, to reserve activations for: nodes of the tree, at least 512.

    Returns:
        The model, to be used as `target` of `generate`. Close it, or use it in a `with` statement.

    Raises:
        TypeError: an argument has the wrong type.
        FileNotFoundError: the folder, its files or a shard are missing.
        ValueError: a file is truncated or lacks weights, or the budget is too small; the message says what it must be.
        UnsupportedModelError: the model cannot be offloaded or cannot decode trees; the message names the reason.
        RuntimeError: the host has too little memory, or too little that can be page-locked.

    Notes:
        Everything is checked before a weight is read. The model is never on the device as a whole, and never twice on
        the host: weights go from the mapped files straight to where they stay. Results are those of the resident model,
        since the same code runs on the same weights. Forwards cannot be captured in CUDA graphs.

    Source:
        Sequoia (arXiv 2402.12374), offloading experiments.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(config).save_pretrained(folder)
        ...     with load_offloaded(folder, resident_layers=1) as model:
        ...         model.memory.resident, model.memory.streamed
        ((3,), (0, 1, 2))
    """
    if host_memory not in ("packed", "mapped"):
        raise ValueError(f'load_offloaded: host_memory must be "packed" or "mapped", got {host_memory!r}')
    if link is not None and not isinstance(link, Link):
        raise TypeError(f"load_offloaded: link must be a Link, got {type(link).__name__}")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"load_offloaded: device must be of type cpu or cuda, got {device}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"load_offloaded: device must be present, got {device} on a machine without CUDA")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device_memory_budget is None and resident_layers is None:
            device_memory_budget = int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    folder = _local_folder(path_or_id)
    skeleton = _Skeleton(folder, dtype)
    try:
        plan = skeleton.plan(device_memory_budget, resident_layers, num_buffers, batch_size, max_cache_len, max_rows)
        streamer = _load(skeleton, plan, device, link, host_memory)
    except BaseException:
        skeleton.checkpoint.close()
        raise
    if host_memory == "packed" or streamer is None:
        skeleton.checkpoint.close()
    return OffloadedModel(skeleton.model, plan, streamer, skeleton.checkpoint)


def memory_plan(
    path_or_id: str | os.PathLike[str],
    *,
    device_memory_budget: int | str | None = None,
    resident_layers: int | None = None,
    dtype: torch.dtype | None = None,
    num_buffers: int = 2,
    batch_size: int = 1,
    max_cache_len: int | None = None,
    max_rows: int = _DEFAULT_ROWS,
) -> MemoryPlan:
    """Say where `load_offloaded` would put a model, from its configuration and its files' headers alone.

    Args:
        path_or_id: as for `load_offloaded`, and so are all others.
        device_memory_budget: bytes or text such as "20GiB".
        resident_layers: how many layers stay on the device.
        dtype: dtype of the weights.
        num_buffers: device buffers for streamed layers.
        batch_size: requests to reserve keys and values for.
        max_cache_len: rows of each of them.
        max_rows: tokens of the largest forward.

    Returns:
        The plan.

    Raises:
        FileNotFoundError, ValueError, UnsupportedModelError: as `load_offloaded`.
    """
    skeleton = _Skeleton(_local_folder(path_or_id), dtype)
    return skeleton.plan(device_memory_budget, resident_layers, num_buffers, batch_size, max_cache_len, max_rows)


class _Skeleton:
    """A model on the meta device, its layers, and where the files have their tensors."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"load_offloaded: {folder} must hold a model that transformers knows, got: {error}"
            ) from error
        family = str(config.model_type)
        if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
            raise UnsupportedModelError(
                f"load_offloaded: {folder} must be a decoder-only language model, got family {family}"
            )
        quantisation = getattr(config, "quantization_config", None)
        if quantisation:
            get = quantisation.get if isinstance(quantisation, dict) else partial(getattr, quantisation)
            raise UnsupportedModelError(
                f"load_offloaded: family {family} cannot be offloaded: its checkpoint is quantised with "
                f"{get('quant_method', 'an unnamed method')}, whose layers keep their weights in objects of another "
                "library and not in tensors that can be copied; load it with load_model, or offload the original"
            )
        self.checkpoint = Checkpoint(folder)
        self.dtype = dtype or config.dtype or self._stored_dtype()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self._keep_float32()
        self.layers = find_layers(self.model)
        # Outside the layers: places of each tensor, tied ones together.
        self.fixed = _tensors_outside(self.model, self.layers)
        self.names = self._match_names()
        if (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)

    def plan(
        self,
        budget: int | str | None,
        resident_layers: int | None,
        num_buffers: int,
        batch_size: int,
        max_cache_len: int | None,
        max_rows: int,
    ) -> MemoryPlan:
        for name, value in (("batch_size", batch_size), ("max_cache_len", max_cache_len), ("max_rows", max_rows)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"load_offloaded: {name} must be a positive integer, got {value!r}")
        config = self.model.config
        if max_cache_len is None:
            max_cache_len = min(_DEFAULT_CACHE_LEN, _setting(config, "max_position_embeddings") or _DEFAULT_CACHE_LEN)
        tables = [buffer for _, buffer in self.model.named_non_persistent_buffers()]
        return plan_memory(
            [layer.num_bytes for layer in self.layers],
            sum(_num_bytes(tensor) for tensor, _, _ in self.fixed) + sum(map(_num_bytes, tables)),
            budget_bytes=None if budget is None else parse_bytes("device_memory_budget", budget),
            resident_layers=resident_layers,
            num_buffers=num_buffers,
            kv_bytes=batch_size * max_cache_len * _cache_row_bytes(config, self.layers, self.dtype),
            workspace_bytes=batch_size * max_rows * _activation_bytes(config, self.dtype),
        )

    def _stored_dtype(self) -> torch.dtype:
        floats = (stored.dtype for stored in self.checkpoint.tensors.values() if stored.dtype.is_floating_point)
        return next(floats, torch.float32)

    def _keep_float32(self) -> None:
        """Leave in float32 what the family wants there at a lower dtype, as transformers' own loading does."""
        plan = self.model._get_dtype_plan(self.dtype)
        if not plan:
            return
        patterns = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in plan))
        for name, parameter in self.model.named_parameters():
            if patterns.search(name) and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32)

    def _match_names(self) -> dict[str, str]:
        """Find every tensor of the model in the checkpoint. Returns names by the model's own."""
        wanted = [([packed.name], packed.shape) for layer in self.layers for packed in layer.tensors]
        wanted += [(names, tensor.shape) for tensor, names, _ in self.fixed]
        family, prefix = str(self.model.config.model_type), f"{self.model.base_model_prefix}."
        transforms = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in transforms if type(transform) is WeightRenaming]
        merging = [transform for transform in transforms if type(transform) is not WeightRenaming]
        renamed = {_rename(name, renamings): name for name in self.checkpoint.tensors} | {
            name: name for name in self.checkpoint.tensors
        }
        found: dict[str, str] = {}
        missing = []
        for names, shape in wanted:
            # A tied tensor is stored under one of its names; a bare base model lacks the prefix.
            aliases = (alias for name in names for alias in (name, name.removeprefix(prefix)))
            alias = next((alias for alias in aliases if alias in renamed), None)
            if alias is None:
                missing.append(names[0])
                continue
            stored = renamed[alias]
            if any(transform.rename_source_key(name)[1] for transform in merging for name in (stored, alias)):
                raise _merges_weights(family, names[0])
            if self.checkpoint.tensors[stored].shape != tuple(shape):
                raise ValueError(
                    f"load_offloaded: {stored} must have shape {list(shape)}, as the configuration says, "
                    f"got {list(self.checkpoint.tensors[stored].shape)}"
                )
            found[names[0]] = stored
        if missing:
            unused = self.checkpoint.tensors.keys() - found.values()
            if any(transform.rename_source_key(name)[1] for transform in merging for name in unused):
                raise _merges_weights(family, missing[0])
            raise ValueError(
                f"load_offloaded: {self.checkpoint.folder} must hold all weights of a {family} model, "
                f"got none for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        return found


def _rename(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _merges_weights(family: str, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"load_offloaded: family {family} cannot be offloaded: transformers merges or converts its stored weights "
        f"while loading, so {name} cannot be streamed from the file as it is"
    )


def _load(
    skeleton: _Skeleton, plan: MemoryPlan, device: torch.device, link: Link | None, host_memory: str
) -> LayerStreamer | None:
    checkpoint, names = skeleton.checkpoint, skeleton.names
    streamed = [skeleton.layers[index] for index in plan.streamed]
    on_cuda = device.type == "cuda"
    # The host's memory first: it is what is most often too small, and nothing else has been done yet.
    sources: list[HostLayer]
    if host_memory == "packed":
        sources = pack_layers(streamed, checkpoint, names, CudaPageLock() if on_cuda else None)
    else:
        sources = [MappedLayer(layer, checkpoint, names) for layer in streamed]
    own_link: Link | None = None
    try:
        for index in plan.resident:
            _load_resident(skeleton.layers[index], checkpoint, names, device)
        for tensor, tied, places in skeleton.fixed:
            loaded = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            checkpoint.copy_into(names[tied[0]], loaded) if not on_cuda else _through_host(
                checkpoint, names[tied[0]], loaded
            )
            checkpoint.forget(names[tied[0]])
            value = nn.Parameter(loaded, requires_grad=False) if places[0].is_parameter else loaded
            for place in places:
                place.put(value)
        _fill_tables(skeleton.model, device)
        if not streamed:
            return None
        if link is None:
            staging = 0 if host_memory == "packed" else plan.buffer_bytes
            link = own_link = CudaLink(device, staging) if on_cuda else ThreadLink()
        return LayerStreamer(streamed, sources, plan.num_buffers, device, link)
    except BaseException:
        if own_link is not None:
            own_link.close()
        for source in sources:
            source.close()
        raise


def _load_resident(layer: DecoderLayer, checkpoint: Checkpoint, names: Mapping[str, str], device: torch.device) -> None:
    block = torch.empty(layer.num_bytes, dtype=torch.uint8)
    load_layer(layer, checkpoint, names, block)
    block = block.to(device)
    layer.bind(tuple(packed.bindable(block) for packed in layer.tensors))
    for packed in layer.tensors:
        checkpoint.forget(names[packed.name])


def _through_host(checkpoint: Checkpoint, name: str, destination: torch.Tensor) -> None:
    host = torch.empty(destination.shape, dtype=destination.dtype)
    checkpoint.copy_into(name, host)
    destination.copy_(host)


def _tensors_outside(
    model: PreTrainedModel, layers: Sequence[DecoderLayer]
) -> list[tuple[torch.Tensor, list[str], list[Place]]]:
    """Return (tensor, its names, its places) of every parameter and stored buffer that belongs to no layer."""
    inside = {id(module) for layer in layers for module in layer.module.modules()}
    found: dict[int, tuple[torch.Tensor, list[str], list[Place]]] = {}
    for prefix, module in model.named_modules():
        if id(module) in inside:
            continue
        stored = {name: (tensor, True) for name, tensor in module._parameters.items()}
        for name, tensor in module._buffers.items():
            if name not in module._non_persistent_buffers_set:
                stored[name] = tensor, False  # type: ignore[assignment]
        for name, (tensor, is_parameter) in stored.items():
            if tensor is not None:
                _, names, places = found.setdefault(id(tensor), (tensor, [], []))
                names.append(f"{prefix}.{name}" if prefix else name)
                places.append(Place(module, name, is_parameter))
    return list(found.values())


def _fill_tables(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies, embedding scales), as the model itself does."""
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        stored = [*module._parameters.values(), *module._buffers.values()]
        for tensor in stored:
            if tensor is not None:
                tensor._is_hf_initialized = True  # the initialisation leaves these alone
        for name in names:
            module._buffers[name] = torch.full_like(module._buffers[name], float("nan"), device="cpu")
        with torch.no_grad():
            model._init_weights(module)
        for name in names:
            table = module._buffers[name]
            if table.is_floating_point() and bool(table.isnan().any()):
                raise UnsupportedModelError(
                    f"load_offloaded: family {model.config.model_type} cannot be offloaded: its initialisation does "
                    f"not compute {type(module).__name__}.{name}, which no file holds"
                )
            module._buffers[name] = table.to(device)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _setting(config: Any, *names: str) -> int | None:
    """Read the first of some settings that is given. Not by attribute: some families forbid reading per-layer ones."""
    settings = config.to_dict()
    values = (settings.get(config.attribute_map.get(name, name)) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)


def _head_shape(config: Any) -> tuple[int, int, int]:
    """Return (query heads, key/value heads, width of a head)."""
    num_heads = _setting(config, "num_attention_heads") or 1
    hidden = _setting(config, "hidden_size") or 1
    return (
        num_heads,
        _setting(config, "num_key_value_heads") or num_heads,
        _setting(config, "head_dim") or hidden // num_heads,
    )


def _cache_row_bytes(config: Any, layers: Sequence[DecoderLayer], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers, from the projections' shapes or else the configuration."""
    num_heads, num_kv_heads, head_dim = _head_shape(config)
    per_layer = 2 * num_kv_heads * head_dim
    if _setting(config, "kv_lora_rank"):  # the tree cache holds expanded keys and values
        widths = [_setting(config, name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        per_layer = num_heads * sum(widths)
    total = 0
    for layer in layers:
        rows = [packed.shape[0] for packed in layer.tensors if packed.name.endswith(("k_proj.weight", "v_proj.weight"))]
        total += sum(rows) if len(rows) == 2 else per_layer
    return total * dtype.itemsize


def _activation_bytes(config: Any, dtype: torch.dtype) -> int:
    """Estimate the bytes that a token takes while it is computed: one layer's activations, or logits if larger."""
    num_heads, _, head_dim = _head_shape(config)
    hidden = _setting(config, "hidden_size") or 1
    inner = _setting(config, "intermediate_size", "ffn_dim") or 4 * hidden
    layer = 6 * hidden + 4 * num_heads * head_dim + 3 * inner
    return (max(layer, 2 * (_setting(config, "vocab_size") or 1)) + 2 * hidden) * dtype.itemsize


def _local_folder(path_or_id: str | os.PathLike[str]) -> Path:
    name = os.fspath(path_or_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"load_offloaded: path_or_id must be a folder with a config.json, got {folder}; "
                "write one with save_pretrained"
            )
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"load_offloaded: path_or_id must be an existing folder or a hub id, got {name!r}: no such folder"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"load_offloaded: {name!r} must be an existing folder or a hub id that can be reached or is cached, "
            f"got: {error}"
        ) from error
