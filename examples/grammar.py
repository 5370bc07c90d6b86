"""Text that keeps to a grammar: XGrammar's matchers mask each node's logits, the draft's and the target's.

python examples/grammar.py [target draft]    (paths or ids; the demo pair of the package without; needs xgrammar)
"""

from __future__ import annotations

import json
import sys

import torch
import xgrammar
from transformers import AutoModelForCausalLM, AutoTokenizer

from sequoia_kernels import GrammarHook, TokenTree, generate
from sequoia_kernels.demo import demo_pair_folder

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["file", "folder"]},
    },
    "required": ["name", "size", "kind"],
}


def compile_schema(schema, tokenizer, vocab_size, stop_token_ids):
    """Compile a JSON schema for a tokenizer. vocab_size: width of the target's logits."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=stop_token_ids)
    return xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)


def decode(target, draft, tokenizer, prompts, schema, tree, temperature, seed=0):
    """Continue each prompt by one object of the schema. Returns the texts, and tokens per step."""
    stop = target.generation_config.eos_token_id
    grammar = compile_schema(schema, tokenizer, target.config.vocab_size, stop)
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = generate(
        target,
        draft,
        encoded.input_ids,
        encoded.attention_mask,
        tree=tree,
        max_new_tokens=96,
        temperature=temperature,
        seed=seed,
        logits_hook=GrammarHook([xgrammar.GrammarMatcher(grammar) for _ in prompts]),  # one a request, new ones a call
    )
    return output.texts(tokenizer), output.stats.tokens_per_step


if __name__ == "__main__":
    names = sys.argv[1:] or [str(demo_pair_folder() / role) for role in ("target", "draft")]
    target, draft = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in names)
    tokenizer = AutoTokenizer.from_pretrained(names[0])
    tokenizer.pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tree = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
    for temperature in (0.0, 1.0):
        texts, per_step = decode(target, draft, tokenizer, ["entry = ", "result = dict("], SCHEMA, tree, temperature)
        for text in texts:
            print(temperature, f"{per_step:.2f} tokens per step", json.loads(text))
