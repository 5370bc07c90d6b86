"""The helper that makes an engine one of trees, the same as flags, and the plugin that is inert beside other vLLMs."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from support.processes import python_environment, run_process

import sequoia_kernels.vllm as plugin
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm import InstalledVllm, engine_args, register, server_flags, support
from sequoia_kernels.vllm.__main__ import main
from sequoia_kernels.vllm.settings import TreeSettings


@pytest.fixture
def tested(monkeypatch):
    let_it_be(monkeypatch, InstalledVllm("0.32.0", None))


def let_it_be(monkeypatch, installed: InstalledVllm, cuda: bool = False) -> None:
    monkeypatch.setattr(support, "installed_vllm", lambda: installed)
    monkeypatch.setattr(plugin, "installed_vllm", lambda: installed)
    monkeypatch.setattr(plugin, "runs_on_cuda", lambda: cuda)


def test_arguments_of_an_engine(tested):
    tree = TokenTree([-1, 0, 0, 1])
    arguments = engine_args("my/draft", tree=tree, rule="traversal", draft_dtype="float32", check_ranks=True)
    assert arguments["worker_cls"] == "sequoia_kernels.vllm.runner.TreeWorker"
    assert arguments["speculative_config"] == {
        "method": "custom_class",
        "model": "sequoia_kernels.vllm.runner.TreeProposer",
        "num_speculative_tokens": 3,
    }
    settings = TreeSettings.from_dict(arguments["additional_config"]["sequoia"])
    assert settings == TreeSettings(
        "my/draft", ((-1, 0, 0, 1),), False, "traversal", draft_dtype="float32", check_ranks=True
    )
    assert set(arguments) == {"worker_cls", "speculative_config", "additional_config"}


def test_as_many_tokens_as_the_largest_tree_has_nodes_below_its_root(tested):
    for tree, count in (("auto", 15), ([[-1, 0], [-1, 0, 0, 1, 2]], 4), ([-1, 0], 1)):
        assert engine_args("d", tree=tree)["speculative_config"]["num_speculative_tokens"] == count
    assert engine_args("d", max_nodes=40)["speculative_config"]["num_speculative_tokens"] == 39


def test_flags_are_the_arguments(tested):
    settings = {"tree": [-1, 0, 0], "draft_cache_tokens": 999, "profile_seconds": 0}
    flags, arguments = server_flags("some draft", **settings), engine_args("some draft", **settings)
    assert flags[::2] == ["--worker-cls", "--speculative-config", "--additional-config"]
    assert flags[1] == arguments["worker_cls"]
    assert json.loads(flags[3]) == arguments["speculative_config"]
    assert json.loads(flags[5]) == arguments["additional_config"]


def test_on_cuda_the_attention_backend_is_asked_for_by_name(monkeypatch):
    let_it_be(monkeypatch, InstalledVllm("0.32.0", None))
    on_a_cpu = engine_args("d", tree=[-1, 0, 0])
    let_it_be(monkeypatch, InstalledVllm("0.32.1", None), cuda=True)
    assert engine_args("d", tree=[-1, 0, 0]) == {**on_a_cpu, "attention_backend": "CUSTOM"}
    assert server_flags("d", tree=[-1, 0, 0])[-2:] == ["--attention-backend", "CUSTOM"]
    let_it_be(monkeypatch, InstalledVllm("0.31.0", None), cuda=True)
    with pytest.raises(RuntimeError, match=r"vLLM must be 0\.32 on CUDA, got 0\.31\.0"):
        engine_args("d")


def test_the_draft_may_be_a_folder(tested, tmp_path, monkeypatch):
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for path in ("draft", "./draft", tmp_path / "draft"):  # a server may start in another folder
        given = engine_args(path, tree=[-1, 0])["additional_config"]["sequoia"]["draft"]
        assert given == str(tmp_path / "draft")


@pytest.mark.parametrize("path", ["/no/such/folder", "./draft", "a/b/c", "~/no/draft"])
def test_a_path_of_no_folder_is_refused(tested, path):
    with pytest.raises(FileNotFoundError, match=r"vllm\.engine_args: draft must be an existing folder or a hub id"):
        engine_args(path)


def test_a_folder_without_a_model_is_refused(tested, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vllm\.engine_args: draft must be a folder with a config\.json"):
        engine_args(tmp_path)


def test_the_file_of_a_tree_must_exist(tested, tmp_path, capsys):
    message = "tree must be 'auto' or the path of a tree file, got 'plan.json': no such file"
    with pytest.raises(FileNotFoundError, match=message):
        engine_args("my/draft", tree="plan.json")
    with pytest.raises(SystemExit) as exited:
        main(["--draft", "my/draft", "--tree", "plan.json"])
    assert exited.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rule": "best"}, ValueError, "vllm.engine_args: rule must"),
        ({"tree": 7}, TypeError, "vllm.engine_args: tree must be 'auto'"),
        ({"tree": [-1]}, ValueError, "trees must have 2 to"),
        ({"max_nodes": 1}, ValueError, "max_nodes must"),
        ({"draft_cache_tokens": -1}, ValueError, "draft_cache_tokens must"),
        ({"profile_seconds": -1}, ValueError, "profile_seconds must"),
        ({"check_ranks": 1}, TypeError, "check_ranks must be a bool"),
    ],
)
def test_bad_arguments_are_refused(tested, settings, error, message):
    for function in (engine_args, server_flags):
        with pytest.raises(error, match=message):
            function("draft", **settings)


def test_beside_another_vllm_the_helper_says_so_and_the_plugin_does_nothing(monkeypatch):
    let_it_be(monkeypatch, InstalledVllm("9.9.9", "vLLM must be another one"))
    for function in (engine_args, server_flags):
        with pytest.raises(RuntimeError, match=r"sequoia_kernels\.vllm: vLLM must be another one"):
            function("draft")
    register()  # imports nothing


@pytest.mark.parametrize(
    ("cuda", "backend"), [(False, "attention.TreeAttentionBackend"), (True, "gpu_attention.DeviceTreeBackend")]
)
def test_the_plugin_registers_its_backend_as_custom(monkeypatch, cuda, backend):
    let_it_be(monkeypatch, InstalledVllm("0.32.0", None), cuda)
    registered = []
    registry = ModuleType("vllm.v1.attention.backends.registry")
    registry.AttentionBackendEnum = SimpleNamespace(CUSTOM="custom")
    registry.register_backend = lambda *entry: registered.append(entry)
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    register()
    register()
    assert registered == [("custom", f"sequoia_kernels.vllm.{backend}")] * 2


def test_vllm_finds_the_plugin():
    (entry,) = (
        entry
        for entry in importlib.metadata.distribution("sequoia-kernels").entry_points
        if entry.group == "vllm.general_plugins"
    )
    assert (entry.name, entry.load()) == ("sequoia", register)


def test_sources_without_the_compiled_module_say_what_to_do():
    code = "import sys; sys.modules['sequoia_kernels._host'] = None; from sequoia_kernels.vllm import engine_args"
    ended = run_process([sys.executable, "-c", code], check=False, env=python_environment())
    assert "ModuleNotFoundError: the C++ module sequoia_kernels._host is not built in " in ended.stderr.splitlines()[-1]
    assert "then leave that folder" in ended.stderr


def test_the_package_imports_no_vllm():
    code = (
        "import sys, sequoia_kernels.vllm, sequoia_kernels.vllm.drafting, sequoia_kernels.vllm.load_plan\n"
        "import sequoia_kernels.vllm.verification\nassert 'vllm' not in sys.modules, sys.modules['vllm']"
    )
    run_process([sys.executable, "-c", code], env=python_environment())
