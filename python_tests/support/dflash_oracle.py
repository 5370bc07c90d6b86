"""Write the folders of `python_tests/drafts/data/dflash`: random drafts by `speculators`' own writer, and its logits.

Run where `speculators` is, which the tests do not need: in a virtual environment of its own, with torch and at most
transformers 5.19.

    pip install torch "transformers<=5.19" openai loguru pydantic-settings aiohttp httpx psutil typer datasets
    pip install --no-deps speculators==0.9.0 hs-connectors
    python python_tests/support/dflash_oracle.py python_tests/drafts/data/dflash

Each draft is a folder: config.json and model.safetensors as `save_pretrained` writes them. golden.safetensors holds by
the folder's name: the features and tokens of a text, anchors in it, and for every slot of the anchors' blocks the
logits behind all heads, and the confidence. target.safetensors holds the embedding and the head of their target.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB, WIDTH, LENGTH, BLOCK = 64, 32, 14, 4
ANCHORS = (3, 7, 9)  # of which the last has more context than the windows below
NEEDS = (1, 2)

LAYERS = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
WINDOWS = {"num_hidden_layers": 2, "sliding_window": 5, "use_sliding_window": True}
SLIDING = ["sliding_attention", "sliding_attention"]
MIXED = ["sliding_attention", "full_attention"]
CASES: dict[str, tuple[str, dict, dict]] = {
    "dflash": ("dflash", {}, {"num_hidden_layers": 2}),
    "dflash_reduced": ("dflash", {"draft_vocab_size": 24, "sample_from_anchor": True}, {"attention_bias": True}),
    "dflash_sliding": ("dflash", {"sliding_window_non_causal": True}, {**WINDOWS, "layer_types": MIXED}),
    "dflash_sliding_causal": ("dflash", {}, {**WINDOWS, "layer_types": MIXED}),
    "dflash_all_causal": ("dflash", {}, {**WINDOWS, "layer_types": SLIDING}),
    "dspark_vanilla": ("dspark", {"draft_vocab_size": 24}, {}),
    "dspark_gated": ("dspark", {"markov_head_type": "gated", "sample_from_anchor": False}, {}),
    "dspark_rnn": ("dspark", {"markov_head_type": "rnn", "draft_vocab_size": 24}, {}),
    "dspark_rnn_masks": (
        "dspark",
        {"markov_head_type": "rnn", "sample_from_anchor": False, "confidence_head_with_markov": False},
        {},
    ),
    "dspark_no_heads": ("dspark", {"markov_rank": 0, "confidence_head_with_markov": False}, {}),
}


def write(folder: Path) -> None:
    """Write everything."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    classes = {
        "dflash": (DFlashDraftModel, DFlashSpeculatorConfig),
        "dspark": (DSparkDraftModel, DSparkSpeculatorConfig),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    embedding, head = torch.randn(VOCAB, WIDTH), torch.randn(VOCAB, WIDTH) / WIDTH**0.5
    save_file({"embedding": embedding, "head": head}, folder / "target.safetensors")
    golden: dict[str, torch.Tensor] = {}
    for name, (kind, options, of_layers) in CASES.items():
        layers = Qwen3Config(**LAYERS | of_layers)
        layers._attn_implementation = "eager"
        model_class, config_class = classes[kind]
        config = config_class(
            transformer_layer_config=layers,
            **{"draft_vocab_size": VOCAB, "block_size": BLOCK, "markov_rank": 6, **options}
            if kind == "dspark"
            else {"draft_vocab_size": VOCAB, "block_size": BLOCK, **options},
            aux_hidden_state_layer_ids=list(NEEDS),
            mask_token_id=VOCAB - 1,
            speculators_config=SpeculatorsConfig(
                algorithm=kind,
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=BLOCK - 1)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=[]),
            ),
        )
        model = model_class(config).eval()
        with torch.no_grad():
            for weight_name, weight in model.named_parameters():
                if weight_name.endswith("norm.weight"):
                    weight.copy_(1.0 + 0.1 * torch.randn_like(weight))
                else:
                    weight.copy_(0.3 * torch.randn_like(weight))
            model.embed_tokens.weight.copy_(embedding)
            if model.use_draft_vocab:
                ids = torch.randperm(VOCAB)[: config.draft_vocab_size].sort().values
                model.d2t.copy_(ids - torch.arange(len(ids)))
                model.t2d.fill_(False)[ids] = True
            else:
                model.lm_head.weight.copy_(head)
        model.save_pretrained(folder / name)
        (folder / name / "config.py").unlink()  # a copy of the class's source
        features = torch.randn(1, LENGTH, len(NEEDS) * WIDTH)
        tokens = torch.randint(VOCAB - 1, (1, LENGTH))
        logits, confidence = _scores(model, features, tokens)
        golden |= {
            f"{name}.features": features[0],
            f"{name}.tokens": tokens[0],
            f"{name}.logits": logits,
            f"{name}.anchors": torch.tensor(ANCHORS),
        }
        if confidence is not None:
            golden[f"{name}.confidence"] = confidence
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, folder / "golden.safetensors")


@torch.no_grad()
def _scores(model, features: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the anchors' blocks and the heads on the text's own tokens. [anchors, block, vocab] and [anchors, block]."""
    mask = torch.zeros(1, LENGTH)
    mask[0, list(ANCHORS)] = 1
    documents = torch.zeros(1, LENGTH, dtype=torch.int64)
    hidden, logits, *_ = model._backbone_forward(
        features, tokens, mask, torch.randn(1, LENGTH, WIDTH), documents, max_anchors=len(ANCHORS)
    )
    hidden = hidden.view(len(ANCHORS), BLOCK, -1)
    logits = logits.view(len(ANCHORS), BLOCK, -1)
    blocks = torch.stack([tokens[0, anchor : anchor + BLOCK] for anchor in ANCHORS])
    if getattr(model, "markov_head", None) is None and getattr(model, "confidence_head", None) is None:
        return logits, None
    before = blocks if model.config.sample_from_anchor else torch.cat((blocks[:, :1], blocks[:, :-1]), 1)
    seen = [hidden]
    if model.markov_head is not None:
        embedded = model.markov_head.prev_embeddings(before)
        logits = logits + model.markov_head.block_bias(prev_token_ids=before, hidden_states=hidden, prev_emb=embedded)
        if model.config.confidence_head_with_markov:
            seen.append(embedded)
    if model.confidence_head is None:
        return logits, None
    return logits, torch.sigmoid(model.confidence_head(torch.cat(seen, dim=-1)))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
