"""Offloaded decoding: what the link gives, what a large tree makes of it, and that the text stays the same.

Three parts, on synthetic pairs (`synthetic_pair.py`): random weights, real acceptance. More in docs/offloading.md.

    stream   passes over the streamed layers alone, against the measured copy bandwidth; forwards over trees of several
             sizes against the same forwards of the resident twin: are those hidden that are shorter than the copies?
    speedup  a target of Llama-2-70B's shape, its layers streamed from two shared host blocks: the tree of the paper's
             size and the planner's pick against the own offloaded autoregressive loop
    twin     a target of a 13B shape, every layer with weights of its own: token for token what its resident twin gives

A step's time is that of steady decoding over the same link; tokens per step are those of a longer text that the
resident twin decodes, whose beginning the offloaded run must repeat. On a CPU everything is scaled down, and the link
is simulated::

    python -m bench.systems.bench_offload --json out.json
    python -m bench.systems.bench_offload --device cuda --parts stream speedup --json out.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.common.machine import free_memory, wait_for
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import (
    PAIRS,
    Goal,
    PairShape,
    Shape,
    SyntheticPair,
    meet_goal,
    random_texts,
    synthetic_pair,
)
from sequoia_kernels import TokenTree, generate, measure_profile, plan_tree
from sequoia_kernels.measure import calls, measure_bandwidth, time_calls
from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.offload import CudaLink, OffloadedModel, ThreadLink, random_offloaded

PARTS = ("stream", "speedup", "twin")
TEMPERATURE = 0.0
PROMPT_TOKENS = 64
GOAL_ROUNDS = 6  # calibrations at most, each corrected by what the loop then measured


class Setting(NamedTuple):
    """Everything that differs between devices."""

    label: str  # what was run, for the reader
    shape: PairShape  # target and draft of `stream` and `speedup`
    twin_shape: PairShape  # those of `twin`
    goal: Goal  # tokens per step on the best tree of a size
    dtype: torch.dtype  # of all models
    budget: str | None  # device memory of the target in `stream` and `speedup`; None keeps no layer
    twin_budget: str | None  # the same for `twin`
    node_counts: tuple[int, ...]  # trees that forwards are timed for
    plain_steps: int  # steps of the autoregressive loop
    tree_tokens: int  # tokens decoded with each tree
    check_tokens: int  # tokens that the resident twin decodes
    calibration_rows: int  # tokens of a calibration text
    rounds: int  # passes that are timed
    profile_seconds: float  # time for the planner's profile
    part_seconds: tuple[float, float, float]  # about what the parts take, in their order
    link_bytes_per_s: float | None = None  # rate of the simulated link; None measures the device's own


SMALL = PairShape(Shape(128, 12, 4, 256), Shape(32, 1, 2, 64), vocab=1024)
CUDA = Setting(
    "Llama-2-70B shape with a 7B-shaped draft, bfloat16; streamed layers share two host blocks",
    PAIRS["70B/7B"], PAIRS["13B/68M"], Goal(10.30, 768, 18), torch.bfloat16, "20GiB", "8GiB", (1, 64, 256, 768, 1024),
    plain_steps=8, tree_tokens=80, check_tokens=600, calibration_rows=1088, rounds=3, profile_seconds=40.0,
    part_seconds=(120.0, 240.0, 90.0),  # by arithmetic: 2 to 3 s a pass
)  # fmt: skip
CPU = Setting(
    "scaled down: 12 layers of 128, float32, over a simulated link; says nothing about a GPU",
    SMALL, SMALL, Goal(10.30, 768, 18), torch.float32, None, None, (1, 64, 256, 768),
    plain_steps=12, tree_tokens=100, check_tokens=400, calibration_rows=448, rounds=3, profile_seconds=10.0,
    part_seconds=(20.0, 90.0, 25.0), link_bytes_per_s=2e7,
)  # fmt: skip
QUICK = {"plain_steps": 4, "tree_tokens": 16, "check_tokens": 80, "rounds": 2, "profile_seconds": 1.0}
QUICK_CPU = QUICK | {"goal": Goal(4.0, 48, 8), "node_counts": (1, 16, 48), "link_bytes_per_s": 1.5e8}
QUICK_CPU |= {"part_seconds": (5.0, 10.0, 5.0)}


def median_ms(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of a call in a row of them; the first, which starts with filled buffers, does not count."""

    def call_and_wait() -> None:
        call()
        wait_for(device)

    once = {"pass": call_and_wait}
    return time_calls(once, "cpu", min_repeats=rounds, max_repeats=rounds, seconds=0, warmup=1)["pass"].p50_ms


def link_rate(setting: Setting, device: torch.device) -> dict[str, Any]:
    """GB/s from the host to the device with one stream and with two; None, with a reason, where there is no link."""
    if setting.link_bytes_per_s is not None:
        reason = "the link is simulated, with one stream; a real one is measured on CUDA"
        rates = {"host_to_device": setting.link_bytes_per_s / 1e9, "host_to_device_two_streams": None}
        return {**rates, "simulated": True, "reason": reason}
    found = measure_bandwidth(device, seconds=2.0)
    return {name: found[name] for name in ("host_to_device", "host_to_device_two_streams")} | {"simulated": False}


def offload(
    pair: SyntheticPair, setting: Setting, device: torch.device, budget: str | None, shared: bool, max_cache_len: int
) -> OffloadedModel:
    """Copy a pair's target into host memory, layer by layer, and stream it from there."""
    weights = dict(pair.target.named_parameters(remove_duplicate=False))
    layers, stem = pair.shape.target.layers, pair.shape.draft.layers
    sizes = {"device_memory_budget": budget, "max_cache_len": max_cache_len, "max_rows": max(setting.node_counts)}
    model = random_offloaded(
        pair.target.config,
        fill=lambda name, tensor: tensor.copy_(weights[name]),
        share_host_layers=[0] * stem + [stem] * (layers - stem) if shared else False,
        link=ThreadLink(setting.link_bytes_per_s) if setting.link_bytes_per_s is not None else CudaLink(device),
        **sizes,
        device=device,
        dtype=setting.dtype,
    )
    # Rotary frequencies are computed on the host here and on the device there, a bit apart: one table for both.
    pair.target.model.rotary_emb = model.model.model.rotary_emb
    return model


def prompt_of(shape: PairShape, device: torch.device) -> torch.Tensor:
    """Random tokens. [1, PROMPT_TOKENS]."""
    return random_texts(shape, PROMPT_TOKENS, 1, device, seed=1)[0][None]


def decode(
    target: TreeModel, draft: Any, prompt: torch.Tensor, tree: TokenTree | None, num_tokens: int, graphs: bool = True
) -> tuple[list[int], Any]:
    """Decode with our loop. Returns (new tokens, statistics)."""
    options = {"max_new_tokens": num_tokens, "temperature": TEMPERATURE, "eos_token_id": (), "cuda_graphs": graphs}
    output = generate(target, draft, prompt, **options, **({} if tree is None else {"tree": tree}))
    return output.new_tokens[0], output.stats


def step_ms(stats: Any) -> float:
    """Milliseconds of a step."""
    return 1e3 * stats.decode_seconds / stats.num_steps


# ---- stream


@torch.inference_mode()
def measure_stream(pair: SyntheticPair, setting: Setting, device: torch.device, link: dict[str, Any]) -> dict[str, Any]:
    """Passes without compute, and forwards with it, beside the resident twin's."""
    context_len = PROMPT_TOKENS
    rows = context_len + max(setting.node_counts)
    twin = adapt(pair.target, forward="modules")  # as its layers run when they stream
    free_memory(device)
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with offload(pair, setting, device, setting.budget, shared=True, max_cache_len=rows) as model:
        streamer = model.streamer
        assert streamer is not None  # a budget that holds all layers streams nothing

        def one_pass() -> None:
            for layer in range(len(streamer.layers)):
                streamer.acquire(layer)
            streamer.release()

        caches = [each.new_cache(1, rows) for each in (model, twin)]
        transfer_ms = 1e3 * model.memory.streamed_bytes / (1e9 * link["host_to_device"])
        stream_ms = median_ms(one_pass, device, setting.rounds)
        found: dict[str, Any] = {"streamed_layers": len(model.memory.streamed)}
        found |= {name: getattr(model.memory, name) for name in ("streamed_bytes", "host_bytes", "budget_bytes")}
        found |= {"planned_bytes": model.memory.total_bytes, "transfer_ms": transfer_ms, "stream_ms": stream_ms}
        found |= {"share_of_bandwidth": transfer_ms / stream_ms, "forwards": []}
        for nodes in setting.node_counts:
            step = calls.target_step(nodes, device)
            pass_ms, compute_ms = (
                median_ms(calls.forward_call(each, cache, context_len, step), device, setting.rounds)
                for each, cache in zip((model, twin), caches)
            )
            entry = {"nodes": nodes, "pass_ms": pass_ms, "compute_ms": compute_ms}
            entry["over_the_longer"] = pass_ms / max(stream_ms, compute_ms)
            found["forwards"].append(entry | {"over_their_sum": pass_ms / (stream_ms + compute_ms)})
        if device.type == "cuda":  # without the twin's cache, which is not the offloaded model's
            other = sum(tensor.numel() * tensor.element_size() for tensor in caches[1].tensors())
            found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before - other
    return found


# ---- speedup


def measure_speedup(
    pair: SyntheticPair, setting: Setting, device: torch.device, link: dict[str, Any]
) -> dict[str, Any]:
    """The tree of the paper's size and the planner's pick over the offloaded autoregressive loop."""
    prompt = prompt_of(pair.shape, device)
    twin, draft = adapt(pair.target, forward="modules"), adapt(pair.draft)

    def loop(tree: TokenTree) -> float:
        return decode(twin, draft, prompt, tree, setting.check_tokens, graphs=False)[1].tokens_per_step

    texts = random_texts(pair.shape, setting.calibration_rows, 1, device, seed=2)
    acceptance = meet_goal(pair, setting.goal, TEMPERATURE, texts, loop, GOAL_ROUNDS)
    tree = setting.goal.tree(acceptance.vector)
    longest = PROMPT_TOKENS + setting.check_tokens + 2 * max(setting.node_counts)
    with offload(pair, setting, device, setting.budget, shared=True, max_cache_len=longest) as model:
        sizes = {"context_lens": (PROMPT_TOKENS,), "node_counts": setting.node_counts}
        profile = measure_profile(model, draft, **sizes, seconds=setting.profile_seconds, min_repeats=2)
        # The loop's own overhead stays at 0: it is next to nothing beside a pass, and takes many passes to measure.
        context_len = PROMPT_TOKENS + setting.tree_tokens // 2
        plan = plan_tree(acceptance, profile, context_len=context_len, temperature=TEMPERATURE)
        plain_tokens, plain = decode(model, None, prompt, None, setting.plain_steps + 1)
        found: dict[str, Any] = {"goal": setting.goal.value, "acceptance": list(acceptance.vector)}
        found |= {"divergence": pair.divergence, "plain_step_ms": step_ms(plain), "trees": []}
        for name, shape in (("the paper's size", tree), ("planned", plan.tree)):
            wanted, long_stats = decode(twin, draft, prompt, shape, setting.check_tokens, graphs=False)
            got, stats = decode(model, draft, prompt, shape, setting.tree_tokens)
            ratio = step_ms(plain) / step_ms(stats)
            found["trees"].append(
                {
                    "name": name,
                    "nodes": shape.num_nodes,
                    "levels": shape.num_levels,
                    "step_ms": step_ms(stats),
                    "tokens_per_step": long_stats.tokens_per_step,
                    "tokens_per_step_in_the_timed_run": stats.tokens_per_step,
                    "speedup": ratio * long_stats.tokens_per_step,
                    "speedup_at_goal": ratio * setting.goal.value if name == "the paper's size" else None,
                    "predicted_speedup": plan.speedup if name == "planned" else None,
                    "equals_the_resident_twin": got == wanted[: len(got)],
                    "begins_as_the_plain_output": plain_tokens == wanted[: len(plain_tokens)],
                }
            )
    return found


# ---- twin


def measure_twin(setting: Setting, device: torch.device) -> dict[str, Any]:
    """A model with weights of its own in every layer, and its resident twin."""
    pair = synthetic_pair(setting.twin_shape, setting.dtype, device, seed=3)
    pair.set_divergence(0.3)
    prompt = prompt_of(pair.shape, device)
    tree = calls.typical_tree(min(64, max(setting.node_counts)))
    draft = adapt(pair.draft)
    rows = PROMPT_TOKENS + 2 * setting.tree_tokens + tree.num_nodes + 64
    with offload(pair, setting, device, setting.twin_budget, shared=False, max_cache_len=rows) as model:
        outputs = {
            name: [
                decode(model_, draft_, prompt, tree_, count, graphs=False)
                for model_ in (model, adapt(pair.target, forward="modules"))
            ]
            for name, draft_, tree_, count in (
                ("tree", draft, tree, setting.tree_tokens),
                ("plain", None, None, setting.plain_steps),
            )
        }
        memory = model.memory
    found: dict[str, Any] = {"parameters": pair.target.num_parameters(), "streamed_bytes": memory.streamed_bytes}
    found |= {"host_bytes": memory.host_bytes, "runs": []}
    for name, ((got, stats), (wanted, twin_stats)) in outputs.items():
        first = next((index for index, (one, other) in enumerate(zip(got, wanted)) if one != other), None)
        entry = {"name": name, "tokens": len(got), "equal": got == wanted, "first_difference": first}
        found["runs"].append(entry | {"step_ms": step_ms(stats), "resident_step_ms": step_ms(twin_stats)})
    return found


# ---- the script


def describe(name: str, part: dict[str, Any], link: dict[str, Any]) -> list[str]:
    """A part's lines for people."""
    if name == "stream":
        lines = [
            f"stream: {part['streamed_layers']} layers, {part['streamed_bytes'] / 1e9:.2f} GB a pass in "
            f"{part['stream_ms']:.0f} ms, {100 * part['share_of_bandwidth']:.1f} % of {link['host_to_device']:.2f} GB/s"
        ]
        for entry in part["forwards"]:
            lines.append(
                f"  {entry['nodes']:5d} nodes  pass {entry['pass_ms']:8.1f} ms  compute alone "
                f"{entry['compute_ms']:8.1f} ms  pass / longer of the two {entry['over_the_longer']:.3f}"
            )
        return lines
    if name == "speedup":
        lines = [f"speedup: autoregressive step {part['plain_step_ms']:.1f} ms"]
        for entry in part["trees"]:
            same = "equal to" if entry["equals_the_resident_twin"] else "NOT equal to"
            lines.append(
                f"  {entry['name']}: {entry['nodes']} nodes, {entry['levels']} levels, {entry['step_ms']:.1f} ms, "
                f"{entry['tokens_per_step']:.2f} tokens per step, {entry['speedup']:.2f}x; text {same} the resident "
                "twin's"
            )
        return lines
    return [f"twin: {part['parameters']:,} parameters, {part['host_bytes'] / 1e9:.2f} GB on the host"] + [
        f"  {run['name']}: {run['tokens']} tokens, "
        + ("equal to" if run["equal"] else f"first different at {run['first_difference']} from")
        + f" the resident twin's; step {run['step_ms']:.1f} ms, resident {run['resident_step_ms']:.1f} ms"
        for run in part["runs"]
    ]


def run(bench: Run) -> None:
    options, device, document = bench.options, bench.device, bench.document
    setting = CUDA if device.type == "cuda" else CPU
    if options.quick:
        setting = setting._replace(**(QUICK if device.type == "cuda" else QUICK_CPU))
    began = time.perf_counter()
    document |= {"device_type": device.type, "label": setting.label, "link": link_rate(setting, device)}
    document |= {"parts": {}, "skipped": {}}
    print(f"{setting.label}\nlink: {document['link']}")
    if device.type == "cpu":
        document["skipped"]["rows of a GPU"] = "need a CUDA device: its link, its memory, 70B and 13B shapes"
    pair: SyntheticPair | None = None
    for name in options.parts:
        needed = setting.part_seconds[PARTS.index(name)]
        left = float("inf") if options.seconds is None else options.seconds - (time.perf_counter() - began)
        if left < needed:
            document["skipped"][name] = f"takes about {needed:.0f} s, {max(left, 0):.0f} are left"
        elif name == "twin":
            pair = None  # its memory is needed
            free_memory(device)
            document["parts"][name] = measure_twin(setting, device)
        else:
            if pair is None:
                pair = synthetic_pair(setting.shape, setting.dtype, device, share_layers=True)
            measure = measure_stream if name == "stream" else measure_speedup
            document["parts"][name] = measure(pair, setting, device, document["link"])
        for line in describe(name, document["parts"][name], document["link"]) if name in document["parts"] else []:
            print(line, flush=True)
        bench.save()
    for name, reason in document["skipped"].items():
        print(f"skipped: {name}: {reason}")


OPTIONS = [
    *shared(device="auto", quick=False, seconds=None),
    option("--parts", nargs="+", choices=PARTS, default=list(PARTS)),
]
main = Script(__spec__, run, __doc__, OPTIONS).main


if __name__ == "__main__":
    sys.exit(main())
