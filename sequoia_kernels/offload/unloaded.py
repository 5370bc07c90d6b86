"""A model without its weights: on the meta device, its layers laid out, and what everything will take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from sequoia_kernels.documents import is_count
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.offload.checkpoint import Checkpoint, StoredTensor
from sequoia_kernels.offload.layers import find_layers, find_stored
from sequoia_kernels.offload.memory import MemoryPlan, parse_bytes, plan_memory, reserved_bytes
from sequoia_kernels.offload.weights import MadeWeights, WeightSource

__all__ = ["UnloadedModel"]


class UnloadedModel:
    """A model on the meta device, its layers, and the names of its tensors at their source.

    Attributes:
        model: the model; `requires_grad` is off everywhere.
        layers: its decoder layers.
        fixed: (tensor, its names, its places) of everything that belongs to no layer.
        names: name of each tensor at the source, by the model's own name.
        weights_of: for each layer the one whose weights it has.
    """

    def __init__(self, config: PreTrainedConfig, weights: WeightSource, dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"load_offloaded: the configuration must make a {config.model_type} model, got: {error!r}"
            ) from error
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self._keep_float32()
        self.layers = find_layers(self.model)
        inside = {id(module) for layer in self.layers for module in layer.module.modules()}
        self.fixed = find_stored(item for item in self.model.named_modules() if id(item[1]) not in inside)
        self.weights_of: Sequence[int] = range(len(self.layers))
        own = (
            *(packed.name for layer in self.layers for packed in layer.tensors),
            *(names[0] for _, names, _ in self.fixed),
        )
        self.names = {name: name for name in own}

    @classmethod
    def of_folder(cls, folder: Path, dtype: torch.dtype | None) -> UnloadedModel:
        """Read a folder's configuration and its files' headers."""
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers checks few of a configuration's values itself
            raise ValueError(
                f"load_offloaded: {folder} must hold a model that transformers knows, got: {error}"
            ) from error
        _check_config(config, f"load_offloaded: {folder}")
        checkpoint = Checkpoint(folder)
        floats = (stored.dtype for stored in checkpoint.tensors.values() if stored.dtype.is_floating_point)
        unloaded = cls(config, checkpoint, dtype or config.dtype or next(floats, torch.float32))
        unloaded.names = _match_names(checkpoint, unloaded)
        if (folder / "generation_config.json").is_file():
            try:
                unloaded.model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:
                raise ValueError(
                    f"load_offloaded: {folder} must hold a generation_config.json that can be read, got: {error}"
                ) from error
        return unloaded

    @classmethod
    def of_config(
        cls,
        config: PreTrainedConfig,
        fill: Callable[[str, torch.Tensor], None],
        dtype: torch.dtype | None,
        share_host_layers: bool | Sequence[int] = False,
    ) -> UnloadedModel:
        """Take a configuration; `fill(name, tensor)` makes the weights."""
        _check_config(config, "random_offloaded: config")
        unloaded = cls(config, MadeWeights(fill), dtype or config.dtype or torch.get_default_dtype())
        if share_host_layers is not False:
            unloaded._share(share_host_layers)
        return unloaded

    def plan(
        self,
        budget: int | str | None,
        resident_layers: int | Sequence[int] | None,
        num_buffers: int,
        batch_size: int,
        max_cache_len: int | None,
        max_rows: int,
        on_cuda: bool,
    ) -> MemoryPlan:
        """Decide which layers stay on the device, and add everything up."""
        for name, value in (("batch_size", batch_size), ("max_cache_len", max_cache_len), ("max_rows", max_rows)):
            if value is not None and not is_count(value, 1):
                raise ValueError(f"load_offloaded: {name} must be a positive integer, got {value!r}")
        kv_bytes, workspace_bytes = reserved_bytes(
            self.model.config, self.layers, self.dtype, batch_size, max_cache_len, max_rows, on_cuda
        )
        tables = [buffer for _, buffer in self.model.named_non_persistent_buffers()]
        return plan_memory(
            [layer.num_bytes for layer in self.layers],
            sum(tensor.nbytes for tensor in (*(tensor for tensor, _, _ in self.fixed), *tables)),
            budget_bytes=None if budget is None else parse_bytes("device_memory_budget", budget),
            resident_layers=resident_layers,
            num_buffers=num_buffers,
            kv_bytes=kv_bytes,
            workspace_bytes=workspace_bytes,
            weights_of=self.weights_of,
        )

    def _share(self, share_host_layers: bool | Sequence[int]) -> None:
        """Give layers the weights of others."""
        count = len(self.layers)
        weights_of = [0] * count if isinstance(share_host_layers, bool) else list(share_host_layers)
        if len(weights_of) != count or not set(weights_of) <= set(range(count)):
            raise ValueError(
                f"random_offloaded: share_host_layers must be a layer index for each of {count} layers, "
                f"got {share_host_layers!r}"
            )
        for layer, index in zip(self.layers, weights_of):
            if weights_of[index] != index or self.layers[index].layout != layer.layout:
                rule = "has other shapes" if weights_of[index] == index else "has the weights of another itself"
                raise ValueError(
                    f"random_offloaded: share_host_layers must name layers with weights of their own and equal shapes, "
                    f"got {index} for layer {layer.layer_idx}, which {rule}"
                )
            for packed, source in zip(layer.tensors, self.layers[index].tensors):
                self.names[packed.name] = source.name
        self.weights_of = weights_of

    def _keep_float32(self) -> None:
        """Leave in float32 what the family wants there at a lower dtype, as transformers' own loading does."""
        plan = self.model._get_dtype_plan(self.dtype)
        if not plan:
            return
        patterns = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in plan))
        for name, parameter in self.model.named_parameters():
            if patterns.search(name) and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32)


def _check_config(config: PreTrainedConfig, where: str) -> None:
    family = str(config.model_type)
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"{where} must be a decoder-only language model, got family {family}")
    quantisation = getattr(config, "quantization_config", None)
    if quantisation:
        get = quantisation.get if isinstance(quantisation, dict) else partial(getattr, quantisation)
        raise UnsupportedModelError(
            f"load_offloaded: family {family} cannot be offloaded: its checkpoint is quantised with "
            f"{get('quant_method', 'an unnamed method')}, whose layers keep their weights in objects of another "
            "library and not in tensors that can be copied; load it with load_model, or offload the original"
        )


def _match_names(checkpoint: Checkpoint, unloaded: UnloadedModel) -> dict[str, str]:
    """Find every tensor of the model in the checkpoint."""
    wanted = [([packed.name], packed.shape, packed.dtype) for layer in unloaded.layers for packed in layer.tensors]
    wanted += [(names, tensor.shape, tensor.dtype) for tensor, names, _ in unloaded.fixed]
    family, prefix = str(unloaded.model.config.model_type), f"{unloaded.model.base_model_prefix}."
    transforms = get_model_conversion_mapping(unloaded.model)
    renamings = [transform for transform in transforms if type(transform) is WeightRenaming]
    merging = [transform for transform in transforms if type(transform) is not WeightRenaming]
    renamed = {_rename(name, renamings): name for name in checkpoint.tensors}
    renamed |= {name: name for name in checkpoint.tensors}
    found: dict[str, str] = {}
    missing = []
    for names, shape, dtype in wanted:
        # A tied tensor is stored under one of its names; a bare base model lacks the prefix.
        aliases = (alias for name in names for alias in (name, name.removeprefix(prefix)))
        alias = next((alias for alias in aliases if alias in renamed), None)
        if alias is None:
            missing.append(names[0])
            continue
        stored = renamed[alias]
        if any(transform.rename_source_key(name)[1] for transform in merging for name in (stored, alias)):
            raise _merges_weights(family, names[0])
        if checkpoint.tensors[stored].shape != tuple(shape):
            raise ValueError(
                f"load_offloaded: {stored} must have shape {list(shape)}, as the configuration says, "
                f"got {list(checkpoint.tensors[stored].shape)}"
            )
        _check_stored_dtype(stored, checkpoint.tensors[stored], dtype, family)
        found[names[0]] = stored
    if missing:
        unused = checkpoint.tensors.keys() - found.values()
        if any(transform.rename_source_key(name)[1] for transform in merging for name in unused):
            raise _merges_weights(family, missing[0])
        raise ValueError(
            f"load_offloaded: {checkpoint.folder} must hold all weights of a {family} model, "
            f"got none for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return found


def _check_stored_dtype(name: str, stored: StoredTensor, dtype: torch.dtype, family: str) -> None:
    """Refuse numbers that mean something else than they say: quantised ones whose configuration does not tell."""
    floating = stored.dtype.is_floating_point and stored.dtype.itemsize > 1
    if stored.dtype != dtype and dtype.is_floating_point and not floating:
        raise UnsupportedModelError(
            f"load_offloaded: family {family} cannot be offloaded: its checkpoint stores {name} as "
            f"{str(stored.dtype).removeprefix('torch.')}, which is quantised in a way that its configuration does not "
            "name; offload the original"
        )


def _rename(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _merges_weights(family: str, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"load_offloaded: family {family} cannot be offloaded: transformers merges or converts its stored weights "
        f"while loading, so {name} cannot be streamed from the file as it is"
    )
