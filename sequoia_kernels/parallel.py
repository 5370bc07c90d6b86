"""Ranks that decide alike: models that transformers' tensor parallelism has split, decoded by rank 0 for all.

Every rank of a split model holds some of its heads and columns, and none can run a forward without the others: all must
be fed the same tokens at the same lengths, in the same order. Nothing that is computed makes sure of that. Sums over
ranks may differ by a bit from rank to rank, and so may a draft's logits, a measured time, a deadline or a user's hook;
one bit decides for another token, that rank's cache then holds other rows than its neighbours', and the text is wrong
without a sign of it, or the ranks wait for one another for ever.

So one rank decides. Rank 0 of the group that a model is split over runs the whole call: the draft, the ops, hooks,
streamers, measurements, the choice of trees. The others run the forwards that it runs and nothing else. Before each
forward of a split model rank 0 broadcasts one tensor of integers that holds all the others need:

    what was decided since the last forward   the path that was accepted, by which cache rows move
    what is fed now                           tokens, committed lengths, and of a tree that is new what its rows see

The decision of a step and the tokens of the next tree travel together, since whatever is decided and drafted between
two forwards of the target is known when the second one begins. That is one broadcast a step (two for the first steps of
a tree of many nodes, whose description does not fit in the usual length). A draft that is whole on every rank is run by
rank 0 alone. One that is split as well has a broadcast before each of its own forwards, of which each sums over the
ranks twice a layer anyway: its tokens have to be alike before they are fed, too.

What ranks compute between two broadcasts is their share of a forward. A difference there changes no decision; it is in
what they sum, as any other rounding is. `SEQUOIA_CHECK_RANKS=1` lets every rank's logits decide, and compares.

Whoever runs forwards of a split model by itself (`TreeModel.forward` in an own loop) must see to it that all ranks do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from sequoia_kernels.errors import RankError, UnsupportedModelError

__all__ = [
    "CHECK_VARIABLE",
    "ForwardCall",
    "Ranks",
    "Session",
    "any_rank",
    "current",
    "digest",
    "is_follower",
    "leading",
    "preparing",
    "raise_if_lost",
    "ranks_of",
    "together",
]

logger = logging.getLogger("sequoia_kernels")

Result = TypeVar("Result")

CHECK_VARIABLE = "SEQUOIA_CHECK_RANKS"

FIRST_CAPACITY = 1024  # integers of a message, until one of a step is longer
_HEADER = 4  # kind, integers in all, how many of them are numbers, capacity of the next message
_FORWARD, _LOOK, _END, _FAILED = 1, 2, 3, 4
_COMMIT, _COPY = 1, 2
_REFUSED = "refused"  # in the place of arguments that are compared
# In the errors of collectives that are not `dist.DistError`s: gloo's.
_TELLS_OF_LOSS = re.compile(r"gloo|NCCL|caused pair closure|Timed out waiting|Connection (closed|reset)")


class Ranks:
    """The processes that a model is split over.

    Args:
        group: their process group.
        device: where what they exchange lies.

    Attributes:
        group: as given.
        device: as given.
        rank: this process's place in it.
        size: how many they are.
        members: their ranks in the whole world.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.members = tuple(dist.get_process_group_ranks(group))

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"


def ranks_of(model: torch.nn.Module) -> Ranks | None:
    """Give the processes that a model's weights are split over, None for a model that is whole.

    Raises:
        UnsupportedModelError: it is split in another way than by transformers' tensor parallelism.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor  # half a second, for whoever has ranks

    meshes = {weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)}
    name = type(model).__name__
    if not meshes:
        if (getattr(model, "tp_size", None) or 1) > 1:
            raise UnsupportedModelError(
                f"adapt: model must be split into DTensors, got a {name} over {model.tp_size} ranks without any"
            )
        return None
    if len(meshes) > 1 or next(iter(meshes)).ndim > 1 or _is_fsdp(model):
        kinds = ", ".join(sorted(str(mesh.mesh_dim_names or mesh.ndim) for mesh in meshes))
        how = "FSDP" if _is_fsdp(model) else f"device meshes {kinds}"
        raise UnsupportedModelError(f"adapt: model must be split by tensor parallelism alone, got a {name} under {how}")
    mesh = meshes.pop()
    device = next(weight.to_local().device for weight in model.parameters() if isinstance(weight, DTensor))
    return Ranks(mesh.get_group(), device)


def _is_fsdp(model: torch.nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


class ForwardCall(NamedTuple):
    """One forward as the other ranks are told of it; see `TreeModel.forward` and `TreeStep`."""

    input_ids: torch.Tensor  # [B, N] int64
    cache_lens: torch.Tensor  # [B] int32
    step: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # mask [N, W] or [B, N, W], node_ids and depths [N]
    num_tree_rows: int
    first_node: int | None
    last_row: torch.Tensor | None  # [B] int64
    hidden_states: tuple[int, ...] = ()  # which of them are wanted: to ask leaves hooks in a model


def digest(*tensors: torch.Tensor) -> str:
    """Give a short text that equal tensors share."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


# One call at a time in the process: what two of them tell the other ranks must not be mixed.
_lock = threading.Lock()
_current: Session | None = None
# Groups whose ranks are no more in the same place of the same call, and why.
_out_of_step: list[tuple[Any, str]] = []


def together(
    models: Sequence[Any], work: Callable[[], Result], *, where: str, alike: Callable[[], Mapping[str, str]] = dict
) -> Result:
    """Do work that runs forwards of models: where one is split, on rank 0 alone, with the other ranks' help.

    All ranks call this with the same models, in the same order of calls.

    Args:
        models: `TreeModel`s; whole ones among them are left to whoever runs the work.
        work: what rank 0 does. Its result must be one that `torch.save` takes.
        where: names the call in messages.
        alike: gives arguments that must be the same on all ranks, by name, as texts.

    Returns:
        The result, on every rank.

    Raises:
        RankError: another rank has ended, does not answer, or (on the others) the work has failed on rank 0; or, where
            that is asked for, ranks would have decided otherwise.
        ValueError: ranks were given other arguments, or models are split over different ranks.

    Notes:
        A rank that has ended is noticed at once with gloo, and within the process group's timeout everywhere.
    """
    split = list({id(model.model): model for model in models if model.ranks is not None}.values())
    if not split:
        return work()
    if leading() is not None:  # called from such work
        return work()
    global _current
    with _lock:
        _check_step(split[0].ranks, where)
        session = Session(split, where, compares=models[0].ranks is not None)
        session.begin(alike())
        _current = session
        try:
            return session.lead(work) if session.ranks.rank == 0 else session.follow()
        finally:
            _current = None


@contextlib.contextmanager
def preparing(model: Any, where: str) -> Iterator[None]:
    """Tell the other ranks what this one refuses before `together`, where they would wait for it.

    No rank may fail alone in the middle of a forward of a split model within it: the others could not be told there.

    Args:
        model: the target, a `TreeModel`.
        where: names the call in messages.
    """
    try:
        yield
    except Exception as error:
        if model.ranks is not None and current() is None and not _why_out_of_step(model.ranks):
            given: list[Any] = [None] * model.ranks.size
            with _lock, contextlib.suppress(RuntimeError):  # the error itself is worth more than one of telling it
                dist.all_gather_object(given, {_REFUSED: _told(error)}, group=model.ranks.group)
        raise


def any_rank(ranks: Ranks | None, holds: Sequence[bool], where: str) -> list[bool]:
    """Tell what holds on any of a model's ranks, which all ask; of a whole model what does here.

    In a call of `together`, where ranks do not ask together but within `Session.look_again`, what holds here.

    Raises:
        RankError: another rank has ended, or does not answer.
    """
    session = current()
    if ranks is None or (session is not None and not session.in_step):
        return list(holds)
    _check_step(ranks, where)
    flags = torch.tensor(list(map(int, holds)), device=ranks.device)
    try:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=ranks.group)
    except RuntimeError as error:
        _note_out_of_step(ranks, error)
        raise_if_lost(ranks, error, where)
        raise
    return list(map(bool, flags.tolist()))


def raise_if_lost(ranks: Ranks | None, error: Exception, where: str, behind: str = "") -> None:
    """Raise RankError in the place of an error that tells of a lost connection between ranks."""
    text = str(error)
    is_lost = isinstance(error, dist.DistError) if dist.is_available() else False
    if ranks is None or not (is_lost or (isinstance(error, RuntimeError) and _TELLS_OF_LOSS.search(text))):
        return
    # gloo begins with a place in its own source, and ends with advice
    reason = re.sub(r"^\[[^]]*\] ", "", text.strip().splitlines()[0]).split(". ")[0]
    raise RankError(
        f"{where}: rank {ranks.rank} of {ranks.size} lost another one{behind}; a rank that ends or does not answer "
        f"within the process group's timeout ends it on all ({reason})"
    ) from error


def _why_out_of_step(ranks: Ranks) -> str:
    return next((why for group, why in _out_of_step if group is ranks.group), "")


def _note_out_of_step(ranks: Ranks, error: BaseException) -> None:
    """Remember that the ranks of a group cannot go on: what one sends next is not what the others wait for."""
    if not _why_out_of_step(ranks):
        _out_of_step.append((ranks.group, _told(error)))


def _check_step(ranks: Ranks, where: str) -> None:
    why = _why_out_of_step(ranks)
    if why:
        raise RankError(
            f"{where}: rank {ranks.rank} of {ranks.size} is out of step with the others, end the processes: an earlier "
            f"call ended in the middle of a forward with {why}"
        )


def is_follower(models: Sequence[Any]) -> bool:
    """Tell whether another rank than this one decides for models."""
    return any(model.ranks is not None and model.ranks.rank > 0 for model in models)


def leading() -> Session | None:
    """Give the session that this thread decides for, on rank 0; None elsewhere."""
    session = _current
    return session if session is not None and session.leads and session.thread == threading.get_ident() else None


def current() -> Session | None:
    """Give the session that this process has part in."""
    return _current


class Session:
    """One call of `together`: what rank 0 tells the others, and what they make of it.

    Args:
        models: the split models.
        where: names the call in messages.
        compares: whether the first of them is the target, whose logits may be compared.

    Attributes:
        ranks: the processes.
        leads: whether this one decides.
        checks: whether logits of all ranks are compared.
        num_forwards: forwards of split models so far.
        in_step: whether all ranks do the same just now, each by itself.
    """

    def __init__(self, models: Sequence[Any], where: str, compares: bool = False) -> None:
        self.models, self.where = list(models), where
        self.ranks: Ranks = models[0].ranks
        for model in models:
            if model.ranks.members != self.ranks.members:
                raise ValueError(
                    f"{where}: draft must be split over the target's ranks {list(self.ranks.members)}, "
                    f"got one over {list(model.ranks.members)}"
                )
        self.leads = self.ranks.rank == 0
        self.device = self.ranks.device
        self.thread = threading.get_ident()
        self.num_forwards, self.in_step = 0, False
        self.compares, self.checks = compares, False
        self._capacity = FIRST_CAPACITY
        self._is_usable = True  # whether the ranks wait for a message
        self._numbers = {id(model.model): number for number, model in enumerate(self.models)}
        # of rank 0
        self._cache_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._num_caches = 0
        self._dropped: list[int] = []
        self._steps: dict[int, tuple[torch.Tensor, int]] = {}  # by id of the mask, which is held
        self._changes: list[tuple[list[int], list[torch.Tensor]]] = []  # of cache rows, since the last forward
        self._gathered: tuple[Any, list[tuple[int, torch.Tensor]]] = (None, [])  # see `others`
        self._has_warned = False
        # of the others
        self._caches: dict[int, tuple[Any, Any]] = {}  # with tables of their rows
        self._known_steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def begin(self, alike: Mapping[str, str]) -> None:
        """Compare what all ranks were given; raise the same error on all of them."""
        models = [f"{type(model.model).__name__} {_config_digest(model.model.config)}" for model in self.models]
        own = {"the call": self.where, "models": ", ".join(models), **alike}
        given: list[Any] = [None] * self.ranks.size
        try:
            dist.all_gather_object(given, own, group=self.ranks.group)
        except RuntimeError as error:
            self._fail(error)
            raise
        for rank, entry in enumerate(given):
            if _REFUSED in entry:
                raise RankError(f"{self.where}: rank {rank} has refused the call with {entry[_REFUSED]}")
        for rank, entry in enumerate(given):
            for name in own:
                if entry.get(name) != given[0].get(name):
                    raise ValueError(
                        f"{self.where}: {name} must be the same on all ranks of a split model, got others on rank "
                        f"{rank} than on rank 0"
                    )

    # Rank 0

    def lead(self, work: Callable[[], Result]) -> Result:
        """Do the work, and give its result to the others."""
        try:
            self.checks = self.compares and _asked_to_check()
            result = work()
            packed = _packed(result)
        except BaseException as error:
            if not self._is_usable:  # the others are in the middle of a forward, and would not hear it
                _note_out_of_step(self.ranks, error)
            else:
                self._send_packed(_FAILED, _packed(_told(error)))
            raise
        self._send_packed(_END, packed)
        return result

    def forward(self, model: Any, cache: Any, call: ForwardCall, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a forward on all ranks; the others are on their way through `follow`."""
        if not self.leads or self.in_step:
            return run()
        number = self._numbers.get(id(model.model))
        if number is None or self.thread != threading.get_ident():
            raise RuntimeError(
                f"{self.where}: split models must be run by the call that all ranks have part in, got {model!r} from "
                "elsewhere"
            )
        self._tell_forward(number, cache, call)
        self._is_usable = False
        try:
            logits = run()
            if self.checks and number == 0:
                self._gather(logits)
        except RuntimeError as error:
            self._fail(error)
            raise
        self._is_usable = True
        self.num_forwards += 1
        return logits

    def look_again(self, model: Any, look: Callable[[], Result]) -> Result:
        """Run the forwards by which a model is probed, since it is not what it was: on all ranks, each by itself.

        Args:
            model: the Hugging Face model.
            look: does it here; on the others `TreeModel.look_again` does.
        """
        number = self._numbers.get(id(model))
        if number is None or not self.leads or self.thread != threading.get_ident():
            raise RuntimeError(
                f"{self.where}: split models must be changed on all ranks, between calls, got another state of a "
                f"{type(model).__name__} on rank {self.ranks.rank}"
            )
        self._send(_LOOK, [number])
        return self._in_step(look)

    def _in_step(self, work: Callable[[], Result]) -> Result:
        self._is_usable, self.in_step = False, True
        try:
            result = work()
        finally:
            self.in_step = False
        self._is_usable = True
        return result

    def note_commit(
        self, parts: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]], nodes: torch.Tensor,
        num_accepted: torch.Tensor,
    ) -> None:  # fmt: skip
        """Take down that accepted rows are about to move behind the committed ones.

        Args:
            parts: tensors of caches, each with the lengths that count their rows, before they advance.
            nodes: the accepted path. [B, L].
            num_accepted: of each request, 0 where nothing moves. [B].
        """
        for cache, number in list(self._cache_numbers.items()):
            first = cache.tensors()[0]
            for tensors, lens in parts:
                if any(tensor is first for tensor in tensors):
                    moved = [tensor.to(torch.int64, copy=True) for tensor in (nodes, num_accepted, lens)]
                    self._changes.append(([_COMMIT, number, *nodes.shape], moved))

    def note_copy(self, source: Any, cache: Any, lanes: Sequence[int]) -> None:
        """Take down that a cache's rows were copied to the first rows of some requests of another one."""
        if source in self._cache_numbers and cache in self._cache_numbers:
            numbers = [self._cache_numbers[source], self._cache_numbers[cache], len(lanes)]
            self._changes.append(([_COPY, *numbers, *lanes], []))

    def others(self, logits: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Give the ranks that have other bits than rank 0 in the logits of the last forward, with theirs.

        `logits` is what that forward gave; of anything else nothing is known of the other ranks.
        """
        own, others = self._gathered
        return others if own is logits else []

    def compare(
        self, rank: int, step: int, own: Sequence[torch.Tensor], its: Sequence[torch.Tensor], active: torch.Tensor
    ) -> None:
        """Raise RankError where another rank's logits lead to another path than rank 0's.

        Args:
            rank: which one.
            step: the step, 0 for the prompt.
            own: nodes [B, L], how many of them are accepted [B] and the next token [B], of rank 0.
            its: the same by the other's logits.
            active: whether a request still decodes. [B] bool.
        """
        paths = []
        for nodes, counts, tokens in (own, its):
            rows = zip(nodes.tolist(), counts.tolist(), tokens.tolist(), strict=True)
            paths.append([(path[:count], token) for path, count, token in rows])
        for request, (mine, other, counts) in enumerate(zip(*paths, active.tolist(), strict=True)):
            if counts and mine != other:
                raise RankError(
                    f"{self.where}: rank {rank} must decide as rank 0 does, got nodes {other[0]} and token {other[1]} "
                    f"for request {request} in step {step}, where rank 0 has nodes {mine[0]} and token {mine[1]}"
                )
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "logits of rank %d are not the bits of rank 0's in step %d; the path is the same", rank, step
            )

    def _tell_forward(self, number: int, cache: Any, call: ForwardCall) -> None:
        batch_size, num_nodes = call.input_ids.shape
        cache_number = self._cache_numbers.get(cache)
        new_rows = 0
        if cache_number is None:
            cache_number, new_rows = self._num_caches, cache.max_cache_len
            self._num_caches += 1
            self._cache_numbers[cache] = cache_number
            weakref.finalize(cache, self._dropped.append, cache_number)
        # Masks of one tree stay what they are; those of trees that differ by request may be written in every step.
        tree_mask = call.step[0]
        per_request = tree_mask.dim() == 3
        held, step_number = self._steps.get(id(tree_mask), (None, -1))
        is_new = held is None
        if is_new and not per_request:
            step_number = len(self._steps)
            self._steps[id(tree_mask)] = tree_mask, step_number
        dropped, self._dropped[:] = list(self._dropped), []
        numbers = [len(self._changes)]
        tensors: list[torch.Tensor] = []
        for change, moved in self._changes:
            numbers += change
            tensors += moved
        self._changes.clear()
        first_node = -1 if call.first_node is None else call.first_node
        numbers += [
            len(dropped), *dropped, number, cache_number, new_rows, batch_size, num_nodes, step_number, is_new,
            tree_mask.shape[-1], per_request, call.num_tree_rows, first_node, call.last_row is not None,
            self.checks, len(call.hidden_states), *call.hidden_states,
        ]  # fmt: skip
        tensors += [call.input_ids, call.cache_lens]
        if is_new:
            tensors += call.step
        if call.last_row is not None:
            tensors.append(call.last_row)
        self._send(_FORWARD, numbers, tensors, lasts=call.last_row is None)

    def _send(
        self, kind: int, numbers: Sequence[int], tensors: Sequence[torch.Tensor] = (), lasts: bool = False
    ) -> None:
        """Broadcast a message. `lasts`: whether the next ones will be about as long."""
        length = _HEADER + len(numbers) + sum(tensor.numel() for tensor in tensors)
        capacity = max(self._capacity, length) if lasts else self._capacity
        head = torch.tensor([kind, length, len(numbers), capacity, *map(int, numbers)], dtype=torch.int64)
        parts = [head.to(self.device), *(tensor.flatten().to(self.device, torch.int64) for tensor in tensors)]
        padding = torch.zeros(max(self._capacity - length, 0), dtype=torch.int64, device=self.device)
        whole = torch.cat([*parts, padding])
        for part in (whole[: self._capacity], whole[self._capacity :]):
            if part.numel():
                self._broadcast(part)
        self._capacity = capacity

    def _send_packed(self, kind: int, packed: bytearray) -> None:
        self._send(kind, [len(packed)])
        self._broadcast(torch.frombuffer(packed, dtype=torch.uint8).to(self.device))

    def _gather(self, logits: torch.Tensor) -> None:
        """Bring the logits of all ranks to rank 0."""
        rows = logits.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.ranks.size)] if self.leads else None
        dist.gather(rows, parts, group_dst=0, group=self.ranks.group)
        self._gathered = logits, [(rank, part) for rank, part in enumerate(parts or ()) if not torch.equal(part, rows)]

    # The other ranks

    def follow(self) -> Any:
        """Run the forwards that rank 0 runs, until it is done. Returns what it gave."""
        try:
            failed, value = self._follow()
        except BaseException as error:
            _note_out_of_step(self.ranks, error)
            raise
        if failed:
            raise RankError(f"{self.where}: rank 0 has ended the call for all ranks with {value}")
        return value

    def _follow(self) -> tuple[bool, Any]:
        while True:
            kind, message = self._receive()
            if kind == _FORWARD:
                self._replay(message)
                self.num_forwards += 1
                continue
            if kind == _LOOK:
                self._in_step(self.models[message.number()].look_again)
                continue
            return kind == _FAILED, self._receive_object(message.number())

    @torch.inference_mode()
    def _replay(self, message: _Message) -> None:
        number = message.number
        for _ in range(number()):
            if number() == _COMMIT:
                (_, tables), batch_size, levels = self._caches[number()], number(), number()
                nodes = message.tensor((batch_size, levels), torch.int32)
                counts, lens = (message.tensor((batch_size,), torch.int32) for _ in range(2))
                self.models[0].replay_commit(tables, nodes, counts, lens)
            else:
                (source, _), (cache, _) = self._caches[number()], self._caches[number()]
                lanes = [number() for _ in range(number())]
                for whole, rows in zip(cache.tensors(), source.tensors(), strict=True):
                    whole[lanes, : rows.shape[1]] = rows
        for _ in range(number()):
            self._caches.pop(number(), None)
        model, cache_number, new_rows, batch_size, num_nodes = self.models[number()], *(number() for _ in range(4))
        if new_rows:
            self._caches[cache_number] = model.replay_cache(batch_size, new_rows)
        step_number, is_new, num_words, per_request = (number() for _ in range(4))
        num_tree_rows, first_node, has_last_row, checks = (number() for _ in range(4))
        input_ids = message.tensor((batch_size, num_nodes), torch.int64)
        cache_lens = message.tensor((batch_size,), torch.int32)
        if is_new:
            shape = (batch_size, num_nodes, num_words) if per_request else (num_nodes, num_words)
            mask = message.tensor(shape, torch.int32)
            step = mask, message.tensor((num_nodes,), torch.int32), message.tensor((num_nodes,), torch.int32)
            if not per_request:
                self._known_steps.append(step)
        else:
            step = self._known_steps[step_number]
        last_row = message.tensor((batch_size,), torch.int64) if has_last_row else None
        hidden_states = tuple(number() for _ in range(number()))
        call = ForwardCall(
            input_ids, cache_lens, step, num_tree_rows, None if first_node < 0 else first_node, last_row, hidden_states
        )  # fmt: skip
        try:
            logits = model.replay_forward(call, self._caches[cache_number][0])
            if checks and model is self.models[0]:
                self._gather(logits)
        except RuntimeError as error:
            self._fail(error)
            raise

    def _receive(self) -> tuple[int, _Message]:
        part = torch.empty(self._capacity, dtype=torch.int64, device=self.device)
        self._broadcast(part)
        host = part.cpu()
        kind, length, num_numbers, capacity = host[:_HEADER].tolist()
        if length > len(host):
            rest = torch.empty(length - len(host), dtype=torch.int64, device=self.device)
            self._broadcast(rest)
            host = torch.cat((host, rest.cpu()))
        self._capacity = capacity
        return kind, _Message(host[_HEADER:], num_numbers, self.device)

    def _receive_object(self, num_bytes: int) -> Any:
        data = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self._broadcast(data)
        buffer = io.BytesIO(data.cpu().numpy().tobytes())

        def here(storage: Any, place: str) -> Any:
            return storage if place == "cpu" else storage.to(device=self.device)

        return torch.load(buffer, map_location=here, weights_only=False)  # written by rank 0 of this very program

    # All

    def _broadcast(self, tensor: torch.Tensor) -> None:
        try:
            dist.broadcast(tensor, group_src=0, group=self.ranks.group)
        except RuntimeError as error:
            self._fail(error)
            raise

    def _fail(self, error: RuntimeError) -> None:
        """Raise RankError where a connection was lost; the ranks wait for no message any more."""
        self._is_usable = False
        _note_out_of_step(self.ranks, error)
        raise_if_lost(self.ranks, error, self.where, f" after {self.num_forwards} forwards of this call")


class _Message:
    """What a rank was told, read from its beginning: numbers, and tensors behind all of them."""

    def __init__(self, content: torch.Tensor, num_numbers: int, device: torch.device) -> None:
        self._numbers = iter(content[:num_numbers].tolist())
        self._content, self._place, self._device = content, num_numbers, device

    def number(self) -> int:
        return int(next(self._numbers))

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        start, self._place = self._place, self._place + torch.Size(shape).numel()
        return self._content[start : self._place].view(shape).to(self._device, dtype)


def _config_digest(config: Any) -> str:
    # where a model was loaded from may differ by machine
    values = config.to_dict()
    values = {name: values[name] for name in values if not name.startswith(("_", "transformers_version"))}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # whatever its own text raises
        return type(error).__name__


def _packed(value: Any) -> bytearray:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return bytearray(buffer.getbuffer())


def _asked_to_check() -> bool:
    value = os.environ.get(CHECK_VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"SEQUOIA_CHECK_RANKS must be 0 or 1, got {value!r}")
    return value == "1"
