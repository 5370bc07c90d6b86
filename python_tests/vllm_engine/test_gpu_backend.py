"""The CUDA backend in a real engine, on a CPU: only the kernels below vLLM's FlashAttention are others."""

from __future__ import annotations

import pytest
from support.engines.client import PAIR, engine
from support.engines.comparing import assert_same

pytestmark = pytest.mark.all_engines

EIGHT = [-1, 0, 0, 0, 1, 1, 2, 4]
TWELVE = [-1, 0, 0, 0, 0, 1, 1, 2, 5, 5, 6, 8]
OTHER_TWELVE = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 9, 10]
GREEDY = {"max_tokens": 48}
PARAMS = [
    GREEDY,
    {"max_tokens": 40, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"max_tokens": 40, "logprobs": 3},
    GREEDY,
    {"max_tokens": 40, "min_tokens": 8},
    GREEDY,
]


def test_greedy_text_is_plain_vllms(plain, prompts, source, folder):
    # A prompt of as many tokens as the largest tree has nodes is a chain in a step that could be captured.
    rounds = {
        "one": (prompts[:1], [GREEDY]),
        "twelve tokens": ([source[7:19], source[50:62]], [GREEDY] * 2),
        "six": (prompts[:6], PARAMS),
        "nine": (prompts, [GREEDY] * 9),
    }
    options = {"max_model_len": 1024, "max_num_seqs": 6, "max_num_batched_tokens": 100, "block_size": 16}
    trees = {"draft": str(PAIR / "draft"), "tree": [TWELVE, OTHER_TWELVE, EIGHT], "profile_seconds": 0.5}
    worker = "support.engines.device_worker.DeviceWorker"
    with engine(folder, "device", PAIR / "target", options, worker=worker, **trees) as tree_engine:
        for mode in (0, "random", 2, "plan"):
            tree_engine.call("worker", "decode_with", mode)
            for name, (given, params) in rounds.items():
                got = tree_engine.call("generate", given, params)
                assert_same(plain.generate(given, params), got, f"trees by {mode}, {name}")
        report = tree_engine.call("worker", "tree_report")
        assert report["accepted"] > report["trees"] > 0, report
        layouts = tree_engine.call("worker", "layouts")
        kinds = ("whole", "slices", "with a rest", "all to FlashAttention", "no trees")
        assert all(layouts.get(kind) for kind in kinds), layouts
