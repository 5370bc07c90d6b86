"""The fused forward: a described model on one GPU, its products by torch and three kernels of our own between them.

Of a decoder layer these are launched: norm (with the residual sum), one product for queries, keys and values, rotation
and cache rows, attention along the tree, one product, norm, one product for gate and up, activation, one product.
Products read weights where the model has them; what is read together is laid together (`packing.py`), the parameters
being views of it, so nothing is held twice and the model's own forward goes on working. What must stay where it is, is
read by a product of its own.

Few rows through a small Llama, a level of a draft, can be one launch of all layers instead (`few_rows.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sequoia_kernels.models.attention_probe import LayerCall
from sequoia_kernels.models.cache import TreeCache
from sequoia_kernels.models.description import RMS_NORM, Description, Matrix, form_of
from sequoia_kernels.models.fused import few_rows
from sequoia_kernels.models.fused.packing import Group, movable, packed_rows
from sequoia_kernels.models.fused.steps import (
    MAX_WIDTH,
    Heads,
    Norm,
    RowPlaces,
    gated_activation,
    residual_norm_,
    rotate_and_store_,
)
from sequoia_kernels.models.quantised import ELEMENT_TYPES, NotNativeError
from sequoia_kernels.models.tree_step import ForwardInputs
from sequoia_kernels.ops import tree_attention, triton_device

__all__ = ["FusedForward"]

SILU = 0  # place in `description.ACTIVATIONS`

Linear = tuple[torch.Tensor, torch.Tensor | None]  # weight as `F.linear` takes it, bias


class _Together(NamedTuple):
    """Layers that read the same rows: one where their weights lie together, else each of them."""

    parts: tuple[Linear, ...]

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        products = [F.linear(rows, *part) for part in self.parts]
        return products[0] if len(products) == 1 else torch.cat(products, 1)


class _Layer(NamedTuple):
    """What a layer runs with: its weights as they lie now."""

    input_norm: Norm | None
    attended_norm: Norm | None
    mlp_norm: Norm | None
    mlp_output_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    norms_whole_rows: bool
    projections: _Together
    heads: Heads
    rotation: int  # of the description's, -1 for none
    scale: float
    softcap: float | None
    window: int | None
    output: Linear
    inner: _Together  # gate and up, or up
    gated: bool
    activation: int
    down: Linear
    parallel: bool
    shares_norm: bool  # MLP and attention read the same rows


class _Weights(NamedTuple):
    """A model's weights as they lie now."""

    few_rows: few_rows.FewRowsModel | None  # the same, where one launch computes all layers
    addresses: list[int]
    layers: list[_Layer]
    embedding: torch.Tensor
    positions: torch.Tensor | None
    final_norm: Norm | None
    head: Linear


class FusedForward:
    """Forwards of one model by fused kernels; holds the model's parameters, not the model.

    Attributes:
        name: "fused".
        takes_pages: whether a cache may be paged: it may not.
        weight_forms: of its linear layers, such as "bfloat16".

    Raises:
        NotNativeError: the model cannot be described, or no kernel can run on its device; the message says why.
    """

    name = "fused"
    takes_pages = False

    def __init__(
        self,
        model: PreTrainedModel,
        calls: Sequence[LayerCall],
        logits_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        reason = triton_device.unavailable_reason() or triton_device.device_reason(device)
        if reason is not None:
            raise NotNativeError(f"the kernels cannot run: {reason}")
        self._described = Description(model, calls, device)
        self._check()
        self._logits_dtype = logits_dtype
        self._weights: _Weights | None = None
        self._lock = threading.Lock()
        self._may_launch_once = few_rows.is_wanted()
        # Where the blocks of a launch for few rows count each other; a cache has one launch at a time.
        self._counters: WeakKeyDictionary[TreeCache, torch.Tensor] = WeakKeyDictionary()
        self._look_up()
        self.weight_forms = ", ".join(self._described.forms)

    def _check(self) -> None:
        """Refuse what the kernels do not compute."""
        fields = self._described.fields
        types = {form[1] for _, _, form in self._described.tensors}
        if len(types) != 1:
            raise NotNativeError(f"its weights are of several types, {', '.join(sorted(map(str, types)))}")
        if fields["width"] > MAX_WIDTH:
            raise NotNativeError(f"its rows are wider than {MAX_WIDTH}")
        for layer in fields["layers"]:
            if layer["experts"] is not None:
                raise NotNativeError("its layers have experts")
            linears = [*layer["projections"], layer["output"], layer["up"], layer["down"], layer["gate"]]
            if any(linear is not None and not isinstance(linear[0], Matrix) for linear in linears):
                raise NotNativeError("its weights have few bits")
            biases = {bias is None for _, bias in layer["projections"]}
            if len(biases) > 1 or (layer["gate"] and (layer["gate"][1] is None) != (layer["up"][1] is None)):
                raise NotNativeError("of layers that are read together some have biases")
            if len(layer["projections"]) > 1 and any(linear[0].transposed for linear in layer["projections"]):
                raise NotNativeError("weights that are read together lie by columns")
            if layer["cache_type"] != ELEMENT_TYPES[next(iter(types))]:
                raise NotNativeError("its caches are of another type than its weights")
            for name in ("query_norm", "key_norm"):
                norm = layer[name]
                if norm is None or layer["norms_whole_rows"]:
                    continue
                if norm[1] is None or norm[1].rows * norm[1].columns != layer["head_dim"]:
                    raise NotNativeError("its heads have norms of their own")

    # ---- weights ----

    def _look_up(self) -> _Weights:
        """Find where the weights lie now, and lay those together that are read together.

        Raises:
            ValueError: a weight has another form than when the model was described.
        """
        known = self._weights
        if known is not None and self._addresses() == known.addresses:
            return known
        with self._lock:  # threads may meet the same change
            for owner, name, described in self._described.tensors:
                weight = owner.get(name)
                form = None if weight is None else form_of(weight)
                if weight is None or form != described or (weight.data_ptr() == 0 and weight.numel() != 0):
                    raise ValueError(
                        f"forward: {name} must keep its shape, dtype, layout, device and memory, {described}, got "
                        f"{form}; where the model was changed, make a new cache"
                    )
            before = self._addresses()
            fields = self._described.fields
            whole = self._lay_together()
            layers = [self._layer(layer, whole) for layer in fields["layers"]]
            positions = None if fields["positions"] is None else self._matrix(fields["positions"])
            addresses = self._addresses()
            if addresses != before and self._described.device.type == "cuda":
                # Other streams may read the weights next; and what they had before is of sizes that nobody asks for.
                torch.cuda.synchronize(self._described.device)
                torch.cuda.empty_cache()
            found = _Weights(
                None, addresses, layers, self._matrix(fields["embedding"]), positions,
                self._norm(fields["final_norm"]), self._linear(fields["head"]),
            )  # fmt: skip
            found = self._weights = found._replace(few_rows=self._few_rows_model(found))
            return found

    def _addresses(self) -> list[int]:
        """Where the weights are; nothing where one is gone."""
        try:
            return [owner[name].data_ptr() for owner, name, _ in self._described.tensors]
        except (KeyError, AttributeError):
            return []

    @property
    def state(self) -> tuple[Any, ...]:
        """What captured forwards depend on besides the model's state: how often rotary frequencies were written."""
        return tuple(version for rotation in self._described.rotations for _, version in rotation.state)

    def settle(self) -> None:
        """Lay the weights as the next forward would."""
        self._look_up()

    def let_go(self) -> None:
        """Hold no weights until the next forward, which looks them up again: nobody else may want them any more."""
        self._weights = None

    def _lay_together(self) -> dict[tuple[int, ...], torch.Tensor]:
        """Lay together what may be; give what lies so, by the numbers of its parts."""
        numbers = {
            tuple(part.number for part in parts): None
            for layer in self._described.fields["layers"]
            for linears in (layer["projections"], [layer["gate"] or layer["up"], layer["up"]])
            for parts in zip(*linears)  # weights, then biases
            if parts[0] is not None and len({part.number for part in parts}) > 1
        }
        groups: list[Group] = [[self._parameter(number) for number in group] for group in numbers]
        whole = zip(numbers, map(packed_rows, groups, movable(groups)), strict=True)
        return {group: rows for group, rows in whole if rows is not None}

    def _parameter(self, number: int) -> torch.Tensor:
        owner, name, _ = self._described.tensors[number]
        parameter: torch.Tensor = owner[name]
        return parameter

    def _tensor(self, number: int) -> torch.Tensor:
        return self._parameter(number).detach()

    def _matrix(self, matrix: Matrix) -> torch.Tensor:
        weight = self._tensor(matrix.number)
        if matrix.transposed:
            weight = weight.t()
        return weight[matrix.first : matrix.first + matrix.rows]

    def _vector(self, matrix: Matrix | None) -> torch.Tensor | None:
        return None if matrix is None else self._tensor(matrix.number).reshape(-1)

    def _norm(self, norm: Any) -> Norm | None:
        if norm is None:
            return None
        kind, weight, bias, eps, offset = norm
        return Norm(kind, self._vector(weight), self._vector(bias), eps, offset)

    def _linear(self, linear: Any) -> Linear:
        matrix, bias = linear
        return self._matrix(matrix), self._vector(bias)

    def _together(self, linears: Sequence[Any], whole: dict[tuple[int, ...], torch.Tensor]) -> _Together:
        """Several layers that read the same rows, as one where they lie together."""
        if len(linears) == 1:
            return _Together((self._linear(linears[0]),))
        weights, biases = (tuple(part and part.number for part in parts) for parts in zip(*linears))
        if len(set(weights)) == 1:  # one weight that was described in parts
            return _Together(((self._tensor(weights[0]), self._vector(linears[0][1])),))
        weight, bias = whole.get(weights), whole.get(biases)
        if weight is None or (bias is None and biases[0] is not None):
            return _Together(tuple(map(self._linear, linears)))
        return _Together(((weight, bias),))

    def _layer(self, layer: dict[str, Any], whole: dict[tuple[int, ...], torch.Tensor]) -> _Layer:
        gate, up = layer["gate"], layer["up"]
        first_query, stride = layer["queries"]
        dims = self._described.rotations[layer["rotation"]].dims if layer["rotation"] >= 0 else 0
        heads = Heads(
            layer["num_heads"], layer["num_kv_heads"], layer["head_dim"],
            first_query, layer["keys"][0], layer["values"][0], stride, dims,
        )  # fmt: skip
        return _Layer(
            input_norm=self._norm(layer["input_norm"]),
            attended_norm=self._norm(layer["attended_norm"]),
            mlp_norm=self._norm(layer["mlp_norm"]),
            mlp_output_norm=self._norm(layer["mlp_output_norm"]),
            query_norm=self._norm(layer["query_norm"]),
            key_norm=self._norm(layer["key_norm"]),
            norms_whole_rows=layer["norms_whole_rows"],
            projections=self._together(layer["projections"], whole),
            heads=heads,
            rotation=layer["rotation"],
            scale=layer["scale"],
            softcap=layer["softcap"] or None,
            window=layer["window"] or None,
            output=self._linear(layer["output"]),
            inner=self._together((up,) if gate is None else (gate, up), whole),
            gated=gate is not None,
            activation=layer["activation"],
            down=self._linear(layer["down"]),
            parallel=layer["parallel"],
            shares_norm=layer["mlp_norm"] in (None, layer["input_norm"]),
        )

    # ---- few rows ----

    def _few_rows_model(self, weights: _Weights) -> few_rows.FewRowsModel | None:
        """The model as the launch for few rows takes it, or None where that is another computation."""
        if not self._may_launch_once:
            return None
        fields, layers = self._described.fields, weights.layers
        scales = [fields[name] for name in ("embedding_scale", "residual_scale", "logit_scale")]
        if weights.positions is not None or fields["logit_softcap"] or any(scale != 1.0 for scale in scales):
            return None
        first = layers[0]
        kinds = {
            (
                layer.heads, layer.scale, layer.rotation, layer.gated, layer.activation, layer.parallel,
                layer.softcap, layer.window, layer.norms_whole_rows,
            )
            for layer in layers
        }  # fmt: skip
        wanted = (first.heads, first.scale, first.rotation, True, SILU, False, None, None, False)
        others = {
            norm
            for layer in layers
            for norm in (layer.attended_norm, layer.mlp_output_norm, layer.query_norm, layer.key_norm)
        }
        if kinds != {wanted} or others != {None}:
            return None
        heads = first.heads
        keys = heads.num_heads * heads.head_dim
        plain = Heads(
            heads.num_heads, heads.num_kv_heads, heads.head_dim,
            0, keys, keys + heads.num_kv_heads * heads.head_dim, heads.head_dim, heads.head_dim,
        )  # fmt: skip
        norms = [weights.final_norm, *(norm for layer in layers for norm in (layer.input_norm, layer.mlp_norm))]
        known = [norm for norm in norms if norm is not None and (norm.kind, norm.offset) == (RMS_NORM, 0.0)]
        scaled = [norm.weight for norm in known if norm.weight is not None and norm.eps == known[0].eps]
        products = [
            (layer.projections.parts, (layer.output,), layer.inner.parts, (layer.down,)) for layer in layers
        ]  # fmt: skip
        linears = [weights.head, *(part for parts in products for together in parts for part in together)]
        if heads != plain or len(scaled) != len(norms) or len(linears) != 4 * len(layers) + 1:
            return None  # or read apart
        if any(bias is not None for _, bias in linears):
            return None
        found = few_rows.FewRowsModel(
            tuple(
                few_rows.FewRowsLayer(before[0], four[0][0], four[1][0], before[1], four[2][0], four[3][0])
                for before, four in zip(_by(scaled[1:], 2), _by(linears[1:], 4), strict=True)
            ),
            weights.embedding, scaled[0], weights.head[0],
            heads.num_heads, heads.num_kv_heads, heads.head_dim, known[0].eps, first.scale,
        )  # fmt: skip
        return found if found.reason_against(self._described.device) is None else None

    def _may_count(self, cache: TreeCache) -> bool:
        """Whether a cache's counters are there or can be made, which a capture would only note down."""
        is_cuda = self._described.device.type == "cuda"
        return cache in self._counters or not (is_cuda and torch.cuda.is_current_stream_capturing())

    def _pass_few_rows(
        self, model: few_rows.FewRowsModel, inputs: ForwardInputs, cache: TreeCache, places: RowPlaces,
        mask: torch.Tensor, table: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Run few rows through all layers in one launch. [B, N, vocab]"""
        device, tokens = self._described.device, inputs.input_ids
        counters = self._counters.get(cache)
        if counters is None:
            counters = self._counters[cache] = torch.zeros(2, dtype=torch.int32, device=device)
        caches = [(layer.keys, layer.values) for layer in cache.layers]
        num_tree_rows = inputs.step.num_tree_rows
        call = few_rows.FewRowsCall.of(model, tokens, caches, places, mask, num_tree_rows, table, counters)
        few_rows.launch(call)
        return call.logits.to(self._logits_dtype).view(*tokens.shape, -1)

    # ---- the forward ----

    @torch.no_grad()  # and not inference mode, whose tensors could be neither changed nor learned from by the caller
    def __call__(self, inputs: ForwardInputs, cache: TreeCache, max_positions: int | None) -> torch.Tensor:
        """Run one forward, whose shapes are checked; see `TreeModel.forward`."""
        weights = self._look_up()
        fields, num_layers = self._described.fields, len(weights.layers)
        inputs.check_for_kernels(num_layers)
        input_ids, cache_lens, step, last_row, hidden_states = inputs
        wanted = set(hidden_states or ())
        kept: dict[int, torch.Tensor] = {}
        batch_size, num_nodes = input_ids.shape
        # In the layout that kernels read.
        mask, node_ids, depths = (part.to(torch.int32).contiguous() for part in step[:3])
        cache_lens = cache_lens.to(torch.int32).contiguous()
        last_position = (cache.max_cache_len if max_positions is None else max_positions) - 1
        places = RowPlaces(cache_lens, depths, node_ids, last_position)
        tables = [rotation.reach(min(cache.max_cache_len, last_position + 1)) for rotation in self._described.rotations]

        model = weights.few_rows
        if model is not None and last_row is None and not wanted:
            sizes = batch_size * num_nodes, step.num_tree_rows, cache.max_cache_len
            takes = few_rows.is_worthwhile(model.width, sizes[0]) and model.takes(*sizes, self._described.device)
            if takes and self._may_count(cache):
                return self._pass_few_rows(model, inputs, cache, places, mask, tables[weights.layers[0].rotation])

        stream = F.embedding(input_ids.reshape(-1), weights.embedding)  # [B * N, width]
        if fields["embedding_scale"] != 1.0:
            stream *= fields["embedding_scale"]
        if weights.positions is not None:
            positions = (cache_lens[:, None] + depths).clamp_(max=last_position) + fields["position_offset"]
            stream += F.embedding(positions.reshape(-1), weights.positions)
        scale = fields["residual_scale"]
        update, update_norm = None, None
        for number, (layer, stored) in enumerate(zip(weights.layers, cache.layers, strict=True)):
            normed = residual_norm_(stream, update, layer.input_norm, update_norm=update_norm, update_scale=scale)
            if number in wanted:
                kept[number] = stream.clone()
            table = tables[layer.rotation] if layer.rotation >= 0 else None
            attended = self._attend(layer, normed, stored, places, mask, table)
            if layer.parallel:
                inner = normed if layer.shares_norm else residual_norm_(stream, None, layer.mlp_norm)
                update, update_norm = attended.add_(_mlp(layer, inner)), None
                continue
            normed = residual_norm_(
                stream, attended, layer.mlp_norm, update_norm=layer.attended_norm, update_scale=scale
            )
            update, update_norm = _mlp(layer, normed), layer.mlp_output_norm
        if last_row is not None and num_layers not in wanted:
            stream, update = (_row_of_each(rows, last_row, num_nodes) for rows in (stream, update))
        normed = residual_norm_(stream, update, weights.final_norm, update_norm=update_norm, update_scale=scale)
        if num_layers in wanted:
            kept[num_layers] = normed
            if last_row is not None:
                normed = _row_of_each(normed, last_row, num_nodes)
        if hidden_states:
            hidden_states.update({number: rows.view(batch_size, num_nodes, -1) for number, rows in kept.items()})
        logits = F.linear(normed, *weights.head)
        if fields["logit_scale"] != 1.0:
            logits *= fields["logit_scale"]
        if fields["logit_softcap"]:
            logits = torch.tanh(logits / fields["logit_softcap"]) * fields["logit_softcap"]
        return logits.to(self._logits_dtype).view(batch_size, -1, logits.shape[-1])

    def _attend(
        self,
        layer: _Layer,
        rows: torch.Tensor,
        stored: Any,
        places: RowPlaces,
        mask: torch.Tensor,
        table: torch.Tensor | None,
    ) -> torch.Tensor:
        """The attention's branch. [B * N, width] -> [B * N, width]."""
        projected = layer.projections.product(rows)
        heads, norms = layer.heads, {"query_norm": layer.query_norm, "key_norm": layer.key_norm}
        if layer.norms_whole_rows:
            for norm, first, count in (
                (layer.query_norm, heads.first_query, heads.num_heads),
                (layer.key_norm, heads.first_key, heads.num_kv_heads),
            ):
                part = projected[:, first : first + count * heads.head_dim]
                part.copy_(residual_norm_(part, None, norm))
            norms = {}
        queries = rotate_and_store_(projected, stored.keys, stored.values, places, heads, table, **norms)
        attended = tree_attention(
            queries, stored.keys, stored.values, mask, places.cache_lens,
            scale=layer.scale, softcap=layer.softcap, sliding_window=layer.window,
        ).out  # fmt: skip
        return F.linear(attended.reshape(rows.shape[0], -1), *layer.output)


def _by(entries: list[Any], count: int) -> list[list[Any]]:
    return [entries[first : first + count] for first in range(0, len(entries), count)]


def _mlp(layer: _Layer, rows: torch.Tensor) -> torch.Tensor:
    inner = gated_activation(layer.inner.product(rows), layer.gated, layer.activation)
    return F.linear(inner, *layer.down)


def _row_of_each(rows: torch.Tensor | None, last_row: torch.Tensor, num_nodes: int) -> Any:
    """One row of each request. [B * N, width] -> [B, width]."""
    if rows is None:
        return None
    by_request = rows.view(len(last_row), num_nodes, -1)
    return by_request.take_along_dim(last_row[:, None, None], dim=1)[:, 0]
