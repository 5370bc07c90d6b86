"""Profile and models to milliseconds: what one decoding step with a given tree costs.

One step, stage by stage (as the decoding loop runs it):

    draft    forwards of the draft: one over 2 rows (the last committed token and the root), then one a level over the
             level's internal nodes; leaves are never fed, so a tree of l levels takes l - 1 forwards. Of a draft whose
             levels share one forward: what it does once a step, then what it does for every level, the root's included
    sample   sample_without_replacement behind each of them, over the level's internal nodes; where a shaped tree's
             children are given out, a second look at each row, taken to last as long as drawing one child
    target   one forward of the target over all n nodes
    verify   verify_tree over n nodes
    commit   compact_kv_cache_ over both models' caches, where the tree has more than one node
    host     everything between them

Without speculation a step is target(1) + verify(1) + host.

The forwards of a model that was not measured itself are composed of microbenchmarks, see `compose`; a directly
measured forward always replaces a composed one. Where a model is offloaded, its composed forward takes the longer of
computing and copying.

Every measured time is a median, times the ratio of mean to median over all calls of its kind, read off a
`MonotoneGrid`: more work is taken never to be faster, noise is smoothed to fit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sequoia_kernels import checks
from sequoia_kernels.documents import is_count, is_number
from sequoia_kernels.errors import ProfileError
from sequoia_kernels.fingerprints import ModelFingerprint
from sequoia_kernels.planner.compose import COMPOSED_OPS, can_compose, compose_forwards, transfer_ms
from sequoia_kernels.planner.interpolation import MonotoneGrid
from sequoia_kernels.planner.profile import DRAFT_STEP, HardwareProfile, OpPoint
from sequoia_kernels.tree import DEFAULT_RULE, MAX_NODES, ShapedTree, TokenTree

__all__ = ["STAGES", "CostModel", "MonotoneGrid", "StepShape", "StepTimes", "brackets"]

STAGES = ("draft", "sample", "target", "verify", "commit", "host")
WIDEST_BRACKET = 4  # times are interpolated between batch sizes that differ by at most this factor
ROOT_ROWS = 2  # the draft's first forward feeds the last committed token and the root


@dataclass(frozen=True)
class StepShape:
    """What of a tree decides a step's cost."""

    num_nodes: int  # root included
    widths: tuple[int, ...]  # internal nodes of each level that has some, root level first. [levels - 1]
    branchings: tuple[int, ...]  # largest number of children on these levels. [levels - 1]
    is_shaped: bool = False  # children are given out in every step

    @classmethod
    def of(cls, tree: TokenTree | ShapedTree) -> StepShape:
        """Read the shape of a tree; of a shaped one, all nodes but those of the last level are fed."""
        if isinstance(tree, ShapedTree):
            most = tree.confidence.max_children
            return cls(tree.num_nodes, tree.widths[:-1], tuple(min(most, below) for below in tree.widths[1:]), True)
        widths = [0] * tree.num_levels
        branchings = [0] * tree.num_levels
        for depth, num_children in zip(tree.depths, tree.num_children):
            if num_children:
                widths[depth] += 1
                branchings[depth] = max(branchings[depth], num_children)
        return cls(tree.num_nodes, tuple(widths[:-1]), tuple(branchings[:-1]))

    @property
    def num_levels(self) -> int:
        """Levels of the tree."""
        return len(self.widths) + 1


class CostModel:
    """Milliseconds of a decoding step, from a profile, for one pair of models and batch size.

    Args:
        profile: the device's measured times.
        batch_size: requests decoded together; forwards must have been measured at it, or at a smaller and a larger one
            that differ by at most a factor of four, or are composed for it.
        target: target model: a key of the profile, a fingerprint, a model, or a transformers configuration (or the path
            of a folder or file that has one) of a model that need not exist; the profile's own when None.
        draft: draft model, likewise. Needed only where a tree of more than one node is costed.
        temperature: 0 takes the greedy times of sampling and verification, anything else (or None) the sampled ones.
        host_ms: overhead of a step outside forwards and ops, instead of the profile's (which grows with the levels).
        dtype: dtype of models given by a configuration; the configuration's own when None.
        compose: compose every forward, measured or not.
        rule: verification rule, by its name; the times of the usual one where it was not measured.

    Attributes:
        target: fingerprint of the target.
        draft: fingerprint of the draft, None without one.
        composed: roles ("target", "draft") whose forwards are composed.
        interpolated: roles whose forwards are read between two measured batch sizes.
        max_nodes: the largest tree that can be costed.
        max_draft_rows: the widest measured level.
        context_lens: context lengths that the target's times were measured at.
        transfer_ms: time of copying what a forward of an offloaded target streams from the host, 0 for others.

    Raises:
        ProfileError: the profile lacks a model, batch size or op; the message says which and how to measure it.
    """

    def __init__(
        self,
        profile: HardwareProfile,
        *,
        batch_size: int = 1,
        target: Any = None,
        draft: Any = None,
        temperature: float | None = None,
        host_ms: float | None = None,
        dtype: Any = None,
        compose: bool = False,
        rule: str = DEFAULT_RULE,
    ) -> None:
        if host_ms is not None:
            checks.check_number("CostModel", "host_ms", host_ms, checks.TIME)
        if not is_count(batch_size, 1):
            raise ValueError(f"CostModel: batch_size must be an integer >= 1, got {batch_size!r}")
        self.profile, self.batch_size = profile, batch_size
        self.composed: list[str] = []
        self.interpolated: list[str] = []
        self.target = _fingerprint(profile, target, "target", dtype)
        has_draft = draft is not None or profile.draft_key is not None
        self.draft = _fingerprint(profile, draft, "draft", dtype) if has_draft else None
        self.host_override_ms = host_ms
        greedy = temperature == 0
        self._target = self._forward_grid(self.target, "target", compose)
        self.transfer_ms = transfer_ms(profile, self.target) if "target" in self.composed else 0.0
        self.max_nodes = min(int(self._target.second[-1]), MAX_NODES)  # no tree is larger
        self.context_lens = tuple(int(context) for context in self._target.first)
        sizes = ("batch_size", "nodes")
        points, scale = _warped_points(profile, "verify_tree", sizes, self.target.vocab_size, greedy, rule)
        self._verify = _curve(points, sizes, scale)
        if self.draft is not None:
            self._draft = self._forward_grid(self.draft, "draft", compose)
            self.max_draft_rows = min(int(self._draft.second[-1]), MAX_NODES)
            self._draft_step = _draft_step_curve(profile, self.draft.key, batch_size)
            vocab = min(self.target.vocab_size, self.draft.vocab_size)
            self._sample = _sample_grid(profile, vocab, greedy)
            row_bytes = self.target.cache_row_bytes + self.draft.cache_row_bytes
            self._compact = _compact_grid(profile, row_bytes, batch_size)

    def _forward_grid(self, fingerprint: ModelFingerprint, role: str, compose: bool) -> MonotoneGrid:
        key = fingerprint.key
        sizes = [table.batch_size for table in self.profile.forwards.get(key, ())]
        if not compose and self.batch_size in sizes:
            return self._measured_grid(key, self.batch_size)
        bracket = brackets(sizes, self.batch_size)
        if not compose and bracket is not None:
            self.interpolated.append(role)
            return _between_batches([self._measured_grid(key, size) for size in bracket], bracket, self.batch_size)
        if COMPOSED_OPS[0] not in self.profile.ops and not compose:
            self.profile.find_model(fingerprint, role)
            self.profile.forward_table(key, self.batch_size)  # says what is missing
        reason = can_compose(self.profile, fingerprint)
        if reason is not None:
            rule = "be a measured model or one whose forward can be composed"
            raise ProfileError(f"CostModel: the {role} must {rule}, got {key}: {reason}")
        self.composed.append(role)
        return MonotoneGrid(*compose_forwards(self.profile, fingerprint, self.batch_size))

    def _measured_grid(self, key: str, batch_size: int) -> MonotoneGrid:
        table = self.profile.forward_table(key, batch_size)
        times = np.multiply(table.p50_ms, self.profile.mean_over_median.get(key, 1.0))
        return MonotoneGrid(table.context_lens, table.node_counts, times)

    def target_ms(self, num_nodes: ArrayLike, context_len: float) -> NDArray[np.float64]:
        """Time of a target forward over `num_nodes` tokens a request."""
        return np.maximum(self._target.at(context_len, num_nodes), self.transfer_ms)

    def draft_ms(self, num_rows: ArrayLike, context_len: float) -> NDArray[np.float64]:
        """Time of a draft forward over `num_rows` tokens a request."""
        return self._draft.at(context_len, num_rows)

    def draft_root_ms(self, context_len: float) -> float:
        """Time of what a draft does before the root's children are drawn."""
        if self._draft_step is None:
            return float(self.draft_ms(ROOT_ROWS, context_len))
        return float(self._draft_step.at(0, context_len) + self.draft_ms(1, context_len))

    def sample_ms(self, width: float, num_samples: ArrayLike) -> NDArray[np.float64]:
        """Time of drawing `num_samples` children for `width` nodes a request."""
        return self._sample.at(width * self.batch_size, num_samples)

    def verify_ms(self, num_nodes: ArrayLike) -> NDArray[np.float64]:
        """Time of verifying a tree of `num_nodes`."""
        return self._verify.at(0, np.multiply(num_nodes, self.batch_size))

    def compact_ms(self, num_levels: ArrayLike) -> NDArray[np.float64]:
        """Time of compacting both caches behind a tree of `num_levels`."""
        return self._compact.at(0, num_levels)

    def host_ms(self, num_levels: ArrayLike) -> NDArray[np.float64]:
        """Overhead of a step with a tree of `num_levels`, which takes one draft forward fewer."""
        levels = np.asarray(num_levels, dtype=np.float64)
        if self.host_override_ms is not None:
            return np.full_like(levels, self.host_override_ms)
        profile = self.profile
        drafting = np.where(levels > 1, profile.draft_overhead_ms, 0.0)
        return profile.step_overhead_ms + drafting + profile.level_overhead_ms * (levels - 1)

    def at_context(self, context_len: float) -> StepTimes:
        """Fix the context length: the fast way to cost many trees."""
        return StepTimes(self, context_len)

    def stages(self, tree: TokenTree | ShapedTree | StepShape, context_len: float) -> dict[str, float]:
        """Give the milliseconds of one step by the names in `STAGES`; 0 for what the step does not do.

        Args:
            tree: the tree, or its shape.
            context_len: committed tokens.

        Raises:
            ProfileError: the tree has more than one node and there is no draft.
        """
        return self.at_context(context_len).stages(tree if isinstance(tree, StepShape) else StepShape.of(tree))

    def step_ms(self, tree: TokenTree | ShapedTree | StepShape, context_len: float) -> float:
        """Give the milliseconds of one step; arguments as in `stages`."""
        return sum(self.stages(tree, context_len).values())


class StepTimes:
    """A cost model at one context length. Every time that it reads is kept."""

    def __init__(self, model: CostModel, context_len: float) -> None:
        self.model = model
        sizes = np.arange(model.max_nodes + 1)
        # [max_nodes + 1] each, entry 0 unused; lists, since single entries are read far more often than slices
        self.target: list[float] = model.target_ms(sizes, context_len).tolist()
        self.verify: list[float] = model.verify_ms(sizes).tolist()
        self.host: list[float] = model.host_ms(sizes).tolist()
        if model.draft is not None:
            self.draft: list[float] = model.draft_ms(sizes, context_len).tolist()
            self.draft_root = model.draft_root_ms(context_len)
            self.compact: list[float] = model.compact_ms(sizes).tolist()
        self._sample: dict[tuple[int, int], float] = {}

    def sample(self, width: int, num_samples: int) -> float:
        """Time of drawing `num_samples` children for `width` nodes a request."""
        key = width, num_samples
        if key not in self._sample:
            self._sample[key] = float(self.model.sample_ms(width, num_samples))
        return self._sample[key]

    def stages(self, shape: StepShape) -> dict[str, float]:
        """Give the milliseconds of one step by stage; as `CostModel.stages`."""
        if shape.num_nodes > self.model.max_nodes:
            raise ProfileError(
                f"CostModel.stages: the tree must have at most the {self.model.max_nodes} nodes that were measured, "
                f"got {shape.num_nodes}; measure target forwards over more nodes"
            )
        draft = sample = commit = 0.0
        if shape.widths:
            if self.model.draft is None:
                raise ProfileError(
                    "CostModel.stages: the profile must have a draft model for a tree of more than one node, got none; "
                    "measure it with measure_profile(target, draft) or give draft="
                )
            draft = self.draft_root + sum([self.draft[width] for width in shape.widths[1:]])
            sample = sum(map(self.sample, shape.widths, shape.branchings))
            if shape.is_shaped:
                sample += sum(self.sample(width, 1) for width in shape.widths)
            commit = self.compact[shape.num_levels]
        return {
            "draft": draft,
            "sample": sample,
            "target": self.target[shape.num_nodes],
            "verify": self.verify[shape.num_nodes],
            "commit": commit,
            "host": self.host[shape.num_levels],
        }

    def step_ms(self, shape: StepShape) -> float:
        """Give the milliseconds of one step."""
        return sum(self.stages(shape).values())


def brackets(sizes: Sequence[int], batch_size: int) -> tuple[int, int] | None:
    """Give the nearest smaller and larger size to interpolate a batch size between, None where there are none."""
    low = max((size for size in sizes if size < batch_size), default=0)
    high = min((size for size in sizes if size > batch_size), default=0)
    return (low, high) if low > 0 and 0 < high <= WIDEST_BRACKET * low else None


def _between_batches(grids: Sequence[MonotoneGrid], sizes: tuple[int, int], batch_size: int) -> MonotoneGrid:
    """The times of a batch size between those of two others: on a line, as far as both were measured."""
    (first, second), (low, high) = grids, sizes
    contexts = sorted({*first.first, *second.first})
    largest = min(first.second[-1], second.second[-1])
    counts = [count for count in sorted({*first.second, *second.second}) if count <= largest]
    weight = (batch_size - low) / (high - low)
    times = [(1 - weight) * first.at(context, counts) + weight * second.at(context, counts) for context in contexts]
    return MonotoneGrid(contexts, counts, times)


def _fingerprint(profile: HardwareProfile, model: Any, role: str, dtype: Any) -> ModelFingerprint:
    """Find out the shapes of a model, measured or not."""
    if isinstance(model, ModelFingerprint):
        return model
    is_path = isinstance(model, os.PathLike) or (isinstance(model, str) and model not in profile.models)
    if (is_path and os.path.exists(model)) or type(model).__name__.endswith("Config"):
        return ModelFingerprint.from_config(model, dtype)
    if model is None or isinstance(model, (str, os.PathLike)):
        key = profile.find_model(model if model is None else os.fspath(model), role)
        return profile.models[key]
    return ModelFingerprint.of(model)


def _op_points(profile: HardwareProfile, op: str, names: Sequence[str]) -> list[OpPoint]:
    points = list(profile.ops.get(op, ()))
    if not points:
        raise ProfileError(
            f"CostModel: the profile must hold times of {op}, got none; measure it with measure_profile or "
            "`sequoia-kernels profile`"
        )
    for point in points:
        for name in names:
            value = point.parameters.get(name)
            if not (is_number(value) if name == "temperature" else is_count(value, 1)):
                raise ProfileError(
                    f"CostModel: times of {op} must have the parameters {', '.join(names)}, "
                    f"sizes as positive integers, got {dict(point.parameters)}"
                )
    return points


def _nearest(points: list[OpPoint], name: str, wanted: float) -> list[OpPoint]:
    """Keep the points whose parameter is nearest to what is wanted, the larger one on a tie."""
    values = {float(point.parameters[name]) for point in points}
    chosen = min(values, key=lambda value: (abs(value - wanted), -value))
    return [point for point in points if point.parameters[name] == chosen]


def _warped_points(
    profile: HardwareProfile, op: str, sizes: Sequence[str], vocab: int, greedy: bool, rule: str = DEFAULT_RULE
) -> tuple[list[OpPoint], float]:
    """Give the points of an op on logits to read, and the factor to scale them by.

    They are those at temperature 0 or those above, whichever there are when only one kind was measured, of the nearest
    vocabulary; times grow in proportion to a larger one. Of verification they are those of the rule, where it was
    measured; greedily all rules are one.
    """
    points = _op_points(profile, op, (*sizes, "vocab", "temperature"))
    by_rule = DEFAULT_RULE if greedy else rule
    usual = [point for point in points if point.parameters.get("rule", DEFAULT_RULE) == DEFAULT_RULE]
    points = [point for point in points if point.parameters.get("rule", DEFAULT_RULE) == by_rule] or usual or points
    points = [point for point in points if (point.parameters["temperature"] == 0) == greedy] or points
    points = _nearest(points, "vocab", vocab)
    scale = max(1.0, vocab / float(points[0].parameters["vocab"]))
    return points, scale * profile.mean_over_median.get(op, 1.0)


def _curve(points: list[OpPoint], sizes: Sequence[str], scale: float) -> MonotoneGrid:
    """Times over the product of some sizes, the median where several points agree on it."""
    times: dict[float, list[float]] = {}
    for point in points:
        size = math.prod(float(point.parameters[name]) for name in sizes)
        times.setdefault(size, []).append(point.p50_ms)
    knots = sorted(times)
    return MonotoneGrid([0], knots, [[scale * float(np.median(times[size])) for size in knots]])


def _sample_grid(profile: HardwareProfile, vocab: int, greedy: bool) -> MonotoneGrid:
    op = "sample_without_replacement"
    points, scale = _warped_points(profile, op, ("rows", "num_samples"), vocab, greedy)
    sizes = [(float(point.parameters["rows"]), float(point.parameters["num_samples"])) for point in points]
    times = {size: point.p50_ms for size, point in zip(sizes, points)}
    rows, samples = (sorted({key[axis] for key in times}) for axis in range(2))
    missing = [(row, count) for row in rows for count in samples if (row, count) not in times]
    if missing:
        raise ProfileError(
            f"CostModel: times of {op} must cover every pair of rows and num_samples, got none at "
            f"{int(missing[0][0])} rows and {int(missing[0][1])} samples; measure the profile again"
        )
    return MonotoneGrid(rows, samples, [[scale * times[row, count] for count in samples] for row in rows])


def _draft_step_curve(profile: HardwareProfile, draft: str, batch_size: int) -> MonotoneGrid | None:
    """What a draft takes once a step, over context lengths; None where its levels' forwards are all that it does."""
    points = [point for point in profile.ops.get(DRAFT_STEP, ()) if point.parameters.get("draft") == draft]
    if not points:
        return None
    points = _nearest(points, "batch_size", batch_size)
    return _curve(points, ("context_len",), profile.mean_over_median.get(DRAFT_STEP, 1.0))


def _compact_grid(profile: HardwareProfile, row_bytes: int, batch_size: int) -> MonotoneGrid:
    points = _op_points(profile, "compact_kv_cache_", ("levels", "row_bytes", "batch_size"))
    points = _nearest(_nearest(points, "batch_size", batch_size), "row_bytes", row_bytes)
    return _curve(points, ("levels",), profile.mean_over_median.get("compact_kv_cache_", 1.0))
