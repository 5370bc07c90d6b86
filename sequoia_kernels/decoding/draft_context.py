"""Which of a request's tokens the draft sees, where the request may grow beyond the draft's positions."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sequoia_kernels.decoding.arguments import GenerationArguments
from sequoia_kernels.decoding.request import Request
from sequoia_kernels.drafts import DraftSource

logger = logging.getLogger("sequoia_kernels")


class DraftContext:
    """Restarts the draft with a request's newest tokens whenever its positions are used up.

    The draft only guesses, so the output does not depend on what it sees; how well it guesses does. Keys of dropped
    tokens cannot simply be left out, since those behind them were computed from them: half of the positions are filled
    again, and the other half is decoded into. When that happens follows from the request's own tokens alone.

    Args:
        positions: positions of the draft.
        num_levels: levels of the deepest tree that is decoded with.
        lag: steps that are launched before the tokens of one are read.
        num_requests: requests in the batch.
    """

    def __init__(self, positions: int, num_levels: int, lag: int, num_requests: int) -> None:
        self.positions, self.lag = positions, lag
        self.num_kept = max(1, positions // 2)
        # A step feeds the draft up to num_levels - 1 positions behind the committed ones, and those in flight commit up
        # to num_levels tokens each. Where trees are that deep, a quarter of the positions serves a context at least.
        self.longest = max(positions - (1 + lag) * num_levels + 1, positions - max(1, positions // 4))
        self.num_restarts = 0
        self._num_dropped = [0] * num_requests
        self._due: dict[int, int] = {}  # request: the step before which its context is restarted

    @classmethod
    def where_needed(
        cls, draft: DraftSource, arguments: GenerationArguments, num_levels: int, lag: int
    ) -> DraftContext | None:
        """Give the contexts of a batch, or None where every request fits the draft's positions as it is."""
        positions = draft.positions
        if positions is None:
            return None
        context = cls(positions, num_levels, lag, arguments.batch_size)
        return context if arguments.longest > context.longest else None

    def tokens(self, index: int, request: Request) -> list[int]:
        """Give what the draft's context of a request begins with: all committed tokens, or the newest ones."""
        committed = request.committed
        self._due.pop(index, None)
        if len(committed) - self._num_dropped[index] > self.longest:
            if not self.num_restarts:
                logger.info("the draft's %d positions are used up: it goes on with the newest tokens", self.positions)
            self.num_restarts += 1
            self._num_dropped[index] = len(committed) - self.num_kept
        return committed[self._num_dropped[index] :]

    def note(self, index: int, request: Request, step: int) -> None:
        """Take notice of a request's length after a step was read.

        A restart takes all tokens of the steps before it. One step may be in flight when its need is seen, or none, for
        reasons that lie with other requests; so it always waits for as many steps as could be.
        """
        if request.committed_len - self._num_dropped[index] > self.longest:
            self._due.setdefault(index, step + 1 + self.lag)

    def due(self, requests: Sequence[Request], step: int) -> list[int]:
        """Tell whose context must be restarted before a step."""
        return [index for index, when in sorted(self._due.items()) if when <= step and requests[index].is_active]
