"""generate(): greedy equality, endings, batches, caches, seeds, statistics."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import noisy_copy, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import loop

TREES = {
    "chain": TokenTree.chain(4),
    "star": TokenTree([-1, 0, 0, 0, 0]),
    "mixed": TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7]),
    "two": TokenTree([-1, 0]),
}


@pytest.fixture(scope="module")
def target():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def draft(target):
    return noisy_copy(target, 0.5)


def greedy(model, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """Greedy decoding by whole forwards: no cache, no library loop."""
    ids = prompt[None]
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids = torch.cat((ids, model(input_ids=ids).logits[:, -1].argmax(-1)[:, None]), dim=1)
    return ids[0, len(prompt) :].tolist()


def prompts(num: int, length: int, vocab: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, (num, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_greedy_output_is_the_targets_own(target, draft, tree):
    prompt = prompts(1, 9)
    output = generate(target, draft, prompt, tree=tree, max_new_tokens=40)
    assert output.new_tokens[0] == greedy(target, prompt[0], 40)
    assert output.finish_reasons == ["length"]
    assert output.stats.tokens_per_step > 1.2  # the pair agrees often: a loop that never accepts would give 1


def test_without_a_draft_it_is_autoregressive(target):
    prompt = prompts(1, 5)
    output = generate(target, None, prompt, max_new_tokens=20)
    assert output.new_tokens[0] == greedy(target, prompt[0], 20)
    assert output.stats.num_steps == 19
    assert output.stats.tokens_per_step == 1.0


def test_draft_equal_to_target_accepts_whole_chains(target):
    output = generate(target, target, prompts(1, 6), tree=TokenTree.chain(5), max_new_tokens=26)
    assert output.stats.accepted_histogram == [0, 0, 0, 0, 0, 5]


def test_ragged_batch_equals_single_requests(target, draft):
    lengths = [1, 4, 11]
    ids, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 11 - length :] = prompts(1, length, seed=row)[0]
        mask[row, 11 - length :] = 1
    expected = [greedy(target, prompts(1, length, seed=row)[0], 24) for row, length in enumerate(lengths)]
    left = generate(target, draft, ids, mask, tree=TREES["mixed"], max_new_tokens=24)
    assert left.new_tokens == expected
    right_ids = torch.stack([ids[row].roll(length - 11) for row, length in enumerate(lengths)])
    right_mask = torch.stack([mask[row].roll(length - 11) for row, length in enumerate(lengths)])
    right = generate(target, draft, right_ids, right_mask, tree=TREES["mixed"], max_new_tokens=24)
    assert right.new_tokens == expected
    assert torch.equal(left.sequences[:, :11], ids)
    assert left.sequences[:, 11:].tolist() == expected


def test_prompt_of_one_token(target, draft):
    prompt = prompts(1, 1)
    output = generate(target, draft, prompt, tree=TREES["mixed"], max_new_tokens=16)
    assert output.new_tokens[0] == greedy(target, prompt[0], 16)


def test_every_max_new_tokens_is_exact(target, draft):
    prompt = prompts(1, 7)
    expected = greedy(target, prompt[0], 9)
    for wanted in range(1, 10):
        output = generate(target, draft, prompt, tree=TREES["mixed"], max_new_tokens=wanted)
        assert output.new_tokens[0] == expected[:wanted]
        assert output.sequences.shape == (1, 7 + wanted)


def test_no_token_behind_an_eos_inside_the_tree(target, draft):
    prompt = prompts(1, 7)
    expected = greedy(target, prompt[0], 30)
    for eos in sorted(set(expected)):
        end = expected.index(eos) + 1
        output = generate(target, draft, prompt, tree=TREES["mixed"], max_new_tokens=30, eos_token_id=eos)
        assert output.new_tokens[0] == expected[:end]
        assert output.finish_reasons == ["eos"]


def test_any_of_the_models_eos_ids_ends_a_request(target, draft):
    prompt = prompts(1, 7)
    expected = greedy(target, prompt[0], 30)
    ids = [expected[12], expected[20]]
    end = min(expected.index(token) for token in ids) + 1
    target.generation_config.eos_token_id = ids
    try:
        output = generate(target, draft, prompt, tree=TREES["chain"], max_new_tokens=30)
        unending = generate(target, draft, prompt, tree=TREES["chain"], max_new_tokens=30, eos_token_id=[])
    finally:
        target.generation_config.eos_token_id = None
    assert output.new_tokens[0] == expected[:end]
    assert unending.new_tokens[0] == expected


def test_requests_end_one_by_one(target, draft):
    ids = prompts(3, 8, seed=5)
    expected = [greedy(target, row, 30) for row in ids]
    eos = expected[1][3]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    output = generate(target, draft, ids, tree=TREES["mixed"], max_new_tokens=30, eos_token_id=eos, pad_token_id=31)
    assert output.new_tokens == cut
    for row, tokens in enumerate(cut):
        assert output.sequences[row, 8 + len(tokens) :].tolist() == [31] * (output.sequences.shape[1] - 8 - len(tokens))


@pytest.mark.parametrize("max_cache_len", [12, 15, 20, 31])
def test_full_cache_ends_exactly(target, draft, max_cache_len):
    prompt = prompts(1, 10)
    output = generate(target, draft, prompt, tree=TREES["mixed"], max_new_tokens=100, max_cache_len=max_cache_len)
    # the newest token needs no row: a cache of S rows holds the prompt and all new tokens but the last
    expected = greedy(target, prompt[0], max_cache_len - 10 + 1)
    assert output.new_tokens[0] == expected
    assert output.finish_reasons == ["cache_full"]


def test_prompt_that_fills_the_cache_gets_one_token(target, draft):
    prompt = prompts(1, 10)
    output = generate(target, draft, prompt, tree=TREES["mixed"], max_new_tokens=5, max_cache_len=10)
    assert output.new_tokens[0] == greedy(target, prompt[0], 1)
    with pytest.raises(ValueError, match=r"input_ids must be at most as long as the cache, 9 tokens"):
        generate(target, draft, prompt, tree=TREES["mixed"], max_cache_len=9)


def position_table(num_positions: int, vocab_size: int = 32) -> GPT2LMHeadModel:
    """A model whose table of positions ends."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=num_positions, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_learned_positions_limit_the_cache():
    target = position_table(24)
    prompt = prompts(1, 10)
    output = generate(target, noisy_copy(target, 0.5), prompt, tree=TREES["mixed"], max_new_tokens=100)
    assert output.finish_reasons == ["cache_full"]
    assert output.new_tokens[0] == greedy(target, prompt[0], 15)


@pytest.mark.parametrize("limited_by", ["max_cache_len", "positions"])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_requests_tokens_do_not_depend_on_how_full_the_cache_is_for_others(
    target, draft, limited_by, lag, monkeypatch
):
    monkeypatch.setattr(loop, "steps_ahead", lambda target: lag)
    arguments = {"tree": TREES["mixed"], "max_new_tokens": 30, "temperature": 0.9}
    model = target
    if limited_by == "positions":
        model, draft = position_table(24), noisy_copy(position_table(24), 0.5)
    else:
        arguments["max_cache_len"] = 24
    lengths = [1, 5, 9, 14, 19, 22, 23, 24]
    ids, mask = torch.zeros(8, 24, dtype=torch.int64), torch.zeros(8, 24, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = prompts(1, length, seed=row)[0], 1
    alone = [
        generate(model, draft, ids[row : row + 1, :length], seed=row, **arguments) for row, length in enumerate(lengths)
    ]
    together = generate(model, draft, ids, mask, seed=range(8), **arguments)
    assert together.new_tokens == [output.new_tokens[0] for output in alone]
    assert together.finish_reasons == ["cache_full"] * 8
    assert [len(tokens) for tokens in together.new_tokens] == [25 - length for length in lengths]
    # and the limit cuts a request's text off, but does not change it
    if limited_by == "max_cache_len":
        unlimited = generate(model, draft, ids, mask, seed=range(8), **{**arguments, "max_cache_len": 200})
        assert [
            row[: len(cut)] for row, cut in zip(unlimited.new_tokens, together.new_tokens, strict=True)
        ] == together.new_tokens


def test_equal_seeds_repeat_and_other_seeds_differ(target, draft):
    prompt = prompts(1, 8)
    arguments = {"tree": TREES["mixed"], "max_new_tokens": 24, "temperature": 1.0}
    first = generate(target, draft, prompt, seed=11, **arguments).new_tokens
    assert generate(target, draft, prompt, seed=11, **arguments).new_tokens == first
    assert generate(target, draft, prompt, seed=12, **arguments).new_tokens != first


def test_a_requests_seed_works_alone_and_in_a_batch(target, draft):
    ids = prompts(3, 8, seed=4)
    arguments = {"tree": TREES["mixed"], "max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9}
    together = generate(target, draft, ids, seed=[5, 6, 7], **arguments).new_tokens
    alone = [generate(target, draft, ids[row : row + 1], seed=5 + row, **arguments).new_tokens[0] for row in range(3)]
    assert together == alone
    mixed = generate(target, draft, ids[:1].repeat(3, 1), seed=9, **arguments).new_tokens
    assert len({tuple(tokens) for tokens in mixed}) == 3  # one integer still gives every request its own stream


def test_mixed_temperatures_in_one_batch(target, draft):
    ids = prompts(1, 8).repeat(2, 1)
    output = generate(target, draft, ids, tree=TREES["mixed"], max_new_tokens=16, temperature=[0.0, 1.5])
    assert output.new_tokens[0] == greedy(target, ids[0], 16)
    assert output.new_tokens[1] != output.new_tokens[0]


def test_tiny_top_k_and_top_p_are_greedy(target, draft):
    prompt = prompts(1, 8)
    expected = greedy(target, prompt[0], 16)
    for warp in ({"top_k": 1}, {"top_p": 1e-6}):
        output = generate(target, draft, prompt, tree=TREES["mixed"], max_new_tokens=16, temperature=0.9, **warp)
        assert output.new_tokens[0] == expected


class _Characters:
    """Decodes token t as the t-th letter."""

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(ord("A") + token) for token in tokens)


def test_stop_strings_end_with_the_token_that_completes_them(target, draft):
    prompt = prompts(1, 7)
    expected = greedy(target, prompt[0], 30)
    text = _Characters().decode(expected)
    stop = text[10:13]
    end = text.index(stop) + 3
    output = generate(
        target, draft, prompt, tree=TREES["mixed"], max_new_tokens=30, stop_strings=stop, tokenizer=_Characters()
    )
    assert output.new_tokens[0] == expected[:end]
    assert output.finish_reasons == ["stop_string"]


class _Streamer:
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_and_every_new_token(target, draft):
    prompt, streamer = prompts(1, 7), _Streamer()
    output = generate(target, draft, prompt, tree=TREES["mixed"], max_new_tokens=12, streamer=streamer)
    assert streamer.puts[0] == prompt[0].tolist()
    assert [token for put in streamer.puts[1:] for token in put] == output.new_tokens[0]
    assert streamer.ended


def test_inputs_and_models_are_left_as_they_were(target, draft):
    prompt, mask = prompts(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    before = prompt.clone(), mask.clone()
    weights = {name: value.clone() for name, value in target.state_dict().items()}
    plain = target(input_ids=prompt).logits
    generate(target, draft, prompt, mask, tree=TREES["mixed"], max_new_tokens=8, temperature=1.0)
    assert torch.equal(prompt, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(target(input_ids=prompt).logits, plain)
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())


def test_statistics_agree_with_one_another(target, draft):
    output = generate(target, draft, prompts(2, 7), tree=TREES["mixed"], max_new_tokens=25, temperature=0.7)
    stats = output.stats
    assert stats.new_tokens == [25, 25]
    assert sum(stats.accepted_histogram) == sum(stats.request_steps)
    accepted = sum(n * count for n, count in enumerate(stats.accepted_histogram))
    assert accepted == sum(stats.accepted_by_rank) + sum(stats.request_steps)  # drafted tokens and one bonus a step
    assert all(a <= v for a, v in zip(stats.accepted_by_rank, stats.visited_by_rank, strict=True))
    assert stats.visited_by_rank[0] >= stats.visited_by_rank[1]
    assert [len(nodes) for nodes in stats.last_nodes] == stats.request_steps
    path_lens = [TREES["mixed"].depths[node] + 1 for nodes in stats.last_nodes for node in nodes]
    assert [path_lens.count(n) for n in range(len(stats.accepted_histogram))] == stats.accepted_histogram
    assert set(stats.stage_seconds) == {"prefill", "draft", "sample", "target", "verify", "commit", "host"}
    assert 0 < stats.overhead_fraction < 1
    assert stats.to_dict()["tree"] == list(TREES["mixed"].parents)


def test_auto_measures_and_plans(target, draft):
    prompt = prompts(1, 8)
    output = generate(target, draft, prompt, max_new_tokens=12)
    assert output.new_tokens[0] == greedy(target, prompt[0], 12)
    assert output.stats.tree.num_nodes >= 1


def test_a_draft_larger_than_the_target_is_refused(target):
    with pytest.raises(ValueError, match="draft"):
        generate(target, tiny_llama(0, num_layers=6, hidden_size=64), prompts(1, 3), tree=TREES["two"])
