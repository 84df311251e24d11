"""Every launch compiles for a real target from the arguments that launchers pass, without a GPU.

The interpreter runs kernels but compiles nothing; the compile gate compiles them, but from
signatures of its own. Here a stand-in for the driver names the target, and launches stop once they
are compiled.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from strategies import bounds_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vdr_db.errors import ConfigError
from vdr_db.kernels.cuda import backward as pooling_backward
from vdr_db.kernels.cuda import pooling, primitives, scan
from vdr_db.kernels.cuda.configs import PERSISTENT
from vdr_db.kernels.cuda.forward_kernels import pool_aligned_kernel
from vdr_db.kernels.cuda.topk import select_topk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        primitives.is_interpreted(pool_aligned_kernel), reason="the interpreter compiles nothing"
    ),
]


LISTS = ["count_entries_kernel", "chunk_offsets_kernel", "place_entries_kernel"]


class Target:
    """The part of a driver that compilation asks."""

    def __init__(self, sm):
        self.sm = sm

    def get_current_target(self):
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self):
        return f"compile only, sm_{self.sm}"

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=[90, 80], ids=["sm90", "sm80"])
def compiled(request, monkeypatch):
    """Names of kernels in the order of their launches, none of which runs."""
    names = []
    plain = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        names.append(self.__name__)
        return plain(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(primitives, "compute_capability", lambda tensor: request.param)
    for module in (pooling, pooling_backward, scan):
        monkeypatch.setattr(module, "compute_capability", lambda tensor: request.param)
    monkeypatch.setattr(driver, "_active", Target(request.param))
    return names


def batch(lengths, V, H, dtype):
    return (
        torch.zeros((sum(lengths), H), dtype=dtype),
        bounds_of(lengths),
        torch.zeros((V, H), dtype=dtype),
    )


@pytest.mark.parametrize(
    ("lengths", "V", "H", "dtype"),
    [
        pytest.param([200, 150], 300, 64, torch.bfloat16, id="long"),
        pytest.param([9, 0, 30], 300, 64, torch.float16, id="short"),
        pytest.param([200], 50, 37, torch.bfloat16, id="odd-H"),
        pytest.param([20, 8], 60, 32, torch.float32, id="float32"),
        pytest.param([1], 1, 16, torch.float32, id="one-of-all"),
    ],
)
def test_forward(compiled, lengths, V, H, dtype):
    hidden, cu_seqlens, weight = batch(lengths, V, H, dtype)
    pooling.forward(hidden, cu_seqlens, weight)
    pooling.forward(hidden, cu_seqlens.int(), weight, torch.zeros(V), True, max_length=300)
    layout = ["pool_aligned_kernel"]
    if sum(lengths) / len(lengths) <= 96:
        layout = ["pool_packed_kernel", "pool_finish_kernel"]
    # positions of maxima that are infinite or NaN are searched for afterwards
    assert compiled == [*layout, *layout, "search_kernel"]


@pytest.mark.parametrize("need_argmax", [False, True])
def test_persistent_forward(compiled, monkeypatch, need_argmax):
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_: device)
    inputs = batch([200, 150], 300, 64, torch.bfloat16)
    arguments = (*inputs, torch.zeros(300), need_argmax)
    if pooling.compute_capability(inputs[0]) != 90:
        with pytest.raises(ConfigError, match="sm_90"):
            pooling.forward(*arguments, tile=PERSISTENT)
        return
    pooling.forward(*arguments, tile=PERSISTENT)
    assert compiled == ["pool_persistent_kernel"] + ["search_kernel"] * need_argmax
    for hidden, weight in (
        (inputs[0].float(), inputs[2].float()),
        (inputs[0][:, 1:], inputs[2][:, 1:]),
    ):
        with pytest.raises(ConfigError, match="16-bit inputs"):
            pooling.forward(hidden, inputs[1], weight, tile=PERSISTENT)


def test_columns_that_lie_far_apart_are_copied():
    """Their offsets would not fit 32 bits: 3,000,000 tokens of 768 dimensions, transposed."""
    far = torch.empty((768, 3_000_000), dtype=torch.bfloat16, device="meta").T
    assert primitives.short_rows(far).stride() == (768, 1)
    for near in (far[:, :300], far.T[:, :1000], torch.empty((250_002, 1024), device="meta").T.T):
        assert primitives.short_rows(near) is near


@pytest.mark.parametrize("method", ["gather", "onehot"])
def test_backward(compiled, method):
    hidden, cu_seqlens, weight = batch([20, 13], 1100, 48, torch.bfloat16)
    argmax = torch.zeros((2, 1100), dtype=torch.int16)
    pooling.backward(
        torch.zeros(2, 1100), argmax, hidden, cu_seqlens, weight, True, True, True, method=method
    )
    expected = {
        "gather": ["weight_gather_kernel", *LISTS, "sum_lists_kernel", "merge_splits_kernel"],
        "onehot": ["onehot_kernel", "onehot_kernel"],
    }[method]
    assert compiled == [*expected, "bias_kernel"]


def test_backward_of_kept_entries(compiled):
    hidden, cu_seqlens, weight = batch([20, 13], 1100, 48, torch.bfloat16)
    columns = torch.arange(1030, dtype=torch.int32)
    pooling.backward_sparse(
        torch.zeros(1030), bounds_of([530, 500]), columns, columns, hidden, cu_seqlens, weight,
        True, True, True,
    )  # fmt: skip
    assert compiled == [
        *(*LISTS, "sum_lists_kernel"),
        *(*LISTS, "sum_lists_kernel", "merge_splits_kernel"),
    ]


def test_scan(compiled):
    hidden, cu_seqlens, weight = batch([20, 130], 300, 64, torch.bfloat16)
    codes = scan.encoded(weight, torch.zeros(300))
    scan.scan(
        codes, hidden, cu_seqlens, weight, torch.zeros(300, dtype=torch.bfloat16), k=7,
        activation="elu1p",
    )  # fmt: skip
    assert compiled == [
        *("encode_states_kernel", "scan_kernel"),
        *("row_threshold_kernel", "keep_kernel", "keep_kernel", "rescore_kernel"),
        *("keep_kernel", "keep_kernel", "rescore_kernel"),
    ]


@pytest.mark.parametrize(("V", "k"), [(1, None), (2, 1), (300, 7), (40000, 5), (40000, 20000)])
def test_selection(compiled, V, k):
    lexical = (bounds_of([1, 1]), torch.tensor([0, 0]))
    select_topk(torch.zeros(2, V), k, activation="elu1p", lexical=lexical, trim=False)
    if k is None:
        assert compiled == ["keep_kernel"] * 2
        return
    parts = ["part_candidates_kernel"] if (V, k) == (40000, 5) else []
    assert compiled == [
        *(*parts, "row_threshold_kernel", "mark_lexical_kernel"),
        *("keep_kernel", "keep_kernel"),
    ]
