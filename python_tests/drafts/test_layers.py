"""The target's first layers as the draft: what they compute, that they leave the target alone, and lossless text."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from support.adapters import add_adapters
from support.chi_square import p_value, sequence_counts
from support.draft_checks import TREE, Growth, check_batches, check_kept_engines, check_text, trees_of_all_kinds
from support.quantised_models import quantise
from support.shaped_trees import steep_confidence
from support.tiny_families import FAMILIES, tiny_model
from support.tiny_models import noisy_copy, sequence_probabilities, tiny_llama
from torch import nn

from sequoia_kernels import HardwareProfile, TokenTree, adapt, generate, measure_profile
from sequoia_kernels.decoding import auto
from sequoia_kernels.drafts import DecodingState, LayersDraft, StageClock, draft_source
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import TreeStep
from sequoia_kernels.offload import load_offloaded
from sequoia_kernels.tree import ShapedTree

PROMPTS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(1))
LENS = [7, 4, 6]


def target_of(num_layers: int = 4, **options) -> nn.Module:
    return tiny_llama(3, **{"vocab_size": 12, "sharpness": 4.0, "num_layers": num_layers, **options})


@pytest.mark.parametrize("forward", ["native", "modules"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_nodes_logits_are_the_exits_behind_its_own_path(num_layers, num_steps, forward):
    model = target_of()
    target = adapt(model, forward=forward)
    growth = Growth(target, LayersDraft(target, num_layers), PROMPTS, LENS, TREE, num_steps)
    for request, node, path in growth.paths(TREE):
        tokens = torch.tensor([growth.texts[request] + path])
        with torch.inference_mode():
            states = model(input_ids=tokens, output_hidden_states=True).hidden_states[num_layers][:, -1]
            wanted = model.lm_head(model.model.norm(states))[0]
        torch.testing.assert_close(growth.buffers.draft_logits[request, node], wanted, rtol=1e-4, atol=1e-4)


def test_native_growth_draws_what_the_ops_draw():
    model = target_of()
    for num_steps in (0, 2):
        grown = []
        for backend in ("auto", "reference"):
            growth = Growth(adapt(model, forward="native"), LayersDraft(model, 2), PROMPTS, LENS, TREE, num_steps)
            growth.step.drafting.backend = backend
            growth.step.drafting._grown.clear()
            growth.step.draft_tokens(TREE)
            grown.append(growth.buffers)
        assert torch.equal(grown[0].tokens, grown[1].tokens)
        torch.testing.assert_close(grown[0].draft_logits, grown[1].draft_logits)


@pytest.mark.parametrize("forward", ["native", "modules"])
def test_committed_rows_are_the_targets_and_are_not_written(forward):
    target = adapt(target_of(), forward=forward)
    growth = Growth(target, LayersDraft(target, 2), PROMPTS, LENS, TREE, 2)
    step, lens = growth.step, growth.step.state.cache_lens.tolist()
    assert step.drafting.cache_tensors() == []
    shared = step.drafting.cache.tensors()
    assert [tensor.data_ptr() for tensor in shared] == [tensor.data_ptr() for tensor in step.target_cache.tensors()[:4]]
    before = [tensor.clone() for tensor in step.target_cache.tensors()]
    for tensor in step.target_cache.tensors():  # the tree's rows
        for request, length in enumerate(lens):
            tensor[request, length:] = 7.0
    step.draft_tokens(TREE)
    for index, (tensor, was) in enumerate(zip(step.target_cache.tensors(), before, strict=True)):
        for request, length in enumerate(lens):
            assert torch.equal(tensor[request, :length], was[request, :length])
            assert bool((tensor[request, length] == 7.0).all()) == (index >= 4)  # the root's row, of two layers
            assert (tensor[request, length + TREE.num_nodes :] == 7.0).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_or_its_refusal(family):
    target = tiny_model(family)
    prompts = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    if family == "gemma4_text":  # its embeddings of every layer come as one table
        with pytest.raises(
            UnsupportedModelError, match=r"LayersDraft: family gemma4_text must decode with its first 1"
        ):
            LayersDraft(target, 1)
        return
    assert check_text(target, LayersDraft(target, 1), prompts, max_new_tokens=16).stats.tokens_per_step > 1


def test_nothing_of_the_target_changes():
    model = target_of()
    own = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    modules, config = dict(model.named_modules()), copy.deepcopy(model.config.to_dict())
    options = {"max_new_tokens": 20, "do_sample": False}
    before = model.generate(PROMPTS[:1], **options)
    drafts = [LayersDraft(model, count) for count in (1, 3)]
    texts = [check_text(model, draft, PROMPTS).new_tokens for draft in (*drafts, *drafts)]
    assert all(text == texts[0] for text in texts)
    assert torch.equal(model.generate(PROMPTS[:1], **options), before)
    assert dict(model.named_modules()) == modules and model.config.to_dict() == config
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == {
        name: address for name, (address, _) in own.items()
    }
    assert all(torch.equal(model.state_dict()[name], value) for name, (_, value) in own.items())
    assert adapt(model).num_layers == 4 and [draft.model.num_layers for draft in drafts] == [1, 3]
    assert all(draft.model.model.config.num_hidden_layers == draft.num_layers for draft in drafts)
    mine = {id(weight) for weight in model.parameters()}
    assert all(id(weight) in mine for draft in drafts for weight in draft.model.model.parameters())


@pytest.mark.parametrize("tree", trees_of_all_kinds(ShapedTree((1, 2, 3, 2), steep_confidence())), ids=str)
def test_greedy_text_is_the_targets(tree):
    for target in (target_of(), adapt(target_of(), forward="modules")):
        check_text(target, "layers:2", PROMPTS[:2], tree=tree)


def test_another_exit_changes_speed_and_no_text():
    target = target_of()
    torch.manual_seed(0)
    head = nn.Linear(32, 12, bias=False).requires_grad_(False).eval()
    right, wrong = (
        check_text(target, LayersDraft(target, 3, head=exit_head), PROMPTS).stats.tokens_per_step
        for exit_head in (None, head)
    )
    assert right > wrong
    good = nn.Linear(32, 12, bias=False).requires_grad_(False).eval()
    good.weight.copy_(target.lm_head.weight)
    norm = copy.deepcopy(target.model.norm)
    draft = LayersDraft(target, 3, norm=norm, head=good)
    assert check_text(target, draft, PROMPTS).stats.tokens_per_step == right
    narrow = nn.Linear(32, 8, bias=False).requires_grad_(False).eval()
    narrow.weight.copy_(target.lm_head.weight[:8])
    check_text(target, LayersDraft(target, 3, head=narrow), PROMPTS)
    assert draft.identity != LayersDraft(target, 3).identity


def test_requests_of_a_batch_are_what_they_are_alone():
    target = target_of(sharpness=3.0)
    check_batches(target, LayersDraft(target, 2), PROMPTS, LENS)
    check_batches(adapt(target, forward="modules"), LayersDraft(target, 1), PROMPTS, LENS)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("lookup", [False, True])
def test_the_joint_distribution_is_the_targets(rule, lookup):
    target = tiny_llama(7, vocab_size=5, sharpness=8.0, num_layers=3)
    prompt = torch.tensor([2, 0, 4, 2, 0])
    output = generate(
        target, "layers:1", prompt.repeat(6000, 1), seed=range(6000), tree=TREE, max_new_tokens=3, temperature=1.0,
        rule=rule, lookup=lookup,
    )  # fmt: skip
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(target, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def test_engines_that_are_kept(monkeypatch):
    target = adapt(target_of())
    check_kept_engines(target, LayersDraft(target.model, 2), PROMPTS, monkeypatch)


def test_lookup_beside_them():
    target = target_of()
    prompts = PROMPTS[:, :3].repeat(1, 4)
    output = check_text(target, "layers:2", prompts, lookup=True, max_new_tokens=60)
    assert output.stats.lookup_steps > 0


def test_tokens_that_only_the_head_knows_and_hooks():
    target = tiny_llama(3, vocab_size=12, num_layers=3)
    target.set_input_embeddings(nn.Embedding(9, 32).requires_grad_(False).eval())  # fewer than it can predict
    with torch.no_grad():
        target.lm_head.weight.mul_(0.3)
    check_text(adapt(target, forward="modules"), "layers:1", PROMPTS % 9, max_new_tokens=12)

    def hook(paths, logits):
        return logits.index_fill(2, torch.tensor([5]), -torch.inf)

    hook.hooks_draft = True
    output = check_text(target_of(), "layers:2", PROMPTS, logits_hook=hook)
    assert all(5 not in tokens for tokens in output.new_tokens)


@pytest.mark.parametrize("word", ["auto", "adaptive"])
def test_trees_are_planned_for_them(word, monkeypatch):
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    target = adapt(target_of(), forward="modules")
    output = check_text(target, "layers:1", PROMPTS[:1], tree=word, max_new_tokens=60, eos_token_id=())
    assert len(output.new_tokens[0]) == 60
    (profile,) = (entry for entry in auto._profiles.values() if entry.draft_key)
    assert (
        profile.draft_key.startswith("llama-first-layers-1x32")
        and profile.models[profile.draft_key].cache_row_bytes == 0
    )
    one, all_of_them = (profile.forward_table(key, 1).p50_ms[0][0] for key in (profile.draft_key, profile.target_key))
    assert one < all_of_them


def test_one_draft_for_all_calls_as_long_as_the_target_stays_what_it_is():
    model = target_of()
    target = adapt(model)
    first = draft_source("layers:2", target)
    assert first is draft_source("layers:2", target) is draft_source("layers:2", adapt(model))
    assert first is not draft_source("layers:1", target)
    assert draft_source("layers:2", adapt(model, forward="modules")).model.runs == "modules"
    mine = LayersDraft(model, 2)
    text = check_text(model, mine, PROMPTS).new_tokens
    model.model.layers[1] = target_of().model.layers[1]  # equal numbers in other modules
    with pytest.raises(ValueError, match=r"LayersDraft: target must be the model whose first 2 layers these are"):
        generate(model, mine, PROMPTS, tree=TREE)
    assert check_text(model, "layers:2", PROMPTS).new_tokens == text
    assert draft_source("layers:2", adapt(model)) is not first
    model.double()
    assert check_text(model, "layers:2", PROMPTS).new_tokens == text
    gone = weakref.ref(model)
    del model, target, mine, first
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("forward", ["native", "modules"])
def test_up_to_the_last_position_of_a_table(forward):
    target = adapt(tiny_model("gpt2", n_positions=24), forward=forward)
    prompts = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    output = check_text(target, "layers:1", prompts, max_new_tokens=60)
    assert {len(tokens) for tokens in output.new_tokens} == {16}  # the last one is not fed


def test_adapters_inside_of_the_layers_are_the_drafts_as_well():
    target = target_of()
    draft = LayersDraft(target, 2)
    adapters = add_adapters(target)
    target.eval()
    for active in (["a"], ["b"], []):
        for adapter in adapters:
            adapter.active = active
        check_text(target, draft, PROMPTS)
        growth = Growth(target, draft, PROMPTS, LENS, TREE)
        with torch.inference_mode():
            states = target(input_ids=torch.tensor([growth.texts[0]]), output_hidden_states=True).hidden_states[2]
            wanted = target.lm_head(target.model.norm(states[0, -1]))
        torch.testing.assert_close(growth.buffers.draft_logits[0, 0], wanted, rtol=1e-4, atol=1e-4)


def test_quantised_targets():
    target = tiny_llama(3, vocab_size=32, hidden_size=64, num_layers=3, sharpness=4.0).bfloat16()
    quantise(target, "int8")
    check_text(target, "layers:2", PROMPTS)


@pytest.mark.parametrize("number", [0, 4, -1, 9])
def test_numbers_out_of_range(number):
    with pytest.raises(
        ValueError, match=rf"LayersDraft: num_layers must be in 1..3 for a target of 4 layers, got {number}"
    ):
        LayersDraft(target_of(), number)


def test_what_cannot_be_cut_is_refused_by_name(tmp_path):
    model = target_of()
    for number in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="LayersDraft: num_layers must be an integer, got"):
            LayersDraft(model, number)
    for text in ("layers:", "layers:x", "layers:-1"):
        with pytest.raises(ValueError, match=f"generate: draft must name a number of layers behind.*got '{text}'"):
            generate(model, text, PROMPTS, tree=TREE)
    with pytest.raises(ValueError, match=r"num_layers must be in 1..3"):
        generate(model, "layers:4", PROMPTS, tree=TREE)
    with pytest.raises(TypeError, match="draft_source: target must be given for layers:2, got None"):
        draft_source("layers:2")
    with pytest.raises(TypeError, match="LayersDraft: norm must be a torch module, got str"):
        LayersDraft(model, 2, norm="norm")
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        LayersDraft(model, 2, head=nn.Sequential(nn.Dropout(), nn.Linear(32, 12)))
    other = LayersDraft(noisy_copy(model, 0.1), 2)
    with pytest.raises(ValueError, match=r"LayersDraft: target must be the model whose first 2 layers"):
        generate(model, other, PROMPTS, tree=TREE)
    hooked = target_of()
    hooked.model.forward = hooked.model.forward  # as accelerate does it
    with pytest.raises(UnsupportedModelError, match="must run its LlamaModel by the class's own forward"):
        LayersDraft(adapt(hooked, forward="modules"), 2)
    model.save_pretrained(tmp_path)
    with (
        load_offloaded(tmp_path, resident_layers=1) as offloaded,
        pytest.raises(UnsupportedModelError, match="must hold all of its weights on its device, got one that streams"),
    ):
        LayersDraft(offloaded, 2)


def test_a_drafting_that_is_only_timed_has_rows_of_its_own():
    target = adapt(target_of())
    state = DecodingState.create(1, target.device, seeds=[0], temperature=[0.0], top_k=None, top_p=None)
    drafting = LayersDraft(target, 2).start(target, state, 32, backend="auto", clock=StageClock(enabled=False))
    drafting.level_call(TreeStep.of(TokenTree.chain(3).tensors("cpu")), 20)()
    assert drafting.cache.batch_size == 1 and len(drafting.cache.layers) == 2


def test_what_was_measured_is_read_again(tmp_path):
    target = adapt(target_of())
    profile = measure_profile(target, LayersDraft(target, 1), context_lens=[16], node_counts=[1, 2, 4], seconds=0.05)
    profile.save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json").draft_key == profile.draft_key
