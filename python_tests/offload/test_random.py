"""Offloaded models from a configuration: reproducible weights, layers that share a block, nothing held as a whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.simulated_link import SimulatedLink
from support.tiny_families import tiny_model

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.offload import normal_weights, random_offloaded

LAYERS = 5
SHARED = [0, 1, 1, 3, 1]


def config(family: str = "llama", layers: int = LAYERS) -> Any:
    return tiny_model(family, num_hidden_layers=layers).config


def twin(weights_of: list[int], seed: int = 0, **more: Any) -> Any:
    """The same model, whole: the weights that a source by name gives its layers."""
    model = tiny_model("llama", num_hidden_layers=LAYERS, **more)
    fill = normal_weights(seed, std=model.config.initializer_range)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["model", "layers"]:
                parts[2] = str(weights_of[int(parts[2])])
            fill(".".join(parts), parameter)
    return model


PROMPT = torch.tensor([[5, 9, 11, 2, 30]])
TREE = TokenTree([-1, 0, 0, 1, 1, 2])


@pytest.mark.parametrize("resident_layers", [None, 2, [0, 3], range(LAYERS)])
@pytest.mark.parametrize("share", [False, True, SHARED])
def test_decoding_equals_the_whole_model(share: Any, resident_layers: Any) -> None:
    weights_of = {False: list(range(LAYERS)), True: [0] * LAYERS}.get(share if isinstance(share, bool) else -1, SHARED)
    draft = tiny_model("llama", num_hidden_layers=1)
    expected = generate(adapt(twin(weights_of), forward="modules"), draft, PROMPT, tree=TREE, max_new_tokens=12)
    with random_offloaded(config(), share_host_layers=share, resident_layers=resident_layers) as model:
        assert generate(model, draft, PROMPT, tree=TREE, max_new_tokens=12).new_tokens == expected.new_tokens
        if model.streamer is not None:
            distinct = {weights_of[index] for index in model.memory.streamed}
            assert len({id(source) for source in model.streamer.sources}) == len(distinct)
            assert model.memory.host_bytes == sum({id(s): s.num_bytes for s in model.streamer.sources}.values())


def test_traffic_is_the_same_with_and_without_sharing() -> None:
    copied = []
    for share in (False, True):
        link = SimulatedLink(1e6)
        with random_offloaded(config(), share_host_layers=share, link=link) as model:
            before = link.bytes_copied
            generate(model, None, PROMPT, max_new_tokens=4)
            copied.append(link.bytes_copied - before)
            assert copied[-1] == 4 * model.memory.streamed_bytes  # the prefill and three steps
    assert copied[0] == copied[1]


def test_every_tensor_is_made_once_and_only_where_it_is_kept() -> None:
    made: Counter[str] = Counter()
    fill = normal_weights()

    def counted(name: str, tensor: torch.Tensor) -> None:
        made[name] += 1
        fill(name, tensor)

    with random_offloaded(config(), fill=counted, share_host_layers=SHARED, resident_layers=[0]) as model:
        assert model.num_parameters == twin(SHARED).num_parameters()
    assert set(made.values()) == {1}
    assert {int(name.split(".")[2]) for name in made if ".layers." in name} == {0, 1, 3}


def test_dtype_and_seed() -> None:
    logits = {}
    for dtype in (None, torch.bfloat16):
        for seed in (0, 1):
            fill = normal_weights(seed)
            with random_offloaded(config(), fill=fill, dtype=dtype) as model, torch.no_grad():
                assert model.dtype == (dtype or torch.float32)
                logits[dtype, seed] = model.model(PROMPT).logits
            with random_offloaded(config(), fill=fill, dtype=dtype, resident_layers=3) as model, torch.no_grad():
                assert torch.equal(model.model(PROMPT).logits, logits[dtype, seed])
    assert not torch.equal(logits[None, 0], logits[None, 1])
    torch.testing.assert_close(logits[torch.bfloat16, 0].float(), logits[None, 0], atol=0.05, rtol=0.1)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "opt"])
def test_other_families(family: str) -> None:
    """With biases, tied embeddings and learned positions."""
    whole = tiny_model(family).eval()
    fill = normal_weights(2)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            fill(name, parameter)
        with random_offloaded(whole.config, fill=fill) as model:
            assert torch.equal(model.model(PROMPT).logits, whole(PROMPT).logits)
            assert adapt(model) is model


def test_normal_weights() -> None:
    matrix, again = torch.empty(300, 200), torch.empty(300, 200)
    normal_weights(3, std=0.5)("a", matrix)
    normal_weights(3, std=0.5)("a", again)
    assert torch.equal(matrix, again)
    assert matrix.std() == pytest.approx(0.5, rel=0.02)
    normal_weights(3, std=0.5)("b", again)
    assert not torch.equal(matrix, again)
    gain, bias = torch.empty(3), torch.empty(3)
    normal_weights()("norm.weight", gain)
    normal_weights()("norm.bias", bias)
    assert gain.tolist() == [1, 1, 1]
    assert bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ([0, 1], "be a layer index for each of 5 layers"),
        ([0, 1, 2, 3, 5], "be a layer index for each of 5 layers"),
        ([0, 0, 1, 3, 3], "got 1 for layer 2, which has the weights of another itself"),
    ],
)
def test_layers_that_cannot_share(share: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"random_offloaded: share_host_layers must .*{message}"):
        random_offloaded(config(), share_host_layers=share)


def test_layers_of_other_shapes_cannot_share() -> None:
    """The first layer of this family is dense, the second has experts."""
    with pytest.raises(ValueError, match="got 0 for layer 1, which has other shapes"):
        random_offloaded(tiny_model("deepseek_v3").config, share_host_layers=True)
