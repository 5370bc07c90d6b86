"""What a tree engine is told: read from arguments, written for other processes, and every value that is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm.settings import MAX_TREE_NODES, TreeSettings, trees_from

TREES = ((-1, 0, 0, 1), (-1, 0))
GIVEN = TreeSettings(
    "some/draft",
    TREES,
    by_load=False,
    rule="traversal",
    draft_dtype="bfloat16",
    draft_cache_tokens=4096,
    profile_seconds=0.5,
    check_ranks=True,
)


@pytest.mark.parametrize("settings", [GIVEN, TreeSettings("draft", TREES)])
def test_settings_travel_as_json(settings):
    read = TreeSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert read == settings
    assert all(isinstance(parents, tuple) for parents in read.trees)


def test_defaults_are_not_written():
    assert set(TreeSettings("draft", TREES).to_dict()) == {"draft", "trees"}
    assert set(GIVEN.to_dict()) == set(GIVEN.__dataclass_fields__)


def test_the_largest_tree_counts():
    assert GIVEN.max_nodes == 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"draft": ""}, TypeError, "draft must be a string, got ''"),
        ({"draft": 3}, TypeError, "draft must be a string, got 3"),
        ({"rule": None}, TypeError, "rule must be a string, got None"),
        ({"rule": "best"}, ValueError, "rule must be .*best"),
        ({"by_load": 1}, TypeError, "by_load must be a bool, got 1"),
        ({"check_ranks": "yes"}, TypeError, "check_ranks must be a bool, got 'yes'"),
        ({"draft_dtype": "int8"}, ValueError, "draft_dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"draft_cache_tokens": 0}, ValueError, "draft_cache_tokens must be at least 1, got 0"),
        ({"draft_cache_tokens": 1.5}, TypeError, "draft_cache_tokens must be an integer, got float"),
        ({"draft_cache_tokens": True}, TypeError, "draft_cache_tokens must be an integer, got bool"),
        ({"profile_seconds": -1.0}, ValueError, "profile_seconds must .*-1"),
        ({"profile_seconds": float("nan")}, ValueError, "profile_seconds must .*nan"),
        ({"profile_seconds": float("inf")}, ValueError, "profile_seconds must be a finite number >= 0, got inf"),
        ({"profile_seconds": "3"}, TypeError, "profile_seconds must be a number, got str"),
        ({"trees": ()}, ValueError, "trees must hold at least one tree, got none"),
        ({"trees": ((-1,),)}, ValueError, f"trees must have 2 to {MAX_TREE_NODES} nodes each, got 1"),
        ({"trees": (TREES[0], tuple(range(-1, 300)))}, ValueError, "nodes each, got 301"),
        ({"trees": ((-1, 1),)}, ValueError, "parents"),
        ({"trees": ((0, 0),)}, ValueError, "parents"),
    ],
)
def test_values_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        replace(GIVEN, **change).check()
    with pytest.raises(error, match=message):  # as another process reads them
        TreeSettings.from_dict({**GIVEN.to_dict(), **change})


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        (
            None,
            TypeError,
            r"additional_config\['sequoia'\] must be the mapping that vllm.engine_args gives, got NoneType; keys",
        ),
        ([1], TypeError, "got list"),
        ({"draft": "d"}, ValueError, "trees must be given"),
        ({"trees": [[-1, 0]]}, ValueError, "draft must be given"),
        ({"draft": "d", "trees": [[-1, 0]], "tee": 1, "nodes": 2}, ValueError, "keys must be among .*, got nodes, tee"),
        ({"draft": "d", "trees": 5}, TypeError, "trees must be .*got 5"),
        ({"draft": "d", "trees": [5]}, TypeError, "trees must be .*got .*5"),
    ],
)
def test_documents_that_are_refused(document, error, message):
    with pytest.raises(error, match=message):
        TreeSettings.from_dict(document)


# ---- the argument `tree` ----


def test_auto_is_the_same_ladder_in_every_process_and_within_its_limit():
    for limit in (2, 3, 7, 16, 64):
        trees, by_load = trees_from("auto", limit)
        assert by_load and trees == trees_from("auto", limit)[0]
        assert len({*trees}) == len(trees)
        assert max(map(len, trees)) == limit and min(map(len, trees)) == 2
        for parents in trees:
            TokenTree(parents)
        assert len(trees[0]) == min(6, limit)  # of requests with seeds


@pytest.mark.parametrize("limit", [1, 0, -3, 257])
def test_limits_that_are_refused(limit):
    with pytest.raises(ValueError, match=rf"vllm\.engine_args: max_nodes must .*got {limit}"):
        trees_from("auto", limit)


def test_one_tree_in_every_form(tmp_path):
    tree = TokenTree([-1, 0, 0, 1])
    tree.save(tmp_path / "tree.json")
    forms = [tree, [-1, 0, 0, 1], (-1, 0, 0, 1), tmp_path / "tree.json", str(tmp_path / "tree.json")]
    for form in forms:
        assert trees_from(form, 16) == (((-1, 0, 0, 1),), False)


def test_several_trees_are_chosen_among_by_load(tmp_path):
    TokenTree.chain(3).save(tmp_path / "chain.json")
    several = [TokenTree([-1, 0]), [-1, 0, 0], tmp_path / "chain.json", [-1, 0]]
    assert trees_from(several, 16) == (((-1, 0), (-1, 0, 0), (-1, 0, 1)), True)


@pytest.mark.parametrize("tree", [None, 3, [], (), {"parents": [-1, 0]}, [None], [[-1, 0], 2.5]])
def test_what_is_no_tree_is_refused(tree):
    with pytest.raises(TypeError, match=r"vllm\.engine_args: tree must be 'auto', a TokenTree, its parents"):
        trees_from(tree, 16)


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(OSError):
        trees_from("no-such-file.json", 16)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError):
        trees_from(tmp_path / "other.json", 16)
