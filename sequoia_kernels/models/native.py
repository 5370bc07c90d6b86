"""The native forward on a CPU: a described model, and one C++ call a forward on the model's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import environ
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from transformers import PreTrainedModel

from sequoia_kernels.host_module import host as _host
from sequoia_kernels.models.attention_probe import LayerCall
from sequoia_kernels.models.cache import TreeCache
from sequoia_kernels.models.description import Description, form_of
from sequoia_kernels.models.forward_state import num_foreign
from sequoia_kernels.models.quantised import ELEMENT_TYPES as _ELEMENT_TYPES
from sequoia_kernels.models.quantised import NotNativeError
from sequoia_kernels.models.tree_step import ForwardInputs
from sequoia_kernels.ops.host_calls import address

__all__ = ["INSTRUCTION_SET_VARIABLE", "BoundForward", "NativeForward", "row_fields"]

# Names one of `_host.forward_instruction_sets()` to take instead of the best that the CPU has.
INSTRUCTION_SET_VARIABLE = "SEQUOIA_HOST_ISA"


class NativeForward:
    """Forwards of one model in C++; holds the model's parameters, not the model.

    Attributes:
        name: "native".
        takes_pages: whether a cache may be paged: it may.
        instruction_set: which of the CPU's it uses.
        weight_forms: of its linear layers, such as "int8, bfloat16".
        num_layers: attention layers.

    Raises:
        NotNativeError: the model cannot be described; the message says why.
        ValueError: `SEQUOIA_HOST_ISA` names no instruction set of this CPU.
    """

    name = "native"
    takes_pages = True

    def __init__(self, model: PreTrainedModel, calls: Sequence[LayerCall], logits_dtype: torch.dtype) -> None:
        if logits_dtype not in _ELEMENT_TYPES:
            raise NotNativeError(f"its logits are {logits_dtype}")
        described = Description(model, calls, torch.device("cpu"))
        self._tensors = described.tensors
        self._weights: tuple[list[Any], torch.Tensor] = ([], torch.empty(0))  # where they lay, and the table of it
        self._leased: Callable[[], _Lease | None] = lambda: None
        self._rotations = described.rotations
        self._caches: WeakKeyDictionary[TreeCache, torch.Tensor] = WeakKeyDictionary()
        self._width, self.num_layers = described.fields["width"], len(calls)
        self._vocab_size = described.vocab_size
        self._dtype, self._logits_dtype = model.dtype, logits_dtype
        self._forward = _host.Forward(described.fields, environ.get(INSTRUCTION_SET_VARIABLE, ""))
        self.instruction_set: str = self._forward.instruction_set
        self.weight_forms = ", ".join(described.forms)

    def __call__(self, inputs: ForwardInputs, cache: TreeCache, max_positions: int | None) -> torch.Tensor:
        """Run one forward, whose shapes are checked; see `TreeModel.forward`. IndexError for a token out of range."""
        cache.check_pages(inputs.cache_lens, inputs.step.num_tree_rows)
        call, held = self._describe_call(inputs, cache, max_positions)
        input_ids, last_row, hidden_states = inputs.input_ids, inputs.last_row, inputs.hidden_states
        batch_size, num_nodes = input_ids.shape
        rows = num_nodes if last_row is None else 1
        logits = torch.empty(batch_size, rows, self._vocab_size, dtype=self._logits_dtype, device="cpu")
        hidden, kept = None, {}
        if hidden_states:
            numbers = range(self.num_layers + 1)
            shape = (batch_size, num_nodes, self._width)
            kept = {number: torch.empty(shape, dtype=torch.float32, device="cpu") for number in hidden_states}
            hidden = _addresses([kept[number].data_ptr() if number in kept else 0 for number in numbers])
        weights = self.look_up_weights()
        self._forward.run(
            call, weights.data_ptr(), logits.data_ptr(), 0 if hidden is None else hidden.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        del held  # until here
        if hidden_states:
            hidden_states.update({number: states.to(self._dtype) for number, states in kept.items()})
        return logits

    state: tuple[Any, ...] = ()  # beside the model's: nothing here is captured

    def settle(self) -> None:
        """Do nothing: weights stay where the model has them."""

    def let_go(self) -> None:
        """Do nothing: no weights are held between forwards."""

    def bind(
        self,
        inputs: ForwardInputs,
        cache: TreeCache,
        max_positions: int | None,
        check: Callable[[], None],
        wanted_rows: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
    ) -> BoundForward:
        """Prepare forwards of what will lie in these tensors; see `TreeModel.bind`."""
        input_ids, cache_lens = inputs.input_ids, inputs.cache_lens
        for name, tensor, dtype in (("input_ids", input_ids, torch.int64), ("cache_lens", cache_lens, torch.int32)):
            if tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"bind: {name} must be contiguous {dtype}, got {tensor.dtype} with strides {tensor.stride()}"
                )
        call, held = self._describe_call(inputs, cache, max_positions)
        rows = input_ids.shape[1] if inputs.last_row is None else 1
        if wanted_rows is not None:
            if wanted_rows.dtype != torch.int64 or not wanted_rows.is_contiguous():
                raise ValueError(f"bind: wanted_rows must be contiguous int64, got {wanted_rows.dtype}")
            rows = wanted_rows.shape[1]
            call |= {"wanted_nodes": wanted_rows.data_ptr(), "num_wanted": rows}
            held.append(wanted_rows)
        if active is not None:
            if active.dtype != torch.int32 or not active.is_contiguous() or not active.is_cpu:
                raise ValueError(
                    f"bind: active must be contiguous int32 on the CPU, got {active.dtype} on {active.device}"
                )
            call["active"] = active.data_ptr()
            held.append(active)
        shape = torch.Size((input_ids.shape[0], rows, self._vocab_size))
        return BoundForward(self, _host.BoundForward(self._forward, call), shape, (held, cache), check)

    def lease(self) -> _Lease:
        """Look the weights up and hold their memory, for as long as the lease lives."""
        table = self.look_up_weights()
        lease = self._leased()
        if lease is None or lease.table is not table:
            lease = _Lease(table, [owner[name] for owner, name, _ in self._tensors])
            self._leased = ref(lease)
        return lease

    def _describe_call(
        self, inputs: ForwardInputs, cache: TreeCache, max_positions: int | None
    ) -> tuple[dict[str, int], list[Any]]:
        """Give a call but for its weights and outputs, and what must live as long as it is used."""
        inputs.check_for_kernels(self.num_layers)
        input_ids, cache_lens, step, last_row, _ = inputs
        batch_size, num_nodes = input_ids.shape
        cache_rows = cache.max_cache_len
        last_position = (cache_rows if max_positions is None else max_positions) - 1
        # All that the call reads is held by names of its own until it is over, in the layout that it reads: what is
        # freed is another tensor's memory, and other threads' forwards may lengthen a table meanwhile.
        mask, node_ids, depths = (_laid_out(part, torch.int32) for part in step[:3])
        tokens, lens = _laid_out(input_ids, torch.int64), _laid_out(cache_lens, torch.int32)
        wanted = None if last_row is None else _laid_out(last_row, torch.int64)
        tables = [rotation.reach(min(cache_rows, last_position + 1)) for rotation in self._rotations]
        rotations = _addresses([table.data_ptr() for table in tables])
        caches = self._caches.get(cache)
        if caches is None:
            caches = _addresses([tensor.data_ptr() for tensor in cache.tensors()])
            self._caches[cache] = caches
        call = {
            "tokens": tokens.data_ptr(),
            "depths": depths.data_ptr(),
            "node_ids": node_ids.data_ptr(),
            "tree_mask": mask.data_ptr(),
            "cache_lens": lens.data_ptr(),
            "num_requests": batch_size,
            "num_nodes": num_nodes,
            "num_words": mask.shape[-1],
            "mask_per_request": mask.dim() == 3,
            "max_position": last_position,
            "caches": caches.data_ptr(),
            **row_fields(cache),
            "rotations": rotations.data_ptr(),
            "wanted_nodes": 0 if wanted is None else wanted.data_ptr(),
            "logits_type": _ELEMENT_TYPES[self._logits_dtype],
        }
        return call, [mask, node_ids, depths, tokens, lens, wanted, tables, rotations, caches]

    def look_up_weights(self) -> torch.Tensor:
        """Give the table of addresses that a call takes: where every weight lies now.

        Weights may be exchanged between forwards. Hold the table for as long as its address is used.

        Raises:
            ValueError: a weight has another form than when the model was described.
        """
        known, table = self._weights
        try:  # by torch's own function, since this is done for every forward
            addresses = list(map(torch.Tensor.data_ptr, [owner[name] for owner, name, _ in self._tensors]))
        except (KeyError, TypeError):  # one is gone
            addresses = []
        if addresses == known:
            return table
        for owner, name, described in self._tensors:
            weight = owner.get(name)
            form = None if weight is None else form_of(weight)
            if weight is None or form != described or (weight.data_ptr() == 0 and weight.numel() != 0):
                raise ValueError(
                    f"forward: {name} must keep its shape, dtype, layout and memory, {described}, got {form}; "
                    "where the model was changed, make a new cache"
                )
        table = _addresses(addresses)
        self._weights = addresses, table
        return table


class BoundForward:
    """Forwards of the same rows, again and again: tokens and lengths are read where they lie; see `TreeModel.bind`.

    Where the weights lie is looked up when it is made and again behind foreign code (`foreign_code_ran`): to look takes
    as long as a forward of a small draft. Until then the memory that was found is held.

    Attributes:
        prepared: the same for what is written in C++.
        shape: of the logits.
        width: of hidden states.
    """

    def __init__(
        self, native: NativeForward, prepared: Any, shape: torch.Size, held: Any, check: Callable[[], None]
    ) -> None:
        self.prepared, self.shape, self.width = prepared, shape, native._width
        self._own, self._held, self._check = native, held, check
        self._look()

    def _look(self) -> None:
        self._seen = num_foreign()
        self._check()
        self._lease = self._own.lease()

    def weights(self) -> int:
        """Give the address of the table of weights, for a run now.

        Raises:
            ValueError: a weight has another form than when the model was adapted, or the model is in training mode.
        """
        if self._seen != num_foreign():
            self._look()
        return self._lease.address

    def run(self, logits: torch.Tensor, hidden_states: Mapping[int, torch.Tensor] | None = None) -> bool:
        """Run one forward.

        Args:
            logits: takes the logits. Contiguous, of `shape` and the model's `logits_dtype`.
            hidden_states: take the hidden states of their numbers, of all rows; see `TreeModel.forward`. [B, N, width]
                float32 each, contiguous.

        Returns:
            False, and nothing is written, where a length leaves no room in the cache, or its block table leads out of
            its pages.

        Raises:
            ValueError: as in `weights`.
        """
        threads = torch.get_num_threads()
        if not hidden_states:
            return bool(self.prepared.run(self.weights(), logits.data_ptr(), threads))
        hidden = _addresses([address(hidden_states.get(number)) for number in range(self._own.num_layers + 1)])
        return bool(self.prepared.run(self.weights(), logits.data_ptr(), threads, hidden.data_ptr()))


class _Lease:
    """Where the weights lie, and their memory, which is held even where a parameter is given other memory."""

    def __init__(self, table: torch.Tensor, weights: list[torch.Tensor]) -> None:
        self.table, self.address = table, table.data_ptr()
        self._weights = [weight.detach() for weight in weights]


def row_fields(cache: TreeCache) -> dict[str, int]:
    """Give the part of a call that says where a cache's rows are."""
    if cache.block_table is None:
        return {"cache_rows": cache.max_cache_len}
    return {
        "cache_rows": cache.max_cache_len,
        "block_table": cache.block_table.data_ptr(),
        "page_size": cache.page_size,
        "num_pages": cache.layers[0].keys.shape[0],
    }


def _laid_out(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).contiguous()


def _addresses(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
