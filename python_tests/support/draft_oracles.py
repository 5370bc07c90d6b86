"""Writes the small EAGLE-3 heads of `drafts/data/eagle3` and what the library speculators computes with them.

The library is no dependency of the tests: its folders and numbers are kept. To make them again, in an environment of
its own (it asks for an older transformers than the tests may have):

    python -m venv oracle
    oracle/bin/pip install torch==2.13.0 "transformers<=5.19" pydantic pydantic-settings loguru datasets openai
    oracle/bin/pip install --no-deps speculators==0.9.0 hs_connectors
    oracle/bin/python python_tests/support/draft_oracles.py python_tests/drafts/data/eagle3

Every folder is what the library's `save_pretrained` writes, weights in bfloat16 that were computed with in float32, and
`golden.safetensors` beside them: features [T, 3 * H] and tokens [T] of its rows, and logits [depths, T, Vd] of the rows
at each depth behind every row, where the drafted tokens are the text's. A parallel head's are those behind one row,
`anchor`: [depths, Vd].
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NUM_ROWS, NUM_DEPTHS, VOCAB, WIDTH = 12, 4, 64, 32

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}

# name -> (family, fields of the layers, options of the head)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"draft_vocab_size": 24}),
    "full_vocabulary": ("llama", {}, {"draft_vocab_size": VOCAB, "norm_before_residual": True}),
    "norm_before_fc": (
        "llama", {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
        {"draft_vocab_size": 24, "norm_before_fc": True, "norm_before_residual": True},
    ),
    "eagle31": (
        "qwen3", {"head_dim": 16, "rope_parameters": _YARN},
        {"draft_vocab_size": 24, "fc_norm": True, "norm_output": True},
    ),
    "qwen3_layers": ("qwen3", {"num_hidden_layers": 2, "attention_bias": True}, {"draft_vocab_size": 24}),
    "sliding": (
        "qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
                  "layer_types": ["sliding_attention"]},
        {"draft_vocab_size": 24},
    ),
    "peagle": ("llama", {"num_hidden_layers": 2}, {"draft_vocab_size": 24, "norm_before_residual": True}),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Write one folder."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import CONFIG_MAPPING

    family, fields, options = CASES[name]
    torch.manual_seed(len(name) + sum(map(ord, name)))
    layers = CONFIG_MAPPING[family](
        **{
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 64,
            "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        } | fields
    )  # fmt: skip
    layers._attn_implementation = "eager"
    parallel = name == "peagle"
    speculators_config = SpeculatorsConfig(
        algorithm="peagle" if parallel else "eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=NUM_DEPTHS)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )
    common = {
        "transformer_layer_config": layers, "speculators_config": speculators_config,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4], **options,
    }  # fmt: skip
    if parallel:
        model = PEagleDraftModel(PEagleSpeculatorConfig(mask_token_id=7, **common))
    else:
        model = Eagle3DraftModel(Eagle3SpeculatorConfig(**common))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            around = 1.0 if key.endswith("norm.weight") or "fc_norm" in key else 0.0
            weight.copy_((around + 0.2 * torch.randn(weight.shape)).to(torch.bfloat16))
        if model.use_draft_vocab:
            known = torch.randperm(VOCAB)[: options["draft_vocab_size"]].sort().values
            model.t2d[known] = True
            model.d2t.copy_(known - torch.arange(len(known)))
    model = model.float().eval()

    features = torch.randn(1, NUM_ROWS, 3 * WIDTH)
    tokens = torch.randint(VOCAB, (1, NUM_ROWS))
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0].clone()))
    rows = {"features": features[0].clone(), "tokens": tokens[0].clone()}
    documents = torch.zeros(1, NUM_ROWS, dtype=torch.int64)
    with torch.no_grad():
        if parallel:
            rows |= _parallel_rows(model, features, tokens, documents, logits)
        else:
            model(features, tokens, documents, ttt_steps=NUM_DEPTHS)
            rows["logits"] = torch.stack(logits)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.py").unlink()  # the library's own code, which it puts beside a config of its own class
    save_file(rows, folder / "golden.safetensors")


def _parallel_rows(
    model: Any, features: torch.Tensor, tokens: torch.Tensor, documents: torch.Tensor, logits: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run a parallel head with all depths behind one row: the training's draw of rows is replaced by that choice."""
    from speculators.models.peagle import core

    anchor = NUM_ROWS - NUM_DEPTHS
    anchors = torch.tensor([*range(NUM_ROWS), *[anchor] * (NUM_DEPTHS - 1)])
    depths = torch.tensor([0] * NUM_ROWS + list(range(1, NUM_DEPTHS)))
    core.generate_cod_sample_indices = lambda **kwargs: (anchors, depths)
    # What it is trained towards is asked for, and not looked at here.
    wanted = torch.zeros(1, NUM_ROWS, features.shape[2] // 3)
    model(
        features, tokens, documents, verifier_last_hidden_states=wanted, num_depths=NUM_DEPTHS,
        loss_config=model.get_trainer_kwargs(loss_fn="ce", loss_implementation="eager")[0]["loss_config"],
    )  # fmt: skip
    (found,) = logits
    return {"logits": torch.cat((found[anchor : anchor + 1], found[NUM_ROWS:])), "anchor": torch.tensor([anchor])}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for case in CASES:
        make(case, root / case)
