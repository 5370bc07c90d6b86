"""measure_microbenchmarks: times of a model's parts over their sizes, from which any model's forward is composed.

Every timed call runs a part several times on different weights or caches, as the layers of a model do: what is timed is
as cold as it is in a forward. Small models keep their weights in the processor's caches, so linear layers are timed
over working sets of several sizes. See `planner.compose` for how the times are put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sequoia_kernels.cuda_graphs import as_replay, new_memory
from sequoia_kernels.fingerprints import DeviceFingerprint, ModelFingerprint
from sequoia_kernels.measure import calls
from sequoia_kernels.measure.calls import Call, Key, op_key
from sequoia_kernels.measure.layer_models import LayerShape, hollow_llama, whole_llama
from sequoia_kernels.measure.timing import Progress, Timing, Turn, pooled_slowdown, report_percent, time_calls
from sequoia_kernels.models import LayerSpec, TreeCache
from sequoia_kernels.ops import tree_attention
from sequoia_kernels.planner import HardwareProfile, OpPoint
from sequoia_kernels.planner.compose import layer_parts_ms
from sequoia_kernels.tree import MAX_STEP_ROWS

__all__ = ["Microbenchmarks", "measure_microbenchmarks"]

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class _Grid(NamedTuple):
    """What is timed on a kind of device where no model's own shapes are asked for, and how much memory calls use."""

    more_rows: tuple[int, ...]  # beyond ROWS
    widths: tuple[int, ...]  # inputs of linear layers, and outputs
    more_outputs: tuple[int, ...]
    working_sets: tuple[int, ...]  # bytes of weights that linear layers take turns in
    heads: tuple[tuple[int, int, int], ...]  # query heads, key/value heads, head width
    context_lens: tuple[int, ...]
    cache_pool: int  # bytes of caches that attention takes turns in
    layers: tuple[LayerShape, ...]
    whole_layer: LayerShape  # the smallest of measured shapes: what a layer takes beyond its parts matters there
    max_logits: int  # elements of the logits that are drawn from or verified


CPU_GRID = _Grid(
    more_rows=(),
    widths=(128, 512, 1536, 4096),
    more_outputs=(16384,),
    working_sets=(2 << 20, 16 << 20, 128 << 20),
    heads=((4, 4, 32), (4, 4, 64), (16, 16, 64), (16, 4, 64), (32, 32, 128), (32, 8, 128)),
    context_lens=(64, 512, 2048, 8192),
    cache_pool=48 << 20,
    layers=(
        LayerShape(128, 384, 4, 4, 32),
        LayerShape(768, 2048, 12, 12, 64),
        LayerShape(2048, 5632, 16, 16, 128),
        LayerShape(4096, 11008, 32, 32, 128),
    ),
    whole_layer=LayerShape(128, 512, 4, 4, 32),
    max_logits=1 << 24,
)
CUDA_GRID = _Grid(
    more_rows=(2048, 4096),
    widths=(512, 2048, 4096, 8192),
    more_outputs=(14336, 28672),
    working_sets=(16 << 20, 1 << 30),
    heads=((12, 12, 64), (32, 32, 128), (32, 8, 128), (64, 8, 128)),
    context_lens=(128, 1024, 4096, 16384, 32768),
    cache_pool=1 << 30,
    layers=(
        LayerShape(768, 3072, 12, 12, 64),
        LayerShape(4096, 11008, 32, 32, 128),
        LayerShape(8192, 28672, 64, 8, 128),
    ),
    whole_layer=LayerShape(512, 2048, 12, 12, 64),
    max_logits=1 << 28,
)

FEW_LAYERS, MORE_LAYERS = 1, 8
WHOLE_ROWS, WHOLE_CONTEXT = 32, 512  # rows at most
VOCABS = (32000, 128256)
SAMPLE_ROWS = (1, 4, 16, 64)
VERIFY_NODES = (1, 4, 16, 64, 256, 1024)
COMPACT_CACHES = ((4, 4, 64), (32, 8, 128), (80, 8, 128))  # layers, key/value heads, head width

MAX_CALLS = 24  # parts run within one timed call
# A call that is expected to take longer is left out, and read off the curve's end.
LONGEST_MS = 60.0
SHORTEST_MS = 0.5  # shorter parts are run several times within a call

SECONDS, QUICK_SECONDS = 60.0, 15.0


class _Timed(NamedTuple):
    """A call that runs a part `times` times, and what comes before it, untimed."""

    call: Call
    times: int = 1
    prepare: Call | None = None
    short: bool = True


class Microbenchmarks:
    """All timed calls, and how their times become ops of a profile.

    The arguments are those of `measure_microbenchmarks`; `calls` and `turns` are what `time_calls` takes.
    """

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        shapes: Sequence[ModelFingerprint] = (),
        *,
        quick: bool = False,
        ops: bool = True,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.device, self.dtype, self.shapes = torch.device(device), dtype, list(shapes)
        self.on_cuda = self.device.type == "cuda"
        self.grid = CUDA_GRID if self.on_cuda else CPU_GRID
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.rows = list(rows or (ROWS[::2] if quick else ROWS) + self.grid.more_rows)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.flops_per_ms = self._rate()
        parts = [self._linears(), self._attention(), self._hollow_models(), self._whole_layers()]
        if ops:
            parts.append(self._ops())
        if self.on_cuda:
            parts.append(self._launches())
        self._timed: dict[Key, _Timed] = {key: timed for part in parts for key, timed in part}
        memory = new_memory(self.device)
        self.calls = {key: as_replay(timed.call, self.device, memory) for key, timed in self._timed.items()}
        self.turns = {} if self.on_cuda else {key: Turn(_warm_up(timed)) for key, timed in self._timed.items()}

    def points(self, times: dict[Any, Timing]) -> dict[str, list[OpPoint]]:
        """Turn the times of `calls` into points of each op."""
        found: dict[str, list[OpPoint]] = {}
        layers: dict[Key, dict[int, Timing]] = {}
        for key, timed in self._timed.items():
            op, parameters = key[0], dict(key[1])
            if op in ("hollow", "whole"):
                num_layers = parameters.pop("layers")
                layers.setdefault(op_key(op, **parameters), {})[num_layers] = times[key]
                continue
            point = OpPoint(parameters, *(value / timed.times for value in times[key][:3]))
            found.setdefault(op, []).append(point)
        whole: dict[int, float] = {}
        for (op, items), by_layers in layers.items():
            if len(by_layers) < 2:  # many layers were too long for many rows
                continue
            parameters = dict(items)
            few, more = by_layers[FEW_LAYERS], by_layers[MORE_LAYERS]
            layer = [max((b - a) / (MORE_LAYERS - FEW_LAYERS), 1e-6) for a, b in zip(few[:3], more[:3], strict=True)]
            if op == "whole":
                whole[parameters["rows"]] = layer[1]
                continue
            layer.sort()  # differences of percentiles need not be in order
            rest = sorted(max(a - FEW_LAYERS * layer[1], 1e-6) for a in few[:3])
            found.setdefault("decoder_layer_rest", []).append(OpPoint(parameters, *layer))
            model = {name: parameters[name] for name in ("rows", "hidden_size", "dtype")}
            found.setdefault("model_rest", []).append(OpPoint(model, *rest))
        beyond = sorted(self._beyond_parts(found, whole))
        overhead = (beyond[int(share * (len(beyond) - 1))] for share in (0.2, 0.5, 0.8))
        found["decoder_layer_overhead"] = [OpPoint({"dtype": self.dtype_name}, *overhead)]
        return found

    def _beyond_parts(self, found: dict[str, list[OpPoint]], whole: dict[int, float]) -> list[float]:
        """What a whole layer takes beyond its linear layers, attention and rest, at every number of rows."""
        profile = HardwareProfile(DeviceFingerprint.of(self.device))
        for op, points in found.items():
            profile = profile.with_op(op, points)
        rows = sorted(whole)
        parts = layer_parts_ms(profile, self.whole_layer, WHOLE_CONTEXT, rows)
        return [max(whole[count] - float(part), 0.0) for count, part in zip(rows, parts, strict=True)]

    def slowdowns(self, times: dict[Any, Timing]) -> dict[str, float]:
        """Mean over median of each op, pooled over its calls."""
        pooled: dict[str, list[Timing]] = {}
        for key in self._timed:
            for name in ("decoder_layer_rest", "model_rest") if key[0] in ("hollow", "whole") else (key[0],):
                pooled.setdefault(name, []).append(times[key])
        return {name: pooled_slowdown(group) for name, group in pooled.items()}

    def _key(self, op: str, **parameters: int | float | str) -> Key:
        return op_key(op, **parameters, dtype=self.dtype_name)

    def _random(self, num_elements: int) -> torch.Tensor:
        numbers = torch.randn(num_elements, generator=self.generator, device=self.device, dtype=torch.float32)
        return numbers.to(self.dtype)

    def _rate(self) -> float:
        """Measure multiply-adds times two of a millisecond, roughly: to guess what a call will take."""
        size = 4096 if self.on_cuda else 512
        left, right = (self._random(size * size).view(size, size) for _ in range(2))
        time = time_calls({"product": lambda: left @ right}, self.device, seconds=0.0, min_repeats=3)["product"]
        return 2 * size**3 / time.p50_ms

    def _fits(self, flops: float) -> bool:
        return flops / self.flops_per_ms <= LONGEST_MS

    def _is_short(self, flops: float) -> bool:
        return flops / self.flops_per_ms < SHORTEST_MS

    def _count(self, flops: float, num_bytes: float, most: int) -> int:
        """How often a part is run within a call, so that the clock's own time does not matter."""
        guess_ms = flops / self.flops_per_ms + num_bytes / 2e7 + 0.002
        return max(1, min(most, MAX_CALLS, math.ceil(SHORTEST_MS / guess_ms)))

    def _linears(self) -> Iterator[tuple[Key, _Timed]]:
        grid, item = self.grid, self.dtype.itemsize
        shapes = sorted({(inputs, outputs) for shape in self.shapes for inputs, outputs, _ in shape.linears})
        if not self.shapes:
            outputs_of_grid = (*grid.widths, *grid.more_outputs)
            shapes = [(inputs, outputs) for inputs in grid.widths for outputs in outputs_of_grid]
        largest_set = grid.working_sets[-1]
        pool = self._random(max(largest_set // item, max(inputs * outputs for inputs, outputs in shapes)))
        pool *= 0.02
        activations = self._random(self.rows[-1] * max(inputs for inputs, _ in shapes))
        for inputs, outputs in shapes:
            for working_set in grid.working_sets:
                elements = working_set // item
                if inputs * outputs > elements and working_set != largest_set:
                    continue
                num_weights = max(1, elements // (inputs * outputs))
                weights = pool[: num_weights * inputs * outputs].view(num_weights, outputs, inputs)
                prepare = None if working_set == largest_set or self.on_cuda else pool[:elements].sum
                sizes = {"in_features": inputs, "out_features": outputs, "working_set_bytes": working_set}
                for rows in self.rows:
                    flops = 2.0 * rows * inputs * outputs
                    if rows > 1 and not self._fits(flops):
                        break
                    count = self._count(flops, inputs * outputs * item, num_weights)
                    rotation = _Rotation(num_weights, count, fixed=self.on_cuda)
                    call = _linear_call(activations, weights, rows, rotation)
                    yield self._key("linear", rows=rows, **sizes), _Timed(call, count, prepare, self._is_short(flops))

    def _attention(self) -> Iterator[tuple[Key, _Timed]]:
        grid = self.grid
        heads: Iterable[tuple[int, int, int]] = grid.heads
        if self.shapes:
            heads = sorted({(shape.num_heads, shape.num_kv_heads, shape.head_dim) for shape in self.shapes})
        largest = 2 * (grid.context_lens[-1] + MAX_STEP_ROWS) * max(kv_heads * width for _, kv_heads, width in heads)
        num_elements = max(grid.cache_pool // self.dtype.itemsize, largest)
        pool = self._random(num_elements)
        queries = self._random(MAX_STEP_ROWS * max(q_heads * head_dim for q_heads, _, head_dim in heads))
        for q_heads, kv_heads, head_dim in heads:
            sizes = {"batch_size": 1, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
            for context_len in grid.context_lens:
                for nodes in self.rows:
                    slots = context_len + nodes
                    # two products; half of their speed is what an attention reaches
                    flops = 2 * 4.0 * nodes * slots * q_heads * head_dim
                    if nodes > MAX_STEP_ROWS or (nodes > 1 and not self._fits(flops)):
                        break
                    elements = slots * kv_heads * head_dim
                    num_caches = max(1, num_elements // (2 * elements))
                    count = self._count(flops, 2 * elements * self.dtype.itemsize, num_caches)
                    caches = pool[: 2 * num_caches * elements].view(num_caches, 2, 1, slots, kv_heads, head_dim)
                    query = queries[: nodes * q_heads * head_dim].view(1, q_heads, nodes, head_dim).transpose(1, 2)
                    rotation = _Rotation(num_caches, count, fixed=self.on_cuda)
                    call = _attention_call(query, caches, context_len, rotation)
                    key = self._key("tree_attention", nodes=nodes, context_len=context_len, **sizes)
                    yield key, _Timed(call, count, short=self._is_short(flops))

    def _hollow_models(self) -> Iterator[tuple[Key, _Timed]]:
        for shape in sorted(set(map(LayerShape.of, self.shapes))) or self.grid.layers:
            sizes = dict(zip(("hidden_size", "intermediate_size", "q_heads", "kv_heads", "head_dim"), shape))
            for num_layers in (FEW_LAYERS, MORE_LAYERS):
                model = hollow_llama(shape, num_layers, self.dtype, self.device)
                cache = model.new_cache(1, 2 * MAX_STEP_ROWS)
                for rows in self.rows:
                    # element-wise work reaches some hundredth of the multiply-adds of a product
                    work = 300.0 * rows * (4 * shape.hidden_size + shape.intermediate_size)
                    if rows > MAX_STEP_ROWS or (rows > 1 and not self._fits(work * num_layers)):
                        break
                    call = calls.forward_call(model, cache, MAX_STEP_ROWS, calls.target_step(rows, self.device))
                    key = self._key("hollow", rows=rows, **sizes, layers=num_layers)
                    yield key, _Timed(call, short=self._is_short(work))

    def _whole_layers(self) -> Iterator[tuple[Key, _Timed]]:
        """Models of one and of more real layers of a small shape, all of whose parts are timed above."""
        shape = self.grid.whole_layer
        if self.shapes:
            shape = LayerShape.of(min(self.shapes, key=lambda shape: shape.hidden_size))
        for num_layers in (FEW_LAYERS, MORE_LAYERS):
            model = whole_llama(shape, num_layers, self.dtype, self.device)
            self.whole_layer = ModelFingerprint.of(model)
            cache = model.new_cache(1, WHOLE_CONTEXT + WHOLE_ROWS)
            for tensor in cache.tensors():
                tensor.normal_(generator=self.generator)
            for rows in (rows for rows in self.rows if rows <= WHOLE_ROWS):
                call = calls.forward_call(model, cache, WHOLE_CONTEXT, calls.target_step(rows, self.device))
                yield self._key("whole", rows=rows, layers=num_layers), _Timed(call)

    def _ops(self) -> Iterator[tuple[Key, _Timed]]:
        most = self.grid.max_logits
        for vocab in sorted({shape.vocab_size for shape in self.shapes}) or VOCABS:
            nodes = [count for count in VERIFY_NODES if count * vocab <= most]
            rows = [count for count in SAMPLE_ROWS if count * vocab <= most]
            found = calls.draw_and_verify_calls(
                1, nodes, rows, calls.SAMPLE_COUNTS, (vocab, vocab), (self.dtype, self.dtype), self.device
            )
            for key, call in found:
                yield key, _Timed(call)
        for num_layers, kv_heads, head_dim in COMPACT_CACHES:
            specs = [LayerSpec(kv_heads, head_dim, head_dim, self.dtype, self.device, None)] * num_layers
            cache = TreeCache(tuple(specs), 1, 4 * calls.COMPACT_LEVELS[-1])
            row_bytes = 2 * num_layers * kv_heads * head_dim * self.dtype.itemsize
            for levels in calls.COMPACT_LEVELS:
                key = op_key("compact_kv_cache_", levels=levels, row_bytes=row_bytes, batch_size=1)
                yield key, _Timed(calls.compact_call(cache.tensors(), 16, levels, 2 * calls.COMPACT_LEVELS[-1]))

    def _launches(self) -> Iterator[tuple[Key, _Timed]]:
        """A graph of one and of many small kernels: what a kernel in a graph takes at least."""
        for kernels in (1, 256):
            numbers = torch.zeros(1, device=self.device)

            def call(numbers: torch.Tensor = numbers, kernels: int = kernels) -> None:
                for _ in range(kernels):
                    numbers.add_(1)

            yield op_key("graph_launch", kernels=kernels), _Timed(call)


def _warm_up(timed: _Timed) -> Call:
    """What comes before a call that is short: the same once more, since in a forward other layers came before it.

    Without it the first parts of a call would run code that the other calls have put out of the processor's caches.
    """

    def prepare() -> None:
        if timed.prepare is not None:
            timed.prepare()
        if timed.short:
            timed.call()

    return prepare


class _Rotation:
    """Which of many weights or caches the next call takes: the ones that were not used for longest.

    A captured call cannot choose; there `fixed` spreads the ones it takes over all.
    """

    def __init__(self, total: int, count: int, fixed: bool) -> None:
        self.total, self.count, self.fixed, self.first = total, count, fixed, 0

    def next(self) -> list[int]:
        if self.fixed:
            return [index * self.total // self.count for index in range(self.count)]
        first, self.first = self.first, (self.first + self.count) % self.total
        return [(first + index) % self.total for index in range(self.count)]


def _linear_call(activations: torch.Tensor, weights: torch.Tensor, rows: int, rotation: _Rotation) -> Call:
    inputs = weights.shape[2]
    rows_in = activations[: rows * inputs].view(1, rows, inputs)

    def call() -> None:
        for index in rotation.next():
            F.linear(rows_in, weights[index])

    return call


def _attention_call(query: torch.Tensor, caches: torch.Tensor, context_len: int, rotation: _Rotation) -> Call:
    mask = calls.target_step(query.shape[1], query.device).tree_mask
    lens = torch.full((1,), context_len, dtype=torch.int32, device=query.device)

    def call() -> None:
        for index in rotation.next():
            keys, values = caches[index]
            tree_attention(query, keys, values, mask, lens).out.contiguous()

    return call


def measure_microbenchmarks(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    shapes: Sequence[Any] = (),
    seconds: float | None = None,
    min_repeats: int = 5,
    max_repeats: int = 50,
    quick: bool = False,
    ops: bool = True,
    rows: Sequence[int] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> HardwareProfile:
    """Measure the parts of which `plan_tree` composes the forwards of models that were not measured themselves.

    Timed are linear layers, tree attention, and what remains of a decoder layer and of a model, over rows and shapes;
    sampling, verification and compaction at common vocabularies; on CUDA also graph launches.

    Args:
        device: where to measure.
        dtype: of weights and activations; times of another dtype are measured by another call, and merged.
        shapes: models (fingerprints, configurations or their paths) whose own shapes are timed in place of the default
            grid: fewer calls, and nothing to interpolate.
        seconds: time to spend on timing, roughly; 60 when None (15 if quick). It takes longer where `min_repeats` do.
        min_repeats: times that every call is timed at least.
        max_repeats: times that every call is timed at most.
        quick: leave out every other number of rows.
        ops: also time sampling, verification and compaction.
        rows: tokens of a forward to time; the default ones when None.
        progress: called now and then with (done, total, what is being done).
        seed: of the order of the calls.

    Returns:
        A profile that holds these ops only; `HardwareProfile.merged` adds it to another.

    Raises:
        TypeError, ValueError: as `ModelFingerprint.from_config`, for `shapes`.

    Notes:
        Takes a few hundred MiB of memory on a CPU, some GiB on CUDA. Calls that would take long on this device are left
        out. On CUDA every call is timed as a graph replay, as in a captured decoding step.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> profile = measure_microbenchmarks("cpu", shapes=[config], rows=[1, 4], ops=False, seconds=0, min_repeats=1)
        >>> sorted(profile.ops)
        ['decoder_layer_overhead', 'decoder_layer_rest', 'linear', 'model_rest', 'tree_attention']
    """
    device = torch.device(device)
    found = [
        shape if isinstance(shape, ModelFingerprint) else ModelFingerprint.from_config(shape, dtype) for shape in shapes
    ]
    if seconds is None:
        seconds = QUICK_SECONDS if quick else SECONDS
    bench: Microbenchmarks | None = None
    report = report_percent(progress, lambda: "preparing" if bench is None else f"{len(bench.calls)} parts in turn")
    report(0.0)
    with torch.inference_mode():
        bench = Microbenchmarks(device, dtype, found, quick=quick, ops=ops, rows=rows)
        times = time_calls(
            bench.calls, device, min_repeats=min_repeats, max_repeats=max_repeats, seconds=seconds, warmup=1, seed=seed,
            progress=report, turns=bench.turns,
        )  # fmt: skip
    profile = HardwareProfile(DeviceFingerprint.of(device))
    for name, points in bench.points(times).items():
        profile = profile.with_op(name, points)
    return profile.with_slowdowns(bench.slowdowns(times))
