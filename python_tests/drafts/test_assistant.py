"""Gemma 4 assistants as a draft: transformers' own numbers, text that stays the target's, and how they are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.chi_square import p_value, sequence_counts
from support.draft_checks import TREE, Growth, check_batches, check_text, trees_of_all_kinds
from support.shaped_trees import steep_confidence
from support.tiny_families import spread_weights, tiny_model
from support.tiny_models import sequence_probabilities, tiny_llama

from sequoia_kernels import HardwareProfile, TokenTree, adapt, generate, measure_profile
from sequoia_kernels.cli import doctor
from sequoia_kernels.decoding import auto
from sequoia_kernels.drafts import AssistantDraft, DecodingState, draft_from_folder, draft_source, format_of
from sequoia_kernels.tree import ShapedTree

if not hasattr(transformers, "Gemma4AssistantForCausalLM"):
    pytest.skip("transformers has no Gemma 4 assistants", allow_module_level=True)

from transformers.generation.candidate_generator import (  # as new as they are
    SinglePositionMultiTokenCandidateGenerator,
)

VOCAB = 12
PROMPTS = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
LENS = [9, 4, 6]
# What Gemma 4 targets differ in: rows that layers share, inputs of each layer, keys that are values.
TARGETS: dict[str, dict[str, Any]] = {
    "shared": {},
    "unshared": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "keys are values": {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
}  # fmt: skip


def target_of(kind: str = "shared", vocab_size: int = VOCAB, sharpness: float = 1.0) -> Any:
    model = tiny_model(
        "gemma4_text", vocab_size=vocab_size, vocab_size_per_layer_input=vocab_size, tie_word_embeddings=False,
        **TARGETS[kind],
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def assistant_of(target: Any, seed: int = 3, centroids: int = 0, family: str = "Gemma4", **changed: Any) -> Any:
    """A random assistant of three layers for a target."""
    its = target.config.get_text_config()
    text = transformers.Gemma4TextConfig(**{
        "vocab_size": its.vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": its.sliding_window,
        "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changed,
    })  # fmt: skip
    config = getattr(transformers, f"{family}AssistantConfig")(
        text_config=text, backbone_hidden_size=its.hidden_size, use_ordered_embeddings=centroids > 0,
        num_centroids=centroids or 4, centroid_intermediate_top_k=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}AssistantForCausalLM")(config).eval()
    spread_weights(model, seed)
    if centroids:
        generator = torch.Generator().manual_seed(seed)
        model.masked_embedding.token_ordering.copy_(torch.randperm(its.vocab_size, generator=generator))
    return model


def by_transformers(target: Any, assistant: Any, text: list[int], path: list[int]) -> torch.Tensor:
    """The logits behind a path of drafted tokens: transformers' own forward, node by node. Text: with the root."""
    tokens = torch.tensor([text[:-1]])
    with torch.inference_mode():
        seen = target(input_ids=tokens, output_hidden_states=True, return_shared_kv_states=True)
        hidden = seen.hidden_states[-1][:, -1:]
        for token in [text[-1], *path]:
            embedded = target.get_input_embeddings()(torch.tensor([[token]]))
            output = assistant(
                inputs_embeds=torch.cat((embedded, hidden), -1), position_ids=torch.tensor([[len(text) - 1]]),
                shared_kv_states=seen.shared_kv_states,
            )  # fmt: skip
            hidden = output.last_hidden_state
        return output.logits[0, -1]


@pytest.mark.parametrize("centroids", [0, 4])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_nodes_logits_are_those_of_its_own_path(kind, centroids, num_steps):
    target = target_of(kind)
    assistant = assistant_of(target, centroids=centroids)
    growth = Growth(target, AssistantDraft(assistant, target), PROMPTS, LENS, TREE, num_steps)
    for request, node, path in growth.paths(TREE):
        wanted = by_transformers(target, assistant, growth.texts[request], path)
        torch.testing.assert_close(growth.buffers.draft_logits[request, node], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Gemma4", "Gemma4Unified"])
@pytest.mark.parametrize("centroids", [0, 4])
@pytest.mark.parametrize("length", [1, 3, 5, 9])  # the window is of 4 tokens
def test_a_chain_is_what_transformers_drafts(length, centroids, family):
    target = target_of()
    assistant = assistant_of(target, centroids=centroids, family=family)
    chain = TokenTree.chain(5)
    growth = Growth(target, AssistantDraft(assistant, target), PROMPTS[:1, :length], [length], chain, temperature=0.0)
    assistant.generation_config.num_assistant_tokens = 4
    generator = SinglePositionMultiTokenCandidateGenerator(
        assistant, target.get_input_embeddings(), SimpleNamespace(max_length=100)
    )
    text = torch.tensor(growth.texts)
    with torch.inference_mode():
        seen = target(input_ids=text[:, :-1], output_hidden_states=True, return_shared_kv_states=True)
        drafted, logits = generator.get_candidates(text, {}, seen, is_first_iteration=False, n_last_matches=0)
    assert growth.buffers.tokens[0, 1:].tolist() == drafted[0, -4:].tolist()
    torch.testing.assert_close(growth.buffers.draft_logits[0, :-1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tree", trees_of_all_kinds(ShapedTree((1, 2, 3, 2), steep_confidence())), ids=str)
@pytest.mark.parametrize("kind", TARGETS)
def test_greedy_text_is_the_targets(tree, kind):
    target = target_of(kind)
    check_text(target, AssistantDraft(assistant_of(target), target), PROMPTS[:2], tree=tree, max_new_tokens=16)


@pytest.mark.parametrize("centroids", [0, 4])
def test_requests_of_a_batch_are_what_they_are_alone(centroids):
    target = target_of()
    draft = AssistantDraft(assistant_of(target, centroids=centroids), target)
    check_batches(target, draft, PROMPTS, LENS)
    check_batches(target, draft, PROMPTS, [1, 2, 9])


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("lookup", [False, True])
def test_the_joint_distribution_is_the_targets(rule, lookup):
    target = target_of(vocab_size=5)
    prompt = torch.tensor([2, 0, 4, 2, 0])
    output = generate(
        target, AssistantDraft(assistant_of(target), target), prompt.repeat(6000, 1), seed=range(6000), tree=TREE,
        max_new_tokens=3, temperature=1.0, rule=rule, lookup=lookup,
    )  # fmt: skip
    assert output.stats.tokens_per_step > 1.1
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(target, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def test_lookup_beside_it():
    target = target_of()
    prompts = PROMPTS[:, :3].repeat(1, 4)
    draft = AssistantDraft(assistant_of(target), target)
    assert check_text(target, draft, prompts, lookup=True, max_new_tokens=60).stats.lookup_steps > 0


def test_the_targets_rows_are_read_and_not_written():
    target = target_of()
    growth = Growth(target, AssistantDraft(assistant_of(target), target), PROMPTS, LENS, TREE, 2)
    step, logits = growth.step, growth.buffers.draft_logits.clone()
    assert step.drafting.cache is step.target_cache and step.drafting.cache_tensors() == []
    for tensor in step.target_cache.tensors():
        for request, length in enumerate(step.state.cache_lens.tolist()):
            tensor[request, length:] = 7.0  # rows of the tree, which it must not see
    before = [tensor.clone() for tensor in step.target_cache.tensors()]
    step.draft_tokens(TREE)
    assert all(torch.equal(*pair) for pair in zip(before, step.target_cache.tensors(), strict=True))
    torch.testing.assert_close(growth.buffers.draft_logits, logits)


def test_nothing_of_either_model_changes():
    target = target_of()
    assistant = assistant_of(target)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (target, assistant)]
    own = target.generate(PROMPTS[:1], max_new_tokens=12, do_sample=False)
    check_text(target, assistant, PROMPTS)  # as a model: `generate` finds out what it is
    for model, weights in zip((target, assistant), before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(target.generate(PROMPTS[:1], max_new_tokens=12, do_sample=False), own)
    assert assistant.config._attn_implementation != "sequoia_assistant"


def test_a_kept_drafting_begins_another_batch():
    target = target_of()
    draft = AssistantDraft(assistant_of(target), target)
    growth, other = Growth(target, draft, PROMPTS, LENS, TREE, 2), Growth(target, draft, PROMPTS.flip(1), LENS, TREE)
    drafting = growth.step.drafting
    assert any(tensor is drafting.hidden for tensor in growth.step.state.advancing())
    device = torch.device("cpu")
    growth.step.restart(DecodingState.create(3, device, seeds=range(3), temperature=[1.0] * 3, top_k=None, top_p=None))
    assert not drafting.hidden.any()
    growth.step.prefill(PROMPTS.flip(1), torch.tensor(LENS, dtype=torch.int32))
    torch.testing.assert_close(drafting.hidden, other.step.drafting.hidden)


@pytest.mark.parametrize("word", ["auto", "adaptive"])
def test_trees_are_planned_for_it(word, monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    target = adapt(target_of())
    draft = AssistantDraft(assistant_of(target.model), target)
    check_text(target, draft, PROMPTS[:1], tree=word, max_new_tokens=40, eos_token_id=())
    profile = measure_profile(target, draft, context_lens=[16], node_counts=[1, 2, 4], seconds=0.05)
    profile.save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json").draft_key.startswith("gemma4_assistant-3x16")


def test_it_is_found_by_its_folder(tmp_path):
    target = target_of()
    assistant = assistant_of(target, centroids=4)
    assistant.save_pretrained(tmp_path / "assistant")
    draft = draft_from_folder(tmp_path / "assistant", adapt(target))
    assert isinstance(draft, AssistantDraft) and draft.identity == AssistantDraft(assistant, target).identity
    assert draft.identity != AssistantDraft(assistant_of(target, seed=4), target).identity
    assert format_of(tmp_path / "assistant").name == "gemma4_assistant"
    held = doctor._held(str(tmp_path / "assistant"))
    assert held["draft_format"] == "gemma4_assistant" and held["draft_vocab_size"] == VOCAB
    check_text(target, str(tmp_path / "assistant"), PROMPTS, max_new_tokens=12)
    low = adapt(target_of().bfloat16())
    assert draft_from_folder(tmp_path / "assistant", low).logits_dtype == torch.bfloat16
    check_text(low, tmp_path / "assistant", PROMPTS, max_new_tokens=12)


def test_it_is_given_as_a_model():
    target = target_of()
    assistant = assistant_of(target)
    source = draft_source(assistant, adapt(target))
    assert isinstance(source, AssistantDraft) and source.owner is assistant
    with pytest.raises(TypeError, match="target must be given for Gemma4AssistantForCausalLM, got None"):
        draft_source(assistant)


def test_what_cannot_be_a_draft_is_refused_by_name():
    target = target_of()
    with pytest.raises(TypeError, match="AssistantDraft: model must be a Gemma 4 assistant, got Gemma4ForCausalLM"):
        AssistantDraft(target, target)
    draft = AssistantDraft(assistant_of(target), target)
    with pytest.raises(ValueError, match="AssistantDraft: target must be the model that the draft was made for"):
        generate(target_of(), draft, PROMPTS, tree=TREE)
    with pytest.raises(ValueError, match="must have a layer of the type sliding_attention, got family llama with no"):
        AssistantDraft(assistant_of(target), tiny_llama(3, vocab_size=VOCAB))
    with pytest.raises(ValueError, match=r"must have the assistant's vocabulary of 12, got 14"):
        AssistantDraft(assistant_of(target), target_of(vocab_size=14))
    with pytest.raises(
        ValueError, match=r"heads of width 32 for 4 of queries in its layers of the type full_attention"
    ):
        AssistantDraft(assistant_of(target, global_head_dim=32), target)
    narrow = assistant_of(target)
    narrow.config.backbone_hidden_size = 16
    with pytest.raises(ValueError, match=r"must have hidden states of width 16, got 32"):
        AssistantDraft(narrow, target)
    with pytest.raises(ValueError, match=r"must have the assistant's dtype torch.bfloat16, got torch.float32"):
        AssistantDraft(assistant_of(target).bfloat16(), target)
