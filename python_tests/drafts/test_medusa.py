"""Medusa heads as a draft: their rows, which node reads which, lossless text, and their files."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.chi_square import p_value, sequence_counts
from support.draft_checks import TREE, Growth, check_batches, check_kept_engines, check_text, trees_of_all_kinds
from support.shaped_trees import steep_confidence
from support.tiny_models import sequence_probabilities, tiny_llama

from sequoia_kernels import HardwareProfile, TokenTree, adapt, generate, measure_profile
from sequoia_kernels.decoding import auto
from sequoia_kernels.drafts import MedusaDraft, draft_from_folder
from sequoia_kernels.drafts.medusa import MedusaHeads
from sequoia_kernels.models import prefill
from sequoia_kernels.tree import ShapedTree

PROMPTS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(1))
LENS = [7, 4, 6]
WIDTH = 32


def target_of(**options):
    return tiny_llama(3, **{"vocab_size": 12, "sharpness": 4.0, **options})


def weights_of(target, num_heads=4, num_blocks=1, seed=0, noise=1.0) -> dict[str, torch.Tensor]:
    """Heads near the target's own head: what it says of the next token is a guess at those behind it, too."""
    generator = torch.Generator().manual_seed(seed)
    own = target.lm_head.weight
    weights = {}
    for head in range(num_heads):
        for block in range(num_blocks):
            weights[f"{head}.{block}.linear.weight"] = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            weights[f"{head}.{block}.linear.bias"] = torch.randn(WIDTH, generator=generator)
        weights[f"{head}.{num_blocks}.weight"] = own + noise * own.std() * torch.randn(own.shape, generator=generator)
    return weights


def write_folder(path, weights, file="medusa_lm_head.safetensors", **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if file.endswith(".pt"):
        torch.save(weights, path / file)
    else:
        save_file(weights, path / file)
    return path


def draft_of(target, num_heads=4, num_blocks=1, **options) -> MedusaDraft:
    weights = weights_of(target, num_heads, num_blocks, **options)

    def stack(name):
        return torch.stack([weights[f"{head}.{name}"] for head in range(num_heads)])

    blocks = range(num_blocks)
    heads = MedusaHeads(
        tuple(stack(f"{block}.linear.weight") for block in blocks),
        tuple(stack(f"{block}.linear.bias")[:, None] for block in blocks),
        stack(f"{num_blocks}.weight"),
    )
    return MedusaDraft(heads, target.config.num_hidden_layers)


def row_of(weights, head, num_blocks, states):
    """One head, one row, in float64."""
    states = states.double()
    for block in range(num_blocks):
        linear = [weights[f"{head}.{block}.linear.{name}"].double() for name in ("weight", "bias")]
        states = states + F.silu(F.linear(states, *linear))
    return weights[f"{head}.{num_blocks}.weight"].double() @ states


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_nodes_logits_are_its_depths_head_behind_the_newest_committed_token(num_steps, num_blocks, tmp_path):
    model = target_of()
    weights = weights_of(model, 4, num_blocks)
    folder = write_folder(tmp_path / "heads", weights, medusa_num_heads=4, medusa_num_layers=num_blocks)
    growth = Growth(model, MedusaDraft.from_folder(folder, adapt(model)), PROMPTS, LENS, TREE, num_steps)
    for request, node, path in growth.paths(TREE):
        committed = torch.tensor([growth.texts[request][:-1]])  # without the root
        with torch.inference_mode():
            states = model(input_ids=committed, output_hidden_states=True).hidden_states[-1][0, -1]
        wanted = row_of(weights, len(path), num_blocks, states)
        found = growth.buffers.draft_logits[request, node].double()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tree", trees_of_all_kinds(ShapedTree((1, 2, 3, 2), steep_confidence())), ids=str)
def test_greedy_text_is_the_targets(tree):
    for target in (target_of(), adapt(target_of(), forward="modules")):
        check_text(target, draft_of(target_of()), PROMPTS[:2], tree=tree)


def test_wrong_heads_change_speed_and_no_text():
    target = target_of()
    right = draft_of(target)
    # The heads' own best guesses, turned around.
    wrong = MedusaDraft(right.heads._replace(head=-right.heads.head), 2)
    fast, slow = (check_text(target, draft, PROMPTS).stats.tokens_per_step for draft in (right, wrong))
    assert fast > slow
    check_text(target, draft_of(target_of(vocab_size=9)), PROMPTS)  # of the first tokens only
    check_text(target, draft_of(target_of(vocab_size=15)), PROMPTS)  # of more than there are


def test_requests_of_a_batch_are_what_they_are_alone():
    target = target_of(sharpness=3.0)
    check_batches(target, draft_of(target), PROMPTS, LENS)


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
@pytest.mark.parametrize("lookup", [False, True])
def test_the_joint_distribution_is_the_targets(rule, lookup):
    target = tiny_llama(7, vocab_size=5, sharpness=8.0)
    prompt = torch.tensor([2, 0, 4, 2, 0])
    output = generate(
        target, draft_of(target), prompt.repeat(6000, 1), seed=range(6000), tree=TREE, max_new_tokens=3,
        temperature=1.0, rule=rule, lookup=lookup,
    )  # fmt: skip
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(target, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def test_engines_that_are_kept(monkeypatch):
    target = adapt(target_of())
    check_kept_engines(target, draft_of(target.model), PROMPTS, monkeypatch)


def test_lookup_beside_them():
    target = target_of()
    output = check_text(target, draft_of(target), PROMPTS[:, :3].repeat(1, 4), lookup=True, max_new_tokens=60)
    assert output.stats.lookup_steps > 0


def test_hooks_see_the_draft():
    def hook(paths, logits):
        return logits.index_fill(2, torch.tensor([5]), -torch.inf)

    hook.hooks_draft = True
    output = check_text(target_of(), draft_of(target_of()), PROMPTS, logits_hook=hook)
    assert all(5 not in tokens for tokens in output.new_tokens)


def test_trees_are_no_deeper_than_there_are_heads():
    target = target_of()
    draft = draft_of(target, num_heads=2)
    assert draft.max_levels == 3
    check_text(target, draft, PROMPTS, tree=TokenTree.chain(3))
    with pytest.raises(ValueError, match=r"generate: tree must have at most the 3 levels that MedusaDraft\(2 heads"):
        generate(target, draft, PROMPTS, tree=TokenTree.chain(4))


@pytest.mark.parametrize("word", ["auto", "adaptive"])
def test_trees_are_planned_for_them(word, monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    target = adapt(target_of(), forward="modules")
    draft = draft_of(target.model, num_heads=2)
    output = check_text(target, draft, PROMPTS[:1], tree=word, max_new_tokens=60, eos_token_id=())
    assert all(entry.num_levels <= 3 for entry in output.stats.steps_by_tree)
    profile = measure_profile(target, draft, context_lens=[16], node_counts=[1, 2, 4], seconds=0.05)
    profile.save(tmp_path / "profile.json")
    assert "draft_step" in HardwareProfile.load(tmp_path / "profile.json").ops
    assert profile.draft_key.startswith("medusa-2-1")


def test_a_kept_drafting_begins_another_batch():
    target = adapt(target_of())
    draft = draft_of(target.model)
    growth = Growth(target, draft, PROMPTS, LENS, TREE, 2)
    drafting, state = growth.step.drafting, growth.step.state
    assert state.carried[-1] is drafting.hidden and any(row is drafting.hidden for row in state.advancing())
    other = Growth(target, draft, PROMPTS.flip(1), LENS, TREE)
    growth.step.restart(other.step.state)
    assert not drafting.hidden.any()
    growth.step.prefill(PROMPTS.flip(1), torch.tensor(LENS, dtype=torch.int32))
    torch.testing.assert_close(drafting.hidden, other.step.drafting.hidden)


def test_what_is_read_is_behind_the_final_norm():
    model = target_of()
    target = adapt(model)
    hidden = {2: torch.empty(0)}
    cache = target.new_cache(1, 16)
    logits = prefill(target, cache, PROMPTS[:1], torch.tensor([7], dtype=torch.int32), hidden_states=hidden)
    torch.testing.assert_close(model.lm_head(hidden[2][0, -1:]), logits[0], rtol=1e-4, atol=1e-4)


# ---- files ----


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_every_published_form(file, prefix, tmp_path):
    target = adapt(target_of())
    weights = weights_of(target.model)
    named = {prefix + name: weight.half() for name, weight in weights.items()}
    draft = draft_from_folder(write_folder(tmp_path / "heads", named, file, medusa_num_heads=4), target)
    assert isinstance(draft, MedusaDraft) and draft.logits_dtype == torch.float32 and draft.num_heads == 4
    for head in range(4):
        assert torch.equal(draft.heads.head[head], weights[f"{head}.1.weight"].half().float())
        assert torch.equal(draft.heads.biases[0][head, 0], weights[f"{head}.0.linear.bias"].half().float())
    check_text(target, draft, PROMPTS)
    other = draft_of(target.model, seed=1)
    assert draft.identity != other.identity and draft.fingerprint == other.fingerprint


def test_weights_that_are_missing_left_over_or_of_another_shape(tmp_path):
    target = adapt(target_of())
    weights = weights_of(target.model)

    def refused(message, changed, **config):
        folder = write_folder(tmp_path / "heads", changed, **{"medusa_num_heads": 4, **config})
        with pytest.raises(ValueError, match=message):
            MedusaDraft.from_folder(folder, target)

    missing = {name: weight for name, weight in weights.items() if name != "2.0.linear.bias"}
    refused(r"must hold 2.0.linear.bias \(or medusa_head.2.0.linear.bias\), got", missing)
    refused("beside those of its format, got 0.2.bias", {**weights, "0.2.bias": torch.zeros(12)})
    refused("must hold 4.0.linear.weight", weights, medusa_num_heads=5)
    refused("must hold 0.1.linear.weight", weights_of(target.model), medusa_num_layers=2)
    refused(r"0.0.linear.weight must have shape \[32, 32\], got \[32, 31\]", {
        **weights, "0.0.linear.weight": torch.zeros(32, 31)
    })  # fmt: skip
    refused(r"1.1.weight must have shape \[12, 32\], got \[11, 32\]", {**weights, "1.1.weight": torch.zeros(11, 32)})
    for number in (0, True, "4", None, 1.5):
        refused("medusa_num_heads must be an integer of at least 1, got", weights, medusa_num_heads=number)
    refused("medusa_num_layers must be an integer of at least 0, got -1", weights, medusa_num_layers=-1)
    folder = write_folder(tmp_path / "other", weights, model_type="llama")
    with pytest.raises(ValueError, match="must have medusa_num_heads in its"):
        MedusaDraft.from_folder(folder, target)
    with pytest.raises(FileNotFoundError):
        MedusaDraft.from_folder(tmp_path / "nowhere" / "at" / "all", target)


def test_a_config_that_says_fewer_heads_than_there_are(tmp_path):
    target = adapt(target_of())
    folder = write_folder(tmp_path / "heads", weights_of(target.model), medusa_num_heads=2, medusa_num_layers=1)
    assert MedusaDraft.from_folder(folder, target).num_heads == 4


def test_targets_that_do_not_fit():
    draft = draft_of(target_of())
    for other in (target_of(num_layers=3), target_of(hidden_size=64)):
        with pytest.raises(ValueError, match=r"MedusaDraft: target must have 2 layers of width 32, got"):
            generate(other, draft, PROMPTS, tree=TREE)
