"""Ancestor masks in other words: booleans, narrower words, and one flat mask of prefix and tree.

Ours is bit j % 32 of word j // 32 in row i, set iff node i sees node j: TensorRT-LLM's packed mask as it is. The words
are little-endian, so narrower ones are the same memory.
"""

from __future__ import annotations

import torch

from sequoia_kernels import checks

__all__ = ["flat_mask", "from_bool_mask", "from_mask_words", "to_bool_mask", "to_mask_words"]

_BITS = {torch.uint8: 8, torch.uint16: 16, torch.uint32: 32, torch.int32: 32}


def to_mask_words(tree_mask: torch.Tensor, dtype: torch.dtype, num_words: int | None = None) -> torch.Tensor:
    """Give a packed mask in words of another width.

    Args:
        tree_mask: [N, W] or [B, N, W], int32, as `Topology.ancestor_mask`.
        dtype: torch.uint8, uint16 or uint32 (int32 gives the mask itself).
        num_words: words of a row; None gives all, 32 * W bits. FlashInfer's xqa takes all in uint16; one word a row is
            SGLang's packed mode, in the narrowest dtype that holds N bits.

    Returns:
        [N, words] or [B, N, words] of `dtype`; all words are a view of `tree_mask`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or layout, or too few or too many words for N nodes.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> mask = torch.tensor([[1], [3], [5]], dtype=torch.int32)
        >>> to_mask_words(mask, torch.uint16).tolist(), to_mask_words(mask, torch.uint8, 1).tolist()
        ([[1, 0], [3, 0], [5, 0]], [[1], [3], [5]])
    """
    where = "to_mask_words"
    _check_mask(where, tree_mask)
    if dtype not in _BITS:
        raise TypeError(f"{where}: dtype must be one of {', '.join(map(str, _BITS))}, got {dtype}")
    bits, num_nodes = _BITS[dtype], tree_mask.shape[-2]
    words = _with_last_stride_of_one(tree_mask).view(dtype)
    if num_words is None:
        return words
    num_words = checks.whole_number(where, "num_words", num_words)
    if not num_nodes <= num_words * bits <= 32 * tree_mask.shape[-1]:
        rule = f"hold {num_nodes} nodes in words of {bits} bits, and be at most {words.shape[-1]}"
        checks.fail_range(where, "num_words", rule, num_words)
    return words[..., :num_words]


def from_mask_words(words: torch.Tensor) -> torch.Tensor:
    """Take a packed mask in words of any width, the first node in the lowest bit of the first word.

    Args:
        words: [N, words] or [B, N, words], uint8, uint16, uint32 or int32.

    Returns:
        [N, W] or [B, N, W], int32, contiguous: what `tree_attention` takes.

    Raises:
        TypeError: not a tensor of such words.
        ValueError: a wrong shape.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> from_mask_words(torch.tensor([[1], [3], [5]], dtype=torch.uint8)).tolist()
        [[1], [3], [5]]
    """
    where = "from_mask_words"
    checks.check_tensor(where, "words", words)
    checks.check_dtype(where, "words", words, *_BITS)
    if words.dim() not in (2, 3) or words.shape[-1] == 0:
        rule = "have shape [nodes, words] or [batch, nodes, words]"
        checks.fail_range(where, "words", rule, checks.shape_text(words.shape))
    per_word = 32 // _BITS[words.dtype]
    num_words = -(-words.shape[-1] // per_word)
    # As bytes: torch pads and copies no unsigned words.
    taken = _with_last_stride_of_one(words.contiguous()).view(torch.uint8)
    padded = taken.new_zeros(*words.shape[:-1], 4 * num_words)
    padded[..., : taken.shape[-1]] = taken
    return padded.view(torch.int32)


def to_bool_mask(tree_mask: torch.Tensor, num_nodes: int | None = None) -> torch.Tensor:
    """Unpack a mask: whether each node sees each other one.

    Args:
        tree_mask: [N, W] or [B, N, W], int32.
        num_nodes: columns; None gives N.

    Returns:
        [N, num_nodes] or [B, N, num_nodes], bool. Flattened it is SGLang's mask of the tree alone.

    Raises:
        TypeError: not an int32 tensor.
        ValueError: a wrong shape or layout, or more columns than the mask has bits.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> to_bool_mask(torch.tensor([[1], [3]], dtype=torch.int32)).tolist()
        [[True, False], [True, True]]
    """
    where = "to_bool_mask"
    _check_mask(where, tree_mask)
    num_bits = 32 * tree_mask.shape[-1]
    num_nodes = tree_mask.shape[-2] if num_nodes is None else checks.whole_number(where, "num_nodes", num_nodes)
    if not 0 < num_nodes <= num_bits:
        checks.fail_range(where, "num_nodes", f"be in 1..{num_bits}, the mask's bits", num_nodes)
    columns = torch.arange(num_nodes, device=tree_mask.device)
    return (tree_mask[..., columns // 32] >> (columns % 32).to(torch.int32)) & 1 != 0


def from_bool_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask of booleans.

    Args:
        mask: whether each row sees each node. [N, M] or [B, N, M], bool, M from 1 to 1024.

    Returns:
        [N, ceil(M / 32)] or [B, N, ceil(M / 32)], int32, contiguous: what `tree_attention` takes.

    Raises:
        TypeError: not a tensor of booleans (what is to be added to scores is none).
        ValueError: a wrong shape.

    Notes:
        No host sync; can be captured in a CUDA graph.

    Example:
        >>> from_bool_mask(torch.tensor([[True, False], [True, True]])).tolist()
        [[1], [3]]
    """
    where = "from_bool_mask"
    checks.check_tensor(where, "mask", mask)
    checks.check_dtype(where, "mask", mask, torch.bool)
    if mask.dim() not in (2, 3) or not 1 <= mask.shape[-1] <= 1024:
        rule = "have shape [rows, nodes] or [batch, rows, nodes] with 1 to 1024 nodes"
        checks.fail_range(where, "mask", rule, checks.shape_text(mask.shape))
    columns = torch.arange(mask.shape[-1], device=mask.device)
    words = torch.zeros(*mask.shape[:-1], -(-mask.shape[-1] // 32), dtype=torch.int64, device=mask.device)
    words.scatter_add_(-1, (columns // 32).expand(mask.shape), mask.to(torch.int64) << (columns % 32))
    return words.to(torch.int32)  # keeps the lower 32 bits


def flat_mask(tree_mask: torch.Tensor, cache_lens: torch.Tensor, *, size: int | None = None) -> torch.Tensor:
    """Give one flat mask over prefix and tree: SGLang's full mask and FlashInfer's custom one.

    Args:
        tree_mask: [N, W], or [B, N, W] for a tree a request, int32.
        cache_lens: committed rows of each request. [B], int32.
        size: elements of the result, at least N * (sum of cache_lens + B * N); None counts, and waits for the device.

    Returns:
        [size], bool. Request b has N rows of cache_lens[b] + N columns: the prefix, seen by all, then the tree. Behind
        the last request all is False.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, layout or device, fewer bits than nodes, or (on a CPU) a negative length or too small
            a size.

    Notes:
        No host sync where `size` is given, and can be captured in a CUDA graph then. On devices other than the CPU,
        what lies beyond the size is left out.

    Example:
        >>> lens = torch.tensor([1, 0], dtype=torch.int32)
        >>> flat_mask(torch.tensor([[1], [3]], dtype=torch.int32), lens).int().tolist()
        [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    """
    where = "flat_mask"
    _check_mask(where, tree_mask)
    checks.check_tensor(where, "cache_lens", cache_lens)
    checks.check_dtype(where, "cache_lens", cache_lens, torch.int32)
    batch_size = cache_lens.numel() if tree_mask.dim() == 2 else len(tree_mask)
    checks.check_shape(where, "cache_lens", cache_lens, (batch_size,), "batch")
    checks.check_device(where, "cache_lens", cache_lens, tree_mask.device)
    num_nodes = tree_mask.shape[-2]
    if num_nodes > 32 * tree_mask.shape[-1]:
        checks.fail_range(where, "tree_mask", f"have a bit for each of {num_nodes} nodes", 32 * tree_mask.shape[-1])
    if cache_lens.is_cpu and bool((cache_lens < 0).any()):
        checks.fail_range(where, "cache_lens", "not be negative", int(cache_lens.min()))
    widths = cache_lens.to(torch.int64) + num_nodes
    ends = (num_nodes * widths).cumsum(0)
    if size is None:
        size = int(ends[-1]) if batch_size else 0
    else:
        least = int(ends[-1]) if batch_size and ends.is_cpu else 0
        size = checks.whole_number(where, "size", size, rule=checks.at_least(least))
    if batch_size == 0:
        return torch.zeros(size, dtype=torch.bool, device=tree_mask.device)
    places = torch.arange(size, device=tree_mask.device)
    request = torch.searchsorted(ends, places, right=True).clamp(max=batch_size - 1)
    within = places - (ends - num_nodes * widths)[request]
    row, column = within // widths[request], within % widths[request] - cache_lens[request]
    seen = to_bool_mask(tree_mask).expand(batch_size, num_nodes, num_nodes)
    tree = seen[request, row.clamp(max=num_nodes - 1), column.clamp(min=0)]
    return (tree | (column < 0)) & (places < ends[-1])


def _with_last_stride_of_one(words: torch.Tensor) -> torch.Tensor:
    """Give the same view with the stride that other dtypes need; a dimension of one word may have any."""
    return words[..., 0, None] if words.shape[-1] == 1 else words


def _check_mask(where: str, tree_mask: torch.Tensor) -> None:
    checks.check_tensor(where, "tree_mask", tree_mask)
    checks.check_dtype(where, "tree_mask", tree_mask, torch.int32)
    if tree_mask.dim() not in (2, 3) or 0 in tree_mask.shape[-2:]:
        rule = "have shape [nodes, words] or [batch, nodes, words]"
        checks.fail_range(where, "tree_mask", rule, checks.shape_text(tree_mask.shape))
    if tree_mask.stride(-1) != 1 and tree_mask.shape[-1] > 1:
        strides = checks.shape_text(tree_mask.stride())
        checks.fail_range(where, "tree_mask", "be contiguous in its last dimension", f"strides {strides}")
