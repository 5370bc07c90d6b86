"""Pairs of random weights with real acceptance: shapes of known models, a draft that is right as often as wanted.

What such a pair is, and what it is not, is told in docs/benchmarks.md. Of the target's inside: the draft's residual
stream is the first columns of the target's, its first layers compute the draft's layers there, heads are laid into its
wider heads (rotary frequencies of 64 wide heads are every second one of 128 wide heads), and its norms are scaled by
sqrt(draft width / target width), since the remaining columns hold next to nothing. What the later layers add to the
stream is scaled by `divergence`; `calibrate` finds the one at which a measured acceptance meets a goal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sequoia_kernels import TokenTree, estimate_acceptance, optimal_tree
from sequoia_kernels.models import TreeModel, adapt, causal_step
from sequoia_kernels.ops import sample_without_replacement, verify_tree
from sequoia_kernels.planner import AcceptanceEstimate

VOCAB = 32000
POSITIONS = 4096
RMS_EPS = 1e-5

# Standard deviations. Logits: at temperature 1 the likeliest of 32000 tokens then has a probability of .46 on average,
# and the entropy is 2.3 nats. Queries and keys: sharp attention, so that every token depends on many others and greedy
# text does not loop. A branch adds what is this much of the embedding's size, shared out over the draft's layers.
LOGIT_STD = 5.5
QUERY_STD = 1.5
BRANCH_STD = 1.5
# What is not the draft's in the target's first layers, and what later layers write beside the stream: small, not zero,
# since a processor may be faster or cooler on zeros.
QUIET = 2.0**-10

NUM_RANKS = 32  # children of a node that acceptance is measured for
CHUNK_ROWS = 512
GOAL_TOLERANCE = 0.03  # of what the loop reaches


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int  # width of the residual stream
    layers: int  # decoder layers
    heads: int  # query heads
    intermediate: int  # width of the gated layer
    kv_heads: int = 0  # key/value heads; as many as query heads when 0

    def __post_init__(self) -> None:
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def layer_parameters(self) -> int:
        """Parameters of a decoder layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    def parameters(self, vocab: int = VOCAB) -> int:
        """Parameters of the whole model, embeddings and head apart."""
        return 2 * vocab * self.hidden + self.layers * self.layer_parameters() + self.hidden


class PairShape(NamedTuple):
    """A target, its draft, and the vocabulary of both."""

    target: Shape
    draft: Shape
    vocab: int = VOCAB

    def check(self) -> None:
        """Refuse a draft that does not fit into its target."""
        target, draft = self.target, self.draft
        fits = {
            "hidden size": draft.hidden <= target.hidden,
            "layers": draft.layers < target.layers,
            "intermediate size": draft.intermediate <= target.intermediate,
            "heads": draft.kv_heads % self.shared_kv_heads == 0
            and self.queries_per_kv <= target.heads // target.kv_heads,
            "head width, which must divide the target's": target.head_dim % draft.head_dim == 0,
        }
        for name, holds in fits.items():
            if not holds:
                problem = f"draft must fit into its target, got {draft} and {target}: mind its {name}"
                raise ValueError(f"PairShape: {problem}")

    @property
    def shared_kv_heads(self) -> int:
        """Key/value heads of the target that hold the draft's; where the draft has more, its own repeat each other."""
        return min(self.target.kv_heads, self.draft.kv_heads)

    @property
    def queries_per_kv(self) -> int:
        """The draft's query heads that go with one of them."""
        return self.draft.heads // self.shared_kv_heads


# Llama-2 7B, 13B and 70B, Vicuna-33B (LLaMA-30B), Llama-68M, Sheared-LLaMA-1.3B.
PAIRS = {
    "7B/68M": PairShape(Shape(4096, 32, 32, 11008), Shape(768, 2, 12, 3072)),
    "13B/68M": PairShape(Shape(5120, 40, 40, 13824), Shape(768, 2, 12, 3072)),
    "33B/1.3B": PairShape(Shape(6656, 60, 52, 17920), Shape(2048, 24, 16, 5504)),
    "70B/7B": PairShape(Shape(8192, 80, 64, 28672, kv_heads=8), Shape(4096, 32, 32, 11008)),
    "350M/8M": PairShape(Shape(1024, 24, 16, 2816), Shape(128, 1, 2, 512)),
    "tiny": PairShape(Shape(128, 4, 4, 256), Shape(32, 1, 2, 64), vocab=1024),
}


@dataclass
class SyntheticPair:
    """Two models; see the module."""

    target: LlamaForCausalLM  # the target, a `LlamaForCausalLM` in evaluation mode
    draft: LlamaForCausalLM  # the draft, likewise
    shape: PairShape  # the shapes
    divergence: float = 1.0  # what the target's later layers add to the stream, relative to what the draft's own add

    @torch.no_grad()
    def set_divergence(self, divergence: float) -> None:
        """Rescale what the target's later layers write, in place."""
        if not divergence > 0:
            raise ValueError(f"set_divergence: divergence must be > 0, got {divergence}")
        if divergence == self.divergence:
            return
        later = self.target.model.layers[self.shape.draft.layers :]
        written = {_linear(layer, name).weight for layer in later for name in ("o_proj", "down_proj")}  # or shared
        for weight in written:
            weight[: self.shape.draft.hidden] *= divergence / self.divergence
        self.divergence = divergence


def synthetic_pair(
    shape: PairShape,
    dtype: torch.dtype,
    device: torch.device | str,  # of both models; no copy is made elsewhere
    *,
    seed: int = 0,
    share_layers: bool = False,
    positions: int = POSITIONS,
) -> SyntheticPair:
    """Build a pair on a device, with divergence 1, both of whose models serve `positions`.

    With `share_layers` the target's first layers are one and the same, and so are its later ones, each model's layer a
    module of its own on the same memory: traffic is that of the shape, memory that of two layers.
    """
    shape.check()
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    target, draft = (_empty(part, shape, positions, device) for part in (shape.target, shape.draft))

    def random(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, std, generator=generator)

    def fill(layers: Sequence[nn.Module], norm: torch.Tensor, build: Callable[[int], dict[str, torch.Tensor]]) -> None:
        for index, layer in enumerate(layers):
            if index == 0 or not share_layers:
                weights = {name: _parameter(tensor) for name, tensor in build(index).items()}
            for name in MATRICES:
                _linear(layer, name).weight = weights[name]
            layer.input_layernorm.weight = _parameter(norm.clone())
            layer.post_attention_layernorm.weight = _parameter(norm.clone())

    live, beside, stem = shape.draft.hidden, shape.target.hidden - shape.draft.hidden, shape.draft.layers
    ones = torch.ones(live, dtype=dtype, device=device)
    scale = torch.full((shape.target.hidden,), math.sqrt(live / shape.target.hidden), dtype=dtype, device=device)
    with torch.no_grad():
        head = random(shape.vocab, live, LOGIT_STD / math.sqrt(live))
        embedding = random(shape.vocab, live, 1.0)
        _set_ends(draft, embedding, head, ones)
        fill(draft.model.layers, ones, lambda index: _draft_layer(shape, random))
        embedding = torch.cat((embedding, random(shape.vocab, beside, QUIET)), dim=1)
        head = torch.cat((head, random(shape.vocab, beside, LOGIT_STD / math.sqrt(live))), dim=1)
        _set_ends(target, embedding, head, scale)
        layers = target.model.layers
        fill(layers[:stem], scale, lambda index: _stem_layer(shape, draft.model.layers[index], random))
        fill(layers[stem:], scale, lambda index: _later_layer(shape, random))
    return SyntheticPair(target, draft, shape)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MATRICES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
Random = Callable[[int, int, float], torch.Tensor]  # rows, columns, standard deviation


def llama_config(part: Shape, vocab: int, positions: int = POSITIONS, **settings: Any) -> LlamaConfig:
    """A Llama of a shape; settings are further ones of `LlamaConfig`."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=part.hidden,
        intermediate_size=part.intermediate,
        num_hidden_layers=part.layers,
        num_attention_heads=part.heads,
        num_key_value_heads=part.kv_heads,
        max_position_embeddings=positions,
        **settings,
    )


def _empty(part: Shape, shape: PairShape, positions: int, device: torch.device) -> LlamaForCausalLM:
    """The modules without memory: weights are put in one by one, so nothing is held twice."""
    eps = RMS_EPS * shape.draft.hidden / part.hidden  # the mean is taken over the quiet columns as well
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = llama_config(part, shape.vocab, positions, rms_norm_eps=eps, tie_word_embeddings=False, **no_ids)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    return getattr(layer.self_attn if name in ATTENTION else layer.mlp, name)


def _set_ends(model: LlamaForCausalLM, embedding: torch.Tensor, head: torch.Tensor, norm: torch.Tensor) -> None:
    model.model.embed_tokens.weight = _parameter(embedding)
    model.lm_head.weight = _parameter(head)
    model.model.norm.weight = _parameter(norm.clone())


# What attention and the gated layer put out before their last matrix, about: that matrix makes up for it.
ATTENTION_OUT_STD = 0.6
GATED_OUT_STD = 0.6


def _layer(
    part: Shape, live: int, layers: int, kv_heads: int, random: Random, order: Sequence[str] = MATRICES
) -> dict[str, torch.Tensor]:
    """A random layer that reads `live` columns, and writes its share of what `layers` of them add to the stream."""
    width, kv_width, read = part.heads * part.head_dim, kv_heads * part.head_dim, math.sqrt(live)
    branch = BRANCH_STD / math.sqrt(layers)
    sizes = {
        "q_proj": (width, part.hidden, QUERY_STD / read),
        "k_proj": (kv_width, part.hidden, QUERY_STD / read),
        "v_proj": (kv_width, part.hidden, 1 / read),
        "o_proj": (part.hidden, width, branch / (ATTENTION_OUT_STD * math.sqrt(width))),
        "gate_proj": (part.intermediate, part.hidden, 1 / read),
        "up_proj": (part.intermediate, part.hidden, 1 / read),
        "down_proj": (part.hidden, part.intermediate, branch / (GATED_OUT_STD * math.sqrt(part.intermediate))),
    }
    return {name: random(*sizes[name]) for name in order}


def _draft_layer(shape: PairShape, random: Random) -> dict[str, torch.Tensor]:
    part, heads = shape.draft, shape.shared_kv_heads
    order = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "k_proj", "v_proj")  # numbers follow from it
    weights = _layer(part, part.hidden, part.layers, heads, random, order)
    for name in ("k_proj", "v_proj"):
        by_head = weights[name].view(heads, part.head_dim, part.hidden)
        weights[name] = by_head.repeat_interleave(part.kv_heads // heads, dim=0).flatten(0, 1)
    return weights


def _later_layer(shape: PairShape, random: Random) -> dict[str, torch.Tensor]:
    """A layer that reads the stream, and writes to it what a layer of the draft would, in size."""
    part, live = shape.target, shape.draft.hidden
    weights = _layer(part, live, part.layers - shape.draft.layers, part.kv_heads, random)
    for name in ("o_proj", "down_proj"):
        weights[name][live:] *= QUIET
    return weights


def _stem_layer(shape: PairShape, layer: nn.Module, random: Random) -> dict[str, torch.Tensor]:
    """A layer of the target that computes a layer of the draft."""
    target, draft, live = shape.target, shape.draft, shape.draft.hidden
    weights = _later_layer(shape, random)
    for name in ("o_proj", "down_proj"):
        weights[name][:live] *= QUIET
    # where the draft's heads go: target head and the rows in it
    stride = target.head_dim // draft.head_dim
    half = torch.arange(draft.head_dim // 2) * stride
    rows_in_head = torch.cat((half, half + target.head_dim // 2))
    heads = torch.arange(draft.heads)
    kv_heads = heads // shape.queries_per_kv
    target_heads = kv_heads * (target.heads // target.kv_heads) + heads % shape.queries_per_kv
    query_rows = (target_heads[:, None] * target.head_dim + rows_in_head).flatten()
    kv_rows = (torch.arange(shape.shared_kv_heads)[:, None] * target.head_dim + rows_in_head).flatten()

    own = {name: _linear(layer, name).weight for name in MATRICES}
    query_rows, kv_rows = (rows.to(own["q_proj"].device) for rows in (query_rows, kv_rows))
    copies = draft.kv_heads // shape.shared_kv_heads
    weights["k_proj"] *= QUIET  # or the rest of a wider head would have a say in the scores
    # scores are divided by the root of the head's width, which is larger here
    weights["q_proj"][query_rows, :live] = own["q_proj"] * math.sqrt(stride)
    for name in ("k_proj", "v_proj"):
        by_head = own[name].view(draft.kv_heads, draft.head_dim, live)[::copies]
        weights[name][kv_rows, :live] = by_head.flatten(0, 1)
    weights["o_proj"][:live].index_copy_(1, query_rows, own["o_proj"])
    for name in ("gate_proj", "up_proj"):
        weights[name][: draft.intermediate, :live] = own[name]
    weights["down_proj"][:live, : draft.intermediate] = own["down_proj"]
    return weights


# ---- acceptance


class Goal(NamedTuple):
    """What the measured acceptance shall give: tokens per step on the best tree of a size, or the first child."""

    value: float  # the goal
    budget: int = 0  # nodes of the tree; 0 where the goal is the first child's acceptance
    levels: int | None = None  # levels of the tree, None for any

    def tree(self, vector: Sequence[float]) -> TokenTree:
        """The tree that the goal is about."""
        return optimal_tree(vector, self.budget, self.levels)

    def of(self, vector: Sequence[float]) -> float:
        """What an acceptance vector gives."""
        return self.tree(vector).expected_tokens(vector) if self.budget else float(vector[0])


@torch.inference_mode()
def teacher_forced_logits(model: TreeModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits behind every token of a text. [rows, vocab], tokens [rows]."""
    cache = model.new_cache(1, len(tokens))
    cache_lens = torch.zeros(1, dtype=torch.int32, device=model.device)
    parts = []
    for chunk in tokens.split(CHUNK_ROWS):
        parts.append(model.forward(chunk[None], cache, cache_lens, causal_step(len(chunk), model.device))[0])
        cache_lens += len(chunk)
    return torch.cat(parts)


@torch.inference_mode()
def measure_acceptance(
    target: TreeModel,
    draft: TreeModel,
    texts: Sequence[torch.Tensor],  # token ids. [rows] each
    temperature: float,
    *,
    num_ranks: int = NUM_RANKS,
    skip: int = 64,  # first tokens of a text that are only context
    seed: int = 0,
) -> AcceptanceEstimate:
    """Measure the acceptance vector along given texts: one node with `num_ranks` children behind every token.

    Children are drawn by `sample_without_replacement` and decided by `verify_tree`. Equal seeds make a measurement a
    smooth function of the models.
    """
    star = TokenTree([-1] + [0] * num_ranks)
    visited, accepted = [0] * num_ranks, [0] * num_ranks
    for text_index, text in enumerate(texts):
        target_logits = teacher_forced_logits(target, text)[skip:]
        draft_logits = teacher_forced_logits(draft, text)[skip:]
        for start in range(0, len(target_logits), 64):
            rows = slice(start, start + 64)
            count = len(target_logits[rows])
            seeds = torch.arange(count, device=text.device) + 1_000_003 * (seed + text_index + 1) + 64 * start
            temperatures = torch.full((count,), float(temperature), device=text.device)
            offsets = torch.zeros(count, dtype=torch.int64, device=text.device)
            drawn = sample_without_replacement(draft_logits[rows], num_ranks, temperatures, seeds, offsets).tokens
            tokens = torch.cat((text[skip:][rows, None], drawn), dim=1)
            logits = (each[rows, None].expand(-1, star.num_nodes, -1) for each in (target_logits, draft_logits))
            path = verify_tree(tokens, *logits, star, temperatures, seeds, offsets)
            for nodes, number in zip(path.nodes.tolist(), path.num_accepted.tolist(), strict=True):
                tried = nodes[1] if number > 1 else num_ranks  # child r is node r + 1
                for rank in range(tried):
                    visited[rank] += 1
                if number > 1:
                    accepted[tried - 1] += 1
    return estimate_acceptance((visited, accepted), temperature=temperature)


def calibrate(
    pair: SyntheticPair,
    goal: Goal,
    temperature: float,
    texts: Sequence[torch.Tensor],  # token ids. [rows] each
    *,
    tolerance: float = 0.005,  # relative
    max_steps: int = 12,  # measurements at most
) -> AcceptanceEstimate:
    """Set the pair's divergence so that the acceptance along the texts meets a goal; give the acceptance found.

    Raises:
        ValueError: no divergence meets the goal.
    """
    target, draft = adapt(pair.target), adapt(pair.draft)
    low, high = 1e-3, 4.0  # the same function but for rounding; nothing in common
    tried = []  # (miss, what was reached, divergence, acceptance)
    while len(tried) < max_steps and not (tried and tried[-1][0] <= tolerance):
        pair.set_divergence(math.sqrt(low * high))
        acceptance = measure_acceptance(target, draft, texts, temperature)
        reached = goal.of(acceptance.vector)
        tried.append((abs(reached / goal.value - 1), reached, pair.divergence, acceptance))
        low, high = (pair.divergence, high) if reached > goal.value else (low, pair.divergence)
    miss, reached, divergence, acceptance = min(tried, key=lambda entry: entry[0])
    if miss > max(5 * tolerance, 0.05):
        raise ValueError(
            f"calibrate: goal must be within what the pair can give, got {goal.value} where {reached:.3g} is closest"
        )
    pair.set_divergence(divergence)
    return acceptance


def meet_goal(
    pair: SyntheticPair,
    goal: Goal,
    temperature: float,
    texts: Sequence[torch.Tensor],  # token ids. [rows] each
    loop: Callable[[TokenTree], float],  # tokens per step that the loop reaches with a tree
    rounds: int,  # calibrations at most, each corrected by what the loop then reached
) -> AcceptanceEstimate:
    """Calibrate the pair so that what the loop itself accepts meets a goal of tokens per step.

    The pair keeps the divergence that came closest, whose acceptance is returned. Where the goal is the first child's
    acceptance, one calibration is all.
    """
    wanted, tried = goal, []  # (miss, divergence, acceptance)
    while len(tried) < rounds and not (tried and tried[-1][0] <= GOAL_TOLERANCE):
        acceptance = calibrate(pair, wanted, temperature, texts, tolerance=0.01)
        if not goal.budget:
            return acceptance
        reached = loop(goal.tree(acceptance.vector))
        tried.append((abs(reached / goal.value - 1), pair.divergence, acceptance))
        wanted = wanted._replace(value=wanted.value * goal.value / reached)
    _, divergence, acceptance = min(tried, key=lambda entry: entry[0])
    pair.set_divergence(divergence)
    return acceptance


def random_texts(shape: PairShape, rows: int, count: int, device: torch.device, seed: int) -> list[torch.Tensor]:
    """Random tokens, which are as good as any text of such a pair. [rows] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(shape.vocab, (rows,), generator=generator).to(device) for _ in range(count)]
