"""bench_offload.py end to end over a simulated link, and what its documents say about the targets."""

from __future__ import annotations

import json
import math

import pytest
from support.bench_scripts import bench_script, targets

offload = bench_script("offload")


@pytest.fixture
def quick(monkeypatch):
    """Next to no tokens, and a link on which a pass takes 12 ms."""
    smaller = {"plain_steps": 2, "tree_tokens": 8, "check_tokens": 24, "rounds": 1, "profile_seconds": 0.2}
    smaller |= {"node_counts": (1, 8), "calibration_rows": 128, "link_bytes_per_s": 6e8}
    smaller["part_seconds"] = (7.0, 7.0, 7.0)
    monkeypatch.setattr(offload, "QUICK_CPU", smaller | {"goal": offload.Goal(2.5, 8, 4)})


def test_all_parts_run_to_the_end_on_a_cpu(quick, tmp_path, capsys):
    assert offload.main(["--device", "cpu", "--quick", "--json", str(tmp_path / "offload.json")]) == 0
    document = json.loads((tmp_path / "offload.json").read_text())
    assert "simulated link; says nothing about a GPU" in document["label"]
    assert document["link"]["simulated"] and document["link"]["host_to_device"] == pytest.approx(0.6)
    assert list(document["parts"]) == list(offload.PARTS)
    assert list(document["skipped"]) == ["rows of a GPU"]
    stream, speedup, twin = document["parts"].values()
    assert stream["streamed_layers"] == 12 and stream["host_bytes"] * 6 == stream["streamed_bytes"]
    assert 0 < stream["share_of_bandwidth"] <= 1.2
    assert [entry["nodes"] for entry in stream["forwards"]] == [1, 8]
    assert [entry["name"] for entry in speedup["trees"]] == ["the paper's size", "planned"]
    assert speedup["trees"][0]["nodes"] == 8
    for entry in speedup["trees"]:
        assert entry["equals_the_resident_twin"] and entry["begins_as_the_plain_output"]
        assert math.isfinite(entry["speedup"]) and entry["tokens_per_step"] >= 1
    assert twin["host_bytes"] == twin["streamed_bytes"]
    assert [(run["name"], run["equal"]) for run in twin["runs"]] == [("tree", True), ("plain", True)]
    assert "text equal to the resident twin's" in capsys.readouterr().out
    # a CPU's rows are never taken for a GPU's
    findings = targets.evaluate(targets.load_documents(tmp_path))
    assert all(entry.met is None for entry in findings if "offloaded" in entry.what)


def test_parts_that_the_time_does_not_allow_are_named(quick, tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--seconds", "0", "--json", str(tmp_path / "offload.json")]
    assert offload.main(arguments) == 0
    document = json.loads((tmp_path / "offload.json").read_text())
    assert document["parts"] == {}
    skipped = {name: reason for name, reason in document["skipped"].items() if name in offload.PARTS}
    assert skipped == dict.fromkeys(offload.PARTS, "takes about 7 s, 0 are left")
    assert "skipped: twin: takes about 7 s, 0 are left" in capsys.readouterr().out


def document(**changes):
    """What a run on a GPU would leave, good enough everywhere."""
    stream = {
        "share_of_bandwidth": 0.95,
        "stream_ms": 2200.0,
        "peak_bytes": 19 << 30,
        "budget_bytes": 20 << 30,
        "forwards": [
            {"nodes": 768, "pass_ms": 2250.0, "compute_ms": 200.0},
            {"nodes": 1024, "pass_ms": 9000.0, "compute_ms": 8000.0},  # longer than the copies: need not be hidden
        ],
    }
    speedup = {
        "trees": [
            {"name": "the paper's size", "nodes": 768, "tokens_per_step": 10.3, "speedup": 9.9},
            {"name": "planned", "nodes": 1024, "tokens_per_step": 10.7, "speedup": 10.4},
        ]
    }
    twin = {"runs": [{"tokens": 80, "equal": True}, {"tokens": 8, "equal": True}]}
    for part in (stream, speedup, twin):
        part.update({name: value for name, value in changes.items() if name in part})
    link = {"host_to_device": 55.0}
    parts = {"stream": stream, "speedup": speedup, "twin": twin}
    return {"offload": {"bench": "offload", "device_type": "cuda", "link": link, "parts": parts}}


def verdicts(documents):
    return [entry.met for entry in targets.evaluate(documents) if "offloaded" in entry.what or "own pick" in entry.what]


def test_targets():
    assert verdicts(document()) == [True] * 6
    assert verdicts(document(share_of_bandwidth=0.89)) == [False] + [True] * 5
    assert verdicts(document(stream_ms=2100.0))[1] is False
    assert verdicts(document(peak_bytes=21 << 30))[2] is False
    slower = [
        {"name": name, "nodes": 1, "tokens_per_step": 9, "speedup": 9} for name in ("the paper's size", "planned")
    ]
    assert verdicts(document(trees=slower))[3:5] == [False, False]
    assert verdicts(document(runs=[{"tokens": 80, "equal": False}]))[5] is False
    partial = document()
    del partial["offload"]["parts"]["speedup"], partial["offload"]["parts"]["twin"]
    assert verdicts(partial) == [True] * 3 + [None] * 3
