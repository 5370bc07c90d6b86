"""The cache folder: where it is, what a file must be to be believed, and that it never fails a caller."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from support.synthetic_profile import synthetic_profile

from sequoia_kernels import HardwareProfile, cli
from sequoia_kernels.planner import AcceptanceEvidence, store

KEY = {"target": "one", "draft": "two", "sampling": [[0.0, 0, 1.0]]}
EVIDENCE = AcceptanceEvidence().with_run([60, 20], [40, 5])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQUOIA_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SEQUOIA_CACHE_DIR": "/somewhere"}, "/somewhere"),
        ({"SEQUOIA_CACHE_DIR": "~/else"}, "/home/me/else"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/sequoia-kernels"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/sequoia-kernels"),  # the standard says to ignore it
        ({}, "/home/me/.cache/sequoia-kernels"),
        ({"SEQUOIA_CACHE_DIR": "/somewhere", "SEQUOIA_CACHE": "0"}, None),
        ({"SEQUOIA_CACHE": "off"}, None),
        ({"SEQUOIA_CACHE_DIR": "~nobody-has-this-name/kept"}, None),
        ({"SEQUOIA_CACHE": "1"}, "/home/me/.cache/sequoia-kernels"),
    ],
)
def test_the_folder(monkeypatch, variables, expected):
    for name in ("SEQUOIA_CACHE", "SEQUOIA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert store.cache_folder() == (None if expected is None else Path(expected))


def test_what_is_kept_comes_back_for_its_key_only(folder):
    profile = synthetic_profile()
    assert store.load_profile(KEY) is store.load_evidence(KEY) is None
    store.save_profile(KEY, profile)
    store.save_evidence(KEY, EVIDENCE)
    assert store.load_profile(KEY).forwards == profile.forwards
    assert store.load_evidence(KEY) == EVIDENCE
    for other in ({**KEY, "draft": "three"}, {**KEY, "sampling": [[1.0, 0, 1.0]]}):
        assert store.load_profile(other) is store.load_evidence(other) is None
    store.save_evidence(KEY, EVIDENCE.with_run([10], [5]))
    assert store.load_evidence(KEY).num_visits == 70
    names = sorted(path.name for path in folder.iterdir())
    assert [name.split("-")[0] for name in names] == ["acceptance", "profile"]
    assert HardwareProfile.load(folder / names[1]).settings["kept_for"] == KEY  # an ordinary profile, for plan as well


def test_nothing_is_written_where_it_is_off(folder, monkeypatch):
    monkeypatch.setenv("SEQUOIA_CACHE", "0")
    store.save_evidence(KEY, EVIDENCE)
    assert store.load_evidence(KEY) is None
    assert store.list_cache() == []
    assert store.clear_cache() == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[1]",
        '{"format": "sequoia-kernels/acceptance-evidence", "version": 99}',
        EVIDENCE.to_json({**KEY, "draft": "three"}),
        EVIDENCE.to_json(KEY).replace("60", '"many"'),
        EVIDENCE.to_json(KEY).replace('"visited": [', '"visited": [-1, '),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_passed_over_and_replaced(folder, caplog, text):
    store.save_evidence(KEY, EVIDENCE)
    (path,) = folder.iterdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "sequoia_kernels"):
        assert store.load_evidence(KEY) is None
    assert f"passed over: {path}" in caplog.text
    store.save_evidence(KEY, EVIDENCE)
    assert store.load_evidence(KEY) == EVIDENCE


def test_a_broken_profile_is_passed_over(folder, caplog):
    store.save_profile(KEY, synthetic_profile())
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:500])
    assert store.load_profile(KEY) is None
    assert "passed over" in caplog.text
    path.unlink()
    path.mkdir()
    assert store.load_profile(KEY) is None


def test_a_folder_that_cannot_be_written_is_a_line_in_the_log(folder, caplog):
    folder.write_text("a file stands in the way")
    store.save_evidence(KEY, EVIDENCE)
    assert "not kept" in caplog.text
    assert store.load_evidence(KEY) is None
    assert store.list_cache() == []


def test_a_folder_that_is_used_again_while_it_is_cleared(folder, monkeypatch):
    store.save_evidence(KEY, EVIDENCE)
    remove = Path.rmdir
    monkeypatch.setattr(Path, "rmdir", lambda path: (store.save_evidence(KEY, EVIDENCE), remove(path)))
    assert store.clear_cache() == 1
    assert store.load_evidence(KEY) == EVIDENCE


def test_old_files_go_when_there_are_too_many(folder, monkeypatch):
    monkeypatch.setattr(store, "MOST_FILES", 3)
    for index in range(5):
        store.save_evidence({**KEY, "draft": index}, EVIDENCE)
        newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (index, index))
    kept = [entry.key["draft"] for entry in store.list_cache()]
    assert len(kept) == 3
    assert 4 in kept and 0 not in kept


def test_the_command_lists_and_clears(folder, capsys):
    store.save_profile({**KEY, "context": 128}, synthetic_profile())
    store.save_evidence(KEY, EVIDENCE)
    (folder / "acceptance-broken.json").write_text("{")
    (folder / "mine.txt").write_text("not one of them")
    assert cli.main(["cache", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["folder"] == str(folder)
    assert sorted(file["kind"] for file in document["files"]) == ["acceptance", "acceptance", "profile"]
    assert [file["key"] for file in document["files"] if file["name"] == "acceptance-broken.json"] == [None]
    assert cli.main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "cannot be read" in shown
    assert cli.main(["cache", "--clear"]) == 0
    assert "deleted 3 files" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    store.save_evidence(KEY, EVIDENCE)
    assert store.clear_cache() == 1
    assert not folder.exists()


def test_names_are_listed_as_they_are(folder, capsys):
    store.save_evidence({**KEY, "target": "models/[old]/a[/b]", "draft": "of :bug:"}, EVIDENCE)
    assert cli.main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "models/[old]/a[/b]" in shown and "of :bug:" in shown
