"""Multi-token prediction modules as a draft: the layers that DeepSeek-V3 and others publish beside their model.

Modules. transformers' `MtpModel` holds them, n of them, with the target's embedding and head. Module k projects a
token's embedding beside a hidden state and runs one decoder layer of the target's kind; what comes out predicts the
next token.

Rows. With tokens y_0 .. y_c, the last one the tree's root, and the target's hidden states f_0 .. f_{c-1} behind its
final norm: module 0 has a row for each y_p, p >= 1, of y_p and f_{p-1}; module k one for each y_p, p > k, of y_p and
what module k - 1 made of y_{p-1}. Row p lies at place p - 1 - k of the module's cache, at position p. So every row of
a committed token and of the root rests on the target's own hidden states and stays; behind a step the accepted tokens'
rows are computed again in one forward a module, and nothing has to be compacted.

Tree. The root's rows are there when a step begins. A node at depth d is scored by module min(d, n - 1), from its own
token and what came out for its parent; its keys and values lie in that module's cache behind the prefix, seen along the
tree. Modules behind that one are fed as well as far as deeper nodes look for rows there. With one module, as most
models have, that is one forward of one layer a level.

Source: arXiv 2412.19437, section 2.2 (DeepSeek-V3); transformers' `MtpModel.forward_layer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.levels import TokenBuffers, TreeLayout, of_parents
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import LayerSpec, StepContext, TreeCache, TreeModel, TreeStep, adapt, causal_step
from sequoia_kernels.models.attention import ATTENTION_NAME, attend_along_tree
from sequoia_kernels.models.attention_probe import PROBE_NAME, ProbedCalls
from sequoia_kernels.models.cache import CONTEXT_KWARG, ForwardCache
from sequoia_kernels.models.switch import AttentionSwitch
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.tree import MAX_STEP_ROWS

__all__ = ["MtpDraft"]

_PREFILL_ROWS = 512  # of one forward, as a target's prefill
_TYPICAL_ACCEPTED = 4  # tokens of a step
_DIGEST_ELEMENTS = 64  # of each weight
# What a module's forward may raise that meets an attention function or a cache which it was not written for.
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class MtpDraft(DraftSource):
    """The modules for multi-token prediction of a target as its draft.

    Args:
        model: transformers' `MtpModel` of the target.
        target: the target: a `TreeModel`, or a model of transformers.

    Raises:
        TypeError: `model` is no `MtpModel`.
        UnsupportedModelError: a module attends in a way that cannot follow a tree, or keeps a state that cannot branch.

    Attributes:
        model: as given.
        num_modules: how many modules it has.

    Notes:
        Runs by transformers' modules, and is not captured in CUDA graphs. Puts `model` into evaluation mode.

    Example:
        target = AutoModelForCausalLM.from_pretrained("zai-org/GLM-4.5-Air")
        generate(target, MtpDraft.from_target(target), input_ids, tree="auto", max_new_tokens=200)
    """

    shares_target = True
    capturable = False

    def __init__(self, model: Any, target: TreeModel | PreTrainedModel) -> None:
        if not isinstance(model, _mtp_class()):
            raise TypeError(f"MtpDraft: model must be transformers' MtpModel, got {type(model).__name__}")
        target = adapt(target)
        self.model = model.eval()
        self.num_modules = len(model.layers)
        self.needs = (target.num_layers,)
        self._family, self._width = target.family, int(model.config.hidden_size)
        self._switch = AttentionSwitch(model, ATTENTION_NAME)
        self.specs, logits = self._probe()
        self.vocab_size, self.logits_dtype = logits.shape[-1], logits.dtype
        self.num_embeddings = int(model.embed_tokens.weight.shape[0])
        self._digest = _digest(model)

    @classmethod
    def from_target(cls, target: TreeModel | PreTrainedModel) -> MtpDraft:
        """Load the modules that lie in the target's own checkpoint.

        Args:
            target: the target, loaded by `from_pretrained` from the folder or hub id that holds the modules.

        Raises:
            UnsupportedModelError: transformers knows no modules of the target's family, or cannot load them.

        Notes:
            transformers raises what it finds: a missing weight is named in its RuntimeError.
        """
        target = adapt(target)
        count = getattr(target.model.config.get_text_config(decoder=True), "num_mtp_layers", None)
        if not count:
            raise UnsupportedModelError(
                f"MtpDraft: target must have modules for multi-token prediction, got family {target.family} whose "
                f"configuration says num_mtp_layers = {count}"
            )
        return cls(_mtp_class().from_pretrained(target.model, device_map={"": target.device}), target)

    def __repr__(self) -> str:
        return f"MtpDraft({self._family}, {self.num_modules} modules, {self.device})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its weights are."""
        return next(self.model.layers.parameters()).device  # type: ignore[no-any-return]

    @property
    def graph_key(self) -> Hashable:
        """Where its weights lie."""
        return tuple(weight.data_ptr() for weight in self.model.layers.parameters())

    @property
    def identity(self) -> str:
        """The modules by their weights."""
        return f"mtp-{self._digest}"

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Shapes of the modules, under a name of their own: no cache of theirs is moved."""
        return ModelFingerprint(
            family=f"{self._family}-mtp", dtype=str(self.logits_dtype).removeprefix("torch."),
            num_parameters=sum(weight.numel() for weight in self.model.layers.parameters()),
            vocab_size=self.vocab_size, num_layers=self.num_modules, hidden_size=self._width, intermediate_size=None,
            num_heads=0, num_kv_heads=0, head_dim=0,
        )  # fmt: skip

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where the modules are another model's, or of another dtype than that is now."""
        if target.model.get_input_embeddings() is not self.model.embed_tokens or target.num_layers != self.needs[0]:
            raise ValueError(f"MtpDraft: target must be the model that the modules were made for, got {target!r}")
        own = next(self.model.layers.parameters()).dtype
        if target.dtype != own:
            raise ValueError(f"MtpDraft: target must be of the modules' dtype {own}, got {target.dtype}")

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch with empty caches."""
        return _MtpDrafting(self, state, max_cache_len, backend, clock)

    # The modules

    def run(
        self, module: int, hidden: torch.Tensor, tokens: torch.Tensor, cache: TreeCache, cache_lens: torch.Tensor,
        step: TreeStep, positions: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Run one module over some rows.

        Args:
            module: its number.
            hidden: what it reads beside the tokens. [B, N, H].
            tokens: of the rows; out of range, as one that could not be drawn, counts as the nearest one. [B, N] int64.
            cache: of all modules; mutates this one's rows cache_lens[b] + node.
            cache_lens: rows in front of the step's. [B] int32.
            step: the rows.
            positions: position of the row that the step counts depths from. [B] int32.

        Returns:
            What comes out. [B, N, H].
        """
        context = StepContext.create(cache, step, cache_lens, attend_along_tree)
        tokens = tokens.clamp(0, self.num_embeddings - 1)
        position_ids = (positions[:, None] + step.depths).to(torch.int64)
        call = partial(
            self.model.forward_layer, module, hidden, position_ids, ForwardCache(cache.layers, context),
            input_ids=tokens, **{CONTEXT_KWARG: context},
        )  # fmt: skip
        output: torch.Tensor = self._switch.run(call)
        if context.num_calls != 1:
            raise UnsupportedModelError(
                f"MtpDraft: a module of family {self._family} must attend once, got {context.num_calls} times"
            )
        return output

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Give the logits of what came out. [B, N, H] -> [B, N, vocab]."""
        rows: torch.Tensor = self.model._project_to_logits(outputs)  # some families scale or cut what the head gets
        return rows

    def _probe(self) -> tuple[tuple[LayerSpec, ...], torch.Tensor]:
        """Run a few rows through each module and see what it stores; give the last one's logits as well."""
        refusal = f"MtpDraft: family {self._family} cannot decode trees with its modules: "
        specs: list[LayerSpec] = []
        device = self.device
        tokens, positions = torch.zeros(1, 4, dtype=torch.int64, device=device), torch.arange(4, device=device)[None]
        output = torch.zeros(1, 4, self._width, dtype=next(self.model.layers.parameters()).dtype, device=device)
        for module in range(self.num_modules):
            probed = ProbedCalls()
            call = partial(
                self.model.forward_layer, module, output, positions, ForwardCache([], probed), input_ids=tokens,
                **{CONTEXT_KWARG: probed},
            )  # fmt: skip
            try:
                output = AttentionSwitch(self.model, PROBE_NAME).run(call)
            except _FAILURES as error:
                raise UnsupportedModelError(f"{refusal}{type(error).__name__}: {error}") from error
            calls = probed.calls
            if len(calls) != 1 or calls[0].layer_idx != module:
                raise UnsupportedModelError(
                    f"{refusal}module {module} must attend once, as layer {module}, got {len(calls)} calls"
                )
            problem = calls[0].problem or (calls[0].chunk and "it attends in chunks")
            if problem:
                raise UnsupportedModelError(f"{refusal}{problem}")
            specs.append(calls[0].spec)
        with torch.no_grad():
            return tuple(specs), self.logits(output)


class _MtpDrafting(Drafting):
    """The modules at work.

    Attributes:
        outputs: what each module made of the root. [B, n, H].
    """

    source: MtpDraft
    foreign = False

    def __init__(
        self, source: MtpDraft, state: DecodingState, max_cache_len: int, backend: str, clock: StageClock
    ) -> None:
        super().__init__(source, state, backend, clock)
        batch_size, device = state.cache_lens.shape[0], source.device
        self.cache = TreeCache(source.specs, batch_size, max_cache_len)
        dtype = next(source.model.layers.parameters()).dtype
        with torch.inference_mode(False):
            self.outputs = torch.zeros(batch_size, source.num_modules, source._width, dtype=dtype, device=device)
            # The tokens of the newest tree, for `committed`.
            self.tree_tokens = torch.zeros(batch_size, MAX_STEP_ROWS, dtype=torch.int64, device=device)
        state.carried.append(self.outputs)

    def restart(self) -> None:
        """Forget the batch before."""
        for tensor in (*self.cache.tensors(), self.outputs, self.tree_tokens):
            tensor.zero_()

    def _front(self, lens: torch.Tensor, module: int) -> torch.Tensor:
        """Rows of a module in front of the one of the token at place `lens`; ended requests hold fewer than modules."""
        return (lens - 1 - module).clamp(min=0)

    # Committed rows

    def prefill(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> None:
        """Compute the rows of the prompts and of the roots, module by module."""
        source = self.source
        # A source that needs hidden states is given whole prompts once, and never begun anew.
        assert len(lanes) == self.cache.batch_size
        ends = num_tokens.to(torch.int64)[:, None]
        fed = torch.cat((tokens[:, 1:], torch.zeros_like(tokens[:, :1])), 1)
        fed.scatter_(1, ends - 1, self.state.root_tokens[:, None])
        hidden = hidden_states[0].to(self.outputs.dtype)
        for module in range(min(source.num_modules, tokens.shape[1])):
            if module > 0:
                fed, hidden = fed[:, 1:], hidden[:, :-1]
            parts = []
            for start in range(0, fed.shape[1], _PREFILL_ROWS):
                chunk = slice(start, start + _PREFILL_ROWS)
                cache_lens = torch.full_like(self.state.cache_lens, start)
                step = causal_step(fed[:, chunk].shape[1], tokens.device)
                parts.append(
                    source.run(
                        module, hidden[:, chunk], fed[:, chunk], self.cache, cache_lens, step, cache_lens + module + 1
                    )
                )
            hidden = torch.cat(parts, 1)
            newest = (ends - 1 - module).clamp(min=0)[:, :, None]
            self.outputs[:, module] = hidden.take_along_dim(newest, 1)[:, 0]

    def committed(self, path: VerifiedPath, hidden_states: Sequence[torch.Tensor]) -> None:
        """Compute the rows of the accepted tokens and of the new root from the target's hidden states."""
        state = self.state
        with self.clock.stage("draft"):
            nodes = path.nodes
            if nodes.is_cpu:  # where it can be read without a wait
                nodes = nodes[:, : int(path.num_accepted.max())]
            nodes = nodes.clamp(min=0).to(torch.int64)
            num_accepted = path.num_accepted.to(torch.int64)[:, None]
            hidden = hidden_states[0].take_along_dim(nodes[:, :, None], 1).to(self.outputs.dtype)
            tokens = torch.nn.functional.pad(self.tree_tokens.gather(1, nodes[:, 1:]), (0, 1))
            tokens.scatter_(1, num_accepted - 1, state.root_tokens[:, None])
            before = state.cache_lens - path.num_accepted * state.active  # as they were before this step
            self._run_chain(hidden, tokens, before, num_accepted)

    def _run_chain(
        self, hidden: torch.Tensor, tokens: torch.Tensor, before: torch.Tensor, num_rows: torch.Tensor
    ) -> None:
        """Compute all modules' rows of tokens behind `before` committed ones; keep what the last one's are. [B, 1]."""
        step = causal_step(tokens.shape[1], tokens.device)
        for module in range(self.source.num_modules):
            rows = self._front(before + 1, module)
            output = self.source.run(module, hidden, tokens, self.cache, rows, step, before + 1)
            # The next module reads them one token later, the old root's in front.
            hidden = torch.cat((self.outputs[:, module : module + 1], output[:, :-1]), 1)
            self.outputs[:, module] = output.take_along_dim(num_rows[:, :, None] - 1, 1)[:, 0]

    # A step

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Draw level by level; leaves are never fed. Mutates the caches' rows behind the root's."""
        source, state = self.source, self.state
        last = source.num_modules - 1
        shape = (*buffers.tokens.shape, source._width)
        kept = [self.outputs.new_zeros(shape) for _ in range(last + 1)]  # what came out for each node, by module
        for depth, level in enumerate(layout.levels):
            with self.clock.stage("draft"):
                scoring = min(depth, last)
                if depth == 0:
                    for module, outputs in enumerate(kept):
                        outputs[:, 0] = self.outputs[:, module]
                else:
                    tokens = buffers.tokens.index_select(1, level.nodes)
                    # Behind the one that scores, those whose rows deeper nodes look for.
                    for module in range(scoring, min(last, len(layout.levels) - 1) + 1):
                        of_parent = min(depth - 1, last) if module == scoring else module - 1
                        hidden = of_parents(layout, level, kept[of_parent])
                        rows = self._front(state.cache_lens, module)
                        output = source.run(module, hidden, tokens, self.cache, rows, level.step, state.cache_lens)
                        kept[module].index_copy_(1, level.nodes, output)
                logits = source.logits(kept[scoring].index_select(1, level.nodes))
            self.draw_children(level, logits, buffers)
        self.see_tree(layout, buffers)

    def see_tree(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Keep a tree's tokens for `committed`, whoever proposed them."""
        self.tree_tokens[:, : layout.num_nodes].copy_(buffers.tokens)

    # What it costs

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        """Give the last module's forward over the level."""
        num_rows = step.node_ids.shape[0]
        hidden, tokens, lens = self._sample_rows(num_rows, context_len)
        module = self.source.num_modules - 1
        rows = self._front(lens, module)
        return lambda: self.source.logits(self.source.run(module, hidden, tokens, self.cache, rows, step, lens))

    def step_call(self, context_len: int) -> Callable[[], object]:
        """Give all modules' forwards over a few accepted tokens."""
        hidden, tokens, lens = self._sample_rows(_TYPICAL_ACCEPTED, context_len)
        return lambda: self._run_chain(hidden, tokens, lens, torch.ones_like(tokens[:, :1]))

    def _sample_rows(self, num_rows: int, context_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch_size, device = self.cache.batch_size, self.outputs.device
        generator = torch.Generator().manual_seed(num_rows)
        tokens = torch.randint(self.source.num_embeddings, (batch_size, num_rows), generator=generator).to(device)
        hidden = torch.randn(batch_size, num_rows, self.outputs.shape[2], generator=generator)
        lens = torch.full((batch_size,), context_len, dtype=torch.int32, device=device)
        return hidden.to(self.outputs), tokens, lens


def _mtp_class() -> Any:
    try:
        from transformers.modeling_layers import MtpModel
    except ImportError:
        raise UnsupportedModelError(
            "MtpDraft: transformers must have MtpModel, which came behind 5.17; install a newer version"
        ) from None
    return MtpModel


def _digest(model: Any) -> str:
    """Tell modules apart cheaply: shapes, and a few elements from the middle of every weight."""
    digest = hashlib.sha256()
    for weight in model.layers.parameters():
        middle = weight.detach().flatten()[weight.numel() // 2 :][:_DIGEST_ELEMENTS]
        digest.update(f"{tuple(weight.shape)}".encode() + middle.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]
