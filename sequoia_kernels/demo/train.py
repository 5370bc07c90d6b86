"""Train the demo pair: a small Llama target and a one-layer Llama draft that write Python.

The corpus is the source of the running interpreter's standard library, so the script needs no download and
anybody can repeat it::

    python -m sequoia_kernels.demo.train --out demo_pair

The two folders `target` and `draft` of the result are what the package carries in `demo/pair`. On two CPU cores the
whole takes about an hour and a half.

Files are split by a hash of their relative path (one in sixteen is held out), so that a file held out here is held out
under every other Python version too. Stages, each skipped when its result is already there: a byte-level BPE tokenizer,
the target (Muon for matrices, AdamW for the rest), the draft (the same, on many more tokens), and a short distillation
of the draft. The last stage minimises the total-variation distance between draft and target, because 1 - distance is
the probability that the first drawn child is accepted.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sequoia_kernels.demo.corpus import corpus_files, read_texts
from sequoia_kernels.documents import parse_json, read_text, write_text

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 512
SEQUENCE_LENGTH = 512
BATCH_SIZE = 8


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule of one model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_steps: int
    matrix_lr: float
    other_lr: float
    batch_size: int = BATCH_SIZE


TARGET_RECIPE = Recipe(
    num_layers=24, hidden_size=128, intermediate_size=384, num_heads=4, num_steps=1150, matrix_lr=6e-3, other_lr=4e-3
)
DRAFT_RECIPE = Recipe(
    num_layers=1, hidden_size=192, intermediate_size=768, num_heads=6, num_steps=6000, matrix_lr=6e-3, other_lr=4e-3
)
DISTILL_STEPS = 500
DISTILL_LR = 1.5e-3


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE):
    """Train a byte-level BPE tokenizer; id 0 is the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """Encode the texts into one token stream, each text behind an end-of-text token. [num_tokens] uint16."""
    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.eos_token_id)
        stream.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return np.asarray(stream, dtype=np.uint16)


def build_model(recipe: Recipe, vocab_size: int, eos_token_id: int):
    """Build an untrained Llama model of the recipe's shape, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers, num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=eos_token_id, eos_token_id=eos_token_id, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # keep the residual stream's variance independent of the depth
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix.mul_(1.0 / math.sqrt(2 * recipe.num_layers))
    return model


def build_optimizers(model, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Give the layers' matrices to Muon and everything else to AdamW."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate_scale(step: int, num_steps: int, num_warmup: int = 40) -> float:
    """Warm up linearly, hold, and fall linearly to zero over the last 60 % of the steps."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    decay_from = 0.4 * num_steps
    return 1.0 if step < decay_from else max(0.02, (num_steps - step) / (num_steps - decay_from))


def sample_batch(stream: np.ndarray, batch_size: int, generator: np.random.Generator) -> torch.Tensor:
    """Cut random windows out of the stream. [batch_size, SEQUENCE_LENGTH + 1] int64."""
    starts = generator.integers(0, len(stream) - SEQUENCE_LENGTH - 1, size=batch_size)
    windows = np.stack([stream[start : start + SEQUENCE_LENGTH + 1] for start in starts])
    return torch.from_numpy(windows.astype(np.int64))


def next_token_loss(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every next token, in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def fit(
    model, loss_of, stream, recipe: Recipe, *, num_steps: int, lr_scale: float, seed: int, compiled: bool, label: str
):
    """Minimise `loss_of(logits, batch)` over random windows of the stream."""
    optimizers = build_optimizers(model, recipe.matrix_lr * lr_scale, recipe.other_lr * lr_scale)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    generator = np.random.default_rng(seed)
    forward = (
        torch.compile(lambda ids: model(input_ids=ids).logits) if compiled else lambda ids: model(input_ids=ids).logits
    )
    model.train()
    average = None
    with tqdm(total=num_steps, desc=label, mininterval=5.0) as bar:
        for step in range(num_steps):
            scale = learning_rate_scale(step, num_steps)
            for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
                for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                    group["lr"] = lr * scale
            batch = sample_batch(stream, recipe.batch_size, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = forward(batch[:, :-1])
            loss = loss_of(logits, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            bar.set_postfix(loss=f"{average:.3f}", refresh=False)
            bar.update()
    model.eval()


@torch.inference_mode()
def evaluate(model, stream: np.ndarray, num_windows: int = 64) -> float:
    """Mean held-out cross-entropy in nats a token."""
    generator = np.random.default_rng(1234)
    losses = [
        next_token_loss(model(input_ids=batch[:, :-1]).logits, batch).item()
        for batch in (sample_batch(stream, 8, generator) for _ in range(num_windows // 8))
    ]
    return float(np.mean(losses))


@torch.inference_mode()
def first_child_acceptance(
    target, draft, stream: np.ndarray, temperatures=(0.0, 0.6, 1.0), num_windows: int = 64
) -> dict[str, float]:
    """Measure the probability that the first drawn child is accepted, teacher-forced on the held-out stream."""
    generator = np.random.default_rng(1234)
    sums = dict.fromkeys(temperatures, 0.0)
    for _ in range(num_windows // 8):
        ids = sample_batch(stream, 8, generator)[:, :-1]
        target_logits, draft_logits = target(input_ids=ids).logits.float(), draft(input_ids=ids).logits.float()
        for temperature in temperatures:
            if temperature == 0.0:
                overlap = (target_logits.argmax(-1) == draft_logits.argmax(-1)).float()
            else:
                overlap = torch.minimum(
                    (target_logits / temperature).softmax(-1), (draft_logits / temperature).softmax(-1)
                ).sum(-1)
            sums[temperature] += overlap.mean().item()
    return {f"T={temperature:g}": total / (num_windows // 8) for temperature, total in sums.items()}


def save_model(model, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model in the Hugging Face format, completely or not at all."""
    model.config.use_cache = True
    model.generation_config.use_cache = True
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(dtype).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_model(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def read_corpus(out: Path, seed: int, wanted: bool) -> tuple[Any, np.ndarray, np.ndarray]:
    """Give the tokenizer and the training and held-out token streams, from files where they are there already.

    Where wanted, a tokenizer that is not there is trained, and what the corpus is recorded.
    """
    from transformers import PreTrainedTokenizerFast

    training_files, held_out_files = corpus_files()
    training_texts, held_out_texts = read_texts(training_files), read_texts(held_out_files)
    folder = out / "tokenizer"
    if wanted and not folder.exists():
        train_tokenizer(training_texts).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    cache = out / "tokens.npz"
    if not cache.exists():
        partial = out / "tokens.partial.npz"
        np.savez(partial, training=encode(tokenizer, training_texts), held_out=encode(tokenizer, held_out_texts))
        partial.replace(cache)
    with np.load(cache) as arrays:
        training, held_out = arrays["training"], arrays["held_out"]
    num_bytes = sum(len(text.encode()) for text in held_out_texts)
    if wanted:
        record(
            out, "corpus", python=platform.python_version(), training_files=len(training_files),
            held_out_files=len(held_out_files), training_tokens=int(training.size),
            held_out_tokens=int(held_out.size), bytes_per_token=round(num_bytes / held_out.size, 3),
            vocab_size=VOCAB_SIZE, seed=seed, torch=torch.__version__,
        )  # fmt: skip
    return tokenizer, training, held_out


def record(out: Path, stage: str, **facts: Any) -> None:
    """Keep what is to be known of a stage in training.json."""
    path = out / "training.json"
    known = parse_json(read_text(path)) if path.exists() else {}
    write_text(path, json.dumps({**known, stage: facts}, indent=2) + "\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m sequoia_kernels.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that receives target/, draft/ and training.json"
    )
    parser.add_argument(
        "--stage", choices=("all", "tokenizer", "target", "draft", "distill"), default="all",
        help="run one stage only (default: all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiply every stage's number of steps (0.01 for a try)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    compiled = not args.no_compile
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)

    def wanted(stage: str) -> bool:
        return args.stage in ("all", stage)

    def steps(count: int) -> int:
        return max(2, round(count * args.steps_scale))

    def finish(stage: str, model: Any, name: str, started: float, **facts: Any) -> None:
        facts["minutes"] = round((time.time() - started) / 60, 1)
        save_model(model, out / name)
        tokenizer.save_pretrained(out / name)
        record(out, stage, **facts)
        print(stage, facts, flush=True)

    tokenizer, training, held_out = read_corpus(out, args.seed, wanted("tokenizer"))
    for stage, recipe, name in (("target", TARGET_RECIPE, "target"), ("draft", DRAFT_RECIPE, "draft_undistilled")):
        if not wanted(stage) or (out / name).exists():
            continue
        started = time.time()
        torch.manual_seed(args.seed)
        model = build_model(recipe, VOCAB_SIZE, tokenizer.eos_token_id)
        fit(
            model, next_token_loss, training, recipe,
            num_steps=steps(recipe.num_steps), lr_scale=1.0, seed=args.seed, compiled=compiled, label=stage,
        )  # fmt: skip
        parameters = sum(p.numel() for p in model.parameters())
        finish(stage, model, name, started, parameters=parameters, held_out_loss=round(evaluate(model, held_out), 4))

    if wanted("distill") and not (out / "draft").exists():
        started = time.time()
        target, draft = load_model(out / "target"), load_model(out / "draft_undistilled")
        before = first_child_acceptance(target, draft, held_out)

        def total_variation(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                wanted_probs = target(input_ids=batch[:, :-1]).logits.float().softmax(-1)
            return 1.0 - torch.minimum(logits.float().softmax(-1), wanted_probs).sum(-1).mean()

        fit(
            draft, total_variation, training, DRAFT_RECIPE,
            num_steps=steps(DISTILL_STEPS), lr_scale=DISTILL_LR / DRAFT_RECIPE.matrix_lr,
            seed=args.seed + 1, compiled=compiled, label="distill",
        )  # fmt: skip
        after = first_child_acceptance(target, draft, held_out)
        finish("distill", draft, "draft", started, acceptance_before=before, acceptance_after=after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
