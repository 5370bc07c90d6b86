"""Train a draft of SmolLM2 on the target's own texts: what it is made of is its kind.

The target writes behind training prompts, and what its head got at each token is kept, so that its distribution is
known there without running it again. A kind makes a module of the target's parts; the loss is the Kullback-Leibler
divergence from the target's distribution, plus the share of first children that would be rejected (the total
variation), both at temperature 1. Embedding and head are the target's and stay as they are.

    python -m bench.systems.train_draft --json bench/results/cpu/train_draft_layers.json
    python -m bench.planner.bench_rules --pair smollm2

The texts are kept beside the draft and taken up by the next run that wants the same ones. Equal options give equal
drafts, unless `--minutes` ends the writing or the training before its time, which the document says.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.common import smollm2
from bench.common.distillation import MEASURES, Batch, Candidates, HeadLoss, Texts, write_texts
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.common.smollm2_prompts import CALIBRATION, training_prompts
from sequoia_kernels import adapt, estimate_acceptance, generate
from sequoia_kernels.decoding import PROBE_TREE

HELD_BACK = 0.04  # of the texts, to measure on
WRITING_TEMPERATURES = (1.0, 0.6)
FREQUENT = 3  # times that a token must be among the texts to be looked at by every step
WARMUP, DECAY = 0.05, 0.6  # of the steps: the rate rises linearly, holds, and falls to nothing


class Kind(ABC):
    """One kind of draft, made of a target's parts."""

    module: nn.Module  # in training; what the target gives and keeps needs no gradient

    @abstractmethod
    def __init__(self, target: Any, options: Namespace) -> None:
        """Make it from the target, untrained."""

    @abstractmethod
    def head_inputs(self, batch: Batch) -> Tensor:
        """Give what the head gets at the batch's written places. [written, width]"""

    @abstractmethod
    def draft(self) -> Any:
        """Give what `generate` takes as its draft."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it into a new folder."""


class LayersDraft(Kind):
    """The target's first layers with its norm, between its embedding and its head; layers and norm learn."""

    def __init__(self, target: Any, options: Namespace) -> None:
        config = copy.deepcopy(target.config)
        config.num_hidden_layers = options.layers
        self.module = type(target)(config)
        weights = self.module.state_dict()
        self.module.load_state_dict({name: tensor for name, tensor in target.state_dict().items() if name in weights})
        for embedding in (self.module.get_input_embeddings(), self.module.get_output_embeddings()):
            embedding.requires_grad_(False)

    def head_inputs(self, batch: Batch) -> Tensor:
        """Rows behind a text's end see more than they should, and nobody looks at them."""
        return self.module.model(input_ids=batch.tokens, use_cache=False).last_hidden_state[batch.written]

    def draft(self) -> Any:
        return self.module.eval()

    def save(self, folder: Path) -> None:
        copy.deepcopy(self.module).to(torch.bfloat16).save_pretrained(folder)


# New kinds plug in here.
KINDS: dict[str, type[Kind]] = {"layers": LayersDraft}


def written(target: Any, tokenizer: Any, options: Namespace, deadline: float) -> tuple[Texts, float]:
    """The texts, and the minutes that it took to write them, now or when they were written."""
    settings = json.dumps({name: getattr(options, name) for name in ("texts", "text_tokens", "seed")})
    path = options.out.with_name(options.out.name + ".texts")
    found = Texts.load(path, settings)
    if found is not None:
        print(f"texts: those of {path}", flush=True)
        return found
    started = time.perf_counter()
    prompts = smollm2.chat(tokenizer, training_prompts(options.texts, options.seed))
    with tqdm(total=len(prompts) * options.text_tokens, desc="writing", unit="tokens", mininterval=5.0) as bar:
        texts = write_texts(
            adapt(target), prompts, WRITING_TEMPERATURES, num_tokens=options.text_tokens, seed=options.seed,
            progress=bar.update, go_on=lambda: time.perf_counter() < deadline,
        )  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    if len(texts.lens) == len(prompts):
        texts.save(path, settings, minutes)
    return texts, minutes


def rate_scale(step: int, num_steps: int) -> float:
    """Share of the learning rate that a step takes."""
    done = step / num_steps
    return min(1.0, (step + 1) / (WARMUP * num_steps + 1), max(0.02, (1 - done) / DECAY))


def batches(texts: Texts, size: int, epochs: int, seed: int) -> Iterator[Batch]:
    """Every text once an epoch, `size` at a time, shuffled anew."""
    order = random.Random(seed)
    for _ in range(epochs):
        numbers = list(range(len(texts.lens)))
        order.shuffle(numbers)
        for first in range(0, len(numbers), size):
            yield Batch.of(texts, numbers[first : first + size])


@torch.no_grad()
def agreement(kind: Kind, texts: Texts, head: Tensor, size: int) -> dict[str, float]:
    """How well a draft agrees with its target, on texts that it has not learnt from."""
    sums, rows = torch.zeros(3), 0
    kind.module.eval()
    for batch in batches(texts, size, 1, 0):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drafted = kind.head_inputs(batch)
        sums += HeadLoss.apply(drafted.float(), batch.hidden, Candidates.all_of(head), (1.0, 1.0))[1]
        rows += len(batch.hidden)
    return {name: float(value) / rows for name, value in zip(MEASURES, sums)}


def fit(
    kind: Kind, texts: Texts, held_back: Texts, head: Tensor, options: Namespace, deadline: float
) -> dict[str, Any]:  # fmt: skip
    """Train, and tell how it went."""
    started = time.perf_counter()
    per_epoch = -(-len(texts.lens) // options.batch_texts)
    num_steps = per_epoch * options.epochs
    learning = [parameter for parameter in kind.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    always = texts.tokens.bincount(minlength=len(head)) >= FREQUENT
    weights = (options.divergence_weight, options.rejection_weight)
    course: list[dict[str, Any]] = [{"step": 0} | agreement(kind, held_back, head, options.batch_texts)]
    seen, since = torch.zeros(3), 0
    with tqdm(total=num_steps, desc="training", mininterval=5.0) as bar:
        for step, batch in enumerate(batches(texts, options.batch_texts, options.epochs, options.seed), 1):
            kind.module.train()
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate_scale(step - 1, num_steps)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                drafted = kind.head_inputs(batch)
            candidates = Candidates.drawn(head, always, options.sampled_tokens, generator)
            loss, sums = HeadLoss.apply(drafted.float(), batch.hidden, candidates, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen, since = seen + sums, since + len(batch.hidden)
            bar.set_postfix({name: f"{float(value) / since:.3f}" for name, value in zip(MEASURES, seen)}, refresh=False)
            bar.update()
            over = time.perf_counter() >= deadline
            if step % per_epoch == 0 or over:
                trained = {f"training_{name}": float(value) / since for name, value in zip(MEASURES, seen)}
                course.append({"step": step} | trained | agreement(kind, held_back, head, options.batch_texts))
                seen, since = torch.zeros(3), 0
            if over:
                break
    minutes = (time.perf_counter() - started) / 60
    return {"steps": step, "planned_steps": num_steps, "training_minutes": minutes, "course": course}


def acceptance(target: Any, kind: Kind, prompts: list[list[int]], new_tokens: int) -> dict[str, list[float]]:
    """Acceptance vectors of the decoding loop, greedily and at temperature 1, on prompts of no training text."""
    vectors = {}
    for temperature in (0.0, 1.0):
        common = {"max_new_tokens": new_tokens, "temperature": temperature, "eos_token_id": (), "rule": "sequoia"}
        runs = [
            generate(
                target, kind.draft(), torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                seed=number, tree=PROBE_TREE, **common,
            ).stats
            for number, ids in enumerate(prompts)
        ]  # fmt: skip
        vector = estimate_acceptance(runs, temperature=temperature).vector
        vectors[f"T={temperature:g}"] = [round(float(share), 4) for share in vector]
    return vectors


def replace(folder: Path, kind: Kind) -> None:
    """Write the draft into its folder, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    kind.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def measure(bench: Run) -> None:
    options = bench.options
    torch.manual_seed(options.seed)
    deadline = time.perf_counter() + 60 * options.minutes
    target, tokenizer = smollm2.load_target()
    texts, writing_minutes = written(target, tokenizer, options, deadline)
    kept = max(1, round((1 - HELD_BACK) * len(texts.lens)))
    held_back = texts.part(kept, len(texts.lens)) if kept < len(texts.lens) else texts
    texts = texts.part(0, kept)
    kind = KINDS[options.kind](target, options)
    head = target.get_output_embeddings().weight.detach().to(torch.bfloat16)
    names = (
        "kind",
        "layers",
        "seed",
        "texts",
        "text_tokens",
        "epochs",
        "batch_texts",
        "learning_rate",
        "sampled_tokens",
    )
    bench.document |= {name: getattr(options, name) for name in names}
    bench.document |= {
        "loss": {"divergence": options.divergence_weight, "rejection": options.rejection_weight},
        "training_tokens": texts.num_written, "held_back_tokens": held_back.num_written,
        "learning_parameters": sum(p.numel() for p in kind.module.parameters() if p.requires_grad),
        "writing_minutes": round(writing_minutes, 1),
    }  # fmt: skip
    prompts = smollm2.chat(tokenizer, CALIBRATION[: options.calibration_prompts])
    before = acceptance(target, kind, prompts, options.new_tokens)
    facts = fit(kind, texts, held_back, head, options, deadline)
    replace(options.out, kind)
    bench.document |= facts | {
        "acceptance_prompts": len(prompts), "acceptance_before": before,
        "acceptance_after": acceptance(target, kind, prompts, options.new_tokens),
    }  # fmt: skip
    show(bench.document)


def show(document: dict[str, Any]) -> None:
    """Print how the training went."""
    rows = [[str(entry["step"]), *(f"{entry[name]:.3f}" for name in MEASURES)] for entry in document["course"]]
    print(table(["step", "divergence, nats", "overlap", "same most probable token"], rows, left=0))
    if document["steps"] < document["planned_steps"]:
        print(f"ended by --minutes behind {document['steps']} of {document['planned_steps']} steps")
    for when in ("before", "after"):
        for temperature, vector in document[f"acceptance_{when}"].items():
            print(f"acceptance {when}, {temperature}: {' '.join(f'{share:.3f}' for share in vector)}", flush=True)


def problem(options: Namespace) -> str | None:
    """What is wrong with the options."""
    for name in ("layers", "texts", "text_tokens", "epochs", "batch_texts", "sampled_tokens", "calibration_prompts"):
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
    return smollm2.why_missing()


OPTIONS = [
    *shared(threads=None, quick=False),
    option("--kind", choices=tuple(KINDS), default="layers", help="what the draft is made of (default %(default)s)"),
    option("--layers", type=int, default=2, help="layers that it takes from the target (default %(default)s)"),
    option("--out", type=Path, default=smollm2.DRAFT, help="folder for the draft (default build/drafts/smollm2)"),
    option("--texts", type=int, default=1360, help="texts that the target writes (default %(default)s)"),
    option("--text-tokens", type=int, default=144, help="tokens of each, the prompt aside (default %(default)s)"),
    option("--epochs", type=int, default=8, help="times that every text is seen (default %(default)s)"),
    option("--batch-texts", type=int, default=4, help="texts of a step (default %(default)s)"),
    option(
        "--sampled-tokens",
        type=int,
        default=2048,
        help="rare tokens that a step looks at (default %(default)s)",
    ),
    option("--learning-rate", type=float, default=4e-3, help="highest one (default %(default)s)"),
    option("--divergence-weight", type=float, default=1.0, help="in the loss (default %(default)s)"),
    option("--rejection-weight", type=float, default=5.0, help="in the loss (default %(default)s)"),
    option("--calibration-prompts", default=6, help="prompts for acceptance vectors (default %(default)s)"),
    option("--new-tokens", default=96, help="tokens decoded behind those (default %(default)s)"),
    option("--minutes", type=float, default=60.0, help="time for writing and training (default %(default)s)"),
    option("--seed", type=int, default=0, help="of texts, order and prompts (default %(default)s)"),
]
QUICK = {"texts": 4, "text_tokens": 12, "epochs": 2, "batch_texts": 2, "calibration_prompts": 1, "new_tokens": 8}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, check=problem).main


if __name__ == "__main__":
    sys.exit(main())
