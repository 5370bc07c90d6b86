"""The example loops: greedily they give plain decoding's text, sampled its distribution; and they run as they are."""

from __future__ import annotations

import functools
import os
import sys

import pytest
import torch
from support.chi_square import p_value, sequence_counts
from support.examples import EXAMPLES, example, plain_greedy, plain_joint
from support.processes import run_process
from support.tiny_models import noisy_copy, sequence_probabilities, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from sequoia_kernels import TokenTree, sample_without_replacement, verify_tree

OPS = ("compact_kv_cache_", "sample_without_replacement", "tree_attention", "verify_tree")
TREE = TokenTree([-1, 0, 0, 1, 1, 2, 3])
# Equally wide levels, other shapes.
TREES = [TokenTree(parents) for parents in ([-1, 0, 0, 1, 1, 2, 3], [-1, 0, 0, 1, 2, 2, 5], [-1, 0, 0, 1, 1, 1, 4])]
PROMPTS = [[7, 3, 11], [2, 40, 5], [5, 5, 9]]


def toy_pair(vocab, noise=0.1):
    target = example("toy_model").ToyModel(vocab)
    return target, target.noisy(noise)


def decode(name, prompts, num_tokens, temperature, vocab, seeds, noise=0.1):
    """Decode equally long prompts with the toy pair in one of the loops."""
    target, draft = toy_pair(vocab, noise)
    prompts, decode = torch.tensor(prompts), example(name).decode
    if name == "paged_cache":
        trees = [TREES[request % len(TREES)] for request in range(len(prompts))]
        temperatures = torch.full((len(prompts),), temperature)
        return decode(target, draft, prompts.tolist(), trees, num_tokens, temperatures, seeds)
    if name == "server_conventions":
        return decode(target, target.bigrams(), prompts, num_tokens, temperature, seeds)
    if name == "lookup":
        return decode(target, prompts, 4, num_tokens, temperature, seeds)
    if name == "captured_step":
        return decode(target, draft, prompts, TREE, num_tokens, torch.full((len(prompts),), temperature), seeds)
    return decode(target, draft, prompts, 4 if name == "chain" else TREE, num_tokens, temperature, seeds)


LOOPS = ("plain_tensors", "paged_cache", "chain", "lookup", "server_conventions", "captured_step")


@pytest.fixture(params=[False, True], ids=["", "debug"])
def debug(request, monkeypatch):
    """Once as they are, once with debug=True in every call of an op."""
    if request.param:
        for name in (*LOOPS, "hugging_face", "toy_model"):
            module = example(name)
            for op in OPS:
                if hasattr(module, op):
                    monkeypatch.setattr(module, op, functools.partial(getattr(module, op), debug=True))
    return request.param


@pytest.mark.parametrize("name", LOOPS)
def test_greedy_text_is_plain_decodings(name, debug):
    texts = decode(name, PROMPTS, 20, 0.0, 50, torch.arange(3))
    target, _ = toy_pair(50)
    assert texts.tolist() == [plain_greedy(target, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("name", LOOPS)
def test_requests_that_end_first_wait_without_growing(name):
    """Some end in half the steps of others; did they go on committing, they would leave their caches."""
    prompts = [[first, first + 1, 2 * first] for first in range(12)]
    texts = decode(name, prompts, 60, 0.0, 50, torch.arange(len(prompts)))
    target, _ = toy_pair(50)
    assert texts.tolist() == [plain_greedy(target, prompt, 60) for prompt in prompts]


@pytest.mark.parametrize("name", LOOPS)
def test_speculation_happens(name, monkeypatch):
    """Fewer forwards of the target than tokens, or equality would say little."""
    module = example("toy_model")
    forward, calls = module.ToyModel.forward, []

    def counted(self, *args):
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(module.ToyModel, "forward", counted)
    decode(name, PROMPTS[:1], 20, 0.0, 50, torch.arange(1))
    own = [model for model in calls if model is calls[-1]]
    assert 1 < len(own) < 20  # the last forward is the target's, the first its prompt's


def test_paged_requests_may_differ_in_everything(debug):
    target, draft = toy_pair(50)
    prompts, temperature = [[7, 3, 11], [2, 40], [5, 5, 9, 30, 21, 8]], torch.tensor([0.0, 1.0, 0.0])
    decode = example("paged_cache").decode
    texts = decode(target, draft, prompts, TREES, 20, temperature, torch.arange(3)).tolist()
    for request in (0, 2):
        assert texts[request] == plain_greedy(target, prompts[request], 20)
    # Whoever is beside it, a request's text is the same.
    alone = decode(target, draft, prompts[1:2], TREES[1:2], 20, temperature[1:2], torch.arange(1, 2))
    assert alone.tolist() == [texts[1]]


def positions_by_node(target, draft, module, monkeypatch):
    forward = type(target).forward

    def mistaken(self, tokens, topology, *others):
        return forward(self, tokens, topology._replace(depths=torch.arange(topology.num_nodes)), *others)

    monkeypatch.setattr(type(target), "forward", mistaken)


def a_compaction_a_cache(target, draft, module, monkeypatch):
    compact = module.compact_kv_cache_

    def mistaken(caches, *path):
        compact(caches[:2], *path)
        compact(caches[2:], *path)

    monkeypatch.setattr(module, "compact_kv_cache_", mistaken)


def root_taken_for_committed(target, draft, module, monkeypatch):
    forward = type(target).forward

    def mistaken(self, tokens, topology, nodes, cache_lens, cache):
        return forward(self, tokens, topology, nodes, cache_lens + (topology.num_nodes == TREE.num_nodes), cache)

    monkeypatch.setattr(type(target), "forward", mistaken)


def last_token_not_fed_to_the_draft(target, draft, module, monkeypatch):
    forward, single = type(target).forward, TokenTree.single().tensors()

    def mistaken(self, tokens, topology, nodes, cache_lens, cache):
        if self is not draft or topology.num_nodes != 2 or len(nodes) != 2 or not bool(cache_lens.all()):
            return forward(self, tokens, topology, nodes, cache_lens, cache)
        logits = forward(self, tokens[:, 1:], single, nodes[:1], cache_lens + 1, cache)
        return torch.cat((logits, logits), dim=1)

    monkeypatch.setattr(type(target), "forward", mistaken)


@pytest.mark.parametrize(
    ("mistake", "text_is_right"),
    [
        (positions_by_node, False),
        (root_taken_for_committed, False),
        (last_token_not_fed_to_the_draft, True),
    ],
)
def test_mistakes_show_as_the_page_says(mistake, text_is_right, monkeypatch):
    target, draft = toy_pair(50)
    module = example("plain_tensors")
    prompts = torch.tensor([[7, 3, 11, 4, 9, 2]])
    right = [plain_greedy(target, prompts[0].tolist(), 40)]
    arguments = (target, draft, prompts, TREE, 40, 0.0, torch.arange(1))
    assert module.decode(*arguments).tolist() == right
    mistake(target, draft, module, monkeypatch)
    assert (module.decode(*arguments).tolist() == right) == text_is_right


def test_lengths_that_advance_twice_leave_the_cache(monkeypatch):
    target, draft = toy_pair(50)
    module = example("plain_tensors")
    a_compaction_a_cache(target, draft, module, monkeypatch)
    with pytest.raises((ValueError, IndexError), match=r"must leave room for 7 tree rows|index \d+ is out of bounds"):
        module.decode(target, draft, torch.tensor(PROMPTS), TREE, 40, 0.0, torch.arange(3))


# Several steps a text, or the noise of one would not meet that of the next: more tokens than a tree has levels, and a
# draft that is often rejected.
SAMPLED = {"prompt": [1, 0, 2], "num_tokens": 5, "vocab": 3, "noise": 0.5}


def sampled(name, num_requests=6000):
    """Sample the same short text again and again. [num_requests, num_tokens]"""
    prompt, num_tokens, vocab, noise = SAMPLED.values()
    return decode(name, [prompt] * num_requests, num_tokens, 1.0, vocab, torch.arange(num_requests), noise)


def chi_square(texts, expected):
    return p_value(sequence_counts(texts, expected.shape[0]), expected)


def chi_square_of_sampled(texts, temperature=1.0):
    target, _ = toy_pair(SAMPLED["vocab"])
    return chi_square(texts, plain_joint(target, SAMPLED["prompt"], SAMPLED["num_tokens"], temperature))


@pytest.mark.parametrize("name", LOOPS)
def test_sampled_text_has_the_targets_distribution(name):
    texts = sampled(name)
    assert chi_square_of_sampled(texts) > 1e-3
    # The same counts do not pass for another distribution that is near.
    assert chi_square_of_sampled(texts, temperature=1.15) < 1e-6


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: numbers that go to the host, and results of a size that values decide."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        return function(*args, **(kwargs or {}))


def test_a_captured_step_waits_for_nothing():
    target, draft = toy_pair(50)
    temperature = torch.tensor([0.0, 1.0, 0.7])
    with torch.no_grad():  # in inference mode, torch shows such calls by other names
        step = example("captured_step").Step(
            target, draft, torch.tensor(PROMPTS), TREE, 20, temperature, torch.arange(3)
        )
        with Waits() as waits:
            step.run()
            assert waits.count == 0
            int(step.num_emitted.min())
            assert waits.count == 1
    assert int(step.num_emitted.min()) > 0


@pytest.mark.gpu
def test_a_captured_step_gives_the_texts_of_one_that_is_not():
    target, draft = (model.to("cuda") for model in toy_pair(50))
    prompts, temperature = torch.tensor(PROMPTS).cuda(), torch.tensor([0.0, 1.0, 0.7]).cuda()
    seeds = torch.arange(3).cuda()
    captured = example("captured_step").decode(target, draft, prompts, TREE, 20, temperature, seeds).tolist()
    plain = example("plain_tensors").decode
    for request in range(3):
        own = slice(request, request + 1)
        alone = plain(target, draft, prompts[own], TREE, 20, float(temperature[request]), seeds[own])
        assert alone.tolist() == [captured[request]]


def one_offset(logits, num_samples, temperature, seeds, offsets, **options):
    """What a loop does that takes the request's offset for all nodes of a level."""
    return sample_without_replacement(logits, num_samples, temperature, seeds, offsets - offsets % TREE.num_nodes)


def test_one_offset_for_all_nodes_is_silently_wrong_and_caught_under_debug(monkeypatch):
    module = example("plain_tensors")
    monkeypatch.setattr(module, "sample_without_replacement", one_offset)
    assert chi_square_of_sampled(sampled("plain_tensors")) < 1e-6
    with monkeypatch.context() as changed:
        debugging = functools.partial(sample_without_replacement, debug=True)
        changed.setitem(globals(), "sample_without_replacement", debugging)
        with pytest.raises(ValueError, match=r"offsets must differ between rows of one seed.* in rows \[0, 1\]"):
            sampled("plain_tensors", num_requests=2)


@pytest.mark.parametrize("advance", [0, 1])
def test_offsets_that_advance_by_too_little_give_another_distribution(advance, monkeypatch):
    """Of a step: by nothing, or by one instead of by one a node."""
    module, num_nodes = example("plain_tensors"), TREE.num_nodes

    for op in (sample_without_replacement, verify_tree):

        def mistaken(*arguments, op=op):
            *others, offsets = arguments
            return op(*others, offsets // num_nodes * advance + offsets % num_nodes)

        monkeypatch.setattr(module, op.__name__, mistaken)
    assert chi_square_of_sampled(sampled("plain_tensors")) < 1e-6


# ---- Hugging Face


def hugging_face(target, draft, prompts, num_tokens, temperature, seeds):
    lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    return example("hugging_face").decode(target, draft, padded, lens, TREE, num_tokens, temperature, seeds)


def test_hugging_face_greedy_text_is_that_of_generate(debug):
    target = tiny_llama(0)
    prompts = [[7, 3, 11], [2], [5, 5, 9, 30, 21, 8]]
    texts = hugging_face(target, noisy_copy(target, 0.3), prompts, 20, 0.0, torch.arange(3))
    for prompt, text in zip(prompts, texts.tolist(), strict=True):
        expected = target.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert text == expected[0, len(prompt) :].tolist()


def test_hugging_face_requests_that_end_first_wait_without_growing():
    target = tiny_llama(0)
    prompts = [[first, first + 1, 2 * first] for first in range(12)]
    texts = hugging_face(target, noisy_copy(target, 0.3), prompts, 60, 0.0, torch.arange(len(prompts)))
    expected = target.generate(torch.tensor(prompts), max_new_tokens=60, do_sample=False)
    assert texts.tolist() == expected[:, 3:].tolist()


def test_hugging_face_sampled_text_has_the_targets_distribution():
    target = tiny_llama(0, vocab_size=3, num_layers=1, sharpness=5.0)
    prompt, num_requests, num_tokens = [1, 0, 2], 4000, 5
    draft = noisy_copy(target, 1.0)
    texts = hugging_face(target, draft, [prompt] * num_requests, num_tokens, 1.0, torch.arange(num_requests))
    for temperature, right in ((1.0, True), (1.3, False)):
        warp = lambda logits, temperature=temperature: (logits / temperature).softmax(-1)  # noqa: E731
        expected = sequence_probabilities(target, torch.tensor(prompt), num_tokens, warp).reshape([3] * num_tokens)
        assert (chi_square(texts, expected) > 1e-3) == right


# ---- as they are


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "toy_model"])
def test_it_runs_from_the_command_line(name, tmp_path):
    environment = {**os.environ, "PYTHONSAFEPATH": "", "HF_HUB_OFFLINE": "1"}
    result = run_process([sys.executable, str(EXAMPLES / f"{name}.py")], env=environment, cwd=tmp_path)
    assert result.stdout.strip()
