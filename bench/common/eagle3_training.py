"""An EAGLE-3 head in training: the arithmetic of `sequoia_kernels.drafts.eagle3` on whole texts at once, in torch.

Row t holds token y_{t+1} with the target's feature f_t and foretells y_{t+2}. Decoding goes on from a row's own output,
not from the target's feature, so that is trained as well ("training-time test", arXiv 2503.01840, section 3.1): level k
holds, for every t at once, token y_{t+1+k} with the output of level k - 1 at t, at position t + k. It sees the target's
rows up to t and its own chain of levels 1..k, as a tree's node sees the committed rows and its ancestors. So the
attention of a level is the causal one of level 0 with k more columns, each of one row alone.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

from bench.common.head_parts import Attention, Mlp, Norm, rotation_of, write_folder
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["Eagle3Module", "default_layers"]


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Hidden states of the target that a head reads where nothing else is said."""
    return tuple(sorted({min(2, num_layers), num_layers // 2, max(num_layers - 3, 1)}))


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_norm, self.input_layernorm = Norm(width, eps), Norm(width, eps)
        self.post_attention_layernorm = Norm(width, eps)
        self.self_attn, self.mlp = Attention(config, 2 * width, False), Mlp(config)


class Eagle3Module(nn.Module):
    """A head of one layer of the target's shape; its `state_dict` has the names of the original form.

    It begins as what the target computes behind the last of its features: that layer's weights on that feature, with
    nothing but noise for the token, under the target's norm and head.

    Args:
        target: a Llama model of transformers.
        layers: hidden states that it reads, at least one.
        vocabulary: tokens that it knows.
    """

    def __init__(self, target: Any, layers: tuple[int, ...], vocabulary: VocabularyMap) -> None:
        super().__init__()
        config = self.config = target.config
        self.layers, self.vocabulary = layers, vocabulary
        width = config.hidden_size
        self.fc = nn.Linear(len(layers) * width, width, bias=False)
        self.midlayer = _Layer(config)
        self.norm = Norm(width, config.rms_norm_eps)
        self.embed = target.get_input_embeddings().weight.detach()
        self.head = target.get_output_embeddings().weight.detach()[vocabulary.draft_to_target]
        self._begin_as(target.model.layers[min(layers[-1], config.num_hidden_layers - 1)], target.model.norm)

    @torch.no_grad()
    def _begin_as(self, layer: Any, norm: Any) -> None:
        width, of_layer, mid = self.config.hidden_size, dict(layer.named_parameters()), self.midlayer
        nn.init.normal_(self.fc.weight, std=0.02 / len(self.layers))
        self.fc.weight[:, -width:] += torch.eye(width)
        for name, weight in mid.named_parameters():
            known = of_layer["input_layernorm.weight" if name.startswith("hidden_norm") else name]
            if name.startswith("input_layernorm"):
                continue  # of embeddings: ones
            if weight.shape == known.shape:
                weight.copy_(known)
            else:
                weight[:, width:] = known
                weight[:, :width].normal_(std=float(known.std()))
        self.norm.weight.copy_(norm.weight)

    def forward(self, tokens: Tensor, features: Tensor, num_levels: int) -> list[Tensor]:
        """Run the levels.

        Args:
            tokens: of texts, padded on the right. [B, L] int64.
            features: hidden states of the target that the head reads, side by side. [B, L, features * width].
            num_levels: levels, at least 1.

        Returns:
            Of each level the normed outputs, [B, L - 1, width]: row t of level k foretells y_{t+2+k}. Rows whose token
            lies behind the text's end are meaningless, and no row before it sees them.
        """
        mid, num_rows = self.midlayer, tokens.shape[1] - 1
        attention, scale = mid.self_attn, mid.self_attn.head_dim**-0.5
        steps = torch.arange(num_rows)[None]
        feature = self.fc(features[:, :-1].to(self.fc.weight.dtype)).float()
        chain: list[tuple[Tensor, Tensor]] = []
        outputs = []
        for level in range(num_levels):
            rotation = rotation_of(self.config, steps + level, attention.head_dim)
            fed = pad(tokens[:, 1 + level :], (0, level))
            rows = torch.cat((mid.input_layernorm(embedding(fed, self.embed)), mid.hidden_norm(feature)), -1)
            query, (key, value) = attention.queries(rows, rotation), attention.keys_values(rows, rotation)
            chain.append((key, value))
            if level == 0:
                value = value.to(query.dtype)
                attended = scaled_dot_product_attention(query, key.to(query.dtype), value, is_causal=True)
            else:
                attended = self._attend(query * scale, chain)
            hidden = feature + attention.o_proj(attended.transpose(1, 2).flatten(2))
            feature = hidden + mid.mlp(mid.post_attention_layernorm(hidden))
            outputs.append(self.norm(feature))
        return outputs

    @staticmethod
    def _attend(query: Tensor, chain: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Let each row see the first rows up to itself, and of each later level the one that stands where it does."""
        (keys, values), others = chain[0], chain[1:]
        num_rows = query.shape[2]
        hidden = torch.ones(num_rows, num_rows, dtype=torch.bool).triu(1)
        scores = (query @ keys.transpose(2, 3)).float().masked_fill(hidden, -torch.inf)
        own = [(query * key).sum(-1, keepdim=True).float() for key, _ in others]
        shares = torch.cat((scores, *own), -1).softmax(-1)
        attended = (shares[..., :num_rows].to(values.dtype) @ values).float()
        for column, (_, value) in enumerate(others, num_rows):
            attended = attended + shares[..., column : column + 1] * value
        return attended

    def save(self, folder: Path) -> None:
        """Write a folder of the original form."""
        config = self.config
        fields = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "target_hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": self.midlayer.self_attn.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
            "max_position_embeddings": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": len(self.head),
            "num_aux_hidden_states": len(self.layers),
            "bos_token_id": config.bos_token_id,
            "eos_token_id": copy.copy(config.eos_token_id),
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            # Here a number counts outputs of layers: one less than that of the hidden state.
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [number - 1 for number in self.layers],
                "use_aux_hidden_state": True,
            },
        }
        write_folder(folder, fields, self.state_dict(), self.vocabulary, self.head)
