"""One decision, one override; and the operators fit torch."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from strategies import bounds_of

from vdr_db import kernels
from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels import choose_backend, dispatch, project_pool, select_topk
from vdr_db.kernels.dispatch import ops


def inputs(dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((9, 16), generator=generator).to(dtype)
    weight = torch.randn((21, 16), generator=generator).to(dtype)
    bias = torch.randn(21, generator=generator).to(dtype)
    tensors = [hidden, bounds_of([4, 0, 5]), weight, bias]
    if requires_grad:
        tensors = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
    return tensors


def elsewhere(device):
    """A stand-in for a tensor of another device: the decision reads nothing but its device."""

    class Elsewhere:
        pass

    tensor = Elsewhere()
    tensor.device = torch.device(device)
    return tensor


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "cpu"),
        ("cpu", torch.float64, "cpu"),
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "reference"),
        ("mps", torch.float32, "reference"),
    ],
)
def test_auto_goes_by_device(monkeypatch, device, dtype, expected):
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 4))
    assert choose_backend("auto", elsewhere(device), dtype) == expected


def test_a_triton_that_is_too_old_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 3))
    dispatch.warn_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", elsewhere("cuda"), torch.float32) == "reference"
    assert "they need the package `triton` 3.4 or later, got 3.3" in caplog.text
    with pytest.raises(ConfigError, match=r"`triton` 3\.4 or later, got 3\.3"):
        choose_backend("triton", elsewhere("cuda"), torch.float32)


def test_the_oldest_triton_is_the_one_of_the_package():
    assert f'"triton>={dispatch.OLDEST_TRITON[0]}.{dispatch.OLDEST_TRITON[1]};' in (
        Path(__file__).parents[2] / "pyproject.toml"
    ).read_text(encoding="utf-8")
    triton = pytest.importorskip("triton")
    assert dispatch.triton_version() == tuple(map(int, triton.__version__.split(".")[:2]))


def test_without_triton_cuda_takes_the_reference_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "triton_version", lambda: None)
    dispatch.warn_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose_backend("auto", elsewhere("cuda"), torch.float32) == "reference"
    assert [record.message for record in caplog.records] == [
        "Triton kernels are not used (the package `triton` is not installed); "
        "the slower reference is."
    ]
    with pytest.raises(ConfigError, match="`triton` is not installed"):
        choose_backend("triton", elsewhere("cuda"), torch.float32)


@pytest.mark.usefixtures("no_interpreter")
def test_what_cannot_run_is_an_error():
    tensors = inputs()
    with pytest.raises(ConfigError, match=r"not on CUDA.*interpreter is off; use \"auto\""):
        project_pool(*tensors, backend="triton")
    with pytest.raises(ConfigError, match="not on CUDA"):
        select_topk(torch.zeros(1, 3), 1, activation="none", backend="triton")
    with pytest.raises(ConfigError, match=r"one of .*'auto'.*, got 'cuda'"):
        project_pool(*tensors, backend="cuda")
    with pytest.raises(ConfigError, match="needs tensors on the CPU, got meta"):
        project_pool(*(x.to("meta") for x in tensors), backend="cpu")
    with pytest.raises(ConfigError, match="no float64"):
        choose_backend("triton", elsewhere("cuda"), torch.float64)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_backends_agree(backend):
    tensors = inputs()
    expected = project_pool(*tensors, return_argmax=True, backend="reference")
    got = project_pool(*tensors, return_argmax=True, backend=backend)
    torch.testing.assert_close(got, expected)
    assert project_pool(*tensors, backend=backend).argmax is None
    logits = expected.logits
    one = select_topk(logits, 4, activation="elu1p", backend=backend)
    other = select_topk(logits, 4, activation="elu1p", backend="reference")
    torch.testing.assert_close(one, other)
    with pytest.raises(ShapeError, match="end at T = 9"):
        project_pool(tensors[0], torch.tensor([0, 4]), *tensors[2:], backend=backend)


def test_mixed_dtypes_are_promoted():
    hidden, bounds, weight, _ = inputs()
    got = project_pool(hidden.bfloat16(), bounds, weight).logits
    expected = project_pool(hidden.bfloat16().float(), bounds, weight).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_on_the_cpu_changes_nothing(backend):
    tensors = inputs()
    expected = project_pool(*tensors, backend=backend).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project_pool(*tensors, backend=backend).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    tensors = inputs(dtype, requires_grad=True)
    torch.library.opcheck(ops.project_pool, (*tensors, True, "cpu", None))
    torch.library.opcheck(ops.project_pool, (*(x.detach() for x in tensors), False, "cpu", None))
    hidden, bounds, weight, _ = (x.detach() for x in tensors)
    logits, argmax = ops.project_pool(hidden, bounds, weight, None, True, "cpu", None)
    arguments = (torch.ones_like(logits), argmax, hidden, bounds, weight)
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(ops.project_pool_backward, (*arguments, *needs, "cpu"))


def test_operator_without_argmax_has_no_gradient():
    logits, _ = ops.project_pool(*inputs(requires_grad=True), False, "cpu", None)
    with pytest.raises(RuntimeError, match="need_argmax=False and has no gradient"):
        logits.sum().backward()


def test_checkpointing_and_frozen_inputs():
    hidden, bounds, weight, bias = inputs(requires_grad=True)
    bias.requires_grad_(False)

    def loss(hidden, weight):
        return project_pool(hidden, bounds, weight, bias).logits[[0, 2]].square().sum()

    direct = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    again = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=False)
    for one, other in zip(direct, torch.autograd.grad(again, (hidden, weight)), strict=True):
        assert torch.equal(one, other)


def test_compile_sees_one_operator():
    tensors = inputs(requires_grad=True)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *x: project_pool(*x).logits.exp(), backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), project_pool(*tensors).logits.exp())
    assert "vdr_db.project_pool" in str(graphs[0].code)


def test_inference_mode():
    with torch.inference_mode():
        pooled = project_pool(*inputs())
        assert select_topk(pooled.logits, 2, activation="elu1p").indptr.tolist() == [0, 2, 2, 4]


def test_public_names():
    assert kernels.__all__ == sorted(kernels.__all__)
    assert all(getattr(kernels, name) is not None for name in kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kernels.nothing  # noqa: B018


def test_the_cpu_path_does_not_import_triton():
    code = (
        "import sys, torch; from vdr_db.kernels import project_pool, select_topk;"
        "p = project_pool(torch.ones(2, 3), torch.tensor([0, 2]), torch.ones(4, 3)).logits;"
        "select_topk(p, 2, activation='elu1p');"
        "print([m for m in sys.modules if m.startswith('vdr_db.kernels.cuda.pooling')])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
