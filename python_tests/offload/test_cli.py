"""The command line takes an offloaded target like any other."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sequoia_kernels
import sequoia_kernels.demo
from sequoia_kernels import TokenTree, cli
from sequoia_kernels.decoding import measure_overhead

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


def test_every_step_to_a_plan_takes_an_offloaded_target(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """profile, acceptance, plan and generate, as the documentation shows for a model that does not fit the card."""
    targets = []
    measure = sequoia_kernels.measure_profile

    def short(target: Any, draft: Any, **options: Any) -> Any:
        targets.append(target)
        return measure(target, draft, **(options | {"node_counts": [1, 8, 24], "seconds": 0.0, "min_repeats": 1}))

    monkeypatch.setattr(sequoia_kernels, "measure_profile", short)
    brief = partial(measure_overhead, num_tokens=4, num_runs=1)
    monkeypatch.setattr("sequoia_kernels.decoding.measure_overhead", brief)
    models = ["--target", str(PAIR / "target"), "--draft", str(PAIR / "draft"), "--device", "cpu", "--quiet"]
    models += ["--dtype", "float32", "--offload", "--device-memory", "66MiB"]
    (tmp_path / "prompts.txt").write_text("def main(argument):\n    return argument + 1\n", encoding="utf-8")
    files = {name: str(tmp_path / f"{name}.json") for name in ("profile", "acceptance", "plan")}
    prompts = ["--prompts-file", str(tmp_path / "prompts.txt"), "--new-tokens", "8"]
    assert cli.main(["profile", *models, "--quick", "--contexts", "16", "--out", files["profile"]]) == 0
    assert cli.main(["acceptance", *models, *prompts, "--out", files["acceptance"]]) == 0
    plan = ["plan", "--profile", files["profile"], "--acceptance", files["acceptance"], "--out", files["plan"]]
    assert cli.main([*plan, "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", *models, "--tree", files["plan"], "--prompt", "def f(", "--new-tokens", "4"]) == 0
    assert "def f(" in capsys.readouterr().out
    assert [type(target).__name__ for target in targets] == ["OffloadedModel"]
    assert 0 < len(targets[0].memory.streamed) < 24


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
