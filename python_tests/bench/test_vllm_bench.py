"""The benchmark of trees in vLLM: loads that stay, processes that answer or fail, figures, tables; with stand-ins."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.bench_scripts import bench_script

from bench.common import vllm_engine
from bench.common.vllm_engine import EngineFailedError, closed_loop, run_engine, sampled_tokens

script = bench_script("vllm")


class Engine:
    """Emits a few tokens a step for all that is running, the first step's prompt first; a step takes a second."""

    def __init__(self, tokens_a_step=1):
        self.tokens_a_step, self.now = tokens_a_step, 0.0
        self.live, self.sent, self.loads, self.aborted = {}, [], [], []

    def add_request(self, name, prompt, length):
        self.live[name] = [0, length]
        self.sent.append((prompt["prompt_token_ids"], length))

    def step(self):
        self.now += 1.0
        self.loads.append(len(self.live))
        outputs = []
        for name, (done, length) in list(self.live.items()):
            new = min(1 if done == 0 else self.tokens_a_step, length - done)  # a prompt's forward gives one token
            self.live[name][0] += new
            tokens = list(range(done, done + new))
            finished = done + new == length
            outputs.append(
                SimpleNamespace(request_id=name, finished=finished, outputs=[SimpleNamespace(token_ids=tokens)])
            )
            if finished:
                del self.live[name]
        return outputs

    def abort_request(self, names):
        self.aborted += names
        for name in names:
            del self.live[name]

    def has_unfinished_requests(self):
        return bool(self.live)


@pytest.mark.parametrize("concurrency", [1, 3, 8])
@pytest.mark.parametrize("tokens_a_step", [1, 3])
def test_the_load_stays_until_enough_requests_have_ended(concurrency, tokens_a_step):
    engine = Engine(tokens_a_step)
    prompts = [[index] for index in range(20)]
    found = closed_loop(
        engine, prompts, lambda length: length, concurrency=concurrency, num_requests=10, new_tokens=13,
        clock=lambda: engine.now,
    )  # fmt: skip
    assert set(engine.loads) == {concurrency} and len(engine.aborted) == concurrency and not engine.live
    lengths = [length for _, length in engine.sent]
    assert sorted(set(lengths[:concurrency])) == lengths[:concurrency] and max(lengths[:concurrency]) < 13
    assert set(lengths[concurrency:]) == {13}
    # The first token comes alone, the other twelve come so many at a time, in as many seconds.
    assert found["tpot_ms"] == pytest.approx([1e3 / tokens_a_step] * 10)
    steps = 1 + 12 / tokens_a_step
    assert found["tokens_per_second"] == pytest.approx(13 / steps * concurrency, rel=0.15)
    assert len(found["texts"]) == 10 and len(set(found["texts"].values())) == 1
    opening = {prompt[0] for prompt, _ in engine.sent[:concurrency]}
    assert opening.isdisjoint(map(int, found["texts"]))


@pytest.mark.parametrize("count", [2, 11])
def test_a_prompt_is_sampled_a_few_at_once(count):
    engine = Engine(tokens_a_step=3)
    found = sampled_tokens(engine, [7, 8], int, count=count, length=5, at_once=4)
    assert found == [[0, 1, 2, 3, 4]] * count
    assert engine.sent == [([7, 8], 5)] * count and max(engine.loads) == min(4, count) and not engine.live


def test_texts_are_told_apart():
    def texts(shift):
        engine = Engine()
        step = engine.step

        def shifted():
            outputs = step()
            for output in outputs:
                output.outputs[0].token_ids = [token + shift for token in output.outputs[0].token_ids]
            return outputs

        engine.step = shifted
        return closed_loop(engine, [[1], [2]], int, concurrency=1, num_requests=2, new_tokens=4,
                           clock=lambda: engine.now)["texts"]  # fmt: skip

    assert texts(0) == texts(0) and texts(0)["0"] != texts(1)["0"]


# ---- processes

TASK = {"loads": [[0.0, 1, 2], [0.0, 4, 2]], "prompts": []}
ANSWERS = [{"start_s": 1.0, "packages": {}}, {"warmup_s": 2.0}, {"load": [0.0, 1, 2]}, {"load": [0.0, 4, 2]}]
ANSWERS += [{"sampled": [[[1, 2]]]}]


@pytest.fixture
def interpreter(tmp_path):
    """A stand-in for the interpreter of vLLM's environment, of which a body says what it does."""

    def write(body):
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\nimport json, os, sys\ntask = json.load(sys.stdin)\n{body}\n")
        path.chmod(0o755)
        return path

    return write


def answers_of(python, tmp_path, **settings):
    options = {"preload": [], "variables": {}, "timeout": 60.0} | settings
    return list(run_engine(python, TASK, log=tmp_path / "log", **options))


def test_a_process_answers_line_by_line(interpreter, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    shown = "{name: os.environ.get(name) for name in ('OMP_NUM_THREADS', 'LD_PRELOAD', 'A', 'PYTHONPATH')}"
    body = f"for line in {ANSWERS!r}: print(json.dumps(line | {{'seen': {shown}, 'words': sys.argv[1:]}}))"
    openmp = tmp_path / "libiomp5.so"
    found = answers_of(interpreter(body), tmp_path, preload=[openmp], variables={"A": "b"})
    assert [line.get("load") for line in found] == [None, None, [0.0, 1, 2], [0.0, 4, 2], None]
    seen = {"OMP_NUM_THREADS": None, "LD_PRELOAD": str(openmp), "A": "b", "PYTHONPATH": str(vllm_engine.ROOT)}
    assert found[0]["seen"] == seen and found[0]["words"] == ["-m", "bench.common.vllm_engine"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print(json.dumps({'error': 'ValueError: no such method'}))", "ValueError: no such method"),
        ("sys.exit('out of memory')", "ended with status 1: out of memory"),
        (f"print(json.dumps({ANSWERS[0]!r}))", "ended with status 0: it said nothing"),
        ("import time; time.sleep(60)", "ended with status -9"),
    ],
    ids=["an error", "a status", "too few answers", "too long"],
)
def test_a_process_that_fails_says_why(body, message, interpreter, tmp_path):
    with pytest.raises(EngineFailedError, match=message):
        answers_of(interpreter(body), tmp_path, timeout=0.5 if "sleep" in body else 60.0)


def test_what_a_process_has_started_ends_with_it(interpreter, tmp_path):
    file = tmp_path / "child"
    body = f"""
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
open({str(file)!r}, "w").write(str(child.pid))
print(json.dumps({{"error": "it has an heir"}}), flush=True)
time.sleep(600)
"""
    with pytest.raises(EngineFailedError, match="it has an heir"):
        answers_of(interpreter(body), tmp_path)
    child, deadline = int(file.read_text()), time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid):
    """Whether there is such a process; one that nobody waits for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_openmp_of_the_environment_is_preloaded(tmp_path):
    python = tmp_path / "bin" / "python"
    assert vllm_engine.preloaded(python, []) == []
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    malloc = tmp_path / "libtcmalloc.so"
    assert vllm_engine.preloaded(python, [malloc]) == [malloc, tmp_path / "lib" / "libiomp5.so"]


# ---- the script

OPTIONS = Namespace(
    loads=[1, 4], temperatures=[0.0, 1.0], chains=[3], each=2, least=4, warmup_each=1, max_nodes=8, rule="traversal",
    rounds=2, prompt_tokens=16, new_tokens=8, preload=[], samples=50,
)  # fmt: skip


def test_engines_and_their_loads():
    engines = script.engines_of(OPTIONS, "D")
    assert list(engines) == ["plain vLLM", "chain of 3", "chain of 3, drawn", "trees by load"]
    chain = engines["chain of 3"].settings["speculative_config"]
    assert chain == {"method": "draft_model", "model": "D", "num_speculative_tokens": 3}
    drawn = engines["chain of 3, drawn"]
    assert drawn.settings["speculative_config"] == chain | {"draft_sample_method": "probabilistic"}
    assert engines["trees by load"].settings == {"trees": {"draft": "D", "max_nodes": 8, "rule": "traversal"}}
    assert script.loads_of(OPTIONS, [0.0, 1.0], 2, 4) == [[0, 1, 4], [1, 1, 4], [0, 4, 8], [1, 4, 8]]
    assert script.loads_of(OPTIONS, [1.0], 1, 2) == [[1, 1, 2], [1, 4, 4]]


def test_engines_that_are_no_bar_run_once():
    engines = script.engines_of(OPTIONS, "D")
    seen = {name: {"1": {"exact": name == "chain of 3, drawn"}} for name in engines}

    def temperatures(exactness):
        found = (script.temperatures_of([0.0, 1.0], name, engine, exactness) for name, engine in engines.items())
        return dict(zip(engines, found))

    first = {
        "plain vLLM": [0.0, 1.0],
        "chain of 3": [0.0, 1.0],
        "chain of 3, drawn": [1.0],
        "trees by load": [0.0, 1.0],
    }
    assert temperatures({}) == first
    assert temperatures(seen) == first | {"chain of 3": [0.0]}
    seen["chain of 3, drawn"]["1"]["exact"] = False
    assert temperatures(seen) == first | {"chain of 3": [0.0], "chain of 3, drawn": []}


def test_commands_lose_the_places_of_the_machine():
    command = (
        "python -m bench --python /opt/vllm/bin/python --json=/tmp/out.json --loads 1 'a b' --preload /usr/lib/x.so"
    )
    expected = "python -m bench --python python --json=out.json --loads 1 'a b' --preload x.so"
    assert script.without_places(command) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "no"}, "--python must be the interpreter"),
        ({"loads": [1, 0]}, "--loads must be at least 1 each"),
        ({"chains": [0]}, "--chains must be"),
        ({"rounds": 0}, "--rounds must be"),
        ({"warmup_each": 0}, "--warmup-each must be"),
        ({"new_tokens": 1}, "--new-tokens must be at least 2"),
        ({"preload": "no"}, "--preload must be files"),
    ],
)
def test_wrong_options_are_refused(changes, message, tmp_path):
    good = {**vars(OPTIONS), "python": tmp_path / "python"}
    good["python"].touch()
    assert script.problem(Namespace(**good)) is None
    changed = {name: tmp_path / "no" if value == "no" else value for name, value in changes.items()}
    changed = {name: [value] if name == "preload" else value for name, value in changed.items()}
    assert message in script.problem(Namespace(**good | changed))


def load(rate, times=(10.0,), texts=(), **more):
    return {"tokens_per_second": rate, "tpot_ms": list(times), "texts": dict(texts), **more}


def test_figures_are_medians_of_rounds_and_ratios_of_the_same_round():
    base = [load(100.0, texts={"0": "a", "1": "b"}), load(50.0, texts={"0": "a"}), load(200.0)]
    runs = [
        load(150.0, range(1, 101), {"0": "a", "1": "c"}, num_drafts=2, plan={"nodes": 3}),
        load(100.0, range(1, 101), {"0": "a", "7": "z"}, num_drafts=4, plan=None),
        load(160.0, [5.0], num_drafts=1, plan=None),
    ]
    entry = script.entry_of(runs, base, compare_texts=True)
    assert entry["tokens_per_second"] == 150.0 and entry["rounds"] == [150.0, 100.0, 160.0]
    assert entry["over_plain"] == 1.5 and entry["over_plain_spread"] == [0.8, 2.0]
    assert entry["tpot_ms_p50"] == 50.5 and entry["tpot_ms_p95"] == pytest.approx(95.05)
    assert (entry["texts_compared"], entry["texts_differing"]) == (3, 1)
    assert entry["num_drafts"] == 7 and entry["plans"] == [{"nodes": 3}]
    assert "num_draft_tokens" not in entry
    assert "texts_compared" not in script.entry_of(runs, base, compare_texts=False)


def test_tables(capsys):
    counts = {"num_drafts": 100, "num_draft_tokens": 300, "num_accepted_tokens": 150}
    rounds = {
        "plain vLLM": [{(0.0, 1): load(100.0), (1.0, 1): load(90.0)}] * 2,
        "chain of 2": [{(0.0, 1): load(110.0, **counts), (1.0, 1): load(80.0, **counts)}] * 2,
        "chain of 3": [{(0.0, 1): load(120.0, **counts), (1.0, 1): load(70.0, **counts)}] * 2,
        "trees by load": [{(0.0, 1): load(150.0, **counts), (1.0, 1): load(95.0, **counts)},
                          {(0.0, 1): load(190.0, **counts), (1.0, 1): load(85.0, **counts)}],
    }  # fmt: skip
    options = Namespace(temperatures=[0.0, 1.0], loads=[1])
    likely = {(4, 5): 0.5, (6, 7): 0.4}
    good, bad = ([[4, 5, 9]] * 26 + [[6, 7, 9]] * 20 + [[1, 2, 9]] * count for count in (5, 50))
    exactness = {
        name: {"1": script.sample_check(sampled, {(*text, 9): share for text, share in likely.items()})}
        for name, sampled in (("plain vLLM", good), ("chain of 2", bad), ("chain of 3", good), ("trees by load", good))
    }
    results = script.results_of(options, rounds, exactness)
    assert [result["tuned_chain"] for result in results] == ["chain of 3", "chain of 3"]
    document = {
        "results": results, "environment": {"processor": "CPU", "cores": 2, "date": "today"}, "commit": None,
        "packages": {"vllm": "0.32.0"}, "preloaded": [], "command": "python", "failed": {"chain of 9": "no memory"},
        **{name: value for name, value in vars(OPTIONS).items() if isinstance(value, int)},
        "temperatures": options.temperatures, "exactness": exactness,
    }  # fmt: skip
    text = script.markdown(document)
    assert "| trees by load | 170 (1.70x, 1.50 to 1.90) |" in text
    assert "| its tuned chain | 120 (1.20x) |" in text and "| its tuned chain | 70 (0.78x) |" in text
    assert "| trees by load | 2.50 (3.0) |" in text
    assert "| T = 0, 1 running | 1.70x | 1.6x | yes | 1.42x of chain of 3 |" in text
    assert "| T = 1, 1 running | 1.00x | 1.6x | no | 1.29x of chain of 3; nothing pays |" in text
    assert "| chain of 3 | p = 0." in text
    assert "| chain of 2 | **not exact**: [4, 5, 9] in 27.1 % where 50.0 % is right |" in text
    assert "- chain of 9: failed, no memory" in text
    json.dumps(document)
    del exactness["chain of 3"]  # not tested is not exact
    results = document["results"] = script.results_of(options, rounds, exactness)
    assert [result["tuned_chain"] for result in results] == ["chain of 3", None]
    assert "| T = 1, 1 running | 1.00x | 1.6x | no | none is exact |" in script.markdown(document)
