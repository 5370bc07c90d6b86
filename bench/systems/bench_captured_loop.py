"""What the host costs a captured decoding loop: its steps against the same steps launched back to back.

Models of random weights decode, since only times matter. Three figures a tree:

    loop ms      wall time of a step in `generate`, prefill and capture taken out (two lengths are run and subtracted)
    device ms    wall time of a step when steps are launched one behind another and nothing is read
    host share   1 - device / loop: what reading tokens, deciding to go on and launching add. 0 means that the device
                 always has the next step when it ends one
    launches     kernels, copies and fills of a step on the device, and its time divided by them

The plain loop (no draft) is timed as well; its floor is one read of the weights at the measured copy bandwidth.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.common.clocks import count_launches
from bench.common.machine import measure_peaks, wait_for
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import Shape, llama_config
from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import DecodingEngine, DecodingStep
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.drafts import DecodingState, draft_source
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.models import TreeModel, adapt

# (target, draft) shapes: about 1B and 68M parameters on a GPU, next to nothing on a CPU
SHAPES = {
    "cuda": (Shape(2048, 16, 32, 6144, kv_heads=8), Shape(768, 2, 12, 2304)),
    "cpu": (Shape(64, 2, 4, 192, kv_heads=2), Shape(32, 1, 4, 96)),
}
NODE_COUNTS = {"cuda": (64, 128), "cpu": (8,)}
VOCAB = {"cuda": 32000, "cpu": 128}
PROMPT_TOKENS = 128
TEMPERATURE = 0.6


def random_model(shape: Shape, device: torch.device, seed: int) -> TreeModel:
    """A Llama of random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = LlamaForCausalLM(llama_config(shape, VOCAB[device.type], eos_token_id=None))
        return adapt(model.to(dtype).eval())


def loop_ms(
    target: TreeModel, draft: TreeModel | None, tree: TokenTree, prompt: torch.Tensor, steps: int, rounds: int
) -> float:
    """Milliseconds of a step in `generate`: a long run minus a short one, so that capture and prefill cancel."""

    def run(num_tokens: int, seed: int) -> tuple[float, int]:
        options = {"max_new_tokens": num_tokens, "temperature": TEMPERATURE, "eos_token_id": (), "seed": seed}
        stats = generate(target, draft, prompt, tree=tree, **options).stats
        return stats.decode_seconds, stats.num_steps

    run(8, 0)
    differences = []
    for turn in range(rounds):
        short_seconds, short_steps = run(8, turn)
        long_seconds, long_steps = run(8 + steps, turn)
        differences.append(1e3 * (long_seconds - short_seconds) / max(long_steps - short_steps, 1))
    return statistics.median(differences)


@torch.inference_mode()
def device_ms(
    target: TreeModel,
    draft: TreeModel | None,
    tree: TokenTree,
    prompt: torch.Tensor,
    steps: int,
    rounds: int,
    capacity: int,
) -> tuple[float, int | None]:
    """Milliseconds of a step when the host launches `steps` of them and reads nothing, and what one launches."""
    device = target.device
    state = DecodingState.create(1, device, seeds=[0], temperature=[TEMPERATURE], top_k=None, top_p=None)
    engine = DecodingEngine(DecodingStep(target, None if draft is None else draft_source(draft), state, capacity))
    lens = torch.tensor([prompt.shape[1]], dtype=torch.int32, device=device)
    engine.eager.prefill(prompt, lens)
    engine.step(tree)  # captures
    committed = state.cache_lens.clone()
    times = []
    for _ in range(rounds):
        state.cache_lens.copy_(committed)
        wait_for(device)
        started = time.perf_counter()
        for _ in range(steps):
            engine.step(tree)
        wait_for(device)
        times.append(1e3 * (time.perf_counter() - started) / steps)
    state.cache_lens.copy_(committed)
    launches = count_launches(lambda: engine.step(tree)) if device.type == "cuda" else None
    return statistics.median(times), launches


def cache_rows(tree: TokenTree, steps: int) -> int:
    """Rows that `steps` steps behind a few warm-ups need at most, however many tokens each of them accepts."""
    return engines.cache_bucket(PROMPT_TOKENS + (steps + 12) * tree.num_levels + tree.num_nodes, None)


def measure(device: torch.device, steps: int, rounds: int) -> list[dict[str, Any]]:
    """All trees, then the plain loop."""
    target, draft = (random_model(shape, device, seed) for seed, shape in enumerate(SHAPES[device.type]))
    prompt = torch.randint(VOCAB[device.type], (1, PROMPT_TOKENS), device=device)
    cases = [("tree", typical_tree(count), draft) for count in NODE_COUNTS[device.type]]
    cases.append(("plain", TokenTree.single(), None))
    results = []
    smallest = engines.SMALLEST_BUCKET
    for kind, tree, drafter in cases:
        # Caches of one size for all runs, short and long, in `generate` and without it: strides and the attention's
        # split of the prefix follow from it.
        rows = engines.SMALLEST_BUCKET = cache_rows(tree, steps)
        try:
            loop = loop_ms(target, drafter, tree, prompt, steps, rounds)
            alone, launches = device_ms(target, drafter, tree, prompt, steps, rounds, rows)
        finally:
            engines.SMALLEST_BUCKET = smallest
        weight_bytes = sum(p.numel() * p.element_size() for p in target.model.parameters())
        row = {"kind": kind, "nodes": tree.num_nodes, "levels": tree.num_levels, "cache_rows": rows}
        row |= {"loop_ms": loop, "device_ms": alone, "host_share": 1 - alone / loop, "weight_bytes": weight_bytes}
        row |= {"launches": launches, "forwards": target.runs}
        results.append(row)
    return results


def run(bench: Run) -> None:
    peaks = measure_peaks(bench.device)
    results = measure(bench.device, bench.options.steps, bench.options.rounds)
    bench.document |= {"device_type": bench.device.type, "peaks": peaks, "results": results}
    for entry in results:
        floor_ms = entry["weight_bytes"] / (peaks["copy_gb_per_s"] * 1e6)
        entry["weights_floor_ms"] = floor_ms
        print(
            f"{entry['kind']:<6}{entry['nodes']:5d} nodes  loop {entry['loop_ms']:8.3f} ms  device "
            f"{entry['device_ms']:8.3f} ms  host {100 * entry['host_share']:5.1f} %  weights once {floor_ms:7.3f} ms"
            + (
                f"  {entry['launches']} launches, {1e3 * entry['device_ms'] / entry['launches']:.2f} us each"
                if entry["launches"]
                else ""
            )
        )


OPTIONS = [
    *shared(device="auto", quick=False, rounds=5),
    option("--steps", type=int, default=50, help="steps in a row (default %(default)s)"),
]
main = Script(__spec__, run, __doc__, OPTIONS, quick={"rounds": 2}).main


if __name__ == "__main__":
    sys.exit(main())
