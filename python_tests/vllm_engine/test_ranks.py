"""Tensor parallelism: ranks keep the same rows although they compute differently; a difference is reported if asked."""

from __future__ import annotations

import pytest
from support.engines.client import PAIR, EngineError, engine
from support.engines.comparing import assert_same

pytestmark = pytest.mark.all_engines

GREEDY = {"max_tokens": 48}
OPTIONS = {"max_model_len": 480, "max_num_seqs": 4, "block_size": 16, "tensor_parallel_size": 2}
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
TREES = {"draft": str(PAIR / "draft"), "tree": [[-1, 0, 0, 0, 1, 1, 2, 4], [-1, 0, 0, 1]], "profile_seconds": 0.5}


def test_another_ranks_logits_change_nothing(folder, plain, prompts):
    expected = plain.generate(prompts[:4], [GREEDY] * 4)
    with engine(folder, "ranks", PAIR / "target", OPTIONS, environment=ENVIRONMENT, **TREES) as ranks:
        ranks.call("worker", "disturb", 1, "logits")
        for mode in ("random", 0, "plan"):
            ranks.call("worker", "decode_with", mode)
            assert_same(expected, ranks.call("generate", prompts[:4], [GREEDY] * 4), f"ranks, trees by {mode}")


@pytest.mark.parametrize("what", ["logits", "draft"])
def test_a_difference_between_ranks_is_reported(what, folder, plain, prompts):
    settings = {**TREES, "check_ranks": True}
    with engine(folder, f"checked_{what}", PAIR / "target", OPTIONS, environment=ENVIRONMENT, **settings) as ranks:
        for mode in ("random", 0):
            ranks.call("worker", "decode_with", mode)
            got = ranks.call("generate", prompts[:4], [GREEDY] * 4)
            assert_same(plain.generate(prompts[:4], [GREEDY] * 4), got, f"checked ranks, trees by {mode}")
        assert ranks.call("worker", "tree_report", rank=1)["compared"] > 10
        ranks.call("worker", "disturb", 1, what)
        with pytest.raises(EngineError):
            ranks.call("generate", prompts[4:6], [GREEDY] * 2)
        assert "ranks must decide alike, got another path on rank 1 than on rank 0" in ranks.log.read_text()
