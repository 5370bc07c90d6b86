"""Native forwards on the CPU beside what the machine allows: reading the weights once, and the multiply-adds.

A Llama of random weights (350M by default). Forwards of N rows behind a filled cache, of each instruction set that is
asked for, take turns with two measurements on the same threads (`csrc/host/forward/peak_loops.h`): reading a buffer,
as large as the weights but at most `--read-mib`, which must lie beyond the caches to mean memory; and multiply-adds in
registers. The floor of a forward is the longer of reading all weights that it multiplies once at that bandwidth and
making its multiply-adds, attention's included, at that rate. Where an instruction set multiplies pairs of bfloat16 and
the weights are such, theirs count at the rate of pairs, once each, although keys' are multiplied twice, also with what
rounding took away from activations. What the floor leaves out is reading the cache, and widening weights of 16 bits.

Each forward lies between two readings, each reading between two forwards. `ratio` is the best forward over the floor by
the best reading and rate of the whole run. On a shared machine these are not of the same moment: memory may give half
as much again for some of a second. `paired_ratio` is the median, over rounds, of a forward over the floor by the two
readings beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

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
    "135M": Shape(576, 30, 9, 1536, kv_heads=3),
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


def adapted(shape: Shape, dtype: torch.dtype, instruction_sets: Sequence[str]) -> dict[str, TreeModel]:
    """Adapt one model for each instruction set, all of the same weights."""
    before, set_before = torch.get_default_dtype(), os.environ.get(INSTRUCTION_SET_VARIABLE)
    torch.set_default_dtype(dtype)  # nothing is held in float32 first
    try:
        first, models = LlamaForCausalLM(llama_config(shape, VOCAB, tie_word_embeddings=False)).eval(), {}
        for name in instruction_sets:
            with torch.device("meta"):
                model = LlamaForCausalLM(first.config).eval()
            model.load_state_dict(first.state_dict(), assign=True)
            model.model.rotary_emb = first.model.rotary_emb  # its buffers are no part of the state
            os.environ[INSTRUCTION_SET_VARIABLE] = name
            models[name] = adapt(model, forward="native")
    finally:
        torch.set_default_dtype(before)
        os.environ.pop(INSTRUCTION_SET_VARIABLE, None)
        if set_before is not None:
            os.environ[INSTRUCTION_SET_VARIABLE] = set_before
    return models


@torch.no_grad()
def measure(bench: Run) -> None:
    options, shape = bench.options, SHAPES[bench.options.size]
    dtype, num_threads = getattr(torch, options.dtype), torch.get_num_threads()
    chosen = _host.forward_instruction_set(os.environ.get(INSTRUCTION_SET_VARIABLE, ""))
    instruction_sets = options.instruction_sets or [chosen]
    torch.manual_seed(0)
    models = adapted(shape, dtype, instruction_sets)
    weights = multiplied(shape)
    weight_bytes = weights * dtype.itemsize
    buffer = torch.ones(min(weight_bytes, options.read_mib * MIB) // 4, dtype=torch.float32)
    read_bytes = 4 * buffer.numel()

    forwards = {
        (num_rows, name): forward_of(model, num_rows, options.context)
        for num_rows in options.rows
        for name, model in models.items()
    }
    times: dict[tuple[int, str], list[float]] = {key: [] for key in forwards}
    read_times: dict[tuple[int, str], list[float]] = {key: [] for key in forwards}  # of all weights, beside these
    with_pairs = _host.forward_instruction_sets(pairs=True) if dtype == torch.bfloat16 else []
    bandwidth = 0.0  # bytes a second
    rates, pair_rates = dict.fromkeys(models, 0.0), dict.fromkeys(models.keys() & set(with_pairs), 0.0)
    after = _host.read_seconds(instruction_sets[0], buffer.data_ptr(), read_bytes, num_threads)
    for round_ in range(options.rounds + 1):
        for (num_rows, name), forward in forwards.items():
            rates[name] = max(rates[name], _host.multiply_add_rate(name, STEPS, num_threads))
            if name in pair_rates:
                rate = _host.multiply_add_rate(name, STEPS, num_threads, pairs=True)
                pair_rates[name] = max(pair_rates[name], rate)
            started = time.perf_counter()
            forward()
            seconds = time.perf_counter() - started
            before, after = after, _host.read_seconds(name, buffer.data_ptr(), read_bytes, num_threads)
            bandwidth = max(bandwidth, read_bytes / after)
            if round_ > 0:  # the first one warms up
                times[num_rows, name].append(1e3 * seconds)
                read_times[num_rows, name].append(1e3 * weight_bytes / read_bytes * (before + after) / 2)

    bench.document |= {name: getattr(options, name) for name in ("size", "dtype", "context", "rounds")}
    bench.document |= {
        "instruction_sets": instruction_sets,
        "threads": num_threads,
        "multiplied_weights": weights,
        "weight_bytes": weight_bytes,
        "read_bytes": read_bytes,
        "read_gb_per_s": bandwidth / 1e9,
        "multiply_adds_per_s": rates,
        "pair_multiply_adds_per_s": pair_rates,
    }
    results = bench.document["results"] = []
    read_ms = 1e3 * weight_bytes / bandwidth
    print(
        f"{options.size}, {options.dtype}, {num_threads} threads: reading {bandwidth / 1e9:.1f} GB/s of "
        f"{read_bytes / MIB:.0f} MiB; {weight_bytes / MIB:.0f} MiB of weights"
    )
    for name, rate in rates.items():
        of_pairs = f", {pair_rates[name] / 1e9:.1f} G of pairs" if name in pair_rates else ""
        print(f"{name}: {rate / 1e9:.1f} G multiply-adds/s{of_pairs}")
    for (num_rows, name), taken in times.items():
        attention_ms = 1e3 * attended(shape, num_rows, options.context) / rates[name]
        multiply_ms = 1e3 * num_rows * weights / pair_rates.get(name, rates[name]) + attention_ms
        best, floor = min(taken), max(read_ms, multiply_ms)
        beside = read_times[num_rows, name]
        paired = statistics.median(ms / max(read, multiply_ms) for ms, read in zip(taken, beside, strict=True))
        results.append(
            {
                "rows": num_rows, "instruction_set": name, "best_ms": best, "median_ms": statistics.median(taken),
                "read_ms": read_ms, "multiply_ms": multiply_ms, "floor_ms": floor, "ratio": best / floor,
                "median_read_ms": statistics.median(beside), "paired_ratio": paired,
            }
        )  # fmt: skip
        print(
            f"{num_rows:4d} rows, {name}: best {best:.2f} ms, median {statistics.median(taken):.2f} ms; reading "
            f"{read_ms:.2f} ms, multiply-adds {multiply_ms:.2f} ms; {best / floor:.2f} times the floor; beside its own "
            f"readings (median {statistics.median(beside):.2f} ms) {paired:.2f} times"
        )


def wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    if min(options.rows) < 1 or options.rounds < 1 or options.context < 1 or options.read_mib < 1:
        return "--rows, --rounds, --context and --read-mib must be at least 1"
    unknown = set(options.instruction_sets or []) - set(_host.forward_instruction_sets())
    return f"--instruction-sets: this CPU has no {', '.join(sorted(unknown))}" if unknown else None


OPTIONS = [
    *shared(quick=False, dtype="bfloat16", threads=None, rounds=20),
    option("--size", choices=tuple(SHAPES), default="350M", help="of the model (default %(default)s)"),
    option("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of a forward (default %(default)s)"),
    option("--instruction-sets", nargs="+", help="that take turns (default: the one that forwards use)"),
    option("--context", type=int, default=256, help="rows already in the cache (default %(default)s)"),
    option("--read-mib", type=int, default=512, help="at most so much is read for the bandwidth (default %(default)s)"),
]
QUICK = {"size": "tiny", "rounds": 2, "rows": [1, 8], "context": 16}
main = Script(__spec__, measure, __doc__, OPTIONS, QUICK, check=wrong).main


if __name__ == "__main__":
    sys.exit(main())
