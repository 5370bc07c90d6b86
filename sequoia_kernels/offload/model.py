"""`load_offloaded`: a model whose decoder layers stream from the host, as a tree model like any other."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sequoia_kernels.checks import is_integer
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.adapter import ForwardInputs, TreeModel, adapt
from sequoia_kernels.models.attention import TreeAttention
from sequoia_kernels.models.cache import PagedTreeCache, TreeCache, row_bytes
from sequoia_kernels.models.loading import local_folder
from sequoia_kernels.offload.host_memory import CudaPageLock, PageLock, close_all
from sequoia_kernels.offload.host_weights import HostLayer, MappedLayer, load_layer, pack_layers
from sequoia_kernels.offload.layers import DecoderLayer
from sequoia_kernels.offload.link import CudaLink, Link, ThreadLink
from sequoia_kernels.offload.lockstep import Lockstep
from sequoia_kernels.offload.memory import MAX_PREFILL_ROWS, MemoryPlan, format_bytes
from sequoia_kernels.offload.scheduler import LayerStreamer
from sequoia_kernels.offload.threads import run_shielded
from sequoia_kernels.offload.unloaded import UnloadedModel
from sequoia_kernels.offload.weights import WeightSource, normal_weights
from sequoia_kernels.tree import MAX_STEP_ROWS

__all__ = ["OffloadedModel", "load_offloaded", "memory_plan", "random_offloaded"]

# Share of a GPU's free memory that is taken when neither a budget nor a number of layers is given.
_FREE_SHARE = 0.9


class OffloadedModel(TreeModel):
    """A tree model whose decoder layers stream from the host while it runs; made by `load_offloaded`.

    Embeddings, norms, head, resident layers and caches are on the device. A context manager; `close` frees the host's
    memory, page-locked or not, and stops the link.

    Attributes:
        memory: where everything is, and what it adds up to.
    """

    def __init__(
        self, model: PreTrainedModel, memory: MemoryPlan, streamer: LayerStreamer | None, weights: WeightSource
    ) -> None:
        self.memory = memory
        self.streamer = streamer
        self.capturable = streamer is None  # a graph would replay the copies, but not the order they were planned in
        self._lockstep = Lockstep()
        self._closing = weakref.finalize(self, _close, self._lockstep, streamer, weights)
        if streamer is not None:
            for position, layer in enumerate(streamer.layers):
                _hook(layer.module, position, streamer, self._lockstep)
        super().__init__(model, adapt(model, forward="modules")._plan, forward_mode="modules")

    def __repr__(self) -> str:
        return f"Offloaded{super().__repr__()[:-1]}, {len(self.memory.streamed)} of {self.num_layers} layers streamed)"

    def __reduce__(self) -> NoReturn:
        """Refuse: what streams the layers cannot be copied."""
        raise TypeError("OffloadedModel: the model must be loaded again, got an attempt to copy or pickle it")

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def with_settings(self, compile_mode: str | None, attention: TreeAttention, forward_mode: str) -> TreeModel:
        """Refuse to compile, since layers come and go, and to share the layers with a model of other forwards."""
        if compile_mode is not None:
            raise ValueError(
                f"adapt: compile must be False for an offloaded model, got {compile_mode!r}; keep it resident instead"
            )
        if forward_mode != self.forward_mode:
            raise ValueError(f"adapt: forward must be None for an offloaded model, got {forward_mode!r}")
        raise ValueError(f"adapt: attention must be None for an offloaded model, got {attention!r}")

    def close(self) -> None:
        """Stop copies and free the host's memory; the model cannot run any more. Idempotent.

        Once begun it ends, whatever interrupts it; what did is raised then.
        """
        if self._closing.alive:
            run_shielded(self._closing, "sequoia-close")

    def max_cache_rows(self, batch_size: int) -> int | None:
        """Rows that the caches of a batch may have within the memory budget, None without one."""
        if self.memory.budget_bytes is None:
            return None
        return max(self._cache_room() // (batch_size * row_bytes(self._plan.specs)), 0)

    def _cache_room(self) -> int:
        return (self.memory.budget_bytes or 0) - self.memory.weight_bytes - self.memory.workspace_bytes

    def _check_room(self, where: str, num_rows: int, sizes: str, load_with: str) -> None:
        """Refuse a cache that the memory budget has no room for."""
        needed, room = num_rows * row_bytes(self._plan.specs), self._cache_room()
        if self.memory.budget_bytes is not None and needed > room:
            raise ValueError(
                f"{where}: {sizes} must fit the {format_bytes(room)} that device_memory_budget leaves, got "
                f"{format_bytes(needed)}; load the model with {load_with}, so that fewer layers stay on the device"
            )

    def new_cache(self, batch_size: int, max_cache_len: int, *, beyond_positions: bool = False) -> TreeCache:
        """Allocate a cache; as `TreeModel.new_cache`, and refused where it would exceed the memory budget.

        Raises:
            ValueError: as there, or the budget has no room for the cache.
        """
        if batch_size >= 1 and max_cache_len >= 1:
            sizes = f"batch_size x max_cache_len = {batch_size} x {max_cache_len}"
            self._check_room("new_cache", batch_size * max_cache_len, sizes, "these batch_size and max_cache_len")
        return super().new_cache(batch_size, max_cache_len, beyond_positions=beyond_positions)

    def new_paged_cache(self, num_pages: int, page_size: int) -> PagedTreeCache:
        """Allocate pages; as `TreeModel.new_paged_cache`, and refused where they would exceed the memory budget.

        Raises:
            ValueError: as there, or the budget has no room for the pages.
        """
        if is_integer(num_pages) and is_integer(page_size) and num_pages >= 1 and page_size >= 1:
            sizes = f"num_pages x page_size = {num_pages} x {page_size}"
            load_with = "batch_size x max_cache_len of as many rows"
            self._check_room("new_paged_cache", num_pages * page_size, sizes, load_with)
        return super().new_paged_cache(num_pages, page_size)

    def _forward(self, inputs: ForwardInputs, cache: TreeCache) -> torch.Tensor:
        try:
            return super()._forward(inputs, cache)
        finally:
            self._release()

    def forward_chunks(
        self, chunks: Sequence[ForwardInputs], cache: TreeCache, *, max_rows: int = MAX_PREFILL_ROWS
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

    def _one_pass(self, chunks: Sequence[ForwardInputs], cache: TreeCache) -> list[torch.Tensor]:
        for chunk in chunks:
            self._check_forward(chunk, cache)

        def run() -> list[torch.Tensor]:
            try:
                return self._lockstep.run([partial(self._run, chunk, cache) for chunk in chunks], self.device)
            finally:
                self._release()

        return self._switch.run(run)

    def _release(self) -> None:
        """Unbind what a forward that broke off has left bound, unless it still runs: then its end comes first."""
        if self.streamer is not None and self._lockstep.idle:
            self.streamer.release()


def _hook(module: nn.Module, position: int, streamer: LayerStreamer, lockstep: Lockstep) -> None:
    """Bind a layer's weights before it runs and release them behind it; the layer's own code stays as it is."""

    def before(module: nn.Module, inputs: Any) -> None:
        if lockstep.inside:
            lockstep.barrier()
        else:
            lockstep.end()
        streamer.acquire(position)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if not lockstep.inside:  # else the next chunk wants the same layer, and `acquire` of another one releases it
            streamer.release()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _close(lockstep: Lockstep, streamer: LayerStreamer | None, weights: WeightSource) -> None:
    try:
        lockstep.end()
        if streamer is not None:
            streamer.close()
    finally:
        weights.close()


def load_offloaded(
    path_or_id: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    device_memory_budget: int | str | None = None,
    resident_layers: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    num_buffers: int = 2,
    link: Link | None = None,
    host_memory: str = "packed",
    batch_size: int = 1,
    max_cache_len: int | None = None,
    max_rows: int = MAX_STEP_ROWS,
) -> OffloadedModel:
    """Load a model that does not fit the device: its decoder layers stay on the host and stream while it runs.

    Args:
        path_or_id: a folder of safetensors files written by `save_pretrained`, sharded or not, or a hub id.
        device: where the model computes.
        device_memory_budget: device memory that this model may take with its caches and activations: bytes or text
            such as "20GiB". As many layers as fit stay on the device. A draft model's memory is not part of it.
        resident_layers: how many layers stay on the device, or which, instead. With neither, CUDA devices give 90 % of
            what is free, and a CPU keeps no layer.
        dtype: dtype of the weights; None keeps the one they are stored in.
        num_buffers: device buffers that streamed layers take turns in; 2 overlap copies with compute.
        link: does the copies; None takes CUDA streams, or a thread on a CPU.
        host_memory: "packed" keeps streamed layers in memory, page-locked for CUDA; "mapped" leaves them in
            memory-mapped files, which must not change, and reads ahead, for hosts that are smaller than the model.
        batch_size: requests to reserve keys and values for.
        max_cache_len: rows of each of them; None takes 4096, or the model's positions where they are fewer.
        max_rows: tokens of the largest forward, to reserve activations for: nodes of the tree, at least 512.

    Returns:
        The model, to be used as `target` of `generate`. Close it, or use it in a `with` statement.

    Raises:
        TypeError: an argument has the wrong type.
        FileNotFoundError: the folder, its files or a shard are missing.
        ValueError: a file is damaged, truncated or lacks weights, or the budget is too small; the message says what it
            must be.
        UnsupportedModelError: the model cannot be offloaded or cannot decode trees; the message names the reason.
        RuntimeError: the host has too little memory, or too little that can be page-locked, or the device has too
            little free.

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
    device, device_memory_budget = _check_place(link, device, device_memory_budget, resident_layers)
    unloaded = UnloadedModel.of_folder(_fetched_folder(path_or_id), dtype)
    reserves = (num_buffers, batch_size, max_cache_len, max_rows)
    return _open(unloaded, device, device_memory_budget, resident_layers, reserves, link, host_memory)


def random_offloaded(
    config: PreTrainedConfig,
    *,
    fill: Callable[[str, torch.Tensor], None] | None = None,
    share_host_layers: bool | Sequence[int] = False,
    device: torch.device | str = "cpu",
    device_memory_budget: int | str | None = None,
    resident_layers: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    num_buffers: int = 2,
    link: Link | None = None,
    batch_size: int = 1,
    max_cache_len: int | None = None,
    max_rows: int = MAX_STEP_ROWS,
) -> OffloadedModel:
    """Build an offloaded model of random weights from its configuration, for benchmarks; it is never held as a whole.

    Args:
        config: configuration of a decoder-only model.
        fill: `fill(name, tensor)` writes a weight, in host memory or on the device; called once for each tensor that is
            kept. None takes `normal_weights` with the configuration's own deviation.
        share_host_layers: lets streamed layers share host memory, so that a model that is larger than the host can be
            timed: what is copied in a pass stays the same. True gives all layers the weights of layer 0, a sequence
            gives layer i those of layer `share_host_layers[i]`. Layers of the same weights share one block.
        dtype: dtype of the weights; None takes the configuration's, or torch's default.
        device, device_memory_budget, resident_layers, num_buffers, link, batch_size, max_cache_len, max_rows: as for
            `load_offloaded`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError, UnsupportedModelError, RuntimeError: as `load_offloaded`.

    Notes:
        A shared block is read from memory again for every layer, as long as it is larger than the processor's caches.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2)
        >>> with random_offloaded(config, share_host_layers=[0, 1, 1, 1], resident_layers=[0]) as model:
        ...     model.memory.streamed, model.memory.streamed_bytes // model.memory.host_bytes
        ((1, 2, 3), 3)
    """
    device, device_memory_budget = _check_place(link, device, device_memory_budget, resident_layers)
    if fill is None:
        fill = normal_weights(std=getattr(config, "initializer_range", 0.02), device=device)
    unloaded = UnloadedModel.of_config(config, fill, dtype, share_host_layers)
    reserves = (num_buffers, batch_size, max_cache_len, max_rows)
    return _open(unloaded, device, device_memory_budget, resident_layers, reserves, link, "packed")


def memory_plan(
    source: str | os.PathLike[str] | PreTrainedConfig,
    *,
    device: torch.device | str = "cpu",
    device_memory_budget: int | str | None = None,
    resident_layers: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    num_buffers: int = 2,
    batch_size: int = 1,
    max_cache_len: int | None = None,
    max_rows: int = MAX_STEP_ROWS,
) -> MemoryPlan:
    """Say where `load_offloaded` would put a model, from its configuration and its files' headers alone.

    Args:
        source: a folder or hub id as for `load_offloaded`, or a configuration alone, without any weights.
        device: where the model will compute; need not be present. CUDA takes some memory for its libraries.
        device_memory_budget, resident_layers, dtype, num_buffers, batch_size, max_cache_len, max_rows: as for
            `load_offloaded`.

    Returns:
        The plan.

    Raises:
        FileNotFoundError, ValueError, UnsupportedModelError: as `load_offloaded`.
    """
    if isinstance(source, PreTrainedConfig):
        unloaded = UnloadedModel.of_config(source, normal_weights(), dtype)
    else:
        unloaded = UnloadedModel.of_folder(_fetched_folder(source), dtype)
    reserves = (num_buffers, batch_size, max_cache_len, max_rows)
    return unloaded.plan(device_memory_budget, resident_layers, *reserves, torch.device(device).type == "cuda")


def _check_place(
    link: Link | None, device: torch.device | str, budget: int | str | None, resident_layers: int | Sequence[int] | None
) -> tuple[torch.device, int | str | None]:
    """Return the device with its index, and the budget or its default."""
    if link is not None and not isinstance(link, Link):
        raise TypeError(f"load_offloaded: link must be a Link, got {type(link).__name__}")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"load_offloaded: device must be of type cpu or cuda, got {device}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"load_offloaded: device must be present, got {device} on a machine without CUDA")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if budget is None and resident_layers is None:
            budget = int(_FREE_SHARE * _free_device_bytes(device))
    return device, budget


def _free_device_bytes(device: torch.device) -> int:
    """Memory that torch can still allocate: what the device has free, and what torch holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def _check_free(plan: MemoryPlan, free: int) -> None:
    if plan.total_bytes > free:
        raise RuntimeError(
            f"load_offloaded: the device must have {format_bytes(plan.total_bytes)} free for this plan, "
            f"got {format_bytes(free)}; lower device_memory_budget or resident_layers"
        )


def _open(
    unloaded: UnloadedModel,
    device: torch.device,
    budget: int | str | None,
    resident_layers: int | Sequence[int] | None,
    reserves: tuple[int, int, int | None, int],
    link: Link | None,
    host_memory: str,
) -> OffloadedModel:
    """Plan, load and wrap up; whatever fails leaves nothing open."""
    streamer = None
    try:
        plan = unloaded.plan(budget, resident_layers, *reserves, device.type == "cuda")
        if device.type == "cuda":
            _check_free(plan, _free_device_bytes(device))
        streamer = _load(unloaded, plan, device, link, host_memory)
        if host_memory == "packed" or streamer is None:
            unloaded.weights.close()
        return OffloadedModel(unloaded.model, plan, streamer, unloaded.weights)
    except BaseException:
        run_shielded(partial(_close, Lockstep(), streamer, unloaded.weights), "sequoia-close")
        raise


def _page_lock(device: torch.device) -> PageLock | None:
    return CudaPageLock(device) if device.type == "cuda" else None


def _load(
    unloaded: UnloadedModel, plan: MemoryPlan, device: torch.device, link: Link | None, host_memory: str
) -> LayerStreamer | None:
    weights, names = unloaded.weights, unloaded.names
    streamed = [unloaded.layers[index] for index in plan.streamed]
    on_cuda = device.type == "cuda"
    # The host's memory first: it is what is most often too small, and nothing else has been done yet.
    sources: list[HostLayer]
    if host_memory == "packed":
        sources = pack_layers(streamed, weights, names, _page_lock(device))
    else:
        sources = [MappedLayer(layer, weights, names) for layer in streamed]
    own_link: Link | None = None
    try:
        for index in plan.resident:
            _load_resident(unloaded.layers[index], weights, names, device)
        for tensor, tied, places in unloaded.fixed:
            host = torch.empty(tensor.shape, dtype=tensor.dtype)
            weights.copy_into(names[tied[0]], host)
            weights.forget(names[tied[0]])
            loaded = host.to(device)
            value = nn.Parameter(loaded, requires_grad=False) if places[0].is_parameter else loaded
            for place in places:
                place.put(value)
        _fill_tables(unloaded.model, device)
        if not streamed:
            return None
        if link is None:
            staging = 0 if host_memory == "packed" else plan.buffer_bytes
            link = own_link = CudaLink(device, staging) if on_cuda else ThreadLink()
        return LayerStreamer(streamed, sources, plan.num_buffers, device, link)
    except BaseException:
        if own_link is not None:
            own_link.close()
        close_all(sources)
        raise


def _load_resident(layer: DecoderLayer, weights: WeightSource, names: Mapping[str, str], device: torch.device) -> None:
    block = torch.empty(layer.num_bytes, dtype=torch.uint8)
    load_layer(layer, weights, names, block)
    block = block.to(device)
    layer.bind(tuple(packed.bindable(block) for packed in layer.tensors))
    for packed in layer.tensors:
        weights.forget(names[packed.name])


def _fill_tables(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies, embedding scales), as the model itself does."""
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
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


def _fetched_folder(path_or_id: str | os.PathLike[str]) -> Path:
    """Return a model's folder, of the hub's cache where it is not here; may download it."""
    folder = local_folder(path_or_id, "load_offloaded")
    if folder is not None:
        return folder
    name = os.fspath(path_or_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"load_offloaded: {name!r} must be an existing folder or a hub id that can be reached or is cached, "
            f"got: {error}"
        ) from error
