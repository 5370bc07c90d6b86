"""Trees as linked lists of children, and accepted paths as rows of the batch: SGLang's and TensorRT-LLM's convention.

A node's first child and its next sibling are node numbers within the request, -1 for none; the row of a node in what
was computed for the whole batch is b * N + node. Nodes may stand in any order there, the root at 0. Here they are
breadth-first with siblings side by side, so a tree that comes in brings an order with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sequoia_kernels import checks
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.tree import TokenTree, Topology

__all__ = [
    "AcceptedRows",
    "RetrieveArrays",
    "RetrievedTree",
    "from_accepted_rows",
    "from_retrieve",
    "to_accepted_rows",
    "to_retrieve",
]

INTEGERS = (torch.int32, torch.int64)


class RetrieveArrays(NamedTuple):
    """Trees as servers link them. N nodes a request.

    Attributes:
        rows: row of each node in the batch, b * N + node (retrive_index, retrieve_index). [B, N], int64 or int32, as
            the two below.
        next_token: first child of each node, -1 for leaves (retrive_next_token). [B, N].
        next_sibling: the sibling that was drawn behind each node, -1 for the last (retrive_next_sibling). [B, N].
    """

    rows: torch.Tensor
    next_token: torch.Tensor
    next_sibling: torch.Tensor


class RetrievedTree(NamedTuple):
    """A server's trees as the ops take them.

    Attributes:
        topology: a tree for each request. [B, N].
        order: the server's node behind each of ours: `theirs.gather(1, order)` puts tokens in our order. [B, N], int64.
        places: our node behind each of the server's, the other way round: `ours.gather(1, places)`. [B, N], int64.
    """

    topology: Topology
    order: torch.Tensor
    places: torch.Tensor


class AcceptedRows(NamedTuple):
    """An accepted path as servers write it (outputs of SGLang's verify_tree_greedy).

    Attributes:
        predicts: the token that follows each accepted row, -1 at all other rows. [B * N], int32.
        accept_index: rows of the accepted nodes, the root's first, -1 behind the last. [B, levels], int32.
        accept_token_num: accepted nodes below the root: neither root nor bonus token count. [B], int32.
    """

    predicts: torch.Tensor
    accept_index: torch.Tensor
    accept_token_num: torch.Tensor


def to_retrieve(
    tree: TokenTree | Topology,
    batch_size: int | None = None,
    *,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
) -> RetrieveArrays:
    """Link a tree as servers do, in our order of nodes.

    Args:
        tree: one tree for all requests, or a topology with a tree for each.
        batch_size: number of requests; needed for one tree, and else the topology's own.
        dtype: int64, as SGLang has it, or int32, as TensorRT-LLM does.
        device: where the arrays of a `TokenTree` are to be; a topology's are where the topology is.

    Returns:
        RetrieveArrays(rows, next_token, next_sibling), [B, N] each. Unused nodes of a topology are linked to nothing.

    Raises:
        TypeError: not a tree, a batch size that is no integer, or another dtype.
        ValueError: no batch size for one tree, a negative one, or not the topology's own.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> arrays = to_retrieve(TokenTree([-1, 0, 0, 1]), 1)
        >>> arrays.next_token.tolist(), arrays.next_sibling.tolist()
        ([[1, 3, -1, -1]], [[-1, 2, -1, -1]])
    """
    if not isinstance(tree, (TokenTree, Topology)):
        raise TypeError(f"to_retrieve: tree must be a TokenTree or a Topology, got {type(tree).__name__}")
    if dtype not in INTEGERS:
        raise TypeError(f"to_retrieve: dtype must be torch.int64 or torch.int32, got {dtype}")
    topology = tree.tensors(device) if isinstance(tree, TokenTree) else tree
    if batch_size is not None:
        batch_size = checks.whole_number("to_retrieve", "batch_size", batch_size, rule=checks.at_least(0))
    wanted = batch_size if topology.batch_size is None else topology.batch_size
    if wanted is None or (batch_size is not None and batch_size != wanted):
        rule = "be given for a tree that all requests share" if wanted is None else f"be the topology's {wanted}"
        raise ValueError(f"to_retrieve: batch_size must {rule}, got {batch_size}")
    num_nodes = topology.num_nodes
    shape = (wanted, num_nodes)
    nodes = torch.arange(num_nodes, device=topology.parents.device)
    has_parent = topology.parents >= 0
    siblings = topology.num_children.gather(-1, topology.parents.clamp(min=0).to(torch.int64))
    next_sibling = torch.where(has_parent & (topology.ranks + 1 < siblings), nodes + 1, -1)
    rows = torch.arange(wanted * num_nodes, dtype=dtype, device=nodes.device).view(shape)
    first_child, next_sibling = (part.expand(shape).to(dtype) for part in (topology.first_child, next_sibling))
    return RetrieveArrays(rows, first_child.contiguous(), next_sibling.contiguous())


def from_retrieve(
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
    *,
    num_levels: int | None = None,
    max_branching: int | None = None,
) -> RetrievedTree:
    """Take trees that a server has linked, in whatever order of nodes.

    Args:
        next_token: first child of each node, -1 for leaves. [B, N], int64 or int32. Node 0 is the root.
        next_sibling: next sibling of each node in draw order, -1 for the last. [B, N], the same dtype.
        num_levels: no tree has more levels (SGLang: number of draft steps + 1); None looks, and waits for the device.
        max_branching: no node has more children (SGLang: topk); likewise.

    Returns:
        RetrievedTree(topology, order, places). Nodes that the root does not lead to are unused: they come last, are
        nobody's children there, and are never accepted.

    Raises:
        TypeError: not integer tensors of one dtype, or a bound that is no integer.
        ValueError: a wrong shape or device, or a bound of no tree; on a CPU also links outside -1..N-1, to the root, to
            a node that is linked twice, or in a ring, and bounds that do not hold.

    Notes:
        No host sync where both bounds are given; can be captured in a CUDA graph. On devices other than the CPU nobody
        checks links. Above temperature 0, siblings must have been drawn without replacement in the order of their
        links: what a server selects by score among all candidates is no draw, and decodes greedily only.

    Example:
        >>> next_token = torch.tensor([[1, 2, -1, -1]])  # depth first: 0 -> 1 -> 2, 0 -> 3
        >>> tree = from_retrieve(next_token, torch.tensor([[-1, 3, -1, -1]]))
        >>> tree.topology.parents.tolist(), tree.order.tolist()
        ([[-1, 0, 0, 1]], [[0, 1, 3, 2]])
    """
    where = "from_retrieve"
    checks.check_tensor(where, "next_token", next_token)
    checks.check_tensor(where, "next_sibling", next_sibling)
    checks.check_dtype(where, "next_token", next_token, *INTEGERS)
    checks.check_dtype(where, "next_sibling", next_sibling, next_token.dtype)
    if next_token.dim() != 2 or next_token.shape[1] == 0:
        checks.fail_range(where, "next_token", "have shape [batch, nodes]", checks.shape_text(next_token.shape))
    checks.check_shape(where, "next_sibling", next_sibling, tuple(next_token.shape), "batch, nodes")
    checks.check_device(where, "next_sibling", next_sibling, next_token.device)
    if num_levels is not None:
        num_levels = checks.whole_number(where, "num_levels", num_levels, rule=checks.at_least(1))
    if max_branching is not None:
        max_branching = checks.whole_number(where, "max_branching", max_branching, rule=checks.at_least(0))
    if next_token.is_cpu:
        _check_links(where, next_token, next_sibling)
    num_nodes = next_token.shape[1]
    nodes = torch.arange(num_nodes, device=next_token.device).expand(next_token.shape)

    # Along the siblings: who is first in the list, and how many stand before each.
    earlier = _linked_from(next_sibling)
    first, ranks = _followed(earlier)
    # The first one's parent is everyone's; along the parents: how deep, and whether the root is at the top.
    parents = _linked_from(next_token).gather(1, first)
    top, depths = _followed(parents)
    used = top == 0
    depths = torch.where(used, depths, 0)
    if depths.is_cpu and depths.numel():
        has_parent = used & (parents >= 0)
        for name, bound, least in (
            ("num_levels", num_levels, int(depths.max()) + 1),
            ("max_branching", max_branching, int(torch.where(has_parent, ranks + 1, 0).max())),
        ):
            if bound is not None and bound < least:
                checks.fail_range(where, name, f"be at least {least}", bound)
    if num_levels is None:
        num_levels = int(depths.max()) + 1 if depths.numel() else 1

    # Breadth-first: level by level, by the parents' places among theirs, then by rank. Each round sorts a level more.
    of_parent, places = parents.clamp(min=0), nodes
    order = nodes
    for _ in range(max(num_levels - 1, 1)):
        keys = (depths * num_nodes + places.gather(1, of_parent)) * num_nodes + ranks
        order = torch.where(used, keys, num_nodes**3).argsort(dim=1, stable=True)
        places = torch.empty_like(order).scatter_(1, order, nodes)
    ours = torch.where(used & (parents >= 0), places.gather(1, of_parent), -1).gather(1, order)
    topology = Topology.from_parents(ours, num_levels=num_levels, max_branching=max_branching)
    return RetrievedTree(topology, order, places)


def to_accepted_rows(
    path: VerifiedPath,
    tokens: torch.Tensor,
    *,
    order: torch.Tensor | None = None,
    batch_rows: torch.Tensor | None = None,
) -> AcceptedRows:
    """Write an accepted path as servers read it.

    Args:
        path: what `verify_tree` gave: nodes [B, levels], num_accepted [B], next_token [B].
        tokens: the nodes' tokens, as `verify_tree` took them. [B, N], int64.
        order: `RetrievedTree.order`, where the server's nodes stand in an order of its own. [B, N], int64.
        batch_rows: the server's rows, where they are not b * N + node; each below B * N. [B, N], int64 or int32.

    Returns:
        AcceptedRows(predicts, accept_index, accept_token_num).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; on a CPU also nodes or rows that there are not, and counts other than those
            of the accepted nodes.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> path = VerifiedPath(torch.tensor([[0, 2, -1]]), torch.tensor([2]), torch.tensor([7]))
        >>> rows = to_accepted_rows(path, torch.tensor([[4, 5, 6]]))
        >>> rows.predicts.tolist(), rows.accept_index.tolist(), rows.accept_token_num.tolist()
        ([6, -1, 7], [[0, 2, -1]], [1])
    """
    where = "to_accepted_rows"
    if not isinstance(path, VerifiedPath):
        raise TypeError(f"{where}: path must be a VerifiedPath, got {type(path).__name__}")
    _check_paths(where, "path.nodes", path.nodes)
    batch_size, device = len(path.nodes), path.nodes.device
    for name, row, dtypes in (
        ("path.num_accepted", path.num_accepted, INTEGERS),
        ("path.next_token", path.next_token, (torch.int64,)),
    ):
        checks.check_tensor(where, name, row)
        checks.check_dtype(where, name, row, *dtypes)
        checks.check_shape(where, name, row, (batch_size,), "batch")
        checks.check_device(where, name, row, device)
    checks.check_tensor(where, "tokens", tokens)
    checks.check_dtype(where, "tokens", tokens, torch.int64)
    if tokens.dim() != 2 or len(tokens) != batch_size or tokens.shape[1] == 0:
        rule = f"have shape [batch, nodes] with batch {batch_size}"
        checks.fail_range(where, "tokens", rule, checks.shape_text(tokens.shape))
    checks.check_device(where, "tokens", tokens, device)
    shape, num_nodes = tuple(tokens.shape), tokens.shape[1]
    for name, part, dtypes in (("order", order, (torch.int64,)), ("batch_rows", batch_rows, INTEGERS)):
        if part is not None:
            checks.check_tensor(where, name, part)
            checks.check_dtype(where, name, part, *dtypes)
            checks.check_shape(where, name, part, shape, "batch, nodes")
            checks.check_device(where, name, part, device)
    if tokens.is_cpu:
        _check_nodes(where, "path.nodes", path.nodes, num_nodes)
        _check_counts(where, "path.num_accepted", path.num_accepted, path.nodes, 0)
        if order is not None:
            _check_range(where, "order", order, num_nodes)
    is_accepted = path.nodes >= 0
    nodes = path.nodes.clamp(min=0).to(torch.int64)
    rows = nodes if order is None else order.gather(1, nodes)
    if batch_rows is None:
        rows = rows + num_nodes * torch.arange(batch_size, device=device)[:, None]
    else:
        rows = batch_rows.gather(1, rows).to(torch.int64)
        if rows.is_cpu:  # those of nodes that are not accepted may be anything
            _check_range(where, "batch_rows", rows[is_accepted], batch_size * num_nodes)
    # Behind each accepted node comes the next one's token, behind the last one the bonus token.
    follow = torch.cat((tokens.gather(1, nodes)[:, 1:], path.next_token[:, None]), dim=1)
    follow.scatter_(1, (path.num_accepted.to(torch.int64) - 1)[:, None], path.next_token[:, None])
    predicts = torch.full((batch_size * num_nodes + 1,), -1, dtype=torch.int32, device=device)
    predicts[torch.where(is_accepted, rows, batch_size * num_nodes)] = follow.to(torch.int32)
    accept_index = torch.where(is_accepted, rows, -1).to(torch.int32)
    return AcceptedRows(predicts[:-1], accept_index, (path.num_accepted - 1).to(torch.int32))


def from_accepted_rows(rows: AcceptedRows, num_nodes: int, *, places: torch.Tensor | None = None) -> VerifiedPath:
    """Read a path that a server's verification accepted, as `compact_kv_cache_` takes it.

    Args:
        rows: predicts [B * N] or more, accept_index [B, levels] and accept_token_num [B], int32 or int64, rows being
            b * num_nodes + node.
        num_nodes: nodes of each request's tree.
        places: `RetrievedTree.places`, where the server's nodes stand in an order of its own. [B, N], int64.

    Returns:
        VerifiedPath(nodes, num_accepted, next_token), of as many levels as accept_index has columns.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; on a CPU also rows of another request, and counts other than those of the
            accepted rows but one.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> rows = AcceptedRows(torch.tensor([6, -1, 7]), torch.tensor([[0, 2, -1]]), torch.tensor([1]))
        >>> from_accepted_rows(rows, 3).nodes.tolist(), from_accepted_rows(rows, 3).next_token.tolist()
        ([[0, 2, -1]], [7])
    """
    where = "from_accepted_rows"
    if not isinstance(rows, AcceptedRows):
        raise TypeError(f"{where}: rows must be AcceptedRows, got {type(rows).__name__}")
    predicts, accept_index, accept_token_num = rows
    num_nodes = checks.whole_number(where, "num_nodes", num_nodes, rule=checks.at_least(1))
    _check_paths(where, "accept_index", accept_index)
    batch_size, device = len(accept_index), accept_index.device
    for name, part in (("predicts", predicts), ("accept_token_num", accept_token_num)):
        checks.check_tensor(where, name, part)
        checks.check_dtype(where, name, part, *INTEGERS)
        checks.check_device(where, name, part, device)
    checks.check_shape(where, "accept_token_num", accept_token_num, (batch_size,), "batch")
    if predicts.dim() != 1 or len(predicts) < batch_size * num_nodes:
        rule = f"have shape [rows] with at least {batch_size * num_nodes} rows"
        checks.fail_range(where, "predicts", rule, checks.shape_text(predicts.shape))
    if places is not None:
        checks.check_tensor(where, "places", places)
        checks.check_dtype(where, "places", places, torch.int64)
        checks.check_shape(where, "places", places, (batch_size, num_nodes), "batch, nodes")
        checks.check_device(where, "places", places, device)
    first_rows = num_nodes * torch.arange(batch_size, device=device)[:, None]
    if accept_index.is_cpu:
        within = torch.where(accept_index >= 0, accept_index - first_rows, accept_index)
        foreign = (accept_index < -1) | ((accept_index >= 0) & ((within < 0) | (within >= num_nodes)))
        if bool(foreign.any()):
            request = int(foreign.nonzero()[0, 0])
            rule = f"be -1 or rows {request * num_nodes} to {(request + 1) * num_nodes - 1} for request {request}"
            checks.fail_range(where, "accept_index", rule, int(accept_index[foreign][0]))
        _check_counts(where, "accept_token_num", accept_token_num, accept_index, 1)
    is_accepted, index = accept_index >= 0, accept_index.clamp(min=0).to(torch.int64)
    nodes = (index - first_rows).clamp(min=0)
    nodes = nodes if places is None else places.gather(1, nodes)
    last = index.gather(1, accept_token_num.to(torch.int64)[:, None])[:, 0]
    return VerifiedPath(
        torch.where(is_accepted, nodes, -1).to(torch.int32),
        (accept_token_num + 1).to(torch.int32),
        predicts[last].to(torch.int64),
    )


def _check_paths(where: str, name: str, paths: torch.Tensor) -> None:
    checks.check_tensor(where, name, paths)
    checks.check_dtype(where, name, paths, *INTEGERS)
    if paths.dim() != 2 or paths.shape[1] == 0:
        checks.fail_range(where, name, "have shape [batch, levels]", checks.shape_text(paths.shape))


def _check_range(where: str, name: str, values: torch.Tensor, size: int) -> None:
    """Raise ValueError unless values index a dimension of that size. Reads values."""
    outside = (values < 0) | (values >= size)
    if bool(outside.any()):
        checks.fail_range(where, name, f"be from 0 to {size - 1}", int(values[outside][0]))


def _check_nodes(where: str, name: str, nodes: torch.Tensor, num_nodes: int) -> None:
    """Raise ValueError unless nodes are the tree's, or -1. Reads values."""
    outside = (nodes < -1) | (nodes >= num_nodes)
    if bool(outside.any()):
        checks.fail_range(where, name, f"be from -1 to {num_nodes - 1}", int(nodes[outside][0]))


def _check_counts(where: str, name: str, counts: torch.Tensor, paths: torch.Tensor, uncounted: int) -> None:
    """Raise ValueError unless paths begin with as many nodes as are counted, and -1 fills the rest. Reads values."""
    is_accepted = torch.arange(paths.shape[1]) < counts[:, None] + uncounted
    wrong = (counts + uncounted < 1) | (counts + uncounted > paths.shape[1]) | ((paths >= 0) != is_accepted).any(dim=1)
    if bool(wrong.any()):
        request = int(wrong.nonzero()[0])
        rule = "count the nodes in front of the first -1" + (" but for the root" if uncounted else "")
        actual = f"{int(counts[request])} for {paths[request].tolist()} of request {request}"
        checks.fail_range(where, name, rule, actual)


def _linked_from(links: torch.Tensor) -> torch.Tensor:
    """Turn links round: who links to each node, -1 for nobody. [B, N] -> [B, N], int64."""
    batch_size, num_nodes = links.shape
    nodes = torch.arange(num_nodes, device=links.device).expand(batch_size, -1)
    nobody = torch.full((batch_size, num_nodes + 1), -1, dtype=torch.int64, device=links.device)
    targets = torch.where(links >= 0, links.to(torch.int64), num_nodes)
    return nobody.scatter_(1, targets, nodes)[:, :-1]


def _followed(links: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow links to their ends, all at once, in steps that double: where they end, and how many there are."""
    num_nodes = links.shape[1]
    nodes = torch.arange(num_nodes, device=links.device)
    ends, count = torch.where(links >= 0, links, nodes), (links >= 0).to(torch.int64)
    for _ in range((num_nodes - 1).bit_length()):
        count = count + count.gather(1, ends)
        ends = ends.gather(1, ends)
    return ends, count


def _check_links(where: str, next_token: torch.Tensor, next_sibling: torch.Tensor) -> None:
    """Raise ValueError unless the links of each request are lists of siblings below other nodes. Reads values."""
    num_nodes = next_token.shape[1]
    for name, links in (("next_token", next_token), ("next_sibling", next_sibling)):
        outside = (links < -1) | (links >= num_nodes)
        if bool(outside.any()):
            request, node = outside.nonzero()[0].tolist()
            actual = f"{int(links[request, node])} at node {node} of request {request}"
            checks.fail_range(where, name, f"be from -1 to {num_nodes - 1}", actual)
    links = torch.cat((next_token, next_sibling), dim=1).to(torch.int64)
    counts = torch.zeros(len(links), num_nodes + 1, dtype=torch.int64)
    counts.scatter_add_(1, torch.where(links >= 0, links, num_nodes), torch.ones_like(links))
    allowed = torch.ones(num_nodes, dtype=torch.int64)
    allowed[0] = 0
    if bool((counts[:, :-1] > allowed).any()):
        request, node = (counts[:, :-1] > allowed).nonzero()[0].tolist()
        rule = "link to every node but the root, and at most once"
        actual = f"{int(counts[request, node])} links to node {node} of request {request}"
        checks.fail_range(where, "next_token and next_sibling", rule, actual)
    # Every node has one link to it at most, so links that have no end run in a ring.
    link = torch.maximum(_linked_from(next_token), _linked_from(next_sibling))
    end, _ = _followed(link)
    endless = link.gather(1, end) >= 0
    if bool(endless.any()):
        request, node = endless.nonzero()[0].tolist()
        actual = f"a ring that holds node {int(end[request, node])} of request {request}"
        checks.fail_range(where, "next_token and next_sibling", "lead from the root to leaves", actual)
