"""Models that are split over ranks decode as one, whatever differs between the ranks; and end as one.

The ranks are processes with gloo, each with one thread; `support/rank_program.py` is what they run. transformers splits
and spreads models with accelerate's help only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.examples import EXAMPLES, example
from support.processes import python_environment, run_process
from support.ranks import Rank, run_ranks, write_models
from support.tiny_families import tiny_model

import sequoia_kernels.parallel as parallel
from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.models import LayerSpec

FAMILIES = ("llama", "tied", "qwen2", "qwen3", "mistral", "gemma2")
EXPERTS = ("mixtral", "qwen3_moe")
CHECKED = "must decide as rank 0 does, got nodes [0] and token 13 for request 0 in step 1, where rank 0 has nodes "
# What the ends of a rank cost the others at most, with gloo; a machine may be busy.
SECONDS_TO_NOTICE = 60.0
STOPPED_TIMEOUT = 5.0  # of the process group where a rank is stopped, see `rank_program.py`


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("accelerate", reason="transformers splits models with accelerate only")
    return tmp_path


def alike(ranks: list[Rank], name: str) -> Any:
    """What all ranks have found."""
    first, *others = (rank.found[name] for rank in ranks)
    assert all(other == first for other in others), f"ranks differ in {name}"
    return first


def assert_greedy(found: dict[str, Any], num_ranks: int) -> None:
    """A split model's text is the whole one's, for one prompt and for a padded batch."""
    assert (found["heads"], found["runs"]) == (4 // num_ranks, "modules")
    for batch, count in (("one", 1), ("three", 3)):
        texts = found[batch]
        assert len(texts["expected"]) == count and all(len(set(text)) > 3 for text in texts["expected"])
        for name in ("none", "chain", "tree"):
            assert texts[name] == texts["expected"], (batch, name)
        assert min(texts["chain, tokens a step"], texts["tree, tokens a step"]) > 1.2


def assert_sampled(found: dict[str, Any]) -> None:
    """With equal seeds it draws what the whole one draws."""
    assert set(found) == {"one for all", "each its own", "shaped"}
    for name, (expected, ours) in found.items():
        assert ours == expected, name
        assert len({tuple(text) for text in ours}) == 3


@pytest.mark.slow
def test_two_ranks_say_what_the_whole_model_says(folder: Path) -> None:
    write_models(folder, [*FAMILIES, *EXPERTS])
    ranks = run_ranks(folder, "texts", 2)
    for found in alike(ranks, "experts").values():
        assert_greedy(found, 2)
    for family in FAMILIES:
        assert_greedy(alike(ranks, f"greedy {family}"), 2)
    assert_sampled(alike(ranks, "sampled"))
    found = alike(ranks, "drafts")
    same = (
        "split",
        "split source",
        "itself",
        "of a whole target",
        "lookup",
        "split, with lookup",
        "rank 0's alone",
        "eagle",
    )
    assert [name for name in same if found[name] != found["expected"]] == []
    is_same, num_restarts = found["restarts"]
    assert is_same and num_restarts > 2  # of a split draft of 32 positions, whose caches are begun anew
    assert found["sampled"][0] and found["changed"]


@pytest.mark.slow
def test_four_ranks_say_what_the_whole_model_says(folder: Path) -> None:
    write_models(folder, FAMILIES)
    ranks = run_ranks(folder, "four", 4)
    for family in FAMILIES:
        assert_greedy(alike(ranks, f"greedy {family}"), 4)
    assert_sampled(alike(ranks, "sampled"))
    found = alike(ranks, "split_draft")
    assert found["split"] == found["expected"]
    assert_differences(ranks)


@pytest.mark.slow
def test_rank_0_decides(folder: Path) -> None:
    write_models(folder, ["llama", "tied"])
    ranks = run_ranks(folder, "calls", 2)
    assert_outputs(alike(ranks, "outputs"))
    assert_decisions(ranks)
    alike(ranks, "measurements")
    assert_broadcasts(ranks)
    assert_differences(ranks)
    for rank in ranks:
        found = rank.found["other_drafts"]
        assert found["whole"] == found["split"] == found["plain"]
    assert [rank.found["other_drafts"]["changed"] > 10 for rank in ranks] == [False, True]
    assert_errors(ranks)


def assert_outputs(found: dict[str, Any]) -> None:
    """Whatever a call is asked for comes on all ranks, as of the whole model."""
    ours, theirs = found["texts"]
    assert ours == theirs and [len(text) for text in ours] == [16] * 3
    assert found["reasons"] == ["length"] * 3 and found["tree"] and found["steps"] < 16
    assert [len(row) for row in found["logprobs"]] == [16] * 3
    assert found["difference"] < 1e-3  # of logits of order 4
    ours, theirs = found["transformers"]
    assert ours == theirs
    assert len(found["unset seed"][0]) == 24


def assert_decisions(ranks: list[Rank]) -> None:
    """Ends, streams, seeds and plans are those of rank 0."""
    first, second = (rank.found["decisions"] for rank in ranks)
    plain = first["plain"]
    prompt = [5, 9, 11, 3, 60, 22, 8, 41]
    assert first["streamed"] == [[prompt + plain, 1]] * 2
    assert second["streamed"] == [[[], 1]] * 2  # only told that it is over
    end = plain.index(plain[6]) + 1
    assert first["eos"] == [plain[:end]]
    assert first["stop string"] == [plain[:6]]
    assert first["criterion"] == [plain[:5]]
    assert first["deadline"] == [[plain[:1]], ["max_time"]]
    assert first["auto"][0] == first["adaptive"][0] == first["eagle, auto"][0] == [plain]
    assert {name: entry for name, entry in first.items() if name != "streamed"} == {
        name: entry for name, entry in second.items() if name != "streamed"
    }


def assert_broadcasts(ranks: list[Rank]) -> None:
    """One a step, with a whole draft; beside that one for the prompt and two that end the call."""
    for rank in ranks:
        num_steps, small = rank.found["broadcasts"]["small"]
        assert small == num_steps + 3
        # The first steps of a tree whose masks do not fit the usual length have two.
        num_steps, large = rank.found["broadcasts"]["large"]
        assert num_steps + 3 < large <= num_steps + 5


def assert_differences(ranks: list[Rank]) -> None:
    """A rank whose logits are others changes nothing, and is found where that is asked for."""
    last = len(ranks) - 1
    for number, rank in enumerate(ranks):
        found = rank.found["differences"]
        for name in ("another token", "another bit, checked", "another bit of a weight"):
            assert found[name] == found["plain"], name
        message = found["another token, checked"]
        assert message.startswith("RankError: generate: ") and f"rank {last} {CHECKED}" in message
        warning = f"logits of rank {last} are not the bits of rank 0's in step 1; the path is the same"
        assert found["warnings"] == ([] if number else [warning])


def assert_errors(ranks: list[Rank]) -> None:
    """What is refused is refused on all ranks, what fails on rank 0 is said by the others; all can go on."""
    parts = "of which each has a part, got"
    for number, rank in enumerate(ranks):
        found = rank.found["errors"]
        others = "RankError: generate: rank 0 has ended the call for all ranks with " if number else ""
        assert found["again"] == found["hook of one rank"] == found["plain"]
        assert found["prompts"] == (
            "ValueError: generate: input_ids must be the same on all ranks of a split model, got others on rank 1 than "
            "on rank 0"
        )
        assert found["hook"] == f"{others}KeyError: 'no such rule'"
        assert found["variable"] == f"{others}ValueError: SEQUOIA_CHECK_RANKS must be 0 or 1, got 'yes'"
        assert "must hold embed_tokens.weight for a target that is split over ranks" in found["shared"]
        assert f"{parts} 'layers:1'" in found["layers"] and f"{parts} LayersDraft(" in found["own layers"]
        assert "adapt: compile must be False for a model that is split over ranks" in found["compile"]
        refused = "RankError: generate: rank 0 has refused the call with " if number else ""
        assert found["temperature"].startswith(f"{refused}ValueError: generate: temperature must be 0 or")
        assert found["draft"].startswith(f"{refused}FileNotFoundError: ") and "no such folder" in found["draft"]
        assert found["transformers"].startswith(f"{refused}ValueError: ") and "rule must be" in found["transformers"]
        assert found["profile"].startswith(refused.replace("generate", "measure_profile") + "ValueError: ")
        is_last = number == len(ranks) - 1
        refused = "" if is_last else f"RankError: generate: rank {len(ranks) - 1} has refused the call with "
        assert found["of the last"].startswith(f"{refused}ValueError: generate: max_new_tokens must be")
        evaluation = "ValueError: adapt: " if is_last else "RankError: adapt: models must be in evaluation mode on all"
        assert found["training"].startswith(evaluation)
        assert found["unprintable"] == (f"{others}UnprintableError" if number else "KeyError: 'unprintable'")
        assert found["records without a draft"] == "nothing"
        assert found["split draft of one rank"].startswith(
            "ValueError: adapt: models that are split over ranks must be"
        )
        assert found["another model"].startswith(
            "ValueError: generate: models must be the same on all ranks of a split"
        )
        assert ": the call must be the same on all ranks of a split model" in found["another call"]
        assert found["native"].endswith("its weights are split over 2 ranks")


@pytest.mark.parametrize(
    ("suite", "num_ranks"),
    [
        ("kill 1", 2),
        pytest.param("kill 0", 2, marks=pytest.mark.slow),
        pytest.param("kill 3", 4, marks=pytest.mark.slow),
        pytest.param("stop 1", 2, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_ends_the_others(folder: Path, suite: str, num_ranks: int) -> None:
    """At once where it was killed, and behind the process group's timeout where it does not answer."""
    write_models(folder, ["llama"])
    how, who = suite.split()
    ranks = run_ranks(folder, suite, num_ranks, gone=[int(who)])
    for number, rank in enumerate(ranks):
        if number == int(who):
            assert rank.status == -9 and not rank.found
            continue
        message, seconds, again = rank.found[suite]
        assert again.startswith(f"RankError: adapt: rank {number} of {num_ranks} is out of step with the others")
        assert message.startswith(f"RankError: generate: rank {number} of {num_ranks} lost another one after ")
        assert seconds < SECONDS_TO_NOTICE
        assert how == "kill" or seconds > STOPPED_TIMEOUT - 1.0


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_an_error_within_a_forward_ends_the_group(folder: Path, who: int) -> None:
    """Whoever catches it and calls again is told, where the other rank's sums would meet the new call's."""
    write_models(folder, ["llama"])
    suite = f"fail {who}"
    ranks = run_ranks(folder, suite, 2)
    failed, other = ranks[who].found[suite], ranks[1 - who].found[suite]
    assert failed[0] == "OutOfMemoryError: no room for the activations"
    assert failed[2].startswith(f"RankError: adapt: rank {who} of 2 is out of step with the others, ")
    assert failed[2].endswith("an earlier call ended in the middle of a forward with " + failed[0])
    assert other[0].startswith(f"RankError: generate: rank {1 - who} of 2 lost another one after ")
    assert other[2].startswith(f"RankError: adapt: rank {1 - who} of 2 is out of step with the others")


@pytest.mark.slow
def test_torchrun(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The example says the same on two ranks as on one."""
    program = EXAMPLES / "tensor_parallel.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = python_environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    together = run_process(command, env=environment, cwd=folder).stdout
    monkeypatch.setattr(sys, "argv", [str(program)])
    example("tensor_parallel").main()
    alone = capsys.readouterr().out
    assert alone.count("\n") == 2 and together == alone


# ---- without ranks ----


def test_whole_models_are_left_alone() -> None:
    model = adapt(tiny_model("llama"))
    assert model.ranks is None and parallel.leading() is None
    assert parallel.together([model], lambda: 5, where="test") == 5


def test_work_of_whole_models_runs_once_and_raises_as_it_is() -> None:
    def work() -> None:
        raise KeyError("reason")

    with pytest.raises(KeyError, match="reason"):
        parallel.together([adapt(tiny_model("llama"))], work, where="test")


def test_equal_tensors_have_equal_digests() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert parallel.digest(ids) == parallel.digest(ids.clone())
    others = [ids + 1, ids.to(torch.int32), ids.flatten(), torch.cat((ids, ids))]
    assert len({parallel.digest(entry) for entry in [ids, *others]}) == 5


# ---- models that accelerate spreads ----


@pytest.mark.parametrize("away", ["model.layers.1", "model.embed_tokens"])
def test_models_whose_weights_hooks_bring_decode(folder: Path, away: str) -> None:
    """With accelerate's hooks on every part, and a part of the weights on the disk."""
    from transformers import AutoModelForCausalLM

    write_models(folder, ["llama"])
    whole, draft = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("llama", "llama-draft"))
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {part: "disk" if part == away else "cpu" for part in parts}
    spread = AutoModelForCausalLM.from_pretrained(
        folder / "llama", device_map=device_map, offload_folder=folder / "disk"
    ).eval()
    assert any(weight.is_meta for weight in spread.parameters())
    prompt = torch.tensor([[5, 9, 11, 3, 60, 22, 8, 41]])
    settings: dict[str, Any] = {"tree": TokenTree([-1, 0, 0, 1]), "max_new_tokens": 12, "eos_token_id": ()}
    texts = [generate(model, draft, prompt, **settings).new_tokens for model in (whole, spread)]
    assert texts[0] == texts[1]
    assert adapt(spread).runs == "modules"


def test_a_hook_that_copies_lists_is_no_obstacle() -> None:
    """accelerate's hooks hand a model copies of the containers that it is called with."""
    model = tiny_model("llama")

    def copied(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {
            name: type(value)(value) if type(value) in (list, tuple) else value for name, value in kwargs.items()
        }

    model.register_forward_pre_hook(copied, with_kwargs=True)
    specs = adapt(model).new_cache(1, 2).specs
    assert len(specs) == 2 and all(isinstance(spec, LayerSpec) for spec in specs)
