"""tree="auto" and "adaptive": measure the times that are not known yet, plan, and learn acceptance from every call.

Times are measured once a pair, machine and range of contexts, within three seconds or a twentieth of the call.
Acceptance is not measured at all: the first call begins with that of a middling draft and goes on with what its own
steps show, and so does every later call; see `planner.evidence`. Both are kept on disk, see `planner.store`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers

from sequoia_kernels.decoding.arguments import GenerationArguments
from sequoia_kernels.decoding.overhead import measure_overhead
from sequoia_kernels.decoding.stats import GenerateStats
from sequoia_kernels.drafts import DraftSource, LookupDraft
from sequoia_kernels.fingerprints import DeviceFingerprint, ModelFingerprint
from sequoia_kernels.measure import affordable_node_counts, measure_profile
from sequoia_kernels.models import TreeModel
from sequoia_kernels.models.attention import attend_along_tree
from sequoia_kernels.planner import (
    AcceptanceEstimate,
    AcceptanceEvidence,
    AdaptivePlan,
    CostModel,
    HardwareProfile,
    LookupCosts,
    StepRecords,
    TreePlan,
    plan_adaptive,
    plan_from_evidence,
    plan_tree,
    store,
)
from sequoia_kernels.planner.cost_model import brackets
from sequoia_kernels.tree import DEFAULT_RULE, TokenTree
from sequoia_kernels.version import __version__

logger = logging.getLogger("sequoia_kernels")

SMALLEST_CONTEXT, CONTEXT_STEP = 128, 4  # times are measured behind 128, 512, 2048, ... tokens, whichever is nearest
# What timing forwards and ops may take, whichever is more. The loop's overhead and the plan come on top: 3 s in all.
LEAST_SECONDS, SHARE_OF_CALL = 1.8, 0.05
EXPLORED_TOKENS = 64  # calls of fewer tokens do not try out what looks slower than plain decoding
LEAST_TREE_ROWS = 8  # rows behind the longest request that a tree is worth looking for
LEAST_LEVELS, VISITS_PER_LEVEL = 8, 2.0  # a tree may grow a level for so many visits beyond these
SET_UP_MS = 1.0  # of trees with proposals in them, on a CPU: they are bound to buffers, weights and caches
REPLAN_GROWTH = 1.5  # how many times the evidence must have grown for another plan
SAVE_GROWTH = 1.1  # and to be written to disk again
DIGEST_ELEMENTS = 8  # of every tensor
ADAPTER_WORDS = ("adapter", "merged", "scaling")
MOST_PAIRS = 32  # pairs and settings that are kept in memory
MOST_PLANS = 32  # of each of them


@dataclass
class _Kept:
    """What a process knows of a pair at one sampling setting."""

    evidence: AcceptanceEvidence
    saved_visits: int
    plans: dict[Any, tuple[int, AdaptivePlan]] = field(default_factory=dict)  # with the visits they rest on


class Choice(NamedTuple):
    """What to decode with, and what to tell afterwards."""

    tree: TokenTree | TreePlan | AdaptivePlan
    learn: Callable[[GenerateStats], None]  # takes the call's statistics
    lookup: LookupCosts | None = None  # what steps take, where the draft looks tokens up


_numbers: WeakKeyDictionary[DraftSource, int] = WeakKeyDictionary()
_count = itertools.count()
_lock = threading.RLock()  # one measurement at a time: they would end up in one another's times
_profiles: OrderedDict[str, HardwareProfile] = OrderedDict()  # by digest of their keys
_pairs: OrderedDict[str, _Kept] = OrderedDict()


def choose_tree(
    target: TreeModel,
    draft: DraftSource,
    arguments: GenerationArguments,
    *,
    acceptance: StepRecords | AcceptanceEstimate | Sequence[float] | None,
    profile: HardwareProfile | None,
    adaptive: bool = False,
) -> Choice:
    """Plan trees for these models, requests and machine; ValueError where the draft cannot tell what it costs.

    Args:
        target: the target.
        draft: the draft.
        arguments: the call's checked arguments.
        acceptance: recorded steps or an acceptance vector; None takes what the pair's calls have shown so far.
        profile: hardware profile; None measures the two models on their device, if that was not done before.
        adaptive: switch between trees as acceptance drifts, rather than towards what the calls show in the long run.
    """
    context_len = _nominal_context(target, arguments)
    looks_up = draft if isinstance(draft, LookupDraft) else None
    if looks_up is not None:
        assert looks_up.base is not None  # lookup alone is `choose_lookup`'s
        draft = looks_up.base
    rows = target.max_cache_rows(arguments.batch_size)
    if rows is not None and rows < arguments.longest + LEAST_TREE_ROWS:
        logger.info("the target's memory has no room for a tree behind its cache: decoding without one")
        return Choice(TokenTree.single(), lambda stats: None)
    with _lock:
        if profile is None:
            profile = _profile(target, draft, arguments, context_len, rows)
        pair: dict[str, Any] = {"batch_size": arguments.batch_size, "target": target, "draft": draft.fingerprint}
        settings = pair | {
            "context_len": context_len, "temperature": max(arguments.temperature), "rule": arguments.rule
        }  # fmt: skip

        def choice(plan: TreePlan | AdaptivePlan, learn: Callable[[GenerateStats], None]) -> Choice:
            if looks_up is None:
                return Choice(plan, learn)
            of_pair = CostModel(profile, **pair, temperature=settings["temperature"], rule=arguments.rule)
            plans = [plan] if isinstance(plan, TreePlan) else plan.plans
            # A draft that is not worth asking need not read along either.
            asked = any(entry.tree.num_nodes > 1 for entry in plans)
            siblings, reads = looks_up.siblings if asked else (0,), asked and draft.scores_paths
            costs = LookupCosts.measured(
                of_pair, context_len, plans, siblings, [*plan.acceptance], reads, _set_up_ms(target)
            )
            return Choice(plan, learn, costs)

        if rows is not None:  # a row a node and two a level
            costs = CostModel(profile, **pair)
            settings["max_levels"] = min((rows - arguments.longest) // 4, costs.max_nodes)
            settings["max_budget"] = min(rows - arguments.longest - 2 * settings["max_levels"], costs.max_nodes)
        if draft.max_levels is not None:
            settings["max_levels"] = min(draft.max_levels, settings.get("max_levels", draft.max_levels))
        if acceptance is not None:
            if adaptive and isinstance(acceptance, StepRecords):
                acceptance = acceptance.acceptance
            if looks_up is not None:  # whose proposals go into trees that are the same in every step
                settings["shaped"] = False
            plan = (plan_adaptive if adaptive else plan_tree)(acceptance, profile, **settings)
            logger.info("tree=%r: %s", "adaptive" if adaptive else "auto", plan.describe())
            return choice(plan, lambda stats: None)
        key = _acceptance_key(target, draft, arguments)
        kept = _pairs.get(digest := store.key_digest(key))
        if kept is None:
            known = (store.load_evidence(key) if _lasts(key) else None) or AcceptanceEvidence()
            kept = _Kept(known, known.num_visits)
        _remember(_pairs, digest, kept)
        plan = _planned(kept, profile, adaptive, arguments.max_new_tokens >= EXPLORED_TOKENS, settings)
    if arguments.logits_hook is not None:  # what is accepted under it says nothing of other calls
        return choice(plan, lambda stats: None)
    return choice(plan, lambda stats: _learn(kept, key, stats))


def choose_lookup(target: TreeModel, arguments: GenerationArguments, *, profile: HardwareProfile | None) -> LookupCosts:
    """Give what steps take that decode with looked-up tokens alone; arguments as in `choose_tree`."""
    context_len = _nominal_context(target, arguments)
    rows = target.max_cache_rows(arguments.batch_size)
    with _lock:
        if profile is None:
            profile = _profile(target, None, arguments, context_len, rows)
    costs = CostModel(
        profile, batch_size=arguments.batch_size, target=target, temperature=max(arguments.temperature),
        rule=arguments.rule,
    )  # fmt: skip
    return LookupCosts.measured(costs, context_len, [], [0], set_up_ms=_set_up_ms(target))


def _set_up_ms(target: TreeModel) -> float:
    """What a call takes to set other trees up; on other devices graphs are kept between calls."""
    return SET_UP_MS if target.device.type == "cpu" else 0.0


def _nominal_context(target: TreeModel, arguments: GenerationArguments) -> int:
    """Committed tokens in the middle of the call."""
    context_len = max(arguments.prompt_lens) + arguments.max_new_tokens // 2
    return context_len if target.max_positions is None else min(context_len, target.max_positions - 1)


def _planned(
    kept: _Kept, profile: HardwareProfile, adaptive: bool, explore: bool, settings: dict[str, Any]
) -> AdaptivePlan:
    """The plan that the evidence leads to, made again when there is enough more of it."""
    evidence = kept.evidence
    numbers = (settings["context_len"].bit_length(), settings["batch_size"], settings["temperature"] > 0)
    limits = (settings.get("max_budget"), settings.get("max_levels"))  # of the target's memory, behind these requests
    name = (adaptive, explore, profile.created, *numbers, *limits)
    if name in kept.plans:
        visits, plan = kept.plans[name]
        if evidence.num_visits < REPLAN_GROWTH * visits:
            return plan
    levels = LEAST_LEVELS + int(sum(evidence.visited[:1]) / VISITS_PER_LEVEL)
    settings = {**settings, "max_levels": min(levels, settings.get("max_levels", levels))}
    if adaptive:
        plan = plan_adaptive(evidence.vector, profile, **settings)
    else:
        plan = plan_from_evidence(evidence, profile, explore=explore, **settings)
    kept.plans[name] = max(evidence.num_visits, 1), plan
    while len(kept.plans) > MOST_PLANS:
        del kept.plans[next(iter(kept.plans))]
    logger.info(
        "tree=%r, planned from %d visited nodes:\n%s",
        "adaptive" if adaptive else "auto", evidence.num_visits, plan.describe(),
    )  # fmt: skip
    return plan


def _learn(kept: _Kept, key: dict[str, Any], stats: GenerateStats) -> None:
    """Add a call's counts to what is known, and write it down when it has grown."""
    with _lock:
        kept.evidence = kept.evidence.with_run(stats.visited_by_rank, stats.accepted_by_rank, len(stats.request_steps))
        if kept.evidence.num_visits > SAVE_GROWTH * kept.saved_visits:
            if _lasts(key):
                store.save_evidence(key, kept.evidence)
            kept.saved_visits = kept.evidence.num_visits


def _profile(
    target: TreeModel, draft: DraftSource | None, arguments: GenerationArguments, context_len: int, rows: int | None
) -> HardwareProfile:
    """The pair's times, measured now where they are not known for this range of contexts and this batch size."""
    steps = round(math.log(max(context_len / SMALLEST_CONTEXT, 1), CONTEXT_STEP))
    nominal = SMALLEST_CONTEXT * CONTEXT_STEP**steps
    key = _profile_key(target, draft, nominal)
    digest = store.key_digest(key)
    known = _profiles.get(digest) or (store.load_profile(key) if _lasts(key) else None)
    sizes = [] if known is None else [table.batch_size for table in known.forwards.get(key["target"], ())]
    if known is None or not (arguments.batch_size in sizes or brackets(sizes, arguments.batch_size)):
        measured_len = min(nominal, max(SMALLEST_CONTEXT, arguments.longest))
        if target.max_positions is not None:
            measured_len = min(measured_len, target.max_positions - 1)
        profile = _measure(target, draft, arguments, measured_len, rows)
        known = profile if known is None else known.merged(profile)
        if _lasts(key):
            store.save_profile(key, known)
    _remember(_profiles, digest, known)
    return known


def _remember(known: OrderedDict[str, Any], digest: str, value: Any) -> None:
    """Keep a value as the most recently used one; the one that was not used for longest goes."""
    known[digest] = value
    known.move_to_end(digest)
    while len(known) > MOST_PAIRS:
        known.popitem(last=False)


def _measure(
    target: TreeModel, draft: DraftSource | None, arguments: GenerationArguments, context_len: int, rows: int | None
) -> HardwareProfile:
    batch_size = arguments.batch_size
    where = store.cache_folder()
    logger.warning(
        "measuring %s and %s on %s once, for batches of %d and about %d tokens of context, %s; profile= skips this",
        target, "no draft" if draft is None else draft, target.device, batch_size, context_len,
        "kept for this process only" if where is None else f"kept in {where}",
    )  # fmt: skip
    node_counts, budget = affordable_node_counts(
        target, context_len, batch_size, least_seconds=LEAST_SECONDS,
        num_forwards=SHARE_OF_CALL * arguments.max_new_tokens,
        max_nodes=None if rows is None else rows - arguments.longest,
    )  # fmt: skip
    if rows is not None:
        context_len = min(context_len, rows - node_counts[-1])
    streamed = ModelFingerprint.of(target).streamed_bytes > 0
    with _progress() as progress:
        profile = measure_profile(
            target, draft, context_lens=(context_len,), node_counts=node_counts, batch_size=batch_size, quick=True,
            seconds=budget / 2, min_repeats=None if streamed else 3, bandwidth=False, progress=progress,
        )  # fmt: skip
    if rows is not None:  # beside a pass that streams its weights the rest is nothing, and its own prompts may not fit
        return profile
    return measure_overhead(  # the median of three short runs is not moved by one interruption
        target, draft, profile, context_len=min(context_len, 32), batch_size=batch_size, num_tokens=11, num_runs=3
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on standard error where that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=100, desc="measuring", leave=False, bar_format="{desc} {percentage:3.0f}% |{bar}|") as bar:

        def advance(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield advance


def _profile_key(target: TreeModel, draft: DraftSource | None, context_len: int) -> dict[str, Any]:
    """What times depend on."""
    device = DeviceFingerprint.of(target.device)
    models = (target,) if draft is None else (target, *draft.models)
    return {
        "device": [device.type, device.name, device.num_threads],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sequoia_kernels": __version__,
        },
        "target": ModelFingerprint.of(target).key,
        "draft": None if draft is None else draft.fingerprint.key,
        "modules": [_modules(model) for model in models],
        "compile": [model.compile_mode for model in models],
        "forward": [model.runs for model in models],
        "context": context_len,
        **({"ranks": sizes} if any(sizes := [model.ranks.size if model.ranks else 0 for model in models]) else {}),
        **_attentions(*models),
        **({} if draft is None else _source(draft)),
    }


def _acceptance_key(target: TreeModel, draft: DraftSource, arguments: GenerationArguments) -> dict[str, Any]:
    """What acceptance depends on, besides the text. A batch of equal requests is like one of them."""
    count = arguments.batch_size
    columns = (arguments.temperature, arguments.top_k or [0] * count, arguments.top_p or [1.0] * count)
    rule = {} if arguments.rule == DEFAULT_RULE else {"rule": arguments.rule}
    return {
        **rule,
        **_source(draft),
        "target": f"{ModelFingerprint.of(target).key}-{_weights_digest(target)}",
        "draft": "-".join([draft.fingerprint.key, *map(_weights_digest, draft.models)]),
        "sampling": sorted({(float(t), int(k), float(p)) for t, k, p in zip(*columns, strict=True)}),
    }


def _attentions(*models: TreeModel) -> dict[str, Any]:
    """The attentions of models, where one is not the default."""
    names = [_name_of(model.attention) for model in models]
    return {} if set(names) == {_name_of(attend_along_tree)} else {"attention": names}


def _name_of(attention: Any) -> str:
    """An attention's code and what it is bound to; two objects of one class cannot be told apart from outside."""
    if isinstance(attention, functools.partial):
        return f"{_name_of(attention.func)}{attention.args}{attention.keywords}"
    code = attention if hasattr(attention, "__qualname__") else type(attention)
    return f"{code.__module__}.{code.__qualname__}"


def _source(draft: DraftSource) -> dict[str, Any]:
    """What a source says it is; one that says nothing is told from others in this process by a number."""
    if draft.identity is None:
        return {"source": _numbers.setdefault(draft, next(_count))}
    return {"source": draft.identity} if draft.identity else {}


def _lasts(key: dict[str, Any]) -> bool:
    """Whether what is found out is worth keeping on disk: not for a source that only this process knows."""
    return not isinstance(key.get("source"), int)


def _modules(model: TreeModel) -> str:
    """A digest of the kinds of modules: packed, quantized or adapted layers take other times."""
    kinds = Counter(f"{type(module).__module__}.{type(module).__qualname__}" for module in model.model.modules())
    return hashlib.sha256(repr(sorted(kinds.items())).encode()).hexdigest()[:12]


@functools.cache
def _tells_of_adapters(name: str) -> bool:
    return any(word in name for word in ADAPTER_WORDS)


def _weights_digest(model: TreeModel) -> str:
    """Tell weights apart cheaply: all shapes, and a few elements from the middle of every tensor that is in memory.

    Of adapters also what says which of them are active, merged, and how they are scaled.
    """
    digest = hashlib.sha256(_modules(model).encode())
    for module in model.model.modules():
        for name, value in vars(module).items():
            if _tells_of_adapters(name) and isinstance(value, (bool, int, float, str, list, dict)):
                digest.update(f"{name}={value}".encode())
    pieces = []
    for tensor in model.weights():
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel() > 0:
            row = tensor.detach()
            while row.ndim > 1:
                row = row[row.shape[0] // 2]
            pieces.append(row.reshape(-1)[:DIGEST_ELEMENTS].double())
    for device in sorted({piece.device for piece in pieces}, key=str):
        here = torch.cat([piece for piece in pieces if piece.device == device])
        digest.update(here.cpu().numpy().tobytes())
    return digest.hexdigest()[:20]
