"""A draft with fewer positions than the requests want: the output is the target's, and speculation goes on."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from support.tiny_models import noisy_copy, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.decoding import loop
from sequoia_kernels.decoding.draft_context import DraftContext
from sequoia_kernels.decoding.request import Request
from sequoia_kernels.models import TreeModel

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7])
POSITIONS = 32


@pytest.fixture(scope="module")
def target():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def draft(target):
    """A draft that resembles the target and was made for few positions."""
    copy = noisy_copy(target, 0.5)
    copy.config.max_position_embeddings = POSITIONS
    return copy


@pytest.fixture(scope="module")
def table_draft():
    """A draft whose table of positions ends."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=32, n_embd=32, n_layer=1, n_head=4, n_positions=POSITIONS, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=[0, 1], ids=["synchronous", "one step in flight"])
def lag(request, monkeypatch):
    """Steps in flight, as on a CPU and as on a GPU."""
    monkeypatch.setattr(loop, "steps_ahead", lambda target: request.param)
    return request.param


def prompt(length, seed=1):
    return torch.randint(0, 32, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(prompts):
    width = max(row.shape[1] for row in prompts)
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, tokens in enumerate(prompts):
        ids[row, : tokens.shape[1]], mask[row, : tokens.shape[1]] = tokens[0], 1
    return ids, mask


@pytest.mark.parametrize("tree", [TREE, TokenTree.chain(2), TokenTree.chain(40)], ids=["tree", "chain", "too deep"])
def test_greedy_output_goes_on_beyond_the_drafts_positions(target, draft, table_draft, lag, tree):
    for model, prompt_len in itertools.product((draft, table_draft), (1, 31, 32, 50)):
        output = generate(target, model, prompt(prompt_len), tree=tree, max_new_tokens=40)
        assert output.new_tokens == generate(target, None, prompt(prompt_len), max_new_tokens=40).new_tokens
        assert output.finish_reasons == ["length"]
        assert output.stats.draft_restarts >= 1


def test_speculation_goes_on_and_the_statistics_and_the_log_tell(target, draft, caplog):
    with caplog.at_level(logging.INFO, logger="sequoia_kernels"):
        stats = generate(target, draft, prompt(10), tree=TREE, max_new_tokens=200).stats
    assert stats.tokens_per_step > 1.2
    # from 29 tokens back to 16: a restart for every 13 to 16 tokens
    assert 190 / 16 <= stats.draft_restarts <= 200 / 13 + 1
    assert stats.to_dict()["draft_restarts"] == stats.draft_restarts
    assert [record.getMessage() for record in caplog.records].count(
        "the draft's 32 positions are used up: it goes on with the newest tokens"
    ) == 1
    assert generate(target, draft, prompt(10), tree=TREE, max_new_tokens=19).stats.draft_restarts == 0


def test_a_draft_that_is_the_target_stays_in_step_after_restarts(target, lag):
    # It sees the newest tokens only, and needs no others: were one of its rows wrong, its guesses would be.
    model = tiny_llama(3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()  # the next token follows from the last one
    short = noisy_copy(model, 0.0)
    short.config.max_position_embeddings = POSITIONS
    output = generate(model, short, prompt(10), tree=TokenTree.chain(5), max_new_tokens=101)
    assert output.stats.draft_restarts > 2
    assert output.stats.accepted_histogram == [0, 0, 0, 0, 0, 20]


def test_the_draft_is_fed_its_own_positions_only(target, table_draft, lag, monkeypatch):
    fed = []
    plain = TreeModel.forward

    def noted(self, input_ids, cache, cache_lens, step, **options):
        if self.model is table_draft:
            fed.append(int((cache_lens[:, None] + step.depths).max()))
        return plain(self, input_ids, cache, cache_lens, step, **options)

    monkeypatch.setattr(TreeModel, "forward", noted)
    generate(target, table_draft, prompt(10), tree=TREE, max_new_tokens=100)
    assert POSITIONS - 2 * TREE.num_levels <= max(fed) < POSITIONS


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_request_has_the_same_contexts_alone_and_among_others(target, draft, lag, temperature):
    lengths = (10, 1, 50, 28, 32)
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    options = {"tree": TREE, "max_new_tokens": 50, "temperature": temperature}
    together = generate(target, draft, *padded(prompts), seed=range(5), **options)
    alone = [generate(target, draft, ids, seed=seed, **options) for seed, ids in enumerate(prompts)]
    assert together.new_tokens == [output.new_tokens[0] for output in alone]
    assert together.stats.draft_restarts == sum(output.stats.draft_restarts for output in alone) > 10
    # not the output alone: the draft guessed as well as it does for each of them
    for name in ("accepted_histogram", "visited_by_rank", "accepted_by_rank"):
        counts = [getattr(output.stats, name) for output in alone]
        width = max(map(len, counts))
        assert getattr(together.stats, name) == [sum(row[i] for row in counts if i < len(row)) for i in range(width)]


def test_a_context_holds_the_newest_tokens_and_leaves_room_for_what_comes():
    for positions in range(4, 70, 3):
        for num_levels in (2, 5, 90):
            for steps_in_flight in (0, 1):
                context = DraftContext(positions, num_levels, steps_in_flight, 1)
                request = Request(list(range(positions)), 1000, None, (), None)
                kept = context.tokens(0, request)
                assert kept == request.prompt[-len(kept) :]
                assert 1 <= len(kept) <= context.longest < positions
                assert context.longest - context.num_kept >= positions // 8


def test_the_cache_of_the_draft_is_as_short_as_its_positions(target, draft):
    sizes = {}
    plain = TreeModel.new_cache

    def noted(self, batch_size, max_cache_len, **options):
        sizes.setdefault(self.model is draft, max_cache_len)
        return plain(self, batch_size, max_cache_len, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeModel, "new_cache", noted)
        generate(adapt(target), adapt(draft), prompt(10), tree=TREE, max_new_tokens=200)
    room = TREE.num_nodes + 2 * TREE.num_levels
    assert sizes == {False: 10 + 200 - 1 + room, True: POSITIONS + room}
