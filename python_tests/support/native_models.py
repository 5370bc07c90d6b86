"""Tiny random models of families with native forwards, of sizes that fill no vector, and trees to score on them."""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NamedTuple

import torch
from support.tiny_families import FAMILIES, tiny_model

from sequoia_kernels.models import TreeModel, adapt, causal_step, prefill
from sequoia_kernels.models.cache import TreeCache
from sequoia_kernels.models.description import NATIVE_FAMILIES
from sequoia_kernels.models.tree_step import TreeStep
from sequoia_kernels.tree import TokenTree

VOCAB = 101
WINDOW = 4
# Enough work for several threads: forwards of a few rows of the other models wake none.
WIDE = {"intermediate_size": 1201}
MAX_CACHE_LEN = 224

_ODD: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 39,
    "intermediate_size": 53,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
_FIVE_HEADS = {"num_attention_heads": 5, "num_key_value_heads": 5}
_SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 36}
_GEMMA_KIND = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 12}
_MULTIPLIERS = {
    "embedding_multiplier": 2.0, "residual_multiplier": 0.3, "logits_scaling": 0.7, "attention_multiplier": 0.2
}  # fmt: skip

# name -> (family, its arguments beyond the common ones). Groups of 1, 2, 3 and 5 query heads; heads of 6, 8, 12 and 16.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 6}),
    "llama-biases": (
        "llama",
        {**_FIVE_HEADS, "head_dim": 12, "hidden_size": 35, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-tied": (
        "llama",
        {**_FIVE_HEADS, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 35, "tie_word_embeddings": True},
    ),
    "llama-relu2": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 44, "hidden_act": "relu2"},
    ),
    "mistral": ("mistral", {**_SIX_HEADS, "head_dim": 8, "hidden_size": 37, "sliding_window": WINDOW}),
    "qwen2": (
        "qwen2",
        {
            **_SIX_HEADS,
            "intermediate_size": 47,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "intermediate_size": 29}),
    "smollm3": ("smollm3", {**_SIX_HEADS, "hidden_size": 72, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "granite": ("granite", {**_SIX_HEADS, **_MULTIPLIERS}),
    "phi3": ("phi3", {**_SIX_HEADS, "sliding_window": WINDOW}),
    "gemma": ("gemma", {"head_dim": 12, "hidden_size": 37, "num_key_value_heads": 3}),
    "gemma2": ("gemma2", {"head_dim": 6, "hidden_size": 33, "num_key_value_heads": 3, **_GEMMA_KIND, **_CAPS}),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, **_GEMMA_KIND, "query_pre_attn_scalar": 12}),
    "olmo2": ("olmo2", _SIX_HEADS),
    "starcoder2": ("starcoder2", {**_SIX_HEADS, "sliding_window": WINDOW, "use_bias": True}),
    "stablelm": ("stablelm", {**_SIX_HEADS, "hidden_size": 48, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {**_SIX_HEADS, "hidden_size": 48, "use_parallel_residual": True}),
    "phi": ("phi", {**_FIVE_HEADS, "hidden_size": 60, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 6, "hidden_size": 48, "rotary_pct": 0.5}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {"num_attention_heads": 6, "hidden_size": 48, "use_parallel_residual": False},
    ),
}
# Families without sizes of their own above, in those of the suite's tiny models.
CASES |= {
    family: (family, {})
    for family in sorted(NATIVE_FAMILIES.keys() & FAMILIES.keys() - {family for family, _ in CASES.values()})
}
# Experts are native in float32 only.
LOW_PRECISION_CASES = [name for name, (family, _) in CASES.items() if not NATIVE_FAMILIES[family].experts]


class Pair(NamedTuple):
    """One model with forwards of both kinds."""

    native: TreeModel
    modules: TreeModel


def case_model(name: str, **overrides: Any) -> Any:
    """Build a case's model, float32, with weights of its own."""
    family, arguments = CASES[name]
    sizes = _ODD
    if not arguments:
        positions = "n_positions" if "n_embd" in FAMILIES[family][1] else "max_position_embeddings"
        sizes = {"vocab_size": VOCAB, positions: _ODD["max_position_embeddings"]}
    return tiny_model(family, seed=len(name), **{**sizes, **arguments, **overrides})


@cache
def case_pair(name: str, dtype: torch.dtype = torch.float32, wide: bool = False) -> Pair:
    """Return a case's model, shared between tests: nothing may be changed in it. See `WIDE`."""
    model = case_model(name, **(WIDE if wide else {})).to(dtype)
    return Pair(adapt(model, forward="native"), adapt(model, forward="modules"))


def random_tree(generator: random.Random, num_nodes: int) -> TokenTree:
    """Draw breadth-first parents, of bushy and of deep trees."""
    parents = [-1]
    reach = generator.choice((1, 2, 4))
    for node in range(1, num_nodes):
        first = max(0, parents[-1])
        parents.append(generator.randrange(first, min(node, first + reach)))
    return TokenTree(parents)


def path_to(tree: TokenTree, node: int) -> list[int]:
    """Nodes from the root to a node."""
    path = [node]
    while tree.parents[path[-1]] >= 0:
        path.append(tree.parents[path[-1]])
    return path[::-1]


def lens_of(*lens: int) -> torch.Tensor:
    return torch.tensor(lens, dtype=torch.int32)


def tokens_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def small_case(seed: int, longest: int = 90, nodes: int = 45):
    """A prompt, a tree and its tokens."""
    drawn = random.Random(seed)
    prompt = tokens_of(seed, 1, drawn.randrange(1, longest))
    tree = random_tree(drawn, drawn.randrange(2, nodes))
    return prompt, tree, tokens_of(seed + 1000, 1, tree.num_nodes)


def behind(model: TreeModel, prompt: torch.Tensor, max_cache_len: int = MAX_CACHE_LEN) -> TreeCache:
    """Return a cache with one prompt, [1, L], committed."""
    filled = model.new_cache(1, max_cache_len)
    prefill(model, filled, prompt, lens_of(prompt.shape[1]).to(prompt.device))
    return filled


def score_tree(model: TreeModel, prompt: torch.Tensor, tree: TokenTree, nodes: torch.Tensor) -> torch.Tensor:
    """Logits of a tree's nodes, [1, N], behind a prompt. [N, vocab]"""
    lens = lens_of(prompt.shape[1]).to(prompt.device)
    return model.forward(nodes, behind(model, prompt), lens, TreeStep.of(tree.tensors(prompt.device)))[0]


def decode(model: TreeModel, cache: TreeCache, length: int, tokens: torch.Tensor) -> torch.Tensor:
    """Feed tokens, [L], one by one behind `length` committed rows; logits behind each. [L, vocab]"""
    rows = [
        model.forward(tokens[i : i + 1][None], cache, lens_of(length + i), causal_step(1))[0, 0]
        for i in range(tokens.shape[0])
    ]
    return torch.stack(rows)
