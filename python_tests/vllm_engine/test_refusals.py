"""What trees cannot serve is refused when the engine starts, in our words."""

from __future__ import annotations

import pytest
from support.engines.client import PAIR, Engine, EngineError
from support.engines.comparing import assert_same
from support.tiny_models import tiny_llama
from transformers import AutoConfig

pytestmark = pytest.mark.all_engines

OPTIONS = {"max_model_len": 256, "max_num_seqs": 4}
TREES = {"draft": str(PAIR / "draft"), "tree": [-1, 0, 0]}


@pytest.fixture(scope="module")
def process(folder):
    process = Engine(folder, "refusals")
    yield process
    process.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "trees do not serve LoRA adapters yet; use no --enable-lora"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode must be raw_logprobs, got processed_logprobs"),
        (
            {"logits_processors": ["any.module:Processor"]},
            "custom logits processors are not applied to the nodes of trees, so there must be none, got any.module:",
        ),
        ({"pipeline_parallel_size": 2}, "trees do not serve pipeline parallelism yet"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "trees do not serve fp8_e4m3 caches of a float32 model yet"),
        ({"kv_cache_dtype": "bfloat16"}, "trees do not serve bfloat16 caches of a float32 model yet"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_engine_that_trees_cannot_serve_does_not_start(options, message, process):
    options = {**OPTIONS, **options}
    before = len(process.log.read_text())
    with pytest.raises(EngineError) as caught:
        process.call("start", str(PAIR / "target"), options, **TREES)
    assert message in str(caught.value) + process.log.read_text()[before:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worker_cls": "auto"}, "worker_cls must be the tree worker, got CPUWorker; take all of engine_args"),
        ({"additional_config": {}}, "additional_config['sequoia'] must be the mapping that vllm.engine_args gives"),
        ({"num_speculative_tokens": 1}, "num_speculative_tokens must be 2, the nodes of the largest tree"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_belong_together_are_refused_at_start(change, message, process):
    before = len(process.log.read_text())
    with pytest.raises(EngineError) as caught:
        process.call("start", str(PAIR / "target"), OPTIONS, changed=change, **TREES)
    assert message in str(caught.value) + process.log.read_text()[before:]


def test_blocks_of_another_size_for_the_kernels_are_refused(process):
    message = "blocks of caches must be those of the kernels, got 8 of 128 tokens in model.layers.0"
    before = len(process.log.read_text())
    with pytest.raises(EngineError) as caught:
        process.call("start", str(PAIR / "target"), OPTIONS, worker="support.engines.worker.OtherBlocksWorker", **TREES)
    assert message in str(caught.value) + process.log.read_text()[before:]


def test_a_draft_of_another_vocabulary_is_refused(process, tmp_path):
    tiny_llama(0, vocab_size=4096).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="draft must have the target's vocabulary of"):
        process.call("start", str(PAIR / "target"), OPTIONS, draft=str(tmp_path), tree=[-1, 0, 0])


@pytest.mark.parametrize("difference", [-300, -1, 1, 300])
def test_heads_may_be_padded_otherwise(difference, process, plain, prompts, tmp_path):
    """A random draft, whose wider head proposes tokens that the target does not have, changes no text."""
    vocab_size = AutoConfig.from_pretrained(PAIR / "target").vocab_size + difference
    tiny_llama(difference, vocab_size=vocab_size, sharpness=1.0).save_pretrained(tmp_path)
    process.call("start", str(PAIR / "target"), OPTIONS, draft=str(tmp_path), tree=[-1, 0, 0, 0, 1])
    try:
        some = [prompts[0], prompts[1], prompts[4]]
        got = process.call("generate", some, [{"max_tokens": 30}] * 3)
        assert_same(plain.generate(some, [{"max_tokens": 30}] * 3), got, f"a head of {vocab_size}")
        assert process.call("worker", "tree_report")["trees"] > 0
        sampled = process.call("generate", some, [{"max_tokens": 30, "temperature": 1.5}] * 3)
        assert all(len(output["tokens"]) == 30 for output in sampled)
    finally:
        process.call("stop")
