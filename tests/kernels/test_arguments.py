"""Every tensor argument of every public function: layouts give the same, wrong ones are refused.

Runs on the backends of main memory, and under Triton's interpreter or on a device on Triton.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from triton_runs import (  # noqa: F401 - a fixture
    DEVICE,
    IS_INTERPRETED,
    bounds,
    quick_interpreter,
    random,
)

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels import Pooled, activate, gather_kept, project_pool, select_topk

# distances to a maximum are scaled until they overflow, which is what tells them apart
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")

BACKENDS = ["triton"] if IS_INTERPRETED or DEVICE == "cuda" else ["cpu", "reference"]
LENGTHS, H, V = [3, 2, 6, 1], 16, 20


def leaves_of(given):
    """Hidden states, weights and bias, of which gradients are asked if they can have any."""
    tensors = [given[name].detach() for name in ("hidden", "weight", "bias")]
    return [x.requires_grad_() if x.is_floating_point() else x for x in tensors]


def with_gradients(results, leaves):
    """Results, and the gradients of a loss of the first of them, if any of it is finite."""
    finite = results[0][results[0].isfinite()]
    return (*results, *(torch.autograd.grad(finite.square().sum(), leaves) if len(finite) else ()))


def pool(given, backend):
    hidden, weight, bias = leaves = leaves_of(given)
    pooled = project_pool(
        hidden, given["cu_seqlens"], weight, bias, return_argmax=True, backend=backend
    )
    return with_gradients(pooled, leaves)


def gather(given, backend):
    hidden, weight, bias = leaves = leaves_of(given)
    values = gather_kept(
        Pooled(given["logits"], given["argmax"]), given["indptr"], given["columns"],
        hidden, given["cu_seqlens"], weight, bias, backend=backend,
    )  # fmt: skip
    return with_gradients((values,), leaves)


def select(given, backend):
    lexical = (given["indptr"], given["columns"])
    return select_topk(given["logits"], 5, activation="none", lexical=lexical, backend=backend)


CALLS = {
    "project_pool": (pool, ["hidden", "cu_seqlens", "weight", "bias"]),
    "gather_kept": (
        gather,
        ["logits", "argmax", "indptr", "columns", "hidden", "cu_seqlens", "weight", "bias"],
    ),
    "select_topk": (select, ["logits", "indptr", "columns"]),
    **{
        name: (lambda given, backend, name=name: (activate(given["logits"], name),), ["logits"])
        for name in ("elu1p", "double_log1p_relu")
    },
}
ARGUMENTS = [
    pytest.param(call, name, id=f"{title}-{name}" if len(names) > 1 else title)
    for title, (call, names) in CALLS.items()
    for name in names
]


@cache
def inputs():
    hidden, weight, bias = random(0, sum(LENGTHS), H), random(1, V, H), random(2, V)
    cu_seqlens = bounds(LENGTHS)
    pooled = project_pool(hidden, cu_seqlens, weight, bias, return_argmax=True, backend="reference")
    kept = select_topk(pooled.logits, 5, activation="elu1p", backend="reference")
    return {
        "hidden": hidden, "weight": weight, "bias": bias, "cu_seqlens": cu_seqlens,
        "logits": pooled.logits, "argmax": pooled.argmax, "indptr": kept.indptr,
        "columns": kept.columns,
    }  # fmt: skip


@cache
def expected_of(call, backend):
    """What a call gives for the inputs as they are."""
    return call(inputs(), backend)


def strided(tensor, step):
    """The same numbers `step` elements apart, between numbers that do harm where they are read."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * step + 1), 127)
    return wide[..., 1::step][..., : tensor.shape[-1]].copy_(tensor)


def offset(tensor):
    """The same numbers, one element behind where an allocation begins."""
    storage = tensor.new_full((tensor.numel() + 1,), 127)
    return storage[1:].view(tensor.shape).copy_(tensor)


def columns_first(tensor):
    """The same numbers, the first axis innermost."""
    return tensor.T.contiguous().T


FORMS = {"twice": partial(strided, step=2), "thrice": partial(strided, step=3), "offset": offset,
         "columns first": columns_first}  # fmt: skip
VECTORS = ("cu_seqlens", "bias", "indptr", "columns")  # have one axis, so no order of axes
LAYOUTS = [
    pytest.param(*argument.values, form, id=f"{argument.id}-{form}")
    for argument in ARGUMENTS
    for form in FORMS
    if form != "columns first" or argument.values[1] not in VECTORS
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "name", "form"), LAYOUTS)
def test_any_layout_gives_the_same(call, name, form, backend):
    given = inputs()
    found = call({**given, name: FORMS[form](given[name])}, backend)
    for one, other in zip(found, expected_of(call, backend), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_one_row_repeated_without_a_copy(call, name, backend):
    given = dict(inputs())
    if name == "cu_seqlens":  # the same bound again and again: texts without tokens
        given["hidden"] = given["hidden"][:0]
        given["indptr"] = torch.zeros_like(given["indptr"])
    if name in ("cu_seqlens", "indptr"):
        given["columns"] = given["columns"][:0]
    if name == "argmax":
        given["argmax"] = torch.zeros_like(given["argmax"])
    if name == "columns":  # one column, the same for each text
        given["indptr"] = torch.arange(len(LENGTHS) + 1, device=DEVICE)
        given["columns"] = given["columns"][: len(LENGTHS)]
    repeated = given[name][:1].expand_as(given[name])
    expected = call({**given, name: repeated.contiguous()}, backend)
    for one, other in zip(call({**given, name: repeated}, backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_another_kind_of_number_is_refused(call, name, backend):
    given = inputs()
    wrong = given[name].long() if given[name].is_floating_point() else given[name].float()
    with pytest.raises(ShapeError, match="must be"):
        call({**given, name: wrong}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "name"), [p for p in ARGUMENTS if "-" in p.id])
def test_another_device_is_refused(call, name, backend):
    given = inputs()
    with pytest.raises((ShapeError, ConfigError), match=r"device|move them"):
        call({**given, name: given[name].to("meta")}, backend)
