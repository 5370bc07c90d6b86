"""warped_logsumexp: against transformers' warpers and the float64 reference, ties, edges, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from support.buffers import GuardedBuffer, Unchanged
from support.op_backends import op_backends
from support.operators import check_fake_matches_real
from support.tolerances import LOG_NORMALISER, assert_close
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sequoia_kernels.ops import WarpedNormaliser, warped_logsumexp

INF = math.inf
NAN = math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=op_backends("warped_logsumexp"))
def backend(request):
    return request.param


def random_logits(num_rows, vocab, seed=0, dtype=torch.float32):
    return (torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def reference(logits, *arguments):
    return warped_logsumexp(logits.double(), *arguments, backend="reference")


def check(backend, logits, *arguments):
    """Equal cuts, and normalisers close to the float64 reference on the same rounded logits."""
    expected = reference(logits, *arguments)
    with Unchanged(logits, *[argument for argument in arguments if isinstance(argument, torch.Tensor)]):
        result = backend(logits, *arguments)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert result.log_normaliser.dtype == result.cut.dtype == dtype
    assert torch.equal(result.cut.double(), expected.cut)
    assert_close(result.log_normaliser, expected.log_normaliser, LOG_NORMALISER, logits.dtype)
    return result


def probabilities(logits, temperature, result):
    scaled = logits.double() / temperature - result.log_normaliser.double()[:, None]
    return torch.where(logits >= result.cut[:, None], scaled.exp(), 0.0)


@pytest.mark.parametrize("temperature", [0.1, 0.6, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (1, None), (7, None), (None, 0.3), (None, 0.95), (20, 0.8)])
def test_distribution_is_that_of_transformers(temperature, top_k, top_p):
    logits = random_logits(20, 101).double()
    temperature = torch.tensor(temperature).item()  # the op takes float32 temperatures
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    result = warped_logsumexp(logits, temperature, top_k, top_p, backend="reference")
    expected = scores.softmax(dim=-1)
    torch.testing.assert_close(probabilities(logits, temperature, result), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 13, 128, 1031])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (1, None), (5, None), (None, 0.9), (11, 0.5)])
def test_against_the_reference(backend, vocab, top_k, top_p, dtype):
    if not backend.at_scale and (dtype == torch.float16 or vocab == 128):
        pytest.skip("interpreted kernels run fewer cases of this grid")
    logits = random_logits(6, vocab, seed=vocab, dtype=dtype)
    temperature = torch.tensor([0.0, 1e-3, 0.1, 0.6, 1.0, 2.5])
    check(backend, logits, temperature, top_k, top_p)


def test_mixed_rows_in_one_batch(backend):
    logits = random_logits(8, 61)
    temperature = torch.tensor([0.0, 0.3, 0.3, 0.3, 1.0, 1.0, 1.0, 0.0])
    top_k = torch.tensor([3, 0, -4, 61, 7, 1000, 2, 0], dtype=torch.int32)
    top_p = torch.tensor([0.5, 1.0, 0.7, 1.0, 0.2, 0.9, 1.0, 1.0])
    together = check(backend, logits, temperature, top_k, top_p)
    for row in range(8):
        alone = backend(logits[row : row + 1], float(temperature[row]), int(top_k[row]), float(top_p[row]))
        backend.assert_same_row(alone.log_normaliser, together.log_normaliser[row : row + 1])
        assert torch.equal(alone.cut, together.cut[row : row + 1])


@pytest.mark.parametrize("top_k", [None, 0, -1, 61, 62, 2**31 - 1])
@pytest.mark.parametrize("top_p", [None, 1.0])
def test_off_cuts_nothing(backend, top_k, top_p):
    logits = random_logits(3, 61)
    result = backend(logits, 0.7, top_k, top_p)
    assert (result.cut <= logits.amin(dim=-1)).all()
    torch.testing.assert_close(result.log_normaliser, torch.logsumexp(logits / 0.7, dim=-1), rtol=1e-6, atol=1e-6)


def test_greedy_rows_give_the_largest_logit(backend):
    logits = random_logits(4, 61, dtype=torch.bfloat16)
    result = backend(logits, 0.0, 3, 0.5)
    assert torch.equal(result.cut, logits.float().amax(dim=-1))
    assert torch.equal(result.log_normaliser, result.cut)


@pytest.mark.parametrize(
    ("top_k", "top_p", "cut"),
    [
        (1, None, 2.0),  # the two largest tie
        (2, None, 2.0),
        (3, None, 1.0),  # three tokens tie for the last place
        (5, None, 1.0),
        (6, None, 0.0),
        (None, 0.01, 2.0),
        (None, 0.57, 2.0),  # the two largest hold .576
        (None, 0.58, 1.0),
        (None, 0.89, 1.0),  # with the next three, .893
        (None, 0.9, 0.0),
        (2, 0.999, 2.0),
        (3, 0.4, 2.0),  # top-k leaves five tokens, of which the two largest hold .644
        (3, 0.65, 1.0),
    ],
)
def test_ties_stay_or_go_together(backend, top_k, top_p, cut):
    logits = torch.tensor([[1.0, 2.0, 0.0, 1.0, -1.0, 2.0, 1.0, 0.0, -1.0]])
    result = check(backend, logits, 1.0, top_k, top_p)
    assert result.cut.item() == cut
    assert probabilities(logits, 1.0, result).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (1, None), (None, 0.01), (2, 0.5)])
def test_uniform_rows_keep_every_token(backend, top_k, top_p):
    logits = torch.full((2, 17), -3.25)
    result = backend(logits, 0.5, top_k, top_p)
    assert (result.cut <= -3.25).all()
    torch.testing.assert_close(result.log_normaliser, torch.full((2,), -6.5 + math.log(17)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.9), (3, 0.9)])
def test_masked_tokens_have_no_probability(backend, top_k, top_p):
    logits = random_logits(5, 40)
    logits[:, ::2] = -INF
    logits[1, 1:] = -INF
    logits[1, 5] = 0.5  # one token left
    logits[2, [1, 3]] = -INF
    result = check(backend, logits, torch.tensor([0.5, 0.5, 1.0, 0.0, 1e-3]), top_k, top_p)
    assert torch.isfinite(result.log_normaliser).all()
    assert result.log_normaliser[1] == 1.0


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e4, 3e4])
def test_no_overflow_at_any_temperature_and_magnitude(backend, magnitude, temperature):
    logits = random_logits(3, 50) * magnitude
    for top_k, top_p in ((None, None), (4, 0.9)):
        result = check(backend, logits, temperature, top_k, top_p)
        assert torch.isfinite(result.log_normaliser).all()


def test_strided_rows(backend):
    wide = random_logits(9, 80).transpose(0, 1).contiguous().transpose(0, 1).contiguous()
    for logits in (wide[:, 5:66], wide[::2], wide[:0], wide[3:4].expand(4, -1)):
        check(backend, logits, 0.8, 6, 0.9)


def test_out_buffers(backend):
    logits = random_logits(5, 61)
    expected = reference(logits, 0.7, 9, 0.9)
    buffers = [GuardedBuffer((5,), torch.float32, backend.device) for _ in range(2)]
    out = WarpedNormaliser(*(buffer.view for buffer in buffers))
    result = backend(logits.to(backend.device), 0.7, 9, 0.9, out=out, raw=True)
    assert result.log_normaliser is out.log_normaliser and result.cut is out.cut
    assert_close(out.log_normaliser.cpu(), expected.log_normaliser, LOG_NORMALISER, torch.float32)
    assert torch.equal(out.cut.cpu().double(), expected.cut)
    for buffer in buffers:
        buffer.check()


def test_strided_out_buffers(backend):
    storage = torch.full((10,), -77.0, device=backend.device)
    logits = random_logits(5, 61)
    out = WarpedNormaliser(storage[::2], torch.empty(5, device=backend.device))
    backend(logits.to(backend.device), 0.7, out=out, raw=True)
    assert_close(storage[::2].cpu(), reference(logits, 0.7).log_normaliser, LOG_NORMALISER, torch.float32)
    assert (storage[1::2] == -77).all()


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_operator(name):
    top_k, top_p = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0.9, 1.0])
    arguments = (random_logits(2, 31), torch.tensor([0.5, 0.0]), top_k, top_p, False, name)
    operators = torch.ops.sequoia.warped_logsumexp
    torch.library.opcheck(operators.default, arguments)
    torch.library.opcheck(operators.out, (*arguments, torch.empty(2), torch.empty(2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_outputs_match_real_ones(dtype):
    operator = torch.ops.sequoia.warped_logsumexp.default
    for logits in (random_logits(4, 31, dtype=dtype), random_logits(8, 31, dtype=dtype)[::2]):
        check_fake_matches_real(operator, logits, torch.ones(4), None, None, False, "auto")
        check_fake_matches_real(operator, logits, torch.ones(4), None, torch.ones(4), False, "reference")


def test_compiled_function():
    def warp(logits, temperature):
        buffers = WarpedNormaliser(torch.empty(3), torch.empty(3))
        warped_logsumexp(logits, temperature, out=buffers)
        return warped_logsumexp(logits * 2, temperature, 5, 0.9).log_normaliser + 1, buffers.cut

    logits, temperature = random_logits(3, 31), torch.tensor([0.5, 0.0, 1.0])
    compiled = torch.compile(warp, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(logits, temperature), warp(logits, temperature), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


GOOD = {"logits": random_logits(3, 31), "temperature": torch.ones(3)}


def spoiled(value):
    logits = random_logits(3, 31)
    logits[1, 7] = value
    return logits


@pytest.mark.parametrize("temperature", [1e-5, 1e-4])
def test_cuts_at_small_temperatures(backend, temperature):
    """Logits that differ in their last places: 2e6 when divided by T, where float32 has steps of 0.1."""
    logits = 20 + torch.tensor([[0, 1, 2, 3, 8, 12], [5, 5, 5, 1, 1, -4e7]]) * 2.0**-19
    for top_p in (0.3, 0.6, 0.9):
        check(backend, logits, temperature, None, top_p)
    result = warped_logsumexp(logits.double(), temperature, None, 0.9, backend="reference")
    scaled = (logits.double() - logits.double().amax(dim=1, keepdim=True)) / torch.tensor(temperature).double()
    kept = logits >= result.cut[:, None]
    expected = scaled.masked_fill(~kept, -INF).softmax(dim=1)
    torch.testing.assert_close(
        probabilities(logits, torch.tensor(temperature).item(), result), expected, rtol=0, atol=1e-8
    )


ONLY_MASKED = random_logits(3, 31)
ONLY_MASKED[2] = -INF
SHARED = torch.ones(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": [[1.0]]}, "logits must be a tensor, got list"),
        ({"logits": torch.ones(3, 31, dtype=torch.int32)}, "logits must have dtype .* got int32"),
        ({"temperature": "1"}, r"temperature must be a number or a tensor \[rows\], got str"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": torch.ones(3, dtype=torch.float64)}, "temperature must have dtype float32, got float64"),
        ({"top_k": 1.5}, r"top_k must be an integer or a tensor \[rows\], got float"),
        ({"top_k": torch.ones(3, dtype=torch.int64)}, "top_k must have dtype int32, got int64"),
        ({"top_p": "x"}, "top_p must be a number"),
        ({"backend": 1}, "backend must be a string, got int"),
        ({"debug": None}, "debug must be a bool, got NoneType"),
        ({"out": torch.empty(3)}, "out must be a WarpedNormaliser, got Tensor"),
        ({"out": (torch.empty(3), None)}, "out.cut must be a tensor, got NoneType"),
        ({"out": (torch.empty(3), torch.empty(3).double())}, "out.cut must have dtype float32, got float64"),
    ],
)
def test_wrong_types(backend, changes, message):
    with pytest.raises(TypeError, match=f"^warped_logsumexp: {message}"):
        backend(raw=True, **{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.ones(31)}, r"logits must have shape \[rows, vocab\], got \[31\]"),
        ({"logits": torch.ones(3, 0)}, r"logits must have at least one token, got \[3, 0\]"),
        ({"logits": torch.ones(31, 3).t()}, r"logits must be contiguous in its last dimension, got strides \[1, 3\]"),
        ({"temperature": torch.ones(2)}, r"temperature must have shape \[rows\] = \[3\], got \[2\]"),
        ({"temperature": torch.tensor(1.0)}, r"temperature must have shape \[rows\] = \[3\], got \[\]"),
        ({"temperature": torch.ones(3, device="meta")}, "temperature must be on cpu, got meta"),
        ({"temperature": -0.5}, "temperature must be 0 or a finite number of at least 1e-05, got -0.5"),
        ({"temperature": torch.tensor([1.0, NAN, 1.0])}, "temperature must be 0 or a finite number"),
        ({"temperature": INF}, "temperature must be 0 or a finite number"),
        ({"temperature": 1e-6}, "temperature must be 0 or a finite number"),
        ({"temperature": 1e-46}, "temperature must be 0 or a finite number of at least 1e-05, got 1e-46"),
        ({"temperature": 1e39}, "temperature must fit into float32, got 1e[+]39"),
        ({"top_p": 1e-50}, "top_p must fit into float32, got 1e-50"),
        (
            {"out": (SHARED[1:], SHARED[:3])},
            "out.cut must share no memory with out.log_normaliser|out.log_normaliser must",
        ),
        (
            {"logits": SHARED[None].expand(3, 4), "out": (SHARED[:3], torch.empty(3))},
            "out.log_normaliser must share no",
        ),
        ({"top_p": SHARED[:3], "out": (torch.empty(3), SHARED[:3])}, "out.cut must share no memory with top_p"),
        ({"out": (torch.empty(3), SHARED[:1].expand(3))}, "out.cut must have memory of its own for each element"),
        ({"top_k": 2**31}, "top_k must fit into int32, got 2147483648"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": torch.tensor([0.5, 1.5, 1.0])}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": NAN}, r"top_p must be in \(0, 1\], got nan"),
        ({"logits": spoiled(NAN)}, r"logits must hold neither NaN nor \+inf, got nan in row \[1\]"),
        ({"logits": spoiled(INF)}, r"logits must hold neither NaN nor \+inf, got inf in row \[1\]"),
        ({"logits": ONLY_MASKED}, r"logits must have a finite entry in every row, got only -inf in row \[2\]"),
        ({"out": (torch.empty(2), torch.empty(3))}, r"out.log_normaliser must have shape \[rows\] = \[3\], got \[2\]"),
        ({"backend": "cublas"}, "backend must be one of auto, reference.*, got 'cublas'"),
    ],
)
def test_wrong_values(backend, changes, message):
    if backend.device.type != "cpu":
        pytest.skip("values are checked on CPU tensors only")
    out = WarpedNormaliser(torch.full((3,), -77.0), torch.full((3,), -77.0))
    arguments = {**GOOD, "out": out, "backend": backend.name, **changes}
    with Unchanged(SHARED), pytest.raises(ValueError, match=f"^warped_logsumexp: ({message})"):
        warped_logsumexp(**arguments)
    assert (out.log_normaliser == -77).all() and (out.cut == -77).all()


@pytest.mark.gpu
def test_debug_checks_values_on_a_device():
    logits = spoiled(NAN).cuda()
    warped_logsumexp(logits, 1.0)
    with pytest.raises(ValueError, match="NaN"):
        warped_logsumexp(logits, 1.0, debug=True)
