"""Hardware profiles made from formulas, for tests that need to know the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sequoia_kernels.planner.profile import (
    DeviceFingerprint,
    ForwardTable,
    HardwareProfile,
    ModelFingerprint,
    OpPoint,
)

TARGET = ModelFingerprint("llama", "float32", 9_000_000, 512, 12, 256, 768, 4, 4, 64)
DRAFT = ModelFingerprint("llama", "float32", 900_000, 512, 1, 256, 768, 4, 4, 64)
DEVICE = DeviceFingerprint("cpu", "Synthetic Processor", 2, 1 << 34, None, "2.13.0")

Times = Callable[[float, float], float]  # (nodes, context) -> milliseconds


def forward_table(
    times: Times, node_counts: Sequence[int], context_lens: Sequence[int] = (128, 512), batch_size: int = 1
) -> ForwardTable:
    """A forward table whose medians are `times`, 10 % spread around them."""
    medians = [[times(nodes, context) for nodes in node_counts] for context in context_lens]
    scaled = [tuple(tuple(factor * value for value in row) for row in medians) for factor in (0.9, 1.0, 1.1)]
    return ForwardTable(batch_size, tuple(context_lens), tuple(node_counts), *scaled, repeats=10)


def synthetic_profile(
    target_ms: Times = lambda nodes, context: 4.0 + 0.1 * nodes,
    draft_ms: Times = lambda nodes, context: 0.5 + 0.01 * nodes,
    *,
    node_counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    draft_counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    context_lens: Sequence[int] = (128, 512),
    batch_size: int = 1,
    sample_ms: Callable[[float, float], float] = lambda rows, num_samples: 0.02 + 0.001 * rows + 0.0005 * num_samples,
    verify_ms: Callable[[float], float] = lambda nodes: 0.05 + 0.001 * nodes,
    compact_ms: Callable[[float], float] = lambda levels: 0.01 + 0.001 * levels,
    greedy_factor: float = 1.0,
    target: ModelFingerprint = TARGET,
    draft: ModelFingerprint = DRAFT,
) -> HardwareProfile:
    """A profile whose times are the given formulas; sampling and verification at T=0 take `greedy_factor` of theirs."""
    profile = HardwareProfile(DEVICE, target_key=target.key, draft_key=draft.key)
    profile = profile.with_forwards(target, forward_table(target_ms, node_counts, context_lens, batch_size))
    profile = profile.with_forwards(draft, forward_table(draft_ms, draft_counts, context_lens, batch_size))

    def point(value: float, **parameters: float) -> OpPoint:
        return OpPoint(parameters, 0.9 * value, value, 1.1 * value)

    modes = ((0.0, greedy_factor), (1.0, 1.0))
    profile = profile.with_op(
        "sample_without_replacement",
        [
            point(
                factor * sample_ms(rows, num_samples), rows=rows, num_samples=num_samples, vocab=512, temperature=mode
            )
            for mode, factor in modes
            for rows in sorted({batch_size * count for count in draft_counts})
            for num_samples in (1, 4, 16)
        ],
    )
    profile = profile.with_op(
        "verify_tree",
        [
            point(
                factor * verify_ms(batch_size * nodes), batch_size=batch_size, nodes=nodes, vocab=512, temperature=mode
            )
            for mode, factor in modes
            for nodes in node_counts
        ],
    )
    row_bytes = target.cache_row_bytes + draft.cache_row_bytes
    return profile.with_op(
        "compact_kv_cache_",
        [
            point(compact_ms(levels), levels=levels, row_bytes=row_bytes, batch_size=batch_size)
            for levels in (1, 2, 4, 8, 16, 32)
        ],
    )
