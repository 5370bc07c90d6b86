"""Lookup on the demo pair: alone and beside the draft, where text repeats its prompt and where it does not.

"edit" prompts are a piece of held-out source code with its own beginning behind it, as a text to be written again;
"write" prompts are such pieces alone. Every prompt is decoded by all in turn: without speculation, by lookup alone, by
the draft (tree="auto", trees held fast), and by the draft with lookup. What lookup costs where it finds nothing is the
time of a step with the draft's tree beside that of the same loop without lookup.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.common.demo import Demo, decoding_rate, take_turns
from bench.common.script import Run, Script, shared
from sequoia_kernels import generate
from sequoia_kernels.decoding import GenerateStats


def prompts_of(demo: Demo, count: int) -> dict[str, list[torch.Tensor]]:
    """Prompts of both kinds. [1, length] each."""
    pieces = demo.encode(demo.texts(count))
    return {"edit": [torch.cat((ids, ids[:, : ids.shape[1] // 3]), dim=1) for ids in pieces], "write": pieces}


def summary(runs: Sequence[GenerateStats], plain: float) -> dict[str, Any]:
    """What several runs took and copied."""
    steps, tokens = sum(run.num_steps for run in runs), sum(sum(run.new_tokens) for run in runs)
    return {
        "tokens_per_second": decoding_rate(runs),
        "over_plain": decoding_rate(runs) / plain,
        "tokens_per_step": (tokens - len(runs)) / steps,
        "lookup_steps": sum(run.lookup_steps for run in runs) / steps,
        "copied_tokens": sum(run.copied_tokens for run in runs) / tokens,
    }


def measure(bench: Run) -> None:
    options = bench.options
    logging.getLogger("sequoia_kernels").setLevel(logging.ERROR)
    demo = Demo(bench)
    bench.document["new_tokens"] = options.new_tokens
    results = bench.document["results"] = []
    for temperature in options.temperatures:
        common = demo.decoding(temperature)

        def decoder(draft: Any, common: dict[str, Any] = common, **choices: Any) -> Any:
            def decode(ids: torch.Tensor, seed: int) -> GenerateStats:
                mask = torch.ones_like(ids)
                return generate(demo.target, draft, ids, mask, seed=seed, **common, **choices).stats

            return decode

        decoders = {
            "plain": decoder(None),
            "lookup": decoder("lookup"),
            "draft": decoder(demo.draft),
            "draft and lookup": decoder(demo.draft, lookup=True),
        }
        for kind, prompts in prompts_of(demo, options.prompts).items():
            take_turns(decoders, prompts[:2])  # measures the pair, and learns a little
            runs = take_turns(decoders, prompts, 100)
            plain = decoding_rate(runs["plain"])
            row = {name: summary(stats, plain) for name, stats in runs.items()}
            results.append({"temperature": temperature, "kind": kind, "prompts": options.prompts, **row})
            print(f"T={temperature:g}, {kind}: plain {plain:.1f} tokens/s")
            for name in list(decoders)[1:]:
                found = row[name]
                print(
                    f"  {name:17s} {found['over_plain']:.2f}x, {found['tokens_per_step']:.2f} tokens a step, "
                    f"{100 * found['copied_tokens']:.0f} % copied",
                    flush=True,
                )


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6, 1.0]),
    *shared(prompts=12, prompt_tokens=192, new_tokens=128),
]
QUICK = {"prompts": 2, "new_tokens": 24, "temperatures": [0.0]}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
