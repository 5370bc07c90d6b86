"""Grammars on trees: what comes out is allowed, and distributed as plain sampling from masked logits."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from support.chi_square import p_value, sequence_counts
from support.examples import example
from support.tiny_models import noisy_copy, tiny_llama
from transformers import LogitsProcessorList

from sequoia_kernels import GrammarHook, TokenTree, generate
from sequoia_kernels.demo import load_demo_pair

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
VOCAB = 6
END = 5


class Rising:
    """A grammar of one's own: a token is at most two above the one before, modulo 5, and END may come behind a 4."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def allowed(self) -> list[int]:
        if not self.tokens:
            return [0, 1]
        last = self.tokens[-1]
        return sorted({(last + step) % 5 for step in (1, 2)}) + ([END] if last == 4 else [])

    def accept_token(self, token_id: int) -> bool:
        fits = not self.is_terminated() and token_id in self.allowed()
        if fits:
            self.tokens.append(token_id)
        return fits

    def rollback(self, num_tokens: int = 1) -> None:
        assert num_tokens <= len(self.tokens)
        del self.tokens[len(self.tokens) - num_tokens :]

    def is_terminated(self) -> bool:
        return self.tokens[-1:] == [END]

    def fill_next_token_bitmask(self, bitmask: torch.Tensor, index: int = 0) -> None:
        assert not self.is_terminated()
        bitmask[index] = sum(1 << token for token in self.allowed())


def pair():
    target = tiny_llama(7, vocab_size=VOCAB, sharpness=6.0)
    return target, noisy_copy(target, 0.4)


def plainly(target, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding of masked logits, token by token."""
    matcher, tokens = Rising(), list(prompt)
    while len(tokens) < len(prompt) + num_tokens and not matcher.is_terminated():
        with torch.inference_mode():
            logits = target(input_ids=torch.tensor([tokens])).logits[0, -1]
        tokens.append(max(matcher.allowed(), key=lambda token: float(logits[token])))
        assert matcher.accept_token(tokens[-1])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("tree", [TREE, TokenTree.chain(5), TokenTree.single()], ids=["tree", "chain", "one node"])
def test_greedy_text_is_that_of_masked_logits(tree):
    target = tiny_llama(9, vocab_size=VOCAB, sharpness=6.0)
    draft = noisy_copy(target, 0.4)
    prompts = torch.randint(1, 5, (4, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    mask[2, :3] = 0
    wanted = [plainly(target, row[kept.bool()].tolist(), 25) for row, kept in zip(prompts, mask, strict=True)]
    matchers = [Rising() for _ in wanted]
    output = generate(
        target, draft, prompts, mask, tree=tree, max_new_tokens=25, eos_token_id=END, logits_hook=GrammarHook(matchers)
    )
    assert output.new_tokens == wanted
    assert len({len(tokens) for tokens in wanted}) > 1  # some end, at different places


def test_the_joint_distribution_is_that_of_masked_logits():
    target, draft = pair()
    prompt, num_samples, length = torch.tensor([2, 1, 4]), 5000, 4
    joint = torch.zeros([VOCAB] * length, dtype=torch.float64)
    for path in itertools.product(range(VOCAB), repeat=length):
        matcher, probability = Rising(), 1.0
        for depth, token in enumerate(path):
            if matcher.is_terminated():
                probability *= token == END  # the output is padded with it
                continue
            with torch.inference_mode():
                ids = torch.cat((prompt, torch.tensor(path[:depth], dtype=torch.int64)))
                logits = target(input_ids=ids[None]).logits[0, -1].double()
            masked = torch.full_like(logits, -torch.inf)
            masked[matcher.allowed()] = logits[matcher.allowed()]
            probability *= float(masked.softmax(-1)[token])
            if not matcher.accept_token(token):
                break
        joint[path] = probability
    assert abs(float(joint.sum()) - 1) < 1e-9
    for source in (draft, target):
        output = generate(
            target, source, prompt.repeat(num_samples, 1), tree=TREE, max_new_tokens=length, temperature=1.0,
            seed=range(num_samples), eos_token_id=END, pad_token_id=END,
            logits_hook=GrammarHook([Rising() for _ in range(num_samples)]),
        )  # fmt: skip
        rows = torch.full((num_samples, length), END)
        rows[:, : output.sequences.shape[1] - 3] = output.sequences[:, 3:]
        assert p_value(sequence_counts(rows, VOCAB), joint) > 1e-4


def test_other_processors_run_behind_the_grammar():
    target, draft = pair()
    prompt = torch.tensor([[2, 1, 4]])
    options = {"tree": TREE, "max_new_tokens": 12, "eos_token_id": END, "temperature": 1.0}
    for seed in range(20):
        matcher = Rising()
        output = generate(
            target, draft, prompt, **options, seed=seed, logits_hook=GrammarHook([matcher]), min_p=0.3,
            repetition_penalty=1.2,
        )  # fmt: skip
        replayed = Rising()
        assert all(replayed.accept_token(token) for token in output.new_tokens[0])


def test_a_stop_token_that_the_grammar_does_not_know_is_an_error():
    target, draft = pair()

    class Open(Rising):
        def fill_next_token_bitmask(self, bitmask, index=0):
            bitmask[index] = -1

    with pytest.raises(ValueError, match=r"GrammarHook: token \d, new token \d+ of request 0, must be one that"):
        generate(
            target, draft, torch.tensor([[2, 1, 4]]), tree=TREE, max_new_tokens=30, temperature=1.0, eos_token_id=(),
            logits_hook=GrammarHook([Open()]),
        )  # fmt: skip


class Only(Rising):
    """Some tokens only, and nothing behind a given text."""

    def __init__(self, tokens, dead_end=None) -> None:
        super().__init__()
        self.only, self.dead_end = tokens, dead_end

    def allowed(self) -> list[int]:
        return [] if self.tokens == self.dead_end else self.only

    def is_terminated(self) -> bool:
        return False


@pytest.mark.parametrize("ahead", [0, 1], ids=["read at once", "read a step late"])
def test_ends_are_kept_where_tokens_are_read_late(monkeypatch, ahead):
    monkeypatch.setattr("sequoia_kernels.decoding.loop.steps_ahead", lambda target: ahead)  # as on a GPU
    target = tiny_llama(9, vocab_size=VOCAB, sharpness=6.0)
    prompts = torch.randint(1, 5, (4, 7), generator=torch.Generator().manual_seed(2))
    output = generate(
        target, target, prompts, tree=TokenTree.chain(5), max_new_tokens=25, eos_token_id=END,
        logits_hook=GrammarHook([Rising() for _ in prompts]),
    )  # fmt: skip
    assert output.new_tokens == [plainly(target, row.tolist(), 25) for row in prompts]


def test_a_draft_need_not_know_what_is_allowed():
    target, _ = pair()
    narrow = tiny_llama(5, vocab_size=4)
    hook = GrammarHook([Only([4, 5])])
    output = generate(
        target, narrow, torch.tensor([[2, 1, 3]]), tree=TREE, max_new_tokens=12, eos_token_id=(), logits_hook=hook
    )
    hook = GrammarHook([Only([4, 5])])
    wanted = generate(target, None, torch.tensor([[2, 1, 3]]), max_new_tokens=12, eos_token_id=(), logits_hook=hook)
    assert output.new_tokens == wanted.new_tokens
    assert set(output.new_tokens[0]) <= {4, 5}


@pytest.mark.parametrize("with_processors", [False, True])
def test_a_place_where_nothing_is_allowed_is_an_error_where_it_is_reached(with_processors):
    target, draft = pair()
    tokens = [0, 1, 2, 3, 4]
    options = {"tree": TREE, "max_new_tokens": 9, "eos_token_id": ()}
    if with_processors:
        options["repetition_penalty"] = 1.01
    prompt = torch.tensor([[2, 1, 4]])

    def text(dead_end):
        return generate(target, draft, prompt, **options, logits_hook=GrammarHook([Only(tokens, dead_end)])).new_tokens

    wanted = text(None)
    assert text([*wanted[0][:3], (wanted[0][3] + 1) % 5]) == wanted  # off the path
    assert text(wanted[0]) == wanted  # behind the last token that is wanted
    for place in (0, 1, 2, 5, 8):
        message = f"GrammarHook: matchers must allow .* request 0 allows none behind {place} new tokens"
        with pytest.raises(ValueError, match=message):
            text(wanted[0][:place])


def test_arguments():
    target, draft = pair()
    with pytest.raises(TypeError, match="GrammarHook: matchers must have rollback, got Half"):
        GrammarHook([type("Half", (), {"accept_token": lambda self, token: True})()])
    with pytest.raises(ValueError, match="matchers must be one for each of 2 requests, got 1"):
        generate(target, draft, torch.tensor([[2, 1], [1, 1]]), tree=TREE, logits_hook=GrammarHook([Rising()]))


# ---- XGrammar


def xgrammar():
    return pytest.importorskip("xgrammar")


def test_every_output_of_a_schema_parses():
    xgrammar()
    pair = load_demo_pair()
    grammar = example("grammar")
    pair.tokenizer.pad_token_id = 0
    steps = []
    for seed in range(4):
        prompts = ["entry = ", "result = dict(", "{"]
        texts, per_step = grammar.decode(
            pair.target, pair.draft, pair.tokenizer, prompts, grammar.SCHEMA, TREE, 1.0, seed
        )
        steps.append(per_step)
        for text in texts:
            entry = json.loads(text)
            assert set(entry) == {"name", "size", "kind"}
            assert 0 <= entry["size"] <= 999
            assert entry["kind"] in ("file", "folder")
    assert min(steps) > 1.5


def test_greedy_text_is_that_of_xgrammars_own_processor():
    xgr = xgrammar()
    from xgrammar.contrib.hf import LogitsProcessor

    pair = load_demo_pair()
    grammar = example("grammar")
    compiled = grammar.compile_schema(grammar.SCHEMA, pair.tokenizer, pair.target.config.vocab_size, 0)
    for text in ("entry = ", "def f(x):\n    return "):
        inputs = pair.tokenizer(text, return_tensors="pt")
        wanted = pair.target.generate(
            **inputs, max_new_tokens=60, logits_processor=LogitsProcessorList([LogitsProcessor(compiled)])
        )
        output = generate(
            pair.target, pair.draft, **inputs, tree=TREE, max_new_tokens=60,
            logits_hook=GrammarHook([xgr.GrammarMatcher(compiled)]),
        )  # fmt: skip
        assert output.sequences.tolist() == wanted.tolist()
        json.loads(output.texts(pair.tokenizer)[0])
    with pytest.raises(ValueError, match="a grammar's matcher goes into a GrammarHook"):
        generate(pair.target, pair.draft, **inputs, tree=TREE, logits_processor=[LogitsProcessor(compiled)])


def test_sampled_text_of_a_grammar_of_xgrammar_is_that_of_masked_logits():
    xgr = xgrammar()
    info = xgr.TokenizerInfo(["a", "b", "ab", "ba", "(", "</s>"], vocab_size=VOCAB, stop_token_ids=[END])
    compiled = xgr.GrammarCompiler(info).compile_grammar('root ::= "(" [ab] [ab]? [a]? | [a]+ "b"')
    target, draft = pair()
    prompt, num_samples, length = torch.tensor([2, 1, 4]), 4000, 4

    def allowed(matcher) -> torch.Tensor:
        mask = torch.zeros(1, 1, dtype=torch.int32)
        matcher.fill_next_token_bitmask(mask)
        return (mask[0, 0] >> torch.arange(VOCAB, dtype=torch.int32) & 1).bool()

    joint = torch.zeros([VOCAB] * length, dtype=torch.float64)
    for path in itertools.product(range(VOCAB), repeat=length):
        matcher, probability = xgr.GrammarMatcher(compiled), 1.0
        for depth, token in enumerate(path):
            if matcher.is_terminated():
                probability *= token == END
                continue
            with torch.inference_mode():
                ids = torch.cat((prompt, torch.tensor(path[:depth], dtype=torch.int64)))
                logits = target(input_ids=ids[None]).logits[0, -1].double()
            probability *= float(logits.masked_fill(~allowed(matcher), -torch.inf).softmax(-1)[token])
            if not probability or not matcher.accept_token(token):
                break
        joint[path] = probability
    assert abs(float(joint.sum()) - 1) < 1e-9
    assert int((joint > 0).sum()) > 8
    output = generate(
        target, draft, prompt.repeat(num_samples, 1), tree=TREE, max_new_tokens=length, temperature=1.0,
        seed=range(num_samples), eos_token_id=END, pad_token_id=END,
        logits_hook=GrammarHook([xgr.GrammarMatcher(compiled) for _ in range(num_samples)]),
    )  # fmt: skip
    rows = torch.full((num_samples, length), END)
    rows[:, : output.sequences.shape[1] - 3] = output.sequences[:, 3:]
    assert p_value(sequence_counts(rows, VOCAB), joint) > 1e-4
