"""The hardware profile: fingerprints, tables, files and every refusal."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.synthetic_profile import DEVICE, DRAFT, TARGET, forward_table, synthetic_profile
from support.tiny_families import tiny_config
from support.tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, CLIPConfig, GPT2Config, LlamaConfig, Qwen2Config

from sequoia_kernels import fingerprints
from sequoia_kernels.errors import ProfileError
from sequoia_kernels.planner import CostModel
from sequoia_kernels.planner.profile import DeviceFingerprint, HardwareProfile, ModelFingerprint, OpPoint


@pytest.fixture
def profile():
    return (
        synthetic_profile(draft_counts=(1, 2, 4), node_counts=(1, 2, 4))
        .with_overhead(0.25, 0.05)
        .with_slowdowns({TARGET.key: 1.02, "verify_tree": 1.3})
        .with_measurement(TARGET.key, DRAFT.key, {"memory_copy": 12.5}, {"quick": True})
    )


# ---- the file ----


def test_how_deep_a_draft_grows_is_kept_and_may_be_missing_in_older_files(profile):
    limited = profile.with_draft_levels(DRAFT.key, 5)
    assert limited.draft_levels == {DRAFT.key: 5} and HardwareProfile.from_json(limited.to_json()) == limited
    assert profile.merged(limited) == limited and limited.merged(profile).draft_levels == {DRAFT.key: 5}
    older = json.loads(limited.to_json())
    for entry in older["models"].values():
        del entry["max_levels"]
    assert HardwareProfile.from_json(json.dumps(older)) == profile
    older["models"][DRAFT.key]["max_levels"] = 0
    with pytest.raises(ProfileError, match="max_levels must be a positive integer or null"):
        HardwareProfile.from_json(json.dumps(older))
    with pytest.raises(ValueError, match="with_draft_levels: levels must be at least 1, got 0"):
        profile.with_draft_levels(DRAFT.key, 0)
    with pytest.raises(ProfileError, match="the draft must be a measured model, got another"):
        profile.with_draft_levels("another", 5)


def test_saved_and_loaded_is_the_same(profile, tmp_path):
    path = tmp_path / "profile.json"
    profile.save(path)
    assert HardwareProfile.load(path) == profile
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]


def test_json_is_versioned(profile):
    document = json.loads(profile.to_json())
    assert (document["format"], document["version"]) == ("sequoia-kernels/hardware-profile", 2)
    assert HardwareProfile.from_json(profile.to_json()) == profile


def test_what_having_a_draft_adds_is_kept_and_may_be_missing_in_older_files(profile):
    drafted = profile.with_overhead(0.25, 0.05, 0.4)
    assert HardwareProfile.from_json(drafted.to_json()) == drafted and drafted.draft_overhead_ms == 0.4
    older = json.loads(profile.to_json())
    del older["overhead"]["draft_ms"]
    assert HardwareProfile.from_json(json.dumps(older)) == profile
    cost, plain = (CostModel(entry, target=TARGET, draft=DRAFT) for entry in (drafted, profile))
    np.testing.assert_allclose(cost.host_ms([1, 2, 5]) - plain.host_ms([1, 2, 5]), [0.0, 0.4, 0.4])
    with pytest.raises(ValueError, match="draft_ms"):
        profile.with_overhead(0.25, 0.05, -0.1)


def test_an_empty_profile_is_a_profile():
    profile = HardwareProfile(DEVICE)
    assert HardwareProfile.from_json(profile.to_json()) == profile


CHANGES = [
    ("format", "sequoia-kernels/tree", 'must have "format": "sequoia-kernels/hardware-profile"'),
    ("version", 1, r'must have "version": 2, got 1; make the file again'),
    ("version", None, 'must have "version": 2, got null'),
    ("created", 5, "created must be a string, got 5"),
    ("device", [], "device must be an object"),
    ("device.name", None, r"device\.name must be a string"),
    ("device.num_threads", 0, r"device\.num_threads must be a positive integer"),
    ("device.memory_bytes", 1.5, r"device\.memory_bytes must be a positive integer"),
    ("target", "llama", "target must be one of its models or null"),
    ("draft", 3, "draft must be one of its models or null"),
    ("models", None, "models must be an object"),
    (f"models.{TARGET.key}", 1, "must be an object"),
    (f"models.{TARGET.key}.fingerprint.num_layers", 13, "must be named llama-13x256"),
    (f"models.{TARGET.key}.fingerprint.num_layers", True, r"num_layers must be an integer >= 0"),
    (f"models.{TARGET.key}.fingerprint.dtype", None, r"dtype must be a string"),
    (f"models.{TARGET.key}.fingerprint.linears", None, r"linears must be a list of \[inputs, outputs, how many\]"),
    (f"models.{TARGET.key}.fingerprint.linears", [[8, 8]], r"linears must be a list of \[inputs, outputs, how many\]"),
    (f"models.{TARGET.key}.fingerprint.streamed_bytes", -1, r"streamed_bytes must be an integer >= 0"),
    (f"models.{TARGET.key}.forwards", {}, "forwards must be a list"),
    (f"models.{TARGET.key}.forwards.0.batch_size", 0, r"forwards\[0\]\.batch_size must be a positive integer"),
    (f"models.{TARGET.key}.forwards.0.node_counts", [1, 4, 2], "node_counts must be a list of increasing integers"),
    (f"models.{TARGET.key}.forwards.0.node_counts", [0, 1, 2], "node_counts must be a list of increasing integers"),
    (f"models.{TARGET.key}.forwards.0.context_lens", [], "context_lens must be a list of increasing integers"),
    (f"models.{TARGET.key}.forwards.0.p50_ms", [[1, 2, 3]], "p50_ms must be 2 rows of 3 positive times"),
    (f"models.{TARGET.key}.forwards.0.p50_ms", [[1, 2], [3, 4]], "p50_ms must be 2 rows of 3 positive times"),
    (f"models.{TARGET.key}.forwards.0.p20_ms", [[1, 2, -3], [1, 2, 3]], "p20_ms must be 2 rows of 3 positive times"),
    (f"models.{TARGET.key}.forwards.0.p80_ms", [[1, 2, "3"], [1, 2, 3]], "p80_ms must be 2 rows of 3 positive times"),
    ("ops", [], "ops must be an object"),
    ("ops.verify_tree", 1, r"ops\.verify_tree must be a list"),
    ("ops.verify_tree.0", 1, r"ops\.verify_tree\[0\] must be an object"),
    ("ops.verify_tree.0.p50_ms", -1, r"verify_tree\[0\]\.p50_ms must be a finite number >= 0"),
    ("ops.verify_tree.0.parameters", None, r"verify_tree\[0\]\.parameters must be an object"),
    ("ops.verify_tree.0.parameters.nodes", [], r"parameters\.nodes must be a number or a string"),
    ("overhead.step_ms", "much", r"overhead\.step_ms must be a finite number >= 0"),
    ("mean_over_median.verify_tree", 0, r"mean_over_median\.verify_tree must be a number > 0"),
    ("bandwidth_gb_per_s.memory_copy", None, r"memory_copy must be a number >= 0"),
    ("settings", None, "settings must be an object"),
]


@pytest.mark.parametrize(
    ("field", "value", "message"), CHANGES, ids=[f"{field}={value}" for field, value, _ in CHANGES]
)
def test_broken_files_are_refused_by_field(profile, field, value, message, tmp_path):
    document = json.loads(profile.to_json())
    owner = document
    *way, last = field.split(".")
    for name in way:
        owner = owner[int(name) if isinstance(owner, list) else name]
    owner[int(last) if isinstance(owner, list) else last] = value
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=message) as caught:
        HardwareProfile.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("field", ["device", "models", "ops", "overhead", "created", "settings", "mean_over_median"])
def test_missing_fields_are_refused(profile, field):
    document = json.loads(profile.to_json())
    del document[field]
    with pytest.raises(ProfileError, match=f"{field} must be"):
        HardwareProfile.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"format": Infinity}', "[" * 100000])
def test_text_that_is_no_document_is_refused(text):
    with pytest.raises(ProfileError, match=r"HardwareProfile\.from_json: the document must"):
        HardwareProfile.from_json(text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"\x80\x02}")
    with pytest.raises(ProfileError, match="not UTF-8"):
        HardwareProfile.load(tmp_path / "file")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        HardwareProfile.load(tmp_path / "none")


def test_a_write_that_fails_leaves_nothing(profile, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        profile.save(tmp_path / "profile.json")
    assert list(tmp_path.iterdir()) == []


# ---- the device ----


def test_the_machine_at_hand_accepts_its_own_profile():
    HardwareProfile(DeviceFingerprint.of("cpu")).check_device()
    HardwareProfile(DeviceFingerprint.of("cpu")).check_device("cpu")


def test_another_device_is_refused_with_both_names(profile):
    with pytest.raises(ProfileError, match="Synthetic Processor") as caught:
        profile.check_device()
    assert DeviceFingerprint.of("cpu").name in str(caught.value)
    assert "measure a profile on this device" in str(caught.value)


def test_another_number_of_threads_is_another_device():
    here = DeviceFingerprint.of("cpu")
    there = DeviceFingerprint(**{**vars(here), "num_threads": here.num_threads + 1})
    with pytest.raises(ProfileError, match=rf"call torch\.set_num_threads\({here.num_threads + 1}\)"):
        HardwareProfile(there).check_device()


def test_a_device_that_is_not_there_is_refused():
    gpu = DeviceFingerprint("cuda", "NVIDIA Imaginary", None, 1 << 36, "9.0", "2.13.0")
    with pytest.raises(ProfileError, match="NVIDIA Imaginary"):
        HardwareProfile(gpu).check_device()


def test_another_torch_is_logged_not_refused(caplog):
    here = DeviceFingerprint.of("cpu")
    other = DeviceFingerprint(**{**vars(here), "torch_version": "1.0", "memory_bytes": None})
    with caplog.at_level(logging.WARNING, logger="sequoia_kernels"):
        HardwareProfile(other).check_device()
    assert "measured with torch 1.0" in caplog.text


def test_other_device_types_have_no_fingerprint():
    with pytest.raises(ValueError, match="must be of type cpu or cuda"):
        DeviceFingerprint.of("meta")


# ---- models ----


def test_fingerprint_of_a_model():
    model = tiny_llama(0, vocab_size=48, num_layers=3, hidden_size=32)
    fingerprint = ModelFingerprint.of(model)
    assert fingerprint == ModelFingerprint(
        "llama",
        "float32",
        sum(entry.numel() for entry in model.parameters()),
        48,
        3,
        32,
        64,
        4,
        2,
        8,
        linears=((32, 16, 6), (32, 32, 6), (32, 48, 1), (32, 64, 6), (64, 32, 3)),
    )
    assert fingerprint.cache_row_bytes == 2 * 3 * 2 * 8 * 4
    assert fingerprint.key.startswith("llama-3x32-float32-")
    assert ModelFingerprint.of(model.to(torch.bfloat16)).key != fingerprint.key


def test_fingerprint_of_a_wrapped_model_is_the_models_own():
    model = tiny_llama(0)
    wrapped = SimpleNamespace(
        model=model, num_parameters=model.num_parameters(), dtype=model.dtype, vocab_size=model.config.vocab_size
    )
    assert ModelFingerprint.of(wrapped) == ModelFingerprint.of(model)


def test_an_offloaded_model_tells_what_it_streams():
    model = tiny_llama(0)
    wrapped = SimpleNamespace(
        model=model,
        num_parameters=model.num_parameters(),
        dtype=model.dtype,
        vocab_size=model.config.vocab_size,
        memory=SimpleNamespace(streamed_bytes=4096),
    )
    fingerprint = ModelFingerprint.of(wrapped)
    assert fingerprint.streamed_bytes == 4096
    assert fingerprint.key != ModelFingerprint.of(model).key
    assert dataclasses.replace(fingerprint, streamed_bytes=0) == ModelFingerprint.of(model)


@pytest.mark.parametrize(
    "config",
    [
        tiny_llama(0).config,
        GPT2Config(vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=2),
        Qwen2Config(
            vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
        tiny_config("gemma4_text"),  # whose layers differ in the width of their heads
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_configuration_has_the_fingerprint_of_its_model(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fingerprint = ModelFingerprint.of(model)
    assert fingerprint.linears
    assert ModelFingerprint.from_config(config, torch.bfloat16) == fingerprint
    config.save_pretrained(tmp_path)
    assert ModelFingerprint.from_config(tmp_path, "bfloat16") == fingerprint
    assert ModelFingerprint.from_config(str(tmp_path / "config.json"), "bfloat16") == fingerprint
    streaming = ModelFingerprint.from_config(config, "bfloat16", streamed_bytes=7)
    assert streaming == dataclasses.replace(fingerprint, streamed_bytes=7)


def test_a_large_configuration_needs_no_memory():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    fingerprint = ModelFingerprint.from_config(config, "bfloat16")
    assert fingerprint.num_parameters == 68_976_648_192
    assert fingerprint.weight_bytes == 2 * fingerprint.num_parameters


def test_what_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a local folder"):
        ModelFingerprint.from_config(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"no": "model"}')
    with pytest.raises(ValueError, match="must hold a transformers configuration"):
        ModelFingerprint.from_config(tmp_path)
    with pytest.raises(TypeError, match="must be a transformers configuration or a path, got int"):
        ModelFingerprint.from_config(3)
    with pytest.raises(ValueError, match="must name a floating-point torch dtype, got 'float33'"):
        ModelFingerprint.from_config(tiny_llama(0).config, "float33")
    with pytest.raises(ValueError, match="decoder-only language model, got clip"):
        ModelFingerprint.from_config(CLIPConfig())


def test_what_is_no_model_has_no_fingerprint():
    with pytest.raises(TypeError, match="model must have a config"):
        ModelFingerprint.of(object())


def test_models_are_found_by_key_fingerprint_and_role(profile):
    assert profile.find_model() == profile.find_model(TARGET) == profile.find_model(TARGET.key) == TARGET.key
    assert profile.find_model(role="draft") == DRAFT.key


def test_models_are_found_by_themselves():
    model = tiny_llama(0)
    profile = HardwareProfile(DEVICE).with_forwards(
        ModelFingerprint.of(model), forward_table(lambda nodes, context: 1.0, (1, 2))
    )
    assert profile.find_model(model) == ModelFingerprint.of(model).key


def test_a_model_that_was_not_measured_is_refused_with_the_fix(profile):
    with pytest.raises(
        ProfileError, match=r"the draft must be a measured model, got llama-9, measured: .*measure it with"
    ):
        profile.find_model("llama-9", "draft")
    with pytest.raises(ProfileError, match="must name its target, got none; give target="):
        HardwareProfile(DEVICE).find_model()


def test_a_batch_size_that_was_not_measured_is_refused_with_the_fix(profile):
    assert profile.forward_table(TARGET.key, 1).batch_size == 1
    with pytest.raises(ProfileError, match=r"\(1\), got 4; measure it with measure_profile\(batch_size=4\)"):
        profile.forward_table(TARGET.key, 4)


# ---- adding ----


def test_tables_of_other_batch_sizes_are_kept_and_equal_ones_replaced(profile):
    slow = forward_table(lambda nodes, context: 9.0, (1, 2), batch_size=1)
    wide = forward_table(lambda nodes, context: 7.0, (1, 2), batch_size=8)
    grown = profile.with_forwards(TARGET, wide).with_forwards(TARGET, slow)
    assert grown.forward_table(TARGET.key, 8) == wide
    assert grown.forward_table(TARGET.key, 1) == slow
    assert profile.forward_table(TARGET.key, 1) != slow


def test_op_points_of_equal_parameters_are_replaced():
    first, second = OpPoint({"nodes": 1}, 1, 2, 3), OpPoint({"nodes": 2}, 1, 2, 3)
    faster = OpPoint({"nodes": 1}, 0.1, 0.2, 0.3)
    profile = HardwareProfile(DEVICE).with_op("verify_tree", [first, second]).with_op("verify_tree", [faster])
    assert profile.ops["verify_tree"] == (second, faster)


def test_merging_adds_and_prefers_the_other(profile):
    slow = forward_table(lambda nodes, context: 9.0, (1, 2))
    other = HardwareProfile(DEVICE).with_forwards(DRAFT, slow).with_overhead(0.5)
    merged = profile.merged(other)
    assert merged.forward_table(DRAFT.key) == slow
    assert merged.forward_table(TARGET.key) == profile.forward_table(TARGET.key)
    assert merged.step_overhead_ms == 0.5
    assert merged.level_overhead_ms == profile.level_overhead_ms
    assert merged.ops == profile.ops
    assert merged.mean_over_median == profile.mean_over_median
    assert merged.target_key == TARGET.key


def test_profiles_of_two_devices_are_not_merged(profile):
    with pytest.raises(ProfileError, match=r"Synthetic Processor.*got cpu"):
        profile.merged(HardwareProfile(DeviceFingerprint.of("cpu")))


@pytest.mark.parametrize("step_ms", [-1, float("nan"), "1", True])
def test_bad_overheads_are_refused(profile, step_ms):
    with pytest.raises(ValueError, match="step_ms must be a finite time >= 0"):
        profile.with_overhead(step_ms)


@pytest.mark.parametrize("ratio", [0, -1, float("inf"), "2"])
def test_bad_slowdowns_are_refused(profile, ratio):
    with pytest.raises(ValueError, match="mean_over_median must hold finite ratios > 0"):
        profile.with_slowdowns({TARGET.key: ratio})


# ---- the device ----


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(("32K", "1024K", "32768K"), 32 << 20), (("48K", "2M"), 2 << 20), (("",), 32 << 20), ((), 32 << 20)],
)
def test_the_largest_cache_is_read_from_the_system(tmp_path, monkeypatch, sizes, expected):
    (tmp_path / "index9" / "size").mkdir(parents=True)  # cannot be read
    for index, size in enumerate(sizes):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(fingerprints, "CPU_CACHES", tmp_path)
    assert fingerprints.largest_cache_bytes() == expected
