"""sample_without_replacement: the draws themselves, their edges and what is refused.

That the draws are distributed as draws without replacement is tested in test_lossless.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.buffers import Unchanged
from support.op_backends import op_backends
from support.operators import check_fake_matches_real
from support.tolerances import LOG_NORMALISER, assert_close

from sequoia_kernels.ops import SampledTokens, sample_without_replacement
from sequoia_kernels.rng import DRAFT_TAG, token_gumbel

INF = math.inf


@pytest.fixture(params=op_backends("sample_without_replacement"))
def backend(request):
    return request.param


def _random_logits(num_rows, vocab, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab, generator=generator) * 3).to(dtype)


def _expected_draws(logits, num_samples, temperature, seeds, offsets):
    """Draws row by row: sort (key, token) pairs in Python."""
    noise = token_gumbel(seeds, offsets, logits.shape[1], DRAFT_TAG)
    rows = []
    for row in range(len(logits)):
        keys = logits[row].double()
        if temperature[row] > 0:
            keys = keys / temperature[row].double() + noise[row].double()
        ranked = sorted((-key, token) for token, key in enumerate(keys.tolist()) if key > -INF)
        drawn = [token for _, token in ranked[:num_samples]]
        rows.append(drawn + [-1] * (num_samples - len(drawn)))
    return torch.tensor(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("vocab", "num_samples"), [(1, 1), (2, 2), (13, 4), (64, 64), (257, 128), (1031, 7)])
def test_draws_are_the_largest_keys_in_order(backend, vocab, num_samples, dtype):
    if not backend.at_scale and dtype == torch.float16:
        pytest.skip("interpreted kernels run fewer cases of this grid")
    num_rows = 6
    logits = _random_logits(num_rows, vocab, dtype=dtype)
    temperature = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0, 2.5])
    seeds, offsets = torch.tensor([0, 1, -1, 2**40 + 3, 5, 5]), torch.tensor([0, 9, 2**33, 2, 3, 4])
    expected = _expected_draws(logits, num_samples, temperature, seeds, offsets)
    drawn = backend(logits, num_samples, temperature, seeds, offsets)
    assert drawn.tokens.dtype == torch.int64
    assert torch.equal(drawn.tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_temperatures_leave_the_noise_as_it_is(backend, dtype):
    """Logits that differ by a few units in the last place or not at all, at the peak and far below it."""
    num_rows = 512 if backend.at_scale else 24
    logits = 20 + torch.randint(4, (num_rows, 6), generator=torch.Generator().manual_seed(0)) * 2.0**-19
    logits = torch.cat([logits, logits - 9, torch.full((num_rows, 1), 100.0)], dim=1).to(dtype)
    temperature = torch.tensor([1e-5, 1e-4]).repeat(num_rows // 2)
    seeds, offsets = torch.arange(num_rows), torch.full((num_rows,), 3)
    expected = _expected_draws(logits, 9, temperature, seeds, offsets)
    assert torch.equal(backend(logits, 9, temperature, seeds, offsets).tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_beyond_float32_keep_their_order(backend, dtype):
    logits = torch.full((1, 200), -3e38)
    logits[0, [3, 70, 150]] = torch.tensor([1e38, 3e38, 2e38])
    for num_samples in (1, 2, 4):
        tokens = backend(logits.to(dtype), num_samples, 1e-5, 0, 0).tokens
        assert tokens.tolist() == [[70, 150, 3, -1][:num_samples]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_normaliser_is_the_log_sum_exp(backend, dtype):
    logits = _random_logits(4, 97, dtype=dtype)
    logits[1, ::2] = -INF
    temperature = torch.tensor([0.3, 1.0, 2.0, 0.0])
    result = backend(logits, 3, temperature, 1, 2).log_normaliser
    expected = torch.stack([(row.double() / t.double()).logsumexp(0) for row, t in zip(logits[:3], temperature)])
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result[:3], expected, LOG_NORMALISER, dtype)
    assert result[3] == logits[3].max()


def test_ties_are_taken_by_rising_token(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 2.0]])
    assert backend(logits, 6, 0.0, 1, 1).tokens.tolist() == [[1, 2, 4, 5, 0, 3]]
    # 300 tokens of one value: a selection that is not stable shows
    assert backend(torch.zeros(2, 300), 128, 0.0, 1, 1).tokens.tolist() == [list(range(128))] * 2


def test_a_row_with_too_few_tokens_ends_in_minus_one(backend):
    logits = torch.full((3, 9), -INF)
    logits[0, 4] = 0.0
    logits[1, [2, 7]] = torch.tensor([1.0, 5.0])
    logits[2] = 0.0
    for temperature in (0.0, 0.7):
        tokens = backend(logits, 12, temperature, 3, 4).tokens
        assert tokens[0].tolist() == [4] + [-1] * 11
        assert sorted(tokens[1, :2].tolist()) == [2, 7] and tokens[1, 2:].tolist() == [-1] * 10
        assert sorted(tokens[2, :9].tolist()) == list(range(9)) and tokens[2, 9:].tolist() == [-1] * 3


def test_a_draw_never_repeats_a_token_however_peaked_the_row(backend):
    logits = torch.zeros(4, 128)
    logits[:, 5] = torch.tensor([20.0, 200.0, 1e4, 6e4])
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if backend.at_scale else (torch.float16,):
        for temperature in (0.05, 1.0):
            tokens = backend(logits.to(dtype), 128, temperature, 3, 4).tokens
            assert tokens.sort(dim=1).values.tolist() == [list(range(128))] * 4
            assert tokens[:, 0].tolist() == [5] * 4


def test_a_row_depends_on_its_own_inputs_only(backend):
    logits = _random_logits(5, 50)
    seeds, offsets, temperature = torch.arange(5), torch.arange(10, 15), torch.tensor([0.5, 1.0, 0.0, 2.0, 0.7])
    together = backend(logits, 6, temperature, seeds, offsets)
    for row in range(5):
        alone = backend(logits[row : row + 1], 6, *(x[row : row + 1] for x in (temperature, seeds, offsets)))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        backend.assert_same_row(alone.log_normaliser[0], together.log_normaliser[row])


def test_more_samples_extend_a_draw(backend):
    logits = _random_logits(3, 40)
    longest = backend(logits, 40, 1.0, 8, 9).tokens
    for num_samples in (1, 2, 7, 39):
        assert torch.equal(backend(logits, num_samples, 1.0, 8, 9).tokens, longest[:, :num_samples])


def test_numbers_stand_for_the_same_value_in_every_row(backend):
    logits = _random_logits(3, 20)
    numbers = backend(logits, 4, 0.5, 7, 11)
    tensors = backend(logits, 4, torch.full((3,), 0.5), torch.full((3,), 7), torch.full((3,), 11))
    assert torch.equal(numbers.tokens, tensors.tokens)
    integer_temperature = backend(logits, 4, 1, 7, 11)
    assert torch.equal(integer_temperature.tokens, backend(logits, 4, 1.0, 7, 11).tokens)


def test_rows_may_be_strided(backend):
    full = _random_logits(6, 80)
    for view in (full[::2, 8:40], full[:, ::1][2:5, :33], full[1:2].expand(3, 80)):
        contiguous = view.contiguous()
        on_device = full.to(backend.device)
        strided = on_device.as_strided(view.shape, view.stride(), view.storage_offset())
        result = backend(strided, 5, 0.8, 1, 2)
        expected = backend(contiguous, 5, 0.8, 1, 2)
        assert torch.equal(result.tokens, expected.tokens)


def test_out_is_written_and_nothing_beside_it(backend):
    logits = _random_logits(3, 30)
    expected = backend(logits, 4, 0.9, 1, 2)
    tokens = torch.full((3, 8), -77, device=backend.device)
    normalisers = torch.full((3, 2), -77.0, device=backend.device)
    out = SampledTokens(tokens[:, 2:6], normalisers[:, 1])
    result = backend(logits.to(backend.device), 4, 0.9, 1, 2, out=out, raw=True)
    assert result.tokens is out.tokens and result.log_normaliser is out.log_normaliser
    assert torch.equal(out.tokens.cpu(), expected.tokens)
    assert torch.equal(out.log_normaliser.cpu(), expected.log_normaliser)
    assert bool((tokens[:, [0, 1, 6, 7]] == -77).all()) and bool((normalisers[:, 0] == -77).all())


def test_buffers_that_share_memory_are_refused(backend):
    device = backend.device
    logits, seeds = _random_logits(3, 30).to(device), torch.arange(12, device=device).reshape(3, 4)
    tokens, normalisers = torch.full((3, 4), -77, device=device), torch.full((3, 2), -77.0, device=device)
    for out, message in (
        ((tokens, tokens.view(torch.float32)[:, 3]), "out.tokens must share no memory with out.log_normaliser"),
        ((tokens, logits[:, 7]), "out.log_normaliser must share no memory with logits"),
        ((seeds, normalisers[:, 0]), "out.tokens must share no memory with seeds"),
        ((tokens, normalisers[:1, 0].expand(3)), "out.log_normaliser must have memory of its own for each element"),
        ((tokens[:1].expand(3, 4), normalisers[:, 0]), "out.tokens must have memory of its own for each element"),
    ):
        with Unchanged(logits, seeds, tokens, normalisers), pytest.raises(ValueError, match=message):
            backend(logits, 4, 0.9, seeds[:, 1], 2, out=out, raw=True)


def test_inputs_are_not_changed(backend):
    inputs = [
        tensor.to(backend.device)
        for tensor in (_random_logits(3, 30), torch.tensor([0.0, 1.0, 2.0]), torch.arange(3), torch.arange(3))
    ]
    copies = [tensor.clone() for tensor in inputs]
    backend(inputs[0], 4, *inputs[1:])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies))


def test_no_rows_give_no_draws(backend):
    result = backend(torch.zeros(0, 7), 3, 1.0, 1, 1)
    assert result.tokens.shape == (0, 3) and result.log_normaliser.shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.0, math.nan, 1.0], r"logits must hold neither NaN nor \+inf, got nan in row \[1\]"),
        ([0.0, INF, 1.0], r"logits must hold neither NaN nor \+inf, got inf in row \[1\]"),
        ([-INF, -INF, -INF], r"logits must have a finite entry in every row, got only -inf in row \[1\]"),
    ],
)
def test_bad_logits_are_refused_before_anything_is_written(backend, row, message, temperature):
    logits = torch.tensor([[0.0, 1.0, 2.0], row])
    out = (torch.full((2, 2), -77, device=backend.device), torch.full((2,), -77.0, device=backend.device))
    with pytest.raises(ValueError, match=f"sample_without_replacement: {message}"):
        backend(logits, 2, temperature, 1, 1, out=out, debug=True)
    assert bool((out[0] == -77).all()) and bool((out[1] == -77).all())


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, 1e-6, math.nan, INF])
def test_bad_temperatures_are_refused(backend, temperature):
    for value in (temperature, torch.tensor([1.0, temperature])):
        with pytest.raises(ValueError, match="sample_without_replacement: temperature must be 0 or a finite number"):
            backend(torch.zeros(2, 5), 2, value, 1, 1, debug=True)


def test_rows_that_share_their_noise_are_refused_under_debug(backend):
    logits, temperature = _random_logits(5, 9), torch.tensor([1.0, 0.5, 1.0, 1.0, 0.7])
    seeds, offsets = torch.tensor([3, 3, 4, 3, 3]), torch.tensor([7, 8, 8, 8, 9])
    buffers = torch.full((5, 2), -77, device=backend.device), torch.full((5,), -77.0, device=backend.device)
    message = (
        r"^sample_without_replacement: offsets must differ between rows of one seed above temperature 0, "
        r"got offset 8 of seed 3 in rows \[1, 3\], which would share their noise; pass one offset a node"
    )
    with pytest.raises(ValueError, match=message):
        backend(logits, 2, temperature, seeds, offsets, out=buffers, debug=True)
    assert bool((buffers[0] == -77).all()) and bool((buffers[1] == -77).all())
    # Off unless asked for, and nothing to refuse where streams differ or no noise is drawn.
    backend(logits, 2, temperature, seeds, offsets)
    temperature[3] = 0.0
    checked = backend(logits, 2, temperature, seeds, offsets, debug=True)
    assert torch.equal(checked.tokens, backend(logits, 2, temperature, seeds, offsets).tokens)
    assert backend(logits, 2, 0.0, 1, 1, debug=True).tokens.shape == (5, 2)
    with pytest.raises(ValueError, match=r"in rows \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\], which"):
        backend(_random_logits(9, 9), 2, 1.0, 1, 1, debug=True)


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "logits must be a tensor, got list", {"logits": [[0.0]]}),
        (TypeError, "logits must have dtype .*, got int64", {"logits": LOGITS.long()}),
        (ValueError, r"logits must have shape \[rows, vocab\], got \[5\]", {"logits": LOGITS[0]}),
        (ValueError, "logits must be contiguous in its last dimension", {"logits": torch.zeros(5, 2).t()}),
        (ValueError, r"logits must have at least one token, got \[2, 0\]", {"logits": LOGITS[:, :0]}),
        (TypeError, "num_samples must be an integer, got float", {"num_samples": 2.0}),
        (TypeError, "num_samples must be an integer, got bool", {"num_samples": True}),
        (ValueError, "num_samples must fit into int64, got an integer of 1329 bits", {"num_samples": 10**400}),
        (ValueError, r"num_samples must be in 1..128, got 0", {"num_samples": 0}),
        (ValueError, r"num_samples must be in 1..128, got 129", {"num_samples": 129}),
        (TypeError, "temperature must be a number or a tensor", {"temperature": "hot"}),
        (ValueError, "temperature must fit into float32, got 1e[+]39", {"temperature": 1e39}),
        (ValueError, "temperature must fit into float32, got a number beyond float64", {"temperature": 10**400}),
        (ValueError, "temperature must be 0 or a finite number of at least 1e-05, got 1e-46", {"temperature": 1e-46}),
        (TypeError, "temperature must have dtype float32, got float64", {"temperature": torch.ones(2).double()}),
        (ValueError, r"temperature must have shape \[rows\] = \[2\], got \[3\]", {"temperature": torch.ones(3)}),
        (TypeError, "seeds must be an integer or a tensor", {"seeds": 1.5}),
        (TypeError, "seeds must have dtype int64, got int32", {"seeds": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, "seeds must fit into int64", {"seeds": 2**63}),
        (ValueError, r"offsets must have shape \[rows\] = \[2\], got \[1, 2\]", {"offsets": torch.zeros(1, 2).long()}),
        (ValueError, "offsets must be on cpu, got meta", {"offsets": torch.zeros(2, dtype=torch.int64, device="meta")}),
        (TypeError, "out must be a pair", {"out": torch.zeros(2, 3).long()}),
        (TypeError, "out.tokens must be a tensor", {"out": ([], torch.zeros(2))}),
        (TypeError, "out.tokens must have dtype int64", {"out": (torch.zeros(2, 3), torch.zeros(2))}),
        (ValueError, r"out.tokens must have shape .* = \[2, 3\]", {"out": (torch.zeros(2, 4).long(), torch.zeros(2))}),
        (
            TypeError,
            "out.log_normaliser must have dtype float32",
            {"out": (torch.zeros(2, 3).long(), torch.zeros(2).double())},
        ),
        (ValueError, "backend must be one of auto, .*, got 'fastest'", {"backend": "fastest"}),
        (TypeError, "backend must be a string, got int", {"backend": 3}),
        (TypeError, "debug must be a bool, got str", {"debug": "yes"}),
    ],
)
def test_bad_arguments_are_refused_by_name(error, message, changes):
    arguments = {"logits": LOGITS, "num_samples": 3, "temperature": 1.0, "seeds": 0, "offsets": 0} | changes
    with pytest.raises(error, match=f"^sample_without_replacement: {message}"):
        sample_without_replacement(**arguments)


def test_the_torch_operators_keep_their_promises():
    operators = torch.ops.sequoia.sample_without_replacement
    seeds = torch.arange(3)
    inputs = (_random_logits(3, 17), 4, torch.tensor([0.0, 0.5, 1.0]), seeds, seeds, False, "reference")
    check_fake_matches_real(operators.default, *inputs)
    torch.library.opcheck(operators.default, inputs)
    out = (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3))
    torch.library.opcheck(operators.out, (*inputs, *out))


def test_it_traces_without_a_graph_break():
    def draw(logits, seeds):
        return sample_without_replacement(logits, 4, 0.5, seeds, 3, backend="reference")

    logits, seeds = _random_logits(3, 17), torch.arange(3)
    compiled = torch.compile(draw, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits, seeds).tokens, draw(logits, seeds).tokens)


def test_a_transform_of_torch_sees_the_operator_in_inference_mode_too():
    rows = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([sample_without_replacement(row, 3, 1.0, 1, 0).tokens for row in rows])
    with torch.inference_mode():
        found = torch.func.vmap(lambda row: sample_without_replacement(row, 3, 1.0, 1, 0).tokens)(rows)
    assert torch.equal(found, wanted)
