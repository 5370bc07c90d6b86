"""Tree files: what is written, what is refused, and that nothing is left half-written."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from support.trees import parents_lists

from sequoia_kernels.errors import TreeFormatError
from sequoia_kernels.tree import TokenTree

GOOD = '{"format": "sequoia-kernels/tree", "version": 1, "parents": [-1, 0, 0, 1]}'


def test_format_is_stable():
    assert TokenTree([-1, 0, 0, 1]).to_json() == GOOD + "\n"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(parents_lists())
def test_round_trip(parents):
    tree = TokenTree(parents)
    assert TokenTree.from_json(tree.to_json()) == tree


def test_files(tmp_path):
    tree = TokenTree.kary(3, 4)
    path = tmp_path / "tree.json"
    tree.save(path)
    assert TokenTree.load(str(path)) == tree
    TokenTree.single().save(str(path))
    assert TokenTree.load(path) == TokenTree.single()
    assert os.listdir(tmp_path) == ["tree.json"]


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tree.json"
    TokenTree.single().save(path)

    def interrupt(source, destination):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        TokenTree.chain(5).save(path)
    assert os.listdir(tmp_path) == ["tree.json"]
    assert TokenTree.load(path) == TokenTree.single()


def test_save_into_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        TokenTree.single().save(tmp_path / "missing" / "tree.json")


def test_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        TokenTree.load(tmp_path / "nowhere.json")
    with pytest.raises(OSError, match="Is a directory"):
        TokenTree.load(tmp_path)


def with_fields(**changes):
    document = json.loads(GOOD)
    for name, value in changes.items():
        document.pop(name) if value is None else document.update({name: value})
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the document must be JSON, got text that is not: Expecting value"),
        (GOOD[:-1], "the document must be JSON, got text that is not"),
        (GOOD + "x", "the document must be JSON, got text that is not: Extra data"),
        ("[" * 100_000, "the document must be JSON, got brackets nested too deeply"),
        ("9" * 5000, "the document must be JSON, got text that is not|must be a JSON object"),
        ("[-1, 0]", "must be a JSON object, got a list"),
        ("null", "must be a JSON object, got null"),
        (with_fields(format=None), 'must have "format": "sequoia-kernels/tree", got nothing'),
        (with_fields(format="sequoia-kernels/profile"), 'got "sequoia-kernels/profile"'),
        (with_fields(version=None), 'must have "version": 1, got nothing; make the file again'),
        (with_fields(version=0), 'must have "version": 1, got 0; make the file again'),
        (with_fields(version="1"), 'must have "version": 1, got "1"; make the file again'),
        (with_fields(version=True), 'must have "version": 1, got true; make the file again'),
        (with_fields(version=2), 'must have "version": 1, got 2; upgrade sequoia-kernels to read it'),
        (with_fields(parents=None), "parents must be a list of node numbers, got nothing"),
        (with_fields(parents={"0": -1}), "parents must be a list of node numbers, got an object"),
        (with_fields(parents="-1"), 'parents must be a list of node numbers, got "-1"'),
        (with_fields(parents=[-1, 0.0]), r"parents must be a list of node numbers, got 0.0 at parents\[1\]"),
        (with_fields(parents=[-1, "0"]), r'parents must be a list of node numbers, got "0" at parents\[1\]'),
        (with_fields(parents=[-1, False]), r"parents must be a list of node numbers, got false at parents\[1\]"),
        (with_fields(parents=[-1, [0]]), r"parents must be a list of node numbers, got a list of 1 at parents\[1\]"),
        (GOOD.replace("[-1, 0, 0, 1]", "[-1, NaN]"), "NaN is not a JSON number"),
        (GOOD.replace('"version": 1', '"version": 1, "version": 1'), 'the field "version" appears twice'),
        (with_fields(masks=[1]), "masks must not be there beside format, version, parents, got an unknown field"),
        (
            with_fields(parents=[]),
            "be a tree, got a list that is none: TokenTree: parents must have at least the root's",
        ),
        (
            with_fields(parents=[-1, 0, 1, 0]),
            "be a tree, got a list that is none: TokenTree: parents must keep siblings",
        ),
    ],
)
def test_malformed_documents_are_refused(tmp_path, text, message):
    with pytest.raises(TreeFormatError, match=message) as caught:
        TokenTree.from_json(text)
    assert str(caught.value).startswith("TokenTree.from_json: ")
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TreeFormatError, match=message) as caught:
        TokenTree.load(path)
    assert str(caught.value).startswith(f"TokenTree.load: {path}: ")


def test_binary_files_are_refused(tmp_path):
    path = tmp_path / "growmap.pt"
    path.write_bytes(b"PK\x03\x04\x80\xff")
    with pytest.raises(
        TreeFormatError, match=r"growmap.pt: the document must be JSON text, got bytes that .*; .*growmap"
    ):
        TokenTree.load(path)


def test_from_json_wants_text():
    with pytest.raises(TypeError, match=r"TokenTree.from_json: text must be a str, got dict"):
        TokenTree.from_json({"parents": [-1]})
