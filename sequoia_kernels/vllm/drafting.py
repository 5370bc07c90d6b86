"""The draft of a batch that changes from step to step: a forward a level for all requests, its rows in pages of a pool.

Requests come, grow, are preempted and end; each has pages of its own in one pool. A step grows the trees of all
requests whose draft has read everything but their newest token; the others first read what they missed, at most so
many rows in a step, and get no tree until then. A tree's accepted rows are moved behind the committed ones like the
target's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from sequoia_kernels.drafts import DecodingState, Drafting, ModelDraft, StageClock, TokenBuffers, TreeLayout
from sequoia_kernels.models import PagedTreeCache, TreeModel, causal_step
from sequoia_kernels.ops import CacheTable, VerifiedPath, compact_kv_cache_
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm.pages import PagePool
from sequoia_kernels.vllm.settings import LOGGER

__all__ = ["PAGE_SIZE", "DraftRequest", "DraftedBatch", "TreeDrafter", "moves_rows", "request_seed"]

logger = logging.getLogger(LOGGER)

PAGE_SIZE = 16
ROWS_READ = 512  # rows of missed tokens that are read in one step, all requests together
KEPT_BATCHES = 64  # batches whose bound forwards, and buffers, are kept


class DraftRequest(NamedTuple):
    """A request that is to get a tree.

    Attributes:
        request_id: vLLM's name of it.
        tokens: its tokens, the newest at the end. [tokens] integers.
        temperature: 0 is greedy.
        seed: of its random stream, None for one that its name gives.
        must_draft: whether it reads all it missed now, however much that is.
    """

    request_id: str
    tokens: np.ndarray
    temperature: float
    seed: int | None
    must_draft: bool = False


class DraftedBatch(NamedTuple):
    """Trees that wait for their verification.

    Attributes:
        tree: of all of them.
        place: row of each request in the tensors, by its name.
        num_tokens: tokens of each request when its tree was grown, the root included. [B]
        tokens: [B, N] int64.
        draft_logits: [B, N, vocab].
        temperature: [B] float32.
        seeds: [B] int64.
        offsets: [B] int64.
    """

    tree: TokenTree
    place: dict[str, int]
    num_tokens: list[int]
    tokens: torch.Tensor
    draft_logits: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    offsets: torch.Tensor


@dataclass(slots=True)
class _Request:
    """A request as the draft knows it."""

    seed: int
    pages: list[int] = field(default_factory=list)
    num_rows: int = 0  # leading tokens whose keys and values lie in the pages
    offset: int = 0  # of its random stream
    is_sound: bool = True  # as long as its draft's logits are finite


@dataclass
class _Batch:
    """What a batch size keeps: views of the drafter's memory, and the forwards that are bound to them."""

    state: DecodingState
    drafting: Drafting


def request_seed(request_id: str, seed: int | None, engine_seed: int) -> int:
    """Give the seed of a request's random stream: its own, or one that its name and the engine's seed give.

    Example:
        >>> request_seed("a", 7, 0), request_seed("a", None, 0) != request_seed("b", None, 0)
        (7, True)
    """
    if seed is not None:
        return seed & (1 << 63) - 1
    digest = hashlib.blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def moves_rows(nodes: np.ndarray) -> np.ndarray:
    """Tell whose accepted rows must move to lie one behind the other; those of a chain do so already.

    Args:
        nodes: accepted paths, -1 behind the last node. [B, levels]

    Returns:
        [B] bool.

    Example:
        >>> moves_rows(np.array([[0, 1, -1], [0, 2, -1], [0, -1, -1]])).tolist()
        [False, True, False]
    """
    return np.any(nodes > np.arange(nodes.shape[1]), axis=1)


class TreeDrafter:
    """Grows the trees of a batch of requests.

    Args:
        model: the draft.
        max_requests: requests of the largest batch.
        max_tokens: tokens of the longest request.
        max_nodes: nodes of the largest tree.
        pool_tokens: tokens that the pages hold, all requests together.
        max_rows: nodes of all trees that are grown in a step; requests beyond them get none. Their logits are kept.
        vocab_size: width of the target's logits.
        target_embeddings: tokens that the target can be fed.
        engine_seed: what the streams of requests without a seed depend on.

    Attributes:
        pool: the pages.
        max_tokens: as given.
        vocab_size: as given.
        num_without_room: trees that were not grown because no page was free.
    """

    def __init__(
        self,
        model: TreeModel,
        *,
        max_requests: int,
        max_tokens: int,
        max_nodes: int,
        pool_tokens: int,
        max_rows: int,
        vocab_size: int,
        target_embeddings: int,
        engine_seed: int = 0,
    ) -> None:
        self.model, self.source = model, ModelDraft(model)
        self.vocab_size, self._target_embeddings, self._engine_seed = vocab_size, target_embeddings, engine_seed
        self.max_tokens, self._most_tokens = max_tokens, max_tokens + max_nodes
        self._max_positions = max_tokens if model.max_positions is None else model.max_positions
        pages_each = -(-self._most_tokens // PAGE_SIZE)
        num_pages = self.pages_of_pool(pool_tokens, max_requests, self._most_tokens)
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.cache: PagedTreeCache = model.new_paged_cache(num_pages, PAGE_SIZE)
        self._table = CacheTable(self.cache.tensors(), paged=True)
        device = model.device
        with torch.inference_mode(False):  # bound forwards read these wherever they are written
            self._pages = torch.zeros(max_requests, pages_each, dtype=torch.int32)
            self._device_pages = self._pages.to(device)
            self._own_page = torch.zeros(1, pages_each, dtype=torch.int32, device=device)
            self._state = DecodingState.create(
                max_requests, device, seeds=[0] * max_requests, temperature=[0.0] * max_requests, top_k=None, top_p=None
            )
            # One part of it a tree; nothing is written behind the draft's own vocabulary.
            self._logits = torch.empty(max(max_rows, max_nodes), vocab_size, dtype=model.logits_dtype, device=device)
            self._logits[:, model.vocab_size :] = -torch.inf
        self._own_cache = self.cache.of(self._own_page)
        self._held = [""] * max_requests  # whose pages lie in a row of the table, and how many
        self._held_pages = [0] * max_requests
        self._requests: dict[str, _Request] = {}
        self._batches: dict[tuple[int, int], _Batch] = {}  # by first place and size
        self._buffers: dict[tuple[TokenTree, int, int], TokenBuffers] = {}  # by tree, requests and first row
        self._clock = StageClock(enabled=False)
        self.num_without_room = 0

    @staticmethod
    def bytes_per_token(model: TreeModel) -> int:
        """Bytes that a token takes in the pages."""
        return model.new_paged_cache(1, 1).num_bytes

    @staticmethod
    def pages_of_pool(num_tokens: int, max_requests: int, most_tokens: int) -> int:
        """Pages for so many tokens: at least what one request of full length needs, at most what all need.

        Args:
            num_tokens: of all requests together.
            max_requests: requests of the largest batch.
            most_tokens: tokens of the longest request, its tree included.
        """
        pages_each = -(-most_tokens // PAGE_SIZE)
        return min(max(-(-num_tokens // PAGE_SIZE), pages_each), pages_each * max_requests)

    @staticmethod
    def bytes_per_row(model: TreeModel, vocab_size: int) -> int:
        """Bytes that the logits of a node take."""
        return vocab_size * model.logits_dtype.itemsize

    def most_requests(self, num_tokens: int, num_nodes: int) -> int:
        """Say how many requests of so many tokens can have a tree of so many nodes at once; one at least."""
        pages_each = -(-min(num_tokens + num_nodes, self._most_tokens) // PAGE_SIZE)
        most = min(self._state.seeds.shape[0], self.pool.num_pages // pages_each, self.max_rows // num_nodes)
        return max(most, 1)

    @property
    def max_rows(self) -> int:
        """Nodes of all trees that are grown in a step, at most."""
        return self._logits.shape[0]

    # Requests

    def forget(self, request_ids: Iterable[str]) -> None:
        """Give back the pages of requests that ended."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._give_back(request_id, request)

    def release(self, request_ids: Iterable[str]) -> None:
        """Give back the pages of requests that were preempted; their random streams go on."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._give_back(request_id, request)
                request.num_rows = 0

    @property
    def num_requests(self) -> int:
        """Requests that the draft knows."""
        return len(self._requests)

    # A step

    def grow(self, wanted: Mapping[TokenTree, Sequence[DraftRequest]]) -> list[DraftedBatch]:
        """Grow the tree of every request that has read everything; the others read on.

        Args:
            wanted: the requests that are to get each tree.

        Returns:
            The trees. Their tensors are overwritten by the next call.
        """
        drafted = []
        left, first, first_row = ROWS_READ, 0, 0
        for tree, entries in wanted.items():
            ready, left = self._read(entries, tree.num_nodes, left)
            ready = ready[: (self.max_rows - first_row) // tree.num_nodes]
            if ready:
                try:
                    grown = self._grow_alike(tree, ready, first, first_row)
                except ValueError as error:
                    ready = self._sound_ones(tree, ready, first, first_row, error)
                    if not ready:
                        continue
                    grown = self._grow_alike(tree, ready, first, first_row)
                drafted.append(grown)
                first += len(ready)
                first_row += len(ready) * tree.num_nodes
        self._held[first:] = [""] * (len(self._held) - first)
        return drafted

    def _sound_ones(
        self, tree: TokenTree, ready: Sequence[DraftRequest], first: int, first_row: int, error: ValueError
    ) -> list[DraftRequest]:
        """Give the requests whose draft can be drawn from; the others get no trees any more.

        Logits of a draft may be NaN or infinite, where it overflows: it must not end the others' requests.
        """
        sound = []
        for entry in ready:
            request = self._requests[entry.request_id]
            offset = request.offset
            try:
                self._grow_alike(tree, [entry], first, first_row)
            except ValueError as own_error:
                request.is_sound = False
                logger.warning("trees: none for %s any more, its draft cannot be used: %s", entry.request_id, own_error)
            else:
                sound.append(entry)
            request.offset = offset  # nothing was emitted from these draws
        if len(sound) == len(ready):
            raise error
        return sound

    def _grow_alike(self, tree: TokenTree, ready: Sequence[DraftRequest], first: int, first_row: int) -> DraftedBatch:
        """Grow one tree for requests, which take the places from `first` on, and the logits from `first_row` on."""
        batch = self._batch(first, len(ready))
        layout = TreeLayout.build(tree, self.model.device)
        buffers = self._buffers_of(tree, len(ready), first_row)
        requests = [self._requests[entry.request_id] for entry in ready]
        state = batch.state
        self._fill(state, ready, requests, first)
        buffers.tokens[:, 0].copy_(state.root_tokens)
        batch.drafting.grow(layout, buffers)
        for request in requests:
            request.offset += tree.num_nodes
        assert buffers.draft_logits is not None  # a tree of several nodes has levels
        return DraftedBatch(
            tree,
            {entry.request_id: index for index, entry in enumerate(ready)},
            [len(entry.tokens) for entry in ready],
            buffers.tokens,
            buffers.draft_logits,
            state.temperature,
            state.seeds,
            state.offsets,
        )

    def commit(self, request_ids: Sequence[str], path: VerifiedPath, num_committed: torch.Tensor) -> None:
        """Move the rows of accepted nodes behind the committed ones.

        Args:
            request_ids: the requests of the path.
            path: what was accepted of trees that `grow` gave last.
            num_committed: tokens that were committed before. [B] int32; not changed.
        """
        places = [self._held.index(request_id) if request_id in self._held else -1 for request_id in request_ids]
        if max(places) < 0:
            return
        moves = moves_rows(path.nodes.cpu().numpy()).tolist()
        # A request without pages has no rows to move.
        moved = [row for row, place in enumerate(places) if place >= 0 and moves[row]]
        if moved:
            rows = torch.tensor(moved, device=num_committed.device)
            table = self._device_pages[[places[row] for row in moved]]
            compact_kv_cache_(
                self._table, path.nodes[rows], path.num_accepted[rows], num_committed[rows], block_table=table
            )
        for request_id, place, accepted in zip(request_ids, places, path.num_accepted.tolist()):
            if place >= 0:
                # The last accepted node may be a leaf, which was never fed: the next tree begins by feeding it again.
                self._requests[request_id].num_rows += accepted

    # Inside

    def _give_back(self, request_id: str, request: _Request) -> None:
        self.pool.give_back(request.pages)
        if request_id in self._held:  # other requests' rows will lie there
            self._held[self._held.index(request_id)] = ""

    def _read(self, wanted: Sequence[DraftRequest], num_nodes: int, left: int) -> tuple[list[DraftRequest], int]:
        """Let requests read what they missed, `left` rows at most; give those that have read all, and what is left."""
        ready = []
        for entry in wanted:
            request = self._requests.get(entry.request_id)
            if request is None:
                seed = request_seed(entry.request_id, entry.seed, self._engine_seed)
                request = self._requests[entry.request_id] = _Request(seed)
            num_tokens = len(entry.tokens)
            if num_tokens > self._max_positions or not request.is_sound:
                self.release([entry.request_id])  # for good
                continue
            if not self.pool.grow(request.pages, min(num_tokens + num_nodes, self._most_tokens)):
                self.num_without_room += 1
                continue
            missed = num_tokens - 1 - request.num_rows
            if missed > 0 and (left > 0 or entry.must_draft):
                count = missed if entry.must_draft else min(missed, left)
                self._feed(request, entry.tokens[: request.num_rows + count])
                left -= count
                missed -= count
            if missed == 0:
                ready.append(entry)
        return ready, left

    def _feed(self, request: _Request, tokens: np.ndarray) -> None:
        """Read what is missing of a request's first tokens.

        From one before the missing ones on: a leaf that was accepted last is counted, but was never fed.
        """
        device = self.model.device
        self._own_page[0, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32, device=device)
        last_row = torch.zeros(1, dtype=torch.int64, device=device)  # of one row logits are computed, wanted or not
        for first in range(max(request.num_rows - 1, 0), len(tokens), ROWS_READ):
            chunk = torch.from_numpy(tokens[first : first + ROWS_READ].astype(np.int64))[None].to(device)
            lens = torch.tensor([first], dtype=torch.int32, device=device)
            step = causal_step(chunk.shape[1], device)
            self.model.forward(self.source.fed(chunk), self._own_cache, lens, step, last_row=last_row)
        request.num_rows = len(tokens)

    def _fill(
        self, state: DecodingState, ready: Sequence[DraftRequest], requests: Sequence[_Request], first: int
    ) -> None:
        """Write a batch's state and pages."""
        columns = (
            (state.draft_lens, [len(entry.tokens) - 1 for entry in ready]),
            (state.root_tokens, [int(entry.tokens[-1]) for entry in ready]),
            (state.last_tokens, [int(entry.tokens[-2]) for entry in ready]),
            (state.temperature, [entry.temperature for entry in ready]),
            (state.seeds, [request.seed for request in requests]),
            (state.offsets, [request.offset for request in requests]),
        )
        for tensor, values in columns:
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))
        changed = False
        for index, (entry, request) in enumerate(zip(ready, requests), first):
            count = len(request.pages)
            if self._held[index] != entry.request_id or self._held_pages[index] != count:
                self._pages[index, :count] = torch.tensor(request.pages, dtype=torch.int32)
                self._held[index], self._held_pages[index] = entry.request_id, count
                changed = True
        if changed:
            self._device_pages.copy_(self._pages)

    def _batch(self, first: int, batch_size: int) -> _Batch:
        batch = self._batches.pop((first, batch_size), None)
        if batch is None:
            state = _some_requests(self._state, slice(first, first + batch_size))
            cache = self.cache.of(self._device_pages[first : first + batch_size])
            drafting = self.source.start_on(cache, state, self._target_embeddings, backend="auto", clock=self._clock)
            batch = _Batch(state, drafting)
            while len(self._batches) >= KEPT_BATCHES:
                self._batches.pop(next(iter(self._batches)))
        self._batches[first, batch_size] = batch  # the newest at the end
        return batch

    def _buffers_of(self, tree: TokenTree, batch_size: int, first_row: int) -> TokenBuffers:
        """Give buffers for trees whose logits are kept from `first_row` on."""
        key = tree, batch_size, first_row
        buffers = self._buffers.pop(key, None)
        if buffers is None:
            rows = self._logits[first_row : first_row + batch_size * tree.num_nodes]
            with torch.inference_mode(False):
                tokens = torch.zeros(batch_size, tree.num_nodes, dtype=torch.int64, device=self.model.device)
            buffers = TokenBuffers(tokens, rows.view(batch_size, tree.num_nodes, -1))
            while len(self._buffers) >= KEPT_BATCHES:
                self._buffers.pop(next(iter(self._buffers)))
        self._buffers[key] = buffers  # the newest at the end
        return buffers


def _some_requests(state: DecodingState, part: slice) -> DecodingState:
    """Give the state of some of the requests: views, not copies."""
    lens = state.cache_lens[part]
    return DecodingState(
        cache_lens=lens,
        draft_lens=lens,
        root_tokens=state.root_tokens[part],
        last_tokens=state.last_tokens[part],
        active=state.active[part],
        seeds=state.seeds[part],
        offsets=state.offsets[part],
        temperature=state.temperature[part],
        top_k=None,
        top_p=None,
    )
