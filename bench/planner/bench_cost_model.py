"""Composed forward times against measured ones, for models of which the planner is given the configuration only.

Microbenchmarks and whole forwards of random weights take turns in the same shuffled rounds, so that drift and
neighbours hit both alike; then the cost model composes the forwards from the microbenchmarks and each model's
configuration, and medians are compared at every number of nodes.

Microbenchmarks are those of the default grid of shapes, or with --own-shapes of the models' own shapes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import PAIRS, Shape, llama_config
from sequoia_kernels.cuda_graphs import as_replay
from sequoia_kernels.measure import calls, time_calls
from sequoia_kernels.measure.microbenchmarks import Microbenchmarks
from sequoia_kernels.models import adapt
from sequoia_kernels.planner import DeviceFingerprint, HardwareProfile, ModelFingerprint
from sequoia_kernels.planner.compose import compose_forwards
from sequoia_kernels.planner.cost_model import MonotoneGrid

NODE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
QUICK_NODE_COUNTS = (1, 8, 64)
QUICK_ROWS = (1, 4, 8, 16, 64)


# name: configuration, dtype
CPU_MODELS = {
    "demo target 24x128": (llama_config(Shape(128, 24, 4, 384), 512), "float32"),
    "134M 12x768": (llama_config(Shape(768, 12, 12, 2048), 32000), "float32"),
    "374M 24x1024": (llama_config(PAIRS["350M/8M"].target, 32000), "bfloat16"),
}
QUICK_MODELS = {"demo target 24x128": CPU_MODELS["demo target 24x128"]}
CUDA_MODELS = {
    "68M 2x768": (llama_config(PAIRS["7B/68M"].draft, 32000), "bfloat16"),
    "1.3B 24x2048": (llama_config(PAIRS["33B/1.3B"].draft, 32000), "bfloat16"),
    "Llama-2-7B 32x4096": (llama_config(PAIRS["7B/68M"].target, 32000), "bfloat16"),
}


def forwards(
    configs: dict[str, LlamaConfig],
    dtype: torch.dtype,
    device: torch.device,
    node_counts: tuple[int, ...],
    context: int,
) -> dict[Hashable, Callable[[], object]]:
    """Build every model and its timed forwards."""
    found: dict[Hashable, Callable[[], object]] = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        with device:
            model = adapt(AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval())
        cache = model.new_cache(1, context + node_counts[-1])
        for tensor in cache.tensors():
            tensor.normal_(generator=torch.Generator(device).manual_seed(0))
        for count in node_counts:
            call = calls.forward_call(model, cache, context, calls.target_step(count, device))
            found[name, count] = as_replay(call, device)
    return found


def run(bench: Run) -> None:
    options, device = bench.options, bench.device
    models = QUICK_MODELS if options.quick else CUDA_MODELS if device.type == "cuda" else CPU_MODELS
    if options.models:
        models = {name: entry for name, entry in models.items() if name.startswith(tuple(options.models))}
    node_counts = QUICK_NODE_COUNTS if options.quick else NODE_COUNTS
    own_shapes = options.own_shapes or options.quick
    profile = HardwareProfile(DeviceFingerprint.of(device))
    measured: dict[Any, Any] = {}
    for dtype_name in dict.fromkeys(dtype for _, dtype in models.values()):
        dtype = getattr(torch, dtype_name)
        configs = {name: config for name, (config, wanted) in models.items() if wanted == dtype_name}
        shapes = [ModelFingerprint.from_config(config, dtype) for config in configs.values()] if own_shapes else []
        with torch.inference_mode():
            parts = Microbenchmarks(device, dtype, shapes, ops=False, rows=QUICK_ROWS if options.quick else None)
            whole = forwards(configs, dtype, device, node_counts, options.context)
            timed = {**parts.calls, **whole}
            effort = {"min_repeats": options.rounds, "max_repeats": options.rounds, "seconds": 0}
            if options.quick:
                effort = {"min_repeats": 2, "max_repeats": 5, "seconds": 2}
            times = time_calls(timed, device, **effort, warmup=1, turns=parts.turns)
        for op, points in parts.points(times).items():
            profile = profile.with_op(op, points)
        measured.update({key: times[key] for key in whole})
    if options.profile:
        profile.save(options.profile)

    results = []
    for name, (config, dtype_name) in models.items():
        fingerprint = ModelFingerprint.from_config(config, dtype_name)
        composed = MonotoneGrid(*compose_forwards(profile, fingerprint, batch_size=1))
        for count in node_counts:
            time = measured[name, count]
            predicted = float(composed.at(options.context, count))
            row = {"model": name, "dtype": dtype_name, "nodes": count, "composed_ms": predicted}
            row["measured_ms"] = {"p20": time.p20_ms, "p50": time.p50_ms, "p80": time.p80_ms}
            results.append(row | {"error": predicted / time.p50_ms - 1})
    shapes = "own shapes" if own_shapes else "default grid"
    bench.document |= {"context_len": options.context, "microbenchmarks": shapes, "rounds": options.rounds}
    bench.document["results"] = results
    print(markdown(bench.document))


def markdown(document: dict[str, Any]) -> str:
    results = document["results"]
    models, node_counts = (list(dict.fromkeys(entry[key] for entry in results)) for key in ("model", "nodes"))
    cells = {(entry["model"], entry["nodes"]): entry for entry in results}
    rows = []
    for count in node_counts:
        row = [str(count)]
        for name in models:
            entry = cells[name, count]
            row += [f"{entry['composed_ms']:.2f}", f"{entry['measured_ms']['p50']:.2f}"]
            row += [f"{100 * entry['error']:+.0f} %"]
        rows.append(row)
    header = ["nodes"] + [f"{name}: {what}" for name in models for what in ("composed ms", "measured ms", "error")]
    head = f"## cost_model\n\n{document['environment']['device']['name']}, `{document['command']}`\n"
    lines = [head, table(header, rows), ""]
    for name in models:
        errors = [abs(entry["error"]) for entry in results if entry["model"] == name]
        within = sum(error <= 0.15 for error in errors)
        middle, largest = 100 * statistics.median(errors), 100 * max(errors)
        lines.append(
            f"- {name}: {within} of {len(errors)} sizes within 15 %, median {middle:.1f} %, largest {largest:.1f} %"
        )
    return "\n".join(lines)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, rounds=5),
    option("--context", type=int, default=512, help="committed tokens (default %(default)s)"),
    option("--own-shapes", action="store_true", help="microbenchmarks of the models' own shapes"),
    option("--models", nargs="+", metavar="NAME", help="only the models whose names begin so"),
    option("--profile", type=Path, help="also save the microbenchmarks as a profile"),
]
main = Script(__spec__, run, __doc__, OPTIONS, markdown=markdown).main


if __name__ == "__main__":
    sys.exit(main())
