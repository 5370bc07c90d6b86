"""`python -m sequoia_kernels.vllm`: the flags of a server are the engine's arguments, whole through a shell."""

from __future__ import annotations

import inspect
import json
import shlex

import pytest

from sequoia_kernels import TokenTree, vllm
from sequoia_kernels.vllm.__main__ import flag_parser, main


@pytest.fixture
def supported(monkeypatch):
    """The flags are words; no vLLM is needed to write them."""
    monkeypatch.setattr(vllm, "check_version", lambda: None)
    monkeypatch.setattr(vllm, "runs_on_cuda", lambda: False)


def flags_of(capsys, *arguments):
    """Options that were printed, by name."""
    assert main(arguments) == 0
    words = shlex.split(capsys.readouterr().out)
    assert len(words) % 2 == 0
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_flags_say_what_the_arguments_say(supported, tmp_path, capsys):
    TokenTree([-1, 0, 0, 1]).save(tmp_path / "one.json")
    TokenTree.chain(3).save(tmp_path / "two.json")
    one, two = str(tmp_path / "one.json"), str(tmp_path / "two.json")
    for options, settings in (
        ((), {}),
        (("--max-nodes", "5", "--rule", "traversal"), {"max_nodes": 5, "rule": "traversal"}),
        (("--tree", one, "--check-ranks"), {"tree": one, "check_ranks": True}),
        (("--tree", one, two, "--profile-seconds", "0"), {"tree": [one, two], "profile_seconds": 0.0}),
        (("--draft-dtype", "bfloat16", "--draft-cache-tokens", "64"),
         {"draft_dtype": "bfloat16", "draft_cache_tokens": 64}),
    ):  # fmt: skip
        expected = vllm.engine_args("it's a draft", **settings)
        found = flags_of(capsys, "--draft", "it's a draft", *options)
        assert found == {
            "--worker-cls": expected["worker_cls"],
            "--speculative-config": json.dumps(expected["speculative_config"]),
            "--additional-config": json.dumps(expected["additional_config"]),
        }


def test_a_word_a_line_for_arrays_of_a_shell(supported, capsys):
    assert main(["--draft", "it's a draft", "--max-nodes", "2", "--lines"]) == 0
    assert capsys.readouterr().out.splitlines() == vllm.server_flags("it's a draft", max_nodes=2)


def test_every_argument_has_an_option_with_its_default():
    options = {action.dest: action for action in flag_parser()._actions if action.dest not in ("help", "lines")}
    arguments = inspect.signature(vllm.engine_args).parameters
    assert options.keys() == arguments.keys()
    for name, argument in arguments.items():
        assert options[name].help
        if argument.default is not inspect.Parameter.empty:
            assert options[name].default == argument.default


def test_bad_arguments_end_with_status_2(supported, tmp_path, capsys):
    for arguments, message in (
        ((), "--draft"),
        (("--draft", "d", "--max-nodes", "1"), "max_nodes must be in 2..256, got 1"),
        (("--draft", "d", "--tree", str(tmp_path / "none.json")), "none.json"),
        (("--draft", "d", "--profile-seconds", "-1"), "profile_seconds must"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_without_a_vllm_there_are_no_flags(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert main(["--draft", "d"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "vLLM is not installed" in err
