"""A step that never waits for the device: static buffers, so that a CUDA graph can replay it.

Without a GPU the same steps run one by one.

python examples/captured_step.py
"""

from __future__ import annotations

import torch
from toy_model import ToyModel

from sequoia_kernels import CacheTable, TokenTree, compact_kv_cache_, sample_without_replacement, verify_tree


class Step:
    """Caches, state and buffers of one batch and tree. `run` reads and advances them in place."""

    def __init__(self, target, draft, prompts, tree, num_tokens, temperature, seeds):
        """Commit prompts [B, L] but for their last token. temperature: [B] float32; seeds: [B] int64."""
        device, (batch_size, length) = prompts.device, prompts.shape
        self.target, self.draft, self.tree, self.num_tokens = target, draft, tree, num_tokens
        self.temperature, self.seeds = temperature, seeds
        num_rows = length + num_tokens + tree.num_levels + tree.num_nodes
        self.target_cache, self.draft_cache = (model.new_cache(batch_size, num_rows) for model in (target, draft))
        self.table = CacheTable([*self.target_cache, *self.draft_cache])  # a graph needs it, and it needs to be kept

        # What was computed on the host is on the device before anything is captured.
        self.topology, self.pair = tree.tensors(device), TokenTree.chain(2).tensors(device)
        self.nodes, self.both = torch.arange(tree.num_nodes, device=device), torch.arange(2, device=device)
        self.columns = torch.arange(tree.num_levels, device=device)
        self.levels = []
        for level in range(tree.num_levels - 1):
            parents, children = tree.internal_nodes(level), tree.level_nodes(level + 1)
            most = max(tree.num_children[parent] for parent in parents)
            places = [parents.index(tree.parents[child]) * most + tree.rank(child) for child in children]
            self.levels.append((*(torch.tensor(part, device=device) for part in (parents, children, places)), most))

        self.cache_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        chain, rows = TokenTree.chain(length - 1).tensors(device), torch.arange(length - 1, device=device)
        for model, cache in ((target, self.target_cache), (draft, self.draft_cache)):
            model.forward(prompts[:, :-1], chain, rows, self.cache_lens, cache)
        self.cache_lens += length - 1
        self.last, self.root = prompts[:, -2].clone(), prompts[:, -1].clone()
        self.offsets = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch_size, tree.num_nodes, dtype=torch.int64, device=device)
        vocab = target.weights["head"].shape[1]
        self.draft_logits = torch.zeros(batch_size, tree.num_nodes, vocab, device=device)
        # The last column takes what is dropped.
        width = num_tokens + tree.num_levels + 1
        self.emitted = torch.zeros(batch_size, width, dtype=torch.int64, device=device)
        self.num_emitted = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def run(self):
        """Draft, verify, commit."""
        self.tokens[:, 0] = self.root
        for level, (parents, children, places, most) in enumerate(self.levels):
            if level == 0:  # the last committed token may be a leaf that the draft never saw
                fed = torch.stack((self.last, self.root), dim=1)
                logits = self.draft.forward(fed, self.pair, self.both, self.cache_lens - 1, self.draft_cache)[:, 1:]
            else:
                fed = self.tokens[:, parents]
                logits = self.draft.forward(fed, self.topology, parents, self.cache_lens, self.draft_cache)
            self.draft_logits[:, parents] = logits
            drawn = sample_without_replacement(
                logits.flatten(0, 1),
                most,
                self.temperature.repeat_interleave(len(parents)),
                self.seeds.repeat_interleave(len(parents)),
                (self.offsets[:, None] + parents).flatten(),
            ).tokens
            self.tokens[:, children] = drawn.view(len(self.tokens), -1)[:, places]

        logits = self.target.forward(self.tokens, self.topology, self.nodes, self.cache_lens, self.target_cache)
        path = verify_tree(
            self.tokens, logits, self.draft_logits, self.topology, self.temperature, self.seeds, self.offsets
        )

        going_on = self.num_emitted < self.num_tokens
        num_accepted = path.num_accepted * going_on
        compact_kv_cache_(self.table, path.nodes, num_accepted, self.cache_lens)
        accepted = self.tokens.gather(1, path.nodes.clamp(min=0).long())
        end = path.num_accepted[:, None].long() - 1
        emitted = torch.cat((accepted[:, 1:], path.next_token[:, None]), dim=1).scatter(
            1, end, path.next_token[:, None]
        )
        places = self.num_emitted[:, None] + self.columns
        places = torch.where(self.columns < num_accepted[:, None], places, self.emitted.shape[1] - 1)
        self.emitted.scatter_(1, places, emitted)
        self.num_emitted += num_accepted
        self.last.copy_(accepted.gather(1, end)[:, 0])
        self.root.copy_(path.next_token)
        self.offsets += self.tree.num_nodes


@torch.inference_mode()
def decode(target, draft, prompts, tree, num_tokens, temperature, seeds):
    """Continue prompts [B, L >= 2] by num_tokens each. temperature: [B] float32; seeds: [B] int64."""
    step = Step(target, draft, prompts, tree, num_tokens, temperature, seeds)
    run = step.run
    if prompts.is_cuda:
        # Two steps as they are: kernels are compiled and memory is allocated. Capturing runs nothing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step.run()
            step.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()
        run = graph.replay
    while int(step.num_emitted.min()) < num_tokens:  # the one place that waits
        run()
    return step.emitted[:, :num_tokens].cpu()


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = ToyModel(vocab=50).to(device)
    prompts = torch.tensor([[7, 3, 11], [2, 40, 5]], device=device)
    temperature, seeds = torch.tensor([0.0, 1.0], device=device), torch.tensor([1, 2], device=device)
    tree = TokenTree([-1, 0, 0, 1, 1, 2, 3])
    print(decode(target, target.noisy(0.1), prompts, tree, 16, temperature, seeds).tolist())
