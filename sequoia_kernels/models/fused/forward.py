"""The fused forward: a described model on one GPU, its products by torch and three kernels of our own between them.

Of a decoder layer these are launched: norm (with the residual sum), one product for queries, keys and values, rotation
and cache rows, attention along the tree, one product, norm, one product for gate and up, activation, one product.
Products read weights where the model has them; what is read together is laid together (`packing.py`), the parameters
being views of it, so nothing is held twice and the model's own forward goes on working. What must stay where it is, is
read by a product of its own.

Few rows that pass through small layers, a draft's level, take five launches a layer instead (`few_rows.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sequoia_kernels.models.attention_probe import LayerCall
from sequoia_kernels.models.cache import TreeCache
from sequoia_kernels.models.description import Description, Matrix, form_of
from sequoia_kernels.models.fused import few_rows
from sequoia_kernels.models.fused.packing import Group, movable, packed_rows
from sequoia_kernels.models.fused.steps import (
    MAX_WIDTH,
    Ahead,
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

# Of a weight, asked for while a step in front of its product runs: what the memory brings in that time.
BYTES_AHEAD = 10 << 20
BYTES_AHEAD_OF_ATTENTION = 32 << 20

Linear = tuple[torch.Tensor, torch.Tensor | None]  # weight as `F.linear` takes it, bias


class _Together(NamedTuple):
    """Layers that read the same rows: one where their weights lie together, else each of them."""

    parts: tuple[Linear, ...]

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        products = [F.linear(rows, *part) for part in self.parts]
        return products[0] if len(products) == 1 else torch.cat(products, 1)

    def ahead(self, most_bytes: int, rows: int) -> Ahead | None:
        """What a step in front of the product asks for."""
        return Ahead.of(self.parts[0][0], most_bytes, rows)


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
    suits_few_rows: bool  # five launches do


class _Weights(NamedTuple):
    """A model's weights as they lie now."""

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
        weight_forms: of its linear layers, such as "bfloat16".

    Raises:
        NotNativeError: the model cannot be described, or no kernel can run on its device; the message says why.
    """

    name = "fused"

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
            found = self._weights = _Weights(
                addresses, layers, self._matrix(fields["embedding"]), positions,
                self._norm(fields["final_norm"]), self._linear(fields["head"]),
            )  # fmt: skip
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
        found = _Layer(
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
            suits_few_rows=False,
        )
        return found._replace(suits_few_rows=self._suits_few_rows(found))

    def _suits_few_rows(self, layer: _Layer) -> bool:
        """Whether the products for few rows compute a layer, and its weights are small."""
        products = layer.projections.parts + layer.inner.parts + (layer.output, layer.down)
        if layer.parallel or layer.norms_whole_rows or layer.attended_norm or layer.mlp_output_norm:
            return False
        if self._described.fields["residual_scale"] != 1.0 or len(products) != 4:
            return False
        is_small = sum(weight.numel() for weight, _ in products) <= few_rows.MAX_WEIGHTS
        is_half = layer.output[0].dtype.itemsize == 2 or triton_device.INTERPRETED
        return is_small and is_half and all(weight.stride(1) == 1 for weight, _ in products)

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

        stream = F.embedding(input_ids.reshape(-1), weights.embedding)  # [B * N, width]
        if fields["embedding_scale"] != 1.0:
            stream *= fields["embedding_scale"]
        if weights.positions is not None:
            positions = (cache_lens[:, None] + depths).clamp_(max=last_position) + fields["position_offset"]
            stream += F.embedding(positions.reshape(-1), weights.positions)
        scale = fields["residual_scale"]
        update, update_norm = None, None
        are_few = stream.shape[0] <= few_rows.MAX_ROWS
        for number, (layer, stored) in enumerate(zip(weights.layers, cache.layers, strict=True)):
            table = tables[layer.rotation] if layer.rotation >= 0 else None
            if are_few and layer.suits_few_rows:
                if update is not None:  # of a layer of the other kind
                    residual_norm_(stream, update, None, update_norm=update_norm, update_scale=scale)
                    update, update_norm = None, None
                if number in wanted:
                    kept[number] = stream.clone()
                self._pass_few_rows(layer, stream, stored, places, mask, table, step.num_tree_rows)
                continue
            ahead = layer.projections.ahead(BYTES_AHEAD, stream.shape[0])
            normed = residual_norm_(
                stream, update, layer.input_norm, update_norm=update_norm, update_scale=scale, ahead=ahead
            )
            if number in wanted:
                kept[number] = stream.clone()
            projected = layer.projections.product(normed)
            attended = F.linear(self._attend(layer, projected, stored, places, mask, table), *layer.output)
            if layer.parallel:
                inner = normed if layer.shares_norm else residual_norm_(stream, None, layer.mlp_norm)
                update, update_norm = attended.add_(_mlp(layer, inner)), None
                continue
            ahead = layer.inner.ahead(BYTES_AHEAD, stream.shape[0])
            normed = residual_norm_(
                stream, attended, layer.mlp_norm, update_norm=layer.attended_norm, update_scale=scale, ahead=ahead
            )
            update, update_norm = _mlp(layer, normed), layer.mlp_output_norm
        if last_row is not None and num_layers not in wanted:
            stream, update = (_row_of_each(rows, last_row, num_nodes) for rows in (stream, update))
        head, head_bias = weights.head
        if are_few and update is None and not wanted and head.stride(1) == 1 and weights.layers[-1].suits_few_rows:
            return self._finished(few_rows.normed_product(stream, weights.final_norm, head, head_bias), batch_size)
        ahead = Ahead.of(head, BYTES_AHEAD, stream.shape[0])
        normed = residual_norm_(
            stream, update, weights.final_norm, update_norm=update_norm, update_scale=scale, ahead=ahead
        )
        if num_layers in wanted:
            kept[num_layers] = normed
            if last_row is not None:
                normed = _row_of_each(normed, last_row, num_nodes)
        if hidden_states:
            hidden_states.update({number: rows.view(batch_size, num_nodes, -1) for number, rows in kept.items()})
        return self._finished(F.linear(normed, head, head_bias), batch_size)

    def _finished(self, logits: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Scale and cap logits. [rows, vocab] -> [B, rows / B, vocab]."""
        fields = self._described.fields
        if fields["logit_scale"] != 1.0:
            logits *= fields["logit_scale"]
        if fields["logit_softcap"]:
            logits = torch.tanh(logits / fields["logit_softcap"]) * fields["logit_softcap"]
        return logits.to(self._logits_dtype).view(batch_size, -1, logits.shape[-1])

    def _attend(
        self,
        layer: _Layer,
        projected: torch.Tensor,
        stored: Any,
        places: RowPlaces,
        mask: torch.Tensor,
        table: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention along the tree. [B * N, queries, keys and values] -> [B * N, Hq * D]."""
        heads, norms = layer.heads, {"query_norm": layer.query_norm, "key_norm": layer.key_norm}
        if layer.norms_whole_rows:
            for norm, first, count in (
                (layer.query_norm, heads.first_query, heads.num_heads),
                (layer.key_norm, heads.first_key, heads.num_kv_heads),
            ):
                part = projected[:, first : first + count * heads.head_dim]
                part.copy_(residual_norm_(part, None, norm))
            norms = {}
        ahead = Ahead.of(layer.output[0], BYTES_AHEAD_OF_ATTENTION, projected.shape[0])
        queries = rotate_and_store_(projected, stored.keys, stored.values, places, heads, table, ahead=ahead, **norms)
        attended = tree_attention(
            queries, stored.keys, stored.values, mask, places.cache_lens,
            scale=layer.scale, softcap=layer.softcap, sliding_window=layer.window,
        ).out  # fmt: skip
        return attended.reshape(projected.shape[0], -1)

    def _pass_few_rows(
        self,
        layer: _Layer,
        stream: torch.Tensor,
        stored: Any,
        places: RowPlaces,
        mask: torch.Tensor,
        table: torch.Tensor | None,
        num_tree_rows: int,
    ) -> None:
        """Run few rows through a layer that suits them, in place."""
        heads = layer.heads
        projected = few_rows.normed_product(stream, layer.input_norm, *layer.projections.parts[0])
        is_plain = layer.softcap is None and layer.window is None and layer.scale > 0
        has_norms = layer.query_norm is not None or layer.key_norm is not None
        is_one = is_plain and not has_norms and few_rows.attends(heads, len(places.depths), stored.keys)
        if is_one and table is not None:
            attended = few_rows.attend(
                projected, stored.keys, stored.values, places, heads, table, mask, num_tree_rows, layer.scale
            )
        else:
            attended = self._attend(layer, projected, stored, places, mask, table)
        few_rows.add_product_(stream, attended, *layer.output)
        inner = few_rows.normed_product(
            stream, layer.mlp_norm, *layer.inner.parts[0], gated=layer.gated, activation=layer.activation
        )
        few_rows.add_product_(stream, inner, *layer.down)


def _mlp(layer: _Layer, rows: torch.Tensor) -> torch.Tensor:
    ahead = Ahead.of(layer.down[0], BYTES_AHEAD, rows.shape[0])
    inner = gated_activation(layer.inner.product(rows), layer.gated, layer.activation, ahead=ahead)
    return F.linear(inner, *layer.down)


def _row_of_each(rows: torch.Tensor | None, last_row: torch.Tensor, num_nodes: int) -> Any:
    """One row of each request. [B * N, width] -> [B, width]."""
    if rows is None:
        return None
    by_request = rows.view(len(last_row), num_nodes, -1)
    return by_request.take_along_dim(last_row[:, None, None], dim=1)[:, 0]
