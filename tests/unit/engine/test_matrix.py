"""Prepacked weights give the plain product for every shape that a step may bring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lora_runtime.engine.matrix import Matrix, can_prepack, padded

MAX_ROWS = 2048


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    width_in=st.integers(1, 70),
    width_out=st.integers(1, 70),
    has_bias=st.booleans(),
    layout=st.sampled_from(["plain", "strided", "transposed", "deep"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_plain_product(rows, width_in, width_out, has_bias, layout, dtype):
    generator = torch.Generator().manual_seed(rows + width_in)
    weight = torch.randn(width_out, width_in, generator=generator).to(dtype)
    bias = torch.randn(width_out, generator=generator).to(dtype) if has_bias else None
    x = torch.randn(rows, 2 * width_in, generator=generator).to(dtype)[:, :width_in]
    if layout == "plain":
        x = x.contiguous()
    elif layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "deep":
        x = x[None].contiguous()
    with torch.inference_mode():
        got = Matrix(weight, prepack=True)(x, bias)
        want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == want.shape and got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("weight", [torch.ones(3, 2, dtype=torch.float16), torch.ones(3, 2, dtype=torch.float64)])
def test_other_dtypes_take_the_plain_product(weight):
    assert not can_prepack(weight)
    assert Matrix(weight, prepack=True)(torch.ones(1, 2, dtype=weight.dtype)).tolist() == [[2.0, 2.0, 2.0]]


def test_the_weight_may_change_after_packing():
    """A slot's tensors belong to a cache that may drop or reuse them."""
    weight = torch.ones(4, 4)
    matrix = Matrix(weight, prepack=True)
    if can_prepack(weight):
        weight.zero_()
        assert matrix(torch.ones(1, 4)).tolist() == [[4.0] * 4]


class PackedProducts(TorchDispatchMode):
    """Notes the number of rows of each product with a prepacked weight."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.rows.append(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


def test_memory_does_not_grow_with_each_new_number_of_rows():
    """oneDNN keeps a compiled kernel for each number of rows that it has seen, so it may see only a few."""
    weight = torch.ones(2, 3)
    if not can_prepack(weight):
        pytest.skip("this processor does not multiply with prepacked weights")
    matrix = Matrix(weight, prepack=True)
    with torch.inference_mode(), PackedProducts() as products:
        for rows in range(1, MAX_ROWS + 1):
            assert matrix(torch.ones(rows, 3)).shape == (rows, 2)
    assert len(products.rows) == MAX_ROWS
    assert len(set(products.rows)) <= 40


def test_padding_is_a_quarter_at_most_and_none_for_decoding():
    assert [padded(rows) for rows in range(9)] == list(range(9))
    assert all(rows <= padded(rows) <= rows * 1.25 for rows in range(1, MAX_ROWS + 1))
