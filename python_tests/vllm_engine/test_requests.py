"""One engine of trees in everyday life: seeds, broken parts that are noticed, requests that fail, come and go."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from support.engines.client import PAIR, Engine, EngineError, engine
from support.engines.comparing import assert_same

from sequoia_kernels.vllm import BACKEND

GREEDY = {"max_tokens": 48}
TREES = [[-1, 0, 0, 0, 1, 1, 2, 4], [-1, 0, 0, 1, 2, 3, 4, 5], [-1, 0]]
# 26 blocks of 16 rows: six requests of up to 150 tokens do not fit, so that some are preempted.
OPTIONS = {"max_model_len": 320, "max_num_seqs": 6, "block_size": 16, "num_gpu_blocks_override": 26}


@pytest.fixture(scope="module")
def trees(folder) -> Iterator[Engine]:
    settings = {"draft": str(PAIR / "draft"), "tree": TREES, "profile_seconds": 0.5}
    with engine(folder, "requests", PAIR / "target", OPTIONS, **settings) as tree_engine:
        yield tree_engine


@pytest.fixture
def by_first_tree(trees) -> Iterator[Engine]:
    """The engine decoding with the first tree whatever the load, nothing cached."""
    trees.call("worker", "decode_with", 0)
    trees.call("reset_prefix_cache")
    yield trees
    trees.call("worker", "mutate", None)
    trees.call("reset_prefix_cache")


def test_the_plugin_changes_only_engines_that_ask_for_it(trees, plain):
    """Both processes have loaded it; only the one of trees has another attention."""
    assert plain.engine.call("backends") == {"CPU_ATTN": None, "CUSTOM": BACKEND}
    assert trees.call("backends") == {"CPU_ATTN": BACKEND, "CUSTOM": BACKEND}


# ---- does greedy equality notice? ----


@pytest.mark.parametrize("mutation", ["no_compaction", "linear_positions", "chain_mask"])
def test_a_broken_part_is_noticed(mutation, by_first_tree, plain, prompts):
    some = [prompts[1], prompts[5], prompts[6], prompts[8]]
    expected = [output["tokens"] for output in plain.generate(some, [GREEDY] * 4)]
    by_first_tree.call("worker", "mutate", mutation)
    got = [output["tokens"] for output in by_first_tree.call("generate", some, [GREEDY] * 4)]
    assert sum(a != b for a, b in zip(expected, got)) >= 2


def test_a_worse_draft_is_only_slower(by_first_tree, plain, prompts):
    some = [prompts[1], prompts[5], prompts[6], prompts[8]]
    accepted = []
    for mutation in (None, "no_draft_compaction"):
        by_first_tree.call("worker", "mutate", mutation)
        before = by_first_tree.call("worker", "tree_report")
        assert_same(plain.generate(some, [GREEDY] * 4), by_first_tree.call("generate", some, [GREEDY] * 4), "worse")
        after = by_first_tree.call("worker", "tree_report")
        accepted.append((after["accepted"] - before["accepted"]) / (after["trees"] - before["trees"]))
    assert accepted[1] < accepted[0]


# ---- seeds ----


def test_seeds_give_the_same_text_alone_and_in_company(trees, prompts):
    some = [prompts[0], prompts[1], prompts[4], prompts[8]]
    seeded = [{"max_tokens": 30, "temperature": 0.8, "seed": 70 + index, "top_p": 0.95} for index in range(4)]
    trees.call("worker", "decode_with", "plan")
    alone = [trees.call("generate", [prompt], [params])[0]["tokens"] for prompt, params in zip(some, seeded)]
    assert len({tuple(tokens) for tokens in alone}) == 4
    company = [{"max_tokens": 20}, {"max_tokens": 25, "temperature": 1.0}]
    for mode in ("plan", "random", 0, 1):
        trees.call("worker", "decode_with", mode)
        both = trees.call("generate", [*some, prompts[0], prompts[4]], [*seeded, *company])
        assert [output["tokens"] for output in both[:4]] == alone, f"trees by {mode}"
    other = [{**params, "seed": params["seed"] + 1000} for params in seeded]
    assert [output["tokens"] for output in trees.call("generate", some, other)] != alone


def test_seeds_give_the_same_text_where_the_draft_ends(trees, prompts):
    """Behind its positions vLLM samples, from streams that nobody's trees and logprobs may have moved on."""
    some = [prompts[0], prompts[1], prompts[4], prompts[8]]
    seeded = [{"max_tokens": 40, "temperature": 0.9, "seed": 90 + index} for index in range(4)]
    trees.call("worker", "decode_with", "plan")
    trees.call("worker", "limit_draft", 30)
    try:
        alone = [trees.call("generate", [prompt], [params])[0]["tokens"] for prompt, params in zip(some, seeded)]
        both = trees.call("generate", [*some, prompts[6]], [*seeded, {"max_tokens": 60, "temperature": 1.0}])
        told = trees.call("generate", some, [{**params, "logprobs": 1} for params in seeded])
    finally:
        trees.call("worker", "limit_draft", None)
    assert [output["tokens"] for output in both[:4]] == alone
    assert [output["tokens"] for output in told] == alone


# ---- what fails, fails alone ----


def test_logits_that_are_not_finite_are_of_their_request_alone(trees, plain, prompts):
    trees.call("worker", "decode_with", 0)
    trees.call("worker", "break_logits", len(prompts[8]))
    some = [prompts[0], prompts[8], prompts[4], prompts[5]]
    got = trees.call("generate", some, [GREEDY] * 4)
    expected = plain.generate(some, [GREEDY] * 4)
    trees.call("worker", "break_logits", None)
    trees.call("reset_prefix_cache")
    for index in (0, 2, 3):
        assert_same([expected[index]], [got[index]], f"beside NaN, request {index}")
    assert len(got[1]["tokens"]) == GREEDY["max_tokens"]


def test_parameters_at_the_ends_of_their_ranges_end_nobody(trees, plain, prompts):
    """vLLM lets pass what fits neither int32 nor float32."""
    trees.call("worker", "decode_with", 0)
    ends = [{"temperature": 1.0, "top_p": 1e-50}, {"temperature": 2.0, "top_k": 2**40, "top_p": 1e-46}]
    ends += [{"temperature": 1e-3, "top_k": 1}, {"temperature": 1.0, "top_k": 2**31, "seed": 2**63 - 1}]
    some = [prompts[0], prompts[1], prompts[4], prompts[8]]
    got = trees.call("generate", some, [{"max_tokens": 24, **params} for params in ends])
    # all but the last are greedy
    assert_same(plain.generate(some[:3], [{"max_tokens": 24}] * 3), got[:3], "nearly greedy")
    assert len(got[3]["tokens"]) == 24


def test_logprobs_are_right_beside_those_of_named_tokens(trees, plain, prompts):
    """A request that names tokens decodes without a tree, and makes vLLM gather the logprobs of a step otherwise."""
    trees.call("worker", "decode_with", 0)
    some = [prompts[0], prompts[8], prompts[4], prompts[5]]
    params = [
        {**GREEDY, "logprobs": 2},
        {**GREEDY, "logprob_token_ids": [5, 9, 77, 300]},
        GREEDY,
        {**GREEDY, "logprobs": 7},
    ]
    got = trees.call("generate", some, params)
    assert_same(plain.generate(some[1:2], params[1:2]), [got[1]], "named tokens")
    for index in (0, 3):
        (alone,) = plain.generate(some[index : index + 1], params[index : index + 1])
        assert got[index]["tokens"] == alone["tokens"]
        complete = 0
        for token, ours, theirs in zip(alone["tokens"], got[index]["logprobs"], alone["logprobs"], strict=True):
            assert ours[str(token)] == pytest.approx(theirs[str(token)], abs=1e-3)
            complete += ours.keys() == theirs.keys()
        assert complete >= len(alone["tokens"]) - 2  # in steps without trees vLLM gives the emitted token's alone


def test_what_vllm_refuses_beside_trees_is_refused(trees, prompts):
    for params in ({"temperature": 1.0, "min_p": 0.1}, {"logit_bias": {5: 1.0}}):
        with pytest.raises(EngineError, match="not yet supported with speculative decoding"):
            trees.call("generate", prompts[:1], [{"max_tokens": 5, **params}])


@pytest.mark.parametrize("mode", ["random", "plan"])
def test_random_arrivals_leave_nothing_behind(mode, trees, plain, source, quick):
    """Greedy texts are plain vLLM's, aborted ones as far as they came; all blocks and pages are free in the end."""
    rng, count = random.Random(mode), 60 if quick else 300
    prompts, params = [], []
    for _ in range(count):
        length = rng.choice((2, 9, 17, 33, 60, 100))
        first = rng.randrange(len(source) - length)
        prompts.append(source[first : first + length])
        entry = {"max_tokens": rng.randrange(1, 50)}
        if rng.random() < 0.25:
            entry |= {"temperature": rng.choice((0.5, 1.0)), **rng.choice(({}, {"seed": 5}, {"top_k": 20}))}
        elif rng.random() < 0.1:
            entry |= {"repetition_penalty": 1.2}
        if rng.random() < 0.2:
            entry["abort_after"] = rng.randrange(0, 20)
        params.append(entry)
    bad = [
        {"prompt": [7] * 600, "params": {"max_tokens": 4}},
        {"prompt": [5, 6], "params": {"max_tokens": 4, "temperature": 1.0, "min_p": 0.3}},
        {"prompt": [], "params": {"max_tokens": 4}},
    ]
    trees.call("worker", "decode_with", mode)
    outcome = trees.call("arrivals", prompts, params, bad, count, 9)
    report = trees.call("worker", "tree_report")

    wanted = [{key: value for key, value in entry.items() if key != "abort_after"} for entry in params]
    expected = plain.generate(prompts, wanted)
    aborted = greedy = 0
    for index, (entry, tokens, ended) in enumerate(zip(params, outcome["tokens"], outcome["ended"])):
        aborted += ended == "aborted"
        assert ended == ("aborted" if ended == "aborted" else "length")
        if "temperature" not in entry:
            greedy += 1
            whole = expected[index]["tokens"]
            assert tokens == (whole[: len(tokens)] if ended == "aborted" else whole), f"request {index}: {entry}"
    assert aborted > count // 20 and greedy > count // 2
    assert len(outcome["refused"]) >= 3 and all(outcome["refused"]), outcome["refused"]
    assert trees.call("counters")["num_preemptions"] > 0
    free, blocks = trees.call("free_blocks")
    assert free == blocks == OPTIONS["num_gpu_blocks_override"] - 1
    assert report["draft_requests"] == 0 and report["draft_pages_free"] == report["draft_pages"]
