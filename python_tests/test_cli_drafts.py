"""The command line with drafts that are no models of the target's vocabulary."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.dflash_models import random_config, random_weights
from support.eagle_heads import write_head
from support.tiny_models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sequoia_kernels import TokenTree, cli, estimate_acceptance, generate

VOCAB = 256
PROMPT = "abab abab abab"


def byte_tokenizer(order) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, numbered in some order."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({characters[place]: token for token, place in enumerate(order)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target; a model of it with its tokens in another order; a head for it; and prompts."""
    folder = tmp_path_factory.mktemp("drafts")
    target = tiny_llama(0, vocab_size=VOCAB, num_layers=3)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    draft = tiny_llama(0, vocab_size=VOCAB, num_layers=1)
    for module in (draft.model.embed_tokens, draft.lm_head):
        module.weight = torch.nn.Parameter(module.weight[order], requires_grad=False)
    for name, model, places in (("target", target, range(VOCAB)), ("other", draft, order.tolist())):
        model.save_pretrained(folder / name)
        byte_tokenizer(places).save_pretrained(folder / name)
    write_head(folder / "head", target)
    (folder / "prompts.txt").write_text(f"{PROMPT}\n\n\nanother prompt")
    return folder


def run_json(capsys, *arguments):
    capsys.readouterr()
    status = cli.main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("draft", ["other", "head", "lookup"])
def test_every_draft_gives_the_targets_text(draft, folders, capsys):
    common = ["generate", "--target", str(folders / "target"), "--prompt", PROMPT, "--new-tokens", "40"]
    plain = run_json(capsys, *common, "--tree", "none")[1]
    name = draft if draft == "lookup" else str(folders / draft)
    status, output = run_json(capsys, *common, "--draft", name)
    assert status == 0 and output["tokens"] == plain["tokens"]
    status, both = run_json(capsys, *common, "--draft", name, "--lookup")
    assert status == 0 and both["tokens"] == plain["tokens"] and both["stats"]["lookup_steps"] > 0
    assert (output["stats"]["lookup_steps"] > 0) == (draft == "lookup")


def test_lookup_alone_needs_no_draft_and_none_means_none(folders, capsys):
    common = ["generate", "--target", str(folders / "target"), "--prompt", PROMPT, "--new-tokens", "40", "--lookup"]
    assert run_json(capsys, *common)[1]["stats"]["lookup_steps"] > 0
    assert cli.main([*common, "--tree", "none"]) == 2
    assert "--lookup must not be given with --tree none" in " ".join(capsys.readouterr().err.split())
    status, demo = run_json(capsys, "generate", "--draft", "lookup", "--prompt", "x = 1\nx = 1\n", "--new-tokens", "8")
    assert status == 0 and len(demo["tokens"]) == 8  # of the demo pair's target


@pytest.mark.parametrize("draft", ["other", "head"])
def test_drafts_are_measured(draft, folders, capsys):
    models_ = ["--target", str(folders / "target"), "--draft", str(folders / draft)]
    status, profile = run_json(capsys, "profile", *models_, "--quick", "--contexts", "16")
    assert status == 0 and len(profile["models"]) == 2
    prompts = ["--prompts-file", str(folders / "prompts.txt"), "--new-tokens", "16"]
    status, estimate = run_json(capsys, "acceptance", *models_, *prompts)
    assert status == 0 and estimate["visited"][0] > 0


def test_what_is_said_of_drafts(folders, capsys):
    target = ["--target", str(folders / "target")]
    generate_ = ["generate", *target, "--prompt", PROMPT, "--new-tokens", "4", "--tree", "none"]
    assert cli.main([*generate_, "--draft", str(folders / "other")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the draft has another vocabulary: it proposes the 256 tokens that both have" in said
    assert cli.main([*generate_, "--draft", str(folders / "head")]) == 0
    assert "holds a draft of the format eagle3" in " ".join(capsys.readouterr().err.split())
    for command in (["profile"], ["acceptance", "--prompts-file", str(folders / "prompts.txt")], ["demo"]):
        assert cli.main([*command, *target, "--draft", "lookup"]) == 2
        wanted = f"{command[0]} needs a draft that draws its tokens, got --draft lookup"
        assert wanted in " ".join(capsys.readouterr().err.split())
    status, report = run_json(capsys, "doctor", str(folders / "head"))
    found = report["models"][str(folders / "head")]
    assert status == 0 and found["draft_format"] == "eagle3" and found["parameters"] > 0
    assert found["holds"].startswith("a draft of the format eagle3, ")


def test_generate_takes_folders_by_name(folders):
    target = tiny_llama(0, vocab_size=VOCAB, num_layers=3)
    names = [byte_tokenizer(range(VOCAB))]
    prompt = names[0](PROMPT, return_tensors="pt").input_ids
    wanted = generate(target, None, prompt, max_new_tokens=24).new_tokens
    for draft in (folders / "head", str(folders / "other")):
        output = generate(target, draft, prompt, tokenizer=names[0], max_new_tokens=24)
        assert output.new_tokens == wanted
    blind = generate(target, folders / "other", prompt, max_new_tokens=24)  # ids are taken for the target's
    assert blind.new_tokens == wanted


def test_plans_from_files_are_no_deeper_than_a_block_draft_grows(folders, tmp_path, capsys):
    target = tiny_llama(0, vocab_size=VOCAB, num_layers=3)
    config = random_config(target, block_size=3)
    folder = tmp_path / "block"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config), folder / "model.safetensors")
    files = {name: str(tmp_path / f"{name}.json") for name in ("profile", "acceptance", "records", "plan", "older")}
    models_ = ["--target", str(folders / "target"), "--draft", str(folder)]
    assert cli.main(["profile", *models_, "--quick", "--contexts", "16", "--out", files["profile"]]) == 0
    prompts = ["--prompts-file", str(folders / "prompts.txt"), "--new-tokens", "12"]
    assert cli.main(["acceptance", *models_, *prompts, "--records", files["records"]]) == 0

    # Were the draft right and nothing but the target to wait for, deep trees would pay.
    estimate_acceptance(([900, 90], [800, 40]), temperature=0.0).save(files["acceptance"])
    profile = json.loads((tmp_path / "profile.json").read_text())
    entry = profile["models"][profile["draft"]]
    assert entry.pop("max_levels") == 3
    for key, model in profile["models"].items():
        for table in model["forwards"]:
            for name in ("p20_ms", "p50_ms", "p80_ms"):
                table[name] = [[1.0 if key == profile["target"] else 1e-6 for _ in row] for row in table[name]]
    for points in profile["ops"].values():
        for point in points:
            point |= dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), 1e-6)
    profile["overhead"] = {"step_ms": 0.0, "level_ms": 0.0}
    (tmp_path / "older.json").write_text(json.dumps(profile))
    entry["max_levels"] = 3
    (tmp_path / "profile.json").write_text(json.dumps(profile))

    def planned(name: str, evidence: str) -> list[int]:
        asked = ["plan", "--profile", files[name], f"--{evidence}", files[evidence], "--max-levels", "9"]
        status, plan = run_json(capsys, *asked, "--out", files["plan"])
        assert status == 0
        return [
            len(tree["shaped"]["widths"]) if "shaped" in tree else TokenTree(tree["parents"]).num_levels
            for tree in (plan, *plan["candidates"])
        ]

    assert max(planned("older", "acceptance")) > 3  # a file that does not say so
    assert max(planned("profile", "records")) <= 3
    assert planned("profile", "acceptance")[0] == 3 == max(planned("profile", "acceptance"))
    text = ["generate", *models_, "--prompt", PROMPT, "--new-tokens", "12"]
    wanted = run_json(capsys, *text, "--tree", "none")[1]["tokens"]
    assert run_json(capsys, *text, "--tree", files["plan"])[1]["tokens"] == wanted
