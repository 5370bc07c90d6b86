"""Outputs of an engine with trees against plain vLLM's."""

from __future__ import annotations

from typing import Any

__all__ = ["assert_same"]

LOGPROB_TOLERANCE = 1e-3  # of products over other numbers of rows, in float32


def assert_same(expected: list[dict[str, Any]], got: list[dict[str, Any]], where: str) -> None:
    """Fail where a request's tokens are others, or its logprobs are."""
    assert len(expected) == len(got)
    for index, (old, new) in enumerate(zip(expected, got)):
        if old["tokens"] != new["tokens"]:
            pairs = [*zip(old["tokens"], new["tokens"])]
            place = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
            raise AssertionError(
                f"{where}, request {index}: another text from token {place} of {len(old['tokens'])} on: "
                f"{new['tokens'][place : place + 8]} instead of {old['tokens'][place : place + 8]}"
            )
        assert old["finish_reason"] == new["finish_reason"], f"{where}, request {index}"
        assert (old["logprobs"] is None) == (new["logprobs"] is None), f"{where}, request {index}"
        for place, (a, b) in enumerate(zip(old["logprobs"] or (), new["logprobs"] or (), strict=True)):
            assert a.keys() == b.keys(), f"{where}, request {index}, logprobs at {place}"
            furthest = max(abs(a[token] - b[token]) for token in a)
            assert furthest <= LOGPROB_TOLERANCE, f"{where}, request {index}, logprobs at {place}: off by {furthest}"
