"""A Llama as an OpenVINO model, built operation by operation from a Hugging Face model.

optimum-intel, the usual way, holds transformers back to versions older than this package needs. The graph has the form
that OpenVINO GenAI expects of a language model: token ids, a mask of the whole context, positions and the order of the
batch go in, logits come out, keys and values are variables of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

LOWEST = -65504.0  # what is added to the score of a row that must not be seen


def save_openvino_model(model: Any, folder: Path) -> None:
    """Write `openvino_model.xml` and its weights into a folder; matrices keep the model's dtype."""
    import openvino

    openvino.save_model(build(model), folder / "openvino_model.xml", compress_to_fp16=False)


def build(model: Any) -> Any:
    """Build the OpenVINO model of a `LlamaForCausalLM`. Activations are float32."""
    import openvino
    from openvino import opset13 as ops

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    eps = config.rms_norm_eps

    def number(value: Any, dtype: Any = np.int64) -> Any:
        return ops.constant(np.asarray(value, dtype=dtype))

    def vector(weight: torch.Tensor) -> Any:
        return ops.constant(weight.detach().float().numpy())

    def matrix(weight: torch.Tensor) -> Any:
        weight = weight.detach().contiguous()
        if weight.dtype == torch.float32:
            return ops.constant(weight.numpy())
        kind = {torch.bfloat16: openvino.Type.bf16, torch.float16: openvino.Type.f16}[weight.dtype]
        bits = openvino.Tensor(weight.view(torch.int16).numpy().view(np.uint16), list(weight.shape), kind)
        return ops.convert(openvino.op.Constant(bits), "f32")

    def linear(states: Any, layer: Any) -> Any:
        product = ops.matmul(states, matrix(layer.weight), transpose_a=False, transpose_b=True)
        return product if layer.bias is None else ops.add(product, vector(layer.bias))

    def norm(states: Any, layer: Any) -> Any:
        squares = ops.reduce_mean(ops.power(states, number(2.0, np.float32)), number([-1]), keep_dims=True)
        root = ops.sqrt(ops.add(squares, number(eps, np.float32)))
        return ops.multiply(vector(layer.weight), ops.multiply(states, ops.divide(number(1.0, np.float32), root)))

    def split(states: Any, count: int) -> Any:  # [B, S, count * head_dim] -> [B, count, S, head_dim]
        return ops.transpose(
            ops.reshape(states, number([0, 0, count, head_dim]), special_zero=True), number([0, 2, 1, 3])
        )

    def part(states: Any, start: int, stop: int) -> Any:
        return ops.slice(states, number([start]), number([stop]), number([1]), number([3]))

    def rotated(states: Any) -> Any:
        half = head_dim // 2
        turned = ops.multiply(part(states, half, head_dim), number(-1.0, np.float32))
        swapped = ops.concat([turned, part(states, 0, half)], -1)
        return ops.add(ops.multiply(states, cosines), ops.multiply(swapped, sines))

    def parameter(name: str, shape: list[int], dtype: Any = np.int64) -> Any:
        node = ops.parameter(shape, dtype, name=name)
        node.output(0).set_names({name})
        return node

    input_ids = parameter("input_ids", [-1, -1])
    attention_mask = parameter("attention_mask", [-1, -1])
    position_ids = parameter("position_ids", [-1, -1])
    beam_idx = parameter("beam_idx", [-1], np.int32)

    ids_shape = ops.shape_of(input_ids)
    batch = ops.gather(ids_shape, number([0]), number(0))
    num_rows = ops.gather(ids_shape, number(1), number(0))
    num_columns = ops.gather(ops.shape_of(attention_mask), number(1), number(0))
    first_row = ops.subtract(num_columns, num_rows)
    rows = ops.unsqueeze(ops.range(first_row, num_columns, number(1), "i64"), number(1))
    columns = ops.unsqueeze(ops.range(number(0), num_columns, number(1), "i64"), number(0))
    real = ops.unsqueeze(ops.convert(attention_mask, "boolean"), number([1, 2]))
    seen = ops.logical_and(ops.less_equal(columns, rows), real)  # [B, 1, rows, columns]
    mask = ops.select(seen, number(0.0, np.float32), number(LOWEST, np.float32))

    rotary = model.model.rotary_emb
    frequencies = ops.constant(rotary.inv_freq.detach().float().numpy()[None, :, None])  # [1, head_dim / 2, 1]
    positions = ops.convert(ops.unsqueeze(position_ids, number(1)), "f32")  # [B, 1, S]
    angles = ops.matmul(frequencies, positions, False, False)
    angles = ops.transpose(angles, number([0, 2, 1]))
    angles = ops.concat([angles, angles], -1)
    scaling = number(float(rotary.attention_scaling), np.float32)
    cosines, sines = (
        ops.unsqueeze(ops.multiply(function(angles), scaling), number(1)) for function in (ops.cos, ops.sin)
    )

    sinks = []

    def remembered(name: str, states: Any) -> Any:
        """Append rows to a variable and give all of it. [B, kv_heads, S, head_dim]"""
        info = openvino.op.util.VariableInfo()
        info.data_shape = openvino.PartialShape([-1, kv_heads, -1, head_dim])
        info.data_type = openvino.Type.f32
        info.variable_id = name
        variable = openvino.op.util.Variable(info)
        shape = ops.concat([batch, number([kv_heads]), number([0]), number([head_dim])], 0)
        empty = ops.broadcast(number(0.0, np.float32), shape)
        past = ops.gather(ops.read_value(empty, variable), beam_idx, number(0))
        together = ops.concat([past, states], 2)
        sinks.append(ops.assign(together, variable))
        return together

    def repeated(states: Any) -> Any:
        """Every key/value head as often as query heads share it."""
        if heads == kv_heads:
            return states
        shape = ops.shape_of(states)
        length = ops.gather(shape, number([2]), number(0))
        wide = [batch, number([kv_heads]), number([heads // kv_heads]), length, number([head_dim])]
        wider = ops.broadcast(ops.unsqueeze(states, number(2)), ops.concat(wide, 0), broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(wider, number([0, heads, -1, head_dim]), special_zero=True)

    embedding = model.get_input_embeddings().weight
    table = matrix(embedding)
    states = ops.gather(table, ops.convert(input_ids, "i32"), number(0))
    for index, layer in enumerate(model.model.layers):
        attention, normed = layer.self_attn, norm(states, layer.input_layernorm)
        queries = rotated(split(linear(normed, attention.q_proj), heads))
        keys = rotated(split(linear(normed, attention.k_proj), kv_heads))
        keys = repeated(remembered(f"past_key_values.{index}.keypresent.{index}.key", keys))
        values = split(linear(normed, attention.v_proj), kv_heads)
        values = repeated(remembered(f"past_key_values.{index}.valuepresent.{index}.value", values))
        mixed = ops.scaled_dot_product_attention(queries, keys, values, mask)
        flat = ops.reshape(
            ops.transpose(mixed, number([0, 2, 1, 3])), number([0, 0, heads * head_dim]), special_zero=True
        )
        states = ops.add(states, linear(flat, attention.o_proj))
        normed = norm(states, layer.post_attention_layernorm)
        gated = ops.multiply(ops.swish(linear(normed, layer.mlp.gate_proj)), linear(normed, layer.mlp.up_proj))
        states = ops.add(states, linear(gated, layer.mlp.down_proj))
    head = model.get_output_embeddings().weight
    head = table if head is embedding else matrix(head)
    logits = ops.result(ops.matmul(norm(states, model.model.norm), head, False, True), name="logits")
    logits.output(0).set_names({"logits"})
    return openvino.Model([logits], sinks, [input_ids, attention_mask, position_ids, beam_idx], "llama")
