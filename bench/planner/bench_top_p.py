"""What moving the draft's unlikely tokens behind the others gains where top-p cuts the target: tokens per step.

The demo pair decodes held-out prompts, all in one batch. Every step is taken twice from the same state and with the
same noise, first as if the draft had not been changed; both rules decide about both trees, and the second is committed.
So steps are compared in pairs, and differ only where a child was drawn from what is moved. No times are taken.

    python -m bench.planner.bench_top_p --threads 1 --json top_p.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.common.demo import Demo
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding.step import DecodingStep
from sequoia_kernels.demo import held_out_prompts
from sequoia_kernels.drafts import unlikely
from sequoia_kernels.ops import verify_tree
from sequoia_kernels.planner import optimal_tree

RULES = ("sequoia", "traversal")
VECTORS = Path(__file__).resolve().parents[1] / "results" / "cpu" / "robustness.json"
SEED = 5


class Steps:
    """What the steps of a run came to, by request: tokens by rule and by whether the draft was changed."""

    def __init__(self, batch_size: int) -> None:
        self.steps = torch.zeros(batch_size, dtype=torch.float64)
        self.tokens = {(rule, on): torch.zeros_like(self.steps) for rule in RULES for on in (False, True)}

    @contextmanager
    def in_loop(self) -> Iterator[None]:
        """Take every step of the decoding loop twice."""
        usual, behind = DecodingStep.run, unlikely.BEHIND

        def run(step: DecodingStep, tree: Any, draft_tokens: Any = None) -> Any:
            state, (layout, buffers) = step.state, step.prepare(tree)
            scored: list[torch.Tensor] = []
            step.observer = lambda buffers, logits: scored.append(logits)
            for on in (False, True):
                unlikely.BEHIND = behind if on else 0.0
                step.draft_tokens(tree)
                path, hidden_states = step.verify_tokens(tree)
                for rule in RULES:
                    found = verify_tree(
                        buffers.tokens, scored[-1], buffers.draft_logits, layout.topology,
                        state.temperature, state.seeds, state.offsets, top_p=state.top_p, rule=rule,
                    )  # fmt: skip
                    self.tokens[rule, on] += found.num_accepted * state.active
            self.steps += state.active
            return step.commit_path(tree, path, hidden_states)

        DecodingStep.run = run  # type: ignore[method-assign]
        try:
            yield
        finally:
            DecodingStep.run, unlikely.BEHIND = usual, behind  # type: ignore[method-assign]


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    ids = demo.encode(held_out_prompts(options.prompts, 6 * demo.prompt_tokens))
    length = min(row.shape[1] for row in ids)
    prompts = torch.cat([row[:, :length] for row in ids])
    names = ("new_tokens", "prompt_tokens", "prompts", "nodes")
    bench.document |= {name: getattr(options, name) for name in names} | {"seed": SEED, "results": []}
    vectors = [row for row in json.loads(options.vectors.read_text())["vectors"] if row["top_p"] == 1]
    for temperature in options.temperatures:
        (vector, *_) = (row["vector"] for row in vectors if row["temperature"] == temperature)
        trees = {"chain of 4": TokenTree.chain(4)} | {f"{n} nodes": optimal_tree(vector, n) for n in options.nodes}
        for name, tree in trees.items():
            for top_p in options.top_ps:
                rows = at_setting(demo, prompts, tree, temperature, top_p)
                bench.document["results"] += [{"tree": name, "parents": tree.parents} | row for row in rows]
                bench.tell(f"T = {temperature:g}, top-p {top_p:g}, {name}")
                bench.save()
    print(markdown(bench.document))


def at_setting(
    demo: Demo, prompts: torch.Tensor, tree: TokenTree, temperature: float, top_p: float
) -> Iterator[dict[str, Any]]:
    """Decode all prompts; a row for each rule."""
    steps = Steps(len(prompts))
    with steps.in_loop():
        generate(
            demo.target, demo.draft, prompts, attention_mask=torch.ones_like(prompts), seed=SEED, tree=tree,
            rule="traversal", temperature=temperature, top_p=top_p, max_new_tokens=demo.new_tokens, eos_token_id=(),
            cuda_graphs=False,
        )  # fmt: skip
    for rule in RULES:
        off, on = steps.tokens[rule, False], steps.tokens[rule, True]
        ratio = float(on.sum() / off.sum())
        yield {
            "temperature": temperature, "top_p": top_p, "rule": rule, "steps": int(steps.steps.sum()),
            "off": float(off.sum() / steps.steps.sum()), "on": float(on.sum() / steps.steps.sum()), "ratio": ratio,
            "standard_error": float(((on - ratio * off) ** 2).sum().sqrt() / off.sum()),  # between prompts
        }  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """One line for a tree, a rule and a temperature; the settings of top-p beside one another."""
    top_ps = list(dict.fromkeys(row["top_p"] for row in document["results"]))
    lines: dict[Any, list[str]] = {}
    for row in document["results"]:
        key = row["temperature"], row["tree"], row["rule"]
        line = lines.setdefault(key, [f"{row['temperature']:g}", row["tree"], row["rule"]])
        line.append(f"{row['off']:.2f} to {row['on']:.2f}, {row['ratio']:.3f} ± {row['standard_error']:.3f}")
    return table(["T", "tree", "rule", *(f"top-p {top_p:g}" for top_p in top_ps)], list(lines.values()), left=3)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.6, 1.0], prompts=24),
    *shared(prompt_tokens=64, new_tokens=128),
    option("--top-ps", type=float, nargs="+", default=[0.8, 0.9, 0.95], help="default %(default)s"),
    option("--nodes", type=int, nargs="+", default=[8, 16, 32], help="sizes of the optimal trees"),
    option("--vectors", type=Path, default=VECTORS, help="bench_robustness's document, whose vectors make the trees"),
]
QUICK = {"temperatures": [1.0], "top_ps": [0.8], "nodes": [8], "prompts": 2, "prompt_tokens": 32, "new_tokens": 12}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
