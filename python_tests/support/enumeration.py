"""Every outcome of one speculative step on a tiny vocabulary, with its exact probability in float64."""

from __future__ import annotations

import itertools
import math

import torch
from support.toy_models import TableModel, chain_probs

from sequoia_kernels import TokenTree, VocabularyMap
from sequoia_kernels.ops.verify_tree.op import VerifyTreeInputs
from sequoia_kernels.ops.verify_tree.reference import node_decisions
from sequoia_kernels.ops.verify_tree.traversal import traversal_chances
from sequoia_kernels.ops.warping import warped_probs

__all__ = [
    "draft_outcomes",
    "emitted_by_outcomes",
    "emitted_distribution",
    "ordered_draws",
    "partial_outcomes",
    "proposed_token",
]


def ordered_draws(scaled_logits: list[float], count: int) -> list[tuple[tuple[int, ...], float]]:
    """List every ordered draw of `count` tokens without replacement from a softmax, with its probability.

    Tokens at -inf are never drawn; the draw ends in -1 once the others are used up.
    """
    support = [token for token, logit in enumerate(scaled_logits) if logit > -math.inf]
    draws = []
    for drawn in itertools.permutations(support, min(count, len(support))):
        probability = 1.0
        for place, token in enumerate(drawn):
            left = [scaled_logits[other] for other in support if other not in drawn[:place]]
            weights = [math.exp(logit - max(left)) for logit in left]
            probability *= math.exp(scaled_logits[token] - max(left)) / sum(weights)
        draws.append((drawn + (-1,) * (count - len(drawn)), probability))
    return draws


def draft_outcomes(
    tree: TokenTree, draft: TableModel, root: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """List every token tree that the draft can draw.

    Returns:
        (tokens [M, N], draft_logits [M, N, vocab] with NaN in the rows of leaves, probability [M]).
    """
    temperature = float(torch.tensor(temperature, dtype=torch.float32))
    tokens = torch.full((1, tree.num_nodes), root)
    probability = torch.ones(1, dtype=torch.float64)
    for node in range(tree.num_nodes):
        children = tree.children(node)
        if not children:
            continue
        logits = draft.logits(_path_tokens(tree, tokens, node))
        grown_tokens, grown_probability = [], []
        rows, row_of = torch.unique(logits, dim=0, return_inverse=True)
        for index, row in enumerate(rows):
            if temperature == 0:
                draws = [(_largest(row.tolist(), len(children)), 1.0)]
            else:
                draws = ordered_draws(((row - row.max()) / temperature).tolist(), len(children))
            for drawn, chance in draws:
                chosen = tokens[row_of == index].clone()
                chosen[:, children] = torch.tensor(drawn)
                grown_tokens.append(chosen)
                grown_probability.append(probability[row_of == index] * chance)
        tokens, probability = torch.cat(grown_tokens), torch.cat(grown_probability)
    draft_logits = torch.full((len(tokens), tree.num_nodes, draft.vocab), torch.nan, dtype=torch.float64)
    for node in range(tree.num_nodes):
        if tree.children(node):
            draft_logits[:, node] = draft.logits(_path_tokens(tree, tokens, node))
    return tokens, draft_logits, probability


def proposed_token(path: torch.Tensor, rank: int, vocab: int) -> torch.Tensor:
    """What the tests' source of certain children proposes: some function of the path and the rank. [M]."""
    return (path.sum(dim=1) * 2 + path[:, -1] + rank) % vocab


def partial_outcomes(
    tree: TokenTree,
    draft: TableModel,
    root: int,
    temperature: float,
    *,
    places: tuple[int, ...] = (),
    known: list[int] | None = None,
    excludes: bool = True,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None, list[int] | None]:
    """The same for a draft that knows some tokens only, some of whose children are certain.

    Args:
        tree, draft, root, temperature: as in `draft_outcomes`.
        places: ranks of the children that are certain.
        known: tokens of the target that the draft knows, in its order; None for all.
        excludes: whether the other children are drawn without those that are certain.

    Returns:
        (tokens, draft_logits, probability) as above, with rows of the draft's width; which nodes are certain [N], None
        for none; and `known`.
    """
    temperature = float(torch.tensor(temperature, dtype=torch.float32))
    ids = list(range(draft.vocab)) if known is None else known
    certain = torch.zeros(tree.num_nodes, dtype=torch.bool)
    states = [(torch.full((tree.num_nodes,), root), {}, 1.0)]
    for node in range(tree.num_nodes):
        children = tree.children(node)
        if not children:
            continue
        proposed = [rank for rank in range(len(children)) if rank in places]
        certain[[children[rank] for rank in proposed]] = True
        grown = []
        for tokens, rows, probability in states:
            path = _path_tokens(tree, tokens[None], node)
            tokens = tokens.clone()
            for rank in proposed:
                tokens[children[rank]] = proposed_token(path, rank, draft.vocab)[0]
            row = draft.logits(path)[0][ids].clone()
            if excludes:
                taken = {int(tokens[children[rank]]) for rank in proposed}
                row[[place for place, token in enumerate(ids) if token in taken]] = -math.inf
            if float(row.max()) == -math.inf:
                row[:] = 0.0  # a row must hold something: draws of it repeat what is certain, if any are made
            others = [child for rank, child in enumerate(children) if rank not in proposed]
            if temperature == 0:
                draws = [(_largest(row.tolist(), len(others)), 1.0)]
            else:
                draws = ordered_draws(((row - row.max()) / temperature).tolist(), len(others))
            for drawn, chance in draws:
                chosen = tokens.clone()
                chosen[others] = torch.tensor([ids[place] if place >= 0 else -1 for place in drawn], dtype=torch.int64)
                grown.append((chosen, rows | {node: row}, probability * chance))
        states = grown
    draft_logits = torch.full((len(states), tree.num_nodes, len(ids)), torch.nan, dtype=torch.float64)
    for outcome, (_, rows, _) in enumerate(states):
        for node, row in rows.items():
            draft_logits[outcome, node] = row
    tokens = torch.stack([tokens for tokens, _, _ in states])
    chances = torch.tensor([probability for _, _, probability in states], dtype=torch.float64)
    return (tokens, draft_logits, chances), certain if places else None, known


def emitted_distribution(
    tree: TokenTree,
    target: TableModel,
    draft: TableModel,
    root: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype = torch.float64,
    rule: str = "sequoia",
) -> torch.Tensor:
    """The exact distribution of the first `num_levels` tokens when one speculative step is followed by plain decoding.

    A step emits 1 to `num_levels` tokens; where it emits fewer, the rest comes from the target's conditionals. The
    draws are enumerated, the acceptances summed over with the package's own decision probabilities, which are computed
    from logits of the given dtype and summed in float64.

    Returns:
        Joint probabilities. [vocab] * num_levels.
    """
    outcomes = draft_outcomes(tree, draft, root, temperature)
    return emitted_by_outcomes(tree, target, outcomes, temperature, top_k, top_p, dtype, rule)


def emitted_by_outcomes(
    tree: TokenTree,
    target: TableModel,
    outcomes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype = torch.float64,
    rule: str = "sequoia",
    certain: torch.Tensor | None = None,
    known: list[int] | None = None,
) -> torch.Tensor:
    """The same for some outcomes of the draws, as `draft_outcomes` lists them: what they add to the distribution.

    `certain` nodes [N] and the tokens `known` to the draft are as `partial_outcomes` gives them.
    """
    tokens, draft_logits, probability = outcomes
    if known is not None:
        draft_logits = VocabularyMap.of(torch.tensor(known), target.vocab).widened(draft_logits)
    root = int(tokens[0, 0])
    num_outcomes, vocab = len(tokens), target.vocab
    per_row = [
        torch.full((num_outcomes,), value, dtype=dtype) if value is not None else None
        for value, dtype in ((temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32))
    ]
    target_logits = torch.stack([target.logits(_path_tokens(tree, tokens, node)) for node in range(tree.num_nodes)], 1)
    target_logits, draft_logits = target_logits.to(dtype), draft_logits.to(dtype)
    endings = {"sequoia": _sequoia_endings, "traversal": _traversal_endings}[rule]
    ends, residuals = endings(tree, tokens, target_logits, draft_logits, per_row, certain)
    emitted = [torch.zeros([vocab] * (level + 1), dtype=torch.float64) for level in range(tree.num_levels)]
    for node in range(tree.num_nodes):
        path = _path_tokens(tree, tokens, node)
        flat = torch.zeros(num_outcomes, dtype=torch.int64)
        for position in range(1, path.shape[1]):
            flat = flat * vocab + path[:, position]
        cells = (flat[:, None] * vocab + torch.arange(vocab)).flatten()
        chances = (probability * ends[:, node])[:, None] * residuals[:, node].double()
        emitted[path.shape[1] - 1].view(-1).index_add_(0, cells, chances.flatten())
    joint = emitted[0]
    conditionals = chain_probs(target, root, tree.num_levels, temperature, top_k, top_p)
    for level in range(1, tree.num_levels):
        joint = joint[..., None] * conditionals[level] + emitted[level]
    return joint


def _sequoia_endings(
    tree: TokenTree,
    tokens: torch.Tensor,
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    per_row: list,
    certain: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability of ending at each node [M, N], and the distribution of the next token there [M, N, vocab]."""
    ends = torch.zeros(tokens.shape, dtype=torch.float64)
    ends[:, 0] = 1
    residuals = torch.zeros_like(target_logits)
    for node in range(tree.num_nodes):
        children = tree.children(node)
        target_probs = warped_probs(target_logits[:, node], *per_row)
        node_draft = draft_logits[:, node] if children else torch.zeros_like(target_probs)
        of_children = () if certain is None else (certain[children].expand(len(tokens), -1),)
        decisions = node_decisions(target_probs, node_draft, tokens[:, children], per_row[0], *of_children)
        for rank, child in enumerate(children):
            accepted = decisions.acceptance()[:, rank].double()
            ends[:, child] = ends[:, node] * accepted
            ends[:, node] = ends[:, node] * (1 - accepted)
        residuals[:, node] = decisions.residual
    return ends, residuals


def _traversal_endings(
    tree: TokenTree,
    tokens: torch.Tensor,
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    per_row: list,
    certain: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the rule "traversal"."""
    nothing, shape = torch.zeros(len(tokens), dtype=torch.int64), tree.tensors()
    inputs = VerifyTreeInputs(
        tokens, target_logits, draft_logits if tree.num_nodes > 1 else None, shape.first_child, shape.num_children,
        shape.num_levels, shape.max_branching, per_row[0], nothing, nothing, *per_row[1:], "traversal", None, certain,
    )  # fmt: skip
    chances = traversal_chances(inputs)
    order = chances.turn.argsort(dim=1)
    chance = chances.chance.double().gather(1, order)
    failed = torch.cat((torch.ones(len(tokens), 1, dtype=torch.float64), (1 - chance).cumprod(dim=1)[:, :-1]), dim=1)
    return torch.zeros_like(chance).scatter_(1, order, chance * failed), chances.residual


def _largest(row: list[float], count: int) -> tuple[int, ...]:
    order = sorted(
        (token for token in range(len(row)) if row[token] > -math.inf), key=lambda token: (-row[token], token)
    )
    return tuple(order[:count]) + (-1,) * (count - len(order[:count]))


def _path_tokens(tree: TokenTree, tokens: torch.Tensor, node: int) -> torch.Tensor:
    """Tokens from the root to a node, -1 (never accepted) as 0. [M, N] -> [M, depth + 1]."""
    path = [node]
    while path[0] != 0:
        path.insert(0, tree.parents[path[0]])
    return tokens[:, path].clamp(min=0)
