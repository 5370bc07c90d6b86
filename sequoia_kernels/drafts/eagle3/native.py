"""An EAGLE-3 head's forwards in C++ on a CPU: the description that csrc/host/forward takes, and bound forwards.

Sums and everything between products are float32, so features and outputs are, whatever the dtype of the weights.
"""

from __future__ import annotations

from os import environ
from typing import Any

import torch

from sequoia_kernels.drafts.eagle3.head import EagleHead, Norm, Projection
from sequoia_kernels.host_module import host as _host
from sequoia_kernels.models import TreeCache, TreeStep
from sequoia_kernels.models.description import ACTIVATIONS, RMS_NORM, Matrix, Rotation
from sequoia_kernels.models.native import INSTRUCTION_SET_VARIABLE, row_fields
from sequoia_kernels.models.quantised import ELEMENT_TYPES, NotNativeError

__all__ = ["BoundHead", "NativeHead"]


class NativeHead:
    """A head's weights as the native forward reads them.

    Raises:
        NotNativeError: there is something that it cannot compute; the message says what.
        ValueError: `SEQUOIA_HOST_ISA` names no instruction set of this CPU.
    """

    def __init__(self, head: EagleHead) -> None:
        self._head = head
        self._tensors: list[torch.Tensor] = []
        if head.fc.weight.device.type != "cpu":
            raise NotNativeError(f"it is on {head.fc.weight.device.type}")
        self._rotation = Rotation(head.rotary, None, torch.device("cpu"))
        self._forward = _host.Forward(self._fields(), environ.get(INSTRUCTION_SET_VARIABLE, ""))
        self.instruction_set: str = self._forward.instruction_set
        self._table = _addresses([tensor.data_ptr() for tensor in self._tensors])

    def bind(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        cache: TreeCache,
        cache_lens: torch.Tensor,
        step: TreeStep,
        outputs: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> BoundHead:
        """Prepare forwards of what will lie in these tensors; all of them are contiguous.

        Args:
            tokens: of the rows; one that has no embedding is fed as the nearest that has. [B, N] int64.
            features: what goes with them. [B, N, H] float32.
            cache: the head's.
            cache_lens: rows that all of these see. [B] int32.
            step: what else each row sees, and where it goes. A shaped tree writes its mask in place.
            outputs: takes those of the last layer, not normed. [B, N, H] float32.
            wanted: different rows whose logits are wanted. [B, K] int64; None for all.
        """
        batch_size, num_rows = tokens.shape
        last = cache.max_cache_len - 1
        rotations = _addresses([self._rotation.reach(last + 1).data_ptr()])
        caches = _addresses([tensor.data_ptr() for tensor in cache.tensors()])
        parts = [tokens, features, cache_lens, *step[:3], outputs, *([] if wanted is None else [wanted])]
        assert all(part.is_contiguous() for part in parts)
        call = {
            "tokens": tokens.data_ptr(),
            "features": features.data_ptr(),
            "outputs": outputs.data_ptr(),
            "depths": step.depths.data_ptr(),
            "node_ids": step.node_ids.data_ptr(),
            "tree_mask": step.tree_mask.data_ptr(),
            "cache_lens": cache_lens.data_ptr(),
            "num_requests": batch_size,
            "num_nodes": num_rows,
            "num_words": step.tree_mask.shape[-1],
            "mask_per_request": step.tree_mask.dim() == 3,
            "max_position": last,
            "caches": caches.data_ptr(),
            **row_fields(cache),
            "rotations": rotations.data_ptr(),
            "wanted_nodes": 0 if wanted is None else wanted.data_ptr(),
            "num_wanted": 0 if wanted is None else wanted.shape[1],
            "logits_type": ELEMENT_TYPES[self._head.lm_head.weight.dtype],
        }
        held = [self, cache, rotations, self._rotation.table, caches, *parts]
        return BoundHead(_host.BoundForward(self._forward, call), self._table, held)

    # ---- the description ----

    def _fields(self) -> dict[str, Any]:
        head = self._head
        width = head.embed.shape[1]
        layers = []
        for layer in head.layers:
            heads, kv_heads, d = head.num_heads, head.num_kv_heads, head.head_dim
            inner = layer.down.weight.shape[1]
            layers.append(
                {
                    "num_heads": heads,
                    "num_kv_heads": kv_heads,
                    "head_dim": d,
                    "scale": d**-0.5,
                    "softcap": 0.0,
                    "window": layer.window or 0,
                    "rotation": 0,
                    "rotated_dims": self._rotation.dims,
                    "parallel": False,
                    "norms_whole_rows": False,
                    "input_norm": self._norm(layer.input_norm),
                    "query_norm": self._norm(layer.query_norm),
                    "key_norm": self._norm(layer.key_norm),
                    "attended_norm": None,
                    "mlp_norm": self._norm(layer.mlp_norm),
                    "mlp_output_norm": None,
                    "projections": [self._linear(layer.qkv)],
                    "queries": (0, d),
                    "keys": (heads * d, d),
                    "values": ((heads + kv_heads) * d, d),
                    "output": self._linear(layer.output),
                    "gate": self._linear(layer.gate_up, 0, inner),
                    "up": self._linear(layer.gate_up, inner, inner),
                    "down": self._linear(layer.down),
                    "activation": self._activation(),
                    "experts": None,
                    "cache_type": _element_type(layer.qkv.weight),
                }
            )
        return {
            "width": width,
            "embedding": self._matrix(head.embed),
            "positions": None,
            "position_offset": 0,
            "embedding_scale": 1.0,
            "residual_scale": 1.0,
            "final_norm": self._norm(head.norm),
            "head": self._linear(head.lm_head),
            "logit_scale": 1.0,
            "logit_softcap": 0.0,
            "feature_norm": self._norm(head.hidden_norm),
            "normed_residual": head.norm_before_residual,
            "rotation_dims": [self._rotation.dims],
            "layers": layers,
        }

    def _matrix(self, weight: torch.Tensor, first: int = 0, rows: int | None = None) -> Matrix:
        if not weight.is_contiguous():
            raise NotNativeError("a weight is not laid out row by row")
        self._tensors.append(weight)
        height = weight.shape[0] if weight.dim() == 2 else 1
        count = height if rows is None else rows
        return Matrix(len(self._tensors) - 1, first, count, weight.shape[-1], _element_type(weight), False)

    def _linear(self, part: Projection, first: int = 0, rows: int | None = None) -> Any:
        bias = None
        if part.bias is not None:
            bias = self._matrix(part.bias if rows is None else part.bias[first : first + rows])
        return self._matrix(part.weight, first, rows), bias

    def _norm(self, norm: Norm | None) -> Any:
        return None if norm is None else (RMS_NORM, self._matrix(norm.weight), None, norm.eps, 0.0)

    def _activation(self) -> int:
        points = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64)
        values = self._head.activation(points)
        for code, known in enumerate(ACTIVATIONS):
            if torch.allclose(values, known(points), rtol=0.0, atol=1e-6):
                return code
        raise NotNativeError(f"its activation is {self._head.activation!r}")


class BoundHead:
    """Forwards of the same rows, again and again, on what lies in the tensors then."""

    def __init__(self, prepared: Any, table: torch.Tensor, held: list[Any]) -> None:
        self._prepared, self._table, self._held = prepared, table, held

    def run(self, logits: torch.Tensor) -> bool:
        """Run one forward.

        Args:
            logits: takes the wanted rows' logits. [B, N or K, Vd], contiguous, the dtype of the head's weights.

        Returns:
            False, and nothing is written, where a length leaves no room in the cache.
        """
        return bool(self._prepared.run(self._table.data_ptr(), logits.data_ptr(), torch.get_num_threads()))


def _element_type(weight: torch.Tensor) -> int:
    if weight.dtype not in ELEMENT_TYPES:
        raise NotNativeError(f"a weight is of {weight.dtype}")
    return ELEMENT_TYPES[weight.dtype]


def _addresses(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
