"""Norms agree with numpy in float64, whatever the tensors are."""

import math

import numpy as np
import pytest
import torch

from gradwatch.norms import Meter, combine, fault, max_abs


def reference(tensors, p=2.0):
    flat = np.concatenate([t.detach().to(torch.float64).numpy().ravel() for t in tensors])
    return float(np.linalg.norm(flat, p))


def measured(tensors, p=2.0, scale=1.0):
    return Meter(p).measure(tensors, tensors, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 1000, 70_000, 300_000, 3_000_000])
def test_norms_agree_with_float64(dtype, size):
    """To 1e-5, where torch's own float32 total is off by up to 1e-3 for large tensors."""
    generator = torch.Generator().manual_seed(size)
    tensors = [torch.randn(n, generator=generator).to(dtype) for n in (size, 7, size // 3 + 1)]
    result = measured(tensors)
    assert result.norm == pytest.approx(reference(tensors), rel=1e-5)
    for norm, tensor in zip(result.tensor_norms, tensors, strict=True):
        assert norm == pytest.approx(reference([tensor]), rel=1e-5)


def test_a_large_tensor_is_nearer_the_truth_than_torch():
    """The reason for summing in chunks."""
    tensor = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    true = reference([tensor])
    ours = abs(measured([tensor]).norm / true - 1)
    theirs = abs(float(torch.nn.utils.get_total_norm([tensor])) / true - 1)
    assert ours < 1e-5
    assert ours < theirs


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_other_norm_types(p):
    """p-norms of several tensors together."""
    tensors = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    assert measured(tensors, p).norm == pytest.approx(reference(tensors, p), rel=1e-5)


def test_mixed_dtypes_and_layouts():
    """bf16 beside float32, a transposed tensor, and a sparse one."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(30, 40, generator=generator)
    sparse = torch.sparse_coo_tensor(
        [[1, 1, 3]], torch.tensor([1.0, 2.0, 4.0]), (5,), check_invariants=True
    )
    tensors = [dense.t(), dense.bfloat16(), sparse, torch.randn(600, 700, generator=generator).t()]
    plain = [tensors[0], tensors[1], sparse.to_dense(), tensors[3]]
    assert measured(tensors).norm == pytest.approx(reference(plain), rel=1e-5)


def test_a_layout_that_changes_between_steps():
    """A gradient that is sparse at one step and dense at the next is measured right at both."""
    meter = Meter()
    parameter = torch.zeros(5)
    sparse = torch.sparse_coo_tensor(
        [[1, 3]], torch.tensor([3.0, 4.0]), (5,), check_invariants=True
    )
    for gradient in (torch.full((5,), 2.0), sparse, torch.ones(5), sparse):
        expected = float(gradient.to_dense().norm())
        assert meter.measure([parameter], [gradient]).norm == pytest.approx(expected)


@pytest.mark.parametrize("value", [1e30, 3e38, 65504.0])
def test_squares_that_overflow_are_no_inf(value):
    """A huge finite gradient has a finite norm."""
    tensors = [torch.tensor([value, 1.0]), torch.tensor([value])]
    result = measured(tensors)
    assert result.finite
    assert result.norm == pytest.approx(math.sqrt(2) * value, rel=1e-6)


def test_float16_near_its_end():
    """The norm of float16 gradients is not bounded by 65,504."""
    tensor = torch.full((100,), 65504.0, dtype=torch.float16)
    assert measured([tensor]).norm == pytest.approx(655040.0)


def test_squares_that_underflow_are_no_zero():
    """A tiny gradient has a norm above 0; zeros have 0."""
    assert measured([torch.tensor([3e-30, 4e-30])]).norm == pytest.approx(5e-30)
    assert measured([torch.zeros(3)]).norm == 0.0
    assert measured([]).norm == 0.0


def test_loss_scale_is_divided_out():
    """The true norm of gradients that still carry their loss scale."""
    tensors = [torch.tensor([3.0, 4.0]) * 1024]
    result = measured(tensors, scale=1024.0)
    assert (result.norm, list(result.tensor_norms)) == (5.0, [5.0])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_show(value, p):
    """NaN and inf anywhere make the norm non-finite, and are named as what they are."""
    spoilt = torch.tensor([1.0, value, 2.0])
    result = measured([torch.ones(3), spoilt], p)
    assert not result.finite
    assert fault(spoilt) == ("nan" if math.isnan(value) else "inf")
    assert fault(torch.ones(2)) is None


def test_nan_and_inf_together():
    """Both are told."""
    assert fault(torch.tensor([math.nan, math.inf])) == "nan+inf"


def test_max_abs():
    """The greatest absolute element of all."""
    assert max_abs([torch.tensor([1.0, -3.0]), torch.tensor([2.0])]) == 3.0
    assert max_abs([]) == 0.0


def test_combine_keeps_nan():
    """A NaN among the norms is never lost in a max or a sum."""
    for p in (1.0, 2.0, math.inf):
        assert math.isnan(combine([1.0, math.nan, 5.0], p))
