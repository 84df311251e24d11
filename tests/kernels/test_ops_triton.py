"""The operators over the Triton kernels: options of the public functions, and opcheck."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_runs import (  # noqa: F401 - fixtures
    MARKS,
    bounds,
    poisoned_memory,
    quick_interpreter,
    random,
)

from vdr_db.kernels import (
    activate,
    gather_kept,
    project_pool,
    reference,
    select_topk,
)
from vdr_db.kernels.dispatch import ops

pytestmark = MARKS

SIZES = [3, 0, 6, 1]
V = 20


def inputs():
    hidden, weight = random(0, sum(SIZES), 16), random(1, V, 16)
    bias = random(2, V)
    return [x.requires_grad_() for x in (hidden, weight, bias)], bounds(SIZES)


def dense_loss(leaves, cu_seqlens, pool=project_pool, **options):
    hidden, weight, bias = leaves
    logits = pool(hidden, cu_seqlens, weight, bias, **options).logits
    return activate(logits[[0, 2, 3]], "elu1p").square().sum()


def kept_loss(leaves, cu_seqlens, gather=gather_kept, **options):
    hidden, weight, bias = leaves
    with torch.no_grad():
        pooled = reference.project_pool(hidden, cu_seqlens, weight, bias, return_argmax=True)
        kept = select_topk(pooled.logits, 5, activation="none", backend="reference")
    values = gather(pooled, kept.indptr, kept.columns, hidden, cu_seqlens, weight, bias, **options)
    return activate(values, "elu1p").square().sum()


CASES = pytest.mark.parametrize(
    ("loss", "plain"),
    [
        pytest.param(dense_loss, {"pool": reference.project_pool}, id="dense"),
        pytest.param(kept_loss, {"gather": reference.gather_kept}, id="kept"),
    ],
)


@CASES
def test_gradients_are_those_of_the_reference(loss, plain):
    leaves, cu_seqlens = inputs()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(loss(exact, cu_seqlens, **plain), exact)
    options = {"backend": "triton"}
    if loss is dense_loss:
        options["max_length"] = 6
    found = torch.autograd.grad(loss(leaves, cu_seqlens, **options), leaves)
    for got, right in zip(found, truth, strict=True):
        assert torch.allclose(got.double(), right, rtol=1e-4, atol=1e-4)


def test_a_bound_on_the_length_halves_the_positions():
    (hidden, weight, bias), cu_seqlens = inputs()
    given = (hidden.detach(), cu_seqlens, weight.detach(), bias.detach())
    plain = project_pool(*given, return_argmax=True, backend="triton")
    short = project_pool(*given, return_argmax=True, max_length=6, backend="triton")
    assert (plain.argmax.dtype, short.argmax.dtype) == (torch.int32, torch.int16)
    assert torch.equal(plain.argmax, short.argmax.int())
    assert torch.equal(plain.logits, short.logits)


def test_opcheck_of_every_operator():
    (hidden, weight, bias), cu_seqlens = inputs()
    # Schema and fake kernels; what autograd and the compiler make of them does not depend on the
    # backend, and the interpreter is slow.
    tests = ["test_schema", "test_faketensor"]

    def check(operator, *arguments):
        torch.library.opcheck(operator, arguments, test_utils=tests)

    check(ops.project_pool, hidden, cu_seqlens, weight, bias, True, "triton", 6)
    hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    logits, argmax = ops.project_pool(hidden, cu_seqlens, weight, bias, True, "triton", 6)
    kept = ops.select_topk(logits, 4, "elu1p", None, None, "triton")
    check(ops.select_topk, logits, 4, "elu1p", None, None, "triton")
    positions = ops.take(logits, argmax, kept[0], kept[1])[1]
    dense = (torch.ones_like(logits), argmax, hidden, cu_seqlens, weight)
    sparse = (kept[2], kept[0], kept[1], positions, hidden, cu_seqlens, weight)
    check(ops.project_pool_backward, *dense, True, True, True, "triton")
    check(ops.backward_sparse, *sparse, True, True, True, "triton")
