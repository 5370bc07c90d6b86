"""sample_without_replacement against softmax + exponential race + topk, and softmax + multinomial.

GPU cases have the vocabulary of Llama-3 in bfloat16.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from bench.common.baselines import exponential_race
from bench.common.harness import Case, Provider, main, own_providers
from bench.common.workloads import VOCAB
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.rng import DRAFT_TAG, token_gumbel

OP = "sample_without_replacement"

# Keys are float32 sums of about 30 at most: an order that is off by more than a few roundings is wrong.
KEY_TOLERANCE = 2e-5


def _case(
    device: str, num_rows: int, vocab: int, num_samples: int, quick: bool, dtype: str, temperature: float = 0.6
) -> Case:
    greedy = ", greedy" if temperature == 0 else ""
    name = f"{num_samples} of {vocab}, {num_rows} row{'s' if num_rows > 1 else ''}{greedy}"
    sizes = {"num_rows": num_rows, "vocab": vocab, "num_samples": num_samples, "dtype": dtype}
    return Case(name, device, {**sizes, "temperature": temperature}, quick)


CASES = [
    _case("cpu", 2, 64, 4, True, "float32"),
    _case("cpu", 1, 32000, 8, True, "float32"),
    _case("cpu", 16, 32000, 4, True, "float32"),
    _case("cpu", 16, 32000, 4, True, "float32", temperature=0.0),
    _case("cpu", 16, 512, 4, False, "float32"),
    _case("cpu", 16, VOCAB, 16, False, "bfloat16"),
    _case("cuda", 64, VOCAB, 16, True, "bfloat16"),
    _case("cuda", 1, VOCAB, 16, True, "bfloat16"),
    _case("cuda", 64, VOCAB, 16, True, "bfloat16", temperature=0.0),
    *(
        _case("cuda", num_rows, vocab, num_samples, False, "bfloat16")
        for vocab in (32000, VOCAB)
        for num_rows in (1, 8, 64, 256)
        for num_samples in (1, 4, 16, 64)
        if (num_rows, vocab, num_samples) not in ((64, VOCAB, 16), (1, VOCAB, 16))
    ),
]


class Inputs(NamedTuple):
    logits: torch.Tensor  # [R, vocab]
    temperature: torch.Tensor  # [R] float32
    seeds: torch.Tensor  # [R] int64
    offsets: torch.Tensor  # [R] int64


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    num_rows = case["num_rows"]
    logits = 3 * torch.randn(num_rows, case["vocab"], generator=generator, device=device)
    return Inputs(
        logits.to(getattr(torch, case["dtype"])),
        torch.full((num_rows,), case["temperature"], device=device),
        torch.arange(num_rows, device=device) + 1000 * (seed + 1),
        torch.arange(num_rows, device=device),
    )


def bytes_moved(case: Case) -> int:
    """One read of the logits; tokens and normalisers are written."""
    itemsize = getattr(torch, case["dtype"]).itemsize
    return case["num_rows"] * (case["vocab"] * itemsize + 8 * case["num_samples"] + 4)


def expected(case: Case, inputs: Inputs) -> torch.Tensor:
    """Every token's key in float64, from the very noise that the op defines: the draws are the largest, in order."""
    logits = inputs.logits.double()
    if case["temperature"] == 0:
        return logits
    noise = token_gumbel(inputs.seeds, inputs.offsets, case["vocab"], DRAFT_TAG)
    return logits / inputs.temperature.double()[:, None] + noise.double()


def mismatch(case: Case, inputs: Inputs, expected: torch.Tensor, result: torch.Tensor) -> str | None:
    problem = _not_a_draw(case, inputs, expected, result)
    if problem is not None:
        return problem
    keys = expected.gather(1, result)
    best = expected.topk(case["num_samples"], dim=-1).values
    worst = float((best - keys).abs().max())
    return None if worst <= KEY_TOLERANCE else f"a drawn key is {worst:.2e} away from the one that belongs there"


def _not_a_draw(case: Case, inputs: Inputs, expected: torch.Tensor, result: torch.Tensor) -> str | None:
    """For those who draw with noise of their own: different tokens of the vocabulary in every row."""
    shape = (case["num_rows"], case["num_samples"])
    if tuple(result.shape) != shape:
        return f"shape {list(result.shape)} instead of {list(shape)}"
    ordered = result.sort(dim=1).values
    if bool((ordered < 0).any()) or bool((ordered >= case["vocab"]).any()):
        return "a token is outside the vocabulary"
    return "a row repeats a token" if bool((ordered[:, 1:] == ordered[:, :-1]).any()) else None


def _race(case: Case, inputs: Inputs) -> Any:
    if case["temperature"] == 0:
        return lambda: torch.topk(inputs.logits, case["num_samples"], dim=-1).indices
    return lambda: exponential_race(inputs.logits, case["num_samples"], inputs.temperature)


def _race_with_given_noise(case: Case, inputs: Inputs) -> torch.Tensor:
    if case["temperature"] == 0:
        return _race(case, inputs)()
    noise = token_gumbel(inputs.seeds, inputs.offsets, case["vocab"], DRAFT_TAG)
    return exponential_race(inputs.logits, case["num_samples"], inputs.temperature, race=torch.exp(-noise))


def _multinomial(case: Case, inputs: Inputs) -> Any:
    if case["temperature"] == 0:
        return _race(case, inputs)

    def call() -> torch.Tensor:
        probs = torch.softmax(inputs.logits.float() / inputs.temperature[:, None], dim=-1)
        return torch.multinomial(probs, case["num_samples"])

    return call


def _own(case: Case, inputs: Inputs, backend: str) -> Any:
    arguments = (inputs.logits, case["num_samples"], *inputs[1:])
    return lambda: sample_without_replacement(*arguments, backend=backend).tokens


def _read_once(case: Case, inputs: Inputs) -> Any:
    return lambda: inputs.logits.amax(dim=-1)


PROVIDERS = {
    **own_providers(OP, _own),
    "softmax + race + topk": Provider(
        _race, gate=_race_with_given_noise, note="draws its own exponential noise; no normaliser; greedy: torch.topk"
    ),
    "softmax + multinomial": Provider(
        _multinomial, mismatch=_not_a_draw, note="torch.multinomial without replacement; greedy: torch.topk"
    ),
    "one read of the logits": Provider(
        _read_once, mismatch=lambda *_: None, note="torch.amax over each row, for scale; it draws nothing"
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
