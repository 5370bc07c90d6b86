"""An EAGLE-3 head as a draft: one layer on the target's hidden states, a forward a level; P-EAGLE, one for all levels.

Rows. The head's cache has one row less than the text has tokens: row t holds token y_{t+1} with the target's feature
f_t, so c committed tokens with their root give rows 0..c-1, the root's last. That row is the tree's slot 0 and node j
lies at row c - 1 + j, which is what the tree's own masks and depths say for a prefix of c - 1 rows.

Steps. When a step has committed a tokens, their rows are computed again from the target's features, in one forward with
the new root's row behind them. So nothing of a tree's rows is kept and nothing has to be compacted. The forward feeds
as many rows as the tree has levels; what lies behind the root's row is padding, written where the next tree goes.
Whatever is drafted before the next step ends starts from the root's output and logits, which are kept until then.

P-EAGLE. The padding behind the root's row are rows of the mask token and the learned feature: causal attention makes
them the depths below the root, so the same forward gives a row for every depth. All nodes of a depth share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.eagle3.config import is_eagle3
from sequoia_kernels.drafts.eagle3.loading import LoadedHead, load_head
from sequoia_kernels.drafts.eagle3.native import NativeHead
from sequoia_kernels.drafts.eagle3.readings import FEWEST_ROWS, MOST_ROWS, LayerReading, compare_readings
from sequoia_kernels.drafts.eagle3.rows import Rows, bind_rows
from sequoia_kernels.drafts.folders import DraftFolder, DraftFormat, register_format
from sequoia_kernels.drafts.levels import TokenBuffers, TreeLayout
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.models import FewRowsLinear, LayerSpec, TreeCache, TreeModel, TreeStep, causal_step
from sequoia_kernels.models.quantised import NotNativeError
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.tree import MAX_STEP_ROWS, TokenTree

__all__ = ["Eagle3Draft"]

logger = logging.getLogger("sequoia_kernels")

FORWARDS = ("auto", "native", "torch")

_PREFILL_ROWS = 512  # of one forward, as a target's prefill
_measuring = threading.Lock()  # calls of several threads with one head, which only the first of them measures
_DIGEST_ELEMENTS = 256  # of each weight
_NOT_DIGESTED = ("layer_config", "other_layers")  # the one is digested by itself, the other follows from the ids


class Eagle3Draft(DraftSource):
    """An EAGLE-3 or P-EAGLE head as the draft; made by `from_folder` or `draft_from_folder`.

    Args:
        loaded: the head with its config.
        name: what to call it, a path say.
        num_depths: rows that a parallel head gives in a forward; deeper levels take the last one. None for as many as
            it was trained for. Other heads give one.
        forward: what runs the forwards of a step: "native", one C++ call on a CPU; "torch"; "auto" takes native where
            it can be.

    Attributes:
        reading: how the folder's layer ids were read, once that was measured; None before, and where nothing is open.
        native: the native head, None where forwards are torch's.
        not_native: why they are, "" where they are not.
    """

    def __init__(
        self, loaded: LoadedHead, name: str = "", *, num_depths: int | None = None, forward: str = "auto"
    ) -> None:
        self.head, self.name = loaded.head, name
        self._read_features(loaded)
        self.reading: LayerReading | None = None
        parallel = loaded.config.mask_token_id is not None
        if num_depths is not None and (num_depths < 1 or (num_depths > 1 and not parallel)):
            rule = "be at least 1" if parallel else "be 1 for a head that is not parallel"
            raise ValueError(f"Eagle3Draft: num_depths must {rule}, got {num_depths}")
        self.num_depths = num_depths or loaded.config.num_depths
        self.vocabulary, self.vocab_size = loaded.vocabulary, loaded.vocab_size
        self._digest = _digest(loaded)
        self.native, self.not_native = _native(loaded, forward)
        # torch's threads wait for more work a while and keep those of native forwards from running.
        self._fc = None if self.native is None else FewRowsLinear(loaded.head.fc.weight, loaded.head.fc.bias)

    @classmethod
    def from_folder(
        cls,
        path_or_id: str | os.PathLike[str],
        target: TreeModel,
        *,
        feature_layers: Sequence[int] | None = None,
        num_depths: int | None = None,
        forward: str = "auto",
    ) -> Eagle3Draft:
        """Load a head.

        Args:
            path_or_id: its folder, or a hub id.
            target: the target that it was trained for; the head runs on its device in its dtype, and shares its
                embeddings and head where the folder has none.
            feature_layers: which of the target's `hidden_states` it reads, where the folder does not say so or is
                wrong: the output never depends on them, only the speed does. None takes the folder's ids; where they
                can be read in two ways, the first call of `generate` with a prompt of 17 tokens measures both.
            num_depths: see the class.
            forward: see the class.

        Raises:
            FileNotFoundError: no such folder, none with a config.json and weights, or the id is neither cached nor
                reachable.
            ValueError: an option is not understood, a weight is missing, left over or of another shape, or the head
                does not fit the target, or its forwards cannot be native, which was asked for.

        Example:
            draft = Eagle3Draft.from_folder("heads/eagle3-llama3.1-8b", adapt(target))
            generate(target, draft, input_ids, tree=TokenTree.chain(6), max_new_tokens=200)
        """
        folder = DraftFolder.open(path_or_id, "Eagle3Draft.from_folder")
        if not is_eagle3(folder.config):
            raise ValueError(f"{folder}: must be an EAGLE-3 or P-EAGLE head, got {folder.config.get('architectures')}")
        loaded = load_head(folder, target, feature_layers)
        return cls(loaded, os.fspath(path_or_id), num_depths=num_depths, forward=forward)

    def __repr__(self) -> str:
        kind = "eagle3" if self.loaded.config.mask_token_id is None else "peagle"
        layers = ", ".join(map(str, self.loaded.feature_layers))
        return (
            f"Eagle3Draft({kind}, {self.fingerprint.num_parameters:,} parameters, hidden states {layers}, "
            f"{self.name or self.device})"
        )

    @property
    def runs(self) -> str:
        """What runs the forwards of its steps, "native" or "torch"."""
        return "torch" if self.native is None else "native"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its weights are."""
        return self.head.fc.weight.device

    @property
    def logits_dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of its weights."""
        return self.head.lm_head.weight.dtype

    @property
    def graph_key(self) -> Hashable:
        """Where its weights lie, which a captured step reads, how many rows it gives, and of which hidden states."""
        weights = tuple(weight.data_ptr() for weight in self.head.weights())
        return weights, self.num_depths, self.loaded.feature_layers

    @property
    def identity(self) -> str:
        """The head by its options and weights: what acceptance was measured with holds for no other."""
        layers = ".".join(map(str, self.loaded.feature_layers))
        return f"eagle3-{self._digest}-{self.num_depths}-{layers}-{self.runs}"

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Shapes of the head, those that it shares with the target among them."""
        head, config = self.head, self.loaded.config.layer_config
        matrices = [head.fc.weight, head.lm_head.weight]
        for layer in head.layers:
            matrices += [layer.qkv.weight, layer.output.weight, layer.gate_up.weight, layer.down.weight]
        shapes = sorted((weight.shape[1], weight.shape[0]) for weight in matrices)
        return ModelFingerprint(
            family="eagle3" if self.loaded.config.mask_token_id is None else "peagle",
            dtype=str(self.logits_dtype).removeprefix("torch."),
            num_parameters=sum(weight.numel() for weight in (head.embed, *matrices)),
            vocab_size=self.vocab_size,
            num_layers=len(head.layers),
            hidden_size=int(config.hidden_size),
            intermediate_size=int(config.intermediate_size),
            num_heads=head.num_heads,
            num_kv_heads=head.num_kv_heads,
            head_dim=head.head_dim,
            linears=tuple((*shape, shapes.count(shape)) for shape in dict.fromkeys(shapes)),
        )

    def _read_features(self, loaded: LoadedHead) -> None:
        self.loaded = loaded
        self.needs = tuple(dict.fromkeys(loaded.feature_layers))
        self._order = [self.needs.index(number) for number in loaded.feature_layers]

    @torch.inference_mode()
    def meet_prompts(self, target: TreeModel, prompts: torch.Tensor, prompt_lens: Sequence[int]) -> None:
        """Find out on a prompt which hidden states the folder's layer ids mean, where that is open.

        Runs the target and the head once over up to 65 tokens of the longest prompt. Shorter ones than 17 tokens leave
        the question open. A target that streams its layers is not run for it.
        """
        with _measuring:
            self._settle_reading(target, prompts, prompt_lens)

    def _settle_reading(self, target: TreeModel, prompts: torch.Tensor, prompt_lens: Sequence[int]) -> None:
        documented, other = self.loaded.feature_layers, self.loaded.other_layers
        if other is None:
            return
        settled = dataclasses.replace(self.loaded, other_layers=None)
        if any(weight.is_meta for weight in target.weights()):
            logger.info("%r: layer ids are read as its form documents, not measured, since the target streams", self)
            self._read_features(settled)
            return
        longest = max(range(len(prompt_lens)), key=prompt_lens.__getitem__)
        num_tokens = min(prompt_lens[longest], MOST_ROWS + 1)
        if num_tokens <= FEWEST_ROWS:
            return
        tokens = prompts[longest, :num_tokens].to(target.device)
        mapped = None if self.vocabulary is None else self.vocabulary.draft_to_target
        found = compare_readings(target, tokens, documented, other, self._text_logits, mapped)
        self._read_features(dataclasses.replace(settled, feature_layers=found.layers))
        self.reading = found
        measured = f"{found.overlap:.3f}, by {list(found.other)} {found.other_overlap:.3f} ({found.num_rows} rows)"
        if found.is_documented:
            logger.info("%r: layer ids are read as its form documents; overlap with the target %s", self, measured)
        else:
            logger.warning(
                "%r: layer ids are read other than its form documents; overlap with the target %s", self, measured
            )

    def _text_logits(self, tokens: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Score a text by itself: tokens [R] and the target's hidden states, [R, width] each -> [R, Vd]."""
        rows = self.head.combine([feature[None].to(self.logits_dtype) for feature in features])
        cache_lens = torch.zeros(1, dtype=torch.int32, device=tokens.device)
        cache, step = _new_cache(self, 1, len(tokens)), causal_step(len(tokens), tokens.device)
        return self.head.logits(self.head.forward(tokens[None], rows, cache, cache_lens, step))[0]

    def features(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the head's features of what `needs` names. [B, N, width] each -> [B, N, H]."""
        return self.head.combine([hidden_states[place] for place in self._order], self._fc)

    def check_target(self, target: TreeModel) -> None:
        """Raise ValueError where the target gives other features than it reads, or has other tokens."""
        width = int(target.model.config.get_text_config(decoder=True).hidden_size)
        if width != self.loaded.target_width:
            raise ValueError(
                f"Eagle3Draft: target must have hidden states of width {self.loaded.target_width}, got {width}"
            )
        if self.vocabulary is not None and self.vocabulary.vocab_size != target.vocab_size:
            known = self.vocabulary.vocab_size
            raise ValueError(f"Eagle3Draft: target must have {known} tokens, got {target.vocab_size}")

    def start(
        self, target: TreeModel, state: DecodingState, max_cache_len: int, *, backend: str, clock: StageClock
    ) -> Drafting:
        """Begin a batch with an empty cache."""
        return _Eagle3Drafting(self, state, max_cache_len, backend, clock)


class _Eagle3Drafting(Drafting):
    source: Eagle3Draft
    foreign = False

    def __init__(
        self, source: Eagle3Draft, state: DecodingState, max_cache_len: int, backend: str, clock: StageClock
    ) -> None:
        super().__init__(source, state, backend, clock)
        batch_size, device, depths = state.cache_lens.shape[0], source.device, source.num_depths
        self.cache = _new_cache(source, batch_size, max_cache_len + depths)
        width, dtype = source.head.embed.shape[1], source.logits_dtype
        with torch.inference_mode(False):
            # What a step leaves for the next one, of the root's row and, of a parallel head, of the depths below it.
            kept = torch.float32 if source.native is not None else dtype
            self.outputs = torch.zeros(batch_size, depths, width, dtype=kept, device=device)
            self.logits = torch.zeros(batch_size, depths, source.vocab_size, dtype=dtype, device=device)
            # The tokens of the newest tree: a replayed graph of `grow` leaves them here for `committed`.
            self.tree_tokens = torch.zeros(batch_size, MAX_STEP_ROWS, dtype=torch.int64, device=device)
            self._depths = torch.arange(depths, device=device)
        state.carried += [self.outputs, self.logits]
        self._trees: dict[Any, _TreeRows] = {}
        self._chains: dict[int, Rows] = {}
        self._chain_steps: dict[int, TreeStep] = {}  # which captured graphs read

    def use(self, source: DraftSource | None, clock: StageClock) -> None:
        """Go on with a source of the same weights, or let go of it."""
        super().use(source, clock)
        self._chains.clear()  # what holds the weights
        for tree in self._trees.values():
            tree.rows.clear()

    def restart(self) -> None:
        """Forget the batch before."""
        for tensor in (*self.cache.tensors(), self.outputs, self.logits, self.tree_tokens):
            tensor.zero_()
        for tree in self._trees.values():
            tree.features.zero_()

    def _bind(self, num_rows: int, step: TreeStep, num_wanted: int | None = None) -> Rows:
        source = self.source
        return bind_rows(source.head, source.native, self.cache, num_rows, step, num_wanted)

    def prefill(
        self, lanes: list[int], tokens: torch.Tensor, num_tokens: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> None:
        """Compute the rows of the prompts, the roots' among them."""
        source, head = self.source, self.source.head
        num_rows, device = tokens.shape[1] + source.num_depths - 1, tokens.device
        ends = num_tokens.to(torch.int64)[:, None]
        fed = torch.cat((tokens[:, 1:], tokens.new_zeros(len(lanes), source.num_depths)), 1)
        fed.scatter_(1, ends - 1, self.state.root_tokens[lanes][:, None])
        is_all = len(lanes) == self.cache.batch_size
        cache = self.cache if is_all else _new_cache(source, len(lanes), num_rows)
        outputs = self.outputs[lanes].to(source.logits_dtype)
        wanted = ends - 1 + self._depths
        for start in range(0, num_rows, _PREFILL_ROWS):
            count = min(_PREFILL_ROWS, num_rows - start)
            features = source.features([states[:, start : start + count] for states in hidden_states])
            features = torch.nn.functional.pad(features, (0, 0, 0, count - features.shape[1]))
            chunk = self._masked(fed[:, start : start + count], features, ends - start)
            cache_lens = torch.full((len(lanes),), start, dtype=torch.int32, device=device)
            found = head.forward(*chunk, cache, cache_lens, causal_step(count, device))
            here = wanted - start
            rows = found.take_along_dim(here.clamp(0, count - 1)[:, :, None], 1)
            outputs = torch.where(((here >= 0) & (here < count))[:, :, None], rows, outputs)
        self.outputs[lanes] = outputs.to(self.outputs.dtype)
        self.logits[lanes] = head.logits(outputs)
        if is_all:
            return
        for whole, part in zip(self.cache.tensors(), cache.tensors(), strict=True):
            whole[lanes, :num_rows] = part

    def _masked(
        self, tokens: torch.Tensor, features: torch.Tensor, ends: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let rows from `ends` on be those of what nobody knows yet, where the head has such. Ends: [B, 1]."""
        head = self.source.head
        if head.mask_feature is None or head.mask_token_id is None:
            return tokens, features
        unknown = torch.arange(tokens.shape[1], device=tokens.device) >= ends
        tokens = tokens.masked_fill(unknown, head.mask_token_id)
        return tokens, torch.where(unknown[:, :, None], head.mask_feature, features)

    def level_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        """Give a forward over the level with its logits, which of a parallel head are there already."""
        if self.source.head.mask_feature is not None:
            buffer = self.logits[:, :1].expand(-1, step.node_ids.shape[0], -1)
            return lambda: buffer.contiguous()
        return self._forward_call(step, context_len)

    def step_call(self, context_len: int) -> Callable[[], object] | None:
        """Give a parallel head's one forward."""
        if self.source.head.mask_feature is None:
            return None
        return self._forward_call(causal_step(self.source.num_depths, self.source.device), context_len)

    def _forward_call(self, step: TreeStep, context_len: int) -> Callable[[], object]:
        head, num_rows, device = self.source.head, step.node_ids.shape[0], self.source.device
        batch_size = self.cache.batch_size
        generator = torch.Generator().manual_seed(num_rows)
        tokens = torch.randint(head.embed.shape[0], (batch_size, num_rows), generator=generator).to(device)
        features = torch.randn(batch_size, num_rows, self.outputs.shape[2], generator=generator)
        features = features.to(device, self.outputs.dtype)
        cache_lens = torch.full((batch_size,), context_len, dtype=torch.int32, device=device)
        rows = self._bind(num_rows, step)
        return lambda: rows.run(tokens, features, cache_lens)

    def prepare(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Allocate the features of the tree's nodes, and bind the forwards of its levels."""
        tree = self._trees.get(layout.tree)
        if tree is None:
            tree = self._trees[layout.tree] = _TreeRows(layout, self.outputs)
        if not tree.rows and self.source.head.mask_feature is None:
            tree.rows = [self._bind(level.nodes.shape[0], level.step) for level in layout.levels[1:]]

    def grow(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Draw level by level; leaves are never fed. Mutates the cache's rows behind the committed ones."""
        self.prepare(layout, buffers)
        head, tree = self.source.head, self._trees[layout.tree]
        prefix = self.state.cache_lens - 1  # the root's row is the tree's first
        for index, level in enumerate(layout.levels):
            with self.clock.stage("draft"):
                if head.mask_feature is not None:  # a row for each depth
                    row = min(index, self.source.num_depths - 1)
                    logits = self.logits[:, row : row + 1].expand(-1, level.nodes.shape[0], -1)
                else:
                    outputs, logits = self.outputs, self.logits
                    if index > 0:
                        tokens = buffers.tokens.index_select(1, level.nodes)  # one that could not be drawn is -1
                        outputs, logits = tree.rows[index - 1].run(tokens, tree.of_parents(index), prefix)
                    if index + 1 < len(layout.levels):
                        tree.store(index, head.next_features(outputs))
            self.draw_children(level, logits, buffers)
        self.see_tree(layout, buffers)

    def see_tree(self, layout: TreeLayout, buffers: TokenBuffers) -> None:
        """Keep a tree's tokens for `committed`, whoever proposed them."""
        self.tree_tokens[:, : layout.num_nodes].copy_(buffers.tokens)

    def committed(self, path: VerifiedPath, hidden_states: Sequence[torch.Tensor]) -> None:
        """Compute the rows of the accepted tokens and of the new root from the target's features."""
        source, state = self.source, self.state
        with self.clock.stage("draft"):
            num_accepted = path.num_accepted.to(torch.int64)[:, None]
            nodes = path.nodes.clamp(min=0).to(torch.int64)
            features = source.features([states.take_along_dim(nodes[:, :, None], 1) for states in hidden_states])
            extra = source.num_depths - 1
            tokens = self.tree_tokens.gather(1, nodes[:, 1:])
            tokens = torch.nn.functional.pad(tokens, (0, extra + 1))
            tokens.scatter_(1, num_accepted - 1, state.root_tokens[:, None])
            features = torch.nn.functional.pad(features, (0, 0, 0, extra)).to(self.outputs.dtype)
            tokens, features = self._masked(tokens, features, num_accepted)
            cache_lens = state.cache_lens - path.num_accepted * state.active  # as they were before this step
            num_rows = tokens.shape[1]
            rows = self._chains.get(num_rows)
            if rows is None:
                step = self._chain_steps.setdefault(num_rows, causal_step(num_rows, tokens.device))
                rows = self._chains[num_rows] = self._bind(num_rows, step, extra + 1)
            wanted = num_accepted - 1 + self._depths
            outputs, logits = rows.run(tokens, features, cache_lens, wanted)
            self.outputs.copy_(outputs.take_along_dim(wanted[:, :, None], 1))
            self.logits.copy_(logits)


class _TreeRows:
    """The features that a tree's nodes hand to their children: buffers of one tree. N nodes.

    Args:
        layout: the tree.
        like: gives batch size, width, dtype and device: [B, any, H].

    Attributes:
        features: of every node that is fed. [B, N, H].
        rows: forwards of the levels below the root's whose nodes have children.
    """

    def __init__(self, layout: TreeLayout, like: torch.Tensor) -> None:
        batch_size, _, width = like.shape
        with torch.inference_mode(False):
            self.features = torch.zeros(batch_size, layout.num_nodes, width, dtype=like.dtype, device=like.device)
        self.rows: list[Rows] = []
        self._levels = layout.levels
        topology = layout.topology
        self._topology = topology.tensors(like.device) if isinstance(topology, TokenTree) else topology
        self._parents = [self._read_parents(level.nodes) for level in layout.levels]

    def _read_parents(self, nodes: torch.Tensor) -> torch.Tensor:
        return self._topology.parents.index_select(-1, nodes).to(torch.int64).clamp(min=0)

    def of_parents(self, index: int) -> torch.Tensor:
        """Give the features that the nodes of a level are fed with. [B, W, H]."""
        level = self._levels[index]
        # A shaped tree's parents are written in every step.
        parents = self._parents[index] if level.shape is None else self._read_parents(level.nodes)
        if parents.dim() == 1:
            return self.features.index_select(1, parents)
        return self.features.take_along_dim(parents[:, :, None], 1)

    def store(self, index: int, features: torch.Tensor) -> None:
        """Keep what the nodes of a level hand on. [B, W, H]."""
        self.features.index_copy_(1, self._levels[index].nodes, features)


def _new_cache(source: Eagle3Draft, batch_size: int, num_rows: int) -> TreeCache:
    head = source.head
    specs = tuple(
        LayerSpec(head.num_kv_heads, head.head_dim, head.head_dim, source.logits_dtype, source.device, layer.window)
        for layer in head.layers
    )
    return TreeCache(specs, batch_size, num_rows)


def _native(loaded: LoadedHead, forward: str) -> tuple[NativeHead | None, str]:
    """Give the native head, or the reason why there is none."""
    if forward not in FORWARDS:
        raise ValueError(f"Eagle3Draft: forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
    if forward == "torch":
        return None, "torch was asked for"
    try:
        native = NativeHead(loaded.head)
    except NotNativeError as reason:
        if forward == "native":
            raise ValueError(f"Eagle3Draft: forward must be 'auto' or 'torch' for this head: {reason}") from reason
        logger.info("Eagle3Draft: forwards by torch, %s", reason)
        return None, str(reason)
    logger.info("Eagle3Draft: native forwards, %s", native.instruction_set)
    return native, ""


def _digest(loaded: LoadedHead) -> str:
    """Tell heads apart cheaply: their options, all shapes, and a few elements from the middle of every weight."""
    config = loaded.config
    options = {name: value for name, value in vars(config).items() if name not in _NOT_DIGESTED}
    options |= config.layer_config.to_diff_dict()
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    pieces = []
    for weight in loaded.head.weights():
        digest.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        row = weight[weight.shape[0] // 2] if weight.dim() > 1 else weight
        pieces.append(row[:_DIGEST_ELEMENTS].to(torch.float64))
    if loaded.vocabulary is not None:
        pieces.append(loaded.vocabulary.draft_to_target.to(torch.float64))
    digest.update(torch.cat(pieces).cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


def _load(folder: DraftFolder, target: TreeModel) -> Eagle3Draft:
    return Eagle3Draft(load_head(folder, target), str(folder.path))


register_format(DraftFormat("eagle3", is_eagle3, _load))
