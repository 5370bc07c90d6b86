"""DFlash and DSpark drafts: folders, logits against their authors' own modules, and the text of the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny_llama

from sequoia_kernels import TokenTree, adapt
from sequoia_kernels.drafts import DecodingState, StageClock, TokenBuffers, TreeLayout, draft_from_folder

DATA = Path(__file__).parent / "data" / "dflash"
FOLDERS = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def golden_target():
    """The target whose embedding and head the golden logits were computed with."""
    shared = load_file(DATA / "target.safetensors")
    target = tiny_llama(0, vocab_size=64)
    target.model.embed_tokens.weight.data = shared["embedding"].clone()
    target.lm_head.weight.data = shared["head"].clone()
    return adapt(target)


def started(draft, target, batch_size: int = 1, rows: int = 64):
    state = DecodingState.create(
        batch_size, target.device, seeds=range(batch_size), temperature=[1.0] * batch_size, top_k=None, top_p=None
    )
    return state, draft.start(target, state, rows, backend="auto", clock=StageClock(enabled=False))


def forced(drafting, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Let levels draw these tokens of a tree; give the list that their logits are put into."""
    seen = []

    def draw(level, logits, buffers):
        seen.append(logits.clone())
        children = slice(level.first_child, level.first_child + level.num_children)
        buffers.tokens[:, children] = tokens[:, children]

    drafting.draw_children = draw
    return seen


def grow(drafting, tree: TokenTree, tokens: torch.Tensor, lens: list[int]) -> list[torch.Tensor]:
    """Grow a tree with these tokens [B, N] behind contexts of these lengths; logits level by level."""
    state = drafting.state
    state.cache_lens.copy_(torch.tensor(lens))
    state.root_tokens.copy_(tokens[:, 0])
    layout = TreeLayout.build(tree, "cpu")
    buffers = TokenBuffers(tokens.clone(), None)
    seen = forced(drafting, tokens)
    drafting.grow(layout, buffers)
    return seen


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_those_of_the_authors_modules(name):
    golden = {
        key.partition(".")[2]: value
        for key, value in load_file(DATA / "golden.safetensors").items()
        if key.startswith(f"{name}.")
    }
    target = golden_target()
    draft = draft_from_folder(DATA / name, target)
    config = json.loads((DATA / name / "config.json").read_text())
    block, first = config["block_size"], 0 if config["sample_from_anchor"] else 1
    with torch.inference_mode():
        _, drafting = started(draft, target)
        width = golden["features"].shape[1] // 2
        for anchor, logits in zip(golden["anchors"].tolist(), golden["logits"], strict=True):
            context = golden["features"][None, :anchor]
            drafting.restart()
            drafting.prefill(
                [0], golden["tokens"][None, :anchor], torch.tensor([anchor]), list(context.split(width, -1))
            )
            drafting.wants_confidence = True
            chain = TokenTree.chain(draft.max_levels)
            tokens = golden["tokens"][None, anchor : anchor + chain.num_nodes]
            tokens = torch.nn.functional.pad(tokens, (0, chain.num_nodes - tokens.shape[1]))
            seen = grow(drafting, chain, tokens, [anchor])
            assert len(seen) == block - first
            for slot, rows in enumerate(seen, start=first):
                torch.testing.assert_close(rows[0, 0], logits[slot], rtol=1e-5, atol=1e-5)
            if "confidence" in golden:
                expected = golden["confidence"][golden["anchors"].tolist().index(anchor), first:]
                torch.testing.assert_close(drafting.confidence[0, :-1], expected, rtol=1e-5, atol=1e-5)
