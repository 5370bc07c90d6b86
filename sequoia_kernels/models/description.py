"""What a model computes, as data, for forwards of our own: on a CPU (`native.py`) and on a GPU (`fused/`).

A family is a `Family`: where its layers, norms and projections are. What a layer computes beyond that is read from the
modules and from the layer's probed attention call, never from a configuration's names alone. A description that leaves
a parameter of the model out is refused, and `adapt` compares the logits with the modules' own before it is used.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sequoia_kernels.models.attention_probe import LayerCall
from sequoia_kernels.models.families import family_name, foreign_code
from sequoia_kernels.models.quantised import ELEMENT_TYPES as _ELEMENT_TYPES
from sequoia_kernels.models.quantised import NotNativeError, QuantisedWeight, TensorPlace, quantised_weight
from sequoia_kernels.models.switch import each_module

__all__ = [
    "ACTIVATIONS", "LAYER_NORM", "NATIVE_FAMILIES", "RMS_NORM", "Description", "Family", "Matrix", "Rotation",
    "form_of",
]  # fmt: skip

# Codes shared with csrc/host/forward/model.h.
RMS_NORM, LAYER_NORM = 1, 2
# Where transformers' hooks are made that take down hidden states and change none: once asked for, they stay.
_RECORDERS = "transformers.utils.output_capturing"
ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.silu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.gelu,
    F.relu,
    lambda x: F.relu(x).square(),
)


@dataclass(frozen=True)
class Family:
    """Where a family keeps what a forward is made of: dotted names of modules, "" for what it does not have.

    Names from `input_norm` on are those in a layer; so is `attention`.
    """

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str = ""  # table of learned positions
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    query_scale: str = ""  # the attention's attribute by which it multiplies queries itself
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False  # one projection, each head's query, key and value side by side
    query_norm: str = ""
    key_norm: str = ""
    norms_whole_rows: bool = False  # over all heads at once
    output: str = "self_attn.o_proj"
    attended_norm: str = ""  # of what the attention adds to the residual stream
    mlp_norm: str = "post_attention_layernorm"
    mlp_output_norm: str = ""
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"  # where it is the gate's name, one projection of both, the gate in front
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    router: str = ""  # of experts; a layer without one has the MLP above
    experts: str = ""  # their weights in stacks, `gate_up_proj` and `down_proj`, and their `act_fn`
    norm_offset: float = 0.0  # added to the weights of RMS norms
    parallel: bool | str = False  # MLP and attention read the same; or the layer's attribute that says so
    multipliers: bool = False  # Granite's, of embeddings, residuals and logits
    needs: tuple[tuple[str, Any], ...] = ()  # attributes of the model that the description holds for, and their values


_LLAMA = Family()
_GEMMA = Family(norm_offset=1.0)
_GEMMA2 = replace(
    _GEMMA, attended_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)  # fmt: skip
_QWEN3 = replace(_LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")

# By `config.model_type`.
NATIVE_FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": _LLAMA,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, router="mlp.gate", experts="mlp.experts"),
    "mixtral": replace(_LLAMA, router="mlp.gate", experts="mlp.experts"),
    "granite": replace(_LLAMA, multipliers=True),
    "phi3": replace(_LLAMA, projections=("self_attn.qkv_proj",), gate="mlp.gate_up_proj", up="mlp.gate_up_proj",
                    activation="mlp.activation_fn"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, query_norm=_QWEN3.query_norm, key_norm=_QWEN3.key_norm),
    "olmo2": replace(_QWEN3, input_norm="", attended_norm="post_attention_layernorm", mlp_norm="",
                     mlp_output_norm="post_feedforward_layernorm", norms_whole_rows=True),
    "starcoder2": replace(_LLAMA, gate="", up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
    "stablelm": replace(_LLAMA, parallel="use_parallel_residual"),
    "phi": replace(_LLAMA, final_norm="model.final_layernorm", output="self_attn.dense", mlp_norm="input_layernorm",
                   gate="", up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn", parallel=True),
    "gpt_neox": Family(
        layers="gpt_neox.layers", embedding="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb", attention="attention", projections=("attention.query_key_value",),
        interleaved=True, output="attention.dense", gate="", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        activation="mlp.act", parallel="use_parallel_residual",
    ),
    "gpt2": Family(
        layers="transformer.h", embedding="transformer.wte", positions="transformer.wpe", final_norm="transformer.ln_f",
        rotary="", attention="attn", input_norm="ln_1", projections=("attn.c_attn",), output="attn.c_proj",
        mlp_norm="ln_2", gate="", up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act",
    ),
    "opt": Family(
        layers="model.decoder.layers", embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions", final_norm="model.decoder.final_layer_norm", rotary="",
        query_scale="scaling", input_norm="self_attn_layer_norm", output="self_attn.out_proj",
        mlp_norm="final_layer_norm", gate="", up="fc1", down="fc2", activation="activation_fn",
        needs=(("config.do_layer_norm_before", True), ("model.decoder.project_in", None)),
    ),
}  # fmt: skip


class Matrix(NamedTuple):
    """Rows of a weight, or a vector as a matrix of one row."""

    number: int  # of the tensor among the description's
    first: int  # row
    rows: int
    columns: int
    element_type: int  # as `ELEMENT_TYPES` has it
    transposed: bool  # lies by columns


def form_of(weight: torch.Tensor) -> tuple[Any, ...]:
    """Shape, dtype, device, and whether it lies row by row."""
    return tuple(weight.shape), weight.dtype, str(weight.device), weight.is_contiguous()


class Rotation:
    """Cosines and sines of one rotary embedding, [positions, dims]: first the cosines of dims / 2 frequencies."""

    def __init__(self, module: nn.Module, layer_type: str | None, device: torch.device) -> None:
        self.module, self.layer_type, self.device = module, layer_type, device
        self.table = torch.empty(0)
        self._outgrown: list[torch.Tensor] = []  # captured graphs read them
        self._made_of: list[tuple[torch.Tensor, int]] = []  # the module's buffers, and how often each was written
        self._lock = threading.Lock()  # a table that another thread's forward took must be among the outgrown ones
        self.reach(1)
        self.dims = self.table.shape[1]

    @property
    def state(self) -> list[tuple[torch.Tensor, int]]:
        """Buffers that the table is made of, frequencies say, and how often each was written."""
        buffers = self.module._buffers.values()
        return [(buffer, 0 if buffer.is_inference() else buffer._version) for buffer in buffers if buffer is not None]

    def reach(self, num_positions: int) -> torch.Tensor:
        """Return a table of at least so many positions, by the frequencies that the module has now."""
        if self._reaches(num_positions):
            return self.table
        with self._lock:
            if self._reaches(num_positions):
                return self.table
            return self._made(max(num_positions, self.table.shape[0]))

    def _reaches(self, num_positions: int) -> bool:
        state = self.state
        return (
            num_positions <= self.table.shape[0]
            and len(state) == len(self._made_of)
            and all(
                buffer is before and version == count
                for (buffer, version), (before, count) in zip(state, self._made_of, strict=True)
            )
        )

    def _made(self, num_positions: int) -> torch.Tensor:
        positions = torch.arange(num_positions, device=self.device)[None]
        arguments = (positions,) if self.layer_type is None else (positions, self.layer_type)
        with torch.inference_mode(False), torch.no_grad():
            cosines, sines = self.module(torch.zeros(1, 1, 1, dtype=torch.float32, device=self.device), *arguments)
            half = cosines.shape[-1] // 2
            if not (torch.equal(cosines[..., :half], cosines[..., half:]) and cosines.dtype == torch.float32):
                raise NotNativeError("its rotary embedding does not rotate the two halves of a head")
            if self.device.type != "cpu":
                self._outgrown.append(self.table)
            self.table = table = torch.cat((cosines[0, :, :half], sines[0, :, :half]), 1).contiguous()
        self._made_of = self.state
        return table


class Description:
    """What a model on one device computes; holds its parameters, not the model.

    Attributes:
        fields: the model, its layers in a list; what `_host.Forward` takes. Weights are `Matrix`es.
        tensors: (owner, name, form) of every weight, by its number: where it is looked up before a forward.
        rotations: rotary tables, by their numbers.
        forms: of the weights of linear layers, such as "bfloat16", in the order in which they were met.

    Raises:
        NotNativeError: there is something that cannot be described; the message says what.
    """

    def __init__(self, model: PreTrainedModel, calls: Sequence[LayerCall], device: torch.device) -> None:
        family = NATIVE_FAMILIES.get(family_name(model))
        if family is None:
            raise NotNativeError(f"family {family_name(model)} has no description")
        _check_code(model, device)
        for name, value in family.needs:
            if _part(model, name) != value:
                raise NotNativeError(f"{name} must be {value} in the family's description")
        self.family, self.device = family, device
        self.tensors: list[tuple[dict[str, Any], str, Any]] = []
        self._numbers: dict[tuple[int, str], int] = {}  # by place: what shares a tensor now may be untied later
        self._described: set[int] = set()  # ids of tensors
        self.rotations: list[Rotation] = []
        self._rotation_numbers: dict[str | None, int] = {}
        self.forms: dict[str, None] = {}
        self.fields = self._model_fields(model, calls)
        left = sum(id(weight) not in self._described for weight in model.parameters())
        if left:
            raise NotNativeError(f"{left} of its parameters have no place in the family's description")

    @property
    def vocab_size(self) -> int:
        return int(self.fields["head"][0][2])

    # ---- parts ----

    def _matrix(
        self, module: nn.Module, name: str, first: int = 0, rows: int | None = None, transposed: bool = False
    ) -> Any:
        """Describe rows of a weight, or a vector as a matrix of one row."""
        owner = module._buffers if name in module._buffers else module._parameters
        weight = owner.get(name)
        if weight is None:
            return None
        if (
            type(weight) not in (nn.Parameter, torch.Tensor)
            or weight.device != self.device
            or weight.dtype not in _ELEMENT_TYPES
        ):
            raise NotNativeError(f"a weight is a {type(weight).__name__} of {weight.dtype} on {weight.device}")
        if not weight.is_contiguous():
            raise NotNativeError("a weight is not laid out row by row")
        number = self._number(TensorPlace(owner, name))
        width = weight.shape[-1]
        height = weight.numel() // width
        if transposed:
            height, width = width, height
        return Matrix(number, first, height if rows is None else rows, width, _ELEMENT_TYPES[weight.dtype], transposed)

    def _number(self, place: TensorPlace | None) -> int:
        if place is None:
            return -1
        number = self._numbers.get((id(place.owner), place.name))
        if number is None:
            number = self._numbers[id(place.owner), place.name] = len(self.tensors)
            self.tensors.append((place.owner, place.name, form_of(place.tensor)))
            self._described.add(id(place.tensor))
        return number

    def _quantised(self, weight: QuantisedWeight, first: int, rows: int | None) -> Any:
        """Rows of a weight of few bits, as which its parts are numbered."""
        if weight.bits == 4 and first % 64:
            raise NotNativeError(f"projections of int4 are split behind {first} rows, not a multiple of 64")
        self.forms[f"int{weight.bits}"] = None
        return (
            self._number(weight.data), first, weight.rows if rows is None else rows, weight.columns, 0, False,
            weight.packing, self._number(weight.scales), _ELEMENT_TYPES[weight.scales.tensor.dtype],
            self._number(weight.zeros), self._number(weight.order), weight.group, weight.rows, weight.block,
            weight.zero_shift,
        )  # fmt: skip

    def _linear(self, module: nn.Module, first: int = 0, rows: int | None = None) -> Any:
        module = self._without_adapters(module)
        quantised = quantised_weight(module)
        if quantised is not None:
            weight = module._parameters.get("weight")
            if weight is not None:
                self._described.add(id(weight))  # by its parts
            bias = self._matrix(module, "bias")
            if bias is not None and rows is not None:
                raise NotNativeError("projections that are split have biases")
            return self._quantised(quantised, first, rows), bias
        if type(module) is Conv1D and rows is None:
            return self._matrix(module, "weight", transposed=True), self._matrix(module, "bias")
        if type(module) is not nn.Linear:
            kind = type(module)
            raise NotNativeError(f"a layer is {kind.__module__}.{kind.__qualname__}, not torch's Linear")
        bias = self._matrix(module, "bias")
        if bias is not None and rows is not None:
            raise NotNativeError("projections that are split have biases")
        self.forms[str(module.weight.dtype).removeprefix("torch.")] = None
        return self._matrix(module, "weight", first, rows), bias

    def _without_adapters(self, module: nn.Module) -> nn.Module:
        """Return the layer that an adapter library's stands for as long as all it holds is merged or disabled.

        Both are attributes of the module and so part of the model's state: when they change, so does the description.
        """
        base = getattr(module, "base_layer", None)
        at_rest = bool(getattr(module, "merged", False)) != bool(getattr(module, "disable_adapters", False))
        if not at_rest or not isinstance(base, nn.Module):  # merged and disabled: the next forward takes it out again
            return module
        own = {id(weight) for weight in base.parameters()}
        self._described.update(id(weight) for weight in module.parameters() if id(weight) not in own)  # adds nothing
        return self._without_adapters(base)

    def _norm(self, owner: nn.Module, name: str) -> Any:
        module = _part(owner, name)
        if module is None:
            return None
        if type(module) is nn.LayerNorm:
            if len(module.normalized_shape) != 1:
                raise NotNativeError("a norm is not over one dimension")
            return LAYER_NORM, self._matrix(module, "weight"), self._matrix(module, "bias"), module.eps, 0.0
        if not type(module).__name__.endswith("RMSNorm"):
            raise NotNativeError(f"a norm is a {type(module).__name__}")
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if eps is None:
            raise NotNativeError(f"{type(module).__name__} names no epsilon")
        return RMS_NORM, self._matrix(module, "weight"), None, float(eps), self.family.norm_offset

    def _embedding(self, module: nn.Module) -> Any:
        module = self._without_adapters(module)
        if not isinstance(module, nn.Embedding):
            kind = type(module)
            raise NotNativeError(f"an embedding is {kind.__module__}.{kind.__qualname__}, not torch's Embedding")
        return module

    # ---- the model and its layers ----

    def _model_fields(self, model: PreTrainedModel, calls: Sequence[LayerCall]) -> dict[str, Any]:
        family, config = self.family, model.config
        embedding = self._embedding(_part(model, family.embedding))
        layers = _part(model, family.layers)
        if layers is None or len(layers) != len(calls):
            raise NotNativeError("its layers are not where the family's are")
        positions = _part(model, family.positions)
        if positions is not None:
            positions = self._embedding(positions)
        scale = getattr(embedding, "embed_scale", None)
        cap = getattr(config, "final_logit_softcapping", None)
        fields: dict[str, Any] = {
            "width": embedding.embedding_dim,
            "embedding": self._matrix(embedding, "weight"),
            "positions": None if positions is None else self._matrix(positions, "weight"),
            "position_offset": getattr(positions, "offset", 0),
            # In the embedding's dtype, as the module multiplies.
            "embedding_scale": 1.0 if scale is None else float(torch.as_tensor(scale).to(embedding.weight.dtype)),
            "residual_scale": 1.0,
            "final_norm": self._norm(model, family.final_norm),
            "head": self._linear(model.get_output_embeddings()),
            "logit_scale": 1.0,
            "logit_softcap": float(cap or 0.0),
        }
        if family.multipliers:
            fields["embedding_scale"] = float(config.embedding_multiplier)
            fields["residual_scale"] = float(config.residual_multiplier)
            fields["logit_scale"] = 1.0 / float(config.logits_scaling)
        fields["layers"] = [self._layer(model, layer, call) for layer, call in zip(layers, calls, strict=True)]
        fields["rotation_dims"] = [rotation.dims for rotation in self.rotations]
        return fields

    def _layer(self, model: PreTrainedModel, layer: nn.Module, call: LayerCall) -> dict[str, Any]:
        family, spec = self.family, call.spec
        attention = _part(layer, family.attention)
        if call.has_sinks:
            raise NotNativeError("its attention has sinks")
        if spec.key_dim != spec.value_dim or spec.dtype not in _ELEMENT_TYPES:
            raise NotNativeError("its keys and values differ in width, or are of another dtype than weights")
        d, num_heads, num_kv_heads = spec.key_dim, call.num_heads, spec.num_kv_heads
        query_width, kv_width = num_heads * d, num_kv_heads * d
        if family.interleaved:
            if num_heads != num_kv_heads:
                raise NotNativeError("its heads share keys")
            heads = {"queries": (0, 3 * d), "keys": (d, 3 * d), "values": (2 * d, 3 * d)}
        else:
            heads = {"queries": (0, d), "keys": (query_width, d), "values": (query_width + kv_width, d)}
        scale = d**-0.5 if call.scale is None else call.scale
        if family.query_scale:
            scale *= getattr(attention, family.query_scale)
        rotation = self._rotation(model, attention, call.layer_idx or 0)
        parallel = getattr(layer, family.parallel) if isinstance(family.parallel, str) else family.parallel
        mlp_norm = family.mlp_norm
        if mlp_norm and parallel and _part(layer, mlp_norm) is None:  # StableLM: one norm for both
            mlp_norm = family.input_norm
        return {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": d,
            "scale": scale,
            "softcap": call.softcap or 0.0,
            "window": spec.window or 0,
            "rotation": rotation,
            "rotated_dims": self.rotations[rotation].dims if rotation >= 0 else 0,
            "parallel": bool(parallel),
            "norms_whole_rows": family.norms_whole_rows,
            "input_norm": self._norm(layer, family.input_norm),
            "query_norm": self._norm(layer, family.query_norm),
            "key_norm": self._norm(layer, family.key_norm),
            "attended_norm": self._norm(layer, family.attended_norm),
            "mlp_norm": self._norm(layer, mlp_norm),
            "mlp_output_norm": self._norm(layer, family.mlp_output_norm),
            "projections": [self._linear(_part(layer, name)) for name in family.projections],
            **heads,
            "output": self._linear(_part(layer, family.output)),
            **self._mlp(layer),
            "cache_type": _ELEMENT_TYPES[spec.dtype],
        }

    def _mlp(self, layer: nn.Module) -> dict[str, Any]:
        family = self.family
        experts = _part(layer, family.experts)
        if experts is not None:
            return self._experts(_part(layer, family.router), experts)
        up, gate = _part(layer, family.up), _part(layer, family.gate)
        if gate is not None and gate is up:
            inner = gate.out_features // 2
            linears = self._linear(gate, 0, inner), self._linear(up, inner, inner)
        else:
            linears = None if gate is None else self._linear(gate), self._linear(up)
        return {
            "gate": linears[0],
            "up": linears[1],
            "down": self._linear(_part(layer, family.down)),
            "activation": _activation(_part(layer, family.activation)),
            "experts": None,
        }

    def _experts(self, router: Any, experts: nn.Module) -> dict[str, Any]:
        """Describe an MLP of experts, whose first one stands for its shapes."""
        gate_ups, downs = (experts._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
        routes = self._matrix(router, "weight")
        if routes is None or gate_ups is None or downs is None or not gate_ups.dim() == downs.dim() == 3:
            raise NotNativeError("its experts are not stacks of weights behind a router")
        count, inner, width = gate_ups.shape[0], gate_ups.shape[1] // 2, downs.shape[1]
        if gate_ups.shape != (count, 2 * inner, width) or downs.shape != (count, width, inner):
            raise NotNativeError("its experts' weights do not lie by outputs")
        if gate_ups.dtype != torch.float32:
            raise NotNativeError("its experts are chosen by rounded numbers, which another rounding tips")
        normalised = bool(getattr(router, "norm_topk_prob", True))
        return {
            "gate": (self._matrix(experts, "gate_up_proj", 0, inner), None),
            "up": (self._matrix(experts, "gate_up_proj", inner, inner), None),
            "down": (self._matrix(experts, "down_proj", 0, width), None),
            "activation": _activation(_part(experts, "act_fn")),
            "experts": ((routes, None), count, int(router.top_k), normalised, 2 * inner, 2 * inner, width),
        }

    def _rotation(self, model: PreTrainedModel, attention: nn.Module, index: int) -> int:
        """Number of a layer's rotary table, -1 where the layer does not rotate."""
        if not (self.family.rotary and getattr(attention, "use_rope", True)):
            return -1
        module = _part(model, self.family.rotary)
        layer_type = None
        if "layer_type" in inspect.signature(module.forward).parameters:
            layer_type = model.config.layer_types[index]
        if layer_type not in self._rotation_numbers:
            self._rotation_numbers[layer_type] = len(self.rotations)
            self.rotations.append(Rotation(module, layer_type, self.device))
        return self._rotation_numbers[layer_type]


def _part(owner: nn.Module, name: str) -> Any:
    """Return a module, or what stands in a module's place, by its dotted name; None where there is none."""
    part: Any = owner
    for word in name.split(".") if name else ("",):
        part = getattr(part, word, None) if word else None
    return part


def _activation(function: Any) -> int:
    """Tell an activation by what it computes."""
    points = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64)
    with torch.no_grad():
        values = function(points)
        for code, known in enumerate(ACTIVATIONS):
            if torch.allclose(values, known(points), rtol=0.0, atol=1e-6):
                return code
    raise NotNativeError(f"its activation is {function!r}")


def _check_code(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse a model in which something else than its family's own code would run."""
    if torch.is_autocast_enabled(device.type):
        raise NotNativeError("autocast is on")
    foreign = foreign_code(model)
    if foreign is not None:
        raise NotNativeError(f"{foreign} is not transformers' own")
    for module in each_module(model):
        kind = type(module).__name__
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if any(getattr(hook, "__module__", None) != _RECORDERS for hook in hooks):
            raise NotNativeError(f"a {kind} has a forward hook")
        if "forward" in module.__dict__:
            raise NotNativeError(f"a {kind} has a forward of its own")
