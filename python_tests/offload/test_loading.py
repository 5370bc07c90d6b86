"""What cannot be offloaded is refused before a weight is read, with a message that says what to do."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.streamed_layers import decoder_layers
from support.tiny_families import tiny_model
from torch import nn

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.offload import load_offloaded, memory_plan
from sequoia_kernels.offload.checkpoint import Checkpoint
from sequoia_kernels.offload.host_weights import pack_layers
from sequoia_kernels.offload.layers import find_layers
from sequoia_kernels.offload.model import _check_free


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("load", [load_offloaded, memory_plan])
def test_missing_shard(sharded: Path, load: Any) -> None:
    shards(sharded)[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold all shards of its index, got no model-00002-of-.* tensors"):
        load(sharded)


@pytest.mark.parametrize("kept", [0, 5, 30, -100, -1])
def test_truncated_shard(sharded: Path, kept: int) -> None:
    content = shards(sharded)[2].read_bytes()
    shards(sharded)[2].write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"model-00003-of-\d+.safetensors must (have|be)"):
        load_offloaded(sharded)


def test_truncation_says_how_much_is_missing(sharded: Path) -> None:
    content = shards(sharded)[0].read_bytes()
    shards(sharded)[0].write_bytes(content[:-7])
    message = rf"must have {len(content)} bytes, got {len(content) - 7}: the file is truncated; download it again"
    with pytest.raises(ValueError, match=message):
        load_offloaded(sharded)


def damaged(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 3) + b"{{{", "must be a safetensors file"),
        (struct.pack("<Q", 1 << 40), "without its header"),
        (damaged({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 1]}}, b"x"), "dtype F3 of a is not known"),
        (damaged({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "do not fit its shape"),
        (damaged({"a": {"dtype": "F32"}}), "must be a safetensors file"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_index_that_is_none(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a safetensors index"):
        load_offloaded(sharded)


def test_shard_without_a_tensor_that_the_index_names(sharded: Path) -> None:
    tensors = load_file(shards(sharded)[1])
    name = min(tensors)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, shards(sharded)[1])
    with pytest.raises(ValueError, match=rf"must hold {name}, as the index says"):
        load_offloaded(sharded)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def test_missing_weights(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, single / "model.safetensors")
    message = r"must hold all weights of a llama model, got none for model.layers.1.mlp.up_proj.weight and 1 more"
    with pytest.raises(ValueError, match=message):
        load_offloaded(single)


def test_weight_of_another_shape(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, single / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight must have shape \[32\], .*, got \[7\]"):
        load_offloaded(single)


def test_tensors_at_odd_offsets_are_converted(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "values": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]},
    }
    (tmp_path / "model.safetensors").write_bytes(damaged(header, b"\x07" + values.numpy().tobytes()))
    checkpoint = Checkpoint(tmp_path)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = torch.empty(2, 3, dtype=dtype)
        checkpoint.copy_into("values", found)
        assert torch.equal(found, values.to(dtype))
        checkpoint.close()


def test_no_safetensors(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors or .*, got neither; write them with"):
        load_offloaded(single)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "no/such/folder", "sequoia-kernels-tests/absent"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_offloaded: .* must be an existing folder or a hub id"):
        load_offloaded(name)


def test_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a config\.json"):
        load_offloaded(tmp_path)


def with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq"])
def test_quantised_checkpoints_are_refused_by_name(single: Path, method: str) -> None:
    with_config(single, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=f"family llama cannot be offloaded: .* quantised with {method}"):
        load_offloaded(single)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_configuration_are_refused(single: Path, dtype: torch.dtype) -> None:
    """Converting them to floats would load, and mean nothing."""
    tensors = load_file(single / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, single / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=rf"family llama cannot be offloaded: its checkpoint stores {name}"):
        load_offloaded(single)


def test_weights_that_transformers_merges_are_refused_by_name(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="family qwen3_moe cannot be offloaded: transformers merges"):
        load_offloaded(tmp_path)


def test_not_a_decoder_only_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedModelError, match="must be a decoder-only language model, got family t5"):
        load_offloaded(tmp_path)


def test_families_that_cannot_decode_trees_are_refused(single: Path) -> None:
    with pytest.raises(ValueError, match="must hold a model that transformers knows"):
        load_offloaded(with_config(single, model_type="no-such-family"))


def meta_llama() -> Any:
    with torch.device("meta"):
        return type(tiny_model("llama"))(tiny_model("llama").config)


def test_layers_that_share_a_tensor_are_refused() -> None:
    model = meta_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1.mlp.up_proj.weight is shared with layer 0"):
        find_layers(model)
    model = meta_llama()
    model.model.layers[0].input_layernorm.weight = model.model.norm.weight
    with pytest.raises(UnsupportedModelError, match="is shared with a module outside the layers"):
        find_layers(model)


def test_parameters_of_another_class_are_refused() -> None:
    class Packed(nn.Parameter):
        pass

    model = meta_llama()
    projection = model.model.layers[0].mlp.up_proj
    projection._parameters["weight"] = Packed(projection.weight.data, requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"up_proj.weight is a Packed, which holds more than its bytes"):
        find_layers(model)


def test_no_single_list_of_layers() -> None:
    model = meta_llama()
    model.model.more = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match=r"one list of 2 decoder layers, got model\.layers, model\.more"):
        find_layers(model)
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="one list of 3 decoder layers, got none"):
        find_layers(model)


# memory


def test_budget_too_small_for_one_layer(single: Path) -> None:
    with pytest.raises(ValueError, match=r"device_memory_budget must be at least \d+ bytes for this model, got 30720"):
        load_offloaded(single, device_memory_budget="30KiB")


def test_host_with_too_little_memory(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sequoia_kernels.offload.host_weights.available_host_bytes", lambda: 1000)
    with pytest.raises(RuntimeError, match=r'free memory for 2 layers, got 1000 B; .* host_memory="mapped"'):
        load_offloaded(single)
    load_offloaded(single, host_memory="mapped").close()
    load_offloaded(single, resident_layers=2).close()


class _PageLock:
    """Locks `limit` blocks."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.locked: set[int] = set()

    def lock(self, block: torch.Tensor) -> None:
        if len(self.locked) == self.limit:
            raise RuntimeError("cudaHostRegister failed with error 2")
        self.locked.add(block.data_ptr())

    def unlock(self, block: torch.Tensor) -> None:
        self.locked.discard(block.data_ptr())


@pytest.fixture
def layer_files(tmp_path: Path) -> tuple[Checkpoint, dict[str, str]]:
    layers = decoder_layers(4)
    tensors = {
        packed.name: torch.ones(packed.shape, dtype=packed.dtype) for layer in layers for packed in layer.tensors
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path), {name: name for name in tensors}


def test_too_little_memory_that_can_be_locked_leaves_nothing_locked(
    layer_files: tuple[Checkpoint, dict[str, str]],
) -> None:
    lock = _PageLock(limit=2)
    message = r"memory that can be page-locked for 4 layers, got 1.50 KiB \(cudaHostRegister failed with error 2\)"
    with pytest.raises(RuntimeError, match=message):
        pack_layers(decoder_layers(4), *layer_files, lock)
    assert lock.locked == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_load_unlocks_what_it_had_locked(
    layer_files: tuple[Checkpoint, dict[str, str]], error: type[BaseException]
) -> None:
    checkpoint, names = layer_files
    lock, copy_into = _PageLock(limit=4), checkpoint.copy_into

    def interrupted(name: str, destination: torch.Tensor) -> None:
        if name.startswith("layers.2"):
            raise error
        copy_into(name, destination)

    checkpoint.copy_into = interrupted  # type: ignore[method-assign]
    with pytest.raises(RuntimeError if error is OSError else error):
        pack_layers(decoder_layers(4), checkpoint, names, lock)
    assert lock.locked == set()


def test_a_device_with_too_little_free_memory(single: Path) -> None:
    plan = memory_plan(single, resident_layers=1)
    _check_free(plan, plan.total_bytes)
    with pytest.raises(RuntimeError, match=r"the device must have .* free for this plan, got 1.00 KiB; lower"):
        _check_free(plan, 1024)


def test_locked_blocks_are_unlocked_when_closed_or_dropped(layer_files: tuple[Checkpoint, dict[str, str]]) -> None:
    lock = _PageLock(limit=4)
    packed = pack_layers(decoder_layers(4), *layer_files, lock)
    assert len(lock.locked) == 4
    packed[0].close()
    packed[0].close()
    assert len(lock.locked) == 3
    with pytest.raises(RuntimeError, match="the weights must be open, got a closed model"):
        packed[0].write_into(torch.empty(packed[0].num_bytes, dtype=torch.uint8))
    packed.clear()
    assert lock.locked == set()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"host_memory": "disk"}, ValueError, 'host_memory must be "packed" or "mapped"'),
        ({"link": "fast"}, TypeError, "link must be a Link, got str"),
        ({"device": "meta"}, ValueError, "device must be of type cpu or cuda"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer"),
        ({"max_cache_len": 1.5}, ValueError, "max_cache_len must be a positive integer"),
        ({"max_rows": True}, ValueError, "max_rows must be a positive integer"),
        ({"resident_layers": 3}, ValueError, r"resident_layers must be in 0\.\.2, got 3"),
        ({"resident_layers": [0, 2]}, ValueError, r"resident_layers must be different indices below 2, got \[0, 2\]"),
        ({"resident_layers": [1, 1]}, ValueError, r"resident_layers must be different indices below 2, got \[1, 1\]"),
        ({"resident_layers": 1.0}, TypeError, r"resident_layers must be a number or layer indices, got 1\.0"),
        ({"device_memory_budget": "much"}, ValueError, "device_memory_budget must be a size"),
    ],
)
def test_arguments(single: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_offloaded(single, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(single: Path) -> None:
    with pytest.raises(ValueError, match="device must be present, got cuda on a machine without CUDA"):
        load_offloaded(single, device="cuda")
