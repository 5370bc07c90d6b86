"""Sampled texts follow the target's distribution exactly, whatever the draft, the rule, and how trees are cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.chi_square import p_value, sequence_counts
from support.engines.client import Engine, engine
from support.tiny_models import sequence_probabilities
from transformers import LlamaConfig, LlamaForCausalLM

# All but the first token come from verified trees, the last ones from behind rows that were moved.
VOCAB, LENGTH, PROMPT = 6, 6, [1, 4, 2]
PARTS = [slice(0, 4), slice(2, 6)]  # of a text, few enough tokens for every text to be expected some times
TREES = [[-1, 0, 0, 0, 1, 1, 2, 4], [-1, 0, 0, 1, 3], [-1, 0]]
WARPINGS = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}]
BY_NAME = {",".join(f"{name}={value}" for name, value in warping.items()): warping for warping in WARPINGS}


def random_model(seed: int) -> LlamaForCausalLM:
    """A model whose distributions are neither flat nor peaked, with heads that vLLM has kernels for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, initializer_range=0.25, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)
    return model


MODELS = {"target": random_model(1), "draft": random_model(2)}


def warped(temperature: float, top_k: int = 0, top_p: float = 1.0):
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        logits = logits / temperature
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        ordered, order = logits.softmax(-1).sort(descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p
        return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf).softmax(-1)

    return probabilities


def exact(model: str, warping: dict[str, float]) -> torch.Tensor:
    """Probabilities of all texts. [VOCAB] * LENGTH"""
    joint = sequence_probabilities(MODELS[model], torch.tensor(PROMPT), LENGTH, warped(**warping))
    return joint.reshape([VOCAB] * LENGTH)


def p_values(texts: list[list[int]], joint: torch.Tensor) -> list[float]:
    """Probabilities of texts this far from a joint distribution, by their parts."""
    counts = sequence_counts(torch.tensor(texts), VOCAB)
    others = [[place for place in range(LENGTH) if place not in range(LENGTH)[part]] for part in PARTS]
    return [p_value(counts.sum(other), joint.sum(other)) for other in others]


def start(folder: Path, name: str, options: dict[str, int]):
    for kind, model in MODELS.items():
        model.save_pretrained(folder / f"six_{kind}")
    options = {"skip_tokenizer_init": True, "max_model_len": 64, "block_size": 16, **options}
    trees = {"draft": str(folder / "six_draft"), "tree": TREES, "profile_seconds": 0.2}
    return engine(folder, name, folder / "six_target", options, **trees)


@pytest.fixture(scope="module")
def wide(folder) -> Iterator[Engine]:
    """Many requests in a batch."""
    with start(folder, "wide", {"max_num_seqs": 128}) as tree_engine:
        yield tree_engine


@pytest.fixture(scope="module")
def narrow(folder) -> Iterator[Engine]:
    """Trees of eight rows in 42 rows a step: the scheduler cuts them."""
    with start(folder, "narrow", {"max_num_seqs": 8, "max_num_batched_tokens": 42}) as tree_engine:
        yield tree_engine


def check(tree_engine: Engine, warping: dict[str, float], rule: str, mode: int | str, count: int) -> None:
    tree_engine.call("worker", "verify_by", rule)
    tree_engine.call("worker", "decode_with", mode)
    texts = tree_engine.call("sample", PROMPT, {"max_tokens": LENGTH, **warping}, count)
    assert min(p_values(texts, exact("target", warping))) > 1e-3
    assert max(p_values(texts, exact("draft", warping))) < 1e-3  # so many requests would show it
    report = tree_engine.call("worker", "tree_report")
    assert report["accepted"] > report["trees"]


@pytest.mark.parametrize("mode", [0, pytest.param("random", marks=pytest.mark.all_engines)])
@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("warping", BY_NAME)
def test_texts_follow_the_target(warping, rule, mode, wide, quick):
    check(wide, BY_NAME[warping], rule, mode, 4000 if quick else 12000)


@pytest.mark.all_engines
@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("warping", BY_NAME)
def test_texts_of_cut_trees_follow_the_target(warping, rule, narrow):
    before = narrow.call("worker", "tree_report")["cut"]
    check(narrow, BY_NAME[warping], rule, 0, 8000)
    assert narrow.call("worker", "tree_report")["cut"] > before


@pytest.mark.all_engines
def test_seeds_of_prompts_that_are_read_in_pieces(narrow):
    """In plain vLLM 0.32 such a request ends the engine on a CPU."""
    narrow.call("worker", "decode_with", 0)
    prompts = [[(3 * place + index) % VOCAB for place in range(50)] for index in range(4)]
    params = [{"max_tokens": 10, "temperature": 1.0, "seed": 30 + index, "detokenize": False} for index in range(4)]
    alone = [narrow.call("generate", [prompt], [entry])[0]["tokens"] for prompt, entry in zip(prompts, params)]
    narrow.call("reset_prefix_cache")
    both = narrow.call("generate", prompts, params)
    # Trees that are cut draw from other streams, so only what nothing was cut of need be the same.
    assert [output["tokens"][:1] for output in both] == [tokens[:1] for tokens in alone]
    assert len({tuple(tokens) for tokens in alone}) > 1


@pytest.mark.parametrize("rule", ["sequoia", pytest.param("traversal", marks=pytest.mark.all_engines)])
def test_a_broken_part_is_noticed(rule, wide):
    """Rows of rejected nodes among the committed ones are not the target's distribution."""
    wide.call("worker", "verify_by", rule)
    wide.call("worker", "decode_with", 0)
    wide.call("worker", "mutate", "no_compaction")
    try:
        texts = wide.call("sample", PROMPT, {"max_tokens": LENGTH, "temperature": 1.0}, 8000)
    finally:
        wide.call("worker", "mutate", None)
        wide.call("reset_prefix_cache")
    assert p_values(texts, exact("target", WARPINGS[0]))[1] < 1e-6
