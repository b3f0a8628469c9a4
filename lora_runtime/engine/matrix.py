"""A weight ready to be multiplied with: on CPUs, in oneDNN's own layout.

``torch.nn.functional.linear`` lays a weight out anew in each call, which for the few rows of a decode step
takes longer than the product. Laid out once, the same product takes less than half the time on AVX-512 at
any number of rows (``python -m tests.benchmarks.linear``), and the weight is in memory twice. The operators are those
that ``torch.compile`` emits when it freezes weights; where they are absent the plain product is taken.

oneDNN compiles a kernel for each number of rows and each shape of weight, and keeps up to 1024 of them and of what
belongs to them. A server meets every number of rows, and its memory would grow by hundreds of MB. Inputs are therefore
padded to one of a few numbers of rows.

Shape legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)
_ROWS = 8
"""A hint to oneDNN; the layout serves any number of rows."""


class Matrix:
    """``weight`` (O, I), float; call it with ``x`` (…, I) and a bias (O,) or None to get (…, O)."""

    def __init__(self, weight: Tensor, *, prepack: bool = False) -> None:
        self._weight: Tensor | None = weight
        self._packed: Tensor | None = None
        if prepack and can_prepack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
            self._weight = None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._packed is None:
            assert self._weight is not None
            return torch.nn.functional.linear(x, self._weight, bias)
        num_rows = x.shape[:-1].numel()
        padding = padded(num_rows) - num_rows
        if not padding:
            return self._product(x, bias)
        rows = torch.nn.functional.pad(x.reshape(num_rows, -1), (0, 0, 0, padding))
        return self._product(rows, bias)[:num_rows].reshape(*x.shape[:-1], -1)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return product


def padded(num_rows: int) -> int:
    """The number of rows that ``num_rows`` are computed as: at most a quarter more, and four different ones between a
    power of two and the next. Up to 8, which decoding needs, none are added."""
    step = 1 << max((num_rows - 1).bit_length() - 3, 0)
    return -(-num_rows // step) * step


def can_prepack(weight: Tensor) -> bool:
    """Whether this torch, on this processor, multiplies with prepacked weights of this dtype."""
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
