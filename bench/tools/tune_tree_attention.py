"""Time other launch configurations of the Triton tree_attention than its table's, on the GPU at hand.

Starts from what `_launch_config` chooses for a case of bench_tree_attention.py and changes one thing at a time: rows of
a program, slots of a tile and of a masked tile, warps, pipeline stages, splits, the merge. A change that is faster by
more than 1 % stays. A configuration is timed only if its result is right. The table `_TILES` is then edited by hand::

    python -m bench.tools.tune_tree_attention --json results/tune_tree_attention.json
    python -m bench.tools.tune_tree_attention --nodes 16 64 --contexts 8192 32768
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.common.clocks import DeviceClock
from bench.common.harness import Case
from bench.common.script import Run, Script, option, shared
from bench.ops.bench_tree_attention import CASES, Inputs, expected, make_inputs, mismatch
from sequoia_kernels.ops import triton_device
from sequoia_kernels.ops.tree_attention import triton_launch
from sequoia_kernels.ops.tree_attention.op import OPERATOR, TreeAttentionInputs
from sequoia_kernels.ops.tree_attention.triton_launch import LaunchConfig

INPUT_SETS = 4
REPEATS = 20
GAIN = 0.99


def chosen_config(inputs: Inputs) -> LaunchConfig:
    """What the backend would take."""
    batch_size, num_nodes, num_heads, head_dim = inputs.q.shape
    _, max_slots, num_kv_heads, value_dim = inputs.v_cache.shape
    sizes = (inputs.q.element_size(), inputs.k_cache.element_size())
    traits = triton_device.device_traits(inputs.q.device)
    group = num_heads // num_kv_heads
    return triton_launch._launch_config(
        batch_size, num_nodes, num_kv_heads, group, head_dim, value_dim, *sizes, max_slots, False, traits
    )


# What is tried for each field of a launch, in this order; of the splits these are factors.
VALUES: dict[str, tuple[float, ...]] = {
    "block_rows": (16, 32, 64, 128),
    "block_slots": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "num_splits": (0, 0.5, 0.75, 1.25, 1.5, 2.0),
    "masked_slots": (32, 64),
    "masked_stages": (1, 2, 3),
    "merge_rows": (1, 2, 4, 8),
    "merge_chunk": (4, 8, 16, 32),
}


def neighbours(config: LaunchConfig, field: str) -> Iterator[LaunchConfig]:
    """Configurations that differ in one thing."""
    tile = config.tile
    for value in VALUES[field]:
        if field == "num_splits":
            yield config._replace(num_splits=max(1, round(config.num_splits * value)))
        elif field in config._fields:
            yield config._replace(**{field: value})
        elif field == "block_slots":
            yield config._replace(tile=tile._replace(block_slots=value, masked_slots=min(tile.masked_slots, value)))
        elif field != "masked_slots" or value <= tile.block_slots:
            yield config._replace(tile=tile._replace(**{field: value}))


def run(inputs: Inputs, config: LaunchConfig) -> torch.Tensor:
    """One call with a given configuration."""
    scale = inputs.q.shape[-1] ** -0.5
    given = TreeAttentionInputs(*inputs, scale, None, None, None, None, None, None, False)
    outputs = OPERATOR.new_outputs(given)
    triton_launch.run(given, outputs, config)
    return outputs.out


def time_config(
    case: Case, sets: list[Inputs], result: torch.Tensor, config: LaunchConfig, clock: DeviceClock
) -> dict[str, Any]:
    """Milliseconds in a graph with a cold L2, or the reason why there are none."""
    entry: dict[str, Any] = {"config": {**config._asdict(), "tile": config.tile._asdict()}}
    try:
        wrong = mismatch(case, sets[0], result, run(sets[0], config))
    except Exception as error:  # too much shared memory, for one: a reason like any other
        return {**entry, "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    if wrong is not None:
        return {**entry, "reason": wrong}
    samplers, reason = clock.samplers([lambda inputs=inputs: run(inputs, config) for inputs in sets], lambda: None)
    sample = samplers.get("graph_cold", samplers["eager_cold"])
    sample()
    times = [sample() for _ in range(REPEATS)]
    return {**entry, "ms": float(np.median(times)), **({} if reason is None else {"reason": reason})}


def tune(case: Case, device: torch.device, clock: DeviceClock) -> dict[str, Any]:
    """Change one field after the other and keep what is faster."""
    sets = [make_inputs(case, device, seed) for seed in range(INPUT_SETS)]
    result = expected(case, sets[0])
    best = chosen_config(sets[0])
    first = time_config(case, sets, result, best, clock)
    tried = {best: first}
    for field in VALUES:
        for config in neighbours(best, field):
            if config not in tried:
                tried[config] = time_config(case, sets, result, config, clock)
            if tried[config].get("ms", np.inf) < GAIN * tried[best].get("ms", np.inf):
                best = config
    print(f"{case.name}: {first.get('ms')} ms as chosen, {tried[best].get('ms')} ms with {best}", flush=True)
    return {"case": case.name, "chosen": first, "best": tried[best], "tried": list(tried.values())}


def measure(bench: Run) -> None:
    """Tune the cases asked for."""
    clock, options = DeviceClock(bench.device), bench.options
    bench.document["cases"] = [
        tune(case, bench.device, clock)
        for case in CASES
        if case.device == "cuda" and case["num_nodes"] in options.nodes and case["context_len"] in options.contexts
    ]


OPTIONS = [
    *shared(device="cuda"),
    option("--nodes", type=int, nargs="+", default=[1, 8, 16, 32, 64, 256, 1024]),
    option("--contexts", type=int, nargs="+", default=[8192]),
]
main = Script(__spec__, measure, __doc__, OPTIONS).main


if __name__ == "__main__":
    sys.exit(main())
