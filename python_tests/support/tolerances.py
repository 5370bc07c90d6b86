"""How far a float result may lie from the float64 reference on the same rounded inputs, in one place."""

import torch

# (rtol, atol) of attention outputs. Inputs are standard normal, so outputs are of order 1. The rule is twice the
# largest error of eager torch that does each step in that dtype; over chains, stars, full and random trees of 1 to 40
# nodes at 0 to 300 committed rows that error is 5.6e-7 (float32), 1.8e-2 (bfloat16) and 2.2e-3 (float16) on a CPU.
ATTENTION = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (5e-7, 1e-6),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (1.5e-3, 2.5e-3),
}

# The softmax itself runs in float32 at every dtype, so its log-sum-exp is good to float32 of the rounded inputs, up to
# what another order of summation changes (eager torch errs by 2.7e-7 in float32; long contexts sum more terms).
LOG_SUM_EXP = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 4e-6),
    torch.bfloat16: (2e-6, 4e-6),
    torch.float16: (2e-6, 4e-6),
}

# Log-normalisers: float32 sums over the vocabulary in any order, relative to a maximum that was subtracted first. The
# result is about max / T + log(vocab), so the error is relative to that: a few units in the last place.
LOG_NORMALISER = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (1e-6, 2e-6),
    torch.float16: (1e-6, 2e-6),
}


def assert_close(actual, expected, bounds, dtype):
    """Compare with a float64 expectation under the bounds of a dtype; infinities must match exactly."""
    rtol, atol = bounds[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# Of logits' standard deviation: by how much a greedy token may stay behind the likeliest where rounding decides, in
# bfloat16 or with quantised activations. Logits of the tests' tiny models in bfloat16 are off by up to 0.17 of it
# against float32, and by up to 0.09 between one row and several.
NEAR_TIE = 0.1
