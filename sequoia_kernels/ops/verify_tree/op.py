"""The contract of `verify_tree`: checks, dispatch and torch registration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops import backends
from sequoia_kernels.tree import TokenTree

__all__ = ["MAX_NODES", "VerifiedPath", "verify_tree"]

_OP = "verify_tree"
MAX_NODES = 1024


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
    tree: TokenTree,
    temperature: float | Tensor,
    seeds: int | Tensor,
    offsets: int | Tensor,
    *,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    out: VerifiedPath | tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> VerifiedPath:
    """Decide which path of a drafted token tree the target accepts, and draw the token behind it.

    The emitted tokens (the accepted nodes' tokens, then `next_token`) are distributed exactly as if the target had been
    sampled token by token, provided that every node's children were drawn by `sample_without_replacement` from its
    `draft_logits` at the same temperature, with noise of their own.

    Args:
        tokens: the token of every node, the last emitted one at node 0. [B, N], int64. -1 where none could be drawn.
        target_logits: the target's logits behind each node; -inf masks a token. [B, N, vocab], float32, bfloat16,
            float16 or float64, last dimension contiguous, the others strided at will.
        draft_logits: the draft's logits behind each node, from which its children were drawn; rows of leaves are never
            used and may hold anything. [B, N, vocab], dtype and layout as above. None for a tree of one node.
        tree: topology of the N nodes. At most 1024 nodes.
        temperature: 0, or at least 1e-5; 0 is greedy: a child is accepted iff it is the target's largest logit, lowest
            id on ties. Number, or [B] float32.
        seeds: the requests' random streams. Integer, or [B] int64.
        offsets: position in those streams; a pair of seed and offset must not be used twice. Integer, or [B] int64.
        top_k: the target is cut to its most probable tokens first; below 1 or from vocab on is off. Integer, or [B]
            int32.
        top_p: then to the smallest set of most probable tokens that holds this mass. Number, or [B] float32. In (0, 1].
        out: buffers to write into instead of new ones, of the shapes and dtypes of VerifiedPath, strided at will. They
            share no memory with one another or an input.
        backend: name of a backend, or "auto".
        debug: check values on a GPU too, which waits for it.

    Returns:
        VerifiedPath.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, layout or range is wrong; on a CPU or under `debug` if a row of target logits or
            of draft logits of a node with children holds NaN or +inf or only -inf, a token is outside the vocabulary,
            or a temperature or top_p is out of range. Nothing has been written then.
        BackendUnavailableError: the backend asked for cannot run this call.

    Notes:
        Mutates only `out`. No host sync unless `debug`; can be captured in a CUDA graph. The same inputs give the same
        path on every run. The draft is not cut by top_k and top_p: only the target's distribution is to be reproduced.
        A child that cannot have been drawn (-1, a repeat of an earlier sibling, a token the draft masks) is passed over
        as if it were not there. A token of target probability 0 is never emitted.

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
    if not isinstance(tree, TokenTree):
        raise TypeError(f"{_OP}: tree must be a TokenTree, got {type(tree).__name__}")
    checks.check_tensor(_OP, "tokens", tokens)
    checks.check_rows(_OP, "tokens", tokens, "batch, nodes")
    checks.check_tensor(_OP, "target_logits", target_logits)
    if draft_logits is not None:
        checks.check_tensor(_OP, "draft_logits", draft_logits)
    checks.check_options(_OP, backend, debug=debug)
    batch_size, device = tokens.shape[0], tokens.device
    temperature = checks.row_values(
        _OP, "temperature", temperature, batch_size, torch.float32, device, "batch", checks.TEMPERATURE
    )
    seeds = checks.row_values(_OP, "seeds", seeds, batch_size, torch.int64, device, "batch")
    offsets = checks.row_values(_OP, "offsets", offsets, batch_size, torch.int64, device, "batch")
    if top_k is not None:
        top_k = checks.row_values(_OP, "top_k", top_k, batch_size, torch.int32, device, "batch")
    if top_p is not None:
        top_p = checks.row_values(_OP, "top_p", top_p, batch_size, torch.float32, device, "batch", checks.TOP_P)
    if tree.num_nodes > MAX_NODES:
        checks.fail_range(_OP, "tree", f"have at most {MAX_NODES} nodes", tree.num_nodes)
    topology = tree.tensors(device)
    inputs = (
        tokens,
        target_logits,
        draft_logits,
        topology.first_child,
        topology.num_children,
        tree.num_levels,
        tree.max_branching,
        temperature,
        seeds,
        offsets,
        top_k,
        top_p,
        debug,
        backend,
    )
    if out is None:
        return VerifiedPath(*_operator(*inputs))
    if not isinstance(out, tuple) or len(out) != 3:
        raise TypeError(f"{_OP}: out must be a triple (nodes, num_accepted, next_token), got {type(out).__name__}")
    for name, buffer in zip(VerifiedPath._fields, out, strict=True):
        checks.check_tensor(_OP, f"out.{name}", buffer)
    _out_operator(*inputs, *out)
    return VerifiedPath(*out)


def _run(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    first_child: Tensor,
    num_children: Tensor,
    num_levels: int,
    max_branching: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    debug: bool,
    backend: str,
    nodes: Tensor | None = None,
    num_accepted: Tensor | None = None,
    next_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (
        tokens,
        target_logits,
        draft_logits,
        first_child,
        num_children,
        num_levels,
        max_branching,
        temperature,
        seeds,
        offsets,
        top_k,
        top_p,
    )
    outputs = (nodes, num_accepted, next_token)
    _check_structure(*inputs, *outputs)
    if nodes is not None:
        given = {"tokens": tokens, "target_logits": target_logits, "draft_logits": draft_logits}
        given |= {"first_child": first_child, "num_children": num_children, "temperature": temperature}
        given |= {"seeds": seeds, "offsets": offsets, "top_k": top_k, "top_p": top_p}
        buffers = {f"out.{name}": buffer for name, buffer in zip(VerifiedPath._fields, outputs)}
        checks.check_memory(_OP, buffers, given)
    chosen = backends.choose(_OP, backend, tokens.device.type, inputs)
    if debug or (tokens.is_cpu and not chosen.checks_values):
        _check_values(tokens, target_logits, draft_logits, num_children, temperature, top_p)
    return chosen.run(*inputs, *outputs)


def _run_out(*arguments: Any) -> None:
    _run(*arguments)


def _check_structure(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    first_child: Tensor,
    num_children: Tensor,
    num_levels: int,
    max_branching: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    nodes: Tensor | None = None,
    num_accepted: Tensor | None = None,
    next_token: Tensor | None = None,
) -> None:
    checks.check_dtype(_OP, "tokens", tokens, torch.int64)
    checks.check_rows(_OP, "tokens", tokens, "batch, nodes")
    device, batch_size, num_nodes = tokens.device, tokens.shape[0], first_child.shape[0]
    checks.check_shape(_OP, "tokens", tokens, (batch_size, num_nodes), "batch, nodes")
    checks.check_dtype(_OP, "target_logits", target_logits, *checks.FLOAT_DTYPES)
    checks.check_rows(_OP, "target_logits", target_logits, "batch, nodes, vocab")
    vocab = target_logits.shape[2]
    if vocab == 0:
        checks.fail_range(_OP, "target_logits", "have at least one token", checks.shape_text(target_logits.shape))
    shape = (batch_size, num_nodes, vocab)
    checks.check_shape(_OP, "target_logits", target_logits, shape, "batch, nodes, vocab")
    checks.check_device(_OP, "target_logits", target_logits, device)
    if draft_logits is not None:
        checks.check_dtype(_OP, "draft_logits", draft_logits, *checks.FLOAT_DTYPES)
        checks.check_rows(_OP, "draft_logits", draft_logits, "batch, nodes, vocab")
        if draft_logits.shape != shape:
            rule = f"have shape [batch, nodes, vocab] = {checks.shape_text(shape)}"
            fix = "; pad the draft's logits with -inf or slice them" if draft_logits.shape[2] != vocab else ""
            checks.fail_range(_OP, "draft_logits", rule, checks.shape_text(draft_logits.shape) + fix)
        checks.check_device(_OP, "draft_logits", draft_logits, device)
    elif num_nodes > 1:
        raise TypeError(f"{_OP}: draft_logits must be a tensor for a tree of {num_nodes} nodes, got None")
    checks.row_values(_OP, "temperature", temperature, batch_size, torch.float32, device, "batch")
    checks.row_values(_OP, "seeds", seeds, batch_size, torch.int64, device, "batch")
    checks.row_values(_OP, "offsets", offsets, batch_size, torch.int64, device, "batch")
    if top_k is not None:
        checks.row_values(_OP, "top_k", top_k, batch_size, torch.int32, device, "batch")
    if top_p is not None:
        checks.row_values(_OP, "top_p", top_p, batch_size, torch.float32, device, "batch")
    if nodes is not None:
        checks.check_out(_OP, "out.nodes", nodes, (batch_size, num_levels), torch.int32, device, "batch, levels")
        checks.check_out(_OP, "out.num_accepted", num_accepted, (batch_size,), torch.int32, device, "batch")
        checks.check_out(_OP, "out.next_token", next_token, (batch_size,), torch.int64, device, "batch")


def _check_values(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    num_children: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
) -> None:
    checks.check_temperature_values(_OP, temperature)
    if top_p is not None:
        checks.check_top_p_values(_OP, top_p)
    vocab = target_logits.shape[2]
    speculated = tokens[:, 1:]
    if speculated.numel() > 0:
        low, high = (int(bound) for bound in speculated.aminmax())
        if low < -1 or high >= vocab:
            worst = low if low < -1 else high
            checks.fail_range(_OP, "tokens", f"be in 0..{vocab - 1}, or -1 for none", worst)
    checks.check_logits(_OP, "target_logits", target_logits)
    if draft_logits is not None:
        # Rows of leaves may hold anything: their maxima are replaced by a number that passes.
        row_max = draft_logits.amax(dim=-1).masked_fill(num_children == 0, 0)
        checks.check_logits(_OP, "draft_logits", row_max[..., None])


def _fake(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    first_child: Tensor,
    num_children: Tensor,
    num_levels: int,
    max_branching: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    debug: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_structure(
        tokens,
        target_logits,
        draft_logits,
        first_child,
        num_children,
        num_levels,
        max_branching,
        temperature,
        seeds,
        offsets,
        top_k,
        top_p,
    )
    batch_size = tokens.shape[0]
    nodes = tokens.new_empty((batch_size, num_levels), dtype=torch.int32)
    return nodes, tokens.new_empty(batch_size, dtype=torch.int32), tokens.new_empty(batch_size)


def _fake_out(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    first_child: Tensor,
    num_children: Tensor,
    num_levels: int,
    max_branching: int,
    temperature: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    debug: bool,
    backend: str,
    nodes: Tensor,
    num_accepted: Tensor,
    next_token: Tensor,
) -> None:
    _check_structure(
        tokens,
        target_logits,
        draft_logits,
        first_child,
        num_children,
        num_levels,
        max_branching,
        temperature,
        seeds,
        offsets,
        top_k,
        top_p,
        nodes,
        num_accepted,
        next_token,
    )


backends.register_room(_OP, package=__package__)

_INPUTS = (
    "Tensor tokens, Tensor target_logits, Tensor? draft_logits, Tensor first_child, Tensor num_children, "
    "int num_levels, int max_branching, Tensor temperature, Tensor seeds, Tensor offsets, Tensor? top_k, "
    "Tensor? top_p, bool debug, str backend"
)
_operator = backends.define_operator(f"{_OP}({_INPUTS}) -> (Tensor, Tensor, Tensor)", run=_run, fake=_fake)
_out_operator = backends.define_operator(
    f"{_OP}.out({_INPUTS}, Tensor(a!) nodes, Tensor(b!) num_accepted, Tensor(c!) next_token) -> ()",
    run=_run_out,
    fake=_fake_out,
)
