"""The command line: every command on tiny models, JSON output, exit statuses, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from support.tiny_models import noisy_copy, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import sequoia_kernels
from sequoia_kernels import AcceptanceEstimate, HardwareProfile, TokenTree, TreePlan, cli, estimate_acceptance
from sequoia_kernels.measure import measure_microbenchmarks

VOCAB = 256


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    target = tiny_llama(0, vocab_size=VOCAB)
    for role, model in (("target", target), ("draft", noisy_copy(target, 0.5))):
        model.save_pretrained(folder / role)
        fast.save_pretrained(folder / role)
    return ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--quiet"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, pair):
    """A profile and an acceptance file, written by the commands themselves."""
    folder = tmp_path_factory.mktemp("files")
    prompts = folder / "prompts.txt"
    prompts.write_text("first prompt\n\n\nsecond, longer prompt\n\n\nthird", encoding="utf-8")
    profile, acceptance = folder / "profile.json", folder / "acceptance.json"
    assert cli.main(["profile", *pair, "--quick", "--contexts", "16,48", "--out", str(profile)]) == 0
    arguments = ["--prompts-file", str(prompts), "--new-tokens", "24", "--temperature", "1", "--out", str(acceptance)]
    assert cli.main(["acceptance", *pair, *arguments]) == 0
    return {"profile": profile, "acceptance": acceptance, "prompts": prompts, "folder": folder}


def run_json(capsys, *arguments):
    capsys.readouterr()
    status = cli.main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_files_load_as_what_they_are(files):
    assert HardwareProfile.load(files["profile"]).models
    estimate = AcceptanceEstimate.load(files["acceptance"])
    assert estimate.temperature == 1.0
    assert 0 < sum(estimate.vector) <= 1


def test_plan_from_files(files, capsys):
    out, svg = files["folder"] / "plan.json", files["folder"] / "tree.svg"
    names = ["--profile", str(files["profile"]), "--acceptance", str(files["acceptance"])]
    status, plan = run_json(capsys, "plan", *names, "--out", str(out), "--svg", str(svg))
    assert status == 0
    assert {c["kind"] for c in plan["candidates"]} >= {"no speculation", "chain"}
    assert TreePlan.load(out).tree.parents == plan["parents"]
    assert svg.read_text().startswith("<svg")
    assert cli.main(["plan", *names]) == 0
    assert "tokens per step" in capsys.readouterr().out


@pytest.fixture(scope="module")
def parts(files):
    """A profile with microbenchmarks of two models that do not exist, as paths: (profile, target, draft)."""
    folder = files["folder"]
    paths = []
    for name, layers in (("big", 6), ("small", 1)):
        config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=48, num_hidden_layers=layers,
                             num_attention_heads=2)  # fmt: skip
        config.save_pretrained(folder / name)
        paths.append(folder / name)
    options = {"seconds": 0.0, "min_repeats": 1, "max_repeats": 1}
    profile = measure_microbenchmarks("cpu", torch.bfloat16, shapes=paths, rows=[1, 16], **options)
    profile = dataclasses.replace(profile, bandwidth={"host_to_device": 1e-3})  # 1 MB/s
    profile.save(folder / "parts.json")
    return folder / "parts.json", *paths


def test_plan_from_configs(files, parts, capsys):
    profile, target, draft = map(str, parts)
    names = ["plan", "--profile", profile, "--acceptance", str(files["acceptance"]), "--dtype", "bfloat16"]
    names += ["--target-config", target, "--draft-config", f"{draft}/config.json", "--context", "64"]
    status, plan = run_json(capsys, *names)
    assert status == 0
    assert plan["target"].startswith("llama-6x16-bfloat16")
    status, offloaded = run_json(capsys, *names, "--offload", "--device-memory", "1160KB")
    assert status == 0
    resident = next(c for c in plan["candidates"] if c["kind"] == "no speculation")["stages"]["target"]
    streamed = next(c for c in offloaded["candidates"] if c["kind"] == "no speculation")["stages"]["target"]
    assert streamed > max(resident, 10)
    assert any("streams its weights" in note for note in offloaded["notes"])


PLAN_PARTS = {
    "one config": (["--target-config", "TARGET"], "must be given together"),
    "offload alone": (["--offload"], "--offload needs --target-config"),
    "memory alone": (["--device-memory", "1GiB"], "--device-memory needs --offload"),
    "no config": (["--target-config", "no/such", "--draft-config", "DRAFT"], "must be a local folder or config.json"),
    "too little": (
        ["--target-config", "TARGET", "--draft-config", "DRAFT", "--offload", "--device-memory", "1KB"],
        "device_memory_budget must be at least",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), PLAN_PARTS.values(), ids=PLAN_PARTS.keys())
def test_configs_that_do_not_go_together(arguments, message, files, parts, capsys):
    profile, target, draft = map(str, parts)
    named = [{"TARGET": target, "DRAFT": draft}.get(word, word) for word in arguments]
    assert cli.main(["plan", "--profile", profile, "--acceptance", str(files["acceptance"]), *named]) == 2
    assert message in capsys.readouterr().err.replace("\n", "")


def test_profile_with_the_parts_of_other_models(pair, parts, tmp_path, capsys):
    _, target, draft = map(str, parts)
    names = [*pair, "--quick", "--contexts", "16", "--out", str(tmp_path / "profile.json")]
    assert cli.main(["profile", *names, "--shapes", target]) == 2
    assert "--shapes needs --microbenchmarks" in capsys.readouterr().err
    seen = {}

    def few(device, dtype, **options):
        seen.update(options, device=device, dtype=dtype)
        return measure_microbenchmarks(device, dtype, shapes=options["shapes"], rows=[1, 4], ops=False, seconds=0,
                                       min_repeats=1)  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sequoia_kernels.measure.measure_microbenchmarks", few)
        assert cli.main(["profile", *names, "--microbenchmarks", "--shapes", target, draft]) == 0
    assert "of linear" in capsys.readouterr().out
    assert (seen["quick"], seen["dtype"], len(seen["shapes"])) == (True, torch.float32, 2)
    assert "linear" in HardwareProfile.load(tmp_path / "profile.json").ops


def test_generate_with_a_tree_file_a_plan_file_and_none(pair, files, capsys):
    tree = files["folder"] / "tree.json"
    TokenTree([-1, 0, 0, 1]).save(tree)
    common = ["generate", *pair, "--prompt", "def f(x):", "--new-tokens", "12"]
    status, with_tree = run_json(capsys, *common, "--tree", str(tree))
    assert status == 0
    assert with_tree["stats"]["tree"] == [-1, 0, 0, 1]
    status, without = run_json(capsys, *common, "--tree", "none")
    assert status == 0
    assert without["tokens"] == with_tree["tokens"]
    assert without["stats"]["num_steps"] == 11
    files_for_auto = ["--profile", str(files["profile"]), "--acceptance", str(files["acceptance"])]
    status, planned = run_json(capsys, *common, "--tree", "auto", *files_for_auto)
    assert status == 0
    assert planned["tokens"] == with_tree["tokens"]


def test_generate_streams_text_and_reads_standard_input(pair, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.read", lambda: "class A:")
    monkeypatch.setattr("sys.stdin", type("Input", (), {"read": staticmethod(lambda: "class A:")})())
    assert cli.main(["generate", *pair, "--prompt", "-", "--new-tokens", "5", "--tree", "none"]) == 0
    assert capsys.readouterr().out.startswith("class A:")


def test_acceptance_and_profile_show_tables(pair, files, capsys):
    arguments = ["--prompts-file", str(files["prompts"]), "--new-tokens", "8", "--num-prompts", "1"]
    assert cli.main(["acceptance", *pair, *arguments]) == 0
    assert "acceptance vector" in capsys.readouterr().out
    assert cli.main(["profile", *pair, "--quick", "--contexts", "16"]) == 0
    assert "forward, ms" in capsys.readouterr().out


def test_doctor_lists_backends_and_reasons(capsys):
    status, report = run_json(capsys, "doctor")
    assert status == 0
    assert report["healthy"]
    assert report["backends"]["verify_tree"]["reference"] is None
    if not torch.cuda.is_available():
        assert any(reason for reasons in report["backends"].values() for reason in reasons.values())
    assert cli.main(["doctor"]) == 0
    assert "tree_attention" in capsys.readouterr().out


BAD_CALLS = {
    "missing profile": (["plan", "--profile", "no/such.json", "--acceptance", "ACCEPTANCE"], "no/such.json"),
    "swapped files": (["plan", "--profile", "ACCEPTANCE", "--acceptance", "ACCEPTANCE"], "format"),
    "missing model": (["generate", "--target", "./no_such_model", "--prompt", "x"], "no_such_model"),
    "draft alone": (["generate", "--draft", "x", "--prompt", "x"], "--draft needs --target"),
    "missing tree": (["generate", "MODELS", "--prompt", "x", "--tree", "no_tree.json"], "no_tree.json"),
    "bad temperature": (
        ["generate", "MODELS", "--prompt", "x", "--temperature", "-1", "--tree", "none"],
        "temperature",
    ),
    "empty prompt": (["generate", "MODELS", "--prompt", "", "--tree", "none"], "at least one token"),
    "bad device": (["generate", "MODELS", "--prompt", "x", "--device", "cuda:77"], "cuda:77"),
    "prompts missing": (["acceptance", "MODELS"], "--prompts-file must be given"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_end_with_status_2_and_say_why(arguments, message, pair, files, capsys):
    replaced = {"ACCEPTANCE": [str(files["acceptance"])], "MODELS": [a for a in pair if a != "--quiet"]}
    call = [word for argument in arguments for word in replaced.get(argument, [argument])]
    assert cli.main(call) == 2
    assert message in capsys.readouterr().err.replace("\n", "")


def test_usage_errors_are_argparses(capsys):
    for call in (["generate", "--new-tokens", "0"], ["no-such-command"], ["plan"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(call)
        assert stop.value.code == 2


def test_a_profile_of_another_device_is_refused(files, capsys):
    foreign = files["folder"] / "foreign.json"
    document = json.loads(files["profile"].read_text())
    document["device"]["name"] = "Another Processor 9000"
    foreign.write_text(json.dumps(document))
    names = ["--profile", str(foreign), "--acceptance", str(files["acceptance"])]
    assert cli.main(["plan", *names]) == 2
    assert "Another Processor 9000" in capsys.readouterr().err.replace("\n", " ")
    assert cli.main(["plan", *names, "--any-device"]) == 0


def test_interruption_leaves_no_file(pair, files, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    out = files["folder"] / "interrupted.json"
    monkeypatch.setattr("sequoia_kernels.measure_profile", interrupted)
    assert cli.main(["profile", *pair, "--out", str(out)]) == 130
    assert not list(files["folder"].glob("interrupted*"))
    before = files["acceptance"].read_text()
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimate_acceptance(([1], [0])).save(files["acceptance"])
    assert files["acceptance"].read_text() == before
    assert not [path for path in files["folder"].iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]


def test_every_command_explains_itself(capsys):
    for command in ("demo", "generate", "acceptance", "profile", "plan", "doctor"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "sequoia_kernels", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == f"sequoia-kernels {sequoia_kernels.__version__}\n"
