"""The table of `load_plan.py`, measured at start: what forwards, attention and drafting take, by rows and requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sequoia_kernels.ops import tree_attention
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm.attention import paged_rows
from sequoia_kernels.vllm.drafting import DraftRequest, TreeDrafter
from sequoia_kernels.vllm.load_plan import Curve, StepCosts
from sequoia_kernels.vllm.settings import LOGGER

__all__ = ["measure_costs"]

logger = logging.getLogger(LOGGER)

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
REQUESTS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 3
LONG_SECONDS = 0.5  # a call that takes longer is timed once
CONTEXT_DRAFTED = 33
CONTEXTS = (128, 1024)
ATTENTION_ROWS = (1, 16)


def measure_costs(runner: Any, seconds: float, agree: Callable[[bool], bool]) -> StepCosts:
    """Time the parts of a step; what the time does not suffice for is continued on straight lines.

    Args:
        runner: the tree runner, ready to run.
        seconds: how long it may take, about. Two sizes of everything are measured at least.
        agree: gives rank 0's answer to all ranks, which run forwards together.

    Returns:
        The costs.
    """
    started = time.perf_counter()
    most = runner.vllm_config.scheduler_config.max_num_seqs
    most_rows = min(runner.max_num_tokens, most * runner.settings.max_nodes)
    costs = StepCosts()
    times = _times(ROWS, most_rows, lambda rows: _forward(runner, rows), started + 0.5 * seconds, agree)
    costs.forward = Curve(times)
    costs.attention = _attention(runner)
    if runner.trees is not None:
        two, three, deadline = TokenTree.chain(2), TokenTree.chain(3), started + seconds
        most = min(most, runner.trees.most_requests(CONTEXT_DRAFTED, three.num_nodes))
        root = _times(REQUESTS, most, lambda count: _Growing(runner.trees, two, count), deadline, bool)
        both = _times(tuple(root), most, lambda count: _Growing(runner.trees, three, count), deadline, bool)
        costs.draft_root = Curve(root)
        costs.draft_level = Curve({count: max(both[count] - root[count], 0.0) for count in both})
    logger.info("trees: timed the parts of a step in %.1f s", time.perf_counter() - started)
    return costs


def _times(
    sizes: tuple[int, ...],
    most: int,
    prepare: Callable[[int], Callable[[], object]],
    deadline: float,
    agree: Callable[[bool], bool],
) -> dict[int, float]:
    """Time calls of growing size until the deadline; two sizes at least, where there are two. Medians."""
    times: dict[int, float] = {}
    for size in sizes:
        if size > most and times:
            break
        if len(times) >= 2 and agree(time.perf_counter() > deadline):
            break
        call = prepare(size)
        call()  # warms up
        taken: list[float] = []
        while len(taken) < REPEATS and not (taken and agree(taken[-1] > LONG_SECONDS)):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        times[size] = float(np.median(taken))
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forward(runner: Any, rows: int) -> Callable[[], object]:
    """A forward of the target over some rows, but for its attention."""

    def call() -> object:
        hidden, _ = runner._dummy_run(rows)
        logits = runner.model.compute_logits(hidden[:rows])
        _synchronize(runner.device)
        return logits

    return call


class _Growing:
    """Growing one tree for requests of some tokens, which are forgotten when nobody holds it any more."""

    def __init__(self, drafter: TreeDrafter, tree: TokenTree, num_requests: int) -> None:
        length = min(CONTEXT_DRAFTED, drafter.max_tokens)
        generator = np.random.default_rng(num_requests)
        self._drafter, self._tree = drafter, tree
        self._entries = [
            DraftRequest(
                f"measured {index}", generator.integers(0, drafter.vocab_size, length), 0.0, 0, must_draft=True
            )
            for index in range(num_requests)
        ]

    def __call__(self) -> object:
        grown = self._drafter.grow({self._tree: self._entries})  # reads the tokens when it is first called
        _synchronize(self._drafter.model.device)
        return grown

    def __del__(self) -> None:
        self._drafter.forget(entry.request_id for entry in self._entries)


def _attention(runner: Any) -> Curve:
    """Seconds of all layers by rows times context."""
    layers = runner.compilation_config.static_forward_context
    points: dict[int, list[float]] = {0: [0.0]}
    for group in runner.kv_cache_config.kv_cache_groups:
        names = [name for name in group.layer_names if hasattr(layers[name], "kv_cache")]
        if not names:
            continue
        layer = layers[names[0]]
        impl = layer.impl
        keys, values = paged_rows(layer.kv_cache).split(impl.head_size, dim=3)
        num_blocks, page = keys.shape[:2]
        for context in CONTEXTS:
            pages = -(-(context + 1) // page)
            table = (torch.arange(pages, dtype=torch.int32, device=keys.device) % num_blocks)[None]
            for rows in ATTENTION_ROWS:
                query = torch.zeros(1, rows, impl.num_heads, impl.head_size, dtype=keys.dtype, device=keys.device)
                mask = torch.ones(rows, 1, dtype=torch.int32, device=keys.device)
                lens = torch.tensor([context], dtype=torch.int32, device=keys.device)

                def call(query=query, mask=mask, lens=lens, table=table, keys=keys, values=values) -> None:  # type: ignore[no-untyped-def]
                    tree_attention(query, keys, values, mask, lens, block_table=table)
                    _synchronize(keys.device)

                call()
                began = time.perf_counter()
                for _ in range(REPEATS):
                    call()
                taken = (time.perf_counter() - began) / REPEATS * len(names)
                points.setdefault(rows * context, []).append(taken)
    # One number a size: groups of layers add up.
    return Curve({size: float(np.sum(times)) for size, times in points.items()})
