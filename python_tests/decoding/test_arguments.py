"""What `generate` refuses before any work, which padding it infers, and which settings of a checkpoint it names."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from support.synthetic_profile import synthetic_profile
from support.tiny_models import tiny_llama
from transformers import GenerationConfig

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.models import adapt
from sequoia_kernels.planner import ModelFingerprint, plan_tree, shift_acceptance

TREE = TokenTree([-1, 0, 0])
PROMPT = torch.tensor([[1, 2, 3]])


forwards: list[object] = []  # of the target: a refused call must not have run any


@pytest.fixture(scope="module")
def target():
    model = tiny_llama(0)
    model.register_forward_pre_hook(lambda *_: forwards.append(None))
    adapt(model)  # looks at a model once, before any arguments
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be an int64"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "input_ids must be an int64"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, ValueError, "input_ids must have shape"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, ValueError, "input_ids .* with at least one token"),
        ({"input_ids": torch.tensor([[1, 99]])}, ValueError, r"input_ids must hold tokens in \[0, 32\), got 99"),
        ({"attention_mask": torch.ones(1, 4)}, ValueError, "attention_mask must have the shape"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, "attention_mask .* not inside a prompt"),
        ({"attention_mask": torch.zeros(1, 3)}, ValueError, "attention_mask must keep at least one token"),
        ({"tree": "best"}, TypeError, "tree must be a TokenTree"),
        ({"max_cache_len": 0}, ValueError, "max_cache_len must be at least 1"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number or one for each request in a sequence"),
        (
            {"temperature": torch.tensor(0.5)},
            TypeError,
            "temperature must be a number or .* got a tensor of torch.float",
        ),
        (
            {"temperature": "1.0"},
            TypeError,
            "temperature must be a number or one for each request in a sequence, got str",
        ),
        ({"temperature": [None]}, TypeError, "temperature must be a number, got None"),
        (
            {"temperature": 1e-6},
            ValueError,
            r"temperature must be 0 or at least 1e-05 .*, got 1e-06",
        ),
        (
            {"temperature": 1e39},
            ValueError,
            r"temperature must be 0 or at least 1e-05 .*, got 1e\+39",
        ),
        ({"temperature": 10**400}, ValueError, "temperature must be 0 or at least 1e-05 and finite in float32"),
        (
            {"temperature": float("nan")},
            ValueError,
            "temperature must be 0 or at least 1e-05 .*, got nan",
        ),
        (
            {"temperature": -1.0},
            ValueError,
            "temperature must be 0 or at least 1e-05 .*, got -1.0",
        ),
        ({"temperature": [0.5, 0.5]}, ValueError, "temperature must be one value or one for each of 1 requests, got 2"),
        ({"top_k": 1 << 31}, ValueError, r"top_k must be in \[0, 2\^31\), where 0 is off, got 2147483648"),
        ({"top_k": -1}, ValueError, r"top_k must be in \[0, 2\^31\)"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, got 2.0"),
        ({"top_p": 1e-50}, ValueError, r"top_p must be in \(0, 1\] in float32, got 1e-50"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\] in float32, got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\] in float32, got 1.5"),
        ({"top_p": torch.tensor([0.5])}, TypeError, "top_p must be a number or one for each request in a sequence"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"seed": None}, TypeError, "seed must be an integer or one for each request in a sequence, got NoneType"),
        ({"seed": 1 << 63}, ValueError, r"seed must be in \[0, 2\^63\)"),
        ({"eos_token_id": 1.5}, TypeError, "eos_token_id must be an integer or several, got float"),
        ({"eos_token_id": "2"}, TypeError, "eos_token_id must be an integer or several, got str"),
        ({"eos_token_id": b"ab"}, TypeError, "eos_token_id must be an integer or several, got bytes"),
        ({"eos_token_id": torch.tensor(1)}, TypeError, "eos_token_id must be an integer or several, got a tensor"),
        ({"eos_token_id": [1.5]}, TypeError, "eos_token_id must hold integers, got 1.5"),
        ({"eos_token_id": 99}, ValueError, r"eos_token_id must hold tokens in \[0, 32\), got 99"),
        ({"pad_token_id": "0"}, TypeError, "pad_token_id must be an integer, got str"),
        ({"pad_token_id": 1 << 63}, ValueError, "pad_token_id must fit into int64"),
        ({"pad_token_id": 1 << 70}, ValueError, "pad_token_id must fit into int64"),
        ({"max_time": "soon"}, TypeError, "max_time must be a number, got str"),
        ({"max_time": float("nan")}, ValueError, "max_time must be a number, got nan"),
        ({"min_p": "a", "temperature": 1.0}, TypeError, "min_p must be a number, got str"),
        ({"typical_p": float("nan")}, ValueError, "typical_p must be a number, got nan"),
        ({"exponential_decay_length_penalty": (1,)}, ValueError, "exponential_decay_length_penalty must be a pair of"),
        ({"forced_eos_token_id": 99}, ValueError, r"forced_eos_token_id must hold tokens in \[0, 32\), got 99"),
        ({"forced_bos_token_id": "a"}, ValueError, r"forced_bos_token_id must hold tokens in \[0, 32\), got 'a'"),
        ({"prefix_allowed_tokens_fn": 3}, TypeError, "prefix_allowed_tokens_fn must be called with"),
        ({"output_scores": "all"}, TypeError, "output_scores must be a bool, got str"),
        ({"output_logits": 3}, TypeError, "output_logits must be a bool, got int"),
        ({"cuda_graphs": "auto"}, TypeError, "cuda_graphs must be a bool, got str"),
        ({"stop_strings": 5}, TypeError, "stop_strings must be a string or several, got 5"),
        ({"stop_strings": ["a", 5], "tokenizer": object()}, TypeError, "stop_strings must be a string or several"),
        ({"stop_strings": ["a", ""], "tokenizer": object()}, ValueError, "stop_strings must be non-empty strings"),
        ({"stop_strings": "a"}, ValueError, "tokenizer must be given with stop_strings"),
        ({"stop_strings": "a", "tokenizer": object()}, TypeError, r"tokenizer must have decode\(tokens\), got object"),
        ({"streamer": print}, TypeError, r"streamer must have put\(tokens\) and end\(\), got builtin_function"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer, got float"),
        ({"max_cache_len": True}, TypeError, "max_cache_len must be an integer, got bool"),
        ({"backend": "metal"}, ValueError, "backend must be one of auto, .*, got 'metal'"),
        ({"tree": [-1, 0]}, TypeError, "tree must be a TokenTree"),
        ({"tree": np.array([-1, 0])}, TypeError, "tree must be a TokenTree"),
        ({"tree": TokenTree.kary(2, 11)}, ValueError, "tree must have at most 1024 nodes, got 2047"),
        (
            {"tree": dataclasses.replace(plan_tree([0.5], synthetic_profile()), rule="nope")},
            ValueError,
            "rule must be one of sequoia, traversal, got 'nope'",
        ),
        ({"tree": "auto", "acceptance": 0.5}, ValueError, r"acceptance must have shape \[max_children\]"),
        ({"tree": "auto", "acceptance": "half"}, ValueError, r"acceptance must have shape \[max_children\]"),
        ({"tree": "auto", "acceptance": ["half"]}, TypeError, "acceptance must be a sequence of real numbers"),
        ({"tree": "auto", "acceptance": [0.9, 0.2]}, ValueError, "acceptance must have a sum of at most 1"),
        ({"tree": "auto", "profile": "profile.json"}, TypeError, "profile must be a HardwareProfile, got str"),
    ],
)
def test_refused_before_any_work(target, arguments, error, message):
    before = len(forwards)
    with pytest.raises(error, match=f"generate: {message}"):
        generate(target, target, **{"input_ids": PROMPT, "tree": TREE, "max_new_tokens": 4, **arguments})
    assert len(forwards) == before


def test_a_min_p_below_0_is_refused_as_transformers_does(target):
    with pytest.raises(ValueError, match="min_p"):
        generate(target, target, PROMPT, tree=TREE, max_new_tokens=4, temperature=1.0, min_p=-1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 1e-5},
        {"temperature": np.float32(1e-5)},
        {"temperature": np.float64(0.7), "top_p": np.float32(0.5), "top_k": np.int64(3)},
        {"temperature": [1]},
        {"top_k": (1 << 31) - 1},
        {"eos_token_id": (), "pad_token_id": np.int64(7), "seed": np.int64(5)},
        {"stop_strings": ()},
    ],
)
def test_the_ends_of_the_ranges_run(target, arguments):
    assert len(generate(target, target, PROMPT, tree=TREE, max_new_tokens=3, **arguments).new_tokens[0]) == 3


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int8])
def test_numpy_integers_count_as_pythons(target, kind):
    prompts = PROMPT.repeat(3, 1)
    options = {"tree": TREE, "temperature": 2.0, "eos_token_id": ()}
    expected = generate(target, target, prompts, seed=5, max_new_tokens=127, max_cache_len=127, **options)
    got = generate(target, target, prompts, seed=kind(5), max_new_tokens=kind(127), max_cache_len=kind(127), **options)
    assert got.new_tokens == expected.new_tokens
    assert len(got.new_tokens[0]) == 125


def test_an_acceptance_vector_may_be_an_array(target):
    vector = shift_acceptance([0.6, 0.2], 0.5)
    models = adapt(target)
    options = {"input_ids": PROMPT, "profile": synthetic_profile(target=ModelFingerprint.of(models)), "tree": "auto"}
    for acceptance in (vector, torch.from_numpy(vector), vector.tolist()):
        assert generate(models, models, acceptance=acceptance, max_new_tokens=3, **options).stats.tree is not None


def test_padding_is_inferred_from_the_pad_token(target):
    padded = torch.tensor([[5, 6, 7, 8], [0, 0, 3, 4], [9, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])
    expected = generate(target, target, padded, mask, tree=TREE, max_new_tokens=6, pad_token_id=0)
    assert (
        generate(target, target, padded, tree=TREE, max_new_tokens=6, pad_token_id=0).new_tokens == expected.new_tokens
    )
    configured = tiny_llama(0)
    configured.generation_config.pad_token_id = 0
    assert generate(configured, target, padded, tree=TREE, max_new_tokens=6).new_tokens == expected.new_tokens
    as_text = generate(target, target, padded, tree=TREE, max_new_tokens=6)  # no pad token is known
    assert as_text.new_tokens[0] == expected.new_tokens[0]
    assert as_text.new_tokens[1:] != expected.new_tokens[1:]


def test_padding_equals_what_transformers_infers():
    model = tiny_llama(0)
    model.generation_config.pad_token_id = 0
    padded = torch.tensor([[5, 6, 7, 8], [0, 0, 3, 4]])
    theirs = model.generate(padded, max_new_tokens=6, do_sample=False)[:, 4:].tolist()
    assert generate(model, model, padded, tree=TREE, max_new_tokens=6).new_tokens == theirs


def test_a_pad_token_inside_a_prompt_without_a_mask_is_refused(target):
    with pytest.raises(
        ValueError, match=r"attention_mask must pad on one side or both, .* row 0; it was inferred from the pad token"
    ):
        generate(target, target, torch.tensor([[5, 0, 7]]), tree=TREE, pad_token_id=0)
    whole = torch.ones(1, 3)
    assert generate(target, target, torch.tensor([[5, 0, 7]]), whole, tree=TREE, pad_token_id=0, max_new_tokens=1)


def test_a_pad_token_that_ends_sequences_is_text_with_a_warning(caplog):
    model = tiny_llama(0)
    padded = torch.tensor([[5, 6, 7], [3, 0, 0]])
    arguments = {"tree": TREE, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": 0}
    with caplog.at_level(logging.WARNING, logger="sequoia_kernels"):
        output = generate(model, model, padded, **arguments)
        generate(model, model, padded, **arguments)
    assert output.new_tokens == generate(model, model, padded, torch.ones_like(padded), **arguments).new_tokens
    (record,) = caplog.records
    assert "token 0, which both pads and ends sequences" in record.getMessage()


def test_past_the_trained_positions_it_goes_on_with_a_warning(caplog):
    model = tiny_llama(0, max_positions=16)
    prompt = torch.arange(12)[None] % 32
    with caplog.at_level(logging.WARNING, logger="sequoia_kernels"):
        generate(model, model, prompt, tree=TREE, max_new_tokens=4)
        assert not caplog.records
        for _ in range(2):
            output = generate(model, model, prompt, tree=TREE, max_new_tokens=8)
    (record,) = caplog.records
    assert "more than the 16 positions that the target was made for" in record.getMessage()
    assert output.finish_reasons == ["length"]


@pytest.mark.parametrize(
    "config", [GenerationConfig(), GenerationConfig(num_beams=1, repetition_penalty=1.0, min_p=0.0)]
)
def test_a_plain_checkpoint_warns_of_nothing(caplog, config):
    model = tiny_llama(0)
    model.generation_config = config
    with caplog.at_level(logging.WARNING, logger="sequoia_kernels"):
        generate(model, model, PROMPT, tree=TREE, max_new_tokens=2)
    assert not caplog.records
