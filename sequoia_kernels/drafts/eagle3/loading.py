"""An EAGLE-3 head from its folder: weights by name, on the device and in the dtype of the target."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sequoia_kernels.drafts.eagle3.config import HeadConfig
from sequoia_kernels.drafts.eagle3.head import EagleHead, HeadLayer, Norm, Projection
from sequoia_kernels.drafts.folders import DraftFolder
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import TreeModel
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["LoadedHead", "load_head"]

logger = logging.getLogger("sequoia_kernels")


@dataclass(frozen=True)
class LoadedHead:
    """A head as its folder gives it, for one target.

    Attributes:
        head: the weights.
        config: what the folder's config says.
        feature_layers: hidden states of the target that it reads, in order.
        other_layers: what else the folder's ids may mean; None where that is out of range, or nothing is open.
        vocabulary: the map to the target's tokens; None where the head's are the first ones of the target.
        vocab_size: width of the head's logits.
        target_width: width of the target's hidden states.
    """

    head: EagleHead
    config: HeadConfig
    feature_layers: tuple[int, ...]
    other_layers: tuple[int, ...] | None
    vocabulary: VocabularyMap | None
    vocab_size: int
    target_width: int


def load_head(folder: DraftFolder, target: TreeModel, feature_layers: Sequence[int] | None = None) -> LoadedHead:
    """Read a head's weights; embeddings and a head of the full vocabulary that are not there are the target's own.

    Args:
        folder: the folder.
        target: the target.
        feature_layers: hidden states of the target that it reads, where the folder does not say so or is wrong.

    Raises:
        ValueError: a weight is missing, left over or of another shape, or the head does not fit the target.
    """
    config = HeadConfig.read(folder)
    weights = _Weights(folder, config, target)
    layers, other = _feature_layers(folder, config, target, feature_layers)
    return LoadedHead(
        head=weights.head(),
        config=config,
        feature_layers=layers,
        other_layers=other,
        vocabulary=weights.vocabulary,
        vocab_size=config.draft_vocab_size,
        target_width=weights.target_width,
    )


def _feature_layers(
    folder: DraftFolder, config: HeadConfig, target: TreeModel, asked: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    count = target.num_layers

    def fits(layers: Sequence[int]) -> bool:
        return len(layers) == config.num_features and all(0 <= number <= count for number in layers)

    chosen, other = config.feature_layers, config.other_layers
    if asked is not None:
        chosen, other = tuple(asked), None
    elif chosen is None:
        chosen = (2, count // 2, count - 3)
    if other is not None and not fits(other):
        other = None
    if other is not None and not fits(chosen):
        logger.warning(
            "%s: layer ids are read as hidden states %s, since the target has none up to %d",
            folder,
            list(other),
            max(chosen),
        )
        return other, None
    if not fits(chosen):
        raise ValueError(
            f"{folder}: feature_layers must be {config.num_features} hidden states in 0..{count} of the target, "
            f"got {list(chosen)}"
        )
    return chosen, other


class _Weights:
    """Takes the weights of one folder."""

    def __init__(self, folder: DraftFolder, config: HeadConfig, target: TreeModel) -> None:
        self.folder, self.config, self.target = folder, config, target
        self.layer_config = config.layer_config
        self.width = int(self.layer_config.hidden_size)
        self.target_width = int(target.model.config.get_text_config(decoder=True).hidden_size)
        self.eps = float(self.layer_config.rms_norm_eps)
        self.vocabulary = self._vocabulary()

    def head(self) -> EagleHead:
        """Read the head; what is left over afterwards is an error."""
        config, width, features = self.config, self.width, self.config.num_features
        fc = Projection(self._take("fc.weight", shape=(width, features * self.target_width)))
        norms: tuple[Norm, ...] = ()
        if config.norm_before_fc:
            norms = (self._norm("input_norm.weight", width=features * self.target_width),)
        elif config.fc_norm:
            norms = tuple(self._norm(f"fc_norm.{number}.weight", width=self.target_width) for number in range(features))
        head: dict[str, Any] = {
            "embed": self._embeddings(),
            "fc": fc,
            "feature_norms": norms,
            "hidden_norm": self._norm("midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"),
            "layers": tuple(self._layer(number) for number in range(self.layer_config.num_hidden_layers)),
            "norm": self._norm("norm.weight"),
            "lm_head": Projection(self._lm_head()),
            "rotary": self._rotary(),
            "activation": self._activation(),
            "num_heads": int(self.layer_config.num_attention_heads),
            "num_kv_heads": int(self.layer_config.num_key_value_heads),
            "head_dim": config.head_dim,
            "norm_before_residual": config.norm_before_residual,
            "norm_output": config.norm_output,
        }
        if config.mask_token_id is None:
            built = EagleHead(**head)
        else:
            if config.mask_token_id >= head["embed"].shape[0]:
                tokens = head["embed"].shape[0]
                raise ValueError(f"{self.folder}: mask_token_id must be in 0..{tokens - 1}, got {config.mask_token_id}")
            plain = EagleHead(**head)
            mask_feature = plain.combine(self._mask(features * self.target_width).split(self.target_width))
            built = EagleHead(**head, mask_feature=mask_feature, mask_token_id=config.mask_token_id)
        # The target's own last norm and head may lie beside a head that was saved while it was trained.
        self.folder.check_all_taken(unused=("verifier_norm.weight", "verifier_lm_head.weight"))
        return built

    def _mask(self, width: int) -> torch.Tensor:
        """Read the features of what is not known yet, side by side; up to two sizes of 1 stand in front of them."""
        sizes = self.folder.shape("mask_hidden") if "mask_hidden" in self.folder else ()
        return self._take("mask_hidden", shape=(*[1] * min(max(len(sizes) - 1, 0), 2), width)).flatten()

    def _take(self, name: str, *aliases: str, shape: Sequence[int | None]) -> torch.Tensor:
        return self._placed(self.folder.need(name, *aliases, shape=shape))

    def _placed(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.target.device, self.target.dtype)

    def _norm(self, name: str, *aliases: str, width: int | None = None) -> Norm:
        return Norm(self._take(name, *aliases, shape=(width or self.width,)), self.eps)

    def _layer(self, number: int) -> HeadLayer:
        config, inputs = self.layer_config, self.width * (2 if number == 0 else 1)
        head_dim, inner = self.config.head_dim, int(config.intermediate_size)
        outputs = {"q": config.num_attention_heads * head_dim}
        outputs["k"] = outputs["v"] = config.num_key_value_heads * head_dim
        bias = bool(getattr(config, "attention_bias", False))
        mlp_bias = bool(getattr(config, "mlp_bias", False))

        def names(name: str) -> tuple[str, ...]:
            return (f"midlayer.{name}", f"layers.0.{name}") if number == 0 else (f"layers.{number}.{name}",)

        def linear(name: str, shape: tuple[int, int], biased: bool) -> Projection:
            weight = self._take(*names(f"{name}.weight"), shape=shape)
            return Projection(weight, self._take(*names(f"{name}.bias"), shape=shape[:1]) if biased else None)

        head_norms: dict[str, Norm] = {}
        if config.model_type == "qwen3":
            for name, part in (("query_norm", "q"), ("key_norm", "k")):
                head_norms[name] = self._norm(*names(f"self_attn.{part}_norm.weight"), width=head_dim)
        return HeadLayer(
            qkv=_stacked([linear(f"self_attn.{part}_proj", (outputs[part], inputs), bias) for part in "qkv"]),
            output=linear("self_attn.o_proj", (self.width, outputs["q"]), bias),
            gate_up=_stacked([linear(f"mlp.{part}_proj", (inner, self.width), mlp_bias) for part in ("gate", "up")]),
            down=linear("mlp.down_proj", (self.width, inner), mlp_bias),
            input_norm=self._norm(*names("input_layernorm.weight")),
            mlp_norm=self._norm(*names("post_attention_layernorm.weight")),
            window=self.config.windows[number],
            **head_norms,
        )

    def _embeddings(self) -> torch.Tensor:
        own = self.folder.take("embed_tokens.weight", shape=(None, self.width), optional=True)
        return self._of_target("embed_tokens.weight") if own is None else self._placed(own)

    def _lm_head(self) -> torch.Tensor:
        size = self.config.draft_vocab_size
        own = self.folder.take("lm_head.weight", shape=(size, self.width), optional=True)
        if own is not None:
            return self._placed(own)
        whole = self._of_target("lm_head.weight")
        if self.vocabulary is not None:
            return whole.index_select(0, self.vocabulary.draft_to_target)
        if whole.shape[0] < size:
            raise ValueError(
                f"{self.folder}: must hold lm_head.weight, or the target a head of {size} tokens, got {whole.shape[0]}"
            )
        return whole[:size]

    def _of_target(self, name: str) -> torch.Tensor:
        """Give a weight that the folder lacks as the target has it, not a copy."""
        if self.target.ranks is not None:
            raise UnsupportedModelError(
                f"{self.folder}: must hold {name} for a target that is split over ranks, of which each has a part of it"
            )
        model = self.target.model
        module: Any = model.get_input_embeddings() if name.startswith("embed") else model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
            raise ValueError(f"{self.folder}: must hold {name}, since the target has no plain one in memory")
        if weight.dim() != 2 or weight.shape[1] != self.width or weight.dtype != self.target.dtype:
            raise ValueError(
                f"{self.folder}: must hold {name}, or the target one of width {self.width} in {self.target.dtype}, "
                f"got {list(weight.shape)} in {weight.dtype}"
            )
        return weight.detach()

    def _vocabulary(self) -> VocabularyMap | None:
        folder, size, target_size = self.folder, self.config.draft_vocab_size, self.target.vocab_size
        offsets = folder.take("d2t", shape=(size,), optional=True)
        known = folder.take("t2d", shape=(None,), optional=True)
        if offsets is None or size == self.layer_config.vocab_size:  # of the full vocabulary: a map says nothing
            if size < self.layer_config.vocab_size:
                raise ValueError(f"{folder}: must hold d2t, the target's tokens of its {size}, got none")
            return None
        ids = offsets.to(torch.int64) + torch.arange(size)
        try:
            vocabulary = VocabularyMap.of(ids, target_size)
        except ValueError as error:
            raise ValueError(f"{folder}: d2t must give tokens of the target: {error}") from error
        if known is not None:
            marked = known.to(torch.bool).nonzero()[:, 0]
            if not torch.equal(marked, ids.sort().values):
                raise ValueError(
                    f"{folder}: t2d must mark the {size} tokens that d2t gives, got {marked.numel()} marks at others"
                )
        return vocabulary.to(self.target.device)

    def _rotary(self) -> torch.nn.Module:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        kind = Qwen3RotaryEmbedding if self.layer_config.model_type == "qwen3" else LlamaRotaryEmbedding
        rotary: torch.nn.Module = kind(self.layer_config)
        return rotary.to(self.target.device).eval()

    def _activation(self) -> Any:
        from transformers.activations import ACT2FN

        name = self.layer_config.hidden_act
        if name not in ACT2FN:
            raise ValueError(f"{self.folder}: hidden_act must be an activation of transformers', got {name!r}")
        return ACT2FN[name]


def _stacked(parts: list[Projection]) -> Projection:
    """Put projections of the same inputs side by side: one product reads them."""
    biases = [part.bias for part in parts if part.bias is not None]
    return Projection(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)
