"""A DSpark draft in training: the arithmetic of `sequoia_kernels.drafts.dflash` for many blocks of a text at once.

A block is the last token y_p, its anchor, and masks; its slot k foretells y_{p+1+k} from the target's features of
tokens before p, and all slots at once. Anchors are drawn anew for every text in every step, so that no place of a text
is always the beginning of a block (DFlash, arXiv 2602.06036). All blocks of a batch go through the layers in one
forward: a block's rows see the context before its anchor and one another, both ways.

The Markov head adds to slot k's row what token y_{p+k} says. It is taught with the text's own tokens: that is what a
node of a tree is fed, its own token, whatever was drawn beside it. The confidence head is taught how likely the next
token is accepted, sum(min(p, q)) of the row as it then stands; that is no property that the backbone shall be bent to,
so its gradient ends at its inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from bench.common.head_parts import Attention, Mlp, Norm, rotation_of, write_folder
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["Blocks", "DSparkModule", "draw_anchors"]


class Blocks(NamedTuple):
    """What blocks give. B texts, A anchors each, S slots."""

    hidden: Tensor  # what the head gets. [B, A, S, width]
    mixed: Tensor  # what the Markov head multiplies: numbers of each slot's token. [B, A, S, rank]
    confidence: Tensor  # logits of how likely the next token is accepted. [B, A, S]


def draw_anchors(written: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw places of each text where blocks begin, without replacement.

    Args:
        written: where the target chose the next token. [B, L] bool.
        count: anchors of each text; at most L are given.
        generator: of the draw.

    Returns:
        Places, in order; of a text with fewer written ones, others are among them. [B, A] int64.
    """
    order = torch.rand(written.shape, generator=generator).masked_fill(~written, -1.0)
    return order.topk(min(count, written.shape[1]), dim=1).indices.sort(1).values


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            Norm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )
        self.self_attn, self.mlp = Attention(config, config.hidden_size, True), Mlp(config)


class _Markov(nn.Module):
    def __init__(self, vocab_size: int, draft_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1, self.markov_w2 = nn.Embedding(vocab_size, rank), nn.Linear(rank, draft_size, bias=False)


class _Confidence(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DSparkModule(nn.Module):
    """A backbone of Qwen3's layers in the target's width with its heads; `state_dict` has the names of the folder.

    Its layers begin as the target's last ones, and the context as the last of its features.
    A token's numbers in the Markov head begin as its embedding's principal components, so that tokens which training
    never meets stand near those that are like them; the head itself begins at 0, and so changes nothing.

    Args:
        target: a Llama model of transformers.
        layers: hidden states of it that the draft reads, at least one.
        vocabulary: tokens that it knows.
        num_layers: of the backbone, at most the target's.
        block_size: slots of a block, S.
        rank: of the Markov head.
        mask_token_id: token of the masks.

    Raises:
        ValueError: num_layers is out of range.
    """

    def __init__(
        self, target: Any, layers: tuple[int, ...], vocabulary: VocabularyMap, *, num_layers: int, block_size: int,
        rank: int, mask_token_id: int,
    ) -> None:  # fmt: skip
        super().__init__()
        config = self.config = target.config
        if not 1 <= num_layers <= config.num_hidden_layers:
            rule = f"in 1..{config.num_hidden_layers}, the target's layers that they begin as"
            raise ValueError(f"DSparkModule: num_layers must be {rule}, got {num_layers}")
        self.read, self.vocabulary = layers, vocabulary
        self.block_size, self.rank, self.mask_token_id = block_size, rank, mask_token_id
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed = target.get_input_embeddings().weight.detach()
        self.head = target.get_output_embeddings().weight.detach()[vocabulary.draft_to_target]
        self.fc = nn.Linear(len(layers) * width, width, bias=False)
        self.hidden_norm, self.norm = Norm(width, eps), Norm(width, eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(num_layers))
        self.markov_head = _Markov(len(self.embed), len(self.head), rank)
        self.confidence_head = _Confidence(width + rank)
        self._begin(target)

    @torch.no_grad()
    def _begin(self, target: Any) -> None:
        width = self.config.hidden_size
        for mine, layer in zip(self.layers, target.model.layers[-len(self.layers) :], strict=True):
            of_layer = dict(layer.named_parameters())
            for name, weight in mine.named_parameters():
                if name in of_layer:  # all but the norms of queries and keys
                    weight.copy_(of_layer[name])
        nn.init.normal_(self.fc.weight, std=0.02 / len(self.read))
        self.fc.weight[:, -width:] += torch.eye(width)
        self.norm.weight.copy_(target.model.norm.weight)
        centred = (self.embed - self.embed.mean(0)).float()
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : self.rank]
        numbers = centred @ directions  # fewer than the rank where the width is smaller
        self.markov_head.markov_w1.weight[:, : numbers.shape[1]] = numbers / numbers.std()
        self.markov_head.markov_w2.weight.zero_()
        self.confidence_head.proj.weight.zero_()
        self.confidence_head.proj.bias.zero_()

    def forward(self, tokens: Tensor, features: Tensor, anchors: Tensor) -> Blocks:
        """Run the blocks of some anchors.

        Args:
            tokens: of texts, padded on the right. [B, L] int64.
            features: hidden states of the target that the draft reads, side by side. [B, L, features * width].
            anchors: where blocks begin. [B, A] int64.

        Returns:
            What they give. Slots of tokens behind a text's end are meaningless; others do not see those tokens.
        """
        (batch_size, length), num_anchors, slots = tokens.shape, anchors.shape[1], self.block_size
        positions = (anchors[:, :, None] + torch.arange(slots)).flatten(1)  # [B, A * S]
        block = torch.full((batch_size, num_anchors, slots), self.mask_token_id)
        block[:, :, 0] = tokens.gather(1, anchors)
        rows = embedding(block.flatten(1), self.embed).float()
        context = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        head_dim = self.layers[0].self_attn.head_dim
        of_context = rotation_of(self.config, torch.arange(length)[None], head_dim)
        of_rows = rotation_of(self.config, positions, head_dim)
        visible = self._visible(anchors, length)
        for layer in self.layers:
            attention, normed = layer.self_attn, layer.input_layernorm(rows)
            query = attention.queries(normed, of_rows)
            parts = attention.keys_values(context, of_context), attention.keys_values(normed, of_rows)
            keys, values = (torch.cat(both, 2).to(query.dtype) for both in zip(*parts))
            attended = scaled_dot_product_attention(query, keys, values, attn_mask=visible)
            rows = rows + attention.o_proj(attended.transpose(1, 2).flatten(2))
            rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
        hidden = self.norm(rows).unflatten(1, (num_anchors, slots))
        own = tokens.gather(1, positions.clamp(max=length - 1)).unflatten(1, (num_anchors, slots))
        mixed = self.markov_head.markov_w1(own)
        confidence = self.confidence_head.proj(torch.cat((hidden, mixed), -1).detach())[..., 0].float()
        return Blocks(hidden, mixed, confidence)

    def _visible(self, anchors: Tensor, length: int) -> Tensor:
        """What rows of blocks see: context before their anchor, and their block. [B, 1, A * S, L + A * S] bool."""
        of_rows = anchors.repeat_interleave(self.block_size, 1)
        context = torch.arange(length) < of_rows[:, :, None]
        number = torch.arange(of_rows.shape[1]) // self.block_size
        own = (number[:, None] == number).expand(len(anchors), -1, -1)
        return torch.cat((context, own), 2)[:, None]

    def save(self, folder: Path) -> None:
        """Write a folder of the form of the library speculators."""
        config = self.config
        fields = {
            "architectures": ["DSparkSpeculator"],
            "speculators_model_type": "dspark",
            "transformer_layer_config": {
                "model_type": "qwen3",
                "vocab_size": len(self.embed),
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": len(self.layers),
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_dim": self.layers[0].self_attn.head_dim,
                "hidden_act": "silu",
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": config.rope_parameters["rope_theta"],
                "max_position_embeddings": config.max_position_embeddings,
            },
            "draft_vocab_size": len(self.head),
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "aux_hidden_state_layer_ids": list(self.read),
            "sample_from_anchor": True,
            "markov_rank": self.rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
            "speculators_config": {
                "algorithm": "dspark",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": self.block_size}],
                "verifier": {"name_or_path": None, "architectures": config.architectures or ["LlamaForCausalLM"]},
            },
            "dtype": "bfloat16",
        }
        write_folder(folder, fields, self.state_dict(), self.vocabulary, self.head)
