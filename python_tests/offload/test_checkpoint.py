"""Files of weights: what the format forbids is refused, with an error that says which file, and nothing else is."""

from __future__ import annotations

import ast
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny_families import tiny_model

import sequoia_kernels
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import load_model
from sequoia_kernels.offload import load_offloaded, memory_plan
from sequoia_kernels.offload.checkpoint import Checkpoint
from sequoia_kernels.planner import ModelFingerprint

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"


def file_of(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def two(**changes: Any) -> str:
    """A header of a tensor of four bytes, which is right, and one of two bytes behind it, which is changed."""
    return json.dumps({"a": entry("F32", [1], [0, 4]), "b": entry(**{"offsets": [4, 6], **changes})})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (two(offsets=[-2, 0]), "no dtype, shape and data_offsets of b"),
        (two(offsets=[-16, -14]), "no dtype, shape and data_offsets of b"),
        (two(offsets=[0, 2]), "b begins at byte 0, not at 4|a begins at byte 0, not at 2"),
        (two(offsets=[3, 5]), "b begins at byte 3, not at 4"),
        (two(offsets=[5, 7]), "b begins at byte 5, not at 4"),
        (two(offsets=[6, 4]), "b has -2 bytes"),
        (two(offsets=[4.0, 6.0]), "no dtype, shape and data_offsets of b"),
        (two(offsets=["4", "6"]), "no dtype, shape and data_offsets of b"),
        (two(offsets=[False, 2]), "no dtype, shape and data_offsets of b"),
        (two(offsets=[4]), "no dtype, shape and data_offsets of b"),
        (two(offsets={"4": 0, "6": 0}), "no dtype, shape and data_offsets of b"),
        (two(offsets="46"), "no dtype, shape and data_offsets of b"),
        (two(shape=[2.0]), "no dtype, shape and data_offsets of b"),
        (two(shape=["2"]), "no dtype, shape and data_offsets of b"),
        (two(shape=[True, 2]), "no dtype, shape and data_offsets of b"),
        (two(shape=[-1, -2]), "no dtype, shape and data_offsets of b"),
        (two(shape="2"), "no dtype, shape and data_offsets of b"),
        (two(shape=None), "no dtype, shape and data_offsets of b"),
        (two(shape=[1 << 40, 1 << 40, 0]), "a shape of b that no file can hold"),
        (two(dtype=["U8"]), "no dtype, shape and data_offsets of b"),
        (two(dtype="x" * 1000), f"dtype {'x' * 200}... of b is not known"),
        ('{"a": 5}', "no dtype, shape and data_offsets of a"),
        ('{"__metadata__": {"format": 5}}', "metadata that is not text"),
        ('{"__metadata__": []}', "metadata that is not text"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
        ('{"a": {"x": NaN}}', "the number NaN"),
        ('{"a": {}, "a": {}}', "a key that is there twice"),
        ('{"\\ud800": {}}', "surrogates not allowed"),
        ('{"a": 1' + "0" * 10_000 + "}", "Exceeds the limit|no dtype"),
        ("[]", "a header that is no object"),
        (" {}", "a header that is no object"),
        ("{}".encode("utf-16"), "codec can't decode"),
    ],
)
def test_headers_that_the_format_forbids(tmp_path: Path, header: str | bytes, message: str) -> None:
    (tmp_path / NAME).write_bytes(file_of(header, b"\0\0\x80?\1\2"))
    with pytest.raises(ValueError, match=rf"load_offloaded: \S+{NAME} must be a safetensors file, got: .*({message})"):
        Checkpoint(tmp_path)


def test_bytes_that_belong_to_no_tensor(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(file_of(two(), b"\0\0\x80?\1\2more"))
    with pytest.raises(ValueError, match="must be a safetensors file, got 4 bytes behind its last tensor"):
        Checkpoint(tmp_path)


def test_what_the_format_allows(tmp_path: Path) -> None:
    """Tensors in any order, without elements or dimensions, unknown fields, blanks behind the header."""
    header = {
        "__metadata__": {"format": "pt"},
        "second": entry("U8", [2], [4, 6]),
        "first": entry("F32", [], [0, 4]) | {"more": [{"of": 1.5}]},
        "empty": entry("F32", [3, 0], [6, 6]),
        "between": entry("I64", [0], [4, 4]),
    }
    (tmp_path / NAME).write_bytes(file_of(json.dumps(header) + "   ", b"\0\0\x80?\1\2"))
    checkpoint = Checkpoint(tmp_path)
    for name, expected in (("first", torch.tensor(1.0)), ("second", torch.tensor([1, 2], dtype=torch.uint8))):
        found = torch.empty_like(expected)
        checkpoint.copy_into(name, found)
        assert torch.equal(found, expected)
    for name in checkpoint.tensors:
        checkpoint.read_ahead(name)
        checkpoint.forget(name)


def test_no_tensor_without_bytes_at_a_pages_start_is_advised_about(tmp_path: Path) -> None:
    header = json.dumps({"a": entry("U8", [4096 - 512], [0, 3584]), "b": entry("U8", [0], [3584, 3584])}).ljust(504)
    (tmp_path / NAME).write_bytes(file_of(header, bytes(3584)))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors["b"].start == 4096
    checkpoint.read_ahead("b")
    checkpoint.copy_into("b", torch.empty(0, dtype=torch.uint8))


# The index


@pytest.mark.parametrize("shard", ["../other.safetensors", "sub/../../other", "/etc/passwd", "..\\other", "C:\\other"])
def test_files_outside_of_the_folder_are_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=rf"{INDEX} must name files inside its folder, got"):
        Checkpoint(folder)


def test_files_in_a_folder_below_and_behind_links_are_read(tmp_path: Path) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    save_file({"a": torch.full((2,), 3.0)}, tmp_path / "blob")
    (tmp_path / "model" / "sub" / NAME).symlink_to(tmp_path / "blob")  # as in the hub's cache
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": f"sub/{NAME}"}}))
    found = torch.empty(2)
    Checkpoint(tmp_path / "model").copy_into("a", found)
    assert found.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "text",
    [
        "[]", "5", "{}", '{"weight_map": [["a", "b"]]}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["b"]}}', '{"weight_map": null}', '{"weight_map": {"a": "b", "a": "c"}}',
        '{"weight_map": {"a": "\\ud800"}}', "[" * 100_000, '{"weight_map": ' * 100_000, "\x00", "",
    ],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} must be a safetensors index, got"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["", ".", "sub", "none", "n" * 5000, "nul\0"])
def test_an_index_that_names_no_file(tmp_path: Path, shard: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FileNotFoundError, match="must hold all shards of its index"):
        Checkpoint(tmp_path)


# Random damage


def mutated(content: bytes, randomness: random.Random) -> bytes:
    """Change a file: its bytes, its length, or values of its header."""
    [length] = struct.unpack("<Q", content[:8])
    kind = randomness.randrange(7)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(randomness.choice([1, 1, 3])):
            changed[randomness.randrange(8 + length)] = randomness.randrange(256)
        return bytes(changed)
    if kind == 1:
        return content[: randomness.randrange(len(content))]
    if kind == 2:
        return struct.pack("<Q", randomness.choice([length + 1, length - 1, 0, 1 << 63, 2])) + content[8:]
    header = json.loads(content[8 : 8 + length])
    values = [-1, 1, 4, 6, 1.0, 2.5, True, None, "4", "F32", "U8", [], [[]], [0, 4], [2, 6], [2], {}, 1 << 64, 10**30]
    if kind == 6:  # nothing that matters
        names = randomness.sample(sorted(header), len(header))
        header[names[0]] |= {"more": str(randomness.choice(values))}
        text = json.dumps({name: header[name] for name in names}) + " " * randomness.randrange(9)
        return file_of(text, content[8 + length :])
    if kind == 3:
        header[randomness.choice(sorted(header))] = randomness.choice(values)
    else:
        fields = header[randomness.choice([name for name in sorted(header) if name != "__metadata__"])]
        field = randomness.choice(sorted(fields))
        if kind == 4 or isinstance(fields[field], str) or not fields[field]:
            fields[field] = randomness.choice(values)
        else:
            fields[field][randomness.randrange(len(fields[field]))] = randomness.choice(values)
    return file_of(json.dumps(header), content[8 + length :])


def test_what_loads_is_what_the_formats_own_reader_loads(tmp_path: Path) -> None:
    """Its own reader is the oracle: neither more nor less is accepted, and the tensors are the same."""
    tensors = {"a": torch.tensor([1.0]), "b": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), "c": torch.empty(0)}
    path = tmp_path / NAME
    save_file(tensors, path, {"format": "pt"})
    content, randomness = path.read_bytes(), random.Random(0)
    accepted = 0
    for _ in range(1500):
        path.write_bytes(mutated(content, randomness))
        try:
            with safe_open(path, "pt") as file:
                expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception:
            expected = None
        try:
            checkpoint = Checkpoint(tmp_path)
        except ValueError as error:
            strict = any(reason in str(error) for reason in ("is not known", "twice", "the number"))
            assert expected is None or strict, error
            continue
        assert expected is not None and checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            found = torch.empty_like(tensor)
            checkpoint.copy_into(name, found)
            assert found.numpy().tobytes() == tensor.numpy().tobytes()
        accepted += 1
    assert 100 < accepted < 1000


@pytest.mark.parametrize("damage", ["header", "index", "config"])
def test_random_damage_is_met_with_the_documented_errors(tmp_path: Path, damage: str) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path, max_shard_size="10KB")
    path = min(tmp_path.glob({"header": "*.safetensors", "index": INDEX, "config": "config.json"}[damage]))
    content, randomness = path.read_bytes(), random.Random(1)
    loaded = 0
    for _ in range(200):
        if damage == "header":
            changed = mutated(content, randomness)
        else:
            start = randomness.randrange(len(content))
            changed = content[:start] + randomness.choice([b"", b"0", b"-", b'"', b"[", b"}"]) + content[start + 1 :]
        path.write_bytes(changed)
        try:
            memory_plan(tmp_path)
            loaded += 1
        except (FileNotFoundError, ValueError, UnsupportedModelError) as error:
            assert "load_offloaded: " in str(error)
    assert 0 < loaded < 200


# Files that change while the model is open


@pytest.mark.parametrize("host_memory", ["packed", "mapped"])
def test_a_file_that_was_cut_off_behind_loading_is_an_error_and_no_crash(tmp_path: Path, host_memory: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokens = torch.tensor([[4, 5, 6]])
    with load_offloaded(tmp_path, host_memory=host_memory) as model, torch.no_grad():
        expected = model.model(tokens).logits
        for (
            transfer
        ) in model.streamer._transfers:  # those of the next pass; a page that is read is not looked for first
            model.streamer.link.wait(transfer)
        content = (tmp_path / NAME).read_bytes()
        with open(tmp_path / NAME, "r+b") as file:
            file.truncate(5000)
        if host_memory == "packed":
            assert torch.equal(model.model(tokens).logits, expected)
            return
        with pytest.raises(RuntimeError, match=r"could not be copied: .* must have \d+ bytes, got 5000"):
            [model.model(tokens) for _ in range(2)]  # the first layers may be on their way already
        with open(tmp_path / NAME, "r+b") as file:
            file.write(content)
        assert torch.equal(model.model(tokens).logits, expected)


# Code that comes with a model


def test_code_that_comes_with_a_model_is_not_run_and_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("somebody was asked"))
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": "code.Tokenizer"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    calls: list[Callable[[Path], Any]] = [load_offloaded, memory_plan, load_model]
    for call in calls:
        with pytest.raises(ValueError, match="must hold a model that transformers knows"):
            call(tmp_path)
    with pytest.raises(ValueError, match="must hold a transformers configuration"):
        ModelFingerprint.from_config(tmp_path)


def test_every_automatic_class_is_told_not_to_run_code() -> None:
    """All of them ask on a terminal where they are not told, and go on if somebody says yes."""
    calls = []
    for path in Path(sequoia_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value).split(".")[-1]
                if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                    told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    calls.append((path.name, node.lineno, told.get("trust_remote_code")))
    assert len(calls) >= 9
    assert [call for call in calls if call[2] != "False"] == []
