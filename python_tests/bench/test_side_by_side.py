"""The side-by-side table: batches, choosing settings, turns, texts, tables; rivals run where they are installed."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from support.bench_scripts import bench_script
from support.tiny_models import noisy_copy, tiny_llama

from bench.common import side_by_side_features as features
from sequoia_kernels.demo import DemoPair
from sequoia_kernels.models import adapt

script = bench_script("side_by_side")
READ_IN = {"transformers": "5.24.0", "economize": "0.3.2"}  # as the features say
NEW = 7


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="module")
def pair():
    target = tiny_llama(3, num_layers=4, sharpness=4.0)
    found = DemoPair(target, noisy_copy(target, 0.3), None)
    script.without_settings(found)
    return found


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 31, (1, length), generator=generator) for length in (9, 5, 9, 7)]


class Clock:
    """Time that passes only where somebody works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def worker(self, name, seconds, *, tokens=(5, 6), largest=99):
        def decode(batch, seed):
            if len(batch.input_ids) > largest:
                raise ValueError(f"at most {largest}\nand more")
            self.now += seconds
            self.calls.append((name, len(batch.input_ids), seed))
            return script.Decoded([list(tokens)] * len(batch.input_ids), f"note of {name}")

        return decode


# ---- batches and models


def test_batches_are_padded_on_the_left_and_give_their_prompts_back(prompts):
    first, second = script.batches_of(prompts, 2)
    assert first.input_ids.shape == (2, 9) and second.input_ids.shape == (2, 9)
    assert first.attention_mask.tolist() == [[1] * 9, [0] * 4 + [1] * 5]
    assert not first.input_ids[1, :4].any()
    given_back = [ids.tolist() for batch in (first, second) for ids in batch.prompts]
    assert given_back == [ids.tolist() for ids in prompts]


def test_untouched_copies_share_no_weights_and_no_settings(prompts):
    model = tiny_llama(3)
    model.generation_config.eos_token_id = 4
    adapt(model)
    twin = script.untouched(model)
    assert torch.equal(twin(prompts[0]).logits, model(prompts[0]).logits)
    ours, theirs = ({parameter.data_ptr() for parameter in each.parameters()} for each in (model, twin))
    assert not ours & theirs
    assert twin.generation_config.eos_token_id is None and model.generation_config.eos_token_id == 4


# ---- choosing settings


def test_the_fastest_setting_that_runs_is_chosen(monkeypatch, prompts):
    clock = Clock(monkeypatch)
    candidates = {"slow": clock.worker("slow", 3.0), "broken": clock.worker("", 0.0, largest=0)}
    provider = script.Provider("one", candidates | {"fast": clock.worker("fast", 2.0)})
    provider.calibrate(script.batches_of(prompts, 2), rounds=2)
    assert provider.pick == "fast" and provider.reason is None
    assert provider.seconds == {"slow": 12.0, "fast": 8.0}  # the first run of each is not counted
    assert provider.failures == {"broken": "ValueError: at most 0"}
    names = [name for name, *_ in clock.calls]
    assert names == ["slow", "fast"] * 5


def test_without_a_setting_that_runs_there_is_a_reason(monkeypatch, prompts):
    clock = Clock(monkeypatch)
    provider = script.Provider("one", {"broken": clock.worker("", 0.0, largest=0)})
    provider.calibrate(script.batches_of(prompts, 1), rounds=1)
    assert provider.pick is None and provider.reason == "ValueError: at most 0"


def test_who_refuses_batches_goes_one_by_one_by_the_pick_for_one(monkeypatch, prompts):
    clock = Clock(monkeypatch)
    candidates = {name: clock.worker(name, 1.0, largest=1) for name in ("first", "second")}
    provider = script.Provider("one", candidates)
    batch, _ = script.batches_of(prompts, 2)
    provider.calibrate([batch], rounds=1, alone="second")
    assert (provider.pick, provider.one_by_one) == ("second", "ValueError: at most 1")
    assert not clock.calls and not provider.failures
    assert provider.decode(batch, 10) == [[5, 6], [5, 6]]
    assert clock.calls == [("second", 1, 10), ("second", 1, 11)] and clock.now == 2.0


# ---- turns and entries


def test_turns_move_on_and_texts_are_compared(monkeypatch, prompts):
    clock = Clock(monkeypatch)
    base = script.Provider(script.BASE, {"only": clock.worker("base", 4.0)})
    ours = script.Provider("ours", {"only": clock.worker("ours", 1.0, tokens=(5, 7))}, ours=True)
    nobody = script.Provider("nobody", {}, reason="not installed")
    batches = script.batches_of(prompts, 2)
    options = SimpleNamespace(calibration_rounds=1, rounds=2)
    wanted = [[5, 6], [5, 7], [5, 6], [5, 6]]
    entries = script.measure_case([base, ours, nobody], batches[:1], batches, options, wanted, {})
    assert [name for name, *_ in clock.calls[4:]] == ["base", "ours", "ours", "base"] * 2
    seeds = [seed for name, _, seed in clock.calls[4:] if name == "ours"]
    assert len(set(seeds)) == 4  # no two batches of any round
    assert entries["nobody"] == {"ours": False, "status": "skipped", "reason": "not installed"}
    one, other = entries[script.BASE], entries["ours"]
    assert one["tokens_per_second"] == 1.0 and one["over_base"] == 1.0  # 8 tokens a round in 8 s
    assert other["tokens_per_second"] == 4.0 and other["over_base"] == 4.0 and other["note"] == "note of ours"
    assert one["differing_prompts"] == 1 and other["differing_prompts"] == 3


# ---- who is timed


@pytest.mark.parametrize("size", [1, 2])
def test_all_greedy_texts_are_those_of_plain_transformers(pair, prompts, size, tmp_path):
    others = DemoPair(script.untouched(pair.target), script.untouched(pair.draft), None)
    wanted = script.greedy_texts(others, prompts, NEW)
    others.draft.save_pretrained(tmp_path)
    providers = [
        *script.transformers_providers(others, 0.0, NEW),
        *script.own_providers(pair, 0.0, NEW),
        *script.economize_providers(others, tmp_path, 0.0, NEW),
    ]
    ran = set()
    for provider in providers:
        for name in provider.candidates:
            provider.pick = name
            try:
                texts = [text for batch in script.batches_of(prompts, size) for text in provider.decode(batch, 0)]
            except ValueError as error:
                assert size == 2 and "assisted generate is only supported for batch_size = 1" in str(error)
                continue
            assert texts == wanted, (provider.name, name)
            ran.add(provider.name)
    expected = {script.BASE, *(provider.name for provider in providers if provider.ours)}
    expected |= {"transformers, assisted", "transformers, prompt lookup"} if size == 1 else set()
    assert ran == expected | ({script.ECONOMIZE} if find_spec("economize") else set())


def test_sampled_texts_have_their_length(pair, prompts, tmp_path):
    others = DemoPair(script.untouched(pair.target), script.untouched(pair.draft), None)
    others.draft.save_pretrained(tmp_path)
    (batch,) = script.batches_of(prompts[:1], 1)
    for provider in (
        *script.transformers_providers(others, 1.0, NEW),
        *script.own_providers(pair, 1.0, NEW),
        *script.economize_providers(others, tmp_path, 1.0, NEW),
    ):
        for name in provider.candidates:
            provider.pick = name
            texts = {tuple(provider.decode(batch, seed)[0]) for seed in range(3)}
            assert len(texts) > 1 and {len(text) for text in texts} == {NEW}, (provider.name, name)


def test_without_economize_the_table_says_so(pair, prompts, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    (provider,) = script.economize_providers(pair, tmp_path, 0.0, NEW)
    provider.calibrate(script.batches_of(prompts, 1), rounds=1)
    assert provider.pick is None and provider.reason == "not installed: pip install economize"
    assert script.economize_generate(pair, prompts[0]) is None


@pytest.mark.skipif(find_spec("economize") is None, reason="economize is not installed")
def test_what_economize_refuses_is_told(pair, tmp_path):
    (provider,) = script.economize_providers(pair, tmp_path / "none", 0.0, NEW)
    assert {"second model", "lookup, else second model"} <= set(provider.failures)
    assert provider.candidates and not any("second" in name for name in provider.candidates)


# ---- tables and options


def entry(**changes):
    known = {"status": "ok", "settings": "4 tokens", "note": "", "one_by_one": None, "tokens_per_second": 20.0}
    return known | {"over_base": 2.0, "differing_prompts": 0} | changes


def test_the_table_shows_rates_ratios_refusals_and_reasons():
    skipped = {"status": "skipped", "reason": "not installed"}
    cases = [
        {
            "temperature": 0.0,
            "batch_size": 4,
            "providers": {
                script.BASE: entry(tokens_per_second=10.0, over_base=1.0),
                "assisted": entry(one_by_one="ValueError: one only", differing_prompts=2),
                "ours": entry(note="6 nodes, 5 levels"),
                "economize": skipped,
            },
        }
    ]
    document = {"results": cases, "base": script.BASE, "num_prompts": 12, "economize_generate": "ConfigError: cache"}
    document |= {"packages": {"torch": "2.13", "economize": None}, "not_timed": {}, "commit": "abc", "command": "run"}
    lines = script.markdown(document).splitlines()
    assert lines[0] == "| tokens/s (over the base) | T = 0, batch 4 | texts that differ, batch 4 |"
    assert f"| {script.BASE} (the base) | 10.0 (1.00x) | 0 of 12 |" in lines
    assert "| assisted | 20.0 (2.00x) * | 2 of 12 |" in lines
    assert "| economize | - | - |" in lines
    assert "| ours | 6 nodes, 5 levels |" in lines and "| assisted | 4 tokens |" in lines
    assert "* refuses batches: its requests were decoded one after the other." in lines
    assert "- assisted, batches: ValueError: one only" in lines and "- economize: not installed" in lines
    assert "- economize, `generate`: ConfigError: cache; timed by `decode_batch`" in lines
    assert features.markdown() in script.markdown(document)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"prompts": 6}, r"--prompts must be a multiple of every batch (1, 4), got 6"),
        ({"calibration_prompts": 0}, r"--calibration-prompts must be a multiple of every batch (1, 4), got 0"),
        ({"batches": [0]}, r"--prompts must be a multiple of every batch (0), got 8"),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_met_are_refused(changes, message):
    options = {"prompts": 8, "calibration_prompts": 4, "batches": [1, 4], "rounds": 1, "calibration_rounds": 1}
    assert script.problem(SimpleNamespace(**options | changes, pair="demo")) == message


@pytest.mark.parametrize("package", list(features.COLUMNS))
def test_every_feature_is_where_it_is_said_to_be(package):
    if package in READ_IN and installed(package) != READ_IN[package]:
        pytest.skip(f"read in {package} {READ_IN[package]}, installed is {installed(package)}")
    assert features.missing_evidence(package) == []
    assert any(package in cells for cells in features.FEATURES.values())


def test_a_feature_that_is_gone_is_told(monkeypatch):
    gone = {"a": {"transformers": features.Fact("yes", {"transformers/__init__.py": "no such words in there"})}}
    monkeypatch.setattr(features, "FEATURES", gone)
    assert features.missing_evidence("transformers") == ["a: transformers/__init__.py has no 'no such words in there'"]
    with pytest.raises(ModuleNotFoundError, match="package must be installed, got no_such_package"):
        features.missing_evidence("no_such_package")


def test_the_script_runs(tmp_path):
    path, tables = tmp_path / "side.json", tmp_path / "tables.md"
    arguments = ["--quick", "--prompts", "2", "--new-tokens", "6", "--prompt-tokens", "16"]
    assert script.main([*arguments, "--json", str(path), "--markdown", str(tables)]) == 0
    document = json.loads(path.read_text())
    assert [(case["temperature"], case["batch_size"]) for case in document["results"]] == [(0.0, 1), (0.0, 2)]
    for case in document["results"]:
        assert next(iter(case["providers"])) == document["base"]
        assert all(entry["differing_prompts"] == 0 for entry in case["providers"].values() if entry["status"] == "ok")
    assert document["results"][1]["providers"]["transformers, assisted"]["one_by_one"]
    assert tables.read_text() == path.with_suffix(".md").read_text()
