"""Native forwards on the CPU beside what the machine allows: reading the weights once, and the multiply-adds.

A Llama of random weights (350M by default). Forwards of N rows behind a filled cache take turns with two measurements
on the same threads, with the vectors of the same instruction set (`csrc/host/forward/peak_loops.h`): reading a buffer,
as large as the weights but at most `--read-mib`, which must lie beyond the caches to mean memory; and multiply-adds in
registers. The floor of a forward is the longer of reading all weights that it multiplies once at that bandwidth and
making its multiply-adds, attention's included, at that rate. Of every figure the best round counts, and the median of a
forward is told beside it. What the floor leaves out is reading the cache, and widening weights of 16 bits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import VOCAB, Shape, llama_config
from sequoia_kernels import _host
from sequoia_kernels.models import TreeModel, adapt, causal_step
from sequoia_kernels.models.native import INSTRUCTION_SET_VARIABLE

MIB = 1 << 20
STEPS = 200_000  # of one measurement of multiply-adds: about half a millisecond
SHAPES = {
    "tiny": Shape(128, 2, 4, 352),
    "125M": Shape(768, 12, 12, 2048),
    "350M": Shape(1024, 24, 16, 2816),
    "1B": Shape(2048, 16, 32, 8192, kv_heads=8),
}


def multiplied(shape: Shape) -> int:
    """Weights that every row is multiplied with: the layers' matrices and the head."""
    norms = 2 * shape.hidden
    return shape.layers * (shape.layer_parameters() - norms) + VOCAB * shape.hidden


def attended(shape: Shape, num_rows: int, context_len: int) -> int:
    """Multiply-adds of attention: scores and values of all heads, each row over the context and the rows up to it."""
    columns = num_rows * context_len + num_rows * (num_rows + 1) // 2
    return 2 * shape.layers * shape.heads * shape.head_dim * columns


def forward_of(model: TreeModel, num_rows: int, context_len: int) -> Callable[[], torch.Tensor]:
    """Return a forward of rows behind a filled cache; it may be repeated."""
    tokens = torch.randint(VOCAB, (1, context_len + num_rows))
    cache = model.new_cache(1, context_len + num_rows)
    cache_lens = torch.zeros(1, dtype=torch.int32)
    model.forward(tokens[:, :context_len], cache, cache_lens, causal_step(context_len))
    cache_lens.fill_(context_len)
    rows, step = tokens[:, context_len:], causal_step(num_rows)
    return lambda: model.forward(rows, cache, cache_lens, step)


@torch.no_grad()
def measure(bench: Run) -> None:
    options, shape = bench.options, SHAPES[bench.options.size]
    dtype, num_threads = getattr(torch, options.dtype), torch.get_num_threads()
    instruction_set = _host.forward_instruction_set(os.environ.get(INSTRUCTION_SET_VARIABLE, ""))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # nothing is held in float32 first
    try:
        config = llama_config(shape, VOCAB, tie_word_embeddings=False)
        model = adapt(LlamaForCausalLM(config).eval(), forward="native")
    finally:
        torch.set_default_dtype(before)
    weights = multiplied(shape)
    weight_bytes = weights * dtype.itemsize
    buffer = torch.ones(min(weight_bytes, options.read_mib * MIB) // 4, dtype=torch.float32)
    read_bytes = 4 * buffer.numel()

    forwards = {num_rows: forward_of(model, num_rows, options.context) for num_rows in options.rows}
    times: dict[int, list[float]] = {num_rows: [] for num_rows in forwards}
    bandwidth = rate = 0.0  # bytes, multiply-adds a second
    for round_ in range(options.rounds + 1):
        for num_rows, forward in forwards.items():
            seconds = _host.read_seconds(instruction_set, buffer.data_ptr(), read_bytes, num_threads)
            bandwidth = max(bandwidth, read_bytes / seconds)
            rate = max(rate, _host.multiply_add_rate(instruction_set, STEPS, num_threads))
            started = time.perf_counter()
            forward()
            if round_ > 0:  # the first one warms up
                times[num_rows].append(1e3 * (time.perf_counter() - started))

    bench.document |= {name: getattr(options, name) for name in ("size", "dtype", "context", "rounds")}
    bench.document |= {
        "instruction_set": instruction_set,
        "threads": num_threads,
        "multiplied_weights": weights,
        "weight_bytes": weight_bytes,
        "read_bytes": read_bytes,
        "read_gb_per_s": bandwidth / 1e9,
        "multiply_adds_per_s": rate,
    }
    results = bench.document["results"] = []
    read_ms = 1e3 * weight_bytes / bandwidth
    print(
        f"{options.size}, {options.dtype}, {instruction_set}, {num_threads} threads: reading "
        f"{bandwidth / 1e9:.1f} GB/s of {read_bytes / MIB:.0f} MiB, "
        f"{rate / 1e9:.1f} G multiply-adds/s; {weight_bytes / MIB:.0f} MiB of weights"
    )
    for num_rows, taken in times.items():
        products = num_rows * weights + attended(shape, num_rows, options.context)
        multiply_ms = 1e3 * products / rate
        best, floor = min(taken), max(read_ms, multiply_ms)
        results.append(
            {
                "rows": num_rows, "best_ms": best, "median_ms": statistics.median(taken), "read_ms": read_ms,
                "multiply_ms": multiply_ms, "floor_ms": floor, "ratio": best / floor,
            }
        )  # fmt: skip
        print(
            f"{num_rows:4d} rows: best {best:.2f} ms, median {statistics.median(taken):.2f} ms; reading "
            f"{read_ms:.2f} ms, multiply-adds {multiply_ms:.2f} ms; {best / floor:.2f} times the floor"
        )


def wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    if min(options.rows) < 1 or options.rounds < 1 or options.context < 1 or options.read_mib < 1:
        return "--rows, --rounds, --context and --read-mib must be at least 1"
    return None


OPTIONS = [
    *shared(quick=False, dtype="bfloat16", threads=None, rounds=20),
    option("--size", choices=tuple(SHAPES), default="350M", help="of the model (default %(default)s)"),
    option("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of a forward (default %(default)s)"),
    option("--context", type=int, default=256, help="rows already in the cache (default %(default)s)"),
    option("--read-mib", type=int, default=512, help="at most so much is read for the bandwidth (default %(default)s)"),
]
QUICK = {"size": "tiny", "rounds": 2, "rows": [1, 8], "context": 16}
main = Script(__spec__, measure, __doc__, OPTIONS, QUICK, check=wrong).main


if __name__ == "__main__":
    sys.exit(main())
