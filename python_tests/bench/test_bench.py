"""The benchmarks: statistics, the gate, documents, baselines that agree with the reference, every script on the CPU."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from support.bench_scripts import (
    BENCH,
    baselines,
    bench_script,
    clocks,
    gpu_check,
    harness,
    machine,
    report,
    run_module,
    sanitize,
    summary,
    targets,
    workloads,
)
from support.cuda_on_cpu import COMPILER, few_rows_on_cpu
from support.processes import run_process

import sequoia_kernels
from sequoia_kernels import TokenTree, _host
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.ops import compact_kv_cache_, sample_without_replacement, verify_tree, warped_logsumexp
from sequoia_kernels.rng import DRAFT_TAG, RESIDUAL_TAG, node_coins, token_gumbel

OPS = ["tree_attention", "sample_without_replacement", "warped_logsumexp", "verify_tree", "compact_kv_cache_"]
CPU = torch.device("cpu")
SHORT = {"seconds_per_case": 0.01, "min_repeats": 2}


PEAKS = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.1, "matmul_dtype": "float32"}


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch):
    """Ceilings that need not be measured for every document."""
    monkeypatch.setattr(harness, "measure_peaks", lambda device, seconds: PEAKS)


# Clocks


def test_percentiles_are_those_of_the_samples():
    found = clocks.percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert found == {"p20": 2.0, "p50": 3.5, "p80": 5.0, "repeats": 6}
    assert clocks.percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0, "repeats": 1}


def test_rounds_are_shared_out_and_the_first_run_does_not_count():
    runs = {"one": 0, "two": 0}

    def sampler(name):
        def sample():
            runs[name] += 1
            return float(runs[name])

        return sample

    samplers = {name: {"warm": sampler(name)} for name in runs}
    taken = clocks.take_samples(samplers, seconds=0.0, min_repeats=4)
    assert taken == {name: {"warm": [2.0, 3.0, 4.0, 5.0]} for name in runs}
    taken = clocks.take_samples(samplers, seconds=60.0, min_repeats=2, max_repeats=7)
    assert [len(modes["warm"]) for modes in taken.values()] == [7, 7]
    assert clocks.take_samples({}, seconds=1.0, min_repeats=3) == {}


def test_a_slow_provider_leaves_and_the_others_go_on():
    ticks = iter(range(10**6))
    slow = {"warm": lambda: sum(range(200_000)) * 0.0 + next(ticks)}
    quick = {"warm": lambda: 0.0}
    taken = clocks.take_samples({"slow": slow, "quick": quick}, seconds=0.02, min_repeats=2, max_repeats=40)
    assert 2 <= len(taken["slow"]["warm"]) < len(taken["quick"]["warm"]) == 40


def test_inputs_are_set_back_before_every_sample():
    events = []
    sample = clocks.host_samplers(lambda: events.append("call"), lambda: events.append("reset"))["warm"]
    assert sample() >= 0 and sample() >= 0
    assert events == ["reset", "call"] * 2


# The machine


def test_the_environment_names_what_times_depend_on():
    facts = machine.environment("cpu")
    assert facts["device"]["type"] == "cpu" and facts["device"]["num_threads"] == torch.get_num_threads()
    assert facts["torch"] == importlib.metadata.version("torch") and facts["python"] and facts["date"]
    assert machine.device_folder("cpu") == "cpu"
    json.dumps(facts)


def test_peaks_are_positive():
    peaks = machine.measure_peaks(CPU, seconds=0.0)
    assert peaks["copy_gb_per_s"] > 0 and peaks["matmul_tflop_per_s"] > 0 and peaks["matmul_dtype"] == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused_by_name():
    with pytest.raises(SystemExit, match="device cuda: torch sees no CUDA device"):
        machine.pick_device("cuda")
    assert machine.pick_device("auto") == CPU


# The harness, on a bench of its own


class Toy:
    """Doubling a vector: small enough to see everything that the harness does."""

    OP = "tree_attention"  # gives the order of backends
    CASES = [  # noqa: RUF012
        harness.Case("four", "cpu", {"size": 4}, quick=True),
        harness.Case("nine", "cpu", {"size": 9}),
        harness.Case("huge", "cuda", {"size": 1 << 30}),
    ]

    def __init__(self, **providers):
        self.PROVIDERS = {"sequoia host": self.provider(lambda case, x: lambda: 2 * x, ours=True), **providers}

    @staticmethod
    def provider(prepare, **options):
        return harness.Provider(prepare, **options)

    @staticmethod
    def make_inputs(case, device, seed):
        return torch.randn(case["size"], generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def expected(case, inputs):
        return inputs.double() * 2

    @staticmethod
    def mismatch(case, inputs, expected, result):
        return None if torch.equal(result.double(), expected) else "not doubled"

    @staticmethod
    def bytes_moved(case):
        return 8 * case["size"]

    @staticmethod
    def flops(case):
        return case["size"]


def run_toy(toy, **options):
    return harness.run_bench(toy, harness.Settings(CPU, **{**SHORT, **options}), "a command")


def refuse(error):
    def prepare(case, inputs):
        raise error

    return prepare


def test_a_wrong_provider_is_not_timed():
    document = run_toy(
        Toy(
            right=Toy.provider(lambda case, x: lambda: x + x),
            wrong=Toy.provider(lambda case, x: lambda: 3 * x),
            unavailable=Toy.provider(refuse(harness.Unavailable("not today"))),
            unsupported=Toy.provider(refuse(BackendUnavailableError("not this call"))),
            broken=Toy.provider(refuse(KeyError("gone"))),
        )
    )
    assert [case["name"] for case in document["cases"]] == ["four", "nine"]
    providers = document["cases"][0]["providers"]
    found = {name: (entry["status"], entry.get("reason")) for name, entry in providers.items()}
    assert found == {
        "sequoia host": ("ok", None),
        "right": ("ok", None),
        "wrong": ("wrong", "not doubled"),
        "unavailable": ("skipped", "not today"),
        "unsupported": ("skipped", "not this call"),
        "broken": ("failed", "KeyError: 'gone'"),
    }
    assert [name for name, entry in providers.items() if "ms" in entry] == ["sequoia host", "right"]
    assert list(document["cases"][0]["ratios"]["sequoia host"]) == ["right"]
    assert harness.own_failures(document) == []


def test_a_wrong_backend_of_ours_fails_the_run():
    document = run_toy(Toy(**{"sequoia sdpa": Toy.provider(lambda case, x: lambda: -x, ours=True)}), only_case="four")
    assert harness.own_failures(document) == ["four: sequoia sdpa wrong: not doubled"]
    assert document["cases"][0]["ours"] == "sequoia host"


def test_a_provider_with_noise_of_its_own_is_gated_on_given_noise():
    noisy = Toy.provider(lambda case, x: lambda: x * torch.rand(1), gate=lambda case, x: x * 2)
    document = run_toy(Toy(noisy=noisy), only_case="four")
    assert document["cases"][0]["providers"]["noisy"]["status"] == "ok"


def test_what_is_measured_of_a_provider():
    document = run_toy(Toy(), only_case="nine")
    (case,) = document["cases"]
    entry = case["providers"]["sequoia host"]
    assert entry["headline"] == "warm" and entry["ms"]["warm"]["repeats"] >= 2
    p50 = entry["ms"]["warm"]["p50"]
    peaks = document["peaks"]
    assert entry["gb_per_s"] == pytest.approx(72 / p50 / 1e6)
    assert entry["percent_of_copy"] == pytest.approx(100 * entry["gb_per_s"] / peaks["copy_gb_per_s"])
    assert entry["percent_of_matmul"] == pytest.approx(100 * entry["tflop_per_s"] / peaks["matmul_tflop_per_s"])
    assert case["floor_ms"] == pytest.approx(
        max(72 / peaks["copy_gb_per_s"] / 1e6, 9 / peaks["matmul_tflop_per_s"] / 1e9)
    )
    assert entry["percent_of_floor"] == pytest.approx(max(entry["percent_of_copy"], entry["percent_of_matmul"]))


def test_quick_runs_and_short_times_leave_cases_out():
    document = run_toy(Toy(), quick=True)
    assert [case["name"] for case in document["cases"]] == ["four"]
    document = run_toy(Toy(), seconds=-1.0)
    assert document["cases"] == []
    assert [case["reason"] for case in document["skipped_cases"]] == ["-1 s were over"] * 2


def test_ours_is_what_auto_would_take():
    assert harness.backend_rank("sequoia host", "cpu") < harness.backend_rank("sequoia sdpa", "cpu")
    assert harness.backend_rank("sequoia cuda", "cuda") < harness.backend_rank("sequoia triton", "cuda")
    entries = {
        "sequoia triton": {"ours": True, "ms": {"graph_cold": {"p50": 2.0}, "eager_cold": {"p50": 4.0}}},
        "sequoia cuda": {"ours": True},
        "loop": {"ours": False, "ms": {"eager_cold": {"p50": 40.0}}},
        "rival": {"ours": False, "ms": {"graph_cold": {"p50": 3.0}, "eager_cold": {"p50": 20.0}}},
    }
    assert harness._ours(entries, "cuda") == "sequoia triton"
    # like with like: the loop cannot be captured, so the uncaptured times are compared
    assert harness._ratios(entries) == {"sequoia triton": {"loop": 10.0, "rival": 1.5}}


def test_own_providers_are_the_backends_and_tell_why_they_cannot_run():
    providers = harness.own_providers("verify_tree", lambda case, inputs, backend: lambda: backend)
    assert {"reference", "sequoia host"} <= set(providers)
    assert not providers["reference"].ours and providers["sequoia host"].ours
    assert providers["reference"].prepare(Toy.CASES[0], None)() == "reference"
    if "sequoia triton" in providers:
        with pytest.raises(harness.Unavailable):
            providers["sequoia triton"].prepare(Toy.CASES[0], None)


def test_tensor_bytes_counts_nested_tensors():
    assert harness.tensor_bytes((torch.zeros(3), [torch.zeros(2, dtype=torch.int64)], "text", None)) == 28


# Reports


def test_durations_have_three_digits_and_a_unit():
    values = (1234.5, 1000.0, 12.34, 1.0, 0.5, 0.0123, 1e-6)
    assert [report.duration(value) for value in values] == [
        "1.23 s", "1.00 s", "12.3 ms", "1.00 ms", "500 us", "12.3 us", "0.00 us",
    ]  # fmt: skip


def test_the_table_names_what_was_not_timed(tmp_path):
    document = run_toy(Toy(absent=Toy.provider(refuse(harness.Unavailable("not installed")), note="a note")))
    text = report.markdown(document)
    assert "| four | **sequoia host** |" in text and "`a command`" in text
    assert "- absent (2 cases): skipped: not installed" in text and "a note" not in text
    assert report.plot(document, tmp_path / "toy.png") in (None, "matplotlib is not installed")
    assert report.plot({**document, "cases": []}, tmp_path / "none.png") in (
        "nothing was timed",
        "matplotlib is not installed",
    )
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_plot_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.plot(run_toy(Toy(), only_case="four"), tmp_path / "toy.png") == "matplotlib is not installed"


def test_in_short_ours_stands_beside_the_best_other():
    slow = Toy.provider(lambda case, x: lambda: sum(x + 0 * index for index in range(400)) / 200)
    slower = Toy.provider(lambda case, x: lambda: sum(x + 0 * index for index in range(40_000)) / 20_000)
    toy = Toy(slow=slow, slower=slower, reference=Toy.provider(lambda case, x: lambda: 2 * x))
    toy.mismatch = lambda case, inputs, expected, result: None
    (row,) = summary.rows({"toy": run_toy(toy, only_case="nine")})
    assert row[:2] == ("toy", "nine") and row.ours.startswith("sequoia host: ") and row.other.startswith("slow: ")
    assert row.ratio > 1
    documents = targets.load_documents(BENCH / "results" / "cpu")
    committed = summary.rows(documents)
    assert {row.bench for row in committed} == {
        "adaptive", "auto", "demo_pair", "forward_floors", "paper_systems", "planner_pick", "robustness", "rules",
        "verify_tree",
    }  # fmt: skip
    (greedy,) = [row for row in committed if row.bench == "demo_pair" and row.case == "T = 0"]
    (result,) = [result for result in documents["demo_pair"]["results"] if result["temperature"] == 0]
    ours = result["tokens_per_second"]["planned tree"]
    other, rate = max(set(result["tokens_per_second"].items()) - {("planned tree", ours)}, key=lambda item: item[1])
    assert greedy.ours == f"planned tree: {ours:.1f} tokens/s" and greedy.other == f"{other}: {rate:.1f} tokens/s"
    assert greedy.ratio == pytest.approx(ours / rate)
    assert greedy.other in summary.markdown(documents)


# Baselines agree with the reference


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_race_draws_what_the_reference_draws(temperature):
    logits, temperatures = random_logits(30, 97), torch.full((30,), temperature)
    seeds, offsets = torch.arange(30), torch.arange(30)
    race = torch.exp(-token_gumbel(seeds, offsets, 97, DRAFT_TAG))
    wanted = sample_without_replacement(logits, 5, temperatures, seeds, offsets, backend="reference")
    assert torch.equal(baselines.exponential_race(logits, 5, temperatures, race), wanted.tokens)
    free = baselines.exponential_race(logits, 5, temperatures)
    assert free.shape == (30, 5) and all(len(set(row)) == 5 for row in free.tolist())


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (None, 0.8), (20, 0.6), (1, None)])
def test_sorted_warps_cut_where_the_reference_does(top_k, top_p):
    logits, temperatures = random_logits(20, 61), torch.linspace(0.3, 1.5, 20)
    wanted = warped_logsumexp(logits, temperatures, top_k, top_p, backend="reference")
    log_sum, cut = baselines.sort_and_mask(logits, temperatures, top_k, top_p)
    assert torch.equal(cut, wanted.cut)
    torch.testing.assert_close(log_sum, wanted.log_normaliser, rtol=1e-5, atol=1e-5)


def test_verification_is_timed_by_both_rules():
    bench = bench_script("verify_tree")
    named = {(case.device, case.name): case for case in bench.CASES}
    assert len(named) == len(bench.CASES)
    for case in bench.CASES:
        assert ("traversal" in case.name) == (case["rule"] == "traversal")
    case = named["cpu", "8 nodes x 512, traversal"]
    inputs = bench.make_inputs(case, CPU, 0)
    for rival in ("child by child", "sgl-kernel"):
        on_its_device = harness.Case(case.name, "cuda" if rival == "sgl-kernel" else "cpu", case.sizes)
        with pytest.raises(harness.Unavailable, match='does not know the rule "traversal"'):
            bench.PROVIDERS[rival].prepare(on_its_device, inputs)
    expected = verify_tree(*inputs[:3], typical_tree(8), *inputs[3:], rule="traversal", backend="reference")
    assert bench.mismatch(case, inputs, bench.expected(case, inputs), expected) is None

    def num_rows(device, rule, temperature):
        sizes = {"batch_size": 2, "num_nodes": 8, "vocab": 100, "dtype": "bfloat16", "temperature": temperature}
        return bench.bytes_moved(harness.Case("", device, sizes | {"rule": rule})) / (2 * 100 * 2)

    num_internal = len(workloads.internal_nodes(typical_tree(8)))
    for rule in ("sequoia", "traversal"):  # values are checked there
        assert num_rows("cpu", rule, 0.6) == num_rows("cpu", rule, 0.0) == 8 + num_internal
        assert num_rows("cuda", rule, 0.0) == 8
    assert num_rows("cuda", "sequoia", 0.6) == 8 + num_internal
    assert num_rows("cuda", "traversal", 0.6) == 2 * num_internal + 1


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tree", [TokenTree.single(), TokenTree.chain(5), TokenTree.kary(3, 3), TokenTree.kary(6, 2)])
def test_the_loop_over_children_decides_as_the_reference(tree, temperature):
    step = workloads.tree_step(tree, 20, 23, temperature, torch.float32, CPU, seed=3)
    wanted = verify_tree(*step[:3], tree, *step[3:], backend="reference")
    uniforms = node_coins(step.seeds, step.offsets, tree.num_nodes)
    race = torch.exp(-token_gumbel(step.seeds, step.offsets, 23, RESIDUAL_TAG))
    found = baselines.verify_child_by_child(*step[:3], tree, temperature, uniforms, race)
    for name, got, expected in zip(wanted._fields, found, wanted):
        assert torch.equal(got, expected), name
    if tree.num_nodes > 1:
        assert len(wanted.nodes.unique(dim=0)) > 1  # the inputs decide both ways


def test_layer_by_layer_moves_what_the_reference_moves():
    caches = [random_logits(2, 30, 2, 4, seed=seed) for seed in range(4)]
    paths = torch.tensor([[0, 2, 3, 9], [1, 4, -1, -1]], dtype=torch.int32)
    counts, lens = torch.tensor([4, 2], dtype=torch.int32), torch.tensor([5, 20], dtype=torch.int32)
    wanted, wanted_lens = [cache.clone() for cache in caches], lens.clone()
    compact_kv_cache_(wanted, paths, counts, wanted_lens, backend="reference")
    baselines.compact_layer_by_layer(caches, paths, counts, lens)
    assert torch.equal(lens, wanted_lens)
    assert all(torch.equal(got, expected) for got, expected in zip(caches, wanted))


# The scripts


def tiny_case(bench):
    return min((case for case in bench.CASES if case.device == "cpu"), key=bench.bytes_moved)


@pytest.mark.parametrize("op", OPS)
def test_every_op_script_runs(op, tmp_path):
    bench = bench_script(op)
    assert op == bench.OP
    case = tiny_case(bench)
    settings = harness.Settings(CPU, only_case=case.name, **SHORT)
    document = harness.run_bench(bench, settings, "command")
    assert harness.own_failures(document) == []
    document = json.loads(json.dumps(document))
    assert set(document) == {
        "bench", "version", "command", "commit", "environment", "device_type", "quick", "modes", "peaks", "cases",
        "skipped_cases",
    }  # fmt: skip
    entry = document["cases"][0]
    assert set(entry) == {
        "name", "sizes", "bytes", "flops", "floor_ms", "bound", "input_sets", "providers", "ratios", "ours",
    }  # fmt: skip
    timed = {name for name, provider in entry["providers"].items() if provider["status"] == "ok"}
    assert "reference" in timed
    rivals = [name for name, provider in bench.PROVIDERS.items() if not provider.ours and name != "reference"]
    assert timed & set(rivals)
    for name, provider in entry["providers"].items():
        assert ("ms" in provider) == (name in timed)
        assert name in timed or provider["reason"]
    assert case.name in report.markdown(document)


@pytest.mark.parametrize("op", OPS)
def test_cases_cover_both_devices_and_are_told_apart(op):
    bench = bench_script(op)
    for device in ("cpu", "cuda"):
        cases = [case for case in bench.CASES if case.device == device]
        assert len(cases) > 3 and any(case.quick for case in cases)
        assert len({case.name for case in cases}) == len(cases)
        assert all(bench.bytes_moved(case) > 0 and getattr(bench, "flops", lambda _: 0)(case) >= 0 for case in cases)


@pytest.mark.parametrize("op", OPS)
def test_the_gate_of_every_script_finds_a_wrong_result(op):
    bench = bench_script(op)
    case = tiny_case(bench)
    inputs = bench.make_inputs(case, CPU, 0)
    expected = bench.expected(case, inputs)
    result = bench.PROVIDERS["reference"].prepare(case, inputs)()
    assert bench.mismatch(case, inputs, expected, result) is None
    if op == "compact_kv_cache_":
        inputs.caches[-1][0, case["context_len"] + 1] += 1  # the result of this op lies in its inputs
        assert "cache" in bench.mismatch(case, inputs, expected, result)
        return
    tensors = list(result) if isinstance(result, tuple) else [result]
    for index, tensor in enumerate(tensors):
        spoiled = [entry.clone() for entry in tensors]
        spoiled[index].view(-1)[-1] = tensor.view(-1)[-1] + 1
        wrong = type(result)(*spoiled) if isinstance(result, tuple) else spoiled[0]
        assert bench.mismatch(case, inputs, expected, wrong), index
        if tensor.is_floating_point():
            spoiled[index].view(-1)[-1] = math.nan
            assert bench.mismatch(case, inputs, expected, wrong), index


def test_equal_seeds_give_equal_inputs():
    for op in OPS:
        bench = bench_script(op)
        case = tiny_case(bench)
        first, again, other = (bench.make_inputs(case, CPU, seed) for seed in (3, 3, 4))
        same = [torch.equal(*pair) for pair in zip(flat(first), flat(again))]
        assert all(same), op
        assert not all(torch.equal(*pair) for pair in zip(flat(first), flat(other))), op


def flat(values):
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)] if isinstance(values, (list, tuple)) else []


def test_the_command_line_writes_document_table_and_plot(tmp_path, capsys):
    bench = bench_script("compact_kv_cache_")
    path = tmp_path / "deep" / "result.json"
    arguments = ["--device", "cpu", "--quick", "--case", "2 accepted", "--provider", "layer", "--json", str(path)]
    assert harness.main(bench, arguments) == 0
    document = json.loads(path.read_text())
    assert document["command"].startswith("python -m bench.ops.bench_compact_kv_cache_ --device cpu")
    assert set(document["cases"][0]["providers"]) == {"layer by layer", "layer by layer, known path"}
    assert path.with_suffix(".md").read_text() == capsys.readouterr().out.partition("no plot")[0].rstrip("\n") + "\n"
    assert not list(path.parent.glob("*.partial"))
    assert harness.main(bench, ["--device", "cpu", "--case", "no such case"]) == 1


def test_plan_and_loop_scripts_run(tmp_path):
    plan = bench_script("plan")
    assert plan.main(["--repeats", "1", "--profile-seconds", "0", "--json", str(tmp_path / "plan.json")]) == 0
    assert len(json.loads((tmp_path / "plan.json").read_text())["results"]) == 6
    loop = bench_script("captured_loop")
    arguments = ["--device", "cpu", "--steps", "3", "--rounds", "1", "--json", str(tmp_path / "loop.json")]
    assert loop.main(arguments) == 0
    results = json.loads((tmp_path / "loop.json").read_text())["results"]
    assert [entry["kind"] for entry in results] == ["tree", "plain"]
    assert all(math.isfinite(entry["loop_ms"]) and entry["device_ms"] > 0 for entry in results)


def test_the_loop_and_its_steps_alone_work_on_caches_of_one_size(monkeypatch):
    """Compared in pairs of engines: of a short and of a long run of `generate`, and of the steps by themselves."""
    loop = bench_script("captured_loop")
    engines = loop.engines
    monkeypatch.setattr(engines, "can_capture", lambda target, draft: True)  # caches come in buckets then
    monkeypatch.setattr(
        engines, "GraphedSteps", lambda run, state: SimpleNamespace(step=run, capture=lambda tree: None, num_captured=0)
    )
    rows = []
    plain = engines.DecodingEngine.__init__

    def noted(self, *arguments, **options):
        plain(self, *arguments, **options)
        rows.append(self.eager.target_cache.max_cache_len)

    monkeypatch.setattr(engines.DecodingEngine, "__init__", noted)
    results = loop.measure(CPU, steps=60, rounds=1)
    of_tree, of_plain = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [set(of_tree), set(of_plain)] == [{entry["cache_rows"]} for entry in results]
    assert results[0]["cache_rows"] > engines.SMALLEST_BUCKET == results[1]["cache_rows"]


# Targets


def gpu_document(bench, sizes, entry, ratios=(), **fields):
    case = {"name": "the case", "sizes": sizes, "ours": "sequoia triton", "ratios": {"sequoia triton": dict(ratios)}}
    case["providers"] = {"sequoia triton": {"headline": "graph_cold", **entry}}
    return {
        bench: {"bench": bench, "device_type": "cuda", "peaks": {"copy_gb_per_s": 4000.0}, "cases": [case], **fields}
    }


def finding(documents, what, wanted=""):
    (found,) = [entry for entry in targets.evaluate(documents) if what in entry.what and wanted in entry.wanted]
    return found


def test_nothing_measured_gives_not_measured():
    for documents in ({}, {"verify_tree": {"device_type": "cpu", "cases": []}}):
        findings = targets.evaluate(documents)
        assert len(findings) == 24
        assert all(entry.met is None and entry.measured == "not measured" for entry in findings)
    assert "not measured" in targets.markdown(findings)
    assert "| <= 2x one read of the logits | 2.9x | not measured | - |" in targets.markdown(findings)


@pytest.mark.parametrize(("microseconds", "met"), [(7.0, True), (9.0, False)])
def test_times_are_checked_against_one_read(microseconds, met):
    sizes = {"num_rows": 64, "vocab": 128256, "num_samples": 16, "temperature": 0.6, "dtype": "bfloat16"}
    entry = {"ms": {"graph_cold": {"p50": microseconds / 1e3}}}
    documents = gpu_document("sample_without_replacement", sizes, entry)  # one read: 16.4 MB, 4.1 us
    found = finding(documents, "sample_without_replacement")
    assert found.met is met and found.measured.startswith(f"{microseconds / 4.104:.3g}x")


def test_the_worst_case_and_the_fastest_rival_count():
    sizes = {"context_len": 8192, "num_nodes": 16, "kv_heads": 8, "head_dim": 128, "batch_size": 1, "dtype": "bfloat16"}
    rivals = {"torch SDPA": 9.0, "torch SDPA, repeated heads": 2.5}
    documents = gpu_document("tree_attention", sizes, {"ms": {"graph_cold": {"p50": 0.0100}}}, rivals)
    assert finding(documents, "up to 64 nodes").met is True
    assert finding(documents, "dense mask").met is False
    assert finding(documents, "FlashInfer").met is None
    worse = json.loads(json.dumps(documents["tree_attention"]["cases"][0]))
    worse["name"], worse["providers"]["sequoia triton"]["ms"]["graph_cold"]["p50"] = "worse", 0.0120
    documents["tree_attention"]["cases"].append(worse)
    found = finding(documents, "up to 64 nodes")
    assert found.met is False and found.measured == "69.9 % (worst of 2: worse)"


def test_launches_and_graphs_are_checked():
    sizes = {"num_accepted": 8, "batch_size": 1, "layers": 32}
    entry = {"ms": {"graph_cold": {"p50": 0.004}}, "launches": 1}
    documents = gpu_document("compact_kv_cache_", sizes, entry)
    assert finding(documents, "launches").met is True and finding(documents, "8 rows", "<= 10 us").met is True
    sizes = {"num_nodes": 64, "vocab": 128256, "batch_size": 1, "temperature": 0.6, "dtype": "bfloat16"}
    for captured in (True, False):
        documents = gpu_document("verify_tree", sizes, {"ms": {"graph_cold": {"p50": 0.1}}, "captured": captured})
        assert finding(documents, "the same", "no host sync").met is captured
    document = {"device_type": "cuda", "results": [{"nodes": 64, "host_share": 0.02}, {"nodes": 1, "host_share": 0.2}]}
    assert finding({"captured_loop": document}, "captured loop").met is False


def test_targets_read_a_folder_of_results(tmp_path, capsys):
    sizes = {"num_accepted": 8, "batch_size": 1, "layers": 32}
    documents = gpu_document("compact_kv_cache_", sizes, {"ms": {"graph_cold": {"p50": 0.02}}, "launches": 1})
    (tmp_path / "compact_kv_cache_.json").write_text(json.dumps(documents["compact_kv_cache_"]))
    (tmp_path / "summary.json").write_text("{}")
    assert targets.main([str(tmp_path)]) == 1
    assert "| <= 10 us | 2 to 4 us | 20 us (the case) | **no** |" in capsys.readouterr().out


def test_floors_of_a_forward_are_the_longer_of_reading_and_multiplying(tmp_path):
    path = tmp_path / "floors.json"
    arguments = ["--quick", "--dtype", "float32", "--rows", "1", "5", "--json", str(path)]
    before = os.environ.get("SEQUOIA_HOST_ISA")
    assert bench_script("forward_floors").main(arguments) == 0
    assert os.environ.get("SEQUOIA_HOST_ISA") == before
    document = json.loads(path.read_text())
    assert document["weight_bytes"] == document["read_bytes"] == 4 * document["multiplied_weights"]
    assert document["threads"] == torch.get_num_threads()
    assert [result["rows"] for result in document["results"]] == [1, 5]
    for result in document["results"]:
        assert 0 < result["best_ms"] <= result["median_ms"]
        assert result["floor_ms"] == max(result["read_ms"], result["multiply_ms"]) > 0
        assert math.isclose(result["ratio"], result["best_ms"] / result["floor_ms"])
        # Readings beside a forward are no faster than the best one.
        assert result["read_ms"] <= result["median_read_ms"] * (1 + 1e-9) and result["paired_ratio"] > 0
    one, five = (result["multiply_ms"] for result in document["results"])
    assert five > 5 * one


def test_floors_of_several_instruction_sets_take_turns(tmp_path, capsys):
    path, names = tmp_path / "floors.json", _host.forward_instruction_sets()
    assert (
        bench_script("forward_floors").main(
            ["--quick", "--rows", "3", "--instruction-sets", *names, "--json", str(path)]
        )
        == 0
    )
    document = json.loads(path.read_text())
    assert [result["instruction_set"] for result in document["results"]] == document["instruction_sets"] == names
    rates, pairs = document["multiply_adds_per_s"], document["pair_multiply_adds_per_s"]
    assert list(rates) == names and sorted(pairs) == sorted(_host.forward_instruction_sets(pairs=True))
    assert min([*rates.values(), *pairs.values()]) > 0
    with pytest.raises(SystemExit):
        bench_script("forward_floors").main(["--quick", "--instruction-sets", "mmx"])
    assert "this CPU has no mmx" in capsys.readouterr().err


def test_peaks_refuse_what_they_cannot_measure():
    for name in _host.forward_instruction_sets():
        assert _host.multiply_add_rate(name, 1000, 1) > 0
        assert _host.read_seconds(name, 0, 0, 2) >= 0
    with pytest.raises(ValueError, match="SEQUOIA_HOST_ISA must be one of"):
        _host.multiply_add_rate("sse9", 1000, 1)
    with pytest.raises(ValueError, match="a peak needs threads"):
        _host.multiply_add_rate(_host.forward_instruction_sets()[0], 1000, 0)


# bench/run.py


def test_a_summary_leaves_out_what_scripts_tell_of_their_progress(capsys):
    run = run_module()
    asked = bench_script("paper_systems").Run(SimpleNamespace(), torch.device("cpu"), {}, None)
    asked.tell("7B: building the pair")
    told = capsys.readouterr().err
    assert told.endswith("s  7B: building the pair\n")
    assert run._without_progress(f"a result\n{told}  0.5 of another\n") == "a result\n  0.5 of another"


def test_every_script_of_the_suites_exists():
    run = run_module()
    assert {entry.suite for entry in run.SCRIPTS} == set(run.SUITES)
    assert [entry.name for entry in run.selected("ops")] == OPS
    for entry in run.selected("all"):
        assert len(list(BENCH.glob(f"*/bench_{entry.name}.py"))) == 1
        assert entry.why_not or entry.devices == ("cpu", "cuda")


def test_run_goes_to_the_end_and_says_what_was_skipped(tmp_path, monkeypatch, capsys):
    run = run_module()
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    room = tmp_path / "bench" / "room"
    room.mkdir(parents=True)
    (room / "bench_works.py").write_text(
        "import json, sys\n"
        "from bench.room import neighbour\n"
        "with open(sys.argv[sys.argv.index('--json') + 1], 'w') as file:\n"
        "    json.dump({'bench': 'works', 'quick': '--quick' in sys.argv}, file)\n"
        "print('did it')\n"
    )
    (room / "neighbour.py").write_text("")
    (room / "bench_breaks.py").write_text("raise SystemExit(7)\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    scripts = (
        run.Script("breaks", "ops", takes_device=False),
        run.Script("works", "ops", takes_device=False),
        run.Script("needs_gpu", "decode", devices=("cuda",), why_not="needs a CUDA device"),
    )
    monkeypatch.setattr(run, "SCRIPTS", scripts)
    assert run.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--quick"]) == 1
    folder = tmp_path / "out" / "cpu"
    assert json.loads((folder / "works.json").read_text()) == {"bench": "works", "quick": True}
    summary = json.loads((folder / "summary.json").read_text())
    assert [(entry["status"], entry.get("reason")) for entry in summary["scripts"]] == [
        ("failed", "exit status 7, see breaks.log"),
        ("ok", None),
        ("skipped", "needs a CUDA device"),
    ]
    text = (folder / "summary.md").read_text()
    assert "did it" in text and "| breaks | ops | failed |" in text and "not measured" not in text
    printed = capsys.readouterr().out
    assert "not measured" not in printed and f"tables: {folder / 'summary.md'}" in printed
    monkeypatch.setattr(run, "SCRIPTS", scripts[1:])
    assert run.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--quick", "--suite", "ops", "--targets"]) == 0
    printed = capsys.readouterr().out
    assert "works: ok" in printed and "not measured" in printed


def test_a_script_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    run = run_module()
    (tmp_path / "bench" / "room").mkdir(parents=True)
    (tmp_path / "bench" / "room" / "bench_sleeps.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    slow = run.Script("sleeps", "ops", takes_device=False)
    outcome = run.run_script(slow, tmp_path, "cpu", quick=False, timeout=0.3)
    assert outcome["status"] == "failed" and "took longer than 0 s" in outcome["reason"]
    assert run.run_script(slow, tmp_path, "cpu", quick=False, timeout=-1.0)["reason"] == "the time was over"


# The GPU commands: more of the one that runs everything in test_gpu_check.py


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (gpu_check, ["--out", "unused"], "gpu_check: torch sees no CUDA device on this machine"),
        (sanitize, [], "sanitize: torch sees no CUDA device on this machine"),
    ],
)
def test_without_a_gpu_the_command_says_so(program, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sanitize_exercises_every_op_and_finds_wrong_results(monkeypatch, capsys):
    chosen = list(sanitize.exercises())
    every = [*OPS, *sanitize.FUSED_STEPS, *sanitize.DRAFT_STEPS]
    assert {exercise.op for exercise in chosen} == set(every)
    few = [next(exercise for exercise in chosen if exercise.op == op) for op in every]
    paged = [exercise for exercise in chosen if "paged" in exercise.name]
    assert len(paged) == 2
    monkeypatch.setattr(sanitize, "exercises", lambda: iter([*few, *paged]))
    assert sanitize.run(CPU, ["reference"]) == []
    wanted = sanitize.outputs(few[0], "reference", CPU)[0]
    assert sanitize._mismatch(wanted + 1, wanted, few[0]).startswith("off by 1")
    assert sanitize._mismatch(wanted[:0], wanted, few[0]).startswith("shape")
    assert "off by inf" in sanitize._mismatch(wanted * math.nan, wanted, few[0])
    assert "compact_kv_cache_ on reference: paged" in capsys.readouterr().out


def test_sanitize_runs_the_steps_of_fused_forwards():
    triton_device = pytest.importorskip("sequoia_kernels.ops.triton_device", reason="triton is not installed")
    if not triton_device.INTERPRETED:
        pytest.skip("the steps run in Triton's interpreter")
    steps = list(sanitize.step_exercises())
    assert {exercise.op for exercise in steps} == set(sanitize.FUSED_STEPS) - {"few_rows"}
    for exercise in steps:
        got, wanted = (sanitize.outputs(exercise, backend, CPU) for backend in ("triton", "reference"))
        assert [sanitize._mismatch(*pair, exercise) for pair in zip(got, wanted, strict=True)] == [None] * len(got)


def test_sanitize_runs_what_drafts_do_beside_their_draws():
    triton_device = pytest.importorskip("sequoia_kernels.ops.triton_device", reason="triton is not installed")
    if not triton_device.INTERPRETED:
        pytest.skip("it runs in Triton's interpreter")
    chosen = [exercise for exercise in sanitize.draft_exercises() if str(sanitize.WIDE_VOCAB) not in exercise.name]
    assert {exercise.op for exercise in chosen} == set(sanitize.DRAFT_STEPS)
    for exercise in chosen:
        got, wanted = (sanitize.outputs(exercise, backend, CPU) for backend in ("triton", "reference"))
        assert [sanitize._mismatch(*pair, exercise) for pair in zip(got, wanted, strict=True)] == [None] * len(got)


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_sanitize_runs_forwards_of_few_rows(monkeypatch):
    """By the kernel's own source on a CPU: every kernel that the launch chooses between, and right."""
    pytest.importorskip("triton", reason="triton is not installed")
    from sequoia_kernels.models.fused import few_rows

    monkeypatch.setattr(few_rows, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(few_rows, "launch", few_rows_on_cpu)
    exercises = list(sanitize.few_rows_exercises())
    kernels = set()
    for exercise in exercises:
        model, tokens = exercise.arguments[:2]
        eights = 1 if tokens.numel() <= 8 else 2 if tokens.numel() <= 16 else 4
        kernels.add((model.embedding.dtype, model.head_dim, eights))
        assert model.reason_against(CPU) in (None, "takes a CUDA device")
    assert len(kernels) == 12
    for exercise in exercises[:4]:
        got, wanted = (sanitize.outputs(exercise, backend, CPU) for backend in ("cuda", "reference"))
        assert [sanitize._mismatch(*pair, exercise) for pair in zip(got, wanted, strict=True)] == [None] * len(got)
    monkeypatch.undo()
    monkeypatch.setattr(sanitize, "exercises", lambda: iter(exercises[:1]))
    assert sanitize.run(CPU, ["cuda", "triton"]) == []  # skipped with its reason


def test_sanitize_shares_its_work_out(monkeypatch):
    def started(command, cwd):
        begun.append(sanitize.Part.parse(command[command.index("--part") + 1]))
        assert command[:5] == [sys.executable, "-m", "bench.tools.sanitize", "--device", "cpu"] and cwd == BENCH.parent
        return SimpleNamespace(wait=lambda: code)

    monkeypatch.setattr(sanitize.subprocess, "Popen", started)
    for code in (0, 1, -9):
        begun = []
        assert sanitize.main(["--device", "cpu", "--processes", "3"]) == (code != 0)
        assert begun == [(0, 3), (1, 3), (2, 3)]
    seen = []
    monkeypatch.setattr(sanitize, "exercises", lambda: iter(range(8)))
    monkeypatch.setattr(sanitize, "outputs", lambda exercise, *rest: seen.append(exercise) or [])
    for part in begun:
        assert sanitize.run(CPU, [], part) == []
    assert sorted(seen) == list(range(8))
    for text in ("3/3", "-1/3", "1", "a/b"):
        with pytest.raises((ValueError, TypeError)):
            sanitize.Part.parse(text)


def test_the_scripts_start_from_the_shell(tmp_path):
    """As a user starts them: a process of its own, the package installed or on PYTHONPATH."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    for command, option in ((["bench/run.py"], "--suite"), (["-m", "bench.ops.bench_verify_tree"], "--seconds")):
        shown = run_process([sys.executable, *command, "--help"], env=variables, cwd=BENCH.parent).stdout
        assert option in shown
    # What lies beside the benchmarks is not taken for the installed package.
    asked = "import bench, sequoia_kernels; print(sequoia_kernels.__file__)"
    found = run_process([sys.executable, "-c", asked], env=variables, cwd=BENCH.parent).stdout.strip()
    assert found == sequoia_kernels.__file__
