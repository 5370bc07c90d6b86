"""The command line takes an offloaded target like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sequoia_kernels.demo
from sequoia_kernels import TokenTree, cli

PAIR = Path(sequoia_kernels.demo.__file__).parent / "pair"


def test_generation_with_an_offloaded_target(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    TokenTree([-1, 0, 0, 1]).save(tmp_path / "tree.json")
    command = ["generate", "--target", str(PAIR / "target"), "--draft", str(PAIR / "draft"), "--device", "cpu"]
    command += ["--prompt", "def main(", "--new-tokens", "12", "--tree", str(tmp_path / "tree.json"), "--json"]
    texts = []
    for more in ([], ["--offload", "--device-memory", "200MiB"], ["--offload", "--host-memory", "mapped"]):
        assert cli.main([*command, "--quiet", *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offload"], "--offload needs --target"),
        (["--device-memory", "1GiB"], "--device-memory needs --offload"),
        (["--target", str(PAIR / "target"), "--offload", "--device-memory", "1MiB"], "device_memory_budget must be at"),
    ],
)
def test_arguments_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["generate", *arguments, "--device", "cpu", "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err
