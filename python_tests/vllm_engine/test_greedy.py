"""Greedy text with trees is plain vLLM's, token for token: whatever the batch, the limits and the trees."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from support.engines.client import PAIR, engine
from support.engines.comparing import assert_same

EIGHT = [-1, 0, 0, 0, 1, 1, 2, 4]
SIXTEEN = [-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 5, 5, 6, 10, 10, 13]
FORTY = [-1, *(0,) * 6, *(1,) * 4, *(2,) * 3, *(3,) * 2, 4, *(7,) * 4, *(8,) * 3, *(11,) * 2, *(17,) * 4, *(18,) * 2]
FORTY += [*(24,) * 4, *(30,) * 2, 34, 36]

GREEDY = {"max_tokens": 64}
# What a tree cannot serve decodes without one, beside others that have one.
MIXED = [
    GREEDY,
    {"max_tokens": 40, "logprobs": 3},
    {"max_tokens": 40, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"max_tokens": 40, "regex": r"(self|None)\.[a-z_]{3,12}\(\)"},
    {"max_tokens": 40, "min_tokens": 8, "logprobs": 2},
    {"max_tokens": 33},
]
SMALL = {"block_size": 16}


class Case(NamedTuple):
    """An engine and what it is asked.

    Attributes:
        options: of the engine, beyond those of all.
        tree: argument of `engine_args`.
        parts: what it generates.
        seen: counters that must not be 0 in the end: else the case is none.
        environment: of its process.
    """

    options: dict[str, Any]
    tree: Any
    parts: tuple[str, ...]
    seen: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012  # nobody writes to it


CASES = {
    "default": Case({}, "auto", ("one", "four", "mixed", "stops")),
    "fixed": Case({}, EIGHT, ("four", "mixed", "stops")),
    "queue": Case({**SMALL, "max_num_seqs": 3, "max_num_batched_tokens": 64}, [SIXTEEN, EIGHT], ("nine", "mixed")),
    "preempt": Case(
        {**SMALL, "max_num_seqs": 6, "num_gpu_blocks_override": 34, "max_model_len": 480},
        "auto",
        ("nine",),
        ("num_preemptions",),
    ),
    "prefix": Case(SMALL, [SIXTEEN, EIGHT], ("nine", "again", "again"), ("cached",)),
    "forty": Case({**SMALL, "max_num_seqs": 4}, [FORTY, EIGHT], ("nine",)),
    "short": Case({**SMALL, "max_model_len": 320}, [EIGHT, SIXTEEN], ("limit",), ("cut",)),
    # Three trees of 16 rows do not fit into the 40 rows of a step: the scheduler cuts them.
    "cut": Case({**SMALL, "max_num_seqs": 3, "max_num_batched_tokens": 40}, [SIXTEEN, EIGHT], ("nine",), ("cut",)),
    "compiled": Case({**SMALL, "enforce_eager": False}, "auto", ("four", "nine")),
    "two_ranks": Case(
        {**SMALL, "tensor_parallel_size": 2, "max_num_seqs": 4},
        "auto",
        ("four", "nine"),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
}
QUICK = ("default",)


@pytest.fixture(scope="session")
def rounds(prompts, plain) -> dict[str, tuple[list[list[int]], list[dict[str, Any]]]]:
    """Prompts and parameters of what is generated, by name."""
    # Prompts that go on with what was generated before hit blocks whose rows were compacted.
    texts = plain.generate(prompts, [GREEDY] * 9)
    longer = [prompt + output["tokens"] for prompt, output in zip(prompts, texts)]
    # Texts that end in the middle of an accepted path.
    stops = [{**GREEDY, "stop_token_ids": [output["tokens"][20 + index]]} for index, output in enumerate(texts[:4])]
    stops += [{**GREEDY, "stop": [output["text"][50:54]]} for output in texts[4:]]
    return {
        "one": (prompts[:1], [GREEDY]),
        "four": (prompts[:4], [GREEDY] * 4),
        "mixed": (prompts[:6], MIXED),
        "nine": (prompts, [GREEDY] * 9),
        "stops": (prompts, stops),
        "again": (longer, [GREEDY] * 9),
        "limit": (prompts[:6], [{"max_tokens": 320 - len(prompt)} for prompt in prompts[:6]]),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.all_engines) for name in CASES]
)
def test_greedy_text_is_plain_vllms(name, plain, rounds, folder):
    case = CASES[name]
    options = {"max_model_len": 1024, "max_num_seqs": 16, **case.options}
    trees = {"draft": str(PAIR / "draft"), "tree": case.tree, "profile_seconds": 0.5}
    with engine(folder, name, PAIR / "target", options, environment=case.environment, **trees) as tree_engine:
        cached = 0
        modes = ("plan", "random", 0) if name != "fixed" else ("as given",)
        for mode in modes:
            if mode != "as given":
                tree_engine.call("worker", "decode_with", mode)
            for part in case.parts:
                got = tree_engine.call("generate", *rounds[part])
                assert_same(plain.generate(*rounds[part]), got, f"{name}, trees by {mode}, {part}")
                cached += sum(output["cached"] for output in got)
        report = tree_engine.call("worker", "tree_report")
        counters = {**tree_engine.call("counters"), **report, "cached": cached}
        assert report["trees"] and report["accepted"] > report["trees"], report
        assert all(counters.get(counter) for counter in case.seen), counters
        free, blocks = tree_engine.call("free_blocks")
        assert free == blocks
