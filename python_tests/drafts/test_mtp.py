"""Modules for multi-token prediction as a draft: their rows along trees, lossless text, and how they are loaded."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.chi_square import p_value, sequence_counts
from support.draft_checks import TREE, Growth, check_batches, check_text, trees_of_all_kinds
from support.shaped_trees import steep_confidence
from support.tiny_families import spread_weights
from support.tiny_models import sequence_probabilities, tiny_llama

from sequoia_kernels import HardwareProfile, TokenTree, adapt, generate, measure_profile
from sequoia_kernels.decoding import auto
from sequoia_kernels.drafts import DecodingState, MtpDraft
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.tree import ShapedTree

layers = pytest.importorskip("transformers.modeling_layers")
if not hasattr(layers, "MtpModel"):
    pytest.skip("transformers has no MtpModel", allow_module_level=True)

from transformers.cache_utils import MtpCache  # noqa: E402  # as new as MtpModel
from transformers.modeling_layers import MtpModel  # noqa: E402

PROMPTS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(1))
LENS = [7, 4, 6]
_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
# family -> (configuration class, its arguments beyond the common ones)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3Config", {**_EXPERTS, **_LATENT}),
    "glm4_moe": ("Glm4MoeConfig", {**_EXPERTS, "head_dim": 8}),
    "mellum": (
        "MellumConfig",
        {
            "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "sarvam_mla": ("SarvamMLAConfig", {**_EXPERTS, **_LATENT}),
    "sarvam_moe": ("SarvamMoEConfig", {**_EXPERTS, "num_experts": 4, "head_dim": 8}),
}  # fmt: skip
_FAMILIES = ["deepseek_v3", "glm4_moe"]


def target_of(family: str = "glm4_moe", num_modules: int = 1, vocab_size: int = 12, sharpness: float = 2.0) -> Any:
    name, arguments = _CONFIGS[family]
    common = {
        "vocab_size": vocab_size, "num_mtp_layers": num_modules, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1200,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, name)(**{**common, **arguments})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spread_weights(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def modules_of(target, num_modules: int = 1, seed: int = 5) -> MtpModel:
    modules = MtpModel(target, num_modules)
    spread_weights(modules.layers, seed)
    return modules


def good_modules_of(target) -> MtpModel:
    """A module that hands on the embedding of the newest token through a weak layer: a guess that is often right."""
    modules = modules_of(target)
    layer = modules.layers[0]
    with torch.no_grad():
        layer.enorm.weight.fill_(1.0)
        layer.eh_proj.weight.zero_()
        layer.eh_proj.weight[:, :32].copy_(torch.eye(32))
        layer.mtp_block.load_state_dict(target.model.layers[-1].state_dict())
        layer.post_norm.load_state_dict(target.model.norm.state_dict())
    return modules


def draft_of(target, num_modules: int = 1) -> MtpDraft:
    return MtpDraft(modules_of(target, num_modules), target)


def rows_by_hand(target, modules, text, path):
    """The logits behind a path of drafted tokens, all rows of all modules computed anew without a cache.

    `text` are the committed tokens with the root, y_0 .. y_c. Position p of module k reads what module k - 1 gave at
    p - 1; the last module's positions behind those that the others reach read what it gave itself.
    """
    count, last = len(modules.layers), len(text) - 1
    tokens = [*text, *path]
    with torch.inference_mode():
        states = target(input_ids=torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1][0]
        before = {p: states[p - 1] for p in range(1, last + 1)}  # what module 0 reads at p
        for module in range(count):
            cache = partial(MtpCache, config=target.config.get_mtp_config())
            first, end = module + 1, last + min(module, len(path))
            if module == count - 1:
                end = last + len(path)
            found: dict[int, torch.Tensor] = {}
            for reach in range(min(last + module, end), end + 1):
                inputs = [before[p] if p in before else found[p - 1] for p in range(first, reach + 1)]
                output = modules.forward_layer(
                    module, torch.stack(inputs)[None], torch.arange(first, reach + 1)[None], cache(),
                    input_ids=torch.tensor([tokens[first : reach + 1]]),
                )[0]  # fmt: skip
                found = dict(zip(range(first, reach + 1), output, strict=True))
            if module == min(len(path), count - 1):
                return modules.shared_head(found[last + len(path)])
            before = {p + 1: row for p, row in found.items()}
    raise AssertionError("some module scores every path")


@pytest.mark.parametrize(
    ("family", "num_modules"),
    [*product(_FAMILIES, [1, 2, 3]), ("mellum", 1), ("sarvam_mla", 1), ("sarvam_moe", 2)],
)
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_nodes_logits_are_those_of_its_own_path(family, num_modules, num_steps):
    target = target_of(family, num_modules)
    modules = modules_of(target, num_modules)
    growth = Growth(target, MtpDraft(modules, target), PROMPTS, LENS, TREE, num_steps)
    for request, node, path in growth.paths(TREE):
        wanted = rows_by_hand(target, modules, growth.texts[request], path)
        torch.testing.assert_close(growth.buffers.draft_logits[request, node], wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("num_modules", [1, 2])
def test_a_chain_is_what_transformers_drafts(family, num_modules):
    """The first steps' tokens of transformers' own loop over the modules, behind a prompt."""
    target = target_of(family, num_modules)
    modules = modules_of(target, num_modules)
    chain = TokenTree.chain(num_modules + 1)
    growth = Growth(target, MtpDraft(modules, target), PROMPTS[:1], [7], chain, temperature=0.0)
    text = torch.tensor(growth.texts)
    with torch.inference_mode():
        states = target(input_ids=text[:, :-1], output_hidden_states=True).hidden_states[-1]
        drafted, logits, _ = modules(
            text[:, 1:], states, None, torch.arange(1, text.shape[1])[None], MtpCache(config=modules.config)
        )
    assert growth.buffers.tokens[0, 1:].tolist() == drafted[0].tolist()
    torch.testing.assert_close(growth.buffers.draft_logits[0, :-1], logits[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tree", trees_of_all_kinds(ShapedTree((1, 2, 3, 2), steep_confidence())), ids=str)
@pytest.mark.parametrize("num_modules", [1, 2])
def test_greedy_text_is_the_targets(tree, num_modules):
    target = target_of(num_modules=num_modules)
    check_text(target, draft_of(target, num_modules), PROMPTS[:2], tree=tree, max_new_tokens=16)


def test_other_modules_change_speed_and_no_text():
    target = target_of()
    good, random = MtpDraft(good_modules_of(target), target), draft_of(target)
    fast, slow = (check_text(target, draft, PROMPTS).stats.tokens_per_step for draft in (good, random))
    assert fast > slow
    assert good.identity != random.identity and good.fingerprint == random.fingerprint


@pytest.mark.parametrize("num_modules", [1, 3])
def test_requests_of_a_batch_are_what_they_are_alone(num_modules):
    target = target_of(num_modules=num_modules)
    check_batches(target, draft_of(target, num_modules), PROMPTS, LENS)
    check_batches(target, draft_of(target, num_modules), PROMPTS, [1, 2, 7])  # shorter than there are modules


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("lookup", [False, True])
def test_the_joint_distribution_is_the_targets(rule, lookup):
    target = target_of(vocab_size=5, sharpness=1.0)
    prompt = torch.tensor([2, 0, 4, 2, 0])
    output = generate(
        target, MtpDraft(good_modules_of(target), target), prompt.repeat(6000, 1), seed=range(6000), tree=TREE,
        max_new_tokens=3, temperature=1.0, rule=rule, lookup=lookup,
    )  # fmt: skip
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(target, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def test_lookup_beside_them_and_rows_of_what_it_proposed():
    target = target_of()
    prompts = PROMPTS[:, :3].repeat(1, 4)
    output = check_text(target, draft_of(target), prompts, lookup=True, max_new_tokens=60)
    assert output.stats.lookup_steps > 0
    modules = modules_of(target)
    growth = Growth(target, MtpDraft(modules, target), PROMPTS, LENS, TREE)
    step = growth.step
    layout, buffers = step.prepare(TREE)
    # Another one's proposal for the whole tree: the target's own greedy path along nodes 1, 4, 7.
    with torch.inference_mode():
        for request, text in enumerate(growth.texts):
            for node in (1, 4, 7):
                buffers.tokens[request, node] = target(input_ids=torch.tensor([text])).logits[0, -1].argmax()
                text.append(int(buffers.tokens[request, node]))
    step.drafting.see_tree(layout, buffers)
    buffers.draft_logits.fill_(0.0)
    step.state.temperature.zero_()
    path, hidden_states = step.verify_tokens(TREE)
    emitted = step.commit_path(TREE, path, hidden_states)
    assert emitted.num_tokens.tolist() == [4, 4, 4]
    for text, tokens in zip(growth.texts, emitted.tokens.tolist(), strict=True):
        text.append(tokens[3])
    step.draft_tokens(TREE)
    for request, node, drafted in growth.paths(TREE):
        wanted = rows_by_hand(target, modules, growth.texts[request], drafted)
        torch.testing.assert_close(buffers.draft_logits[request, node], wanted, rtol=2e-3, atol=2e-3)


def test_long_prompts_are_fed_in_chunks():
    target = target_of(num_modules=2)
    modules = modules_of(target, 2)
    prompt = torch.randint(12, (1, 1030), generator=torch.Generator().manual_seed(2))
    check_text(target, MtpDraft(modules, target), prompt, max_new_tokens=4)


def test_nothing_of_the_target_changes():
    target = target_of(num_modules=2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    own = target.generate(PROMPTS[:1], max_new_tokens=12, do_sample=False)
    check_text(target, draft_of(target, 2), PROMPTS)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert torch.equal(target.generate(PROMPTS[:1], max_new_tokens=12, do_sample=False), own)


def test_a_kept_drafting_begins_another_batch():
    target = target_of(num_modules=2)
    draft = draft_of(target, 2)
    growth, other = Growth(target, draft, PROMPTS, LENS, TREE, 2), Growth(target, draft, PROMPTS.flip(1), LENS, TREE)
    drafting = growth.step.drafting
    assert any(tensor is drafting.outputs for tensor in growth.step.state.advancing())
    device = torch.device("cpu")
    growth.step.restart(DecodingState.create(3, device, seeds=range(3), temperature=[1.0] * 3, top_k=None, top_p=None))
    assert not drafting.outputs.any() and not any(tensor.any() for tensor in drafting.cache.tensors())
    growth.step.prefill(PROMPTS.flip(1), torch.tensor(LENS, dtype=torch.int32))
    torch.testing.assert_close(drafting.outputs, other.step.drafting.outputs)


@pytest.mark.parametrize("word", ["auto", "adaptive"])
def test_trees_are_planned_for_them(word, monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    target = adapt(target_of())
    draft = draft_of(target.model)
    check_text(target, draft, PROMPTS[:1], tree=word, max_new_tokens=40, eos_token_id=())
    profile = measure_profile(target, draft, context_lens=[16], node_counts=[1, 2, 4], seconds=0.05)
    profile.save(tmp_path / "profile.json")
    assert "draft_step" in HardwareProfile.load(tmp_path / "profile.json").ops
    assert profile.draft_key.startswith("glm4_moe-mtp-1x32")


# ---- loading, and what is refused ----


def saved(target, modules, folder):
    """A checkpoint as published: the modules are layers behind the model's own."""
    target.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    first = target.config.num_hidden_layers
    for name, value in modules.layers.state_dict().items():
        number, _, rest = name.partition(".")
        if ".experts." in rest:
            continue
        weights[f"model.layers.{first + int(number)}.{rest.removeprefix('mtp_block.')}"] = value.clone()
    for number, layer in enumerate(modules.layers):  # published one by one
        experts = layer.mtp_block.mlp.experts
        for expert, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            for part, value in (("gate", gate), ("up", up), ("down", down)):
                key = f"model.layers.{first + number}.mlp.experts.{expert}.{part}_proj.weight"
                weights[key] = value.detach().clone().contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights


@pytest.mark.parametrize("family", _FAMILIES)
def test_modules_in_the_targets_own_checkpoint(family, tmp_path, monkeypatch):
    made = target_of(family, 2)
    modules = modules_of(made, 2)
    # transformers knows the published models' layer numbers only.
    monkeypatch.setattr(type(made), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\."])
    weights = saved(made, modules, tmp_path)
    target = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    draft = MtpDraft.from_target(target)
    assert draft.num_modules == 2 and draft.identity == MtpDraft(modules, made).identity
    check_text(target, draft, PROMPTS, max_new_tokens=12)
    missing = {name: value for name, value in weights.items() if name != "model.layers.3.eh_proj.weight"}
    save_file(missing, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"missing from .*layers.1.eh_proj.weight"):
        MtpDraft.from_target(target)


def test_what_cannot_be_a_draft_is_refused_by_name():
    target = target_of()
    with pytest.raises(TypeError, match="MtpDraft: model must be transformers' MtpModel, got Glm4MoeForCausalLM"):
        MtpDraft(target, target)
    with pytest.raises(UnsupportedModelError, match="got family llama whose configuration says num_mtp_layers = None"):
        MtpDraft.from_target(tiny_llama(3))
    draft, other = draft_of(target), target_of()
    with pytest.raises(ValueError, match="MtpDraft: target must be the model that the modules were made for"):
        generate(other, draft, PROMPTS, tree=TREE)
    target.bfloat16()
    with pytest.raises(
        ValueError, match=r"MtpDraft: target must be of the modules' dtype torch.float32, got torch.bfloat"
    ):
        generate(target, draft, PROMPTS, tree=TREE)
    target.float()
    modules = modules_of(target)
    modules.layers[0].mtp_block.forward = lambda states, **options: states
    with pytest.raises(UnsupportedModelError, match="family glm4_moe cannot decode trees with its modules: module 0"):
        MtpDraft(modules, target)
