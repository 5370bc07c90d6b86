"""Forward times of any model from its shapes: microbenchmarks of the parts, put together.

A forward over R rows (requests times nodes) behind a context of C tokens takes

    sum over linear layers of linear(R, inputs, outputs)            weights as cold as the model's size makes them
    + layers * tree_attention(N, C, heads)
    + layers * decoder_layer_rest(R, widths)                        norms, rotary, activation, residuals, cache, host
    + layers * decoder_layer_overhead                               what a layer takes beyond its parts
    + model_rest(R, width)                                          embedding, last norm, entry and exit

Each part is a curve over rows, straight between measured sizes and going on by its last slope above them. Between
measured shapes:

    linear               the measured shape where there is one; else bilinear in inputs and outputs over a grid of
                         measured shapes (exact for a + b * inputs + c * outputs + d * inputs * outputs). Weights of a
                         small model stay in a cache: times were taken over working sets of several sizes, and are read
                         at the model's own, straight in its logarithm.
    tree_attention       straight in the number of key/value heads, over measured shapes of the nearest head width and
                         group size; in proportion to the head width where that differs.
    decoder_layer_overhead  one number, of a small layer: parts timed by themselves find their code and data in caches
                         that they have to share in a layer. It matters where layers take fractions of a millisecond.
    *_rest               straight in the number of elements that a row has on its way through a layer.

A model that is offloaded copies its streamed weights meanwhile: its forward takes the longer of the two times, not
their sum. Copies and arithmetic overlap layer by layer, so this is right but for the first layer's copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sequoia_kernels.documents import is_count
from sequoia_kernels.errors import ProfileError
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.planner.interpolation import isotonic
from sequoia_kernels.planner.profile import HardwareProfile, OpPoint

__all__ = ["COMPOSED_OPS", "can_compose", "compose_forwards", "layer_parts_ms", "transfer_ms"]

COMPOSED_OPS = ("linear", "tree_attention", "decoder_layer_rest", "model_rest", "decoder_layer_overhead")

# Weights outside of the linear layers and the embedding, as a share of all, above which a model is not composed.
MAX_UNKNOWN_SHARE = 0.05

Parameters = Mapping[str, float | int | str]
Curve = Mapping[int, float]  # rows -> milliseconds
Array = NDArray[np.float64]


def can_compose(profile: HardwareProfile, fingerprint: ModelFingerprint) -> str | None:
    """Say why a model's forward cannot be composed from a profile, None where it can."""
    missing = [op for op in COMPOSED_OPS if not _points(profile, op, fingerprint.dtype)]
    if missing:
        return (
            f"the profile holds no {fingerprint.dtype} times of {', '.join(missing)}; "
            f"measure them with `sequoia-kernels profile --microbenchmarks --dtype {fingerprint.dtype}`"
        )
    if not fingerprint.linears:
        return "its linear layers are not known; take the fingerprint from the model or its configuration"
    known = sum(inputs * outputs * count for inputs, outputs, count in fingerprint.linears)
    known += fingerprint.vocab_size * fingerprint.hidden_size
    unknown = fingerprint.num_parameters - known
    if unknown > MAX_UNKNOWN_SHARE * fingerprint.num_parameters:
        return (
            f"{unknown / fingerprint.num_parameters:.0%} of its weights are neither linear layers nor embeddings "
            "(experts, say); measure the model itself"
        )
    return None


def compose_forwards(
    profile: HardwareProfile, fingerprint: ModelFingerprint, batch_size: int
) -> tuple[tuple[int, ...], tuple[int, ...], Array]:
    """Compose a table of forward times, without what an offloaded model copies; ProfileError says why it cannot be.

    Returns:
        Context lengths [C], node counts [N] and milliseconds [C, N]: medians times the mean over median of each part.
    """
    reason = can_compose(profile, fingerprint)
    if reason is not None:
        raise ProfileError(f"CostModel: the forward of {fingerprint.key} must be measured or composed: {reason}")
    dtype = fingerprint.dtype
    linear, attention, layer, model, beyond = (_points(profile, op, dtype) for op in COMPOSED_OPS)
    node_counts = tuple(sorted({_size(point.parameters, "nodes") for point in attention}))
    contexts = tuple(sorted({_size(point.parameters, "context_len") for point in attention}))
    nodes = np.asarray(node_counts, dtype=np.float64)
    rows = batch_size * nodes
    scale = {op: profile.mean_over_median.get(op, 1.0) for op in COMPOSED_OPS}

    fixed = scale["linear"] * _linears_ms(linear, fingerprint, rows)
    fixed += scale["decoder_layer_rest"] * fingerprint.num_layers * _rest_ms(layer, _layer_elements, fingerprint, rows)
    fixed += scale["model_rest"] * _rest_ms(model, _model_elements, fingerprint, rows)
    fixed += fingerprint.num_layers * beyond[-1].p50_ms
    attended = np.stack([_attention_ms(attention, fingerprint, batch_size, context, nodes) for context in contexts])
    return contexts, node_counts, fixed + scale["tree_attention"] * fingerprint.num_layers * attended


def layer_parts_ms(
    profile: HardwareProfile, fingerprint: ModelFingerprint, context_len: int, rows: Sequence[int]
) -> Array:
    """Time of one decoder layer's parts, medians, behind a context and at one request. [rows]"""
    linear, attention, layer = (_points(profile, op, fingerprint.dtype) for op in COMPOSED_OPS[:3])
    head = (fingerprint.hidden_size, fingerprint.vocab_size)
    inside = [
        (inputs, outputs, (count - ((inputs, outputs) == head)) // fingerprint.num_layers)
        for inputs, outputs, count in fingerprint.linears
    ]
    counts = np.asarray(rows, dtype=np.float64)
    total = _linears_ms(linear, dataclasses.replace(fingerprint, linears=tuple(inside)), counts)
    total += _attention_ms(attention, fingerprint, 1, context_len, counts)
    return total + _rest_ms(layer, _layer_elements, fingerprint, counts)


def transfer_ms(profile: HardwareProfile, fingerprint: ModelFingerprint) -> float:
    """Time of copying what a forward of an offloaded model streams from the host; 0 for other models."""
    if not fingerprint.streamed_bytes:
        return 0.0
    bandwidth = profile.bandwidth.get("host_to_device", 0.0)
    if not bandwidth > 0:
        raise ProfileError(
            f"CostModel: the profile must hold the bandwidth host_to_device for {fingerprint.key}, whose weights "
            "stream from the host, got none; measure it on the GPU with `sequoia-kernels profile`"
        )
    return fingerprint.streamed_bytes / (bandwidth * 1e6)


def _points(profile: HardwareProfile, op: str, dtype: str) -> list[OpPoint]:
    return [point for point in profile.ops.get(op, ()) if point.parameters.get("dtype") == dtype]


def _size(parameters: Parameters, name: str) -> int:
    value = parameters.get(name)
    if not is_count(value, 1):
        raise ProfileError(
            f"CostModel: microbenchmarks must have the parameter {name}, a positive integer, got {dict(parameters)}"
        )
    return value


def _along(curve: Curve, sizes: Array) -> Array:
    """Read a curve: straight between its knots, level below them, going on by the last slope above."""
    knots = np.asarray(sorted(curve), dtype=np.float64)
    values = isotonic(np.asarray([curve[int(knot)] for knot in knots]))
    slope = 0.0
    if knots.size > 1:
        slope = max((values[-1] - values[-2]) / (knots[-1] - knots[-2]), 0.0)
    return np.asarray(np.interp(sizes, knots, values) + slope * np.maximum(sizes - knots[-1], 0))


def _between(place: float, knots: Sequence[float], least: float | None = None) -> list[tuple[int, float]]:
    """Weights of the increasing knots around a place, adding up to 1; above them the last two go on.

    Below the first knot its value is scaled down no further than to the least share; None keeps it.
    """
    if len(knots) == 1:
        return [(0, 1.0 if place <= knots[0] else place / knots[0])]
    if place <= knots[0]:
        return [(0, 1.0 if least is None else max(least, place / knots[0]))]
    high = min(int(np.searchsorted(knots, place)), len(knots) - 1)
    share = (place - knots[high - 1]) / (knots[high] - knots[high - 1])
    return [(high - 1, 1.0 - share), (high, share)]


def _linears_ms(points: list[OpPoint], fingerprint: ModelFingerprint, rows: Array) -> Array:
    curves: dict[tuple[int, int], dict[int, dict[int, float]]] = {}  # shape -> working set -> rows -> ms
    for point in points:
        inputs, outputs, working_set, count = (
            _size(point.parameters, name) for name in ("in_features", "out_features", "working_set_bytes", "rows")
        )
        curves.setdefault((inputs, outputs), {}).setdefault(working_set, {})[count] = point.p50_ms
    # The largest working set is measured for every shape.
    weights = float(fingerprint.weight_bytes)
    at_shape = {shape: _at_working_set(sets, weights, rows) for shape, sets in curves.items()}
    inputs_axis, outputs_axis = _full_grid(set(at_shape))
    total = np.zeros_like(rows)
    for inputs, outputs, count in fingerprint.linears:
        if (inputs, outputs) in at_shape:
            total += count * at_shape[inputs, outputs]
            continue
        time = np.zeros_like(rows)
        for i, share_in in _between(inputs, inputs_axis, least=0.0):
            for j, share_out in _between(outputs, outputs_axis, least=0.0):
                time += share_in * share_out * at_shape[inputs_axis[i], outputs_axis[j]]
        smallest = at_shape[inputs_axis[0], outputs_axis[0]]
        # a call takes its time however small the matrix is
        total += count * np.maximum(time, np.minimum(smallest, smallest[0]))
    return total


def _at_working_set(sets: Mapping[int, Curve], num_bytes: float, rows: Array) -> Array:
    sizes = sorted(sets)
    clamped = min(max(num_bytes, sizes[0]), sizes[-1])
    shares = _between(float(np.log2(clamped)), [float(np.log2(size)) for size in sizes])
    return np.asarray(sum(share * _along(sets[sizes[index]], rows) for index, share in shares))


def _full_grid(shapes: set[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Find a large grid of inputs x outputs all of whose shapes were measured, by leaving out what has most gaps."""
    inputs, outputs = ({shape[axis] for shape in shapes} for axis in range(2))
    while True:
        gaps_in = {i: sum((i, o) not in shapes for o in outputs) / len(outputs) for i in inputs}
        gaps_out = {o: sum((i, o) not in shapes for i in inputs) / len(inputs) for o in outputs}
        worst_in, worst_out = max(inputs, key=lambda i: (gaps_in[i], i)), max(outputs, key=lambda o: (gaps_out[o], o))
        if gaps_in[worst_in] == gaps_out[worst_out] == 0:
            return sorted(inputs), sorted(outputs)
        if gaps_in[worst_in] >= gaps_out[worst_out]:
            inputs.remove(worst_in)
        else:
            outputs.remove(worst_out)


def _attention_ms(
    points: list[OpPoint], fingerprint: ModelFingerprint, batch_size: int, context_len: int, nodes: Array
) -> Array:
    """Time of one layer's attention for a batch, at a measured context length. [N]"""
    group = fingerprint.num_heads / fingerprint.num_kv_heads

    def distance(point: OpPoint) -> float:
        width = _size(point.parameters, "head_dim")
        own = _size(point.parameters, "q_heads") / _size(point.parameters, "kv_heads")
        return abs(float(np.log(width / fingerprint.head_dim))) + abs(float(np.log(own / group)))

    nearest = min(map(distance, points))
    points = [point for point in points if distance(point) <= nearest + 1e-9]
    width = _size(points[0].parameters, "head_dim")
    points = [point for point in points if _size(point.parameters, "head_dim") == width]
    by_heads: dict[int, dict[int, dict[int, float]]] = {}  # key/value heads of all requests -> context -> nodes -> ms
    for point in points:
        batch, heads, context, count = (
            _size(point.parameters, name) for name in ("batch_size", "kv_heads", "context_len", "nodes")
        )
        by_heads.setdefault(batch * heads, {}).setdefault(context, {})[count] = point.p50_ms
    sizes = sorted(by_heads)
    wanted = batch_size * fingerprint.num_kv_heads
    own_group = _size(points[0].parameters, "q_heads") / _size(points[0].parameters, "kv_heads")
    factor = fingerprint.head_dim / width * max(1.0, group / own_group)
    return factor * sum(
        (share * _at_context(by_heads[sizes[index]], context_len, nodes) for index, share in _between(wanted, sizes)),
        np.zeros_like(nodes),
    )


def _at_context(curves: Mapping[int, Curve], context_len: int, nodes: Array) -> Array:
    """Read attention times at a context; straight between measured ones, in proportion above the longest."""
    contexts = sorted(curves)
    shares = _between(context_len, contexts)
    return np.asarray(sum(share * _along(curves[contexts[index]], nodes) for index, share in shares))


def _layer_elements(parameters: Parameters) -> float:
    """Elements of one row that pass through the element-wise work of a decoder layer, weighted by how often."""
    hidden, intermediate, q_heads, kv_heads, head_dim = (
        _size(parameters, name) for name in ("hidden_size", "intermediate_size", "q_heads", "kv_heads", "head_dim")
    )
    return 4 * hidden + 2 * intermediate + 2 * (q_heads + 2 * kv_heads) * head_dim


def _model_elements(parameters: Parameters) -> float:
    return _size(parameters, "hidden_size")


def _rest_ms(
    points: Iterable[OpPoint], elements: Callable[[Parameters], float], fingerprint: ModelFingerprint, rows: Array
) -> Array:
    curves: dict[float, dict[int, float]] = {}
    for point in points:
        curves.setdefault(elements(point.parameters), {})[_size(point.parameters, "rows")] = point.p50_ms
    sizes = sorted(curves)
    hidden = fingerprint.hidden_size
    wanted = elements({
        "hidden_size": hidden, "intermediate_size": fingerprint.intermediate_size or 4 * hidden,
        "q_heads": fingerprint.num_heads, "kv_heads": fingerprint.num_kv_heads, "head_dim": fingerprint.head_dim,
    })  # fmt: skip
    knots = np.asarray(sorted({count for curve in curves.values() for count in curve}), dtype=np.float64)
    # Wider rows do not take less: where they seem to, it is noise, and both are set to their mean.
    smooth = [isotonic(times) for times in np.stack([_along(curves[size], knots) for size in sizes]).T]
    table = [{int(knot): float(times[index]) for knot, times in zip(knots, smooth)} for index in range(len(sizes))]
    return np.asarray(sum(share * _along(table[index], rows) for index, share in _between(wanted, sizes)))
