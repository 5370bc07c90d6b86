"""What the host costs a captured decoding loop: its steps against the same steps launched back to back.

Models of random weights decode, since only times matter. Three figures a tree:

    loop ms      wall time of a step in `generate`, prefill and capture taken out (two lengths are run and subtracted)
    device ms    wall time of a step when steps are launched one behind another and nothing is read
    host share   1 - device / loop: what reading tokens, deciding to go on and launching add. 0 means that the device
                 always has the next step when it ends one
    launches     kernels, copies and fills of a step on the device, and the step's time divided by them; --kernels shows
                 which

The plain loop (no draft) is timed as well; its floor is one read of the weights at the measured copy bandwidth.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.common.clocks import launched_kernels
from bench.common.machine import measure_peaks, wait_for
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import PAIRS, Shape, llama_config, synthetic_pair
from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import DecodingEngine, DecodingStep
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.drafts import DecodingState, draft_source
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.models.adapter import FORWARDS

# (target, draft) shapes: about 1B and 68M parameters on a GPU, next to nothing on a CPU
SHAPES = {
    "cuda": (Shape(2048, 16, 32, 6144, kv_heads=8), Shape(768, 2, 12, 2304)),
    "cpu": (Shape(64, 2, 4, 192, kv_heads=2), Shape(32, 1, 4, 96)),
}
NODE_COUNTS = {"cuda": (64, 128), "cpu": (8,)}
VOCAB = {"cuda": 32000, "cpu": 128}
PROMPT_TOKENS = 128
TEMPERATURE = 0.6


def random_model(shape: Shape, device: torch.device, seed: int, forward: str = "auto") -> TreeModel:
    """A Llama of random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = LlamaForCausalLM(llama_config(shape, VOCAB[device.type], eos_token_id=None))
        return adapt(model.to(dtype).eval(), forward=forward)


def models(device: torch.device, pair: str | None, forward: str) -> tuple[TreeModel, TreeModel]:
    """Target and draft: of the device's shapes, or a pair of known ones."""
    if pair is None:
        target, draft = (random_model(shape, device, seed, forward) for seed, shape in enumerate(SHAPES[device.type]))
        return target, draft
    made = synthetic_pair(PAIRS[pair], torch.bfloat16, device)
    for model in (made.target, made.draft):
        model.generation_config.eos_token_id = None
    return adapt(made.target, forward=forward), adapt(made.draft, forward=forward)


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
) -> tuple[float, list[dict[str, Any]]]:
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
    kernels = launched_kernels(lambda: engine.step(tree)) if device.type == "cuda" else []
    return statistics.median(times), kernels


def cache_rows(tree: TokenTree, steps: int) -> int:
    """Rows that `steps` steps behind a few warm-ups need at most, however many tokens each of them accepts."""
    return engines.cache_bucket(PROMPT_TOKENS + (steps + 12) * tree.num_levels + tree.num_nodes, None)


def measure(
    device: torch.device, steps: int, rounds: int, pair: str | None = None, forward: str = "auto"
) -> list[dict[str, Any]]:
    """All trees, then the plain loop."""
    target, draft = models(device, pair, forward)
    prompt = torch.randint(target.vocab_size, (1, PROMPT_TOKENS), device=device)
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
            alone, kernels = device_ms(target, drafter, tree, prompt, steps, rounds, rows)
        finally:
            engines.SMALLEST_BUCKET = smallest
        weight_bytes = sum(p.numel() * p.element_size() for p in target.model.parameters())
        row = {"kind": kind, "nodes": tree.num_nodes, "levels": tree.num_levels, "cache_rows": rows}
        row |= {"loop_ms": loop, "device_ms": alone, "host_share": 1 - alone / loop, "weight_bytes": weight_bytes}
        row |= {"forwards": target.runs, "launches": sum(kernel["launches"] for kernel in kernels), "kernels": kernels}
        results.append(row)
    return results


def run(bench: Run) -> None:
    peaks = measure_peaks(bench.device)
    options = bench.options
    results = measure(bench.device, options.steps, options.rounds, options.pair, options.forward)
    bench.document |= {"device_type": bench.device.type, "peaks": peaks, "results": results}
    for entry in results:
        floor_ms = entry["weight_bytes"] / (peaks["copy_gb_per_s"] * 1e6)
        entry["weights_floor_ms"] = floor_ms
        launches = max(entry["launches"], 1)
        each = f"{launches} launches, {1e3 * entry['device_ms'] / launches:.2f} us each"
        print(
            f"{entry['kind']:<6}{entry['nodes']:5d} nodes  loop {entry['loop_ms']:8.3f} ms  device "
            f"{entry['device_ms']:8.3f} ms  host {100 * entry['host_share']:5.1f} %  weights once {floor_ms:7.3f} ms  "
            f"{entry['forwards']} forwards  {each if entry['launches'] else ''}".rstrip()
        )
        for kernel in entry["kernels"][: options.kernels]:
            mean = kernel["us"] / kernel["launches"]
            print(f"  {kernel['us'] / 1e3:8.3f} ms = {kernel['launches']:4d} x {mean:7.2f} us  {kernel['name'][:90]}")


OPTIONS = [
    *shared(device="auto", quick=False, rounds=5),
    option("--steps", type=int, default=50, help="steps in a row (default %(default)s)"),
    option("--pair", choices=tuple(PAIRS), help="known shapes, in bfloat16, instead of small ones"),
    option("--forward", choices=FORWARDS, default="auto", help="what runs forwards; see adapt (default %(default)s)"),
    option("--kernels", type=int, default=0, metavar="N", help="print the kernels that take most of a step (on a GPU)"),
]
main = Script(__spec__, run, __doc__, OPTIONS, quick={"rounds": 2}).main


if __name__ == "__main__":
    sys.exit(main())
