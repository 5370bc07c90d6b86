"""Forwards on a CPU of one model whose weights a library has quantised: by a native call or by modules.

A Llama of random weights. A forward of one row is a step of plain decoding, one of several rows verifies a tree, which
pays where the second takes hardly longer than the first. One thread, whose own CPU time counts, so that other work on
the machine matters little. A form whose library is not installed is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import Shape, llama_config
from bench.systems.bench_tree_forward_cpu import cpu_ms
from sequoia_kernels.models import TreeModel, TreeStep, adapt, causal_step
from sequoia_kernels.tree import TokenTree

SHAPE, VOCAB = Shape(768, 12, 12, 2048), 16384


def _torchao_int8(model: Any) -> None:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def _torchao_int4(model: Any) -> None:
    config = importlib.import_module("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=32)
    importlib.import_module("torchao.quantization").quantize_(model, config)


def _quanto_int8(model: Any) -> None:
    library = importlib.import_module("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    model.eval()


# name -> (dtype of what is not quantised, library, how it is quantised)
FORMS: dict[str, tuple[torch.dtype, str, Any]] = {
    "float32": (torch.float32, "torch", None),
    "bfloat16": (torch.bfloat16, "torch", None),
    "torchao int8": (torch.bfloat16, "torchao", _torchao_int8),
    "torchao int4": (torch.bfloat16, "torchao", _torchao_int4),
    "quanto int8": (torch.bfloat16, "optimum", _quanto_int8),
}


def forward_of(model: TreeModel, num_rows: int, context: int) -> Any:
    """A forward of a chain of so many nodes behind a filled cache."""
    tokens = torch.randint(VOCAB, (1, context + num_rows), generator=torch.Generator().manual_seed(0))
    cache, lens = model.new_cache(1, context + num_rows), torch.zeros(1, dtype=torch.int32)
    model.forward(tokens[:, :context], cache, lens, causal_step(context))
    step = TreeStep.of(TokenTree.chain(num_rows).tensors())
    return lambda: model.forward(tokens[:, context:], cache, lens + context, step)


@torch.no_grad()
def measure(bench: Run) -> None:
    options = bench.options
    torch.set_num_threads(1)
    results = bench.document["results"] = []
    for name, (dtype, library, quantise) in FORMS.items():
        if importlib.util.find_spec(library) is None:
            print(f"{name}: {library} is not installed")
            continue
        torch.manual_seed(0)
        plain = LlamaForCausalLM(llama_config(SHAPE, VOCAB)).to(dtype).eval()
        if quantise is not None:
            quantise(plain)
        for how in ("auto", "modules"):
            model = adapt(plain, forward=how)
            if how == "modules" and adapt(plain).runs == "modules":
                continue
            forwards = {num_rows: forward_of(model, num_rows, options.context) for num_rows in options.rows}
            times: dict[int, list[float]] = {num_rows: [] for num_rows in options.rows}
            for _ in range(options.rounds):
                for num_rows, run in forwards.items():
                    times[num_rows].append(cpu_ms(run))
            medians = {str(num_rows): statistics.median(values[1:]) for num_rows, values in times.items()}
            results.append({"form": name, "runs": model.runs, "ms": medians})
            text = ", ".join(f"{rows} rows {ms:.1f} ms" for rows, ms in medians.items())
            print(f"{name:13} by {model.runs:8} {text}", flush=True)


OPTIONS = [
    *shared(quick=False, rounds=15),
    option("--rows", type=int, nargs="+", default=[1, 4, 8, 16], help="rows of a forward (default %(default)s)"),
    option("--context", type=int, default=128, help="rows already in the cache (default %(default)s)"),
]
main = Script(__spec__, measure, __doc__, OPTIONS, quick={"rounds": 3, "rows": [1, 8]}).main


if __name__ == "__main__":
    sys.exit(main())
