"""compact_kv_cache_ against one gather and one copy a layer.

GPU cases have the caches of Llama-3-8B: 32 layers of keys and values, 8 heads of 128, bfloat16.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from bench.common.baselines import compact_layer_by_layer, move_rows
from bench.common.harness import Case, Provider, main, own_providers
from bench.common.workloads import LLAMA_3_8B
from sequoia_kernels.ops import CacheTable, compact_kv_cache_

OP = "compact_kv_cache_"

NUM_TREE_ROWS = 64
# A graph repeats a call up to eight times before its lengths are set back.
ROOM_FOR_REPEATS = 8


def _case(device: str, num_accepted: int, quick: bool, batch_size: int = 1, **sizes: Any) -> Case:
    batch = f"{batch_size} requests, " if batch_size > 1 else ""
    name = f"{batch}{num_accepted} accepted rows, {sizes['layers']} layers"
    return Case(name, device, {"num_accepted": num_accepted, "batch_size": batch_size, **sizes}, quick)


_SMALL = {"layers": 24, "kv_heads": 4, "head_dim": 32, "dtype": "float32", "context_len": 256}
_LLAMA = {
    **{key: LLAMA_3_8B[key] for key in ("layers", "kv_heads", "head_dim")},
    "dtype": "bfloat16",
    "context_len": 1024,
}

CASES = [
    _case("cpu", 2, True, **{**_SMALL, "layers": 2}),
    _case("cpu", 4, True, **_SMALL),
    _case("cpu", 8, True, batch_size=4, **_SMALL),
    _case("cpu", 8, False, **_LLAMA),
    _case("cuda", 8, True, **_LLAMA),
    _case("cuda", 4, True, **_LLAMA),
    _case("cuda", 2, False, **_LLAMA),
    _case("cuda", 16, False, **_LLAMA),
    _case("cuda", 8, False, batch_size=8, **_LLAMA),
]


class Inputs(NamedTuple):
    caches: list[torch.Tensor]  # keys and values of every layer, each [B, S, H, D]
    accepted_nodes: torch.Tensor  # [B, L] int32
    num_accepted: torch.Tensor  # [B] int32
    cache_lens: torch.Tensor  # [B] int32; advanced by a call
    committed: torch.Tensor  # [B] int32; what cache_lens is set back to


def _path(case: Case) -> list[int]:
    """The root, which does not move, and one node of every further level, spread over the tree's rows."""
    last = case["num_accepted"] - 1
    return [level * (NUM_TREE_ROWS - 1) // max(last, 1) for level in range(last + 1)]


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    batch_size, count = case["batch_size"], case["num_accepted"]
    num_slots = case["context_len"] + NUM_TREE_ROWS + ROOM_FOR_REPEATS * count
    shape = (batch_size, num_slots, case["kv_heads"], case["head_dim"])
    dtype = getattr(torch, case["dtype"])
    committed = torch.full((batch_size,), case["context_len"], dtype=torch.int32, device=device)
    return Inputs(
        [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2 * case["layers"])],
        torch.tensor(_path(case), dtype=torch.int32, device=device).repeat(batch_size, 1),
        torch.full((batch_size,), count, dtype=torch.int32, device=device),
        committed.clone(),
        committed,
    )


def reset(inputs: Inputs) -> None:
    """Set the lengths back. Rows need not be: how long a move takes does not depend on what is moved."""
    inputs.cache_lens.copy_(inputs.committed)


def bytes_moved(case: Case) -> int:
    """Rows that change their place are read and written once, in all caches."""
    moving = sum(level != node for level, node in enumerate(_path(case)))
    row_bytes = case["kv_heads"] * case["head_dim"] * getattr(torch, case["dtype"]).itemsize
    return 2 * case["batch_size"] * moving * row_bytes * 2 * case["layers"]


def expected(case: Case, inputs: Inputs) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Row by row on copies, every source read before anything is written."""
    start, path = case["context_len"], _path(case)
    sources = [start + node for node in path]
    caches = []
    for cache in inputs.caches:
        after = cache.clone()
        after[:, start : start + len(path)] = cache[:, sources]
        caches.append(after)
    return caches, inputs.committed + len(path)


def mismatch(case: Case, inputs: Inputs, expected: tuple[list[torch.Tensor], torch.Tensor], result: Any) -> str | None:
    """Compare the inputs themselves: they were changed in place."""
    caches, cache_lens = expected
    for index, (got, wanted) in enumerate(zip(inputs.caches, caches)):
        if not torch.equal(got, wanted):
            return f"cache {index} is not what it should be"
    if not torch.equal(inputs.cache_lens, cache_lens):
        return f"cache_lens are {inputs.cache_lens.tolist()} instead of {cache_lens.tolist()}"
    return None


def _own(case: Case, inputs: Inputs, backend: str) -> Any:
    table = CacheTable(inputs.caches)  # a loop builds it once
    return lambda: compact_kv_cache_(table, *inputs[1:4], backend=backend)


def _layer_by_layer(case: Case, inputs: Inputs) -> Any:
    return lambda: compact_layer_by_layer(*inputs[:4])


def _layer_by_layer_known(case: Case, inputs: Inputs) -> Any:
    start = case["context_len"]
    rows = start + inputs.accepted_nodes[0]

    def call() -> None:
        for cache in inputs.caches:
            for request in cache:
                move_rows(request, rows, start)
        inputs.cache_lens.add_(inputs.num_accepted)

    return call


PROVIDERS = {
    **own_providers(OP, _own),
    "layer by layer": Provider(
        _layer_by_layer,
        capturable=False,
        note="index_select and copy for each cache; reads path and lengths on the host, as loops do",
    ),
    "layer by layer, known path": Provider(
        _layer_by_layer_known, note="the same with path and lengths already on the host, so that it can be captured"
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
