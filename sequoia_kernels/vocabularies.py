"""Maps between the vocabularies of a target and of a draft that knows some of its tokens, in an order of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sequoia_kernels import checks

__all__ = ["VocabularyMap"]


class VocabularyMap(NamedTuple):
    """Which token of a target each token of a draft is. V tokens of the target, Vd of the draft.

    Published drafts call it ``d2t`` (there as differences: id of the target less id of the draft). Tokens of the target
    that are none of these have probability 0 under the draft; it may still be given them as input.

    Attributes:
        draft_to_target: the target's id of every token of the draft, each at most once. [Vd] int64.
        target_to_draft: the draft's id of every token of the target, -1 of those that it does not know. [V] int32.

    Example:
        >>> VocabularyMap.of(torch.tensor([3, 0]), 5).target_to_draft.tolist()
        [1, -1, -1, 0, -1]
    """

    draft_to_target: Tensor
    target_to_draft: Tensor

    @classmethod
    def of(cls, draft_to_target: Tensor, vocab_size: int, *, where: str = "VocabularyMap.of") -> VocabularyMap:
        """Give the map with its inverse.

        Args:
            draft_to_target: the target's id of every token of the draft. [Vd] int64.
            vocab_size: width of the target's logits, V.
            where: function named in the messages.

        Raises:
            TypeError: draft_to_target is no int64 tensor.
            ValueError: it is not one-dimensional or empty, an id lies outside of 0..vocab_size - 1 or is there twice.

        Notes:
            Reads values: waits for the device.
        """
        checks.check_tensor(where, "draft_to_target", draft_to_target)
        checks.check_dtype(where, "draft_to_target", draft_to_target, torch.int64)
        vocab_size = checks.whole_number(where, "vocab_size", vocab_size, rule=checks.at_least(1))
        if draft_to_target.dim() != 1 or draft_to_target.numel() == 0:
            rule = "have shape [draft vocabulary], with at least one token"
            checks.fail_range(where, "draft_to_target", rule, checks.shape_text(draft_to_target.shape))
        low, high = (int(bound) for bound in draft_to_target.aminmax())
        if low < 0 or high >= vocab_size:
            rule = f"be in 0..{vocab_size - 1}, the target's tokens"
            checks.fail_range(where, "draft_to_target", rule, low if low < 0 else high)
        ordered = draft_to_target.sort().values
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.numel():
            checks.fail_range(where, "draft_to_target", "name each token once", f"token {int(repeated[0])} twice")
        return cls.unchecked(draft_to_target, vocab_size)

    @classmethod
    def unchecked(cls, draft_to_target: Tensor, vocab_size: int) -> VocabularyMap:
        """Give the map of ids that are known to be a target's, each once. Does not wait for the device."""
        target_to_draft = torch.full((vocab_size,), -1, dtype=torch.int32, device=draft_to_target.device)
        own = torch.arange(len(draft_to_target), dtype=torch.int32, device=draft_to_target.device)
        return cls(draft_to_target, target_to_draft.scatter_(0, draft_to_target, own))

    @property
    def vocab_size(self) -> int:
        """Width of the target's logits."""
        return self.target_to_draft.shape[0]

    @property
    def draft_vocab_size(self) -> int:
        """Width of the draft's."""
        return self.draft_to_target.shape[0]

    def to(self, device: torch.device | str) -> VocabularyMap:
        """Give the same map on a device."""
        return VocabularyMap(self.draft_to_target.to(device), self.target_to_draft.to(device))

    def widened(self, draft_logits: Tensor) -> Tensor:
        """Give rows of the draft's logits as rows of the target's: -inf for tokens that the draft does not know.

        Args:
            draft_logits: [..., Vd], floating point.

        Returns:
            [..., V], in the same dtype.
        """
        known = self.target_to_draft >= 0
        places = self.target_to_draft.clamp(min=0).to(torch.int64)
        return draft_logits.index_select(-1, places).masked_fill(~known, -torch.inf)
