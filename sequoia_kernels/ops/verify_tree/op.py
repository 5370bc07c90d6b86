"""verify_tree: contract, checks and dispatch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops.operators import Buffer, Operator
from sequoia_kernels.tree import DEFAULT_RULE, MAX_STEP_ROWS, TokenTree, Topology, rule_named
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["VerifiedPath", "VerifyTreeInputs", "check_values", "rule_reason", "verify_tree"]

OP = "verify_tree"


class VerifyTreeInputs(NamedTuple):
    """What the op takes.

    Attributes:
        tokens: tokens of the nodes, in any requests' stride. [B, N], int64.
        target_logits: [B, N, vocab], float; last dimension contiguous, as of the draft's.
        draft_logits: [B, N, draft vocab], float; None where no child was drawn.
        first_child: first child of each node, -1 for leaves. [N], or [B, N] for a tree a request, int32.
        num_children: shape and dtype of first_child.
        num_levels: no tree has more levels.
        max_branching: no node has more children.
        temperature: [B], float32.
        seeds: [B], int64.
        offsets: [B], int64.
        top_k: [B], int32, or None.
        top_p: [B], float32, or None.
        rule: name of a verification rule. A backend decides by those that it names in its ``supports``.
        target_to_draft: place of each token in a row of draft_logits, -1 for none. [vocab], int32. None where the two
            vocabularies are one.
        certain: which nodes were proposed with certainty, not drawn. Shape of first_child or [B, N], bool, or None.
    """

    tokens: Tensor
    target_logits: Tensor
    draft_logits: Tensor | None
    first_child: Tensor
    num_children: Tensor
    num_levels: int
    max_branching: int
    temperature: Tensor
    seeds: Tensor
    offsets: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    rule: str
    target_to_draft: Tensor | None = None
    certain: Tensor | None = None


class VerifiedPath(NamedTuple):
    """The accepted path of every request.

    Attributes:
        nodes: the root (node 0) and the accepted nodes below it, -1 behind the last one. [B, num_levels], int32.
        num_accepted: accepted nodes, the root included; as many tokens are emitted, since the root is an old token and
            `next_token` a new one. [B], int32. 1..num_levels.
        next_token: the token behind the accepted path (the bonus token). [B], int64.
    """

    nodes: Tensor
    num_accepted: Tensor
    next_token: Tensor


def verify_tree(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    tree: TokenTree | Topology,
    temperature: float | Tensor,
    seeds: int | Tensor,
    offsets: int | Tensor,
    *,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    rule: str = DEFAULT_RULE,
    draft_to_target: Tensor | VocabularyMap | None = None,
    certain: Tensor | None = None,
    out: VerifiedPath | tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> VerifiedPath:
    """Decide which path of a drafted token tree the target accepts, and draw the token behind it.

    The emitted tokens (the accepted nodes' tokens, then `next_token`) are distributed exactly as if the target had been
    sampled token by token, provided that every node's children were drawn by `sample_without_replacement` from its
    `draft_logits` at the same temperature, with noise of their own; or are `certain`.

    Args:
        tokens: the token of every node, the last emitted one at node 0. [B, N], int64. -1 where none could be drawn.
        target_logits: the target's logits behind each node; -inf masks a token. [B, N, vocab], float32, bfloat16,
            float16 or float64, last dimension contiguous, the others strided at will.
        draft_logits: the draft's logits behind each node, from which its children were drawn; rows of leaves are never
            used and may hold anything. [B, N, vocab], or [B, N, Vd] with `draft_to_target`; dtype and layout as above.
            None where no child was drawn: in a tree of one node, or where all are certain.
        tree: topology of the N nodes, at most 1024: a `TokenTree`, or a `Topology` on the device of the tokens, whose
            tensors are [N], or [B, N] for a tree of its own for each request. Every request's node 0 is the root; nodes
            that are nobody's children are not used.
        temperature: 0, or at least 1e-5; 0 is greedy: a child is accepted iff it is the target's largest logit, lowest
            id on ties. Number, or [B] float32.
        seeds: the requests' random streams. Integer, or [B] int64.
        offsets: position in those streams; a pair of seed and offset must not be used twice. One for each request: that
            of its root, whose number the draft's draws may share (coins come from a stream of their own). The next step
            begins N further. Integer, or [B] int64.
        top_k: the target is cut to its most probable tokens first; below 1 or from vocab on is off. Integer, or [B]
            int32.
        top_p: then to the smallest set of most probable tokens that holds this mass. Number, or [B] float32. In (0, 1].
        rule: name of the verification rule, see `sequoia_kernels.tree.rules`. "sequoia" decides from the root.
        out: buffers to write into instead of new ones, of the shapes and dtypes of VerifiedPath, strided at will. They
            share no memory with one another or an input.
        backend: name of a backend, or "auto".
        debug: check values on a GPU too. And on every device, for requests above temperature 0, that no two share a
            pair of seed and offset and that every child can be a draw from its parent's draft logits; and that the
            tensors of a `Topology` agree. Waits for the device.

    Returns:
        VerifiedPath(nodes [B, num_levels] int32, num_accepted [B] int32, next_token [B] int64): the accepted nodes with
        the root in front and -1 behind, how many they are, and the token behind them. A step emits the tokens of
        `nodes[:, 1:num_accepted]`, then `next_token`, which is the next step's root.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, layout or range is wrong; on a CPU or under `debug` if a row of target logits or
            of draft logits of a node with children holds NaN or +inf or only -inf, a token is outside the vocabulary,
            a child lies outside the tree, or a temperature or top_p is out of range; under `debug` if requests share
            their noise, a child cannot have been drawn, or a topology contradicts itself. Nothing has been written
            then.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates only `out`. No host sync unless `debug`; can be captured in a CUDA graph. The same inputs give the same
        path on every run. The draft is not cut by top_k and top_p: only the target's distribution is to be reproduced.
        A child that cannot have been drawn (-1, a repeat of an earlier sibling, a token the draft masks or does not
        know, unless it is certain) is passed over as if it were not there. A token of target probability 0 is never
        emitted.

    Source:
        Sequoia (arXiv 2402.12374), section 3.2, tree sampling and verification, with strict coins.

    Example:
        >>> tree = TokenTree([-1, 0, 0])
        >>> target_logits = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
        >>> tokens = torch.tensor([[0, 1, 2]])
        >>> path = verify_tree(tokens, target_logits, torch.zeros(1, 3, 3), tree, temperature=0.0, seeds=7, offsets=0)
        >>> path.nodes.tolist(), path.num_accepted.tolist(), path.next_token.tolist()
        ([[0, 2]], [2], [1])
    """
    if not isinstance(tree, (TokenTree, Topology)):
        raise TypeError(f"{OP}: tree must be a TokenTree or a Topology, got {type(tree).__name__}")
    checks.check_tensor(OP, "tokens", tokens)
    checks.check_rows(OP, "tokens", tokens, "batch, nodes")
    rule_named(OP, rule)
    if isinstance(tree, Topology):
        _check_topology(tree)
        # Traced and fake tensors have no values to read.
        if (
            debug is True
            and not torch.compiler.is_compiling()
            and type(tree.parents) is Tensor
            and not tree.parents.is_meta
        ):
            tree.check(OP)
    if tree.num_nodes > MAX_STEP_ROWS:
        checks.fail_range(OP, "tree", f"have at most {MAX_STEP_ROWS} nodes", tree.num_nodes)
    topology = tree.tensors(tokens.device) if isinstance(tree, TokenTree) else tree
    row_values = functools.partial(
        checks.row_values, OP, num_rows=tokens.shape[0], device=tokens.device, legend="batch"
    )
    inputs = VerifyTreeInputs(
        tokens,
        target_logits,
        draft_logits,
        topology.first_child,
        topology.num_children,
        topology.num_levels,
        topology.max_branching,
        row_values("temperature", temperature, dtype=torch.float32, rule=checks.TEMPERATURE),
        row_values("seeds", seeds, dtype=torch.int64),
        row_values("offsets", offsets, dtype=torch.int64),
        None if top_k is None else row_values("top_k", top_k, dtype=torch.int32),
        None if top_p is None else row_values("top_p", top_p, dtype=torch.float32, rule=checks.TOP_P),
        rule,
        _target_to_draft(draft_to_target, draft_logits, target_logits),
        certain,
    )
    return OPERATOR(inputs, out, backend, debug)


def rule_reason(inputs: VerifyTreeInputs, known: tuple[str, ...]) -> str | None:
    """What a backend that knows some rules answers in its ``supports``."""
    if inputs.rule in known:
        return None
    return f"knows the rule{'s' if len(known) > 1 else ''} {' and '.join(known)}"


def _target_to_draft(
    draft_to_target: Tensor | VocabularyMap | None, draft_logits: Tensor | None, target_logits: Tensor
) -> Tensor | None:
    name = "draft_to_target"
    if draft_to_target is None:
        return None
    ids = draft_to_target.draft_to_target if isinstance(draft_to_target, VocabularyMap) else draft_to_target
    checks.check_tensor(OP, name, ids)
    checks.check_dtype(OP, name, ids, torch.int64)
    if isinstance(draft_logits, Tensor) and draft_logits.dim() == 3 and ids.shape != draft_logits.shape[2:]:
        rule = f"have shape [draft vocabulary] = [{draft_logits.shape[2]}], as draft_logits has"
        checks.fail_range(OP, name, rule, checks.shape_text(ids.shape))
    if isinstance(draft_to_target, VocabularyMap):
        return draft_to_target.target_to_draft
    checks.check_tensor(OP, "target_logits", target_logits)
    if draft_to_target.dim() != 1 or target_logits.dim() != 3:
        checks.fail_range(OP, name, "have shape [draft vocabulary]", checks.shape_text(draft_to_target.shape))
    # Values are read where that costs no wait; elsewhere `debug` looks at the map.
    readable = type(draft_to_target) is Tensor and draft_to_target.is_cpu and not torch.compiler.is_compiling()
    if not readable:
        return VocabularyMap.unchecked(draft_to_target, target_logits.shape[2]).target_to_draft
    return VocabularyMap.of(draft_to_target, target_logits.shape[2], where=OP).target_to_draft


def _check_topology(tree: Topology) -> None:
    """Check what the schema of the operator asks for, and what bounds the outputs' sizes."""
    for name in ("parents", "first_child", "num_children"):
        checks.check_tensor(OP, f"tree.{name}", getattr(tree, name))
        if getattr(tree, name).dim() not in (1, 2):
            checks.fail_range(OP, f"tree.{name}", "have shape [nodes] or [batch, nodes]", getattr(tree, name).dim())
    for name, least in (("num_levels", 1), ("max_branching", 0)):
        bound = checks.whole_number(OP, f"tree.{name}", getattr(tree, name))
        if not least <= bound <= max(tree.num_nodes, 1):
            checks.fail_range(OP, f"tree.{name}", f"be in {least}..{max(tree.num_nodes, 1)}", bound)


def check(inputs: VerifyTreeInputs) -> None:
    """Check dtypes, shapes, layouts and devices."""
    tokens, target_logits, draft_logits = inputs[:3]
    checks.check_dtype(OP, "tokens", tokens, torch.int64)
    checks.check_rows(OP, "tokens", tokens, "batch, nodes")
    device, batch_size, num_nodes = tokens.device, tokens.shape[0], inputs.first_child.shape[-1]
    checks.check_shape(OP, "tokens", tokens, (batch_size, num_nodes), "batch, nodes")
    checks.check_dtype(OP, "target_logits", target_logits, *checks.FLOAT_DTYPES)
    checks.check_rows(OP, "target_logits", target_logits, "batch, nodes, vocab")
    vocab = target_logits.shape[2]
    if vocab == 0:
        checks.fail_range(OP, "target_logits", "have at least one token", checks.shape_text(target_logits.shape))
    shape = (batch_size, num_nodes, vocab)
    checks.check_shape(OP, "target_logits", target_logits, shape, "batch, nodes, vocab")
    checks.check_device(OP, "target_logits", target_logits, device)
    if draft_logits is not None:
        checks.check_dtype(OP, "draft_logits", draft_logits, *checks.FLOAT_DTYPES)
        checks.check_rows(OP, "draft_logits", draft_logits, "batch, nodes, vocab")
        mapped = inputs.target_to_draft is not None
        if draft_logits.shape[:2] != shape[:2] or (draft_logits.shape[2] != vocab and not mapped):
            rule = f"have shape [batch, nodes, vocab] = {checks.shape_text(shape)}"
            fix = "; pad the draft's logits with -inf or slice them" if draft_logits.shape[2] != vocab else ""
            checks.fail_range(OP, "draft_logits", rule, checks.shape_text(draft_logits.shape) + fix)
        checks.check_device(OP, "draft_logits", draft_logits, device)
    elif num_nodes > 1 and inputs.certain is None:
        raise TypeError(f"{OP}: draft_logits must be a tensor for a tree of {num_nodes} nodes, got None")
    if inputs.target_to_draft is not None:
        checks.check_dtype(OP, "draft_to_target", inputs.target_to_draft, torch.int32)
        checks.check_shape(OP, "draft_to_target's inverse", inputs.target_to_draft, (vocab,), "vocab")
        checks.check_device(OP, "draft_to_target", inputs.target_to_draft, device)
    if inputs.certain is not None:
        checks.check_dtype(OP, "certain", inputs.certain, torch.bool)
        if inputs.certain.shape not in ((num_nodes,), (batch_size, num_nodes)):
            rule = f"have shape [nodes] or [batch, nodes] with {num_nodes} nodes and batch {batch_size}"
            checks.fail_range(OP, "certain", rule, checks.shape_text(inputs.certain.shape))
        checks.check_device(OP, "certain", inputs.certain, device)
    for name, part in (("tree.first_child", inputs.first_child), ("tree.num_children", inputs.num_children)):
        checks.check_dtype(OP, name, part, torch.int32)
        if part.shape != inputs.first_child.shape or part.shape not in ((num_nodes,), (batch_size, num_nodes)):
            rule = f"have shape [nodes] or [batch, nodes] with {num_nodes} nodes and batch {batch_size}"
            checks.fail_range(OP, name, rule, checks.shape_text(part.shape))
        checks.check_device(OP, name, part, device)
    checks.check_row_values(OP, "temperature", inputs.temperature, batch_size, torch.float32, device, "batch")
    checks.check_row_values(OP, "seeds", inputs.seeds, batch_size, torch.int64, device, "batch")
    checks.check_row_values(OP, "offsets", inputs.offsets, batch_size, torch.int64, device, "batch")
    checks.check_row_values(OP, "top_k", inputs.top_k, batch_size, torch.int32, device, "batch")
    checks.check_row_values(OP, "top_p", inputs.top_p, batch_size, torch.float32, device, "batch")


def buffers(inputs: VerifyTreeInputs) -> tuple[Buffer, Buffer, Buffer]:
    """Describe the outputs."""
    batch_size = inputs.tokens.shape[0]
    return (
        Buffer((batch_size, inputs.num_levels), torch.int32, "batch, levels"),
        Buffer((batch_size,), torch.int32, "batch"),
        Buffer((batch_size,), torch.int64, "batch"),
    )


def check_values(inputs: VerifyTreeInputs) -> None:
    """Check temperatures, top_p, the tree, tokens and logits. Reads values."""
    checks.check_temperature_values(OP, inputs.temperature)
    checks.check_top_p_values(OP, inputs.top_p)
    _check_tree(inputs)
    vocab = inputs.target_logits.shape[2]
    speculated = inputs.tokens[:, 1:]
    if speculated.numel() > 0:
        low, high = (int(bound) for bound in speculated.aminmax())
        if low < -1 or high >= vocab:
            worst = low if low < -1 else high
            checks.fail_range(OP, "tokens", f"be in 0..{vocab - 1}, or -1 for none", worst)
    checks.check_logits(OP, "target_logits", inputs.target_logits)
    if inputs.draft_logits is not None:
        # Rows of leaves may hold anything: their maxima are replaced by a number that passes.
        row_max = inputs.draft_logits.amax(dim=-1).masked_fill(inputs.num_children == 0, 0)
        checks.check_logits(OP, "draft_logits", row_max[..., None])


def _check_tree(inputs: VerifyTreeInputs) -> None:
    """Children lie behind their parents and inside the tree, each has one parent, and the two bounds hold."""
    num_nodes = inputs.first_child.shape[-1]
    firsts, counts = (part.reshape(-1, num_nodes).tolist() for part in (inputs.first_child, inputs.num_children))
    for tree_firsts, tree_counts in zip(firsts, counts):
        depths, unclaimed = [0] * num_nodes, 1
        for node, (first, count) in enumerate(zip(tree_firsts, tree_counts)):
            if count < 0 or (count > 0 and not node < first <= num_nodes - count):
                rule = f"have the children of node {node} behind it and below node {num_nodes}"
                checks.fail_range(OP, "tree", rule, f"{count} from node {first}")
            if count > 0 and first < unclaimed:
                rule = f"have the children of node {node} behind those of the nodes before it"
                checks.fail_range(OP, "tree", rule, f"{count} from node {first}")
            unclaimed = first + count if count > 0 else unclaimed
            depths[first : first + count] = [depths[node] + 1] * count
        if max(tree_counts) > inputs.max_branching:
            checks.fail_range(OP, "tree.max_branching", f"be at least {max(tree_counts)}", inputs.max_branching)
        if max(depths) >= inputs.num_levels:
            checks.fail_range(OP, "tree.num_levels", f"be at least {max(depths) + 1}", inputs.num_levels)


def check_use(inputs: VerifyTreeInputs) -> None:
    """No two requests share their noise, and every child can be a draw of its parent's draft row. Reads values."""
    hint = "pass a seed of its own for each request, and advance its offset by the number of nodes behind every step"
    checks.check_streams(OP, inputs.seeds, inputs.offsets, inputs.temperature, "requests", hint)
    tokens, draft_logits, target_to_draft = inputs.tokens, inputs.draft_logits, inputs.target_to_draft
    if draft_logits is None:
        return
    num_nodes = tokens.shape[1]
    if target_to_draft is not None:
        width = draft_logits.shape[2]
        known = target_to_draft[target_to_draft >= 0].sort().values
        if known.tolist() != list(range(width)):
            rule = f"name a token for each of the draft's {width}, each once"
            checks.fail_range(OP, "draft_to_target", rule, f"{len(known.unique())} of them")
    nodes = torch.arange(num_nodes, device=tokens.device)
    first_child, num_children = (
        part.expand(tokens.shape).to(torch.int64) for part in (inputs.first_child, inputs.num_children)
    )
    ends = first_child + num_children
    # Whether a column is a child of a row. [B, N, N]; greedy requests may be offered any tokens.
    is_child = (nodes >= first_child[:, :, None]) & (nodes < ends[:, :, None])
    is_child &= (inputs.temperature != 0)[:, None, None] & (tokens >= 0)[:, None, :]
    if inputs.certain is not None:
        is_child &= ~inputs.certain.expand(tokens.shape)[:, None, :]
    parents = is_child.to(torch.int8).argmax(dim=1)
    drawn = is_child.any(dim=1)
    requests = torch.arange(len(tokens), device=tokens.device)
    places = tokens.clamp(min=0)
    unknown = torch.zeros_like(drawn)
    if target_to_draft is not None:
        places = target_to_draft[places].to(torch.int64)
        places, unknown = places.clamp(min=0), places < 0
    masked = drawn & (unknown | (draft_logits[requests[:, None], parents, places] == -torch.inf))
    if bool(masked.any()):
        request, node = masked.nonzero()[0].tolist()
        rule = "be draws from their parents' draft_logits above temperature 0"
        actual = f"token {int(tokens[request, node])} at node {node} of request {request}, whose draft logit is -inf"
        checks.fail_range(OP, "tokens", rule, f"{actual}; pass the logits that each node's children were drawn from")
    same = (tokens[:, :, None] == tokens[:, None, :]) & (parents[:, :, None] == parents[:, None, :])
    repeated = same & (drawn[:, :, None] & drawn[:, None, :]) & (nodes[:, None] < nodes)
    if bool(repeated.any()):
        request, node, other = repeated.nonzero()[0].tolist()
        rule = "differ between siblings above temperature 0"
        actual = f"{int(tokens[request, node])} at the nodes {node} and {other} of request {request}"
        checks.fail_range(OP, "tokens", rule, f"{actual}; draw all children of a node in one row, without replacement")


OPERATOR = Operator(
    OP,
    VerifyTreeInputs,
    VerifiedPath,
    package=__package__,
    check=check,
    buffers=buffers,
    check_values=check_values,
    check_use=check_use,
    out_rule="be a triple (nodes, num_accepted, next_token)",
)
