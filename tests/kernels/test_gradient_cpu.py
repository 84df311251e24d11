"""Gradients of the pooled maximum: loops, then the reference in float64, then the CPU path."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import bounds_of, lengths

from vdr_db.kernels import activate, project_pool, reference
from vdr_db.kernels.cpu import gradient as cpu_gradient

# Added to eager's error, times the size of the sums; see test_cpu.py.
EPSILON = 1e-5


def tie_free(seed, sizes, H, V):
    """Hidden states, bounds, weights, bias and a gradient; no two products are equal."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((sum(sizes), H), generator=generator, dtype=torch.float64)
    weight = torch.randn((V, H), generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    grad = torch.randn((len(sizes), V), generator=generator, dtype=torch.float64)
    return hidden, bounds_of(sizes), weight, bias, grad


def gradients(pool, hidden, bounds, weight, bias, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = pool(leaves[0], bounds, leaves[1], leaves[2])
    # Rows of documents without tokens are -inf: constants that nothing should pass through.
    has_tokens = bounds.diff() > 0
    loss = (logits[has_tokens] * grad[has_tokens].to(logits.dtype)).sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def eager(hidden, bounds, weight, bias):
    """What one writes without this library."""
    B, L = len(bounds) - 1, max(int(bounds.diff().max()), 1)
    padded = hidden.new_zeros((B, L, hidden.shape[1]))
    mask = torch.arange(L) < bounds.diff()[:, None]
    padded = padded.masked_scatter(mask[:, :, None], hidden)
    logits = torch.nn.functional.linear(padded, weight, bias)
    return logits.masked_fill(~mask[:, :, None], -torch.inf).max(1).values


def on_cpu(*inputs):
    return project_pool(*inputs, backend="cpu").logits


def by_reference(*inputs):
    return reference.project_pool(*inputs).logits


@settings(max_examples=40)
@given(sizes=lengths(), seed=st.integers(0, 2**31), is_sparse=st.booleans())
def test_reference_and_cpu_in_float64_are_the_loops(sizes, seed, is_sparse):
    hidden, bounds, weight, bias, grad = tie_free(seed, sizes, 5, 13)
    if is_sparse:
        grad[grad.abs() < 1.5] = 0
    expected = oracles.gradients(grad.numpy(), hidden.numpy(), bounds.tolist(), weight.numpy())
    for pool in (by_reference, on_cpu):
        got = gradients(pool, hidden, bounds, weight, bias, grad)
        for one, other in zip(got, expected, strict=True):
            one = np.zeros(other.shape) if one is None else one.numpy()
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", [by_reference, on_cpu])
def test_gradcheck(pool):
    hidden, bounds, weight, bias, _ = tie_free(0, [3, 1, 5], 4, 11)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def weights(hidden, weight, bias):
        return activate(pool(hidden, bounds, weight, bias), "elu1p")

    assert torch.autograd.gradcheck(weights, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 0.05])
@pytest.mark.parametrize(
    ("sizes", "H", "V"), [([1], 64, 507), ([63, 1, 0, 128, 7, 7], 123, 1029), ([2] * 9, 33, 1)]
)
def test_cpu_is_as_good_as_eager(monkeypatch, dtype, share, sizes, H, V):
    monkeypatch.setattr(cpu_gradient, "_PAIRS", 2000)  # several rounds over documents and columns
    monkeypatch.setattr(cpu_gradient, "_BAG", 16)
    hidden, bounds, weight, bias, grad = tie_free(1, sizes, H, V)
    generator = torch.Generator().manual_seed(2)
    grad *= torch.rand(grad.shape, generator=generator) < share
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    exact_inputs = (hidden.double(), bounds, weight.double(), bias.double())
    exact = gradients(by_reference, *exact_inputs, grad)
    got = gradients(on_cpu, hidden, bounds, weight, bias, grad)
    usual = gradients(eager, hidden, bounds, weight, bias, grad)
    for mine, theirs, truth in zip(got, usual, exact, strict=True):
        assert mine.dtype == dtype
        # The result is rounded to its own dtype once, eager's perhaps not in the same direction.
        rounding = truth.abs() * torch.finfo(dtype).eps
        allowed = (theirs.double() - truth).abs() + rounding + EPSILON * (1 + truth.abs())
        assert ((mine.double() - truth).abs() <= allowed).all()


def test_ties_go_to_the_first_token():
    hidden = torch.ones((4, 2), requires_grad=True)
    weight = torch.ones((3, 2), requires_grad=True)
    bounds = torch.tensor([0, 1, 4])
    expected = torch.tensor([[3.0, 3.0], [3.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    for pool in (by_reference, on_cpu):
        (grad,) = torch.autograd.grad(pool(hidden, bounds, weight, None).sum(), hidden)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_two_runs_give_the_same_bits(share):
    hidden, bounds, weight, bias, grad = tie_free(3, [40, 1, 90], 32, 3000)
    grad *= torch.rand(grad.shape, generator=torch.Generator().manual_seed(0)) < share
    inputs = [x.float() for x in (hidden, weight, bias, grad)]
    runs = [gradients(on_cpu, inputs[0], bounds, inputs[1], inputs[2], inputs[3]) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_sliced_weights_keep_their_rows_elsewhere_at_zero():
    hidden, bounds, weight, _, grad = tie_free(4, [5, 6], 8, 20)
    weight.requires_grad_()
    logits = on_cpu(hidden, bounds, weight[7:], None)
    (whole,) = torch.autograd.grad((logits * grad[:, 7:]).sum(), weight)
    assert not whole[:7].any()
    assert whole[7:].any(1).all()


def test_no_gradient_of_what_needs_none():
    hidden, bounds, weight, bias, _ = tie_free(5, [5, 6], 8, 20)
    logits = on_cpu(hidden, bounds, weight, bias.requires_grad_())
    assert torch.equal(torch.autograd.grad(logits.sum(), bias)[0], torch.full((20,), 2.0).double())
    with torch.no_grad():
        assert not on_cpu(hidden, bounds, weight, bias).requires_grad
