"""The target's own first layers as the draft (early exit): no second model, no second cache.

The draft is the target with its list of layers cut behind the first k: the same modules, then the target's final norm
and head, or others that were trained for it. Its keys and values are the target's own. The committed rows of the first
k layers are in the target's cache already, so there is no prompt to read and nothing to move behind a step; rows of the
tree's nodes are written by the draft and once more, with the same values, by the target's forward of the step.

Source: early exit as a draft, arXiv 2404.16710 (LayerSkip) and 2309.08168 (Draft & Verify).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.host_growth import HostGrowth
from sequoia_kernels.drafts.levels import StepTree, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.model import ModelDraft, forward_call
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import TreeCache, TreeModel, TreeStep, adapt

__all__ = ["LayersDraft", "first_layers"]

# What families call the norm behind their last layer.
_FINAL_NORMS = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")


class LayersDraft(ModelDraft):
    """The target's first layers, a norm and a head as the draft.

    Args:
        target: the target: a `TreeModel`, or a model of transformers.
        num_layers: how many of its layers draft, 1 .. all but one.
        norm: norm behind them; None takes the target's final norm.
        head: head behind that, which gives logits of the target's tokens; None takes the target's.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `num_layers` is out of range, or a module given is in training mode.
        UnsupportedModelError: the target cannot decode trees, streams its layers, or is not built of one list of layers
            that can be cut.

    Notes:
        Copies no weights and changes nothing of the target. Weights that are exchanged inside of its modules (adapters,
        another dtype, another device) are the draft's as well; where whole layers are exchanged it must be made anew.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sequoia_kernels import TokenTree, generate
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...                      num_attention_heads=2)
        >>> target = LlamaForCausalLM(config).eval()
        >>> output = generate(target, LayersDraft(target, 1), torch.tensor([[3, 4]]), tree=TokenTree.chain(3),
        ...                   eos_token_id=(), max_new_tokens=4)
        >>> len(output.new_tokens[0])
        4
    """

    scores_paths = False  # what was accepted is in its cache, whoever proposed it
    shares_target = True
    positions = None  # the target's, whose cache it is

    def __init__(
        self, target: TreeModel | PreTrainedModel, num_layers: int, *, norm: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:  # fmt: skip
        target = adapt(target)
        for name, module in (("norm", norm), ("head", head)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"LayersDraft: {name} must be a torch module, got {type(module).__name__}")
        if isinstance(num_layers, bool) or not isinstance(num_layers, int):
            raise TypeError(f"LayersDraft: num_layers must be an integer, got {num_layers!r}")
        if not 1 <= num_layers < target.num_layers:
            raise ValueError(
                f"LayersDraft: num_layers must be in 1..{target.num_layers - 1} for a target of {target.num_layers} "
                f"layers, got {num_layers}"
            )
        if type(target) is not TreeModel or any(weight.is_meta for weight in target.weights()):
            raise UnsupportedModelError(
                "LayersDraft: target must hold all of its weights on its device, got one that streams its layers "
                f"({type(target).__name__}): its first layers would be copied once more for every level of a tree"
            )
        self._cut = _CutModel(target.model, num_layers, norm, head)
        try:
            model = adapt(
                self._cut.model, compile=target.compile_mode or False, attention=target.attention,
                forward=target.forward_mode,
            )  # fmt: skip
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"LayersDraft: family {target.family} must decode with its first {num_layers} layers alone: {error}"
            ) from error
        own, whole = model.new_cache(1, 1).specs, target.new_cache(1, 1).specs
        if own != whole[:num_layers]:
            raise UnsupportedModelError(
                f"LayersDraft: family {target.family} must keep the same rows in its first {num_layers} layers, got "
                f"{own} and {whole[:num_layers]}"
            )
        super().__init__(model)
        self.num_layers, self.has_own_exit = num_layers, norm is not None or head is not None

    def __repr__(self) -> str:
        return f"LayersDraft({self.model.family}, the first {self.num_layers} layers, {self.device})"

    @property
    def identity(self) -> str:
        """Where it exits; its model is told from others by its weights."""
        return f"layers:{self.num_layers}" + (" with an exit of its own" if self.has_own_exit else "")

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Shapes of the layers, under a name of their own: no cache of theirs is moved."""
        shapes = ModelFingerprint.of(self.model)
        return dataclasses.replace(shapes, family=f"{shapes.family}-first-layers", num_kv_heads=0, linears=())

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where these are not the target's layers."""
        if not self._cut.is_part_of(target.model):
            raise ValueError(
                f"LayersDraft: target must be the model whose first {self.num_layers} layers these are, unchanged "
                f"since, got {target!r}; make another LayersDraft of it"
            )

    def is_of(self, target: TreeModel) -> bool:
        """Tell whether it is what `LayersDraft(target, num_layers)` would be now."""
        mine = self.model
        return (
            (mine.compile_mode, mine.forward_mode) == (target.compile_mode, target.forward_mode)
            and mine.attention is target.attention
            and not self.has_own_exit
            and self._cut.is_part_of(target.model)
        )

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch; the target's cache comes by `Drafting.share`."""
        return _LayersDrafting(self, state, max_cache_len, backend, clock)


class _LayersDrafting(Drafting):
    source: LayersDraft
    foreign = False

    def __init__(
        self, source: LayersDraft, state: DecodingState, max_cache_len: int, backend: str, clock: StageClock
    ) -> None:
        super().__init__(source, state, backend, clock)
        self._max_cache_len = max_cache_len
        self._cache: TreeCache | None = None
        self._grown: dict[StepTree, tuple[TokenBuffers, HostGrowth | None]] = {}

    def share(self, cache: TreeCache) -> None:
        """Take the first layers of the target's cache."""
        self._cache = cache.first_layers(self.source.num_layers)

    @property
    def cache(self) -> TreeCache:
        """The shared rows; of its own where nobody decodes but times are taken."""
        if self._cache is None:
            batch_size = self.state.cache_lens.shape[0]
            self._cache = self.source.model.new_cache(batch_size, self._max_cache_len, beyond_positions=True)
        return self._cache

    def use(self, source: DraftSource | None, clock: StageClock) -> None:
        """Go on with a source of the same layers, or let go of it."""
        super().use(source, clock)
        self._grown.clear()  # what holds the model's weights

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        """Give a forward over the level."""
        return forward_call(self.source.model, self.cache, step, context_len)

    def prepare(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Bind the forwards of all levels, where they are native."""
        self._host_growth(layout, buffers)

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Draw level by level, the root first. Mutates the cache's rows behind the committed ones, and only those."""
        host = self._host_growth(layout, buffers)
        if host is not None and host.run(self.clock):
            return  # where a value is out of range, the ops below say which
        model, state, tokens = self.source.model, self.state, buffers.tokens
        for level in layout.levels:
            with self.clock.stage("draft"):
                first, width = level.step.first_node, level.nodes.shape[0]
                drawn = tokens.index_select(1, level.nodes) if first is None else tokens.narrow(1, first, width)
                logits = model.forward(self.source.fed(drawn), self.cache, state.cache_lens, level.step)
            self.draw_children(level, logits, buffers)

    def _host_growth(self, layout: TreeLayout, buffers: TokenBuffers) -> HostGrowth | None:
        """What grows this tree in one call, where something does; made when the tree is first met."""
        if self.logits_hook is not None:
            return None
        known = self._grown.get(layout.tree)
        if known is None or known[0] is not buffers:
            host = None
            if self.state.cache_lens.is_cpu:
                host = HostGrowth.bind(
                    self.source.model, self.cache, self.state, layout, buffers, self.backend, feeds_last=False
                )
            known = self._grown[layout.tree] = buffers, host
        return known[1]


class _CutModel:
    """A model with the first layers of another one, whose modules it shares; only what leads to the layers is copied.

    Attributes:
        model: it.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, norm: nn.Module | None, head: nn.Module | None) -> None:
        self._path = _path_to_layers(model)  # names, the list's own last
        self._num_layers = num_layers
        config = copy.copy(model.config)
        _cut_config(config, num_layers)
        copies: list[nn.Module] = []
        module: nn.Module = model
        for name in ("", *self._path):
            module = module._modules[name] if name else module  # type: ignore[assignment]
            if "forward" in vars(module):
                raise UnsupportedModelError(
                    f"LayersDraft: target must run its {type(module).__name__} by the class's own forward, got one put "
                    "in its place (by accelerate's hooks, say), which would run all layers"
                )
            copied = _shallow(module, config if vars(module).get("config") is model.config else None)
            if copies:
                copies[-1]._modules[name] = copied
            copies.append(copied)
        layers = copies[-1]._modules
        for name in list(layers)[num_layers:]:
            del layers[name]
        self.model: Any = copies[0]
        self._others: list[tuple[nn.Module, str]] = []  # places of a norm and a head that are not the target's
        if norm is not None:
            self._exchange(copies[-2], next((name for name in _FINAL_NORMS if name in copies[-2]._modules), None), norm)
        if head is not None:
            own = model.get_output_embeddings()
            places = [name for name, module in model._modules.items() if module is own]
            self._exchange(copies[0], places[0] if places else None, head)

    def _exchange(self, owner: nn.Module, name: str | None, module: nn.Module) -> None:
        if name is None:
            what = "final norm" if owner is not self.model else "head"
            raise UnsupportedModelError(f"LayersDraft: target must have its {what} where it can be exchanged, got none")
        owner._modules[name] = module
        self._others.append((owner, name))

    def is_part_of(self, model: PreTrainedModel) -> bool:
        """Tell whether a model has these very layers, and all else that is shared."""
        mine: nn.Module = self.model
        its: nn.Module | None = model
        for name in (*self._path, None):
            if its is None or type(its) is not type(mine):
                return False
            if name is None:
                return list(its._modules.values())[: self._num_layers] == list(mine._modules.values())
            exchanged = [place for owner, place in self._others if owner is mine]
            if mine._modules.keys() != its._modules.keys():
                return False
            for other, module in mine._modules.items():
                if other != name and other not in exchanged and its._modules[other] is not module:
                    return False
            mine, its = mine._modules[name], its._modules[name]  # type: ignore[assignment]
        return False


def _path_to_layers(model: PreTrainedModel) -> list[str]:
    """Names that lead to the list of decoder layers."""
    wanted = int(model.config.num_hidden_layers)
    for name, module in model.named_modules():  # what is outside comes before what is in it
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return name.split(".")
    raise UnsupportedModelError(
        f"LayersDraft: target must keep its {wanted} layers in one torch ModuleList, got none of that length in "
        f"{type(model).__name__}"
    )


def _shallow(module: nn.Module, config: Any) -> nn.Module:
    """Copy a module, not what is in it: parameters, buffers and hooks stay common; its list of children is its own."""
    copied: nn.Module = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    if config is not None:
        copied.__dict__["config"] = config
    return copied


def _cut_config(config: Any, num_layers: int) -> None:
    """Let a configuration of its own say that there are so many layers, in lists of one entry a layer as well."""
    before = int(config.num_hidden_layers)
    fields = vars(config)  # not by setting attributes: a configuration may check itself in between
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = num_layers
    for name, value in list(fields.items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == before:
            fields[name] = value[:num_layers]


# Of "layers:8" and its like, so that calls share what was found out. No draft holds the model that it is kept for.
_known: WeakKeyDictionary[PreTrainedModel, dict[int, LayersDraft]] = WeakKeyDictionary()


def first_layers(target: TreeModel, num_layers: int) -> LayersDraft:
    """Give the draft of a target's first layers, the same one for every call as long as the target stays what it is."""
    known = _known.setdefault(target.model, {})
    draft = known.get(num_layers)
    if draft is None or not draft.is_of(target):
        draft = known[num_layers] = LayersDraft(target, num_layers)
    return draft
