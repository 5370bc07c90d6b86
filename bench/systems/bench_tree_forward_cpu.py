"""One forward on the CPU: an adapted model against the same model with its own attention and transformers' cache.

A Llama of random weights, small enough that what surrounds the arithmetic shows. Forwards of N rows behind a filled
cache, in turns; the thread's CPU time counts, so other work on the machine matters little. The adapted model feeds the
same chain of rows that the plain model does; the two must give the same logits before anything is timed. The same on
a cache in shuffled pages, whose logits must be the bits of the contiguous cache's.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import DynamicCache, LlamaForCausalLM

from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import Shape, llama_config
from sequoia_kernels.models import adapt, causal_step
from sequoia_kernels.models.families import cache_argument


def cpu_ms(run) -> float:
    """Return the CPU time of a call on this thread."""
    started = time.thread_time_ns()
    run()
    return 1e-6 * (time.thread_time_ns() - started)


def forwards(model: LlamaForCausalLM, num_rows: int, context_len: int, page_size: int):
    """Return the plain forward, what takes its rows out of the cache again, the adapted forward, and that on pages."""
    tokens = torch.randint(model.config.vocab_size, (1, context_len + num_rows))
    prompt, rows = tokens[:, :context_len], tokens[:, context_len:]
    plain_cache = DynamicCache(config=model.config)
    cached = {cache_argument(model): plain_cache}
    model(input_ids=prompt, **cached)

    def plain() -> torch.Tensor:
        return model(input_ids=rows, **cached).logits

    def crop() -> None:
        plain_cache.crop(-num_rows)

    tree_model = adapt(model)
    num_pages = -(-(context_len + 64) // page_size)
    pool = tree_model.new_paged_cache(num_pages, page_size)
    in_rows = tree_model.new_cache(1, context_len + 64)
    in_pages = pool.of(torch.randperm(num_pages, dtype=torch.int32)[None])
    cache_lens = torch.zeros(1, dtype=torch.int32)
    for cache in (in_rows, in_pages):
        tree_model.forward(prompt, cache, cache_lens, causal_step(context_len))
    cache_lens.fill_(context_len)

    def tree() -> torch.Tensor:
        return tree_model.forward(rows, in_rows, cache_lens, causal_step(num_rows))

    def paged() -> torch.Tensor:
        return tree_model.forward(rows, in_pages, cache_lens, causal_step(num_rows))

    return plain, crop, tree, paged


@torch.no_grad()
def measure(bench: Run) -> None:
    options = bench.options
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(Shape(128, options.layers, 4, 352), vocab=512)).eval()
    bench.document |= {name: getattr(options, name) for name in ("context", "layers", "rounds", "page_size")}
    results = bench.document["results"] = []
    for num_rows in options.rows:
        plain, crop, tree, paged = forwards(model, num_rows, options.context, options.page_size)
        torch.testing.assert_close(tree(), plain(), rtol=1e-4, atol=1e-5)
        crop()
        if not torch.equal(tree(), paged()):
            raise SystemExit("bench_tree_forward_cpu: logits on pages must be those on contiguous rows, bit for bit")
        times = []
        for number in range(options.rounds):
            taken = {run: cpu_ms(run) for run in ((plain, tree, paged) if number % 2 else (paged, tree, plain))}
            times.append((taken[plain], taken[tree], taken[paged]))
            crop()  # outside of the time: a loop that keeps what it decodes does not crop
        plain_ms, tree_ms, paged_ms = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours, _ in times)
        paged_ratio = statistics.median(pages / rows for _, rows, pages in times)
        times_of_rows = {"plain_ms": plain_ms, "tree_ms": tree_ms, "paged_ms": paged_ms}
        results.append({"rows": num_rows, **times_of_rows, "ratio": ratio, "paged_ratio": paged_ratio})
        print(
            f"{num_rows:4d} rows: transformers {plain_ms:.3f} ms, adapted {tree_ms:.3f} ms, ratio {ratio:.3f}; "
            f"on pages {paged_ms:.3f} ms, {paged_ratio:.3f} of adapted"
        )


OPTIONS = [
    *shared(quick=False, rounds=200),
    option("--rows", type=int, nargs="+", default=[1, 8, 16], help="rows of a forward (default %(default)s)"),
    option("--context", type=int, default=256, help="rows already in the cache (default %(default)s)"),
    option("--layers", type=int, default=24),
    option("--page-size", type=int, default=16, help="rows of a page (default %(default)s)"),
]
main = Script(__spec__, measure, __doc__, OPTIONS, quick={"rounds": 20, "rows": [1, 8]}).main


if __name__ == "__main__":
    sys.exit(main())
