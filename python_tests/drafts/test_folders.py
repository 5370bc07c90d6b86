"""Folders of published drafts: weights by name from every kind of file, and what is wrong with one is named."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from sequoia_kernels.drafts import DraftFolder, draft_from_folder, folders
from sequoia_kernels.drafts.folders import DraftFormat, register_format

WEIGHTS = {"one.weight": torch.arange(6.0).reshape(2, 3), "two": torch.tensor([1, 2])}


def write(folder, kind: str):
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Some"], "size": 3}')
    if kind == "safetensors":
        save_file(WEIGHTS, folder / "model.safetensors")
    elif kind == "pickle":
        torch.save(WEIGHTS, folder / "pytorch_model.bin")
    else:
        suffix = "safetensors" if kind == "shards" else "bin"
        stem = "model" if kind == "shards" else "pytorch_model"
        names = {name: f"{stem}-{number}.{suffix}" for number, name in enumerate(WEIGHTS)}
        for name, file in names.items():
            (save_file if kind == "shards" else torch.save)({name: WEIGHTS[name]}, folder / file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "shards", "pickled_shards"])
def test_weights_are_read_by_name_from_every_kind_of_file(kind, tmp_path):
    folder = DraftFolder.open(write(tmp_path / kind, kind))
    assert folder.config["size"] == 3
    assert set(folder.keys) == set(WEIGHTS) and "two" in folder and "three" not in folder
    assert torch.equal(folder.take("one.weight", shape=(2, None)), WEIGHTS["one.weight"])
    assert folder.take("three", optional=True) is None
    with pytest.raises(ValueError, match=r"must hold no weights beside those of its format, got two$"):
        folder.check_all_taken()
    folder.check_all_taken(unused=("two",))
    assert torch.equal(folder.need("other", "two"), WEIGHTS["two"])
    folder.check_all_taken()


def test_what_is_wrong_with_a_weight_is_named(tmp_path):
    folder = DraftFolder.open(write(tmp_path / "draft", "safetensors"))
    for call, message in (
        (lambda: folder.need("three"), r"must hold three, got one.weight, two$"),
        (lambda: folder.need("three", "four"), r"must hold three \(or four\), got one.weight, two$"),
        (lambda: folder.need("two", "one.weight"), r"must hold two under one name, got two and one.weight$"),
        (lambda: folder.need("two", shape=(3,)), r"two must have shape \[3\], got \[2\]$"),
        (lambda: folder.need("one.weight", shape=(None,)), r"one.weight must have shape \[any\], got \[2, 3\]$"),
    ):
        with pytest.raises(ValueError, match=rf"^draft folder {folder.path}: {message}"):
            call()


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    bare = write(tmp_path / "bare", "safetensors")
    (bare / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a folder with model.safetensors or pytorch_model.bin, got .*bare"):
        DraftFolder.open(bare)
    with pytest.raises(FileNotFoundError, match="must be an existing folder or a hub id"):
        DraftFolder.open(tmp_path / "none")
    for name, text, message in (
        ("config.json", "{", r"config.json must be a readable JSON file, got: "),
        ("config.json", "[" * 100_000, r"config.json must be a readable JSON file, got: maximum recursion"),
        ("config.json", "[3]", r"config.json must hold a JSON object, got list"),
        ("model.safetensors", "short", r"model.safetensors must hold readable weights, got: "),
        ("model.safetensors.index.json", '{"weight_map": 3}', r"must map weights to files as weight_map, got 3"),
    ):
        folder = write(tmp_path / f"{name}-{len(text)}", "safetensors")
        if name.endswith("index.json"):
            (folder / "model.safetensors").unlink()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"^draft_from_folder: .*{message}"):
            DraftFolder.open(folder)


class Harmful:
    """What a pickle may do where nobody stops it."""

    def __reduce__(self):
        return (open, ("harmed", "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "draft", "pickle")
    torch.save({"one": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold readable weights"):
        DraftFolder.open(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"one": Harmful()}))
    with pytest.raises(ValueError, match="must hold readable weights"):
        DraftFolder.open(folder)
    assert not (tmp_path / "harmed").exists()


def test_a_format_is_found_by_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_formats", {})
    folder = write(tmp_path / "draft", "safetensors")
    assert draft_from_folder(folder, "target") is None
    register_format(DraftFormat("some", lambda config: config["architectures"] == ["Some"], lambda *given: given))
    found, target = draft_from_folder(folder, "target")
    assert found.path == folder and target == "target"


def test_an_id_is_looked_up_in_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "some/draft":
            return str(tmp_path / "draft")
        raise OSError("unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write(tmp_path / "draft", "safetensors")
    assert DraftFolder.open("some/draft").path == tmp_path / "draft"
    assert asked[0][0] == "some/draft" and "*.safetensors" in asked[0][1]
    with pytest.raises(FileNotFoundError, match=r"'other/draft' must be an existing folder or a hub id .*unreachable"):
        DraftFolder.open("other/draft")
