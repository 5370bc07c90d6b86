"""Drafts whose tokenizer is another one than the target's."""

from __future__ import annotations

import copy

import pytest
import torch
from support.shaped_trees import steep_confidence
from support.tiny_models import noisy_copy, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sequoia_kernels import TokenTree, generate, hf
from sequoia_kernels.drafts import ModelDraft, draft_source, host_growth, pair_tokens
from sequoia_kernels.drafts.vocabulary import token_texts
from sequoia_kernels.models import adapt
from sequoia_kernels.tree import ShapedTree

VOCAB = 40
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7])
SHAPED = ShapedTree((1, 2, 3, 2), steep_confidence())


def tokenizer(pieces, *, by_bytes=True, eos=None) -> PreTrainedTokenizerFast:
    """A tokenizer of these pieces, by id; words are written with the longest piece first."""
    vocab = {piece: token for token, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token=pieces[0], continuing_subword_prefix=""))
    if by_bytes:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    if eos is not None:
        made.add_special_tokens({"eos_token": AddedToken(eos, special=True)})
    return made


LETTERS = [f"w{index}" for index in range(VOCAB - 1)]


def permuted(model, order):
    """The same model whose token order[i] is token i of the given one."""
    copy = noisy_copy(model, 0.0)
    for module in (copy.model.embed_tokens, copy.lm_head):
        weight = torch.empty_like(module.weight)
        weight[order] = module.weight
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return copy


def renamed_pair(seed=0):
    """A target with its tokenizer, a draft, and the draft with its tokens in another order with its tokenizer."""
    target = tiny_llama(3, vocab_size=VOCAB, sharpness=4.0, num_layers=2)
    draft = noisy_copy(target, 0.3)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    order = torch.cat((order[order != VOCAB - 1], torch.tensor([VOCAB - 1])))  # the end stays, as it is added last
    pieces = [""] * (VOCAB - 1)
    for token, place in enumerate(order[:-1].tolist()):
        pieces[place] = LETTERS[token]
    names = tokenizer(LETTERS, eos="<end>"), tokenizer(pieces, eos="<end>")
    return target, draft, permuted(draft, order), names


# ---- texts ----


def test_texts_of_byte_level_and_word_start_pieces_are_the_same_bytes():
    of_bytes = token_texts(tokenizer(["Ġthe", "the", "Ċ", "Ã©", "\u0120\u0120"]))
    assert list(of_bytes.values()) == [b" the", b"the", b"\n", "é".encode(), b"  "]
    of_words = token_texts(tokenizer(["\u2581the", "the", "<0x0A>", "é", "\u2581\u2581"], by_bytes=False))
    assert list(of_words.values()) == list(of_bytes.values())


def test_special_tokens_go_by_name_and_ends_by_their_part():
    one = tokenizer(["Ġa", "b", "c"], eos="<|end|>")
    other = tokenizer(["\u2581a", "c", "<|end|>x"], by_bytes=False, eos="</s>")
    found = pair_tokens(one, other, 4, 4)
    assert found.vocabulary.draft_to_target.tolist() == [0, 2, 3]
    assert found.own_ids.tolist() == [0, 1, 3]
    same_name = tokenizer(["x", "b"], eos="<|end|>")
    assert pair_tokens(one, same_name, 4, 3).own_ids.tolist() == [1, 2]


def test_unknown_tokens_are_fed_as_the_last_piece_of_their_text():
    one = tokenizer(["ab", "a", "b", "abc", "q"])
    other = tokenizer(["?", "b", "a", "c", "bc"])
    found = pair_tokens(one, other, 5, 5)
    assert found.fed_ids[1:3].tolist() == [2, 1]  # known
    assert found.fed_ids[0] == 1  # "ab" is "a" and "b"
    assert found.fed_ids[3] == 4  # "abc" is "a" and "bc"
    assert found.fed_ids[4] == 0  # nothing writes "q"


def test_equal_vocabularies_need_no_pairing_and_pairings_are_kept():
    one, other = tokenizer(LETTERS), tokenizer(LETTERS)
    assert pair_tokens(one, other, VOCAB, VOCAB) is None
    shorter = tokenizer(LETTERS[:20])
    assert pair_tokens(one, shorter, VOCAB, 20) is None  # padding, or a part of it
    turned = tokenizer(LETTERS[::-1])
    assert pair_tokens(one, turned, VOCAB - 1, VOCAB - 1) is pair_tokens(one, turned, VOCAB - 1, VOCAB - 1)
    turned.add_tokens(["new"])
    assert len(pair_tokens(one, turned, VOCAB, VOCAB).own_ids) == VOCAB - 1


def test_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match="draft_tokenizer must have a token in common with the target's, got none"):
        pair_tokens(tokenizer(["a", "b"]), tokenizer(["c", "d"]), 2, 2)
    with pytest.raises(TypeError, match="draft_tokenizer must be a tokenizer of transformers, got str"):
        pair_tokens(tokenizer(["a", "b"]), "words", 2, 2)
    target, _, draft, (name, other) = renamed_pair()
    with pytest.raises(TypeError, match="tokenizer must be given with draft_tokenizer, got None"):
        generate(target, draft, torch.tensor([[1]]), draft_tokenizer=other)
    pairing = pair_tokens(name, other, VOCAB, VOCAB)
    bigger = adapt(tiny_llama(1, vocab_size=VOCAB + 1, num_layers=3))
    with pytest.raises(
        ValueError, match=f"pairing must be made for the target's {VOCAB + 1} tokens, got one for {VOCAB}"
    ):
        ModelDraft(adapt(draft), pairing).check_target(bigger)


# ---- decoding ----


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", [TREE, SHAPED, (TREE, TREE)], ids=["tree", "shaped", "each"])
def test_a_draft_in_another_order_guesses_as_the_same_draft(native, temperature, tree, monkeypatch):
    target, draft, renamed, (name, other) = renamed_pair()
    if not native:
        monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *arguments: None))
    prompts = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
    options = {"tree": tree, "max_new_tokens": 40, "temperature": temperature, "seed": 4}
    output = generate(target, renamed, prompts, tokenizer=name, draft_tokenizer=other, **options)
    if temperature == 0:  # draws are keyed by the draft's own ids: other draws of the same distribution
        wanted = generate(target, draft, prompts, **options)
        assert output.new_tokens == wanted.new_tokens
        assert output.stats.accepted_histogram == wanted.stats.accepted_histogram
        blind = generate(target, renamed, prompts, **options)  # ids taken for the target's
        assert blind.stats.tokens_per_step < output.stats.tokens_per_step
    assert output.stats.tokens_per_step > 1.8


def test_native_growth_draws_what_the_ops_draw(monkeypatch):
    target, _, renamed, (name, other) = renamed_pair()
    prompts = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
    options = {"tree": TREE, "max_new_tokens": 40, "temperature": 1.0, "tokenizer": name, "draft_tokenizer": other}
    native = generate(target, renamed, prompts, **options)
    monkeypatch.setattr(host_growth.HostGrowth, "bind", classmethod(lambda cls, *arguments: None))
    assert generate(target, renamed, prompts, **options).new_tokens == native.new_tokens


def test_lookup_and_positions_go_with_other_tokens():
    target, _, renamed, (name, other) = renamed_pair()
    renamed.config.max_position_embeddings = 24
    prompts = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(2)).repeat(1, 3)
    options = {"max_new_tokens": 60, "tokenizer": name, "draft_tokenizer": other, "tree": TREE, "lookup": True}
    output = generate(target, renamed, prompts, **options)
    assert output.new_tokens == generate(target, None, prompts, max_new_tokens=60).new_tokens
    assert output.stats.lookup_steps > 0 and output.stats.draft_restarts > 0


def test_a_planned_call_learns_of_the_pair_with_its_tokens(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQUOIA_CACHE_DIR", str(tmp_path))
    target, _, renamed, (name, other) = renamed_pair()
    paired = draft_source(renamed, adapt(target), tokenizer=name, draft_tokenizer=other)
    assert paired.vocab_size == VOCAB and paired.identity != draft_source(renamed).identity
    prompt = torch.tensor([[1, 2, 3]])
    output = generate(target, paired, prompt, max_new_tokens=24)
    assert output.new_tokens == generate(target, None, prompt, max_new_tokens=24).new_tokens


def test_word_pieces_are_compared_by_text():
    vocab = {piece: token for token, piece in enumerate(["[UNK]", "the", "##ing", ".", "fox"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix="##"))
    words = token_texts(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert list(words.values())[1:] == [b" the", b"ing", b".", b" fox"]


def test_a_draft_that_cannot_be_fed_all_that_it_predicts():
    """Its embedding is shorter than its head; and a target's end may lie behind its own head."""
    target, _, renamed, (name, other) = renamed_pair()
    renamed.model.embed_tokens.weight = torch.nn.Parameter(renamed.model.embed_tokens.weight[:25].clone(), False)
    renamed.model.embed_tokens.num_embeddings = 25
    prompts = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
    for lookup in (False, True):
        options = {"tokenizer": name, "draft_tokenizer": other, "tree": TREE, "lookup": lookup, "max_new_tokens": 30}
        output = generate(target, renamed, prompts, **options)
        assert output.new_tokens == generate(target, None, prompts, max_new_tokens=30).new_tokens
    late = tokenizer(LETTERS, eos="<late>")
    assert pair_tokens(late, other, VOCAB - 1, VOCAB).vocabulary.vocab_size == VOCAB - 1


def test_pairings_are_found_again_and_made_anew_where_an_end_changes():
    one, turned = tokenizer(LETTERS, eos="<a>"), tokenizer(LETTERS[::-1], eos="<b>")
    found = pair_tokens(one, turned, VOCAB, VOCAB)
    assert pair_tokens(one, turned, VOCAB, VOCAB, "cpu") is found
    turned.eos_token = LETTERS[0]
    assert pair_tokens(one, turned, VOCAB, VOCAB) is not found


def test_a_part_of_the_targets_vocabulary_is_paired_where_it_is_more_than_padding():
    names = [f"t{index}" for index in range(2000)]
    found = pair_tokens(tokenizer(names), tokenizer(names[:700]), 2000, 700)
    assert torch.equal(found.own_ids, torch.arange(700))


def test_transformers_own_generate_hands_both_tokenizers_on():
    target, _, renamed, (name, other) = renamed_pair()
    renamed.config, renamed.model.layers = copy.deepcopy(renamed.config), renamed.model.layers[:1]
    renamed.config.num_hidden_layers = 1
    renamed.resize_token_embeddings(VOCAB + 4)  # transformers takes heads of one size for one vocabulary
    prompt = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(2))
    wanted = generate(target, None, prompt, max_new_tokens=30, eos_token_id=()).new_tokens[0]
    output = target.generate(
        prompt, do_sample=False, max_new_tokens=30, custom_generate=hf.custom_generate, assistant_model=renamed,
        tokenizer=name, assistant_tokenizer=other, tree=TREE, return_dict_in_generate=True,
    )  # fmt: skip
    assert output.sequences[0, 6:].tolist() == wanted
    assert TREE in output.stats.steps_by_tree
