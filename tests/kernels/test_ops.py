"""The operators fit torch: opcheck, compile, autocast, checkpointing, DDP; and their options."""

from __future__ import annotations

import shutil

import pytest
import torch
from kernel_losses import (
    SIZES,
    H,
    TiedModel,
    V,
    dense_loss,
    inputs,
    kept_loss,
    kept_of,
    share,
    train_one_rank,
)
from strategies import bounds_of
from torch.utils.checkpoint import checkpoint

from vdr_db.errors import ShapeError
from vdr_db.kernels import (
    Pooled,
    gather_kept,
    project_pool,
    reference,
    select_topk,
)
from vdr_db.kernels.dispatch import ops

LOSSES = pytest.mark.parametrize("loss", [dense_loss, kept_loss])


def gradients(loss, tensors, **options):
    hidden, bounds, weight, bias = tensors
    return torch.autograd.grad(
        loss(hidden, bounds, weight, bias, **options), (hidden, weight, bias)
    )


def assert_equal(one, other):
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# Positions in 2 bytes


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bound_on_the_length_halves_the_positions(backend):
    tensors = inputs()
    plain = project_pool(*tensors, return_argmax=True, backend=backend)
    short = project_pool(*tensors, return_argmax=True, max_length=32767, backend=backend)
    long = project_pool(*tensors, return_argmax=True, max_length=32768, backend=backend)
    assert (plain.argmax.dtype, short.argmax.dtype, long.argmax.dtype) == (
        torch.int32,
        torch.int16,
        torch.int32,
    )
    for other in (short, long):
        assert torch.equal(other.logits, plain.logits)
        assert torch.equal(other.argmax.int(), plain.argmax)
    assert_equal(
        gradients(dense_loss, tensors, max_length=7, backend=backend),
        gradients(dense_loss, tensors, backend=backend),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_false_bound_is_refused_in_main_memory(backend):
    with pytest.raises(ShapeError, match=r"`max_length` must be at least .* 7 tokens, got 6"):
        project_pool(*inputs(requires_grad=False), max_length=6, backend=backend)


def test_the_saved_positions_take_two_bytes():
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with keep:
        project_pool(*inputs(), max_length=512)
    (positions,) = [x for x in saved if x.shape == (len(SIZES), V)]
    assert positions.dtype == torch.int16


# Kept entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("max_length", [None, 7])
def test_kept_entries_are_the_dense_ones(dtype, max_length):
    tensors = inputs(dtype)
    hidden, _, weight, bias = tensors
    detached = [x.detach() for x in tensors]
    pooled, indptr, columns = kept_of(detached, max_length=max_length)
    kept = gather_kept(pooled, indptr, columns, *tensors)
    texts = reference.text_of(indptr, len(columns))
    assert torch.equal(kept.detach(), pooled.logits[texts, columns.long()])
    factors = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1), dtype=kept.dtype)
    sparse = torch.autograd.grad(kept @ factors, (hidden, weight, bias))
    dense = torch.zeros_like(pooled.logits)
    dense[texts, columns.long()] = factors
    leaves = hidden, weight, bias
    full = torch.autograd.grad(project_pool(*tensors).logits, leaves, dense)
    for one, other in zip(sparse, full, strict=True):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(one, other)
    by_reference = gather_kept(pooled, indptr, columns, *tensors, backend="reference")
    torch.testing.assert_close(by_reference, kept)
    right = torch.autograd.grad(by_reference @ factors, leaves)
    for one, other in zip(sparse, right, strict=True):
        torch.testing.assert_close(one, other)


def test_kept_gradients_in_float64_pass_gradcheck():
    hidden, bounds, weight, bias = inputs(torch.float64)
    pooled, indptr, columns = kept_of([x.detach() for x in (hidden, bounds, weight, bias)])
    # The operator takes the logits as known, so that differences of its values are all zero: its
    # gradient is compared with the reference's, which recomputes them.
    assert torch.autograd.gradcheck(
        lambda *x: gather_kept(pooled, indptr, columns, x[0], bounds, *x[1:], backend="reference"),
        (hidden, weight, bias),
    )
    assert torch.autograd.gradcheck(
        lambda *x: project_pool(x[0], bounds, *x[1:], backend="reference").logits[[0, 2, 3]],
        (hidden, weight, bias),
    )


def test_kept_gradients_repeat_bit_for_bit():
    tensors = inputs()
    first = gradients(kept_loss, tensors)
    for _ in range(3):
        assert_equal(gradients(kept_loss, tensors), first)


def test_kept_entries_without_gradient_are_only_gathered():
    tensors = inputs(requires_grad=False)
    pooled, indptr, columns = kept_of(tensors)
    kept = gather_kept(pooled, indptr, columns, *tensors)
    assert not kept.requires_grad
    with torch.no_grad():
        assert torch.equal(gather_kept(pooled, indptr, columns, *inputs()), kept)


def test_nothing_kept_and_no_tokens_give_zeros():
    hidden, bounds, weight, bias = inputs()
    pooled, indptr, columns = kept_of((hidden, bounds, weight, bias))
    none = gather_kept(pooled, torch.zeros_like(indptr), columns[:0], hidden, bounds, weight, bias)
    for grad in torch.autograd.grad(none.sum(), (hidden, weight, bias)):
        assert not grad.any()
    # An entry of a text without tokens, which no selection has, gets and gives nothing.
    indptr, columns = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([3, 4])
    for backend in ("cpu", "reference"):
        kept = gather_kept(pooled, indptr, columns, hidden, bounds, weight, bias, backend=backend)
        assert kept.tolist() == [-torch.inf] * 2
        for grad in torch.autograd.grad(kept, (hidden, weight, bias), torch.ones(2)):
            assert not grad.any()


def test_a_selection_of_other_logits_is_refused():
    tensors = inputs()
    pooled, indptr, columns = kept_of(tensors)
    with pytest.raises(ShapeError, match="must hold an argmax, got None"):
        gather_kept(Pooled(pooled.logits, None), indptr, columns, *tensors)
    with pytest.raises(ShapeError, match=r"\(indptr \[B \+ 1\] = \[6\]"):
        gather_kept(pooled, indptr[1:], columns, *tensors)
    with pytest.raises(ShapeError, match="argmax must be"):
        gather_kept(Pooled(pooled.logits, pooled.argmax[1:]), indptr, columns, *tensors)


# torch.library.opcheck

OPERATORS = {
    "project_pool": lambda x: [(*x["leaves"], True, "cpu", n) for n in (None, 7, 40000)],
    "project_pool_backward": lambda x: [(*x["dense"], *n, "cpu") for n in NEEDS],
    "gather_kept": lambda x: [(*x["pooled"], *x["csr"][:2], *x["leaves"], "cpu")],
    "backward_sparse": lambda x: [(*x["kept"], *n, "cpu") for n in NEEDS],
    "select_topk": lambda x: [
        (x["pooled"][0], 5, "elu1p", None, None, "cpu"),
        (x["pooled"][0], None, "none", None, None, "cpu"),
        (x["pooled"][0], 2, "none", *x["lexical"], "cpu"),
    ],
}
NEEDS = [(True, True, True), (False, True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, dtype):
    tensors = inputs(dtype)
    detached = [x.detach() for x in tensors]
    hidden, bounds, weight, _ = detached
    logits, argmax = ops.project_pool(*detached, True, "cpu", 7)
    csr = ops.select_topk(logits, 5, "elu1p", None, None, "cpu")
    positions = ops.take(logits, argmax, *csr[:2])[1]
    samples = {
        "leaves": tensors,
        "pooled": (logits, argmax),
        "csr": csr,
        "dense": (torch.ones_like(logits), argmax, hidden, bounds, weight),
        "kept": (csr[2], *csr[:2], positions, hidden, bounds, weight),
        "lexical": (bounds_of([1] * len(SIZES)), torch.zeros(len(SIZES), dtype=torch.int64)),
    }
    operator = getattr(ops, name)
    for arguments in OPERATORS[name](samples):
        torch.library.opcheck(operator, arguments)


# torch.compile

COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler"),
        ],
    ),
]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@LOSSES
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_losses_are_the_same(compiler, loss):
    tensors = inputs()
    leaves = [tensors[0], *tensors[2:]]
    options = {"max_length": 7} if loss is dense_loss else {}
    compiled = torch.compile(
        lambda *x: loss(*x, **options), backend=compiler, fullgraph=True, dynamic=True
    )
    expected, found = loss(*tensors), compiled(*tensors)
    torch.testing.assert_close(found, expected)
    right = torch.autograd.grad(expected, leaves)
    for one, other in zip(torch.autograd.grad(found, leaves), right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("k", [4, None])
def test_compiled_selection_is_the_same(k):
    tensors = inputs(requires_grad=False)
    lexical = (bounds_of([1] * len(SIZES)), torch.arange(len(SIZES)))

    def select(hidden, bounds, weight, bias):
        logits = project_pool(hidden, bounds, weight, bias).logits
        return select_topk(logits, k, activation="elu1p", lexical=lexical)

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(*tensors), select(*tensors))


# Autocast, checkpointing, DDP


@LOSSES
def test_autocast_on_the_cpu(loss):
    """Layers before the head run in bfloat16; it reads what they give and sums in float32."""
    hidden, bounds, weight, bias = inputs()
    layer = torch.nn.Linear(H, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = layer(hidden)
        assert rows.dtype == torch.bfloat16
        found = loss(rows, bounds, weight, bias)
    assert found.dtype == torch.float32
    expected = loss(rows.detach().float().requires_grad_(), bounds, weight, bias)
    assert torch.equal(found, expected)
    found.backward()
    assert layer.weight.grad.dtype == torch.float32
    right = torch.autograd.grad(expected, (weight, bias))
    assert_equal((weight.grad, bias.grad), right)


@LOSSES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(loss, use_reentrant):
    hidden, bounds, weight, bias = inputs()
    expected = gradients(loss, (hidden, bounds, weight, bias))
    again = checkpoint(loss, hidden, bounds, weight, bias, use_reentrant=use_reentrant)
    again.backward()
    assert_equal((hidden.grad, weight.grad, bias.grad), expected)


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)
def test_two_ddp_processes_give_the_gradients_of_one(tmp_path):
    losses = (dense_loss, kept_loss)
    torch.multiprocessing.spawn(train_one_rank, (str(tmp_path), losses), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for loss, *results in zip(losses, *ranks, strict=True):
        model = TiedModel()
        (sum(model(*share(rank), loss) for rank in range(2)) / 2).backward()
        for single, *found in zip(model.parameters(), *results, strict=True):
            assert torch.equal(found[0], found[1])
            torch.testing.assert_close(found[0], single.grad, rtol=1e-5, atol=1e-6)
