"""What trees cannot serve is refused when the engine starts, in our words."""

from __future__ import annotations

import pytest
from support.engines.client import PAIR, Engine, EngineError

pytestmark = pytest.mark.all_engines

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
        ({"kv_cache_dtype": "fp8_e4m3"}, "trees do not serve fp8 caches yet"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_engine_that_trees_cannot_serve_does_not_start(options, message, process):
    options = {"max_model_len": 256, "max_num_seqs": 4, **options}
    before = len(process.log.read_text())
    with pytest.raises(EngineError) as caught:
        process.call("start", str(PAIR / "target"), options, **TREES)
    assert message in str(caught.value) + process.log.read_text()[before:]


def test_a_draft_of_another_vocabulary_is_refused(process, tmp_path):
    from support.tiny_models import tiny_llama

    tiny_llama(0, vocab_size=64).save_pretrained(tmp_path)
    options = {"max_model_len": 256, "max_num_seqs": 4}
    with pytest.raises(EngineError, match="draft must have the target's vocabulary of"):
        process.call("start", str(PAIR / "target"), options, draft=str(tmp_path), tree=[-1, 0, 0])
