"""The loop with Hugging Face models: `adapt` makes them score trees, `TreeStep.of` says which nodes a forward feeds.

python examples/hugging_face.py [target draft]    (paths or ids; the demo pair of the package without)
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sequoia_kernels import (
    CacheTable,
    TokenTree,
    TreeStep,
    adapt,
    compact_kv_cache_,
    optimal_tree,
    prefill,
    sample_without_replacement,
    verify_tree,
)
from sequoia_kernels.demo import demo_pair_folder


@torch.inference_mode()
def decode(target, draft, prompts, prompt_lens, tree, num_tokens, temperature, seeds):
    """Continue prompts [B, L], padded on the right, by num_tokens each.

    target, draft: Hugging Face models. prompt_lens: [B] int32; seeds: one a request, [B] int64.
    """
    target, draft = adapt(target), adapt(draft)
    device, batch_size = target.device, len(prompts)
    whole_tree, pair = TreeStep.of(tree, device=device), TreeStep.of(TokenTree.chain(2), device=device)

    num_rows = prompts.shape[1] + num_tokens + tree.num_levels + tree.num_nodes
    target_cache, draft_cache = target.new_cache(batch_size, num_rows), draft.new_cache(batch_size, num_rows)
    table = CacheTable([*target_cache.tensors(), *draft_cache.tensors()])
    offsets = torch.zeros(batch_size, dtype=torch.int64, device=device)

    # The whole prompt is committed; the first new token is the bonus token of a tree of one node.
    prefill(draft, draft_cache, prompts, prompt_lens)
    logits = prefill(target, target_cache, prompts, prompt_lens)
    last = prompts.gather(1, prompt_lens[:, None].long() - 1)
    root = verify_tree(last, logits, None, TokenTree.single(), temperature, seeds, offsets).next_token
    last, cache_lens = last[:, 0], prompt_lens.clone()
    offsets += 1
    emitted = [[token] for token in root.tolist()]

    levels = []  # of each level: the nodes with children, and the step that feeds them
    for level in range(tree.num_levels - 1):
        nodes = tree.internal_nodes(level)
        levels.append((nodes, TreeStep.of(tree, nodes, device=device) if level > 0 else pair))
    tokens = torch.empty(batch_size, tree.num_nodes, dtype=torch.int64, device=device)
    draft_logits = torch.empty(batch_size, tree.num_nodes, target.vocab_size, device=device)
    while min(map(len, emitted)) < num_tokens:
        tokens[:, 0] = root
        for nodes, step in levels:
            if step is pair:  # the last committed token once more: it may be a leaf that the draft never saw
                fed = torch.stack((last, root), dim=1)
                logits = draft.forward(fed, draft_cache, cache_lens - 1, step)[:, 1:]
            else:
                logits = draft.forward(tokens[:, nodes].clamp(min=0), draft_cache, cache_lens, step)
            draft_logits[:, nodes] = logits.to(draft_logits.dtype)
            most = max(tree.num_children[node] for node in nodes)
            drawn = sample_without_replacement(
                draft_logits[:, nodes].flatten(0, 1),
                most,
                temperature,
                seeds.repeat_interleave(len(nodes)),
                (offsets[:, None] + torch.tensor(nodes, device=device)).flatten(),
            ).tokens.view(batch_size, len(nodes), most)
            for row, node in enumerate(nodes):
                tokens[:, tree.children(node)] = drawn[:, row, : tree.num_children[node]]

        target_logits = target.forward(tokens.clamp(min=0), target_cache, cache_lens, whole_tree)
        path = verify_tree(tokens, target_logits, draft_logits, tree, temperature, seeds, offsets)
        going_on = torch.tensor([len(text) < num_tokens for text in emitted], device=device)
        compact_kv_cache_(table, path.nodes, path.num_accepted * going_on, cache_lens)
        accepted = tokens.gather(1, path.nodes.clamp(min=0).long())
        last, root = accepted.gather(1, path.num_accepted[:, None].long() - 1)[:, 0], path.next_token
        offsets += tree.num_nodes
        for text, count, row, bonus in zip(emitted, path.num_accepted.tolist(), accepted.tolist(), root.tolist()):
            text.extend([*row[1:count], bonus])
    return torch.tensor([text[:num_tokens] for text in emitted])


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = sys.argv[1:] or [str(demo_pair_folder() / role) for role in ("target", "draft")]
    target, draft = (AutoModelForCausalLM.from_pretrained(name).to(device).eval() for name in names)
    tokenizer = AutoTokenizer.from_pretrained(names[0])
    prompts = [tokenizer(text).input_ids for text in ("def main(", "import os\nimport sys\n\nclass ")]
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    tree = optimal_tree([0.7, 0.12, 0.05, 0.03], budget=8)
    seeds = torch.tensor([1, 2], device=device)
    for temperature in (0.0, 1.0):
        for text in decode(target, draft, padded, prompt_lens, tree, 24, temperature, seeds):
            print(temperature, repr(tokenizer.decode(text)))
