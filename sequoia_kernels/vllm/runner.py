"""Everything of vLLM that is not documented is touched here, and what for is said where.

A tree of N nodes takes the N rows that vLLM gives to a request with N - 1 drafted tokens: node j lies at cache row
`num_computed_tokens + j`, node 0 is the last sampled token. So the scheduler, the block manager and the block tables
need no change, and the V1 model runner must know of trees in six places, each a section of `TreeRunnerMixin`.

With several ranks (tensor parallelism) rank 0 drafts and decides, and every rank takes what it decided: a rank whose
logits differ in the last bit would otherwise keep other cache rows than the rest. One small broadcast a step.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from sequoia_kernels.models import adapt, load_model
from sequoia_kernels.models.loading import MAX_PADDING
from sequoia_kernels.ops import CacheTable, compact_kv_cache_
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm import BACKEND
from sequoia_kernels.vllm.attention import StepTrees, TreeMetadataBuilder, paged_rows
from sequoia_kernels.vllm.drafting import PAGE_SIZE, DraftedBatch, DraftRequest, TreeDrafter, moves_rows
from sequoia_kernels.vllm.load_plan import LoadPlan
from sequoia_kernels.vllm.measuring import measure_costs
from sequoia_kernels.vllm.settings import CONFIG_KEY, LOGGER, TreeSettings
from sequoia_kernels.vllm.support import check_config, check_cuda, check_version
from sequoia_kernels.vllm.verification import PADDING, Warping, emitted_tokens, verify_drafted

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as ModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

    # The CPU platform ignores `--attention-backend` and always asks for CPU_ATTN; what stands for it can be replaced.
    # Only processes that import this module, those of the tree worker, do so.
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
else:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as ModelRunner
    from vllm.v1.worker.gpu_worker import Worker

__all__ = ["TreeModelRunner", "TreeProposer", "TreeWorker", "decodes_trees"]

logger = logging.getLogger(LOGGER)

WHERE = "sequoia_kernels.vllm"


class TreeProposer:
    """What vLLM's "custom_class" makes in every worker: holds the settings, and the draft where this rank drafts.

    vLLM calls `propose` with neither requests nor temperatures, so the runner does not let it come to that.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_version()
        check_config(vllm_config)
        worker = vllm_config.parallel_config.worker_cls
        worker = resolve_obj_by_qualname(worker) if isinstance(worker, str) else worker
        if not issubclass(worker, TreeWorker):
            raise ValueError(
                f"{WHERE}: worker_cls must be the tree worker, got {worker.__name__}; take all of engine_args"
            )
        self.settings = TreeSettings.from_dict((vllm_config.additional_config or {}).get(CONFIG_KEY))
        drafted, wanted = vllm_config.speculative_config.num_speculative_tokens, self.settings.max_nodes - 1
        if drafted != wanted:
            raise ValueError(
                f"{WHERE}: num_speculative_tokens must be {wanted}, the nodes of the largest tree below its root, "
                f"got {drafted}; take all of engine_args"
            )
        self.config = vllm_config
        self.model: Any = None

    def load_model(self, target: Any) -> None:
        """Load the draft; vLLM calls this behind loading the target."""
        if get_tp_group().rank_in_group != 0 and not self.settings.check_ranks:
            return
        config = self.config.model_config
        dtype = config.dtype if self.settings.draft_dtype is None else getattr(torch, self.settings.draft_dtype)
        device = torch.device("cpu") if current_platform.is_cpu() else torch.device("cuda", torch.cuda.current_device())
        self.model = adapt(load_model(self.settings.draft, dtype=dtype, device=device))
        vocab_size = config.get_vocab_size()
        if abs(self.model.vocab_size - vocab_size) > MAX_PADDING:
            raise ValueError(
                f"{WHERE}: draft must have the target's vocabulary of {vocab_size} tokens, padding aside, "
                f"got {self.model.vocab_size}"
            )

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Never called: the tree runner drafts."""
        raise NotImplementedError


class _CacheGroup(NamedTuple):
    """The caches of the layers that share a block table."""

    group_id: int
    table: CacheTable


class _RunStep(NamedTuple):
    """A step in which all requests were decoding alike: how long it took is learned from when the next one begins."""

    started: float
    request_ids: tuple[str, ...]
    tree: TokenTree | None
    context: float


def decodes_trees(params: SamplingParams | None) -> bool:
    """Tell whether a request's tokens come from temperature, top-k and top-p alone.

    All others are decoded without a tree, by vLLM's own sampler: their logits depend on the tokens before, or a grammar
    has an opinion on them.
    """
    return (
        params is not None
        and params.structured_outputs is None
        and params.min_p == 0
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and not params.logit_bias
        and not params.bad_words
        and params.allowed_token_ids is None
        and not params.min_tokens
        and all(getattr(params, name, None) is None for name in _LATER_PARAMETERS)
    )


# Of some versions only: logits or logprobs by a rule of their own, or replayed tokens.
_LATER_PARAMETERS = ("logprob_token_ids", "thinking_token_budget", "trace_decode_token_ids")


class _Sampling(NamedTuple):
    """What trees need of a request's parameters, which every step asks for.

    Attributes:
        params: where it was read: it is void where a request has others.
        has_trees: whether the request decodes trees; without them the rest means nothing.
        temperature: 0 is greedy.
        seed: the request's own, or None.
        warping: cuts of its distribution.
    """

    params: SamplingParams | None
    has_trees: bool
    temperature: float = 0.0
    seed: int | None = None
    warping: Warping = Warping(0, 1.0)

    @classmethod
    def of(cls, params: SamplingParams | None, vocab_size: int) -> _Sampling:
        """Read a request's parameters."""
        if params is None or not decodes_trees(params):
            return cls(params, False)
        return cls(params, True, params.temperature, params.seed, Warping.of(params.top_k, params.top_p, vocab_size))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_seeded(self) -> bool:
        return self.seed is not None and self.temperature > 0


class TreeRunnerMixin:
    """Overrides of vLLM's V1 `GPUModelRunner`, which it goes in front of."""

    drafter: TreeProposer  # vLLM's name
    trees: TreeDrafter | None  # where this rank drafts
    _tree_builder: type = TreeMetadataBuilder
    _step_trees: Any  # what the builders are told of a step

    # ---- Setting up: called by the worker ----

    def init_trees(self) -> None:
        """Set up what `__init__` would."""
        if not isinstance(getattr(self, "drafter", None), TreeProposer):
            raise ValueError(f"{WHERE}: the tree worker must come with its proposer; take all of engine_args")
        self.settings = self.drafter.settings
        self.trees = None
        self.load_plan: LoadPlan | None = None
        self.tree_statistics: dict[str, int] = dict.fromkeys(
            ("steps", "trees", "accepted", "nodes", "cut", "undrafted", "tree_steps", "compared"), 0
        )
        self._candidates = [TokenTree(parents) for parents in self.settings.trees]
        self._most_levels = max(tree.num_levels for tree in self._candidates)
        self._drafted: list[DraftedBatch] = []
        self._proposed: list[list[list[int]]] = []  # each one's tokens as the scheduler got them. [B][N - 1]
        self._samplings: dict[str, _Sampling] = {}
        self._tree_of: dict[str, TokenTree] = {}  # the tree that a request's drafted tokens are
        self._next_tree: TokenTree | None = self._candidates[0]
        self._step_trees = self._new_step_trees()
        self._cache_groups: list[_CacheGroup] | None = None
        self._run_step: _RunStep | None = None
        self._step_started = 0.0

    def _new_step_trees(self) -> Any:
        """Give what the attention is told of a step in."""
        return StepTrees()

    @property
    def _most_tree_rows(self) -> int:
        """Nodes that can be drafted in a step: the scheduler takes no more rows, and cuts the last tree."""
        each = self.settings.max_nodes
        return min(self.vllm_config.scheduler_config.max_num_seqs * each, self.max_num_tokens + each)

    def tree_logits_bytes(self) -> int:
        """Say how much memory the draft's logits of a step take, beside its pages."""
        model = self.drafter.model
        if model is None:
            return 0
        return self._most_tree_rows * TreeDrafter.bytes_per_row(model, self.model_config.get_vocab_size())

    def tree_pool_bytes(self, available: int) -> int:
        """Say how much of the memory for caches the draft's pages take."""
        model = self.drafter.model
        if model is None:
            return 0
        per_token = TreeDrafter.bytes_per_token(model)
        if self.settings.draft_cache_tokens is not None:
            tokens = self.settings.draft_cache_tokens
        else:
            specs = self.get_kv_cache_spec().values()
            of_target = sum(spec.page_size_bytes / spec.block_size for spec in specs)
            tokens = int(available / (per_token + of_target))
        requests = self.vllm_config.scheduler_config.max_num_seqs
        pages = TreeDrafter.pages_of_pool(tokens, requests, self.max_model_len + self.settings.max_nodes)
        return pages * PAGE_SIZE * per_token

    def start_trees(self, pool_bytes: int) -> None:
        """Allocate the draft's pages and time the parts of a step; the caches are there."""
        for group in (group for of_cache in self.attn_groups for group in of_cache):
            builder = group.get_metadata_builder(0)
            # Layers that choose a backend of their own, or rewrite a batch for it, would see a tree as a chain.
            if type(builder) is not self._tree_builder:
                raise ValueError(
                    f"{WHERE}: all attention layers must take the backend of trees, got {type(builder).__name__} in "
                    f"{group.layer_names[0]}"
                )
            # Accepted rows are moved by the runner's block table, not by one that 0.32 may make for a group's kernels.
            block_size = getattr(group, "kernel_block_size", None)
            if block_size is not None:
                raise ValueError(
                    f"{WHERE}: blocks of caches must be those of the kernels, got {block_size} of "
                    f"{group.kv_cache_spec.block_size} tokens in {group.layer_names[0]}; use another --block-size"
                )
        settings, model = self.settings, self.drafter.model
        if model is not None:
            self.trees = TreeDrafter(
                model,
                max_requests=self.vllm_config.scheduler_config.max_num_seqs,
                max_tokens=self.max_model_len,
                max_nodes=settings.max_nodes,
                pool_tokens=pool_bytes // TreeDrafter.bytes_per_token(model),
                max_rows=self._most_tree_rows,
                vocab_size=self.model_config.get_vocab_size(),
                target_embeddings=self.model_config.get_vocab_size(),
                engine_seed=self.model_config.seed or 0,
            )
            pool = self.trees.cache
            logger.info(
                "trees: draft %s (%s forwards), %.1f MiB of pages for %d tokens, %.1f MiB for logits of %d nodes",
                settings.draft, model.runs, pool.num_bytes / 2**20, pool.num_pages * pool.page_size,
                self.tree_logits_bytes() / 2**20, self.trees.max_rows,
            )  # fmt: skip
        if current_platform.is_cpu():
            _share_threads()
        if settings.by_load:
            costs = None
            if settings.profile_seconds > 0:  # on all ranks: forwards are theirs together
                costs = measure_costs(self, settings.profile_seconds, _of_rank_0)
            self.load_plan = LoadPlan(self._candidates, settings.rule, costs)

    # ---- 1. Requests come and go ----

    def _update_states(self, scheduler_output: Any) -> Any:
        self._step_started = time.perf_counter()
        gone = scheduler_output.finished_req_ids
        preempted = getattr(scheduler_output, "preempted_req_ids", None) or ()
        if self.trees is not None:
            self.trees.forget(gone)
            self.trees.release(preempted)
        for request_id in (*gone, *preempted):
            self._tree_of.pop(request_id, None)
            self._samplings.pop(request_id, None)
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _update_streaming_request(self, req_id: str, *args: Any, **kwargs: Any) -> Any:
        # The session goes on with other tokens than the draft has read.
        if self.trees is not None:
            self.trees.release([req_id])
        self._tree_of.pop(req_id, None)
        self._samplings.pop(req_id, None)
        return super()._update_streaming_request(req_id, *args, **kwargs)  # type: ignore[misc]

    def _sampling(self, request_id: str) -> _Sampling:
        params = self.requests[request_id].sampling_params
        sampling = self._samplings.get(request_id)
        if sampling is None or sampling.params is not params:
            sampling = self._samplings[request_id] = _Sampling.of(params, self.model_config.get_vocab_size())
        return sampling

    # ---- 2. Positions are depths; slots stay one behind the other ----

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        drafted = scheduler_output.scheduled_spec_decode_tokens
        request_ids = self.input_batch.req_ids
        trees: list[TokenTree | None] = [None] * len(request_ids)
        if drafted:
            for index, request_id in enumerate(request_ids):
                num_drafted = len(drafted.get(request_id, ()))
                # vLLM also gives rows of no token to requests without drafts: new ones with one row to compute.
                # They stay a chain, and get no verdict.
                tree = self._tree_of.get(request_id)
                if not num_drafted or tree is None:
                    continue
                num_rows = int(num_scheduled_tokens[index])
                if num_rows != num_drafted + 1:
                    raise RuntimeError(
                        f"{WHERE}: a tree of {num_drafted + 1} nodes must be scheduled by itself, got {num_rows} rows"
                    )
                trees[index] = tree
        self._step_trees.trees = trees
        if drafted:
            # vLLM has computed the slots from the positions one behind the other; the model is given the depths.
            total = scheduler_output.total_num_scheduled_tokens
            self._set_positions(num_scheduled_tokens, total)
            # A token that could not be drawn is -1. It is never accepted, but it is embedded.
            self.input_ids.gpu[:total].clamp_(min=0)
        self._note_step(trees, num_scheduled_tokens)
        return prepared

    def _set_positions(self, num_rows: np.ndarray, total: int) -> None:
        """Give the step's rows their positions by depth."""
        if all(tree is None or tree.max_branching <= 1 for tree in self._step_trees.trees):
            return  # depths of chains are what vLLM has set
        positions = self.query_pos.np[:total].astype(np.int64)
        starts = np.cumsum(num_rows) - num_rows
        for index, tree in enumerate(self._step_trees.trees):
            if tree is not None:
                rows = int(num_rows[index])
                positions[starts[index] : starts[index] + rows] = tree.depths[:rows]
        positions += np.repeat(self.input_batch.num_computed_tokens_cpu[: len(num_rows)], num_rows)
        self.positions[:total] = torch.from_numpy(positions).to(self.device)

    def _note_step(self, trees: Sequence[TokenTree | None], num_rows: np.ndarray) -> None:
        """Learn how long the step before took, and remember this one, where all requests decode alike."""
        if self.load_plan is None or self.trees is None:
            return
        count, before = len(trees), self._run_step
        ids = tuple(self.input_batch.req_ids)
        if before is not None and before.request_ids == ids and before.tree == trees[0]:
            took = self._step_started - before.started
            self.load_plan.observe_step(count, before.context, before.tree, took)
        alike = all(tree == trees[0] for tree in trees)
        whole = (num_rows == (1 if trees[0] is None else trees[0].num_nodes)).all()
        computed = self.input_batch.num_computed_tokens_cpu[:count]
        decoding = (computed >= self.input_batch.num_prompt_tokens[:count]).all()
        self._run_step = None
        if alike and whole and decoding:
            self._run_step = _RunStep(self._step_started, ids, trees[0], float(computed.mean()))

    # ---- 3. The attention's groups ----

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        for groups in self.attn_groups:
            for group in groups:
                builder = group.get_metadata_builder(0)
                if isinstance(builder, self._tree_builder):
                    builder.step_trees = self._step_trees
        return super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]

    # ---- 4. Verification and commit ----

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        ranks = get_tp_group()
        if logits is None:
            return super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        if spec_decode_metadata is None:
            return self._sampled(logits, ())
        self.tree_statistics["steps"] += 1
        num_rows = [drafted + 1 for drafted in spec_decode_metadata.num_draft_tokens]
        with_trees = [index for index, rows in enumerate(num_rows) if rows > 1]
        verdict = None
        if with_trees:
            verdict = torch.zeros(len(with_trees) + 1, self._most_levels + 2, dtype=torch.int64, device=logits.device)
        elif ranks.world_size > 1:
            verdict = torch.zeros(1, self._most_levels + 2, dtype=torch.int64, device=logits.device)
        first_rows = np.cumsum([0, *num_rows[:-1]])
        scheduled = np.zeros(0, dtype=np.int64)  # the drafted tokens of all requests
        if with_trees:
            scheduled = spec_decode_metadata.draft_token_ids.cpu().numpy()
        if self.trees is not None:
            if verdict is not None and with_trees:
                self._decide(with_trees, num_rows, first_rows, logits, scheduled, verdict)
            self._next_tree = self._choose_tree()
        if verdict is not None and ranks.world_size > 1:
            self._share(verdict)
        return self._output(logits, num_rows, first_rows, with_trees, scheduled, verdict)

    def _decide(
        self,
        with_trees: list[int],
        num_rows: list[int],
        first_rows: np.ndarray,
        logits: torch.Tensor,
        scheduled: np.ndarray,
        verdict: torch.Tensor,
    ) -> None:
        """Verify the trees. verdict: row i is what becomes of request with_trees[i]: its path's nodes, -1 behind, how
        many they are, the token behind them; 0 of them where what was scheduled is not what was drafted.
        """
        request_ids, tokens = self.input_batch.req_ids, scheduled.tolist()
        computed = self.input_batch.num_computed_tokens_cpu[: len(num_rows)].tolist()
        for drafted, proposed in zip(self._drafted, self._proposed):
            groups: dict[int, list[tuple[int, int, int]]] = {}  # by nodes: row of the verdict, request, place
            for row, index in enumerate(with_trees):
                place = drafted.place.get(request_ids[index])
                if place is None or drafted.num_tokens[place] != computed[index] + 1:
                    continue
                nodes, start = num_rows[index], int(first_rows[index]) - index  # no request drafts its root
                if tokens[start : start + nodes - 1] == proposed[place][: nodes - 1]:
                    groups.setdefault(nodes, []).append((row, index, place))
            for nodes, members in groups.items():
                rows, indices, places = (list(column) for column in zip(*members))
                self._decide_alike(drafted, nodes, rows, indices, places, first_rows, logits, verdict)

    def _decide_alike(
        self,
        drafted: DraftedBatch,
        num_nodes: int,
        rows: list[int],
        indices: list[int],
        places: list[int],
        first_rows: np.ndarray,
        logits: torch.Tensor,
        verdict: torch.Tensor,
    ) -> None:
        """Verify trees of equally many nodes, and commit them in the draft's pages."""
        batch = self.input_batch
        request_ids = [batch.req_ids[index] for index in indices]
        samplings = [self._sampling(request_id) for request_id in request_ids]
        if indices == list(range(len(first_rows))) and logits.shape[0] == num_nodes * len(indices):
            target = logits.view(len(indices), num_nodes, -1)
        else:
            taken = first_rows[indices][:, None] + np.arange(num_nodes)
            target = logits[torch.from_numpy(taken).to(logits.device)]
        warping = [sampling.warping for sampling in samplings]
        try:
            path = verify_drafted(drafted, places, num_nodes, target, warping, self.settings.rule)
        except ValueError:
            broken = (~target.isfinite()).flatten(1).any(1).tolist()
            if not any(broken):
                raise
            # Nothing can be verified there: vLLM samples them, as it would without trees. The others are tried again.
            names = [request_id for request_id, is_broken in zip(request_ids, broken) if is_broken]
            logger.warning("trees: the target's logits are not finite, no tree for %s in this step", ", ".join(names))
            whole = [i for i, is_broken in enumerate(broken) if not is_broken]
            if whole and len(whole) < len(indices):
                rows, indices, places = ([column[i] for i in whole] for column in (rows, indices, places))
                self._decide_alike(drafted, num_nodes, rows, indices, places, first_rows, logits, verdict)
            return
        levels = path.nodes.shape[1]
        place = slice(0, len(rows)) if rows == list(range(len(rows))) else torch.tensor(rows, device=verdict.device)
        verdict[place, :levels] = path.nodes.long()
        verdict[place, levels:-2] = -1
        verdict[place, -2] = path.num_accepted.long()
        verdict[place, -1] = path.next_token
        committed = torch.from_numpy(batch.num_computed_tokens_cpu[indices]).to(path.nodes.device, torch.int32)
        assert self.trees is not None
        self.trees.commit(request_ids, path, committed)
        if self.load_plan is not None and num_nodes == drafted.tree.num_nodes:
            paths = list(zip(path.nodes.tolist(), path.num_accepted.tolist()))
            for greedy in (True, False):
                of_kind = [entry for entry, sampling in zip(paths, samplings) if sampling.is_greedy == greedy]
                if of_kind:
                    self.load_plan.observe_path(drafted.tree, of_kind, greedy)
        self.tree_statistics["cut"] += len(indices) * (num_nodes < drafted.tree.num_nodes)

    def _share(self, verdict: torch.Tensor) -> None:
        """Let every rank have rank 0's verdict and next tree."""
        ranks = get_tp_group()
        own = None
        if self.trees is not None:
            # -1 is no tree. Of the plan only rank 0's counts.
            verdict[-1, 0] = -1 if self._next_tree is None else self._candidates.index(self._next_tree)
            own = verdict[:-1].clone()
        ranks.broadcast(verdict, src=0)
        if self.settings.check_ranks:
            assert own is not None  # then all ranks draft
            self._compare(own, verdict[:-1])
        chosen = int(verdict[-1, 0])
        self._next_tree = None if chosen < 0 else self._candidates[chosen]

    def _compare(self, own: torch.Tensor, verdict: torch.Tensor) -> None:
        """Raise on all ranks where one would have decided otherwise: vLLM waits for rank 0's answer only."""
        ranks = get_tp_group()
        self.tree_statistics["compared"] += 1
        for rank in range(1, ranks.world_size):
            theirs = ranks.broadcast(own.clone(), src=rank)
            different = (theirs != verdict).any(1).nonzero()
            if len(different):
                row = int(different[0])
                raise RuntimeError(
                    f"{WHERE}: ranks must decide alike, got another path on rank {rank} than on rank 0 in step "
                    f"{self.tree_statistics['steps']}: {theirs[row].tolist()} instead of {verdict[row].tolist()}"
                )

    def _output(
        self,
        logits: torch.Tensor,
        num_rows: list[int],
        first_rows: np.ndarray,
        with_trees: list[int],
        scheduled: np.ndarray,
        verdict: torch.Tensor | None,
    ) -> SamplerOutput:
        """Emit and commit what was decided; the first row of a request without a verdict is sampled by vLLM."""
        batch, device = self.input_batch, logits.device
        metadata = batch.sampling_metadata
        width = self._most_levels if with_trees else 1
        decided: list[int] = []  # requests
        paths = np.zeros((0, width + 2), dtype=np.int64)
        if with_trees:
            assert verdict is not None
            verdicts = verdict[:-1].cpu().numpy()
            has_path = verdicts[:, -2] > 0
            decided, paths = np.array(with_trees)[has_path].tolist(), verdicts[has_path]
            self.tree_statistics["undrafted"] += len(with_trees) - len(decided)
        if len(decided) == batch.num_reqs and metadata.max_num_logprobs is None:
            # int32, as vLLM's sampler gives them
            sampled = torch.empty(batch.num_reqs, width, dtype=torch.int32, device=device)
            output = SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=None)
        else:
            root_logits = logits
            if logits.shape[0] != batch.num_reqs:
                root_logits = logits[torch.from_numpy(first_rows).to(device)]
            output = self._sampled(root_logits, decided)
            if not with_trees:
                return output
            sampled = output.sampled_token_ids.new_full((batch.num_reqs, width), PADDING)
            sampled[:, :1] = output.sampled_token_ids
            if output.logprobs_tensors is not None:  # a row for every entry of `sampled`, which vLLM filters alike
                output.logprobs_tensors = _repeated(output.logprobs_tensors, width)
        if decided:
            # Before anyone can see the rows: vLLM hashes a block for its prefix cache when the next step is scheduled,
            # and only up to the tokens that are final by then.
            self._commit(decided, paths)
            # Node j of a request is its drafted token j - 1.
            firsts = first_rows[decided] - decided - 1
            emitted = emitted_tokens(scheduled, firsts, paths[:, :-2], paths[:, -1])
            places = torch.tensor(decided, device=device)
            sampled[places] = torch.from_numpy(emitted).to(sampled)
            counts = self.tree_statistics
            counts["tree_steps"] += 1
            counts["trees"] += len(decided)
            counts["nodes"] += sum(num_rows[index] for index in decided)
            counts["accepted"] += int(paths[:, -2].sum())
            if metadata.max_num_logprobs is not None:
                path_rows = np.repeat(first_rows[:, None], width, axis=1)
                path_rows[decided] += paths[:, :-2].clip(min=0)
                # Raw ones.
                table = self.sampler.compute_logprobs(logits[torch.from_numpy(path_rows.ravel()).to(device)].float())
                of_paths = self.sampler.gather_logprobs(
                    table, metadata.max_num_logprobs, sampled.flatten().clamp(min=0).long()
                )
                if getattr(metadata, "logprob_token_ids", None):
                    # vLLM's own, of the tokens that a request without a tree has named, stay in its rows.
                    is_decided = torch.zeros(batch.num_reqs, dtype=torch.bool, device=device)
                    is_decided[places] = True
                    of_paths = _merged(output.logprobs_tensors, of_paths, is_decided.repeat_interleave(width))
                output.logprobs_tensors = of_paths
        output.sampled_token_ids = sampled
        return output

    def _sampled(self, logits: torch.Tensor, decided: Sequence[int]) -> SamplerOutput:
        """Let vLLM sample a token for each request, drawing from the seeds of those alone that keep it.

        A draw that nobody sees would move a request's stream on, so that its later text depended on who else is there.

        Args:
            logits: [requests, vocab].
            decided: requests whose tokens are decided already.
        """
        batch = self.input_batch
        metadata, discarded, unseen = batch.sampling_metadata, self.discard_request_mask.np, set(decided)
        kept = {
            index: generator
            for index, generator in metadata.generators.items()
            if index not in unseen and not discarded[index]
        }
        if len(kept) < len(metadata.generators):
            metadata = dataclasses.replace(metadata, generators=kept)
        return self.sampler(logits=logits, sampling_metadata=metadata)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM takes back what it drew for prompts that are not complete: nothing, see `_sampled`. It would set the
        # generators' offsets, which those of a CPU do not have: in plain vLLM 0.32 that ends the engine.
        batch = self.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        finally:
            batch.generators = generators

    def _commit(self, indices: list[int], paths: np.ndarray) -> None:
        """Move the rows of accepted nodes behind the committed ones. paths: as in a verdict. [B, levels + 2]"""
        moves = moves_rows(paths[:, :-2])
        if not moves.any():
            return
        batch, device, paths = self.input_batch, self.device, paths[moves]
        rows = np.array(indices)[moves]
        nodes = torch.from_numpy(paths[:, :-2].astype(np.int32)).to(device)
        num_accepted = torch.from_numpy(paths[:, -2].astype(np.int32)).to(device)
        committed = torch.from_numpy(batch.num_computed_tokens_cpu[rows]).to(device, torch.int32)
        places = torch.from_numpy(rows).to(device)
        for group_id, table in self._tables():
            pages = batch.block_table[group_id].get_device_tensor(batch.num_reqs).index_select(0, places)
            compact_kv_cache_(table, nodes, num_accepted, committed.clone(), block_table=pages)

    def _tables(self) -> list[_CacheGroup]:
        if self._cache_groups is None:
            layers = self.compilation_config.static_forward_context
            self._cache_groups = []
            for group_id, group in enumerate(self.kv_cache_config.kv_cache_groups):
                # Layers may share a cache, which must not be compacted twice.
                caches = {layers[name].kv_cache.data_ptr(): layers[name].kv_cache for name in group.layer_names}
                table = CacheTable([paged_rows(cache) for cache in caches.values()], paged=True)
                self._cache_groups.append(_CacheGroup(group_id, table))
        return self._cache_groups

    # ---- 5. The next trees ----

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # vLLM stops drafting for the whole batch when one request comes near the end. The scheduler cuts trees there.
        return common_attn_metadata is not None

    def _choose_tree(self) -> TokenTree | None:
        """Choose the tree of the next step by the requests that will want one."""
        if self.load_plan is None:
            return self._candidates[0]
        batch = self.input_batch
        going = (~self.discard_request_mask.np[: batch.num_reqs]).tolist()
        samplings = [self._sampling(request_id) for request_id, goes in zip(batch.req_ids, going) if goes]
        wanting = [sampling for sampling in samplings if sampling.has_trees and not sampling.is_seeded]
        if not wanting:
            return None
        num_greedy = sum(sampling.is_greedy for sampling in wanting)
        context = float(batch.num_computed_tokens_cpu[: batch.num_reqs].mean())
        return self.load_plan.choose(len(wanting), num_greedy, context)

    def propose_draft_token_ids(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        self._draft_probs = self._draft_prob_req_ids = None  # vLLM's, of its own drafts
        batch = self.input_batch
        proposed: list[list[int]] = [[] for _ in batch.req_ids]
        wanted: dict[TokenTree, list[DraftRequest]] = {}
        for index, request_id in enumerate(batch.req_ids):
            sampling = self._sampling(request_id)
            # No tokens: a prompt that is not complete yet.
            if not sampled_token_ids[index] or not sampling.has_trees:
                continue
            seeded = sampling.is_seeded
            tree = self._candidates[0] if seeded else self._next_tree
            if tree is None:
                continue
            self._tree_of[request_id] = tree
            if self.trees is not None:
                tokens = batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]]
                entry = DraftRequest(request_id, tokens, sampling.temperature, sampling.seed, must_draft=seeded)
                wanted.setdefault(tree, []).append(entry)
        self._drafted, self._proposed = [], []
        if self.trees is None or not wanted:
            return proposed
        self._drafted = self.trees.grow(wanted)
        for drafted in self._drafted:
            tokens = drafted.tokens[:, 1:].clamp(min=0).tolist()
            self._proposed.append(tokens)
            for request_id, place in drafted.place.items():
                proposed[batch.req_id_to_index[request_id]] = tokens[place]
        return proposed


def _repeated(logprobs: LogprobsTensors, count: int) -> LogprobsTensors:
    """Give every row of logprobs so many times."""
    rows = [part.repeat_interleave(count, 0) if part.dim() > 0 and part.numel() else part for part in logprobs[:3]]
    return logprobs._replace(**dict(zip(logprobs._fields, rows)))


def _merged(others: LogprobsTensors, some: LogprobsTensors, rows: torch.Tensor) -> LogprobsTensors:
    """Take some rows of logprobs from one table, the others from another, which may be of another width.

    Args:
        others: where `rows` is False.
        some: where it is True.
        rows: [R] bool.
    """
    width = max(others.logprobs.shape[1], some.logprobs.shape[1])

    def padded(part: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value)

    return LogprobsTensors(
        torch.where(rows[:, None], padded(some.logprob_token_ids, 0), padded(others.logprob_token_ids, 0)),
        torch.where(rows[:, None], padded(some.logprobs, -torch.inf), padded(others.logprobs, -torch.inf)),
        torch.where(rows, some.selected_token_ranks, others.selected_token_ranks),
    )


class DeviceTreesMixin(TreeRunnerMixin):
    """The same on CUDA: positions and masks come of tables there. Not run on a GPU yet."""

    def _new_step_trees(self) -> Any:
        from sequoia_kernels.vllm.gpu_attention import DeviceTreeMetadataBuilder, DeviceTrees

        self._tree_builder = DeviceTreeMetadataBuilder
        return DeviceTrees(self._candidates, self.max_num_reqs, self.device)

    def _set_positions(self, num_rows: np.ndarray, total: int) -> None:
        self._step_trees.move_positions_(
            self.positions[:total], self.req_indices.gpu[:total], self.query_pos.gpu[:total]
        )

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        built = super()._build_attention_metadata(*args, **kwargs)
        self._step_trees.forget()
        return built


class TreeModelRunner(TreeRunnerMixin, ModelRunner):
    """vLLM's V1 model runner, with trees."""


class DeviceTreeModelRunner(DeviceTreesMixin, ModelRunner):
    """The same on CUDA."""


RUNNER = TreeModelRunner if current_platform.is_cpu() else DeviceTreeModelRunner


class TreeWorker(Worker):
    """The worker that `worker_cls` names: vLLM's, with the tree runner."""

    def init_device(self) -> None:
        """Set up the device and the runner."""
        if getattr(self, "use_v2_model_runner", False):
            raise ValueError(f"{WHERE}: trees need vLLM's V1 model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
        if not current_platform.is_cpu():
            check_cuda(self.vllm_config)
        super().init_device()
        if not isinstance(self.model_runner, RUNNER):
            # The CPU worker names its runner's class in the middle of `init_device`, and there is no setting for it.
            self.model_runner.__class__ = RUNNER
        self.model_runner.init_trees()

    def _make_model_runner(self) -> Any:
        # The hook of the GPU worker.
        return RUNNER(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        """Give what vLLM's caches may take: what is there, less the draft's pages; on a GPU less its logits, too."""
        available = super().determine_available_memory()
        if not current_platform.is_cpu():  # there, as for activations, memory is taken when it is first written
            available -= self.model_runner.tree_logits_bytes()
        self._pool_bytes = self.model_runner.tree_pool_bytes(available)
        return available - self._pool_bytes

    def compile_or_warm_up_model(self) -> Any:
        """Warm up; the caches are there by now, so the draft's pages can be, too."""
        times = super().compile_or_warm_up_model()
        self.model_runner.start_trees(getattr(self, "_pool_bytes", 0))
        return times

    def tree_report(self) -> dict[str, Any]:
        """Counts since the start, and what is learned of load; for `LLM.collective_rpc`."""
        runner = self.model_runner
        report: dict[str, Any] = dict(runner.tree_statistics)
        if runner.trees is not None:
            pool = runner.trees.pool
            report |= {
                "draft_requests": runner.trees.num_requests,
                "draft_pages": pool.num_pages,
                "draft_pages_free": pool.num_free,
                "without_room": runner.trees.num_without_room,
            }
        if runner.load_plan is not None:
            report["plan"] = runner.load_plan.report()
        return report


def _of_rank_0(answer: bool) -> bool:
    """Give every rank the answer of rank 0."""
    ranks = get_tp_group()
    return answer if ranks.world_size == 1 else bool(ranks.broadcast_object(answer, src=0))


def _share_threads() -> None:
    """Let native forwards and attention run on the threads that torch has, which vLLM has bound to cores.

    Threads of their own would find torch's spinning on the same cores, and would inherit this thread's binding to one.
    """
    from sequoia_kernels import _host

    if not _host.use_openmp_threads(True):
        logger.warning("trees: torch runs no OpenMP threads that native code could share; it starts its own")
