"""A server's layer in one call (`_host.PagedLayer`): as storing rows by hand and one call of the op for each group."""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels import _host
from sequoia_kernels.models import causal_step
from sequoia_kernels.ops import tree_attention
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES
from sequoia_kernels.tree import TokenTree

PAGE, NUM_PAGES = 16, 100
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


class Step:
    """Requests of several groups in one batch, their rows anywhere among the tokens, their pages anywhere in the pool.

    Args:
        dtype: of everything.
        heads: query heads, key/value heads and their width.
        requests: tree or None, rows and committed tokens of each.
    """

    def __init__(self, dtype: torch.dtype, heads: tuple[int, int, int], requests: list[tuple]) -> None:
        generator = torch.Generator().manual_seed(len(requests))
        self.heads, self.requests = heads, requests
        num_heads, num_kv_heads, width = heads
        self.num_tokens = sum(rows for _, rows, _ in requests)
        # As a model gives them: queries, keys and values are parts of one projection.
        projected = torch.randn(
            self.num_tokens, (num_heads + 2 * num_kv_heads) * width, generator=generator, dtype=torch.float64
        ).to(dtype)
        parts = projected.split([num_heads * width, num_kv_heads * width, num_kv_heads * width], dim=1)
        self.query, self.key, self.value = (part.unflatten(1, (-1, width)) for part in parts)
        pool = torch.randn(NUM_PAGES, PAGE, num_kv_heads, 2 * width, generator=generator).to(dtype)
        self.pool = pool
        most = -(-max(rows + committed for _, rows, committed in requests) // PAGE)
        self.table = torch.randperm(NUM_PAGES, generator=generator)[: most * len(requests)].int().view(-1, most)
        firsts, first = [], 0
        for _, rows, _ in requests:
            firsts.append(first)
            first += rows
        self.firsts = firsts
        slots = []
        for request, (_, rows, committed) in enumerate(requests):
            places = committed + torch.arange(rows)
            slots.append(self.table[request].long()[places // PAGE] * PAGE + places % PAGE)
        self.slots = torch.cat(slots)

    def groups(self) -> list[dict[str, torch.Tensor]]:
        """Requests with equally many rows under one mask."""
        members: dict[tuple, list[int]] = {}
        for request, (tree, rows, _) in enumerate(self.requests):
            members.setdefault((tree, rows), []).append(request)
        return [
            {
                "first_rows": torch.tensor([self.firsts[request] for request in group]),
                "tree_mask": causal_step(rows).tree_mask if tree is None else tree.tensors().ancestor_mask,
                "cache_lens": torch.tensor([self.requests[request][2] for request in group], dtype=torch.int32),
                "block_table": self.table[group].contiguous(),
                "rows": torch.tensor(rows),
            }
            for (tree, rows), group in members.items()
        ]

    def layer(self, **settings: object) -> _host.PagedLayer:
        """The layer on this step's pool."""
        keys, values = self.pool.split(self.heads[2], dim=3)
        self.held = settings.get("sinks")
        sinks = settings.pop("sinks", None)
        return _host.PagedLayer(
            {
                "keys": keys.data_ptr(), "values": values.data_ptr(), "pages": (tuple(keys.shape), keys.stride()),
                "type": ELEMENT_TYPES[self.pool.dtype], "scale": self.heads[2] ** -0.5,
                "softcap": settings.get("softcap") or 0.0, "sliding_window": settings.get("sliding_window") or 0,
                "sinks": 0 if sinks is None else sinks.data_ptr(), "num_heads": self.heads[0], "stores": True,
            }
        )  # fmt: skip

    def attend(self, layer: _host.PagedLayer, groups: list[dict[str, torch.Tensor]], num_threads: int) -> torch.Tensor:
        """Run the layer."""
        step = _host.PagedStep(
            [
                {name: tensor.data_ptr() for name, tensor in group.items() if name != "rows"}
                | {
                    "num_requests": len(group["cache_lens"]), "num_rows": int(group["rows"]),
                    "num_words": group["tree_mask"].shape[-1], "max_pages": group["block_table"].shape[1],
                }
                for group in groups
            ],
            self.slots.data_ptr(),
            self.num_tokens,
        )  # fmt: skip
        out = torch.full((self.num_tokens, self.heads[0] * self.heads[2]), torch.nan, dtype=self.pool.dtype)
        done = layer.attend(
            step, self.query.data_ptr(), self.query.stride(0), self.key.data_ptr(), self.key.stride(0),
            self.value.data_ptr(), self.value.stride(0), out.data_ptr(), num_threads,
        )  # fmt: skip
        return out if done else torch.empty(0)

    def expected(self, groups: list[dict[str, torch.Tensor]], **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        """What the op gives, and the pool with the rows stored."""
        width = self.heads[2]
        pool = self.pool.clone()
        rows = pool.flatten(0, 1)
        rows[self.slots, :, :width], rows[self.slots, :, width:] = self.key, self.value
        out = torch.empty(self.num_tokens, *self.heads[::2], dtype=pool.dtype)
        for group in groups:
            count = int(group["rows"])
            taken = (group["first_rows"][:, None] + torch.arange(count)).flatten()
            attended = tree_attention(
                self.query[taken].unflatten(0, (-1, count)), *pool.split(width, dim=3), group["tree_mask"],
                group["cache_lens"], block_table=group["block_table"], backend="reference", **settings,
            ).out  # fmt: skip
            out[taken] = attended.flatten(0, 1)
        return out.flatten(1), pool


BATCH = [(TREE, 8, 40), (None, 1, 33), (TREE, 8, 16), (None, 20, 0), (TREE, 8, 3), (None, 1, 70), (None, 40, 30)]
SETTINGS = [{}, {"sliding_window": 9}, {"softcap": 3.0}, {"sinks": torch.linspace(-1, 2, 8)}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings), "plain"))
@pytest.mark.parametrize("heads", [(8, 8, 16), (8, 2, 64), (8, 4, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_on_the_host_is_the_op(dtype, heads, settings):
    step = Step(dtype, heads, BATCH)
    groups = step.groups()
    expected, pool = step.expected(groups, **settings)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    got = step.attend(step.layer(**settings), groups, 1)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(step.pool, pool)


@pytest.mark.parametrize("by_openmp", [False, True])
def test_threads_share_a_layer_on_the_host(by_openmp):
    step = Step(torch.float32, (8, 2, 64), [(TREE, 8, 400)] * 2 + [(None, 1, 200)])
    groups = step.groups()
    alone = step.attend(step.layer(), groups, 1)
    taken = _host.use_openmp_threads(by_openmp)
    try:
        for num_threads in (2, 3, 8):
            assert torch.equal(step.attend(step.layer(), groups, num_threads), alone)
    finally:
        _host.use_openmp_threads(False)
    assert not taken or by_openmp


@pytest.mark.parametrize("broken", ["slot", "page", "length"])
def test_what_lies_outside_of_the_pages_is_refused_on_the_host(broken):
    step = Step(torch.float32, (8, 2, 16), [(None, 1, 20), (None, 1, 5)])
    groups = step.groups()
    if broken == "slot":
        step.slots[1] = NUM_PAGES * PAGE
    elif broken == "page":
        groups[0]["block_table"][0, 0] = NUM_PAGES
    else:
        groups[0]["cache_lens"][0] = 1000
    before = step.pool.clone()
    assert step.attend(step.layer(), groups, 1).numel() == 0
    if broken == "slot":
        assert torch.equal(step.pool, before)
