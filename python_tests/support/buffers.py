"""Buffers with guard elements around them, and copies to compare with after a call."""

import torch

CANARY = -77.0


class GuardedBuffer:
    """A strided view inside a larger tensor full of canaries; `check` tells whether anything beside it changed."""

    def __init__(self, shape, dtype, device="cpu"):
        padded = [size + 2 for size in shape]
        self.storage = torch.full(padded, CANARY, dtype=dtype, device=device)
        index = tuple(slice(1, size + 1) for size in shape)
        self.view = self.storage[index]
        self.inside = torch.zeros(padded, dtype=torch.bool, device=device)
        self.inside[index] = True

    def check(self):
        assert (self.storage[~self.inside] == CANARY).all()

    def check_untouched(self):
        assert (self.storage == CANARY).all()


class Unchanged:
    """Context manager: the given tensors hold the same bits afterwards, also when the body raises."""

    def __init__(self, *tensors):
        self.tensors = [tensor for tensor in tensors if tensor is not None]

    def __enter__(self):
        self.copies = [tensor.clone() for tensor in self.tensors]
        return self

    def __exit__(self, *exception):
        for tensor, copy in zip(self.tensors, self.copies):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
        return False
