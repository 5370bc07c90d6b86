"""The parts of a step with a DSpark draft on the CPU, against the bytes that they read: context, block, levels, draws.

    python -m bench.systems.bench_dflash --threads 1 --json dflash.json

A draft of random weights, for a target of two layers whose own forward is not timed. All parts take turns; the median
counts. Before anything is timed, the logits of the native block are compared with those of its modules, and products of
few rows with torch's. A level is what decoding does for it before its draws; "C++" and "torch" beside it are what its
last product alone takes in either.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from sequoia_kernels import TokenTree, adapt
from sequoia_kernels.drafts import DecodingState, DFlashDraft, StageClock, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.dflash.forms import HEAD_KINDS, DFlashForm, LayerSight
from sequoia_kernels.measure.calls import draft_step
from sequoia_kernels.models import FewRowsLinear

CONTEXT = 256
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 9])  # 11 nodes, 6 levels


def random_draft(target: Any, options: Any, dtype: torch.dtype) -> DFlashDraft:
    """Give a DSpark draft of random weights."""
    width, rank, layers = options.hidden_size, options.rank, options.layers
    config = Qwen3Config(
        vocab_size=options.vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(width // 128, 1), head_dim=128,
        max_position_embeddings=4096,
    )  # fmt: skip
    form = DFlashForm(
        "dspark", config, (LayerSight(),) * layers, block_size=options.block_size, mask_token_id=0, needs=(0, 1, 2),
        sample_from_anchor=True, markov_kind=options.kind, markov_rank=rank, has_confidence=False,
    )  # fmt: skip
    queries, keys = config.num_attention_heads * 128, config.num_key_value_heads * 128
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (width, 3 * width)}
    for index in range(layers):
        attention, mlp = f"layers.{index}.self_attn.", f"layers.{index}.mlp."
        shapes |= {f"{attention}{side}_proj.weight": (rows, width) for side, rows in zip("qkv", (queries, keys, keys))}
        shapes |= {f"{attention}o_proj.weight": (width, queries), f"{mlp}down_proj.weight": (width, 3 * width)}
        shapes |= {f"{mlp}{name}_proj.weight": (3 * width, width) for name in ("gate", "up")}
    shapes |= {
        "markov_head.markov_w1.weight": (options.vocab, rank),
        "markov_head.markov_w2.weight": (options.vocab, rank),
    }
    if options.kind == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, width + rank), "markov_head.gate_proj.bias": (rank,)}
    if options.kind == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + width)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    weights = {name: 0.02 * torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    norms = {"hidden_norm.weight": width, "norm.weight": width}
    for index in range(layers):
        norms |= {f"layers.{index}.self_attn.{side}_norm.weight": 128 for side in "qk"}
        norms |= {f"layers.{index}.{side}_layernorm.weight": width for side in ("input", "post_attention")}
    weights |= {name: torch.ones(size, dtype=dtype) for name, size in norms.items()}
    return DFlashDraft(form, weights, target.model.get_input_embeddings(), target.model.get_output_embeddings())


def num_bytes(tensors: Any) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.inference_mode()
def measure(bench: Run) -> None:
    options, dtype = bench.options, getattr(torch, bench.options.dtype)
    torch.manual_seed(0)
    width = options.hidden_size
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=width // 64, max_position_embeddings=4096,
    )  # fmt: skip
    target = adapt(LlamaForCausalLM(config).to(dtype).eval())
    draft = random_draft(target, options, dtype)
    backbone, heads = draft.backbone, draft.heads
    state = DecodingState.create(1, target.device, seeds=[0], temperature=[1.0], top_k=None, top_p=None)
    drafting: Any = draft.start(target, state, 2 * CONTEXT, backend="auto", clock=StageClock(enabled=False))
    drafting.prefill([0], None, None, [torch.randn(1, CONTEXT, width, dtype=dtype) for _ in range(3)])
    state.cache_lens.fill_(CONTEXT)
    layout = TreeLayout.build(TREE, "cpu")
    buffers = TokenBuffers.allocate(layout, 1, target.vocab_size, draft.logits_dtype, target.device)
    drafting.prepare(layout, buffers)

    num_levels = len(layout.levels)
    block = drafting.bound_block(num_levels)
    logits, hidden = block.run(True)
    modules = adapt(backbone.model, forward="modules")
    expected = modules.forward(drafting.tokens, drafting.cache, state.cache_lens, backbone.step)
    expected = expected.narrow(1, backbone.first_slot, num_levels)
    error = float((logits.float() - expected.float()).abs().max() / expected.float().std())
    assert error < (1e-3 if dtype == torch.float32 else 0.2), error
    slots = heads.slot_rows(hidden) if heads.mixes_hidden else None

    calls: dict[str, Callable[[], object]] = {}
    read: dict[str, int] = {}
    for rows in options.rows:
        features = [torch.randn(1, rows, width, dtype=dtype) for _ in range(3)]
        positions = state.cache_lens.to(torch.int64)[:, None] + drafting.steps[:rows]
        calls[f"context of {rows}"] = lambda features=features, positions=positions: backbone.write_context(
            drafting.cache, features, positions, positions.flatten(), drafting.rotations
        )
        read[f"context of {rows}"] = num_bytes([*backbone.fc.tensors, *backbone.own_weights[1:2]])
        calls[f"level of {rows}"] = drafting.level_call(draft_step(rows, target.device), CONTEXT)
        mixed, weight = torch.randn(rows, heads.rank, dtype=dtype), heads.w2.weight
        torch.testing.assert_close(heads.w2(mixed), F.linear(mixed, weight), rtol=2e-2, atol=2e-2 * heads.rank**0.5)
        native = FewRowsLinear(weight, most_rows=64)
        calls[f"level of {rows}, C++"] = lambda mixed=mixed, native=native: native(mixed)
        read[f"level of {rows}, C++"] = num_bytes([weight])
        calls[f"level of {rows}, torch"] = lambda mixed=mixed, weight=weight: F.linear(mixed, weight)
        read[f"level of {rows}, torch"] = num_bytes([weight])
        read[f"level of {rows}"] = num_bytes([weight] if heads.mixing is None else [weight, heads.mixing])
    in_block = [weight for name, weight in backbone.model.model.named_parameters() if "embed" not in name]
    calls["block"] = lambda: block.run(heads.mixes_hidden)
    read["block"] = num_bytes(in_block)
    level = layout.levels[1]
    rows_of_level = heads.rows(
        buffers.tokens[:, 1:3].clamp(min=0), logits[:, :1], None if slots is None else slots[:, :1],
        torch.zeros(1, 2, heads.rank, dtype=dtype),
    ).logits  # fmt: skip
    calls["draws of a level of 2"] = lambda: drafting.draw_children(level, rows_of_level, buffers)
    read["draws of a level of 2"] = num_bytes([rows_of_level])
    calls["grow 11 nodes, 6 levels"] = lambda: drafting.grow(layout, buffers)
    read["grow 11 nodes, 6 levels"] = read["block"] + len(layout.levels) * num_bytes([heads.w2.weight])

    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(options.rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    names = ("hidden_size", "layers", "vocab", "rank", "block_size", "kind", "dtype", "rounds")
    bench.document |= {name: getattr(options, name) for name in names} | {"native": backbone.model.runs}
    bench.document["results"] = [
        {"part": name, "ms": statistics.median(times[name]), "bytes": read[name]} for name in calls
    ]
    print(markdown(bench.document))


def markdown(document: dict[str, Any]) -> str:
    """Give the table of a document."""
    rows = [
        [
            entry["part"],
            f"{entry['ms']:.3f}",
            f"{entry['bytes'] / 1e6:.1f}",
            f"{entry['bytes'] / entry['ms'] / 1e6:.1f}",
        ]
        for entry in document["results"]
    ]
    return table(["part", "ms", "MB read", "GB/s"], rows)


OPTIONS = [
    *shared(threads=None, quick=False, dtype="float32", rounds=20),
    option("--hidden-size", type=int, default=1024),
    option("--layers", type=int, default=5),
    option("--vocab", type=int, default=151936),
    option("--rank", type=int, default=256, help="of the Markov head (default %(default)s)"),
    option("--kind", choices=HEAD_KINDS, default="vanilla", help="of the Markov head (default %(default)s)"),
    option("--block-size", type=int, default=8),
    option("--rows", type=int, nargs="+", default=[1, 2, 4, 8], help="accepted tokens, and nodes of a level"),
]
main = Script(
    __spec__, measure, __doc__, OPTIONS, quick={"hidden_size": 128, "layers": 2, "vocab": 1024, "rounds": 5},
    markdown=markdown,
).main  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
