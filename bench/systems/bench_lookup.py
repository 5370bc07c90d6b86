"""Lookup alone and beside the draft, where text repeats its prompt and where it does not.

On the demo pair "edit" prompts are a piece of held-out source code with its own beginning behind it, as a text to be
written again, and "write" prompts are such pieces alone. SmolLM2 is asked to correct the spelling of texts, and with
held-out requests. Every prompt is decoded by all in turn: without speculation, by lookup alone, by the draft, and by
the draft with lookup, both with the plan of one profile and of acceptance on other prompts, so that nothing is learnt
on the way. Greedy texts are compared with plain decoding's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.demo import Demo, TrainedPair, decoding_rate, take_turns
from bench.common.script import Run, Script, option, shared
from bench.common.smollm2 import DRAFT, SmolLM2, chat, why_not
from bench.common.smollm2_prompts import EDITS, HELD_OUT
from sequoia_kernels import generate
from sequoia_kernels.decoding import GenerateStats

PAIRS: dict[str, Callable[[Run], TrainedPair]] = {"demo": Demo, "smollm2": SmolLM2}


def prompts_of(pair: TrainedPair, count: int) -> dict[str, list[torch.Tensor]]:
    """Prompts of both kinds. [1, length] each."""
    if isinstance(pair, Demo):
        pieces = pair.encode(pair.texts(count))
        return {"edit": [torch.cat((ids, ids[:, : ids.shape[1] // 3]), dim=1) for ids in pieces], "write": pieces}
    asked = {"edit": EDITS[:count], "write": HELD_OUT[:count]}
    tokenizer = pair.pair.tokenizer
    return {
        kind: [torch.tensor([ids], device=pair.target.device) for ids in chat(tokenizer, texts)]
        for kind, texts in asked.items()
    }


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
    pair = PAIRS[options.pair](bench)
    bench.document["pair"] = options.pair
    bench.document["new_tokens"] = options.new_tokens
    others = prompts_of(pair, options.prompts + options.calibration_prompts)["write"][options.prompts :]
    profile = pair.profile(pair.prompt_tokens + options.new_tokens, quick=True)
    results = bench.document["results"] = []
    for temperature in options.temperatures:
        common = pair.decoding(temperature)
        planned = {"profile": profile, "acceptance": pair.acceptance(others, temperature)}
        texts: dict[tuple[int, int], list[list[int]]] = {}  # of everybody, by prompt and seed

        def decoder(draft: Any, common: dict[str, Any] = common, texts: Any = texts, **choices: Any) -> Any:
            def decode(ids: torch.Tensor, seed: int) -> GenerateStats:
                mask = torch.ones_like(ids)
                output = generate(pair.target, draft, ids, mask, seed=seed, **common, **choices)
                texts.setdefault((ids.data_ptr(), seed), []).append(output.new_tokens[0])
                return output.stats

            return decode

        decoders = {
            "plain": decoder(None),
            "lookup": decoder("lookup", profile=profile),
            "draft": decoder(pair.draft, **planned),
            "draft and lookup": decoder(pair.draft, lookup=True, **planned),
        }
        for kind, prompts in prompts_of(pair, options.prompts).items():
            take_turns(decoders, prompts[:1])
            texts.clear()
            runs = take_turns(decoders, prompts, 100)
            plain = decoding_rate(runs["plain"])
            row: dict[str, Any] = {name: summary(stats, plain) for name, stats in runs.items()}
            where = {"temperature": temperature, "kind": kind, "prompts": len(prompts)}
            equal = [all(text == own[0] for text in own) for own in texts.values()]
            if temperature == 0:
                where["texts_equal"] = f"{sum(equal)} of {len(equal)}"
            results.append(where | row)
            print(f"T={temperature:g}, {kind}: plain {plain:.1f} tokens/s, {where.get('texts_equal', 'sampled')}")
            for name in list(decoders)[1:]:
                found = row[name]
                print(
                    f"  {name:17s} {found['over_plain']:.2f}x, {found['tokens_per_step']:.2f} tokens a step, "
                    f"{100 * found['copied_tokens']:.0f} % copied",
                    flush=True,
                )


OPTIONS = [
    option("--pair", choices=sorted(PAIRS), default="demo", help="which models"),
    option("--draft", type=Path, default=DRAFT, help="of smollm2: a model folder (default build/drafts/smollm2)"),
    option("--calibration-prompts", type=int, default=4, help="for the acceptance vector (default %(default)s)"),
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6, 1.0]),
    *shared(prompts=12, prompt_tokens=192, new_tokens=128),
]
QUICK = {"prompts": 2, "calibration_prompts": 1, "new_tokens": 24, "temperatures": [0.0]}


def check(options: Any) -> str | None:
    return why_not(options) if options.pair == "smollm2" else None


main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, check=check).main


if __name__ == "__main__":
    sys.exit(main())
