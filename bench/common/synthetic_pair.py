"""Pairs of random weights with real acceptance: shapes of known models, a draft that is right as often as wanted.

The draft is a random Llama of its own shape. The target holds the same function inside: the draft's residual stream is
the first columns of the target's, its first layers compute the draft's layers there, heads are laid into its wider
heads (rotary frequencies of 64 wide heads are every second one of 128 wide heads), and its norms are scaled by
sqrt(draft width / target width), since the remaining columns hold next to nothing. The target's later layers are random
functions of that stream, and what they add to it is scaled by `divergence`: at 0 the two models give the same logits
but for rounding, and the larger it is, the less often the draft is right. Every matrix of the target is full of random
numbers, so a forward reads and multiplies what a trained model of the shape would; the draft has weights of its own and
costs what a draft of its shape costs.

So the drafted tokens, the acceptance and the output are real, of models that mean nothing. What the text is not: like
language. Logits are Gaussian with a standard deviation that gives entropies like those of language models, and all
positions are alike, where text has easy and hard ones.

`calibrate` finds the divergence at which a measured acceptance meets a goal.
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
from sequoia_kernels.planner.value import tree_values

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
        heads_fit = draft.kv_heads % self.shared_kv_heads == 0
        heads_fit = heads_fit and self.queries_per_kv <= target.heads // target.kv_heads
        rules = (
            ("hidden size", draft.hidden <= target.hidden),
            ("layers", draft.layers < target.layers),
            ("intermediate size", draft.intermediate <= target.intermediate),
            ("heads", heads_fit),
            ("head width, which must divide the target's", target.head_dim % draft.head_dim == 0),
        )
        for name, holds in rules:
            if not holds:
                raise ValueError(
                    f"PairShape: draft must fit into its target, got {draft} and {target}: mind its {name}"
                )

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
    _divergence: float = 1.0

    @property
    def divergence(self) -> float:
        """What the target's later layers add to the stream, relative to what the draft's own layers add."""
        return self._divergence

    @torch.no_grad()
    def set_divergence(self, divergence: float) -> None:
        """Rescale what the target's later layers write, in place."""
        if not divergence > 0:
            raise ValueError(f"set_divergence: divergence must be > 0, got {divergence}")
        if divergence == self._divergence:
            return
        live = self.shape.draft.hidden
        scaled = set()
        for layer in self.target.model.layers[self.shape.draft.layers :]:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                if id(weight) not in scaled:  # layers may share
                    scaled.add(id(weight))
                    weight[:live] *= divergence / self._divergence
        self._divergence = divergence


def synthetic_pair(
    shape: PairShape,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    seed: int = 0,
    share_layers: bool = False,
    positions: int = POSITIONS,
) -> SyntheticPair:
    """Build a pair on a device, with divergence 1.

    Args:
        shape: sizes.
        dtype: of both models.
        device: of both models; no copy is made elsewhere.
        seed: of the weights.
        share_layers: the target's first layers are one and the same, and so are its later ones, each model's layer a
            module of its own on the same memory: traffic is that of the shape, memory that of two layers.
        positions: that both models serve.
    """
    shape.check()
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    target_config, draft_config = (_config(part, shape, positions) for part in (shape.target, shape.draft))
    target, draft = _empty(target_config, device), _empty(draft_config, device)

    def random(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, std, generator=generator)

    ones = torch.ones(shape.draft.hidden, dtype=dtype, device=device)
    with torch.no_grad():
        live = shape.draft.hidden
        head = random(shape.vocab, live, LOGIT_STD / math.sqrt(live))
        embedding = random(shape.vocab, live, 1.0)
        _set_ends(draft, embedding, head, ones)
        first = None
        for layer in draft.model.layers:
            if first is None or not share_layers:
                first = _parameters(_draft_layer(shape, random))
            _set_layer(layer, first, ones)

        beside = shape.target.hidden - live
        scale = torch.full((shape.target.hidden,), math.sqrt(live / shape.target.hidden), dtype=dtype, device=device)
        _set_ends(
            target,
            torch.cat((embedding, random(shape.vocab, beside, QUIET)), dim=1),
            torch.cat((head, random(shape.vocab, beside, LOGIT_STD / math.sqrt(live))), dim=1),
            scale,
        )
        stem = later = None
        for index, layer in enumerate(target.model.layers):
            if index < shape.draft.layers:
                if stem is None or not share_layers:
                    stem = _parameters(_stem_layer(shape, draft.model.layers[index], random))
                _set_layer(layer, stem, scale)
            else:
                if later is None or not share_layers:
                    later = _parameters(_later_layer(shape, random))
                _set_layer(layer, later, scale)
    return SyntheticPair(target, draft, shape)


MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_Weights = dict[str, nn.Parameter]
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


def _config(part: Shape, shape: PairShape, positions: int) -> LlamaConfig:
    eps = RMS_EPS * shape.draft.hidden / part.hidden  # the mean is taken over the quiet columns as well
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return llama_config(part, shape.vocab, positions, rms_norm_eps=eps, tie_word_embeddings=False, **no_ids)


def _empty(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """The modules without memory: weights are put in one by one, so nothing is held twice."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _parameters(weights: dict[str, torch.Tensor]) -> _Weights:
    return {name: _parameter(tensor) for name, tensor in weights.items()}


def _set_ends(model: LlamaForCausalLM, embedding: torch.Tensor, head: torch.Tensor, norm: torch.Tensor) -> None:
    model.model.embed_tokens.weight = _parameter(embedding)
    model.lm_head.weight = _parameter(head)
    model.model.norm.weight = _parameter(norm.clone())


def _set_layer(layer: nn.Module, weights: _Weights, norm: torch.Tensor) -> None:
    for name in MATRICES:
        block = layer.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else layer.mlp
        getattr(block, name).weight = weights[name]
    layer.input_layernorm.weight = _parameter(norm.clone())
    layer.post_attention_layernorm.weight = _parameter(norm.clone())


# What attention and the gated layer put out before their last matrix, about: that matrix makes up for it.
ATTENTION_OUT_STD = 0.6
GATED_OUT_STD = 0.6


def _draft_layer(shape: PairShape, random: Random) -> dict[str, torch.Tensor]:
    part = shape.draft
    width = part.heads * part.head_dim
    branch = BRANCH_STD / math.sqrt(part.layers)
    copies = part.kv_heads // shape.shared_kv_heads
    weights = {
        "q_proj": random(width, part.hidden, QUERY_STD / math.sqrt(part.hidden)),
        "o_proj": random(part.hidden, width, branch / (ATTENTION_OUT_STD * math.sqrt(width))),
        "gate_proj": random(part.intermediate, part.hidden, 1 / math.sqrt(part.hidden)),
        "up_proj": random(part.intermediate, part.hidden, 1 / math.sqrt(part.hidden)),
        "down_proj": random(part.hidden, part.intermediate, branch / (GATED_OUT_STD * math.sqrt(part.intermediate))),
    }
    for name, std in (("k_proj", QUERY_STD), ("v_proj", 1.0)):
        heads = random(shape.shared_kv_heads * part.head_dim, part.hidden, std / math.sqrt(part.hidden))
        by_head = heads.view(shape.shared_kv_heads, part.head_dim, part.hidden)
        weights[name] = by_head.repeat_interleave(copies, dim=0).flatten(0, 1)
    return weights


def _later_layer(shape: PairShape, random: Random) -> dict[str, torch.Tensor]:
    """A layer that reads the stream, and writes to it what a layer of the draft would, in size."""
    part, live = shape.target, shape.draft.hidden
    width, kv_width = part.heads * part.head_dim, part.kv_heads * part.head_dim
    branch = BRANCH_STD / math.sqrt(part.layers - shape.draft.layers)
    weights = {
        "q_proj": random(width, part.hidden, QUERY_STD / math.sqrt(live)),
        "k_proj": random(kv_width, part.hidden, QUERY_STD / math.sqrt(live)),
        "v_proj": random(kv_width, part.hidden, 1 / math.sqrt(live)),
        "o_proj": random(part.hidden, width, branch / (ATTENTION_OUT_STD * math.sqrt(width))),
        "gate_proj": random(part.intermediate, part.hidden, 1 / math.sqrt(live)),
        "up_proj": random(part.intermediate, part.hidden, 1 / math.sqrt(live)),
        "down_proj": random(part.hidden, part.intermediate, branch / (GATED_OUT_STD * math.sqrt(part.intermediate))),
    }
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

    own = {name: _matrix(layer, name) for name in MATRICES}
    device = own["q_proj"].device
    query_rows, kv_rows = query_rows.to(device), kv_rows.to(device)
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


def _matrix(layer: nn.Module, name: str) -> torch.Tensor:
    block = layer.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else layer.mlp
    return getattr(block, name).weight


# ---- acceptance


class Goal(NamedTuple):
    """What the measured acceptance shall give: tokens per step on the best tree of a size, or the first child."""

    value: float  # the goal
    budget: int = 0  # nodes of the tree; 0 where the goal is the first child's acceptance
    levels: int | None = None  # levels of the tree, None for any

    def tree(self, acceptance: AcceptanceEstimate | Sequence[float]) -> TokenTree:
        """The tree that the goal is about."""
        return optimal_tree(_vector(acceptance), self.budget, self.levels)

    def of(self, acceptance: AcceptanceEstimate | Sequence[float]) -> float:
        """What an acceptance vector gives."""
        vector = _vector(acceptance)
        if not self.budget:
            return float(vector[0])
        return float(tree_values(self.tree(vector), torch.tensor([vector], dtype=torch.float64).numpy())[0])


def _vector(acceptance: AcceptanceEstimate | Sequence[float]) -> Sequence[float]:
    return acceptance.vector if isinstance(acceptance, AcceptanceEstimate) else acceptance


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

            def at_every_node(logits: torch.Tensor) -> torch.Tensor:
                return logits[:, None].expand(-1, star.num_nodes, -1)

            path = verify_tree(
                tokens,
                at_every_node(target_logits[rows]),
                at_every_node(draft_logits[rows]),
                star,
                temperatures,
                seeds,
                offsets,
            )
            for nodes, number in zip(path.nodes.tolist(), path.num_accepted.tolist(), strict=True):
                rank = nodes[1] - 1 if number > 1 else None
                for tried in range(num_ranks if rank is None else rank + 1):
                    visited[tried] += 1
                if rank is not None:
                    accepted[rank] += 1
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
    best: tuple[float, float, AcceptanceEstimate] | None = None
    for _ in range(max_steps):
        pair.set_divergence(math.sqrt(low * high))
        acceptance = measure_acceptance(target, draft, texts, temperature)
        reached = goal.of(acceptance)
        miss = abs(reached / goal.value - 1)
        if best is None or miss < best[0]:
            best = miss, pair.divergence, acceptance
        if miss <= tolerance:
            break
        low, high = (pair.divergence, high) if reached > goal.value else (low, pair.divergence)
    assert best is not None
    if best[0] > max(5 * tolerance, 0.05):
        raise ValueError(
            f"calibrate: goal must be within what the pair can give, got {goal.value} where {goal.of(best[2]):.3g} is "
            "closest"
        )
    pair.set_divergence(best[1])
    return best[2]


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
    wanted, best = goal, None
    for _ in range(rounds):
        acceptance = calibrate(pair, wanted, temperature, texts, tolerance=0.01)
        if not goal.budget:
            return acceptance
        reached = loop(goal.tree(acceptance))
        miss = abs(reached / goal.value - 1)
        if best is None or miss < best[0]:
            best = miss, pair.divergence, acceptance
        if miss <= GOAL_TOLERANCE:
            break
        wanted = wanted._replace(value=wanted.value * goal.value / reached)
    assert best is not None
    pair.set_divergence(best[1])
    return best[2]


def random_texts(shape: PairShape, rows: int, count: int, device: torch.device, seed: int) -> list[torch.Tensor]:
    """Random tokens, which are as good as any text of such a pair. [rows] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(shape.vocab, (rows,), generator=generator).to(device) for _ in range(count)]
