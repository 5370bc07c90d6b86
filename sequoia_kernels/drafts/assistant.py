"""Gemma 4 assistants as a draft: a few layers of queries alone, over the target's own keys and values.

Computes, for a node with token y behind a hidden state h, of a request with c committed tokens:
    input   x = pre_projection([embed(y); h]), embed the target's own with its scale. Of the root, h is the target's
            hidden state behind its last norm at the newest committed token; of any other node, its parent's output.
    layers  the assistant's, each of whose queries stands at position c and reads keys and values of the committed rows
            in the target's last layer of the same type: all of them, or in sliding layers the last window + 1
    output  post_projection(norm(x)), and logits: the head on norm(x), or the same for the tokens of the best centroids
            alone, the others' below all of these

Nodes read no rows of each other, so a level is one forward of its nodes under an empty tree mask, and the draft keeps
no cache. transformers' `SinglePositionMultiTokenCandidateGenerator` computes the same behind a prompt. Behind later
steps it also reads a row that the target computed for a token it rejected, where there is one; here only committed
rows are. The tokens below all others share one logit, which there depends on the other rows of a batch; not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.folders import DraftFolder, DraftFormat, register_format
from sequoia_kernels.drafts.levels import TokenBuffers, TreeLayout, of_parents
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeCache, TreeModel, TreeStep, adapt, load_model
from sequoia_kernels.models.cache import CONTEXT_KWARG
from sequoia_kernels.models.switch import AttentionSwitch
from sequoia_kernels.ops import VerifiedPath, tree_attention

__all__ = ["AssistantDraft", "is_assistant"]

_FAMILIES = ("gemma4_assistant", "gemma4_unified_assistant")
_ATTENTION = "sequoia_assistant"
_DIGEST_ELEMENTS = 64  # of each weight


def is_assistant(model: Any) -> bool:
    """Tell whether a loaded model is an assistant, which cannot run without its target."""
    return getattr(getattr(model, "config", None), "model_type", None) in _FAMILIES


class AssistantDraft(DraftSource):
    """A Gemma 4 assistant as the draft of its target.

    Args:
        model: transformers' `Gemma4AssistantForCausalLM` or `Gemma4UnifiedAssistantForCausalLM`.
        target: the target: a `TreeModel`, or a model of transformers.

    Raises:
        TypeError: `model` is no assistant.
        ValueError: the two do not fit: device, dtype, vocabulary, width of hidden states, types of layers, heads.
        UnsupportedModelError: the target has no embedding in memory.

    Attributes:
        model: as given.

    Notes:
        Runs by transformers' modules, and is not captured in CUDA graphs. Puts `model` into evaluation mode.

    Example:
        target = AutoModelForCausalLM.from_pretrained("google/gemma-4-E2B-it")
        assistant = AutoModelForCausalLM.from_pretrained("google/gemma-4-E2B-it-assistant")
        generate(target, assistant, input_ids, tree="auto", max_new_tokens=200)
    """

    shares_target = True
    capturable = False

    def __init__(self, model: Any, target: TreeModel | PreTrainedModel) -> None:
        if not is_assistant(model):
            raise TypeError(f"AssistantDraft: model must be a Gemma 4 assistant, got {type(model).__name__}")
        target = adapt(target)
        self.model = model.eval()
        text = model.config.get_text_config()
        self.vocab_size = int(text.vocab_size)
        self.logits_dtype = model.lm_head.weight.dtype
        self.needs = (target.num_layers,)
        self.target_width = int(model.config.backbone_hidden_size)
        self._embed = target.model.get_input_embeddings()
        self.read_layers = self._read_layers(target)
        self._switch = AttentionSwitch(model, _ATTENTION)
        self._digest = _digest(model)
        self.check_target(target)

    def __repr__(self) -> str:
        size = f"{len(self.model.model.layers)} layers, {self._num_parameters:,} parameters"
        return f"AssistantDraft({size}, {self.device})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its weights are."""
        return self.model.lm_head.weight.device  # type: ignore[no-any-return]

    @property
    def owner(self) -> Any:
        """The assistant: a call that is given it again makes another source of it."""
        return self.model

    @property
    def graph_key(self) -> Hashable:
        """Where its weights lie."""
        return tuple(weight.data_ptr() for weight in self.model.parameters())

    @property
    def identity(self) -> str:
        """The assistant by its weights."""
        return f"assistant-{self._digest}"

    @property
    def _num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Shapes of the assistant, under a name of their own: no cache of its is moved."""
        text = self.model.config.get_text_config()
        return ModelFingerprint(
            family=self.model.config.model_type, dtype=str(self.logits_dtype).removeprefix("torch."),
            num_parameters=self._num_parameters, vocab_size=self.vocab_size, num_layers=len(self.model.model.layers),
            hidden_size=int(text.hidden_size), intermediate_size=int(text.intermediate_size),
            num_heads=int(text.num_attention_heads), num_kv_heads=0, head_dim=0,
        )  # fmt: skip

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where the target is another one than it was made for, or does not fit it."""
        if target.model.get_input_embeddings() is not self._embed or target.num_layers != self.needs[0]:
            raise ValueError(f"AssistantDraft: target must be the model that the draft was made for, got {target!r}")
        width = int(target.model.config.get_text_config(decoder=True).hidden_size)
        for name, own, its in (
            ("hidden states of width", self.target_width, width),
            ("the assistant's vocabulary of", self.vocab_size, target.vocab_size),
            ("the assistant's dtype", self.logits_dtype, target.dtype),
            ("the assistant's device", self.device, target.device),
        ):
            if own != its:
                raise ValueError(f"AssistantDraft: target must have {name} {own}, got {its}")

    def _read_layers(self, target: TreeModel) -> dict[str, int]:
        """Which of the target's layers those of each type read. One that shares rows holds the same ones."""
        types = list(getattr(target.model.config.get_text_config(decoder=True), "layer_types", None) or ())
        specs = target.new_cache(1, 1).specs
        found: dict[str, int] = {}
        for layer in self.model.model.layers:
            attention = layer.self_attn
            kind, heads, head_dim = attention.layer_type, attention.config.num_attention_heads, attention.head_dim
            if kind not in types or len(types) != target.num_layers:
                raise ValueError(
                    f"AssistantDraft: target must have a layer of the type {kind}, got family {target.family} with "
                    f"{sorted(set(types)) or 'no layer_types'}"
                )
            found[kind] = len(types) - 1 - types[::-1].index(kind)
            spec = specs[found[kind]]
            if spec.key_dim != head_dim or heads % spec.num_kv_heads:
                raise ValueError(
                    f"AssistantDraft: target must have heads of width {head_dim} for {heads} of queries in its layers "
                    f"of the type {kind}, got {spec.num_kv_heads} of width {spec.key_dim}"
                )
        if not isinstance(getattr(self._embed, "weight", None), torch.Tensor) or self._embed.weight.is_meta:
            raise UnsupportedModelError("AssistantDraft: target must hold its embedding in memory, got none there")
        return found

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch; the target's cache comes by `Drafting.share`."""
        return _AssistantDrafting(self, state, backend, clock)

    def run(
        self, tokens: torch.Tensor, hidden: torch.Tensor, cache: TreeCache, cache_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score nodes.

        Args:
            tokens: of the nodes; out of range, as one that could not be drawn, counts as the nearest one. [B, N] int64.
            hidden: the state that each goes with. [B, N, width of the target's].
            cache: the target's, of which nothing is written.
            cache_lens: committed rows. [B] int32.

        Returns:
            What the nodes' children go with, [B, N, width of the target's], and logits, [B, N, vocab].
        """
        cache.require_rows("AssistantDraft")
        batch_size, num_rows = tokens.shape
        embedded = self._embed(tokens.clamp(0, self._embed.weight.shape[0] - 1))
        model, rows = self.model, torch.cat((embedded, hidden.to(embedded.dtype)), -1).flatten(0, 1)[:, None]
        layers = {kind: cache.layers[number] for kind, number in self.read_layers.items()}
        mask = torch.zeros(num_rows, 1, dtype=torch.int32, device=tokens.device)
        # Rows are fed as a batch of single ones: the modules cut rows of a longer text, and each stands by itself.
        call = partial(
            model.model, inputs_embeds=model.pre_projection(rows), use_cache=False,
            attention_mask=dict.fromkeys(self.read_layers),
            position_ids=cache_lens.to(torch.int64).repeat_interleave(num_rows)[:, None],
            shared_kv_states={kind: (layer.keys, layer.values) for kind, layer in layers.items()},
            **{CONTEXT_KWARG: _Rows(mask, cache_lens)},
        )  # fmt: skip
        states = self._switch.run(call).last_hidden_state.view(batch_size, num_rows, -1)
        return model.post_projection(states), self._logits(states)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        model, weight = self.model, self.model.lm_head.weight
        chooser = model.masked_embedding
        if chooser is None:
            return model.lm_head(states)  # type: ignore[no-any-return]
        best = chooser.centroids(states).topk(chooser.centroid_intermediate_top_k).indices
        tokens = chooser.token_ordering.long().view(chooser.num_centroids, -1)[best].flatten(2)  # [B, N, C]
        scores = torch.einsum("bnch,bnh->bnc", weight[tokens], states)
        lowest = scores.amin(-1, keepdim=True) - 1.0
        return lowest.expand(-1, -1, self.vocab_size).scatter(-1, tokens, scores)


class _Rows(NamedTuple):
    """What the attention of a forward needs to know: B requests of N rows each."""

    tree_mask: torch.Tensor  # [N, 1] int32, empty
    cache_lens: torch.Tensor  # [B] int32


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B * N, Hq, 1, D]
    key: torch.Tensor,  # [B, S, Hkv, D]: rows of the target's cache
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Read the committed rows. Returns ([B * N, 1, Hq, D], None)."""
    rows: _Rows = kwargs[CONTEXT_KWARG]
    attended = tree_attention(
        query[:, :, 0].unflatten(0, (len(rows.cache_lens), -1)), key, value, rows.tree_mask, rows.cache_lens,
        scale=scaling,
        # A row of no set bits stands one before the committed length: the window ends there, and counts as distance.
        sliding_window=None if sliding_window is None else sliding_window + 1,
    ).out  # fmt: skip
    return attended.flatten(0, 1)[:, None], None


AttentionInterface.register(_ATTENTION, _attend)


class _AssistantDrafting(Drafting):
    """An assistant at work.

    Attributes:
        hidden: the target's hidden state of each request's newest committed token. [B, H].
    """

    source: AssistantDraft
    foreign = False

    def __init__(self, source: AssistantDraft, state: DecodingState, backend: str, clock: StageClock) -> None:
        super().__init__(source, state, backend, clock)
        self.cache: TreeCache  # the target's, by `share`
        shape = (state.cache_lens.shape[0], source.target_width)
        with torch.inference_mode(False):
            self.hidden = torch.zeros(shape, dtype=source.logits_dtype, device=source.device)
        state.carried.append(self.hidden)

    def share(self, cache: TreeCache) -> None:
        """Take the target's cache."""
        self.cache = cache

    def restart(self) -> None:
        """Forget the batch before."""
        self.hidden.zero_()

    def prefill(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> None:
        """Keep the prompts' last hidden states."""
        ends = (num_tokens.to(torch.int64) - 1)[:, None, None]
        self.hidden[lanes] = hidden_states[0].take_along_dim(ends, 1)[:, 0].to(self.hidden.dtype)

    def committed(self, path: VerifiedPath, hidden_states: Sequence[torch.Tensor]) -> None:
        """Keep the hidden states of the newest accepted tokens."""
        ends = (path.num_accepted.to(torch.int64) - 1)[:, None]
        newest = path.nodes.to(torch.int64).gather(1, ends).clamp(min=0)[:, :, None]
        self.hidden.copy_(hidden_states[0].take_along_dim(newest, 1)[:, 0])

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Draw level by level; leaves are never fed."""
        source, lens = self.source, self.state.cache_lens
        kept = self.hidden.new_zeros(*buffers.tokens.shape, self.hidden.shape[1])
        for depth, level in enumerate(layout.levels):
            with self.clock.stage("draft"):
                hidden = self.hidden[:, None] if depth == 0 else of_parents(layout, level, kept)
                outputs, logits = source.run(buffers.tokens.index_select(1, level.nodes), hidden, self.cache, lens)
                kept.index_copy_(1, level.nodes, outputs)
            self.draw_children(level, logits, buffers)

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        """Give a forward over the level."""
        num_rows = step.node_ids.shape[0]
        generator = torch.Generator().manual_seed(num_rows)
        shape = (self.hidden.shape[0], num_rows)
        tokens = torch.randint(self.source.vocab_size, shape, generator=generator).to(self.hidden.device)
        hidden = torch.randn(*shape, self.hidden.shape[1], generator=generator).to(self.hidden)
        lens = torch.full(shape[:1], context_len, dtype=torch.int32, device=self.hidden.device)
        return lambda: self.source.run(tokens, hidden, self.cache, lens)


def _digest(model: Any) -> str:
    """Tell assistants apart cheaply: shapes, and a few elements from the middle of every weight."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        middle = weight.detach().flatten()[weight.numel() // 2 :][:_DIGEST_ELEMENTS]
        digest.update(f"{name} {tuple(weight.shape)}".encode() + middle.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


def _is_format(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in _FAMILIES


def _load(folder: DraftFolder, target: TreeModel) -> AssistantDraft:
    return AssistantDraft(load_model(folder.path, target.dtype, target.device), target)


register_format(DraftFormat("gemma4_assistant", _is_format, _load))
