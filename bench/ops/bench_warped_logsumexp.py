"""warped_logsumexp against the sort-based warpers of generation libraries.

GPU cases have the vocabulary of Llama-3 in bfloat16.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import NamedTuple

import torch

from bench.common.baselines import sort_and_mask
from bench.common.harness import Case, Provider, main, own_providers
from bench.common.workloads import VOCAB
from sequoia_kernels.ops import warped_logsumexp

OP = "warped_logsumexp"

MASS_TOLERANCE = 1e-5  # float32 sums over a vocabulary
WARPS = {"no warp": (None, None), "top-k": (50, None), "top-p": (None, 0.9), "top-k, top-p": (50, 0.9)}


def _case(device: str, num_rows: int, vocab: int, warp: str, quick: bool, dtype: str) -> Case:
    sizes = {"num_rows": num_rows, "vocab": vocab, "warp": warp, "dtype": dtype, "temperature": 0.6}
    return Case(f"{num_rows} x {vocab}, {warp}", device, sizes, quick)


CASES = [
    _case("cpu", 2, 64, "top-p", True, "float32"),
    *(_case("cpu", 16, 32000, warp, True, "float32") for warp in ("no warp", "top-p")),
    *(_case("cpu", 64, VOCAB, warp, False, "bfloat16") for warp in WARPS),
    *(_case("cuda", 64, VOCAB, warp, warp in ("no warp", "top-p"), "bfloat16") for warp in WARPS),
    *(_case("cuda", num_rows, VOCAB, "top-p", False, "bfloat16") for num_rows in (1, 8, 256, 1024)),
]


class Inputs(NamedTuple):
    logits: torch.Tensor  # [R, vocab]
    temperature: torch.Tensor  # [R] float32
    top_k: torch.Tensor | None  # [R] int32
    top_p: torch.Tensor | None  # [R] float32


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    num_rows = case["num_rows"]
    logits = 3 * torch.randn(num_rows, case["vocab"], generator=generator, device=device)
    top_k, top_p = WARPS[case["warp"]]
    return Inputs(
        logits.to(getattr(torch, case["dtype"])),
        torch.full((num_rows,), case["temperature"], device=device),
        None if top_k is None else torch.full((num_rows,), top_k, dtype=torch.int32, device=device),
        None if top_p is None else torch.full((num_rows,), top_p, device=device),
    )


def bytes_moved(case: Case) -> int:
    """One read of the logits, two numbers a row written."""
    return case["num_rows"] * (case["vocab"] * getattr(torch, case["dtype"]).itemsize + 8)


def expected(case: Case, inputs: Inputs) -> torch.Tensor:
    """The logits in float64: a result is judged by the rules of top-k and top-p themselves."""
    return inputs.logits.double()


def mismatch(
    case: Case,
    inputs: Inputs,
    expected: torch.Tensor,
    result: tuple[torch.Tensor, torch.Tensor],
    splits_ties: bool = False,
) -> str | None:
    """Check that the cut is where the rules put it, and that the normaliser is that of the tokens above it."""
    log_normaliser, cut = (part.double()[:, None] for part in result)
    top_k, top_p = WARPS[case["warp"]]
    temperature = inputs.temperature.double()[:, None]
    above, kept = expected > cut, expected >= cut
    smallest_kept = expected.masked_fill(~kept, torch.inf).amin(dim=1, keepdim=True)
    if not torch.equal(smallest_kept, cut):
        return "a cut is not one of the row's logits"
    if top_k is None and top_p is None and not bool(kept.all()):
        return "a token was cut though no warp is on"
    if top_k is not None and bool((above.sum(dim=1) >= top_k).any()):
        return f"a row keeps a token that {top_k} larger ones push out"
    if top_p is not None:
        scaled = expected / temperature
        if top_k is not None:
            floor = expected.topk(top_k, dim=1).values[:, -1:]
            scaled = scaled.masked_fill(expected < floor, -torch.inf)
        probs = scaled.softmax(dim=1)
        larger, all_kept = ((probs * mask).sum(dim=1) for mask in (above, kept))
        if bool((larger >= top_p + MASS_TOLERANCE).any()) or bool((all_kept < top_p - MASS_TOLERANCE).any()):
            return f"a cut does not keep {top_p} of the probability"
    elif top_k is not None and bool((kept.sum(dim=1) < top_k).any()):
        return f"a row keeps fewer than {top_k} tokens"
    log_sum = (expected / temperature).masked_fill(~kept, -math.inf).logsumexp(dim=1, keepdim=True)
    error = float((log_sum - log_normaliser).abs().max())
    bound = 0.05 if splits_ties else 2e-5
    return None if error <= bound else f"a normaliser is off by {error:.2e}, at most {bound:g} is right"


def _sorted(case: Case, inputs: Inputs) -> object:
    warps = WARPS[case["warp"]]
    return lambda: sort_and_mask(inputs.logits, inputs.temperature, *warps)


PROVIDERS = {
    **own_providers(OP, lambda case, inputs, backend: lambda: warped_logsumexp(*inputs, backend=backend)),
    "sort and mask": Provider(
        _sorted,
        mismatch=partial(mismatch, splits_ties=True),
        note="as in transformers; tokens of equal logits at the cut are told apart by the sort, so its sum is smaller",
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
