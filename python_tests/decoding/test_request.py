"""Stop strings: which token completes one, and what of the prompt counts."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import StopStringCriteria

from sequoia_kernels.decoding.request import Request, StopStrings
from sequoia_kernels.demo import held_out_prompts, load_demo_pair


@pytest.fixture(scope="module")
def tokenizer():
    return load_demo_pair().tokenizer


def tokens_of(tokenizer, *texts):
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]


def request(prompt, strings, tokenizer):
    return Request(prompt, 100, None, (), StopStrings(strings, tokenizer))


@pytest.mark.parametrize("seed", range(4))
def test_completed_by_the_same_token_as_in_transformers(tokenizer, seed):
    """Strings cut out of a text at random, so that they begin and end anywhere within tokens, also in the prompt."""
    generator = random.Random(seed)
    tokens = tokens_of(tokenizer, held_out_prompts(seed + 1)[seed])[:60]
    text = tokenizer.decode(tokens)
    found = 0
    for _ in range(25):
        start = generator.randrange(len(text) - 12)
        string = text[start : start + generator.randint(1, 12)]
        cut = generator.randint(1, len(tokens) - 1)
        theirs = StopStringCriteria(tokenizer, [string])
        ours = request(tokens[:cut], [string], tokenizer)
        ours.extend(tokens[cut:])
        ends = [end for end in range(cut + 1, len(tokens) + 1) if bool(theirs(torch.tensor([tokens[:end]]), None))]
        assert ours.new_tokens == tokens[cut : ends[0] if ends else None], string
        assert ours.finish_reason == ("stop_string" if ends else None)
        found += bool(ends)
    assert found >= 10


def test_a_string_may_begin_in_the_prompt_but_not_end_there(tokenizer):
    prompt, later = tokens_of(tokenizer, "def main\nde"), tokens_of(tokenizer, "f main(): pass")
    begun = request(prompt, ["def main"], tokenizer)
    begun.extend(later)
    assert tokenizer.decode(begun.new_tokens) == "f main"
    ended = request(prompt, ["def main\n"], tokenizer)
    ended.extend(later)
    assert ended.finish_reason is None
    assert ended.new_tokens == later


class Bytes:
    """A token is a byte; what is no character yet is a replacement character, as real tokenizers decode it."""

    def decode(self, tokens, skip_special_tokens=False):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_a_character_completed_by_its_last_byte():
    text = "a€b".encode()
    whole = request([97], ["€"], Bytes())
    whole.extend(list(text[1:]))
    assert whole.new_tokens == list("€".encode())
    assert whole.finish_reason == "stop_string"
    around = request([97], ["a€b"], Bytes())
    around.extend(list(text[1:]))
    assert around.new_tokens == list(text[1:])
    assert around.finish_reason == "stop_string"
