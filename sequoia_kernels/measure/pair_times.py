"""measure_profile: time two models and the ops on the device at hand, and write down what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from sequoia_kernels.cuda_graphs import as_replay, new_memory
from sequoia_kernels.documents import is_integer
from sequoia_kernels.drafts import DecodingState, DraftSource, StageClock, draft_source
from sequoia_kernels.fingerprints import DeviceFingerprint, ModelFingerprint, largest_cache_bytes
from sequoia_kernels.measure import calls
from sequoia_kernels.measure.bandwidth import measure_bandwidth
from sequoia_kernels.measure.timing import Progress, Timing, Turn, pooled_slowdown, report_percent, time_calls
from sequoia_kernels.models import TreeModel, adapt, agree_on_changes
from sequoia_kernels.parallel import preparing, together
from sequoia_kernels.planner import ForwardTable, HardwareProfile, OpPoint
from sequoia_kernels.planner.profile import DRAFT_STEP
from sequoia_kernels.tree import MAX_STEP_ROWS

__all__ = ["affordable_node_counts", "measure_profile"]

NODE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# An offloaded forward takes as long as copying its weights up to several hundred nodes, and takes seconds.
OFFLOADED_NODE_COUNTS = (1, 16, 64, 128, 256, 512, 768, 1024)
CUDA_NODE_COUNTS = (*NODE_COUNTS, 192, 256, 384, 512)
QUICK_NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DRAFT_NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
QUICK_DRAFT_NODE_COUNTS = (1, 2, 4, 8, 16)
CONTEXT_LENS = (128, 512, 2048)
QUICK_CONTEXT_LENS = (128, 512)
QUICK_SAMPLE_COUNTS = (1, 4, 16)
QUICK_COMPACT_LEVELS = (1, 8, 32)
SECONDS, QUICK_SECONDS = 40.0, 9.0

Key = tuple[Any, ...]  # what a call measures

LEAST_NODE_COUNTS = 5  # sizes that are timed whatever they take
CALLS_A_SIZE = 6  # calls that timing a size takes, its share of the draft's and the ops' times included

# Weights of up to so many times a CPU's largest cache are read from there in good part, once they have been read a few
# times: forwards in a row take less and less time.
CACHED = 1.5
SETTLING, TIMED = 4, 3  # forwards of such a target in a row
CACHED_CALLS_A_SIZE = 30  # as CALLS_A_SIZE: four rounds of these in place of four calls


def measure_profile(
    target: Any,
    draft: Any = None,
    *,
    context_lens: Sequence[int] | None = None,
    node_counts: Sequence[int] | None = None,
    draft_node_counts: Sequence[int] | None = None,
    batch_size: int = 1,
    seconds: float | None = None,
    min_repeats: int | None = None,
    max_repeats: int = 200,
    quick: bool = False,
    bandwidth: bool = True,
    progress: Progress | None = None,
    seed: int = 0,
) -> HardwareProfile:
    """Measure everything that `plan_tree` needs to know of a device and a pair of models.

    Timed are forwards of the target over whole trees and of the draft over levels of trees, behind several contexts;
    sampling, verification and compaction at the models' own vocabulary, greedy and sampled; and the memory's bandwidth.
    All calls take turns in shuffled rounds, so that a drift of the machine hits all alike. Their medians count, times
    what interruptions add on average to calls of their kind. A forward on a CPU is timed behind what it follows in
    decoding, and where the CPU's caches hold a good part of the target, several times in a row.

    Args:
        target: the target model: a Hugging Face causal language model or a `TreeModel`.
        draft: the draft model, likewise, or another `DraftSource`, on the same device. Without it only plain decoding
            can be planned.
        context_lens: committed tokens to time behind. 128, 512 and 2048 when None (128 and 512 if quick), as far as the
            target's positions allow. A draft with fewer positions is timed with those: it sees no more in decoding.
        node_counts: tree sizes to time the target at, 1 is always among them. Up to 128 when None (64 if quick), up to
            512 on CUDA, and a few up to 1024 for a target that streams its weights. Planning goes no further than the
            largest.
        draft_node_counts: level widths to time the draft at, 1 and 2 are always among them. Up to 64 when None (16 if
            quick). No more than half of the largest tree is timed: no level has more internal nodes.
        batch_size: requests in every call.
        seconds: time to spend on timing, roughly; 40 when None (9 if quick). It takes longer where `min_repeats` do.
        min_repeats: times that every call is timed at least; 5 when None, 2 for a target that streams its weights.
        max_repeats: rounds at most.
        quick: take the smaller defaults. Of the few times of a call the lower ones then say how it compares with other
            calls, and where a forward over more rows seems to take less time than one over fewer, the two are averaged.
        bandwidth: measure the memory's bandwidth too (half a second).
        progress: called now and then with (done, total, what is being done).
        seed: of the order of the calls.

    Returns:
        The profile, with `target_key` and `draft_key` set. The loop's own overhead is not known here and left at 0; see
        `HardwareProfile.with_overhead`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, a context does not fit the target's positions, or the models are on
            different devices.
        UnsupportedModelError: a model cannot be adapted.

    Notes:
        Allocates caches for the longest context; the models are not changed. Other work on the device meanwhile ends up
        in the numbers. Waits for the device after every call. On CUDA every call is captured and its replay is timed,
        as in a captured step; where that fails the reason is logged, and the call is timed with its launches.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> target, draft = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
        >>> profile = measure_profile(target, draft, context_lens=[16], node_counts=[1, 2, 4], seconds=0.1)
        >>> profile.forward_table(profile.target_key).node_counts
        (1, 2, 4)
    """
    where = "measure_profile"
    agree_on_changes(target, draft)
    target = adapt(target)
    with preparing(target, where):
        draft = draft_source(draft, target)
        if draft is not None and draft.proposes:
            raise TypeError(f"{where}: draft must be one that draws its tokens, got {draft!r}")
        if draft is not None and draft.device != target.device:
            raise ValueError(f"{where}: draft must be on the target's device, {target.device}, got {draft.device}")
        device = target.device
        _check_counts([batch_size], "batch_size", 1)
        offloaded = ModelFingerprint.of(target).streamed_bytes > 0
        if min_repeats is None:
            min_repeats = 2 if offloaded else 5
        if seconds is None:
            seconds = QUICK_SECONDS if quick else SECONDS
        if node_counts is None:
            node_counts = QUICK_NODE_COUNTS if quick else CUDA_NODE_COUNTS if device.type == "cuda" else NODE_COUNTS
            if offloaded:
                node_counts = OFFLOADED_NODE_COUNTS
        if draft_node_counts is None:
            draft_node_counts = QUICK_DRAFT_NODE_COUNTS if quick else DRAFT_NODE_COUNTS
        node_counts = _check_counts(node_counts, "node_counts", 1, MAX_STEP_ROWS, always=(1,))
        # no level of a tree has more internal nodes than half of the tree's nodes
        widest = max(2, node_counts[-1] // 2)
        draft_node_counts = _check_counts(draft_node_counts, "draft_node_counts", 1, MAX_STEP_ROWS // 2, always=(1, 2))
        draft_node_counts = [count for count in draft_node_counts if count <= widest] if draft is not None else []
        counts = {"target": node_counts, "draft": draft_node_counts}
        tree_rows = max([node_counts[-1], *(calls.draft_tree_rows(count) for count in draft_node_counts)])
        longest = None if target.max_positions is None else target.max_positions - 1  # the root has a position too
        if context_lens is None:
            context_lens = _default_contexts(QUICK_CONTEXT_LENS if quick else CONTEXT_LENS, longest)
        context_lens = _check_counts(context_lens, "context_lens", 0)
        if longest is not None and context_lens[-1] > longest:
            raise ValueError(
                f"{where}: context_lens must be below the target's {target.max_positions} positions, "
                f"got {context_lens[-1]}"
            )

    @torch.inference_mode()
    def measured() -> HardwareProfile:
        plan: _Plan | None = None
        report = report_percent(progress, lambda: "preparing" if plan is None else f"{len(plan.calls)} calls in turn")
        report(0.0)
        found = dict(measure_bandwidth(device)) if bandwidth else {}
        plan = _Plan(target, draft, counts, context_lens, batch_size, tree_rows, quick)
        memory = new_memory(device)
        # A captured step has no launches from the host; a model that streams its weights cannot be captured.
        timed = {key: as_replay(call, device, memory, plan.model(key)) for key, call in plan.calls.items()}
        times = time_calls(
            timed, device, min_repeats=min_repeats, max_repeats=max_repeats, seconds=seconds, warmup=1, seed=seed,
            progress=report, turns=plan.turns(timed),
        )  # fmt: skip
        return plan.fill(times, found, {"seconds": seconds, "quick": quick, "seed": seed})

    models = (target,) if draft is None else (target, *draft.models)
    return together(models, measured, where=where)


def affordable_node_counts(
    target: TreeModel,
    context_len: int,
    batch_size: int,
    *,
    least_seconds: float,
    num_forwards: float = 0.0,
    max_nodes: int | None = None,
) -> tuple[list[int], float]:
    """Find out which tree sizes there is time to measure.

    Args:
        target: the target. One that streams its weights is not timed: its own few sizes are given.
        context_len: committed tokens to time behind.
        batch_size: requests in every call.
        least_seconds: time that measuring may take.
        num_forwards: it may also take as long as so many forwards of one node, where that is more.
        max_nodes: largest size.

    Returns:
        Sizes for `measure_profile`, and the time that measuring may take, in seconds.
    """
    weights = ModelFingerprint.of(target)
    streamed = weights.streamed_bytes > 0
    choices: Sequence[int] = OFFLOADED_NODE_COUNTS if streamed else QUICK_NODE_COUNTS
    sizes = [size for size in choices if max_nodes is None or size <= max(max_nodes, 1)]
    if streamed:
        return sizes, least_seconds
    calls_a_size = CACHED_CALLS_A_SIZE if target.device.type == "cpu" and _is_cached(weights) else CALLS_A_SIZE
    counts: list[int] = []
    budget, spent = least_seconds, 0.0
    with torch.inference_mode():
        cache = target.new_cache(batch_size, context_len + sizes[-1], beyond_positions=True)
        for count in sizes:
            call = calls.forward_call(target, cache, context_len, calls.target_step(count, target.device))
            times = time_calls({count: call}, target.device, min_repeats=1, max_repeats=1, warmup=1)
            spent += times[count].p50_ms / 1e3
            if not counts:
                budget = max(budget, num_forwards * spent)
            elif len(counts) >= LEAST_NODE_COUNTS and calls_a_size * spent > budget:
                break
            counts.append(count)
    return counts, budget


class _Plan:
    """All calls of a measurement, by what they measure, and how their times become a profile."""

    def __init__(
        self,
        target: TreeModel,
        draft: DraftSource | None,
        counts: dict[str, list[int]],
        context_lens: list[int],
        batch_size: int,
        tree_rows: int,
        quick: bool,
    ) -> None:
        self.counts, self.context_lens, self.batch_size = counts, context_lens, batch_size
        self.target, self.draft = target, draft
        self.fingerprints = {"target": ModelFingerprint.of(target)}
        rows = context_lens[-1] + tree_rows
        cache = target.new_cache(batch_size, rows, beyond_positions=True)
        tensors = cache.tensors()
        if draft is not None:
            self.fingerprints["draft"] = draft.fingerprint
            state = DecodingState.create(
                batch_size, target.device, seeds=[0] * batch_size, temperature=[1.0] * batch_size, top_k=None,
                top_p=None,
            )  # fmt: skip
            drafting = draft.start(target, state, rows, backend="auto", clock=StageClock(enabled=False))
            drafting.share(cache)
            tensors = tensors + drafting.cache_tensors()
        for tensor in tensors:  # attention over zeros would be a softmax over equal scores
            tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))
        self.calls: dict[tuple[Any, ...], Callable[[], object]] = {}
        for count, context_len in product(counts["target"], context_lens):
            step = calls.target_step(count, target.device)
            self.calls["forward", "target", context_len, count] = calls.forward_call(target, cache, context_len, step)
        # two models of the same shapes share one table, the target's
        models = self.fingerprints
        self.roles = [role for role in models if role == "target" or models[role] != models["target"]]
        for count, context_len in product(counts["draft"] if "draft" in self.roles else (), context_lens):
            call = drafting.level_call(calls.draft_step(count, target.device), context_len)
            if call is None:
                raise ValueError(
                    f"measure_profile: draft must tell what growing a level takes (Drafting.level_call), got {draft!r}"
                )
            self.calls["forward", "draft", context_len, count] = call
        if draft is not None:
            for context_len in context_lens:
                call = drafting.step_call(context_len)
                if call is not None:
                    key = calls.op_key(
                        DRAFT_STEP, draft=draft.fingerprint.key, batch_size=batch_size, context_len=context_len
                    )
                    self.calls[key] = call
        drawing = draft or target
        self.calls.update(
            calls.draw_and_verify_calls(
                batch_size,
                counts["target"],
                [batch_size * count for count in counts["draft"]],
                QUICK_SAMPLE_COUNTS if quick else calls.SAMPLE_COUNTS,
                (target.vocab_size, min(target.vocab_size, drawing.vocab_size)),
                (target.logits_dtype, drawing.logits_dtype),
                target.device,
            )
        )
        if draft is not None:
            row_bytes = sum(fingerprint.cache_row_bytes for fingerprint in self.fingerprints.values())
            for levels in QUICK_COMPACT_LEVELS if quick else calls.COMPACT_LEVELS:
                if levels <= tree_rows:
                    key = calls.op_key("compact_kv_cache_", levels=levels, row_bytes=row_bytes, batch_size=batch_size)
                    self.calls[key] = calls.compact_call(tensors, context_lens[0], levels, tree_rows)

    def model(self, key: tuple[Any, ...]) -> TreeModel | None:
        """The model whose forward a call is, None where it is no model's."""
        kind, role, *_ = key
        if kind != "forward":
            return None
        return self.target if role == "target" else next(iter(self.draft.models), None) if self.draft else None

    def turns(self, timed: Mapping[Key, Callable[[], object]]) -> dict[Key, Turn]:
        """Let every forward on a CPU follow what it follows in decoding, since that decides what the caches hold.

        Levels of a draft follow one another, and forwards of one node themselves: that is plain decoding. Between
        forwards of a tree lie levels of the draft.
        """
        if self.target.device.type != "cpu":
            return {}
        cached = _is_cached(self.fingerprints["target"])
        turns = {}
        for key, call in timed.items():
            kind, role, *sizes = key
            if kind == "forward" and role == "draft":
                turns[key] = Turn(before=call)
            elif kind == "forward" and cached:
                context_len, num_nodes = sizes
                level = timed.get(("forward", "draft", context_len, 1))
                levels = None
                if level is not None and num_nodes > 1:
                    levels = partial(
                        _repeat, level, calls.typical_tree(num_nodes).num_levels - 1
                    )  # the last is not fed
                turns[key] = Turn(levels, SETTLING, TIMED)
        return turns

    def fill(
        self, times: dict[tuple[Any, ...], Timing], bandwidth: dict[str, float], settings: dict[str, Any]
    ) -> HardwareProfile:
        """Put the times into a profile."""
        profile = HardwareProfile(DeviceFingerprint.of(self.target.device))
        smooth: Callable[[Sequence[float]], tuple[float, ...]] = tuple
        if settings["quick"]:
            times, smooth = _steadied(times), _not_falling
        for role in self.roles:
            table = [
                [times["forward", role, context_len, count] for count in self.counts[role]]
                for context_len in self.context_lens
            ]
            rows = {
                name: tuple(smooth([getattr(time, name) for time in row]) for row in table)
                for name in ("p20_ms", "p50_ms", "p80_ms")
            }
            lens, counts = tuple(self.context_lens), tuple(self.counts[role])
            forwards = ForwardTable(self.batch_size, lens, counts, **rows, repeats=table[0][0].repeats)
            profile = profile.with_forwards(self.fingerprints[role], forwards)
        points: dict[str, list[OpPoint]] = {}
        for (name, *rest), time in times.items():
            if name != "forward":
                points.setdefault(name, []).append(OpPoint(dict(rest[0]), time.p20_ms, time.p50_ms, time.p80_ms))
        for name, entries in points.items():
            profile = profile.with_op(name, entries)
        # One ratio for all kinds of calls: whether an interruption hits the few short calls of a kind is chance.
        slowdown = pooled_slowdown(times.values())
        names = {self.fingerprints[key[1]].key if key[0] == "forward" else key[0] for key in times}
        profile = profile.with_slowdowns(dict.fromkeys(sorted(names), slowdown))
        keys = {role: fingerprint.key for role, fingerprint in self.fingerprints.items()}
        if self.draft is not None and self.draft.max_levels is not None:
            profile = profile.with_draft_levels(keys["draft"], self.draft.max_levels)
        return profile.with_measurement(keys["target"], keys.get("draft"), bandwidth, settings)


def _is_cached(target: ModelFingerprint) -> bool:
    """Tell whether a CPU's caches hold a good part of a target that runs on it."""
    return not target.streamed_bytes and target.weight_bytes <= CACHED * largest_cache_bytes()


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _steadied(times: dict[tuple[Any, ...], Timing]) -> dict[tuple[Any, ...], Timing]:
    """Give each call the median that its 20th percentile stands for: the median of three is moved by one interruption.

    What interruptions add is in proportion to the time that a call takes: one ratio for all.
    """
    ratio = sum(time.p50_ms for time in times.values()) / sum(time.p20_ms for time in times.values())
    return {key: time._replace(p50_ms=ratio * time.p20_ms) for key, time in times.items()}


def _not_falling(times: Sequence[float]) -> tuple[float, ...]:
    """Average times that fall with those before them (isotonic regression): more rows do not take less."""
    groups: list[tuple[float, int]] = []  # mean, count
    for time in times:
        groups.append((time, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (mean, count), (other, more) = groups[-2:]
            groups[-2:] = [((count * mean + more * other) / (count + more), count + more)]
    return tuple(mean for mean, count in groups for _ in range(count))


def _default_contexts(context_lens: Sequence[int], longest: int | None) -> list[int]:
    """Keep the contexts that fit; where fewer than two do, take half of the longest and the longest itself."""
    if longest is None:
        return list(context_lens)
    fitting = [context_len for context_len in context_lens if context_len <= longest]
    return fitting if len(fitting) > 1 else sorted({max(longest // 2, 0), max(longest, 0)})


def _check_counts(
    counts: Sequence[int], name: str, least: int, most: int | None = None, always: tuple[int, ...] = ()
) -> list[int]:
    """Check counts and give them increasing, each once, `always` among them."""
    if isinstance(counts, (str, bytes)) or not hasattr(counts, "__iter__"):
        raise TypeError(f"measure_profile: {name} must be a sequence of integers, got {type(counts).__name__}")
    for count in counts:
        if not is_integer(count):
            raise TypeError(f"measure_profile: {name} must hold integers, got {count!r}")
        if count < least or (most is not None and count > most):
            limits = f">= {least}" if most is None else f"in {least}..{most}"
            raise ValueError(f"measure_profile: {name} must be {limits}, got {count}")
    merged = sorted({int(count) for count in (*always, *counts)})
    if not merged:
        raise ValueError(f"measure_profile: {name} must hold at least one entry, got none")
    return merged
