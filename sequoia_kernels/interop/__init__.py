"""The conventions of servers: their trees, masks and caches to ours and back, on the device, without copies of logits.

What SGLang, TensorRT-LLM, FlashInfer and vLLM call things, and what they are here, is in docs/own_loop.md.
"""

from sequoia_kernels.interop.caches import (
    PageLists,
    SlotLists,
    committed_lens,
    from_page_lists,
    from_slot_lists,
    lens_with_tree,
    to_page_lists,
    to_slot_lists,
    tree_slots,
)
from sequoia_kernels.interop.masks import flat_mask, from_bool_mask, from_mask_words, to_bool_mask, to_mask_words
from sequoia_kernels.interop.trees import (
    AcceptedRows,
    RetrieveArrays,
    RetrievedTree,
    from_accepted_rows,
    from_retrieve,
    to_accepted_rows,
    to_retrieve,
)

__all__ = [
    "AcceptedRows",
    "PageLists",
    "RetrieveArrays",
    "RetrievedTree",
    "SlotLists",
    "committed_lens",
    "flat_mask",
    "from_accepted_rows",
    "from_bool_mask",
    "from_mask_words",
    "from_page_lists",
    "from_retrieve",
    "from_slot_lists",
    "lens_with_tree",
    "to_accepted_rows",
    "to_bool_mask",
    "to_mask_words",
    "to_page_lists",
    "to_retrieve",
    "to_slot_lists",
    "tree_slots",
]
