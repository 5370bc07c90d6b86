"""Forwards of few rows through small models: all layers in one launch against torch's products with steps between them.

A draft feeds the nodes of a level, a few rows. Forwards are captured, several behind one another as the levels of a
tree are, and replayed in turns; weights that fit in L2 stay there, as they do in a loop. The floor is one read of the
weights at the measured copy bandwidth. Models are Llamas of random weights in bfloat16; needs a GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.common import report
from bench.common.machine import measure_peaks
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import Shape, llama_config
from sequoia_kernels.cuda_graphs import capture
from sequoia_kernels.measure.timing import event_ms
from sequoia_kernels.models import TreeModel, TreeStep, adapt, causal_step
from sequoia_kernels.models.fused import few_rows
from sequoia_kernels.tree import TokenTree

SHAPES = {
    "68M": Shape(768, 2, 12, 3072),
    "160M": Shape(768, 12, 12, 3072),
    "0.5B": Shape(896, 24, 14, 4864, kv_heads=2),
    "1.1B": Shape(2048, 22, 32, 5632, kv_heads=4),
    "1.3B": Shape(2048, 24, 16, 5504),
}
ROW_COUNTS = (1, 4, 8, 16, 32)
CONTEXT, CACHE_ROWS = 256, 640
FORWARDS = 4  # of one graph

FEW, MANY = "one launch", "torch's products"


def level_step(rows: int, device: torch.device) -> TreeStep:
    """The second level of a tree: children of the root."""
    tree = TokenTree([-1, *(0 for _ in range(rows))])
    return causal_step(1, device) if rows == 1 else TreeStep.of(tree.tensors(device), range(1, rows + 1))


def graphs_of(model: TreeModel, rows: int, device: torch.device) -> dict[str, Any]:
    """Graphs of some forwards, by what runs them; they must agree."""
    cache, lens = model.new_cache(1, CACHE_ROWS), torch.full((1,), CONTEXT, dtype=torch.int32, device=device)
    for tensor in cache.tensors():
        tensor.normal_()
    tokens, step = torch.randint(model.vocab_size, (1, rows), device=device), level_step(rows, device)
    graphs, logits, rule = {}, {}, few_rows.is_worthwhile

    def forwards() -> None:
        for _ in range(FORWARDS):
            model.forward(tokens, cache, lens, step)

    for name in (FEW, MANY):
        few_rows.is_worthwhile = lambda width, num_rows, few=name == FEW: few  # asked in every forward
        try:
            for _ in range(2):
                logits[name] = model.forward(tokens, cache, lens, step).float()
            graphs[name] = capture(forwards, device)[0]
        finally:
            few_rows.is_worthwhile = rule
    apart = float((logits[FEW] - logits[MANY]).abs().max() / logits[MANY].std())
    if not apart < 0.25:  # bfloat16's last places, through all layers of a random model
        raise SystemExit(f"the two differ by {apart:.3f} standard deviations of the logits")
    return graphs


def measure(bench: Run) -> None:
    options, device = bench.options, bench.device
    reason = few_rows.unavailable_reason(device)
    if reason is not None:
        raise SystemExit(f"bench_few_rows: nothing can be launched here: {reason}")
    os.environ["SEQUOIA_SINGLE_LAUNCH"] = "1"  # looked at when a model is adapted
    bench.document |= {"peaks": measure_peaks(device), "results": []}
    copy_gb_per_s = bench.document["peaks"]["copy_gb_per_s"]
    for name in options.shapes:
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(llama_config(SHAPES[name], 32000, eos_token_id=None))
        adapted = adapt(model.to(torch.bfloat16).eval())
        embedding = model.get_input_embeddings().weight.numel()
        weight_bytes = 2 * (sum(weight.numel() for weight in model.parameters()) - embedding)
        floor_us = weight_bytes / copy_gb_per_s / 1e3
        for rows in options.rows:
            graphs = graphs_of(adapted, rows, device)
            times: dict[str, list[float]] = {key: [] for key in graphs}
            for turn in range(options.rounds + 1):
                for key, graph in graphs.items():
                    ms = event_ms(graph.replay)
                    if turn:
                        times[key].append(1e3 * ms / FORWARDS)
            medians = {key: statistics.median(values) for key, values in times.items()}
            bench.document["results"].append({"shape": name, "rows": rows, "floor_us": floor_us, "us": medians})
            few, many = medians[FEW], medians[MANY]
            ratio = f"{many / few:.2f}x, {few / floor_us:.2f} times the floor"
            print(f"{name:6}{rows:4d} rows  {few:8.1f} us  torch's products {many:8.1f} us  {ratio}", flush=True)
        bench.save()
        del model, adapted


def markdown(document: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for result in document["results"]:
        few, many = (result["us"][key] for key in (FEW, MANY))
        rows.append([
            result["shape"], str(result["rows"]), f"{few:.1f}", f"{many:.1f}", f"{many / few:.2f}x",
            f"{result['floor_us']:.1f}",
        ])  # fmt: skip
    header = ["draft", "rows", f"{FEW}, us", f"{MANY}, us", "ratio", "weights once, us"]
    return "\n\n".join(["# Few rows", report.provenance(document), report.table(header, rows, left=1)]) + "\n"


OPTIONS = [
    *shared(device="auto", rounds=20, quick=False),
    option("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="default: all"),
    option("--rows", type=int, nargs="+", default=list(ROW_COUNTS), help="rows of a forward (default %(default)s)"),
]


def check(options: Any) -> str | None:
    return None if all(1 <= rows <= few_rows.MAX_ROWS for rows in options.rows) else "--rows must be in 1..32"


QUICK = {"rounds": 3, "shapes": ["68M"]}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, markdown=markdown, check=check).main


if __name__ == "__main__":
    sys.exit(main())
