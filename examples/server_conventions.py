"""A step in a server's conventions: linked trees, global rows, flat slot lists; each request has its own tree.

Trees are numbered depth first here, as a server is free to do. A slot holds one row, so nothing has to be moved: the
server keeps the accepted slots and frees the others.

python examples/server_conventions.py
"""

from __future__ import annotations

import torch
from toy_model import ToyModel

from sequoia_kernels import TokenTree, sample_without_replacement, verify_tree
from sequoia_kernels.interop import SlotLists, committed_lens, from_retrieve, from_slot_lists, to_accepted_rows

# Parents of each node, depth first. One tree has fewer nodes than the others: its last two are linked to nothing.
TREES = ([-1, 0, 1, 1, 0, 4], [-1, 0, 1, 2, 0, 0], [-1, 0, 1, 0, None, None])
NUM_NODES, NUM_LEVELS, MAX_BRANCHING = 6, 4, 3


def link(parents):
    """Link a tree as servers do: each node's first child, and the next child of its parent; -1 for none."""
    next_token, next_sibling = [-1] * NUM_NODES, [-1] * NUM_NODES
    for node in reversed(range(1, NUM_NODES)):
        if parents[node] is not None:
            next_sibling[node], next_token[parents[node]] = next_token[parents[node]], node
    return next_token, next_sibling


@torch.inference_mode()
def verify_step(target, pages, lists, seq_lens, max_rows, candidates, draft_logits, links, temperature, seeds, offsets):
    """Verify what a server has drafted.

    Args:
        pages: keys and values of all slots. [slots, 1, heads, head_dim] each.
        lists: slots of every request, the committed rows' first, then the nodes' in the server's order.
        seq_lens: rows of every request, the tree's included. [B] int32.
        max_rows: none has more.
        candidates: tokens of the nodes, in the server's order. [B, N] int64.
        draft_logits: logits that each node's children were drawn from, in the same order. [B, N, vocab].
        links: retrive_next_token and retrive_next_sibling. [B, N] int64 each.

    Returns:
        predicts [B * N], accept_index [B, levels] and accept_token_num [B], int32.
    """
    # The bounds are known, so that nothing waits for the device.
    tree = from_retrieve(*links, num_levels=NUM_LEVELS, max_branching=MAX_BRANCHING)
    cache_lens = committed_lens(seq_lens, NUM_NODES)
    slots = from_slot_lists(lists.indptr, lists.indices, max_rows)
    # Our node i lies in row cache_lens + i, so the slots of the tree's rows are put into our order as well.
    rows = cache_lens[:, None] + torch.arange(NUM_NODES, device=slots.device)
    block_table = slots.scatter(1, rows.long(), slots.gather(1, cache_lens[:, None] + tree.order))
    tokens = candidates.gather(1, tree.order)
    draft_logits = draft_logits.gather(1, tree.order[:, :, None].expand_as(draft_logits))
    nodes = torch.arange(NUM_NODES, device=slots.device)
    target_logits = target.forward(tokens, tree.topology, nodes, cache_lens, pages, block_table)
    path = verify_tree(tokens, target_logits, draft_logits, tree.topology, temperature, seeds, offsets)
    return to_accepted_rows(path, tokens, order=tree.order)


@torch.inference_mode()
def decode(target, bigrams, prompts, num_tokens, temperature, seeds):
    """Serve prompts [B, L]: a draft of bigrams, [vocab, vocab] logits, and a pool of slots. seeds: [B] int64."""
    device, (batch_size, length) = prompts.device, prompts.shape
    num_slots = batch_size * (length + num_tokens + NUM_LEVELS + NUM_NODES)
    pages = target.new_cache(num_slots, 1)
    free = torch.randperm(num_slots, generator=torch.Generator().manual_seed(0)).tolist()
    held = [[free.pop() for _ in range(length - 1)] for _ in range(batch_size)]

    # All but the prompts' last token is committed; that is the first root.
    prompt, places = TokenTree.chain(length - 1).tensors(device), torch.arange(length - 1, device=device)
    nothing = torch.zeros(batch_size, dtype=torch.int32, device=device)
    table = torch.tensor(held, dtype=torch.int32, device=device)
    target.forward(prompts[:, :-1], prompt, places, nothing, pages, table)
    root, offsets = prompts[:, -1], torch.zeros(batch_size, dtype=torch.int64, device=device)

    emitted = [[] for _ in range(batch_size)]
    step = 0
    while min(map(len, emitted)) < num_tokens:
        # Which tree a request gets must not depend on what is drawn in it.
        trees = [TREES[(request + step) % len(TREES)] for request in range(batch_size)]
        candidates, draft_logits = draft(bigrams, trees, root, temperature, seeds, offsets)
        links = [torch.tensor(part, device=device) for part in zip(*map(link, trees))]
        out_cache_loc = [[free.pop() for _ in range(NUM_NODES)] for _ in range(batch_size)]
        lens = torch.tensor([len(slots) + NUM_NODES for slots in held], dtype=torch.int32, device=device)
        listed = [slot for mine, new in zip(held, out_cache_loc) for slot in mine + new]
        indptr = torch.cat((nothing[:1], lens.cumsum(0, dtype=torch.int32)))
        lists = SlotLists(indptr, torch.tensor(listed, dtype=torch.int32, device=device))

        drafted = candidates, draft_logits, links
        max_rows = max(map(len, held)) + NUM_NODES
        rows = verify_step(target, pages, lists, lens, max_rows, *drafted, temperature, seeds, offsets)

        root = rows.predicts[rows.accept_index.gather(1, rows.accept_token_num[:, None].long())[:, 0]].long()
        offsets += NUM_NODES
        step += 1
        predicts = rows.predicts.tolist()
        for request, accept_index in enumerate(rows.accept_index.tolist()):
            goes_on = len(emitted[request]) < num_tokens
            kept = [row for row in accept_index if row >= 0]
            emitted[request].extend(predicts[row] for row in kept)
            for node, slot in enumerate(out_cache_loc[request]):
                if not (goes_on and request * NUM_NODES + node in kept):
                    free.append(slot)
            if goes_on:
                held[request].extend(out_cache_loc[request][row % NUM_NODES] for row in kept)
    return torch.tensor([text[:num_tokens] for text in emitted])


def draft(bigrams, trees, root, temperature, seeds, offsets):
    """Draw every request's tree in the server's order of nodes, a level a round."""
    device, batch_size = root.device, len(trees)
    nodes = torch.arange(NUM_NODES, device=device)
    parents = torch.tensor([[-1 if parent is None else parent for parent in tree] for tree in trees], device=device)
    ranks = torch.tensor(
        [[tree[:node].count(tree[node]) for node in range(NUM_NODES)] for tree in trees], device=device
    )
    candidates = torch.zeros(batch_size, NUM_NODES, dtype=torch.int64, device=device)
    candidates[:, 0] = root
    for _ in range(NUM_LEVELS - 1):
        # All nodes draw in every round, from the same noise as before: what is known already comes out again.
        drawn = sample_without_replacement(
            bigrams[candidates].flatten(0, 1),
            MAX_BRANCHING,
            temperature,
            seeds.repeat_interleave(NUM_NODES),
            (offsets[:, None] + nodes).flatten(),
        ).tokens.view(batch_size, -1)
        children = drawn.gather(1, parents.clamp(min=0) * MAX_BRANCHING + ranks.clamp(max=MAX_BRANCHING - 1))
        candidates = torch.where(parents < 0, candidates, children)
    return candidates, bigrams[candidates]


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = ToyModel(vocab=50).to(device)
    prompts = torch.tensor([[7, 3, 11], [2, 40, 5], [5, 5, 9]], device=device)
    seeds = torch.tensor([1, 2, 3], device=device)
    for temperature in (0.0, 1.0):
        print(temperature, decode(target, target.bigrams(), prompts, 16, temperature, seeds).tolist())
