"""What a level of an EAGLE-3 head takes on a CPU, beside the bytes that it reads.

    python -m bench.tools.eagle3_levels --threads 1 --json bench/results/cpu/eagle3_levels.json

Random weights. A level reads every weight of the layer and of the head's logits once, so its time is compared with that
of reading as many bytes from memory with the same threads. Prints JSON: milliseconds for each number of rows, and what
the bytes alone take; p20 and p50 of repeats that take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sequoia_kernels._host as _host
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common.machine import command_line, commit, environment
from bench.common.script import write_json
from sequoia_kernels import TokenTree, adapt
from sequoia_kernels.drafts import DecodingState, Eagle3Draft, StageClock
from sequoia_kernels.measure.timing import quantile
from sequoia_kernels.models import TreeStep

ROWS = (1, 2, 4, 8, 16)


def write_head(folder: Path, args: argparse.Namespace) -> None:
    """Write a head of random weights in the original form."""
    width, heads, kv_heads, inner = args.width, args.width // 64, args.width // 256, args.inner
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(getattr(torch, args.dtype))

    weights = {
        "fc.weight": random(width, 3 * width), "norm.weight": random(width),
        "lm_head.weight": random(args.vocab, width),
        "midlayer.self_attn.q_proj.weight": random(heads * 64, 2 * width),
        "midlayer.self_attn.k_proj.weight": random(kv_heads * 64, 2 * width),
        "midlayer.self_attn.v_proj.weight": random(kv_heads * 64, 2 * width),
        "midlayer.self_attn.o_proj.weight": random(width, heads * 64),
        "midlayer.mlp.gate_proj.weight": random(inner, width), "midlayer.mlp.up_proj.weight": random(inner, width),
        "midlayer.mlp.down_proj.weight": random(width, inner),
    }  # fmt: skip
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        weights[f"midlayer.{name}.weight"] = random(width)
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": width, "vocab_size": args.vocab,
        "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "draft_vocab_size": args.vocab, "bos_token_id": None, "eos_token_id": None,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 1],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time levels of some numbers of rows, in turn with reading as many bytes."""
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=args.width // 64, bos_token_id=None, eos_token_id=None, dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    target = adapt(LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval())
    with tempfile.TemporaryDirectory() as folder:
        write_head(Path(folder), args)
        sources = [Eagle3Draft.from_folder(folder, target, forward=forward) for forward in ("native", "torch")]
    state = DecodingState.create(1, target.device, seeds=[0], temperature=[1.0], top_k=None, top_p=None)
    clock = StageClock(enabled=False)
    head = sources[0].head
    weights = [head.lm_head.weight]
    for layer in head.layers:
        weights += [layer.qkv.weight, layer.output.weight, layer.gate_up.weight, layer.down.weight]
    num_bytes = sum(weight.numel() * weight.itemsize for weight in weights)
    memory = torch.ones(max(num_bytes, 1 << 29) // 4)  # more than the caches hold
    instruction_set = _host.forward_instruction_set("")
    calls: dict[str, Any] = {
        "bytes": lambda: _host.read_seconds(instruction_set, memory.data_ptr(), num_bytes, args.threads)
    }
    for source in sources:
        drafting: Any = source.start(target, state, args.context + 64, backend="auto", clock=clock)
        for tensor in drafting.cache.tensors():
            tensor.normal_(generator=torch.Generator().manual_seed(0))
        for rows in ROWS:
            step = TreeStep.of(TokenTree([-1, *[0] * rows]), range(1, rows + 1))
            calls[f"{source.runs} {rows}"] = drafting.level_call(step, args.context)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(args.repeats):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    result: dict[str, Any] = {"dtype": args.dtype, "level_bytes": num_bytes}
    for name, fraction in (("p20", 0.2), ("p50", 0.5)):
        ms = {key: round(1e3 * quantile(sorted(entries), fraction), 3) for key, entries in times.items()}
        bytes_ms = ms["bytes"]
        ratios = {key: round(value / bytes_ms, 2) for key, value in ms.items() if key != "bytes"}
        result[name] = {"ms": ms, "read_gb_per_s": round(num_bytes / bytes_ms / 1e6, 2), "times_of_bytes": ratios}
    return result


def main(argv: list[str] | None = None) -> int:
    """Measure both dtypes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=2048, help="of the residual stream, a multiple of 256")
    parser.add_argument("--inner", type=int, default=8192, help="width of the MLP")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens that the head knows")
    parser.add_argument("--context", type=int, default=512, help="committed tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    document: dict[str, Any] = {
        "bench": "eagle3_levels",
        "command": command_line("bench.tools.eagle3_levels", argv),
        "commit": commit(),
        "environment": environment(),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "levels": [],
    }
    for args.dtype in ("bfloat16", "float32"):
        document["levels"].append(measure(args))
    sys.stdout.write(json.dumps(document["levels"], indent=1) + "\n")
    if args.json is not None:
        write_json(args.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
