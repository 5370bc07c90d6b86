"""Forwards of few rows with random weights, and what their specification makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sequoia_kernels.models.fused import reference
from sequoia_kernels.models.fused.few_rows import FewRowsCall, FewRowsLayer, FewRowsModel
from sequoia_kernels.models.fused.steps import RowPlaces

__all__ = ["CASES", "Forward", "Sizes", "assert_same", "forward_of", "is_same"]

CPU = torch.device("cpu")


class Sizes(NamedTuple):
    requests: int = 1
    nodes: int = 3
    width: int = 64
    inner: int = 96
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    vocab: int = 40
    layers: int = 2
    slots: int = 80


CASES = {
    "one row": Sizes(nodes=1, width=32, inner=32),
    "a group": Sizes(),
    "two requests, a head of keys each": Sizes(2, 5, 96, 160, 3, 3, vocab=50),
    "two tiles of rows, wide heads": Sizes(1, 9, 256, 800, 2, 2, 128, vocab=33, layers=1),
    "four tiles of rows": Sizes(3, 7, 320, 96, 4, 1, vocab=100),
    "twenty nodes": Sizes(1, 20, 64, 96, 2, 1, layers=1),
    "several steps of the width": Sizes(1, 4, 1568, 800, 1, 1, vocab=17, layers=1),
}


class Forward(NamedTuple):
    """What a forward is given."""

    model: FewRowsModel
    tokens: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    places: RowPlaces
    mask: torch.Tensor
    num_tree_rows: int
    table: torch.Tensor

    def call(self, counters: torch.Tensor | None = None) -> FewRowsCall:
        if counters is None:
            counters = torch.zeros(2, dtype=torch.int32, device=self.tokens.device)
        return FewRowsCall.of(
            self.model, self.tokens, self.caches, self.places, self.mask, self.num_tree_rows, self.table, counters
        )

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What a launch finds by address: names and tensors of weights and caches."""
        head = ("embedding", "final_norm", "head")
        named = [(name, getattr(self.model, name)) for name in head]
        for number, (layer, pair) in enumerate(zip(self.model.layers, self.caches, strict=True)):
            own = {**layer._asdict(), **dict(zip(("keys", "values"), pair))}
            named += [(f"{name} of layer {number}", tensor) for name, tensor in own.items()]
        return named

    def expected(self) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The specification's logits and caches."""
        caches = [(keys.clone(), values.clone()) for keys, values in self.caches]
        logits = reference.few_rows(self.model, self.tokens, caches, self.places, self.mask, self.table)
        return logits, caches


def forward_of(
    sizes: Sizes,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    *,
    own_trees: bool = False,
    seed: int = 0,
) -> Forward:
    """Random weights, and a tree of which some nodes are fed; slots that nobody sees hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(outputs: int, width: int) -> torch.Tensor:
        return (normal(outputs, width) * width**-0.5).to(dtype).to(device)

    def norm(width: int) -> torch.Tensor:
        return (1 + 0.1 * normal(width)).to(dtype).to(device)

    attended = sizes.heads * sizes.head_dim
    projected = attended + 2 * sizes.kv_heads * sizes.head_dim
    layers = tuple(
        FewRowsLayer(
            norm(sizes.width), linear(projected, sizes.width), linear(sizes.width, attended),
            norm(sizes.width), linear(2 * sizes.inner, sizes.width), linear(sizes.width, sizes.inner),
        )
        for _ in range(sizes.layers)
    )  # fmt: skip
    embedding = normal(50, sizes.width).to(dtype).to(device)
    model = FewRowsModel(
        layers, embedding, norm(sizes.width), linear(sizes.vocab, sizes.width),
        sizes.heads, sizes.kv_heads, sizes.head_dim, 1e-5, sizes.head_dim**-0.5,
    )  # fmt: skip
    drawn = torch.randint(50, (sizes.requests, sizes.nodes), generator=generator)
    lens = torch.tensor([37, 0, 5][: sizes.requests], dtype=torch.int32)
    # Of a tree of more than a word, nodes that do not follow each other; the last sees one that is fed beside it.
    known = [1, 2, 3, 5, 6, 9, 10, 30, 33] if sizes.nodes <= 9 else range(17, 40)
    nodes = torch.tensor(known[: sizes.nodes], dtype=torch.int32)
    depths = torch.ones(sizes.nodes, dtype=torch.int32)
    mask = torch.zeros(sizes.requests if own_trees else 1, sizes.nodes, 2, dtype=torch.int64)
    for request in range(len(mask)):
        for row, node in enumerate(nodes.tolist()):
            mask[request, row, node // 32] |= 1 << (node % 32)
            mask[request, row, 0] |= 1 | (2 if (row + request) % 2 and node > 1 else 0)
            if sizes.nodes > 9:
                other = int(nodes[row * 7 % 20])
                mask[request, row, other // 32] |= 1 << (other % 32)
    mask = mask.where(mask < 2**31, mask - 2**32).to(torch.int32)
    caches = [
        tuple(normal(sizes.requests, sizes.slots, sizes.kv_heads, sizes.head_dim).to(dtype) for _ in range(2))
        for _ in range(sizes.layers)
    ]
    for pair in caches:
        for rows in pair:
            for request, length in enumerate(lens.tolist()):
                rows[request, length + 1 :] = float("nan")
                rows[request, length + 1] = 1.0  # a node that was fed before
    places = RowPlaces(lens.to(device), depths.to(device), nodes.to(device), 70)
    table = normal(90, sizes.head_dim).to(device)
    caches = [(keys.to(device), values.to(device)) for keys, values in caches]
    mask = (mask if own_trees else mask[0]).contiguous().to(device)
    return Forward(model, drawn.to(device), caches, places, mask, int(nodes[-1]) + 1, table)


def assert_same(given: Forward, call: FewRowsCall, expected: Any) -> None:
    """Up to a few units in the last place, since sums in another order round elsewhere."""
    logits, caches = expected
    tolerance = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[logits.dtype]
    assert logits.isfinite().all() and float(logits.float().std()) > 0.5
    torch.testing.assert_close(call.logits, logits, rtol=tolerance, atol=2 * tolerance)
    for got, wanted in zip(given.caches, caches, strict=True):
        for rows, wanted_rows in zip(got, wanted, strict=True):
            torch.testing.assert_close(rows, wanted_rows, rtol=tolerance, atol=2 * tolerance, equal_nan=True)


def is_same(given: Forward, call: FewRowsCall, expected: Any) -> bool:
    """Whether `assert_same` holds."""
    try:
        assert_same(given, call, expected)
    except AssertionError:
        return False
    return True
