"""Loading models with errors that say what to do, and the check of a pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_families import tiny_model

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import adapt, check_pair, load_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_loads_in_its_own_dtype_or_another(saved: Path) -> None:
    model = load_model(saved)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_model(str(saved), dtype=torch.float32, device="cpu").dtype == torch.float32
    original = tiny_model("llama").to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "no/such/folder", "~/no-such-folder-at-all"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_model: path_or_id must be an existing folder or a hub id, got"):
        load_model(name)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a config\.json"):
        load_model(tmp_path)


def test_hub_id_that_cannot_be_reached() -> None:
    """The suite runs in the hub's offline mode."""
    with pytest.raises(
        FileNotFoundError, match=r"'sequoia-kernels-tests/absent' must be .* that can be reached or is cached"
    ):
        load_model("sequoia-kernels-tests/absent")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "got family vit, which is not a causal language model"),
        ({"model_type": "t5"}, "got family t5, which is an encoder-decoder"),
    ],
)
def test_not_a_decoder_only_language_model(tmp_path: Path, config: dict[str, str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=f"must be a decoder-only language model, {message}"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such-family"}'])
def test_unreadable_configuration(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"load_model: .* must (be a folder that transformers can read|hold a model)"):
        load_model(saved)


def test_damaged_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"these are no weights")
    with pytest.raises(ValueError, match="must hold readable weights"):
        load_model(saved)


def test_no_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must be a folder that transformers can read.*model\.safetensors"):
        load_model(saved)


def test_missing_weights_are_not_made_up(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold all weights of a llama model, got none for model\.layers\.1\.mlp"):
        load_model(saved)


class Tokenizer:
    """A vocabulary and nothing else."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def test_a_pair_with_padded_heads() -> None:
    target, draft = tiny_model("llama"), tiny_model("llama", vocab_size=60, num_hidden_layers=1)
    assert check_pair(target, draft) == 60
    assert check_pair(adapt(target), adapt(draft)) == 60
    assert check_pair(target, target) == 64


def test_a_draft_larger_than_its_target() -> None:
    target, draft = tiny_model("llama", num_hidden_layers=1), tiny_model("llama")
    with pytest.raises(ValueError, match=r"check_pair: draft must be at most as large as the target .* swapped"):
        check_pair(target, draft)


class PackedLinear(torch.nn.Module):
    """A quantised layer as torch's dynamic quantisation makes them: its numbers are in no parameter."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = [layer.weight.detach(), layer.bias]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, *self.packed)


def test_a_quantised_target_is_as_large_as_what_it_stands_for() -> None:
    target, draft = tiny_model("llama"), tiny_model("llama")
    wanted = adapt(target).num_parameters
    for name, module in list(target.named_modules()):
        if type(module) is torch.nn.Linear:
            target.set_submodule(name, PackedLinear(module))
    assert sum(parameter.numel() for parameter in target.parameters()) < wanted / 2
    target.eval()
    assert adapt(target).num_parameters == wanted
    assert check_pair(target, draft) == 64


def test_heads_that_padding_cannot_explain() -> None:
    target, draft = tiny_model("llama", vocab_size=2000), tiny_model("llama")
    with pytest.raises(ValueError, match=r"must share the target's vocabulary of 2000 tokens, got 64"):
        check_pair(target, draft)
    resized = tiny_model("llama")
    resized.resize_token_embeddings(2000)  # as the message says
    with pytest.raises(ValueError, match=r"give both heads one size with draft\.resize_token_embeddings"):
        generate(target, draft, torch.tensor([[1, 2]]), max_new_tokens=1)
    assert len(generate(target, resized, torch.tensor([[1, 2]]), tree=TokenTree([-1, 0]), max_new_tokens=1).new_tokens)
    tokens = [f"t{index}" for index in range(2000)]
    assert check_pair(target, draft, Tokenizer(tokens), Tokenizer(tokens[:64])) == 64


def test_vocabularies_of_different_content() -> None:
    model = tiny_model("llama")
    tokens = [f"t{index}" for index in range(64)]
    other = list(tokens)
    other[17], other[40] = "x", "y"
    assert check_pair(model, model, Tokenizer(tokens), Tokenizer(tokens[:50])) == 64
    with pytest.raises(ValueError, match="got token id 17 = 'x' in the draft and 't17' in the target"):
        check_pair(model, model, Tokenizer(tokens), Tokenizer(other))


def test_content_beyond_the_common_ids_may_differ() -> None:
    target, draft = tiny_model("llama"), tiny_model("llama", vocab_size=60)
    tokens = [f"t{index}" for index in range(64)]
    assert check_pair(target, draft, Tokenizer(tokens), Tokenizer([*tokens[:60], "a", "b"])) == 60


def test_only_one_tokenizer() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="must be given together"):
        check_pair(model, model, Tokenizer(["a"]))


def test_a_target_whose_weights_are_packed_is_as_large_as_what_it_stands_for() -> None:
    """Two numbers in a byte of the parameter itself, as bitsandbytes keeps them."""
    target, draft = tiny_model("llama"), tiny_model("llama")
    wanted = adapt(target).num_parameters
    held = adapt(target)
    for module in target.modules():
        if type(module) is torch.nn.Linear:
            full = module.weight.detach()
            module.forward = lambda input, full=full: torch.nn.functional.linear(input, full)
            packed = torch.zeros(full.numel() // 2, 1, dtype=torch.uint8)
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert sum(parameter.numel() for parameter in target.parameters()) < 0.7 * wanted
    assert adapt(target).num_parameters == wanted == held.num_parameters
    assert check_pair(target, draft) == 64


def test_a_folder_with_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"whole model, got .* with an adapter alone; .*merge_and_unload"):
        load_model(tmp_path)
