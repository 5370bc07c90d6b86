"""Train a draft of SmolLM2 on the target's own texts: what it is made of is its kind.

The target writes behind training prompts, and what its head got at each token is kept, so that its distribution is
known there without running it again; where the kind reads further hidden states, they are kept as well. The loss is
the Kullback-Leibler divergence from the target's distribution, plus the share of first children that would be rejected
(the total variation). Embedding and head are the target's and stay as they are.

    layers   a language model: the target's first layers and its norm; at temperature 1, over the whole vocabulary
    eagle3   an EAGLE-3 head of one layer, unrolled over a few levels (`bench/common/eagle3_training.py`)
    dspark   a DSpark draft, all slots of random blocks at once (`bench/common/dspark_training.py`)

The last two know the tokens that the target writes most often, are compared at several temperatures
(`bench/common/head_loss.py`), and are written in the forms that such heads are published in.

    python -m bench.systems.train_draft --json bench/results/cpu/train_draft_layers.json
    python -m bench.planner.bench_rules --pair smollm2

The texts are kept beside the draft and taken up by the next run that wants the same ones. Equal options and equally
many threads give equal drafts, unless `--minutes` ends the writing or the training before its time, which the document
says. The document lies in the draft's folder, too, as training.json.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import statistics
import sys
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from tqdm import tqdm

from bench.common import smollm2
from bench.common.distillation import MEASURES, Batch, Candidates, HeadLoss, Texts, write_texts
from bench.common.dspark_training import DSparkModule, draw_anchors
from bench.common.eagle3_training import Eagle3Module, default_layers
from bench.common.head_loss import RowsLoss, Wanted, frequent_tokens, with_normalisers
from bench.common.report import table
from bench.common.script import Run, Script, option, shared, write_json
from bench.common.smollm2_prompts import CALIBRATION, training_prompts
from sequoia_kernels import adapt, estimate_acceptance, generate
from sequoia_kernels.decoding import probe_tree
from sequoia_kernels.drafts import DraftSource, draft_from_folder

HELD_BACK = 0.04  # of the texts, to measure on
WRITING_TEMPERATURES = (1.0, 0.6)
FREQUENT = 3  # times that a token must be among the texts to be looked at by every step
HEADS = {"batch_texts": 2, "learning_rate": 3e-3}
LOSS_STEPS = 20  # whose losses the document has as one number
WARMUP, DECAY = 0.05, 0.6  # of the steps: the rate rises linearly, holds, and falls to nothing


class Kind(ABC):
    """One kind of draft, made of a target's parts.

    Attributes:
        module: in training; what the target gives and keeps needs no gradient.
        measures: what `compare` measures.
        defaults: of options that depend on the kind.
        facts: what else the document shall say of it.
    """

    module: nn.Module
    measures: tuple[str, ...] = MEASURES
    defaults: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def reads(cls, target: Any, options: Namespace) -> tuple[int, ...]:
        """Tell which hidden states of the target it reads beside what the head gets."""
        return ()

    @abstractmethod
    def __init__(self, target: Any, texts: Texts, options: Namespace) -> None:
        """Make it from the target, untrained."""

    def prepare(self, texts: Texts) -> Texts:
        """Add to texts what it wants to know of them."""
        return texts

    @abstractmethod
    def compare(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Compare it with the target on a batch.

        Args:
            batch: the batch.
            generator: of what is drawn in training; None measures, always on the same.

        Returns:
            The loss, and for each level that it foretells the sums of `measures` over rows, then the number of rows.
            [levels, measures + 1].
        """

    @abstractmethod
    def draft(self) -> Any:
        """Give what `generate` takes as its draft."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it into a new folder."""


class LayersDraft(Kind):
    """The target's first layers with its norm, between its embedding and its head; layers and norm learn."""

    defaults = {"out": smollm2.DRAFT, "epochs": 8, "batch_texts": 4, "learning_rate": 4e-3}  # noqa: RUF012

    def __init__(self, target: Any, texts: Texts, options: Namespace) -> None:
        config = copy.deepcopy(target.config)
        config.num_hidden_layers = options.layers
        self.module = type(target)(config)
        weights = self.module.state_dict()
        self.module.load_state_dict({name: tensor for name, tensor in target.state_dict().items() if name in weights})
        for embedding in (self.module.get_input_embeddings(), self.module.get_output_embeddings()):
            embedding.requires_grad_(False)
        self.head = target.get_output_embeddings().weight.detach().to(torch.bfloat16)
        self.always = texts.tokens.bincount(minlength=len(self.head)) >= FREQUENT
        self.options, self.facts = options, {"sampled_tokens": options.sampled_tokens}

    def compare(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Rows behind a text's end see more than they should, and nobody looks at them."""
        options = self.options
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drafted = self.module.model(input_ids=batch.tokens, use_cache=False).last_hidden_state[batch.written]
        candidates = (
            Candidates.all_of(self.head)
            if generator is None
            else Candidates.drawn(self.head, self.always, options.sampled_tokens, generator)
        )
        weights = (options.divergence_weight, options.rejection_weight)
        loss, sums = HeadLoss.apply(drafted.float(), batch.hidden, candidates, weights)
        return loss, torch.cat((sums, torch.tensor([len(drafted)])))[None]

    def draft(self) -> Any:
        return self.module.eval()

    def save(self, folder: Path) -> None:
        copy.deepcopy(self.module).to(torch.bfloat16).save_pretrained(folder)


class HeadDraft(Kind):
    """What heads on the target's hidden states have in common: a vocabulary, rows to compare, a folder."""

    module: Eagle3Module | DSparkModule

    @classmethod
    def reads(cls, target: Any, options: Namespace) -> tuple[int, ...]:
        count = target.config.num_hidden_layers
        layers = tuple(options.feature_layers or default_layers(count))
        if len(set(layers)) < len(layers) or not all(1 <= number <= count for number in layers):
            rule = f"be different ones of 1..{count}, the target's hidden states behind a layer"
            raise ValueError(f"train_draft: --feature-layers must {rule}, got {list(layers)}")
        return layers

    def __init__(self, target: Any, texts: Texts, options: Namespace) -> None:
        self.target, self.options = target, options
        ends = target.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        size = min(options.draft_vocab, target.config.vocab_size)
        self.vocabulary = frequent_tokens(texts, target.config.vocab_size, size, ends)
        whole = target.get_output_embeddings().weight.detach().to(torch.bfloat16)
        self.whole, self.head = whole, whole[self.vocabulary.draft_to_target]
        known = self.vocabulary.target_to_draft[texts.tokens] >= 0
        self.facts = {
            "feature_layers": self.reads(target, options),
            "draft_vocab": size,
            "share_of_tokens_known": round(float(known[texts.written].float().mean()), 4),
            "temperatures": options.temperatures,
            "level_decay": options.level_decay,
        }

    def prepare(self, texts: Texts) -> Texts:
        """Add the target's normalisers: at temperature 1, at which all is measured, and those of the training."""
        return with_normalisers(texts, self.whole, self.known_temperatures())

    def known_temperatures(self) -> tuple[float, ...]:
        """1, at which all is measured, then those of the training that are not 1."""
        return (1.0, *(value for value in dict.fromkeys(self.options.temperatures) if value != 1.0))

    def wanted(self, batch: Batch, generator: torch.Generator | None) -> Wanted:
        """Give the target's distributions at the batch's written places, each at one of the temperatures."""
        temperatures = torch.tensor(self.known_temperatures())
        count = len(batch.hidden)
        drawn = torch.zeros(count, dtype=torch.int64)
        if generator is not None:
            first = int(1.0 not in self.options.temperatures)
            drawn = torch.randint(first, len(temperatures), (count,), generator=generator)
        normalisers = batch.log_normalisers.gather(1, drawn[:, None])[:, 0]
        return Wanted.of(batch.hidden, self.head, normalisers, 1.0 / temperatures[drawn])

    def rows_loss(
        self, states: Tensor, mixed: Tensor | None, wanted: Wanted, places: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Compare rows of some levels; see `RowsLoss`. Deeper ones count less: they are reached less often."""
        options = self.options
        markov = None if mixed is None else self.module.markov_head.markov_w2.weight
        weights = (options.divergence_weight, options.rejection_weight)
        return RowsLoss.apply(
            states.float(), mixed, self.head, markov, wanted, places, options.level_decay**levels, weights
        )

    def draft(self) -> Any:
        """Through a folder, as everybody gets it."""
        with TemporaryDirectory() as folder:
            self.save(Path(folder) / "draft")
            return draft_from_folder(Path(folder) / "draft", adapt(self.target))

    def save(self, folder: Path) -> None:
        self.module.save(folder)


class Eagle3Head(HeadDraft):
    """An EAGLE-3 head of one layer of the target's shape."""

    defaults = {"out": smollm2.DRAFT.with_name("smollm2-eagle3"), **HEADS, "epochs": 8}  # noqa: RUF012
    module: Eagle3Module

    def __init__(self, target: Any, texts: Texts, options: Namespace) -> None:
        super().__init__(target, texts, options)
        self.module = Eagle3Module(target, self.reads(target, options), self.vocabulary)
        self.facts["levels"] = options.levels

    def compare(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = self.module(batch.tokens, batch.features, self.options.levels)
        numbers = batch.written.flatten().cumsum(0).view_as(batch.written) - 1
        rows, places, levels = [], [], []
        for level, states in enumerate(outputs[: batch.tokens.shape[1] - 1]):
            # Row t's root is token t + 1, which foretells the next one; `level` tokens further on, the one after.
            chosen = batch.written[:, 1:].clone()
            chosen[:, chosen.shape[1] - level :] = False
            chosen[:, : chosen.shape[1] - level] &= batch.written[:, 1 + level :]
            rows.append(states[chosen])
            found, at = chosen.nonzero(as_tuple=True)
            places.append(numbers[found, at + 1 + level])
            levels.append(torch.full((len(found),), level))
        of_levels = torch.cat(levels)
        wanted = self.wanted(batch, generator)
        loss, measures = self.rows_loss(torch.cat(rows), None, wanted, torch.cat(places), of_levels)
        return loss, by_level(measures, of_levels, self.options.levels)


class DSparkDraft(HeadDraft):
    """A DSpark draft: a block of slots at once, a Markov head and a confidence head."""

    defaults = {"out": smollm2.DRAFT.with_name("smollm2-dspark"), **HEADS, "epochs": 16}  # noqa: RUF012
    measures = (*MEASURES, "confidence_error")
    module: DSparkModule

    def __init__(self, target: Any, texts: Texts, options: Namespace) -> None:
        super().__init__(target, texts, options)
        vocab_size = target.config.vocab_size
        never = (texts.tokens.bincount(minlength=vocab_size) == 0).nonzero()[:, 0]
        mask = int(never[0]) if len(never) else vocab_size - 1  # the first token that no text holds
        self.module = DSparkModule(
            target, self.reads(target, options), self.vocabulary, num_layers=options.layers,
            block_size=options.block_size, rank=options.markov_rank, mask_token_id=mask,
        )  # fmt: skip
        names = ("layers", "block_size", "markov_rank", "anchors")
        self.facts |= {name: getattr(options, name) for name in names} | {"mask_token_id": mask}

    def compare(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        slots, options = self.module.block_size, self.options
        anchors = draw_anchors(batch.written, options.anchors, generator or torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            blocks = self.module(batch.tokens, batch.features, anchors)
        written = pad(batch.written, (0, slots))  # what a text has not got, nobody wrote
        at = anchors[:, :, None] + torch.arange(slots)
        texts = torch.arange(len(anchors))[:, None, None].expand_as(at)
        chosen = written[texts, at] & batch.written.gather(1, anchors)[:, :, None]
        numbers = written.flatten().cumsum(0).view_as(written) - 1
        levels = torch.arange(slots).expand_as(at)[chosen]
        loss, measures = self.rows_loss(
            blocks.hidden[chosen], blocks.mixed[chosen].float(), self.wanted(batch, generator),
            numbers[texts, at][chosen], levels,
        )  # fmt: skip
        said, accepted = blocks.confidence[chosen], measures[:, 1].clamp(0, 1)
        shares = options.level_decay**levels
        of_confidence = binary_cross_entropy_with_logits(said, accepted, weight=shares / shares.sum(), reduction="sum")
        error = (said.detach().sigmoid() - accepted).abs()[:, None]
        return loss + of_confidence, by_level(torch.cat((measures, error), 1), levels, slots)


def by_level(measures: Tensor, levels: Tensor, count: int) -> Tensor:
    """Sum rows' measures, and rows, of each level. [R, M], [R] -> [count, M + 1]."""
    sums = torch.zeros(count, measures.shape[1] + 1)
    return sums.index_add_(0, levels, torch.cat((measures, torch.ones(len(measures), 1)), 1).detach())


def averages(kind: Kind, sums: Tensor) -> dict[str, Any]:
    """Means of a kind's measures, and what they are by level where there are several."""
    means = (sums[:, :-1].sum(0) / sums[:, -1].sum()).tolist()
    found: dict[str, Any] = dict(zip(kind.measures, means, strict=True))
    if len(sums) > 1:
        of_levels = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        found["overlap_by_level"] = [round(value, 4) for value in of_levels[:, 1].tolist()]
        found["same_first_by_level"] = [round(value, 4) for value in of_levels[:, 2].tolist()]
    return found


# New kinds plug in here.
KINDS: dict[str, type[Kind]] = {"layers": LayersDraft, "eagle3": Eagle3Head, "dspark": DSparkDraft}


def written(
    target: Any, tokenizer: Any, layers: tuple[int, ...], options: Namespace, deadline: float
) -> tuple[Texts, float]:  # fmt: skip
    """The texts, and the minutes that it took to write them, now or when they were written."""
    asked = {name: getattr(options, name) for name in ("texts", "text_tokens", "seed")}
    settings = json.dumps(asked | ({"hidden_states": layers} if layers else {}))
    path = options.texts_file or options.out.with_name(options.out.name + ".texts")
    found = Texts.load(path, settings)
    if found is not None:
        print(f"texts: those of {path}", flush=True)
        return found
    started = time.perf_counter()
    prompts = smollm2.chat(tokenizer, training_prompts(options.texts, options.seed))
    with tqdm(total=len(prompts) * options.text_tokens, desc="writing", unit="tokens", mininterval=5.0) as bar:
        texts = write_texts(
            adapt(target), prompts, WRITING_TEMPERATURES, num_tokens=options.text_tokens, layers=layers,
            seed=options.seed, progress=bar.update, go_on=lambda: time.perf_counter() < deadline,
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
def agreement(kind: Kind, texts: Texts, size: int) -> dict[str, Any]:
    """How well a draft agrees with its target, on texts that it has not learnt from."""
    kind.module.eval()
    return averages(kind, sum(kind.compare(batch, None)[1] for batch in batches(texts, size, 1, 0)))


def fit(kind: Kind, texts: Texts, held_back: Texts, options: Namespace, deadline: float) -> dict[str, Any]:
    """Train, and tell how it went."""
    started = time.perf_counter()
    per_epoch = -(-len(texts.lens) // options.batch_texts)
    num_steps = per_epoch * options.epochs
    learning = [parameter for parameter in kind.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    course: list[dict[str, Any]] = [{"step": 0} | agreement(kind, held_back, options.batch_texts)]
    losses, of_steps = [], []
    seen: Any = 0
    with tqdm(total=num_steps, desc="training", mininterval=5.0) as bar:
        for step, batch in enumerate(batches(texts, options.batch_texts, options.epochs, options.seed), 1):
            begun = time.perf_counter()
            kind.module.train()
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate_scale(step - 1, num_steps)
            loss, sums = kind.compare(batch, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen = seen + sums
            losses.append(float(loss.detach()))
            of_steps.append(time.perf_counter() - begun)
            means = averages(kind, seen)
            bar.set_postfix({name: f"{means[name]:.3f}" for name in kind.measures}, refresh=False)
            bar.update()
            over = time.perf_counter() >= deadline
            if step % per_epoch == 0 or over:
                trained = {f"training_{name}": value for name, value in averages(kind, seen).items()}
                course.append({"step": step} | trained | agreement(kind, held_back, options.batch_texts))
                seen = 0
            if over:
                break
    minutes = (time.perf_counter() - started) / 60
    return {
        "steps": step, "planned_steps": num_steps, "training_minutes": minutes,
        "seconds_per_step": statistics.median(of_steps), "course": course,
        f"mean_losses_of_{LOSS_STEPS}_steps": [
            round(statistics.fmean(losses[first : first + LOSS_STEPS]), 4) for first in range(0, step, LOSS_STEPS)
        ],
    }  # fmt: skip


def acceptance(target: Any, kind: Kind, prompts: list[list[int]], new_tokens: int) -> dict[str, list[float]]:
    """Acceptance vectors of the decoding loop, greedily and at temperature 1, on prompts of no training text."""
    vectors, draft = {}, kind.draft()
    tree = probe_tree(draft if isinstance(draft, DraftSource) else None)
    for temperature in (0.0, 1.0):
        common = {"max_new_tokens": new_tokens, "temperature": temperature, "eos_token_id": (), "rule": "sequoia"}
        runs = [
            generate(
                target, draft, torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                seed=number, tree=tree, **common,
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
    for name, value in KINDS[options.kind].defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    torch.manual_seed(options.seed)
    deadline = time.perf_counter() + 60 * options.minutes
    target, tokenizer = smollm2.load_target()
    layers = KINDS[options.kind].reads(target, options)
    texts, writing_minutes = written(target, tokenizer, layers, options, deadline)
    torch.manual_seed(options.seed)  # what the writing drew is no part of the draft
    kept = max(1, round((1 - HELD_BACK) * len(texts.lens)))
    held_back = texts.part(kept, len(texts.lens)) if kept < len(texts.lens) else texts
    texts = texts.part(0, kept)
    kind = KINDS[options.kind](target, texts, options)
    texts, held_back = kind.prepare(texts), kind.prepare(held_back)
    names = ("kind", "layers", "seed", "texts", "text_tokens", "epochs", "batch_texts", "learning_rate")
    bench.document |= {name: getattr(options, name) for name in names} | kind.facts
    bench.document |= {
        "loss": {"divergence": options.divergence_weight, "rejection": options.rejection_weight},
        "training_tokens": texts.num_written, "held_back_tokens": held_back.num_written,
        "learning_parameters": sum(p.numel() for p in kind.module.parameters() if p.requires_grad),
        "writing_minutes": round(writing_minutes, 1),
    }  # fmt: skip
    prompts = smollm2.chat(tokenizer, CALIBRATION[: options.calibration_prompts])
    before = acceptance(target, kind, prompts, options.new_tokens)
    facts = fit(kind, texts, held_back, options, deadline)
    replace(options.out, kind)
    bench.document |= facts | {
        "acceptance_prompts": len(prompts), "acceptance_before": before,
        "acceptance_after": acceptance(target, kind, prompts, options.new_tokens),
    }  # fmt: skip
    write_json(options.out / "training.json", bench.document)
    show(bench.document)


def show(document: dict[str, Any]) -> None:
    """Print how the training went."""
    rows = [[str(entry["step"]), *(f"{entry[name]:.3f}" for name in MEASURES)] for entry in document["course"]]
    print(table(["step", "divergence, nats", "overlap", "same most probable token"], rows, left=0))
    if document["steps"] < document["planned_steps"]:
        print(f"ended by --minutes behind {document['steps']} of {document['planned_steps']} steps")
    for name, shares in document["course"][-1].items():
        if name in ("overlap_by_level", "same_first_by_level"):
            print(f"{name.replace('_', ' ')}: {' '.join(f'{share:.3f}' for share in shares)}")
    print(f"{document['seconds_per_step']:.2f} s a step, {document['training_minutes']:.1f} min of training")
    for when in ("before", "after"):
        for temperature, vector in document[f"acceptance_{when}"].items():
            print(f"acceptance {when}, {temperature}: {' '.join(f'{share:.3f}' for share in vector)}", flush=True)


def problem(options: Namespace) -> str | None:
    """What is wrong with the options."""
    for name in (
        "layers", "texts", "text_tokens", "epochs", "batch_texts", "sampled_tokens", "calibration_prompts", "levels",
        "anchors", "markov_rank", "draft_vocab",
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {value}"
    if options.block_size < 2:
        return f"--block-size must be at least 2, got {options.block_size}"
    for name, low, high in (("temperatures", 0.0, 10.0), ("level_decay", 0.0, 1.0)):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if not low < value <= high:
                return f"--{name.replace('_', '-')} must be above {low:g} and at most {high:g}, got {value:g}"
    return smollm2.why_missing()


OPTIONS = [
    *shared(threads=None, quick=False),
    option("--kind", choices=tuple(KINDS), default="layers", help="what the draft is made of (default %(default)s)"),
    option("--layers", type=int, default=2, help="layers of it, but for eagle3, which has one (default %(default)s)"),
    option("--out", type=Path, help="folder for the draft (default build/drafts/smollm2, smollm2-eagle3, ...)"),
    option("--texts-file", type=Path, help="where the texts are (default beside the draft)"),
    option("--texts", type=int, default=1360, help="texts that the target writes (default %(default)s)"),
    option("--text-tokens", type=int, default=144, help="tokens of each, the prompt aside (default %(default)s)"),
    option("--epochs", type=int, help="times that every text is seen (default by kind)"),
    option("--batch-texts", type=int, help="texts of a step (default by kind)"),
    option(
        "--sampled-tokens",
        type=int,
        default=2048,
        help="rare tokens that a step looks at, layers (default %(default)s)",
    ),
    option("--draft-vocab", type=int, default=8192, help="tokens that a head knows (default %(default)s)"),
    option("--feature-layers", type=int, nargs="+", help="hidden states that a head reads (default 2, L // 2, L - 3)"),
    option("--levels", type=int, default=4, help="levels that eagle3 is unrolled over (default %(default)s)"),
    option("--block-size", type=int, default=7, help="slots of a block, dspark (default %(default)s)"),
    option("--anchors", type=int, default=16, help="blocks of a text in a step, dspark (default %(default)s)"),
    option("--markov-rank", type=int, default=96, help="of dspark's Markov head (default %(default)s)"),
    option(
        "--level-decay", type=float, default=0.8, help="weight of a level to the one above it (default %(default)s)"
    ),
    option(
        "--temperatures",
        type=float,
        nargs="+",
        default=[1.0, 0.5],
        help="at which heads are compared with the target (default 1 0.5)",
    ),
    option("--learning-rate", type=float, help="highest one (default by kind)"),
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
