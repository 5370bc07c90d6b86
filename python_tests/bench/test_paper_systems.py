"""The paper's systems: steady times, the lossless check, rows that a machine cannot run, and the script to the end."""

from __future__ import annotations

import json

import pytest
import torch
from support.bench_scripts import BENCH, bench_script, synthetic_pair, targets

from sequoia_kernels import generate
from sequoia_kernels.models import adapt

script = bench_script("paper_systems")
CPU = torch.device("cpu")
DEMO_PAIR = BENCH.parent / "sequoia_kernels" / "demo" / "pair"


def arrivals(monkeypatch, times_and_counts):
    """A streamer that saw a prompt and then tokens at given seconds."""
    clock = iter([0.0, *(time for time, _ in times_and_counts)])
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(clock))
    seen = script.Arrivals()
    seen.put(torch.zeros(1, 7))
    for _, count in times_and_counts:
        seen.put(torch.zeros(count))
    seen.end()
    return seen


def test_steady_decoding_leaves_out_the_first_steps_and_the_last(monkeypatch):
    tick = 1e-5  # within a step
    steps = [(1.0, 1), (5.0, 2), (6.0, 1), (6.0 + tick, 1), (6.5, 3), (7.5, 1), (9.0, 1)]
    ms, tokens, count = arrivals(monkeypatch, steps).steady()
    assert ms == pytest.approx(1e3 * (7.5 - 6.0 - tick)) and (tokens, count) == (4, 2)


def test_too_few_steps_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="there must be more than 4 steps, got 4"):
        arrivals(monkeypatch, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)]).steady()


def test_our_streamer_sees_every_token_of_either_loop():
    system, _ = script.build_system("tiny", script.ROWS["tiny"], "float32", CPU, 16, 1)
    tree = synthetic_pair.Goal(0, 16).tree([0.5, 0.2, 0.1])
    for run in (script.own_loop(system, tree, 0.0), script.transformers_loop(system, True, 0.0)):
        outcome = run(system.prompts[0], 60, 0)
        assert len(outcome.new_tokens) == 60
        assert outcome.steps <= outcome.tokens < 60 and outcome.ms > 0


def system_of(pair, dtype="float32"):
    prompts = [torch.randint(pair.shape.vocab, (1, 24), generator=torch.Generator().manual_seed(3))]
    return script.System("tiny", "tiny", adapt(pair.target), adapt(pair.draft), prompts, dtype, True)


def test_outputs_may_part_at_near_ties_only():
    pair = synthetic_pair.synthetic_pair(script.PAIRS["tiny"], torch.float32, "cpu")
    system = system_of(pair)
    output = generate(system.target, None, system.prompts[0], max_new_tokens=20, eos_token_id=())
    plain = output.new_tokens
    assert script.check_lossless(system, plain, {"tree": plain})["equal"] == 1
    logits = synthetic_pair.teacher_forced_logits(system.target, output.sequences[0, : 24 + 9])[-1]
    first, second = logits.topk(2).indices.tolist()
    assert first == plain[0][9]
    other = [[*plain[0][:9], second, *plain[0][10:]]]
    facts = script.check_lossless(system, plain, {"tree": other})
    assert not facts["ok"] and facts["ties"][0]["token"] == 9 and facts["ties"][0]["gap"] > 1e-3
    with torch.no_grad():  # now the two are tied, and whichever comes first is right
        pair.target.lm_head.weight[second] = pair.target.lm_head.weight[first]
    facts = script.check_lossless(system, plain, {"tree": other})
    assert facts["ok"] and facts["equal"] == 0 and facts["ties"] == [{"provider": "tree", "token": 9, "gap": 0.0}]


def test_rows_for_a_gpu_say_what_they_need(monkeypatch):
    reason = script.why_not(script.ROWS["7B"], torch.bfloat16, CPU, 640, asked=False)
    assert reason == "needs a GPU with 16.0 GB free"
    monkeypatch.setattr(script, "memory_there", lambda device: 14 * 10**9)
    assert script.why_not(script.ROWS["7B"], torch.bfloat16, CPU, 640, asked=True) == (
        "needs 16.0 GB, 14.0 GB are free"
    )
    assert script.why_not(script.ROWS["350M"], torch.bfloat16, CPU, 640, asked=False) is None
    gpu = torch.device("cuda")
    assert script.why_not(script.ROWS["7B"], torch.bfloat16, gpu, 640, asked=False) == "needs 16.0 GB, 14.0 GB are free"
    assert script.why_not(script.ROWS["350M"], torch.bfloat16, gpu, 640, asked=False) == "is meant for a CPU"


def test_one_read_of_the_weights_leaves_the_embeddings_out():
    shape = script.PAIRS["tiny"]
    pair = synthetic_pair.synthetic_pair(shape, torch.float32, "cpu")
    expected = 4 * (shape.target.parameters(shape.vocab) - shape.vocab * shape.target.hidden)
    assert script.read_bytes(adapt(pair.target)) == expected


@pytest.mark.slow
def test_the_script_runs_to_the_end_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "paper_systems.json"
    arguments = ["--quick", "--device", "cpu", "--divergence", "0.25", "--new-tokens", "48"]
    arguments += ["--temperatures", "0", "0.6"]
    assert script.main([*arguments, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [(result["row"], result["temperature"]) for result in document["results"]] == [("tiny", 0.0), ("tiny", 0.6)]
    greedy, sampled = document["results"]
    assert greedy["synthetic"] and greedy["divergence"] == 0.25
    num_trees = len(greedy["providers"].keys() & {script.SIZED_TREE, script.PLANNED_TREE})  # or no tree was planned
    assert greedy["lossless"] == {
        "ok": True, "tolerance": 0.0, "equal": num_trees, "compared": num_trees, "ties": []
    }  # fmt: skip
    assert sampled["lossless"] is None
    sized = greedy["providers"][script.SIZED_TREE]
    assert (sized["nodes"], sized["levels"]) == (128, 10) and sized["tokens_per_step"] > 2
    assert greedy["providers"][script.AUTOREGRESSIVE]["tokens_per_step"] == 1.0
    assert set(greedy["providers"]) >= {script.TRANSFORMERS, script.ASSISTED}
    text = path.with_suffix(".md").read_text()
    assert "Synthetic pairs: random weights" in text and f"{num_trees} of {num_trees} equal" in text
    assert "tiny (synthetic pair), T=0, float32" in capsys.readouterr().out


def test_output_that_is_not_lossless_fails_the_script(monkeypatch, capsys):
    entry = {"ms_per_token": 1.0, "speedup": 1.0}
    result = {
        "row": "tiny", "title": "t", "synthetic": True, "temperature": 0.0, "dtype": "float32", "acceptance": [],
        "providers": {script.AUTOREGRESSIVE: entry}, "floor": {"ratio": 1.0, "ms": 1.0}, "target_parameters": 1,
        "draft_parameters": 1, "compiled": False, "packed": False,
        "lossless": {"ok": False, "tolerance": 0.0, "equal": 0, "compared": 1, "ties": [{"gap": 0.5}]},
    }  # fmt: skip
    monkeypatch.setattr(script, "measure_system", lambda *arguments: result)
    monkeypatch.setattr(script, "profile_of", lambda *arguments: None)
    monkeypatch.setattr(script, "measure_peaks", lambda device: {"copy_gb_per_s": 10.0})
    arguments = ["--quick", "--device", "cpu", "--divergence", "0.25", "--temperatures", "0"]
    assert script.main(arguments) == 1
    assert "NOT LOSSLESS" in capsys.readouterr().out


@pytest.mark.slow
def test_real_checkpoints_take_the_same_way(tmp_path):
    path = tmp_path / "checkpoints.json"
    options = ["--target", str(DEMO_PAIR / "target"), "--draft", str(DEMO_PAIR / "draft"), "--dtype", "float32"]
    options += ["--temperatures", "0", "--size", "16", "6", "--prompts", "1", "--prompt-tokens", "32"]
    options += ["--no-rivals", "--profile-seconds", "0.5"]
    assert script.main([*options, "--new-tokens", "40", "--device", "cpu", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert not result["synthetic"] and result["title"] == "target / draft" and result["paper"] is None
    assert result["lossless"]["equal"] == result["lossless"]["compared"] > 0
    assert result["providers"][script.SIZED_TREE]["tokens_per_step"] > 1.5
    assert "synthetic" not in path.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        script.main(["--target", str(DEMO_PAIR / "target")])


@pytest.mark.parametrize(
    ("tokens_per_step", "speedup", "met", "text"),
    [
        (5.1, 4.2, True, "4.2x (planned tree, 96 x 9)"),
        (5.1, 4.0, False, "4x (planned tree, 96 x 9)"),
        (6.1, 4.9, False, "4.9x (planned tree, 96 x 9) at 6.1 tokens a step where 5.08 are meant"),
    ],
)
def test_targets_read_the_rows(tokens_per_step, speedup, met, text):
    tree = {"nodes": 128, "levels": 10, "tokens_per_step": tokens_per_step, "speedup": speedup - 0.1}
    result = {
        "row": "7B",
        "title": "the pair",
        "dtype": "bfloat16",
        "temperature": 0.0,
        "paper": {"tokens_per_step": 5.08},
        "lossless": {"ok": True},
        "floor": {"ratio": 1.3},
        "providers": {
            script.AUTOREGRESSIVE: {"speedup": 1.0},
            script.SIZED_TREE: tree,
            script.PLANNED_TREE: {**tree, "nodes": 96, "levels": 9, "speedup": speedup},
        },
    }
    document = {"device_type": "cuda", "results": [result]}
    findings = {entry.what: entry for entry in targets.evaluate({"paper_systems": document})}
    found = next(entry for what, entry in findings.items() if what.startswith("7B-shaped"))
    assert (found.measured, found.met) == (text, met)
    assert findings["the own loop's step over one read of its weights"].met is False
    assert next(entry for what, entry in findings.items() if what.startswith("13B")).met is None
    result["lossless"]["ok"] = False
    found = next(entry for entry in targets.evaluate({"paper_systems": document}) if entry.what.startswith("7B-shaped"))
    assert (found.measured, found.met) == (f"{text}, not lossless", False)
    on_cpu = targets.evaluate({"paper_systems": {**document, "device_type": "cpu"}})
    assert all(entry.met is None for entry in on_cpu)


def test_the_rows_are_the_papers():
    goals = {name: row.entries[0.0] for name, row in script.ROWS.items()}
    assert goals["7B"].goal == (5.08, 128, 10) and goals["7B"].speedup == 4.04
    assert goals["13B"].goal == (4.20, 64, 9) and goals["13B"].earlier_speedup == 3.84
    assert goals["33B"].goal == (4.28, 64, 6) and goals["33B"].earlier_speedup == 2.37
    assert goals["350M"].goal.value == 0.51 and goals["350M"].goal.budget == 0
