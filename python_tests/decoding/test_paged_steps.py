"""A loop of one's own on pages: the draft grows in one call, the target verifies, both compact; generate's tokens."""

from __future__ import annotations

import random

import pytest
import torch
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.drafts import DecodingState, StageClock, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.host_growth import HostGrowth
from sequoia_kernels.models import TreeModel, prefill
from sequoia_kernels.ops import CacheTable, compact_kv_cache_, verify_tree

VOCAB = 24
TARGET = adapt(tiny_llama(3, vocab_size=VOCAB, sharpness=6.0), forward="native")
DRAFT = adapt(noisy_copy(TARGET.model, 0.4), forward="native")
PROMPTS = [[4, 9, 2, 7, 3, 20, 11], [5, 1], [8, 6, 0, 13, 13, 2, 9, 4, 1, 22, 17, 3, 5]]
TREES = (
    TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 5]),
    TokenTree([-1, 0, 0, 0, 2, 2, 2, 4, 4]),
    TokenTree([-1, 0, 0, 0, 1, 2, 3, 6, 6]),
)
SEEDS, TEMPERATURES = [5, 6, 7], [0.8, 0.0, 1.2]
NUM_TOKENS = 40


class Pages:
    """A pool, and block tables whose pages are handed out as the requests grow."""

    def __init__(self, model: TreeModel, page_size: int, seed: int) -> None:
        self.model, self.page_size = model, page_size
        num_pages = sum(-(-(len(prompt) + NUM_TOKENS + 25) // page_size) for prompt in PROMPTS) + 1
        self.pool = model.new_paged_cache(num_pages, page_size)
        self.free = list(range(num_pages))
        random.Random(seed).shuffle(self.free)
        self.block_table = torch.full((len(PROMPTS), num_pages), -1, dtype=torch.int32)
        self.cache = self.pool.of(self.block_table)
        self.entries = CacheTable(self.pool.tensors(), paged=True)

    def reach(self, request: int, num_rows: int) -> None:
        """Hand out pages until a request has so many rows."""
        for place in range(-(-num_rows // self.page_size)):
            if self.block_table[request, place] < 0:
                self.block_table[request, place] = self.free.pop()

    def read_prompt(self, request: int) -> torch.Tensor:
        """Commit a prompt; the logits behind it. [1, 1, vocab]"""
        prompt = PROMPTS[request]
        self.reach(request, len(prompt))
        cache = self.pool.of(self.block_table[request : request + 1])
        return prefill(self.model, cache, torch.tensor([prompt]), torch.tensor([len(prompt)], dtype=torch.int32))


def decode(trees: tuple[TokenTree, ...] | TokenTree, page_size: int) -> list[list[int]]:
    """What generate does with three prompts, on pages."""
    state = DecodingState.create(3, torch.device("cpu"), seeds=SEEDS, temperature=TEMPERATURES, top_k=None, top_p=None)
    target, draft = Pages(TARGET, page_size, 1), Pages(DRAFT, page_size, 2)
    layout = TreeLayout.build(trees, "cpu", 3)
    buffers = TokenBuffers.allocate(layout, 3, VOCAB, DRAFT.logits_dtype, torch.device("cpu"))
    growth = HostGrowth.bind(DRAFT, draft.cache, state, layout, buffers, "auto")
    scoring = TARGET.bind(buffers.tokens, target.cache, state.cache_lens, layout.target_step)
    assert growth is not None and scoring is not None
    logits = torch.empty(scoring.shape)

    for request in range(3):
        draft.read_prompt(request)
    first = torch.cat([target.read_prompt(request) for request in range(3)])
    sampling = state.temperature, state.seeds, state.offsets
    path = verify_tree(torch.zeros(3, 1, dtype=torch.int64), first, None, TokenTree.single(), *sampling)
    state.cache_lens.copy_(torch.tensor([len(prompt) for prompt in PROMPTS]))
    state.last_tokens.copy_(torch.tensor([prompt[-1] for prompt in PROMPTS]))
    state.root_tokens.copy_(path.next_token)
    state.offsets += 1
    emitted = [[token] for token in path.next_token.tolist()]
    while min(map(len, emitted)) < NUM_TOKENS:
        going_on = torch.tensor([len(text) < NUM_TOKENS for text in emitted])
        for request, length in enumerate(state.cache_lens.tolist()):
            for pages in (target, draft):
                pages.reach(request, length + layout.num_nodes)
        buffers.tokens[:, 0] = state.root_tokens
        assert growth.run(StageClock(enabled=False)) and scoring.run(logits)
        path = verify_tree(buffers.tokens, logits, buffers.draft_logits, layout.topology, *sampling)
        compact_kv_cache_(
            [target.entries, draft.entries], path.nodes, path.num_accepted * going_on, state.cache_lens,
            block_table=[target.block_table, draft.block_table],
        )  # fmt: skip
        accepted = buffers.tokens.gather(1, path.nodes.clamp(min=0).long())
        state.last_tokens.copy_(accepted.gather(1, path.num_accepted[:, None].long() - 1)[:, 0])
        state.root_tokens.copy_(path.next_token)
        state.offsets += layout.num_nodes
        rows = zip(emitted, accepted.tolist(), path.num_accepted.tolist(), path.next_token.tolist(), strict=True)
        for text, row, count, bonus in rows:
            if len(text) < NUM_TOKENS:
                text.extend([*row[1:count], bonus])
    return [text[:NUM_TOKENS] for text in emitted]


@pytest.fixture(scope="module")
def expected() -> dict:
    length = max(map(len, PROMPTS))
    prompts = torch.tensor([[*[0] * (length - len(prompt)), *prompt] for prompt in PROMPTS])
    mask = torch.tensor([[*[0] * (length - len(prompt)), *[1] * len(prompt)] for prompt in PROMPTS])
    options = {"max_new_tokens": NUM_TOKENS + 20, "temperature": TEMPERATURES, "seed": SEEDS, "eos_token_id": ()}
    options["rule"] = "sequoia"
    return {
        kind: [text[:NUM_TOKENS] for text in generate(TARGET, DRAFT, prompts, mask, tree=trees, **options).new_tokens]
        for kind, trees in (("one tree", TREES[0]), ("a tree each", TREES))
    }


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("kind", ["one tree", "a tree each"])
def test_steps_on_pages_decode_what_generate_does(kind, page_size, expected):
    decoded = decode(TREES[0] if kind == "one tree" else TREES, page_size)
    assert decoded == expected[kind]
    assert len({tuple(text) for text in decoded}) == 3
