"""Grammars on a tree: each node's logits are masked by what may come behind that node's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sequoia_kernels.decoding.dead_ends import DeadEnds
from sequoia_kernels.decoding.logits_hook import NodePaths

__all__ = ["GrammarHook", "GrammarMatcher"]


class GrammarMatcher(Protocol):
    """What follows a grammar token by token: the part of `xgrammar.GrammarMatcher` that a tree needs."""

    def accept_token(self, token_id: int) -> bool:
        """Go on by a token; False, and no change, where the grammar does not allow it."""

    def rollback(self, num_tokens: int = 1) -> None:
        """Take the last tokens back."""

    def is_terminated(self) -> bool:
        """Tell whether the end was accepted, so that nothing may follow."""

    def fill_next_token_bitmask(self, bitmask: torch.Tensor, index: int = 0) -> Any:
        """Set bit t % 32 of word t // 32 of `bitmask[index]`, int32 on the CPU, for each token that may follow."""


class GrammarHook:
    """A `logits_hook` that lets each request say only what its grammar allows. B requests.

    The output is distributed as if every token had been drawn from the masked logits, one by one. The draft's logits
    are masked as well, so that it proposes what the grammar allows. Matchers follow the new tokens; prompts are not
    looked at. What is fed back after the end (an EOS token that the grammar accepted) is left as it is.

    Args:
        matchers: one for each request, as they stand before the first new token. [B] A call of `generate` leaves them
            somewhere behind it: make new ones, or `reset` them, for the next.

    Raises:
        TypeError: a matcher lacks one of the four methods.
        ValueError: a batch of another size, or (while decoding) a token that the grammar does not allow, as where a
            stop token of `generate` is none of the matcher's, or a place where it allows none.

    Example:
        >>> class OnlyEven:  # a grammar of one's own: even tokens only
        ...     def accept_token(self, token_id):
        ...         return token_id % 2 == 0
        ...     def rollback(self, num_tokens=1):
        ...         pass
        ...     def is_terminated(self):
        ...         return False
        ...     def fill_next_token_bitmask(self, bitmask, index=0):
        ...         bitmask[index] = 0x55555555
        >>> from sequoia_kernels import TokenTree, generate
        >>> from sequoia_kernels.demo import load_demo_pair
        >>> pair = load_demo_pair()
        >>> prompt = pair.tokenizer("def main(", return_tensors="pt").input_ids
        >>> output = generate(
        ...     pair.target, pair.draft, prompt, tree=TokenTree([-1, 0, 0, 1]), max_new_tokens=8,
        ...     logits_hook=GrammarHook([OnlyEven()]),
        ... )
        >>> {token % 2 for token in output.new_tokens[0]}
        {0}
    """

    hooks_draft = True

    def __init__(self, matchers: Sequence[GrammarMatcher]) -> None:
        names = ("accept_token", "rollback", "is_terminated", "fill_next_token_bitmask")
        for matcher in matchers:
            missing = [name for name in names if not callable(getattr(matcher, name, None))]
            if missing:
                raise TypeError(f"GrammarHook: matchers must have {missing[0]}, got {type(matcher).__name__}")
        self.matchers = list(matchers)
        self._dead_ends = DeadEnds()
        self._starts: list[int] = []  # tokens of each prompt
        self._num_followed: list[int] = []  # new tokens that each matcher has seen

    def begin(self, prompt_lens: Sequence[int]) -> None:
        """Learn of a new batch: tokens of each prompt. [B]"""
        if len(prompt_lens) != len(self.matchers):
            raise ValueError(
                f"GrammarHook: matchers must be one for each of {len(prompt_lens)} requests, got {len(self.matchers)}"
            )
        self._starts = list(prompt_lens)
        self._num_followed = [0] * len(prompt_lens)

    def __call__(self, paths: NodePaths, logits: torch.Tensor) -> torch.Tensor:
        """Mask the logits; see `LogitsHook`."""
        vocab = logits.shape[2]
        wanted = list(range(paths.topology.num_nodes)) if paths.nodes is None else paths.nodes.tolist()
        masks = torch.full((len(self.matchers) * len(wanted), (vocab + 31) // 32), -1, dtype=torch.int32)
        all_tokens, all_lens = paths.tokens.tolist(), paths.history_lens.tolist()
        all_parents = torch.atleast_2d(paths.topology.parents).tolist()
        for request, is_active in enumerate(paths.active.tolist()):
            if not is_active:
                continue
            num_committed = all_lens[request] - self._starts[request]
            rows = {node: request * len(wanted) + place for place, node in enumerate(wanted)}
            if num_committed < 0:  # the prefill: its root is the prompt's last token
                self._fill(request, masks, rows[0], vocab, 0, [])
                continue
            self._follow(request, paths, num_committed, all_tokens[request][0])
            parents = all_parents[request if len(all_parents) > 1 else 0]
            self._visit(request, all_tokens[request], parents, rows, masks, vocab)
        bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1
        allowed = bits.bool().flatten(1)[:, :vocab].view(logits.shape)
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def check(self, request: int, new_tokens: Sequence[int]) -> None:
        """Raise ValueError where the newest tokens of a request lie behind a place where nothing was allowed."""
        num_new = self._dead_ends.reached(request, new_tokens)
        if num_new is not None:
            raise self._nothing_allowed(request, num_new)

    def _nothing_allowed(self, request: int, num_new: int) -> ValueError:
        return ValueError(
            f"GrammarHook: matchers must allow at least one token, that of request {request} allows none behind "
            f"{num_new} new tokens"
        )

    def _follow(self, request: int, paths: NodePaths, num_committed: int, root: int) -> None:
        """Move a matcher on by what was committed since."""
        start = self._starts[request]
        committed = paths.history[request, start : start + num_committed].tolist()
        self.check(request, [*committed, root])
        for token in committed[self._num_followed[request] :]:
            if not self.matchers[request].accept_token(token):
                place = self._num_followed[request]
                raise ValueError(
                    f"GrammarHook: token {token}, new token {place} of request {request}, must be one that the "
                    "grammar allows; is it a stop token that the matcher does not know?"
                )
            self._num_followed[request] += 1

    def _visit(
        self, request: int, tokens: list[int], parents: list[int], rows: dict[int, int], masks: torch.Tensor, vocab: int
    ) -> None:
        """Fill the masks of the nodes in `rows`: each node's token is accepted, and taken back behind its children."""
        needed = set(rows)
        children: dict[int, list[int]] = {}
        for node in range(max(rows), 0, -1):
            if node in needed and parents[node] >= 0:
                needed.add(parents[node])
                children.setdefault(parents[node], []).append(node)
        matcher = self.matchers[request]
        path: list[int] = []
        stack = [(0, False)]
        while stack:
            node, is_done = stack.pop()
            if is_done:
                matcher.rollback(1)
                path.pop()
            elif not matcher.is_terminated() and tokens[node] >= 0 and matcher.accept_token(tokens[node]):
                stack.append((node, True))
                path.append(tokens[node])
                if node in rows:
                    num_new = self._num_followed[request] + len(path)
                    self._fill(request, masks, rows[node], vocab, num_new, path)
                stack.extend((child, False) for child in children.get(node, ()))

    def _fill(self, request: int, masks: torch.Tensor, row: int, vocab: int, num_new: int, path: Sequence[int]) -> None:
        """Fill the mask behind so many new tokens, the last of which are the path; a dead end's stays full."""
        if self.matchers[request].is_terminated():
            return
        masks[row] = 0
        self.matchers[request].fill_next_token_bitmask(masks, row)
        if vocab % 32:
            masks[row, -1] &= (1 << vocab % 32) - 1
        if not bool(masks[row].any()):
            masks[row] = -1
            if not path:
                raise self._nothing_allowed(request, num_new)
            self._dead_ends.note(request, num_new, path)
