"""`adapt`: a Hugging Face model as a tree model, without forking or changing it."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import copy_context
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from sequoia_kernels.errors import RankError, UnsupportedModelError
from sequoia_kernels.models.attention import (
    ATTENTION_NAME,
    TreeAttention,
    attend_along_tree,
    find_attention,
    reads_block_tables,
)
from sequoia_kernels.models.attention_probe import PROBE_NAME, LayerCall, ProbedCalls
from sequoia_kernels.models.cache import CONTEXT_KWARG, ForwardCache, LayerSpec, PagedTreeCache, StepContext, TreeCache
from sequoia_kernels.models.evaluation import EvaluationCheck
from sequoia_kernels.models.families import (
    PROVEN_FAMILIES,
    cache_argument,
    check_family,
    family_name,
    foreign_code,
    position_limit,
)
from sequoia_kernels.models.forward_state import (
    Same,
    foreign_code_ran,
    forget_what_forwards_write,
    forward_state,
    known_state,
)
from sequoia_kernels.models.fused import fused_forward
from sequoia_kernels.models.native import BoundForward, NativeForward
from sequoia_kernels.models.quantised import NotNativeError
from sequoia_kernels.models.switch import AttentionSwitch, each_module
from sequoia_kernels.models.tree_step import ForwardInputs, TreeStep, causal_step
from sequoia_kernels.models.wrapped import unwrapped
from sequoia_kernels.ops import CacheTable, compact_kv_cache_
from sequoia_kernels.parallel import ForwardCall, Ranks, any_rank, current, raise_if_lost, ranks_of
from sequoia_kernels.tree import TokenTree

if TYPE_CHECKING:
    from sequoia_kernels.models.fused.forward import FusedForward

__all__ = ["FORWARDS", "ForwardInputs", "TreeModel", "adapt"]

logger = logging.getLogger("sequoia_kernels")

FORWARDS = ("auto", "native", "fused", "modules")

# Modes of torch.compile that leave CUDA graphs to the decoding loop, which captures whole steps.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
MAX_COMPILED_SHAPES = 256


class _ModelPlan(NamedTuple):
    """What probing a model found out; holds no reference to the model."""

    fingerprint: tuple[Any, ...]
    specs: tuple[LayerSpec, ...]
    vocab_size: int
    num_embeddings: int
    logits_dtype: torch.dtype
    max_positions: int | None
    inference_mode: bool  # the model's forward runs in torch's inference mode
    takes_context: bool  # the model's forward accepts additional keyword arguments
    cache_argument: str
    takes_logits_to_keep: bool
    calls: tuple[LayerCall, ...] = ()  # by layer
    own: NativeForward | FusedForward | None = None
    not_own: str | None = None  # why there is none; None as long as nobody wanted one


# By what the model's forward depended on: adapters may be exchanged for every request.
_plans: WeakKeyDictionary[PreTrainedModel, OrderedDict[Any, _ModelPlan]] = WeakKeyDictionary()
_KEPT_PLANS = 8

# What a forward may raise that meets an attention function or a cache which it was not written for.
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def adapt(
    model: PreTrainedModel | TreeModel,
    *,
    compile: bool | str = False,
    attention: str | TreeAttention | None = None,
    forward: str | None = None,
) -> TreeModel:
    """Make a Hugging Face decoder-only language model decode token trees.

    The model is used as it is: same weights, same modules, no subclass. Its attention function is exchanged while a
    forward of the returned object runs and restored behind it, so `model.generate` works as before.

    Args:
        model: a decoder-only `PreTrainedModel` with a language-modelling head, in evaluation mode. Of a PEFT model the
            one inside, with the adapters that are active at each call. A `TreeModel` is returned as it is, after a look
            at what was changed in its model.
        compile: run forwards of trees through `torch.compile`: True, or one of its modes without CUDA graphs of its
            own ("default", "max-autotune-no-cudagraphs"). Prompts are still run as they are.
        attention: what reads the cache in each layer of a forward: a backend of the op `tree_attention`, or a callable
            as `sequoia_kernels.models.TreeAttention` describes it. None takes the op with the backend that it chooses
            itself, and of a `TreeModel` the one that it has.
        forward: what runs forwards. "native": one C++ call on the model's own weights, on a CPU. "fused": few kernels
            on one GPU, which read weights where the model has them; parameters that are read together become views of
            one tensor, with the same numbers. Both for families that have a description (`models/description.py`) and
            without code of others in them, attention of one's own or compiling. "modules": the model's own forward.
            "auto", which None stands for, takes the one for the model's device where it can be and its logits on a
            small tree equal the modules'; of a `TreeModel` None keeps what it has.

    Returns:
        The tree model.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: the model or a module in it is in training mode, `compile` is not such a mode or not possible,
            `attention` no such backend, or `forward` none of the four.
        UnsupportedModelError: the model cannot decode trees; the message names the family and the reason, or the error
            of its own forward where that fails. Or its forward cannot be native or fused, which was asked for.

    Notes:
        A forward of four tokens, once a model and whenever something has changed that its forward depends on, finds
        every layer's shape and attention window. Families that the package's tests do not cover, and models with an
        attention function, a forward or a hook that is not transformers' own, are also compared with their own plain
        forward on a small tree (three more short forwards), and native or fused ones with the modules' (two). Forwards
        by the modules of one model, and of models that share layers, take turns between threads; meanwhile other
        threads must not call the model itself: they would meet the tree's attention function, which raises for want of
        a step.
        Soft-caps and sinks are always applied; some versions of transformers drop Gemma 2's soft-cap under "sdpa"
        attention. Native logits of a node are the same bits whatever else is fed, so a tree's greedy text is plain
        decoding's in every dtype.

        Compiling takes its time (about a minute for a deep model) for every number of rows that a step feeds, so it
        pays for trees that are used for long.

    Source:
        transformers' `AttentionInterface` and `AttentionMaskInterface`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> tree_model = adapt(LlamaForCausalLM(config).eval())
        >>> cache = tree_model.new_cache(batch_size=1, max_cache_len=8)
        >>> lens = torch.zeros(1, dtype=torch.int32)
        >>> tree_model.forward(torch.tensor([[3, 4]]), cache, lens, causal_step(2)).shape
        torch.Size([1, 2, 32])
    """
    mode = _compile_mode(compile)
    if forward is not None and forward not in FORWARDS:
        raise ValueError(f"adapt: forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
    if isinstance(model, TreeModel):
        model.refresh()
        mode = mode or model.compile_mode
        reads = model.attention if attention is None else _attention(attention)
        runs = forward or model.forward_mode
        unchanged = mode == model.compile_mode and reads is model.attention and runs == model.forward_mode
        return model if unchanged else model.with_settings(mode, reads, runs)
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"adapt: model must be a transformers PreTrainedModel, got {type(model).__name__}; "
            "pass the wrapped model itself"
        )
    reads = _attention("auto" if attention is None else attention)
    runs = forward or "auto"
    plan = _plan_of(model, _why_modules(mode, reads, runs) is None)
    return TreeModel(model, plan, mode, reads, runs)


def agree_on_changes(*given: Any) -> None:
    """Let all ranks of split models look at them again where one of them has to.

    Forwards of a split model are run by all of its ranks, those by which `adapt` learns about it too. So each call that
    all ranks have part in begins with this.

    Args:
        given: what was given as target and draft, the same number of things on every rank: models, tree models, sources
            that run some, or anything else, which has none.
    """
    models = [_models_of(entry) for entry in given]
    groups = [group for entries in models for model in entries if (group := ranks_of(model)) is not None]
    if not groups or current() is not None:
        return
    changed = [
        any(ranks_of(model) is not None and known_state(model) not in _plans.get(model, ()) for model in entries)
        for entries in models
    ]
    refused = None
    for model in (model for entries in models for model in entries if ranks_of(model) is not None):
        try:
            EvaluationCheck(model).check()
        except ValueError as error:
            refused = error
    split = [any(ranks_of(model) is not None for model in entries) for entries in models]
    asked = [*changed, *split, *(not is_split for is_split in split), refused is not None]
    *flags, is_refused = any_rank(groups[0], asked, "adapt")
    due, on_some, not_on_all = (flags[part * len(split) : (part + 1) * len(split)] for part in range(3))
    if any(some and other for some, other in zip(on_some, not_on_all, strict=True)):
        raise ValueError("adapt: models that are split over ranks must be given on all of them, got one on some alone")
    if refused is not None:
        raise refused
    if is_refused:
        raise RankError("adapt: models must be in evaluation mode on all ranks, got another rank's that is not")
    for entries, is_due in zip(models, due, strict=True):
        if is_due:
            for model in entries:
                _forget_plan(model)


def _models_of(given: Any) -> list[PreTrainedModel]:
    parts = given.models if isinstance(getattr(given, "models", None), tuple) else (given,)
    models = [part.model if isinstance(part, TreeModel) else unwrapped(part) for part in parts]
    return [model for model in models if isinstance(model, PreTrainedModel)]


def _forget_plan(model: PreTrainedModel) -> None:
    """Let a model as it is now be probed again."""
    plans = _plans.get(model)
    if plans is not None:
        plans.pop(known_state(model), None)


def _plan_of(model: PreTrainedModel, wants_own: bool) -> _ModelPlan:
    """Return the plan of a model as it is now: one that was made before, where nothing has changed since.

    `wants_own` a forward of our own in it, or the reason why there is none.
    """
    EvaluationCheck(model).check()
    state = known_state(model)
    plans = _plans.setdefault(model, OrderedDict())
    plan, ranks, session = plans.get(state), ranks_of(model), current()
    if plan is None and ranks is not None and session is not None and not session.in_step:
        return session.look_again(model, lambda: _plan_of(model, wants_own))
    if plan is None:
        check_family(model)
        foreign_code_ran()  # the model's own forwards are, below
        try:
            plan, probed = _make_plan(model, state)
            is_written = forward_state(model) != state  # by its forward
            if any(any_rank(ranks, [is_written], "adapt")):
                forget_what_forwards_write(model, lambda: _make_plan(model, state))
                state = forward_state(model)
                plan = plan._replace(fingerprint=state)
            foreign = foreign_code(model)
            is_strange = foreign is not None or family_name(model) not in PROVEN_FAMILIES
            if any(any_rank(ranks, [is_strange], "adapt")):
                _check_against_plain_forward(TreeModel(model, plan, forward_mode="modules"), foreign)
        except (UnsupportedModelError, RankError, torch.OutOfMemoryError):
            raise
        except _FAILURES as error:
            raise_if_lost(ranks, error, "adapt")
            _check_own_forward(model)  # the reason may be another one
            raise UnsupportedModelError(
                f"adapt: family {family_name(model)} cannot decode trees: its forward failed under a foreign attention "
                f"function and cache ({type(error).__name__}: {error})"
            ) from error
        plan = plan._replace(calls=tuple(probed))
        plans[state] = plan
        while len(plans) > _KEPT_PLANS:
            plans.popitem(last=False)
    for other in plans.values():  # of the model as it was
        if other.own is not None and other.own is not plan.own:
            other.own.let_go()
    if wants_own and plan.own is None and plan.not_own is None:
        plan = plans[state] = _with_own_forward(model, plan)
    return plan


class TreeModel:
    """A Hugging Face model that scores the nodes of a token tree in one forward; made by `adapt`.

    Attributes:
        model: the model itself, unchanged.
        family: its family, such as "llama".
        capturable: whether a forward may become part of a CUDA graph.
        compile_mode: mode of `torch.compile` that forwards of trees run through, None where they are not compiled.
        attention: what reads the cache in each layer.
        forward_mode: "auto", "native", "fused" or "modules"; see `adapt`.
        runs: what runs its forwards, "native", "fused" or "modules".
        not_native: why forwards are neither native nor fused, "" where they are.
        num_layers: attention layers.
        vocab_size: width of the logits.
        ranks: the processes that its weights are split over, None where they are whole; see `sequoia_kernels.parallel`.
        logits_dtype: of the logits: not the model's where it keeps or computes its head in another one.
        num_embeddings: tokens that the model can be fed, which may be more or fewer than it can predict: ids from 0 on.
        max_positions: positions that the model serves exactly, None without a limit; caches cannot hold more tokens.
            Where a table of positions ends, or another rule begins that cached keys would not follow. What a
            configuration gives as `max_position_embeddings` is no such limit: rotary embeddings go on, with text that
            was not trained for. See `trained_positions`.
    """

    capturable = True
    _told_of_pages = False
    ranks: Ranks | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        plan: _ModelPlan,
        compile_mode: str | None = None,
        attention: TreeAttention = attend_along_tree,
        forward_mode: str = "auto",
    ) -> None:
        self.model = model
        self.forward_mode = forward_mode
        self.family = family_name(model)
        self.compile_mode = compile_mode
        self.attention = attention
        self.ranks = ranks_of(model)
        if self.ranks is not None and compile_mode is not None:
            raise ValueError(
                f"adapt: compile must be False for a model that is split over ranks, got {compile_mode!r} for one over "
                f"{self.ranks.size}"
            )
        if any(weight.is_meta for weight in self.weights()):
            self.capturable = False  # hooks bring the weights
        self._use(plan)

    def _use(self, plan: _ModelPlan) -> None:
        self._plan = plan
        self.num_layers, self.max_positions = len(plan.specs), plan.max_positions
        self.vocab_size, self.logits_dtype = plan.vocab_size, plan.logits_dtype
        self.num_embeddings = plan.num_embeddings
        self._switch = AttentionSwitch(self.model, ATTENTION_NAME)
        self._evaluation = EvaluationCheck(self.model)
        self._compiled: Callable[..., Any] | None = None
        if self.compile_mode is not None:
            self._compiled = torch.compile(self.model.forward, mode=self.compile_mode, dynamic=False)
        self.not_native = _why_modules(self.compile_mode, self.attention, self.forward_mode) or ""
        if not self.not_native and plan.own is None:
            if plan.not_own is None:  # until now there were others' settings
                plan = self._plan = _plan_of(self.model, True)
            self.not_native = plan.not_own or ""
        self._own = None if self.not_native else plan.own
        self.runs = "modules" if self._own is None else self._own.name
        if self.forward_mode != "auto" and self.runs != self.forward_mode:
            reason = self.not_native or f"on this device they are {self.runs}"
            raise UnsupportedModelError(
                f"adapt: forward must be 'auto' or 'modules' for this {self.family} model, got {self.forward_mode!r}: "
                f"{reason}"
            )

    def refresh(self) -> None:
        """Notice what was changed in the model since: moved, cast, resized, other layers, settings or adapters.

        `adapt`, `new_cache` and so `generate` do this. A cache belongs to the model as it was when the cache was made.

        Raises:
            ValueError: the model is in training mode.
            UnsupportedModelError: it cannot decode trees any more.
        """
        if self._plan.fingerprint != known_state(self.model):
            wants_own = _why_modules(self.compile_mode, self.attention, self.forward_mode) is None
            self._use(_plan_of(self.model, wants_own))
        self._evaluation.check()

    def forward_state(self) -> tuple[Any, ...]:
        """Describe what a forward depends on besides inputs and numbers in weights: equal while nothing has changed."""
        state = forward_state(self.model)
        if self.forward_mode != "auto":
            state = (*state, self.forward_mode)
        if self._own is not None:
            state = (*state, *self._own.state)
        return state if self.attention is attend_along_tree else (*state, Same(self.attention))

    def __repr__(self) -> str:
        return f"TreeModel({self.family}, {self.num_parameters:,} parameters, {self.device}, {self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the model, which is adapted again."""
        return _restored, (self.model, self.compile_mode, self.attention, self.forward_mode)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, from the model's generation configuration as it is now."""
        ids = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if ids is None:
            ids = getattr(self.model.config, "eos_token_id", None)
        if ids is None:
            return ()
        return (int(ids),) if isinstance(ids, int) else tuple(int(token) for token in ids)

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones counted once and quantised ones as what they stand for."""
        count = 0
        sizes: dict[int, int] = {}  # of packed weights, by id
        for module in each_module(self.model):
            if not isinstance(getattr(module, "in_features", None), int):
                continue
            size = int(module.in_features) * int(getattr(module, "out_features", 0))  # type: ignore[arg-type]
            weight = module._parameters.get("weight")
            if next(module.parameters(), None) is None:  # in buffers
                count += size
            elif weight is not None and weight.numel() < size:
                sizes[id(weight)] = size
        return count + sum(sizes.get(id(weight), weight.numel()) for weight in self.model.parameters())

    @property
    def trained_positions(self) -> int | None:
        """Positions that the model was made for, None where nothing says so: `max_positions` or fewer."""
        config = self.model.config.get_text_config(decoder=True)
        limits = (self.max_positions, getattr(config, "max_position_embeddings", None))
        return min((limit for limit in limits if limit), default=None)

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return _input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model."""
        return self.model.dtype

    def with_settings(self, compile_mode: str | None, attention: TreeAttention, forward_mode: str) -> TreeModel:
        """Give the same model with forwards of another kind; `adapt` checks the settings."""
        return TreeModel(self.model, self._plan, compile_mode, attention, forward_mode)

    def weights(self) -> Iterator[torch.Tensor]:
        """Yield everything that a forward reads of the model: parameters, buffers, the parts of quantisers' weights."""
        for weight in chain(self.model.parameters(), self.model.buffers()):
            yield from _plain_parts(weight)

    def max_cache_rows(self, batch_size: int) -> int | None:
        """Rows that the caches of a batch may have, None where nothing but the memory limits them."""
        return None

    def new_cache(self, batch_size: int, max_cache_len: int, *, beyond_positions: bool = False) -> TreeCache:
        """Allocate a cache for a batch of requests.

        Args:
            batch_size: requests.
            max_cache_len: rows of each request: committed tokens and the tree behind them.
            beyond_positions: allow more rows than the model has positions. Those serve trees only, which so need not
                shrink where the positions end: no more than `max_positions` tokens may be committed.

        Returns:
            The cache, filled with zeros.

        Raises:
            ValueError: a size is not positive, or the rows exceed the model's positions.
        """
        if batch_size < 1 or max_cache_len < 1:
            raise ValueError(
                f"new_cache: batch_size and max_cache_len must be at least 1, got {batch_size} and {max_cache_len}"
            )
        self.refresh()
        if self.max_positions is not None and max_cache_len > self.max_positions and not beyond_positions:
            raise ValueError(
                f"new_cache: max_cache_len must be at most {self.max_positions}, the positions that this {self.family} "
                f"model serves exactly, got {max_cache_len}"
            )
        return TreeCache(self._plan.specs, batch_size, max_cache_len)

    def new_paged_cache(self, num_pages: int, page_size: int) -> PagedTreeCache:
        """Allocate pages for the caches of requests that come and go.

        Args:
            num_pages: pages of the pool, which all requests share.
            page_size: rows of a page.

        Returns:
            The pool, filled with zeros. Forwards take `of(block_table)`, which gives the cache of a batch. No more than
            `max_positions` tokens of a request may be committed; rows behind them serve trees only.

        Raises:
            TypeError: a size is no integer.
            ValueError: a size is not positive, or there are 2^31 rows or more.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            ...                      num_attention_heads=2)
            >>> model = adapt(LlamaForCausalLM(config).eval())
            >>> pages = model.new_paged_cache(num_pages=8, page_size=4)
            >>> block_table = torch.tensor([[6, 1], [0, -1]], dtype=torch.int32)  # two requests, of 8 rows and of 4
            >>> lens = torch.tensor([5, 2], dtype=torch.int32)  # what of them is committed
            >>> model.forward(torch.tensor([[3, 4], [5, 6]]), pages.of(block_table), lens, causal_step(2)).shape
            torch.Size([2, 2, 32])
        """
        self.refresh()
        return PagedTreeCache(self._plan.specs, num_pages, page_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        cache: TreeCache,
        cache_lens: torch.Tensor,
        step: TreeStep,
        *,
        last_row: torch.Tensor | None = None,
        hidden_states: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Score N nodes behind each request's committed tokens and store their keys and values.

        Args:
            input_ids: tokens of the nodes, in the step's order. [B, N] int64.
            cache: cache of this model for B requests: from `new_cache`, or `PagedTreeCache.of`.
            cache_lens: committed rows of each request. [B] int32, on the model's device.
            step: which nodes, what they see, where their rows go.
            last_row: the one row whose logits are wanted for each request. [B] int64, None for all rows.
            hidden_states: takes the hidden states of its keys, of all rows, as its values: [B, N, width] each. They are
                numbered as transformers does: i is the input of layer i, the number of layers what the head gets.

        Returns:
            Logits. [B, N, vocab_size], or [B, 1, vocab_size] with `last_row`, in the dtype of the model's head.

        Raises:
            ValueError: shapes do not fit together, the cache is too short or its block table leads out of its pages
                (checked for CPU tensors), or the model is in training mode.
            UnsupportedModelError: the attention function was not called once a layer, or the cache is paged, which the
                model's `attention`, or the fused forward that was asked for, does not read.

        Notes:
            Writes cache rows cache_lens[b] + node_ids[i], nothing else; `cache_lens` is not advanced. Positions are
            cache_lens[b] + depths[i]. Nodes that would lie beyond `max_positions` are fed at the last position: what
            they score means nothing, and no token that it decides may be kept. No host sync on accelerators.
        """
        return self._forward(ForwardInputs(input_ids, cache_lens, step, last_row, hidden_states), cache)

    def bind(
        self,
        input_ids: torch.Tensor,
        cache: TreeCache,
        cache_lens: torch.Tensor,
        step: TreeStep,
        *,
        last_row: torch.Tensor | None = None,
        wanted_rows: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
    ) -> BoundForward | None:
        """Prepare native forwards that read the same tensors every time, for a loop that fills them anew.

        Args:
            input_ids: as for `forward`; contiguous. Other than there, tokens out of range are fed as the nearest one
                that the model has an embedding of.
            cache: as for `forward`. Its block table, where it has one, is read and checked at every run.
            cache_lens: as for `forward`; contiguous. What it holds then is checked at every run.
            step: as for `forward`.
            last_row: as for `forward`.
            wanted_rows: in place of it, the rows whose logits are wanted, different ones, in the order in which they
                are given. [B, K] int64, contiguous.
            active: 0 for a request that is left out of a run: nothing of it is checked, written or waited for, and its
                logits stay what they were. None runs all. [B] int32, contiguous; read at every run.

        Returns:
            What runs them, with the model as it is now; None where forwards are not native.

        Raises:
            ValueError: shapes do not fit together.
        """
        own = type(self).forward is _OWN_FORWARDS[0] and type(self)._forward is _OWN_FORWARDS[1]
        native = self._own
        if not isinstance(native, NativeForward) or not own or "forward" in vars(self):
            return None  # whoever replaced it wants to be called
        inputs = ForwardInputs(input_ids, cache_lens, step, last_row, None)
        self._check_forward(inputs, cache)
        if wanted_rows is not None and (wanted_rows.dim() != 2 or wanted_rows.shape[0] != input_ids.shape[0]):
            raise ValueError(
                f"bind: wanted_rows must have shape [batch, rows] with batch {input_ids.shape[0]}, got "
                f"{list(wanted_rows.shape)}"
            )
        if active is not None and active.shape != input_ids.shape[:1]:
            raise ValueError(f"bind: active must have shape [{input_ids.shape[0]}], got {list(active.shape)}")
        return native.bind(inputs, cache, self.max_positions, self._evaluation.check, wanted_rows, active)

    def settle(self) -> None:
        """Give weights the places where forwards read them, for who notes down where they lie.

        Raises:
            ValueError: a weight has another form than when the model was adapted.
        """
        if self._own is not None:
            self._own.settle()

    def let_go(self) -> None:
        """Hold no weights beside the model's own parameters while nobody decodes; the next forward looks them up."""
        if self._own is not None:
            self._own.let_go()

    def forward_chunks(self, chunks: Sequence[ForwardInputs], cache: TreeCache) -> list[torch.Tensor]:
        """Run forwards whose chunks build on one another, as a long prompt does, in order; return each one's logits."""
        return [self._forward(chunk, cache) for chunk in chunks]

    def _forward(self, inputs: ForwardInputs, cache: TreeCache) -> torch.Tensor:
        self._check_forward(inputs, cache)
        own = self._own
        if own is not None and cache.block_table is not None and not own.takes_pages:
            self._leave_pages_to_modules()
            own = None
        if own is not None:
            return own(inputs, cache, self._plan.max_positions)
        run = partial(self._switch.run, partial(self._run, inputs, cache))
        session = None if self.ranks is None else current()
        if session is None:
            return run()
        if cache.block_table is not None:
            raise UnsupportedModelError(
                "forward: cache must not be paged for a model that is split over ranks, got pages; take new_cache"
            )
        step = inputs.step
        call = ForwardCall(
            inputs.input_ids, inputs.cache_lens, step[:3], step.num_tree_rows, step.first_node, inputs.last_row,
            tuple(inputs.hidden_states or ()),
        )  # fmt: skip
        return session.forward(self, cache, call, run)

    def look_again(self) -> None:
        """Probe the model, changed or not, as rank 0 does whose model has changed."""
        _forget_plan(self.model)
        self._use(_plan_of(self.model, _why_modules(self.compile_mode, self.attention, self.forward_mode) is None))

    def replay_cache(self, batch_size: int, max_cache_len: int) -> tuple[TreeCache, list[CacheTable]]:
        """Give this rank's part of a cache that rank 0 has made, and tables of its rows."""
        cache = TreeCache(self._plan.specs, batch_size, max_cache_len)
        return cache, CacheTable.by_device(cache.tensors())

    def replay_forward(self, call: ForwardCall, cache: TreeCache) -> torch.Tensor:
        """Run this rank's part of a forward that rank 0 has told of; its logits are rank 0's but for rounding."""
        step = TreeStep(*call.step, call.num_tree_rows, call.first_node)
        wanted = dict.fromkeys(call.hidden_states, torch.empty(0))
        return self.forward(
            call.input_ids, cache, call.cache_lens, step, last_row=call.last_row, hidden_states=wanted or None
        )

    @staticmethod
    def replay_commit(
        tables: Sequence[CacheTable], nodes: torch.Tensor, num_accepted: torch.Tensor, cache_lens: torch.Tensor
    ) -> None:
        """Move accepted rows behind the committed ones in this rank's part of a cache; see `compact_kv_cache_`."""
        compact_kv_cache_(tables, nodes, num_accepted, cache_lens)

    def _leave_pages_to_modules(self) -> None:
        """Say once that forwards on pages are not fused, whose kernels know rows; refuse where that was asked for."""
        if self.forward_mode == "fused":
            raise UnsupportedModelError(
                "forward: cache must not be paged for fused forwards, which were asked for; adapt the model with "
                "forward='auto' or 'modules'"
            )
        if not self._told_of_pages:
            self._told_of_pages = True
            logger.info("%s: forwards on paged caches by its modules, fused ones know no pages", self.family)

    def _run(self, inputs: ForwardInputs, cache: TreeCache) -> torch.Tensor:
        """Run one checked forward; the caller holds the attention switch."""
        plan = self._plan
        input_ids, cache_lens, step, last_row, hidden_states = inputs
        compiled = self._compiled if last_row is None else None  # prompts come in any length
        # a row number on the host would be compiled in
        context = StepContext.create(cache, step, cache_lens, self.attention, compiled is None)
        position_ids = (cache_lens[:, None] + step.depths).to(torch.int64)
        if plan.max_positions is not None:
            position_ids = position_ids.clamp_(max=plan.max_positions - 1)
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            plan.cache_argument: ForwardCache(cache.layers, context),
            "use_cache": True,
        }
        if plan.takes_context:
            arguments[CONTEXT_KWARG] = context
        # `logits_to_keep` keeps the same rows of every request, so each request's own row comes with B - 1 others.
        keep_rows = last_row is not None and plan.takes_logits_to_keep and last_row.shape[0] <= input_ids.shape[1]
        if keep_rows:
            arguments["logits_to_keep"] = last_row
        if hidden_states:
            arguments["output_hidden_states"] = True
        with nullcontext() if plan.inference_mode else torch.inference_mode(False), torch.no_grad():
            output = self.model(**arguments) if compiled is None else _run_compiled(compiled, arguments)
        logits = output.logits
        if hidden_states:
            hidden_states.update({number: output.hidden_states[number] for number in hidden_states})
        if context.num_calls != len(plan.specs):
            raise UnsupportedModelError(
                f"forward: family {self.family} must call its attention function once in each of {len(plan.specs)} "
                f"layers, got {context.num_calls} calls; where the model was changed, make a new cache"
            )
        if last_row is None:
            return logits
        if keep_rows:
            return logits if logits.shape[0] == 1 else logits.diagonal(dim1=0, dim2=1).t()[:, None]
        return logits.take_along_dim(last_row[:, None, None], dim=1)

    def _check_forward(self, inputs: ForwardInputs, cache: TreeCache) -> None:
        input_ids, cache_lens, step, last_row, _ = inputs
        batch_size, num_rows = input_ids.shape if input_ids.ndim == 2 else (0, 0)
        if num_rows == 0 or num_rows != step.node_ids.shape[0]:
            raise ValueError(
                f"forward: input_ids must have shape [batch, nodes] with the step's {step.node_ids.shape[0]} nodes, "
                f"got {list(input_ids.shape)}"
            )
        if cache.batch_size != batch_size or len(cache.layers) != len(self._plan.specs):
            raise ValueError(
                f"forward: cache must be this model's cache for {batch_size} requests, "
                f"got one of {len(cache.layers)} layers for {cache.batch_size}"
            )
        if cache.specs is not self._plan.specs and cache.specs != self._plan.specs:  # rows of other widths, say
            number = [one == other for one, other in zip(cache.specs, self._plan.specs)].index(False)
            raise ValueError(
                f"forward: cache must be this model's cache as the model is now, with {self._plan.specs[number]} in "
                f"layer {number}, got one with {cache.specs[number]}"
            )
        for name, tensor in (("cache_lens", cache_lens), ("last_row", last_row)):
            if tensor is not None and tensor.shape != (batch_size,):
                raise ValueError(f"forward: {name} must have shape [batch] = [{batch_size}], got {list(tensor.shape)}")
        if cache_lens.device != input_ids.device:
            raise ValueError(
                f"forward: cache_lens must be on the device of input_ids, {input_ids.device}, got {cache_lens.device}"
            )
        if cache.block_table is not None:
            if cache.block_table.device != cache_lens.device:
                raise ValueError(
                    f"forward: block_table must be on the device of cache_lens, {cache_lens.device}, got "
                    f"{cache.block_table.device}"
                )
            if not reads_block_tables(self.attention):
                raise UnsupportedModelError(
                    "forward: cache must not be paged for an attention without a true `reads_block_tables`, got pages "
                    f"of {cache.page_size} rows for {self.attention!r}"
                )
        if cache_lens.device.type == "cpu":
            shortest, longest = (int(bound) for bound in cache_lens.aminmax())
            if shortest < 0 or longest + step.num_tree_rows > cache.max_cache_len:
                raise ValueError(
                    f"forward: cache_lens must leave room for {step.num_tree_rows} tree rows in a cache of "
                    f"{cache.max_cache_len}, got {longest if shortest >= 0 else shortest}"
                )
        self._evaluation.check()


_OWN_FORWARDS = TreeModel.forward, TreeModel._forward


def _why_modules(compile_mode: str | None, attention: TreeAttention, forward_mode: str) -> str | None:
    """Return why a model's settings leave its forwards to its modules, or None."""
    if forward_mode == "modules":
        return "the modules were asked for"
    if compile_mode is not None:
        return "the modules are compiled"
    if attention is not attend_along_tree:
        return "it has an attention of its own"
    return None


def _plain_parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor, or those of which it is made: a wrapper has no memory of its own, nor every operator."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    for name in names:
        part = getattr(weight, name)
        if isinstance(part, torch.Tensor):  # of weights over ranks the device mesh is one, too
            yield from _plain_parts(part)


def _compile_mode(compile: bool | str) -> str | None:
    """Return the mode of `torch.compile` that an argument asks for, None for none."""
    if isinstance(compile, bool):
        return "default" if compile else None
    if compile not in COMPILE_MODES:
        raise ValueError(f"adapt: compile must be a bool or one of {', '.join(COMPILE_MODES)}, got {compile!r}")
    return compile


def _run_compiled(compiled: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Let each number of rows and each cache have a compiled form of its own, however many there are."""
    from torch._dynamo import config  # a second to import, for those who compile

    def run() -> Any:
        with config.patch(recompile_limit=MAX_COMPILED_SHAPES, accumulated_recompile_limit=MAX_COMPILED_SHAPES):
            return compiled(**arguments)

    return copy_context().run(run)  # what an interrupt leaves set ends with the context


def _attention(asked: str | TreeAttention) -> TreeAttention:
    """Return the attention that an argument asks for."""
    if isinstance(asked, str):
        return find_attention(asked)
    if not callable(asked):
        raise TypeError(f"adapt: attention must be callable or the name of a backend, got {type(asked).__name__}")
    return asked


def _restored(
    model: PreTrainedModel, compile_mode: str | None, attention: TreeAttention, forward_mode: str
) -> TreeModel:
    plan = _plan_of(model, _why_modules(compile_mode, attention, forward_mode) is None)
    return TreeModel(model, plan, compile_mode, attention, forward_mode)


def _check_own_forward(model: PreTrainedModel) -> None:
    """Say so where the model's own forward fails as well, which then has nothing to do with trees."""
    tokens = torch.tensor([_sample_tokens(model, 4)], device=_input_device(model))
    try:
        _run_by_itself(model, input_ids=tokens)
    except _FAILURES as error:
        because = "" if model.config.return_dict else "; set config.return_dict to True"
        raise UnsupportedModelError(
            f"adapt: model must run by itself, got {type(error).__name__} in its own forward: {error}{because}"
        ) from error


def _run_by_itself(model: PreTrainedModel, **arguments: Any) -> Any:
    """Run the model's own forward, while no other thread has the tree's attention in its configurations."""
    with torch.inference_mode(False), torch.no_grad():
        return AttentionSwitch(model, ATTENTION_NAME).at_rest(lambda: model(**arguments))


def _input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of the model's inputs, also where hooks (accelerate's) bring the weights there."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type == "meta":
        for module in (embedding, model):
            hook = module.__dict__.get("_hf_hook")
            for entry in getattr(hook, "hooks", (hook,)):
                if (execution := getattr(entry, "execution_device", None)) is not None:
                    return torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    return device


def _make_plan(model: PreTrainedModel, state: tuple[Any, ...]) -> tuple[_ModelPlan, list[LayerCall]]:
    """Run a few tokens through the model and record how its layers attend; give their calls as well, by layer."""
    parameters = inspect.signature(model.forward).parameters
    takes_context = any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values())
    try:
        with torch.inference_mode():
            probed, logits = _run_probe(model, takes_context)
        inference_mode = True
    except RuntimeError as error:
        if "inference tensor" not in str(error).lower():
            raise
        with torch.inference_mode(False):
            probed, logits = _run_probe(model, takes_context)
        inference_mode = False
    probed = _checked_calls(model, probed)
    plan = _ModelPlan(
        fingerprint=state,
        specs=tuple(call.spec for call in probed),
        vocab_size=logits.shape[-1],
        num_embeddings=model.get_input_embeddings().weight.shape[0],
        logits_dtype=logits.dtype,
        max_positions=position_limit(model, [call.chunk for call in probed if call.chunk is not None]),
        inference_mode=inference_mode,
        takes_context=takes_context,
        cache_argument=cache_argument(model),
        takes_logits_to_keep="logits_to_keep" in parameters,
    )
    return plan, probed


def _run_probe(model: PreTrainedModel, takes_context: bool) -> tuple[list[LayerCall], torch.Tensor]:
    probed = ProbedCalls()
    tokens = torch.tensor([_sample_tokens(model, 4)], device=_input_device(model))
    arguments: dict[str, Any] = {
        "input_ids": tokens,
        "position_ids": torch.arange(4, device=tokens.device)[None],
        cache_argument(model): ForwardCache([], probed),
        "use_cache": True,
    }
    if takes_context:
        arguments[CONTEXT_KWARG] = probed
    logits = AttentionSwitch(model, PROBE_NAME).run(lambda: model(**arguments).logits)
    return probed.calls, logits


def _checked_calls(model: PreTrainedModel, probed: list[LayerCall]) -> list[LayerCall]:
    """Return the calls in the order of the layers; UnsupportedModelError where tree attention cannot stand in."""
    refusal = f"adapt: family {family_name(model)} cannot decode trees: "
    for call in probed:
        if call.problem is not None:
            raise UnsupportedModelError(f"{refusal}{call.problem} ({call.module})")
    called = [call.layer_idx for call in probed]
    # Layers that were cut off after loading may still be counted in the configuration, or still be there but not run.
    present = {number for module in each_module(model) if (number := getattr(module, "layer_idx", None)) is not None}
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    num_layers = min(num_layers, len(present) or num_layers)
    if sorted(called, key=str) != sorted(range(num_layers), key=str):
        raise UnsupportedModelError(
            f"{refusal}its attention function must run once in each of {num_layers} layers, got calls from {called}"
        )
    return sorted(probed, key=lambda call: call.layer_idx or 0)


def _sample_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Return some ordinary tokens, all different where the vocabulary allows it."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return [(7 + 13 * index) % vocab_size for index in range(count)]


# The tree of the check below, behind five committed tokens:      0 -> 1 -> 3,  0 -> 2 -> 4
_CHECK_PREFIX = 5
_CHECK_PATHS = ((0, 1, 3), (0, 2, 4))
_CHECK_TREE = TokenTree([-1, 0, 0, 1, 2])


def _check_against_plain_forward(tree_model: TreeModel, foreign: str | None) -> None:
    """Refuse a model whose logits along a small tree differ from those of its own forward on each path."""
    model, device = tree_model.model, tree_model.device
    num_nodes = _CHECK_TREE.num_nodes
    tokens = _sample_tokens(model, _CHECK_PREFIX + num_nodes)
    prefix, nodes = tokens[:_CHECK_PREFIX], tokens[_CHECK_PREFIX:]
    paths = torch.tensor([prefix + [nodes[node] for node in path] for path in _CHECK_PATHS], device=device)
    plain = _run_by_itself(model, input_ids=paths, use_cache=False).logits[:, _CHECK_PREFIX:].double()

    tree = TreeStep.of(_CHECK_TREE.tensors(device))
    cache = TreeCache(tree_model._plan.specs, 1, _CHECK_PREFIX + num_nodes)
    lens = torch.zeros(1, dtype=torch.int32, device=device)
    tree_model.forward(torch.tensor([prefix], device=device), cache, lens, causal_step(_CHECK_PREFIX, device))
    scored = tree_model.forward(torch.tensor([nodes], device=device), cache, lens + _CHECK_PREFIX, tree)[0].double()
    difference = (torch.stack([scored[list(path)] for path in _CHECK_PATHS]) - plain).abs()
    error, allowed = _allowed(difference, plain, tree_model.dtype)
    if not error <= allowed:
        raise UnsupportedModelError(
            f"adapt: family {tree_model.family} cannot decode trees: its logits along a small tree differ from its own "
            f"forward by {error:.2g}, more than {allowed:.2g}"
            + (f"; {foreign} is not transformers' own" if foreign is not None else "")
        )


def _with_own_forward(model: PreTrainedModel, plan: _ModelPlan) -> _ModelPlan:
    """Give the plan a forward of our own for the model's device, or the reason why it has none."""
    device = _input_device(model)
    own: NativeForward | FusedForward
    ranks = ranks_of(model)
    if ranks is not None:
        return _by_modules(model, plan, f"its weights are split over {ranks.size} ranks")
    try:
        if device.type == "cpu":
            own = NativeForward(model, plan.calls, plan.logits_dtype)
            how = f"native forwards, {own.instruction_set}"
        elif device.type == "cuda":
            own, how = fused_forward(model, plan.calls, plan.logits_dtype, device), "fused forwards"
        else:
            raise NotNativeError(f"there are none on {device.type}")
        error, allowed = _own_error(model, plan, own, device)
        if not error <= allowed:
            raise NotNativeError(f"its logits differ from the modules' by {error:.2g}, more than {allowed:.2g}")
    except NotNativeError as reason:
        return _by_modules(model, plan, str(reason))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if device.type != "cuda":
            raise
        # A compiler that does not know the card, say: what runs without the kernels shall go on running.
        first_line = next(iter(str(error).splitlines()), "")
        return _by_modules(model, plan, f"its kernels do not run here: {type(error).__name__}: {first_line}")
    logger.info("%s: %s, weights of %s", family_name(model), how, own.weight_forms)
    return plan._replace(own=own)


def _by_modules(model: PreTrainedModel, plan: _ModelPlan, reason: str) -> _ModelPlan:
    logger.info("%s: forwards by its modules, %s", family_name(model), reason)
    return plan._replace(not_own=reason)


def _own_error(
    model: PreTrainedModel, plan: _ModelPlan, own: NativeForward | FusedForward, device: torch.device
) -> tuple[float, float]:
    """Return how far logits of our own are from the modules' along a small tree, and how far they may be."""
    chain = TokenTree.chain(_CHECK_PREFIX).parents
    tree = TokenTree([*chain, *(_CHECK_PREFIX - 1 + (parent + 1) for parent in _CHECK_TREE.parents)])
    tokens = torch.tensor([_sample_tokens(model, tree.num_nodes)], device=device)
    lens, step = torch.zeros(1, dtype=torch.int32, device=device), TreeStep.of(tree.tensors(device))
    limit = plan.max_positions
    if limit is not None and limit <= tree.num_levels:
        raise NotNativeError(f"it has {limit} positions only")
    scored = [
        TreeModel(model, entry).forward(tokens, TreeCache(plan.specs, 1, tree.num_nodes), lens, step).double()
        for entry in (plan._replace(not_own="it is what is compared with"), plan._replace(own=own))
    ]
    error = (scored[0] - scored[1]).abs()
    return _allowed(error, scored[0], model.dtype)


def _allowed(difference: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return a measure of logits' differences, and up to which two ways to compute them may differ.

    In low precision single logits may be off by more than a real error moves others (experts may even swap), so the
    mean decides there; a wrong mask or position changes it by far more.
    """
    exact = dtype in (torch.float32, torch.float64)
    return float(difference.max() if exact else difference.mean()), (1e-3 if exact else 5e-2) * float(logits.std())
