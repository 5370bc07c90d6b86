"""Greedy text with trees is plain vLLM's for families whose layers differ: windows, softcaps, norms of queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.engines.client import Engine
from support.engines.comparing import assert_same

pytestmark = pytest.mark.all_engines

VOCAB, WINDOW = 96, 24
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
# Four layers, heads of a size that vLLM's CPU attention has.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 20.0,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
}
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 400, "max_num_seqs": 8}
TREE_OPTIONS = {**OPTIONS, "block_size": 16}
PLAIN_OPTIONS = {**OPTIONS, "enable_prefix_caching": False}
TREES = {"tree": [[-1, 0, 0, 0, 1, 1, 2, 4], [-1, 0, 0, 1, 3, 4]], "profile_seconds": 0.2}
GREEDY = {"max_tokens": 80, "detokenize": False}


def random_model(family: str) -> Any:
    """A model that says something: sharp weights, so that texts differ and near-ties are rare."""
    name, own = FAMILIES[family]
    config_name = f"{name}TextConfig" if family == "gemma3" else f"{name}Config"
    torch.manual_seed(len(family))
    config = getattr(transformers, config_name)(**{**COMMON, **own})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for layer_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in layer_name:
                parameter.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def folders(folder):
    for family in FAMILIES:
        random_model(family).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (3, 17, 40, 64, 100)]


def texts(folder, name, folders, prompts, modes, **trees) -> dict[str, list[Any]]:
    """What engines of all families say, one after the other in one process."""
    said, process = {}, Engine(folder, name)
    try:
        for family, model in folders.items():
            settings = {"draft": str(model), **trees} if trees else {}
            process.call("start", str(model), TREE_OPTIONS if trees else PLAIN_OPTIONS, **settings)
            said[family] = []
            for mode in modes:
                if trees:
                    process.call("worker", "decode_with", mode)
                said[family].append(process.call("generate", prompts, [GREEDY] * len(prompts)))
            if trees:
                said[family].append(process.call("worker", "tree_report"))
            process.call("stop")
    finally:
        process.close()
    return said


@pytest.fixture(scope="module")
def plain_texts(folder, folders, prompts):
    return texts(folder, "plain_families", folders, prompts, [None])


@pytest.fixture(scope="module")
def tree_texts(folder, folders, prompts):
    return texts(folder, "tree_families", folders, prompts, [0, "random"], **TREES)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_a_family_is_plain_vllms(family, plain_texts, tree_texts):
    """The target is its own draft, so that trees are accepted to the end."""
    (expected,) = plain_texts[family]
    assert min(len({*output["tokens"]}) for output in expected) > 5  # no text of one token
    by_first, by_random, report = tree_texts[family]
    assert_same(expected, by_first, family)
    assert_same(expected, by_random, f"{family}, trees at random")
    assert report["accepted"] > 2 * report["trees"], report
