"""The CPU path: the reference's numbers, within eager's own error, and each document by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import batches, bounds_of, choices, lengths

from vdr_db.kernels import project_pool, reference
from vdr_db.kernels.cpu import pooling as cpu
from vdr_db.kernels.cpu import selection as cpu_selection
from vdr_db.kernels.cpu import tiles
from vdr_db.kernels.cpu.tiles import Tile

# Added to eager's error: the CPU path sums in another order, so where eager happens to be exact it
# may be off by the rounding of a sum of H products of size 1.
EPSILON = 1e-5


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that tiny batches cross their borders."""
    monkeypatch.setattr(cpu, "tile_for", lambda H, V, dtype: Tile(columns=min(7, V), tokens=16))


def random_documents(generator, sizes, H):
    return [torch.randn((size, H), generator=generator) for size in sizes]


def pool_documents(documents, weight, bias=None):
    H = weight.shape[1]
    hidden = torch.cat([torch.empty((0, H)), *documents])
    bounds = bounds_of([len(document) for document in documents])
    return project_pool(hidden, bounds, weight, bias, return_argmax=True)


def assert_as_good_as_eager(batch, dtype):
    """Error against float64 at most eager's in the same dtype, plus epsilon."""
    hidden, cu_seqlens, weight, bias = batch
    rounded = [None if x is None else x.to(dtype) for x in (hidden, weight, bias)]
    exact_inputs = [None if x is None else x.double() for x in rounded]
    exact = reference.project_pool(
        exact_inputs[0], cu_seqlens, exact_inputs[1], exact_inputs[2], return_argmax=True
    )
    got = project_pool(rounded[0], cu_seqlens, *rounded[1:], return_argmax=True)
    without = project_pool(rounded[0], cu_seqlens, *rounded[1:])
    assert without.argmax is None
    torch.testing.assert_close(without.logits, got.logits, rtol=0, atol=0, equal_nan=True)
    assert got.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.argmax.dtype == torch.int32
    is_finite = exact.logits.isfinite()
    assert torch.equal(got.logits.isnan(), exact.logits.isnan())
    is_infinite = exact.logits.isinf()
    assert torch.equal(got.logits[is_infinite].double(), exact.logits[is_infinite])
    eager = torch.full_like(exact.logits, torch.nan)
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if start < end:
            products = torch.nn.functional.linear(rounded[0][start:end], rounded[1], rounded[2])
            eager[b] = products.amax(0).double()
    error = (got.logits.double() - exact.logits).abs()[is_finite]
    allowed = (eager - exact.logits).abs()[is_finite] + EPSILON * (
        1 + exact.logits.abs()[is_finite]
    )
    assert (error <= allowed).all()
    # The token that is named must reach the maximum, be it not the first of those float64 ties.
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if start < end:
            products = exact_inputs[0][start:end] @ exact_inputs[1].T
            named = products.gather(0, got.argmax[b : b + 1].long())[0]
            named = named if bias is None else named + exact_inputs[2]
            short = (exact.logits[b] - named)[is_finite[b]]
            assert (short <= 4 * EPSILON * (1 + exact.logits[b][is_finite[b]].abs())).all()
    is_empty = exact.argmax < 0
    assert torch.equal(got.argmax < 0, is_empty)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_small_tiles_are_as_good_as_eager(dtype):
    @settings(max_examples=25)
    @given(batch=batches(special=True))
    def check(batch):
        assert_as_good_as_eager(batch, dtype)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "H", "V"),
    [([1], 64, 507), ([63, 1, 0, 128], 123, 29), ([500, 3], 33, 1), ([2] * 60, 65, 2049)],
    ids=["one token", "odd", "V=1", "many pairs"],
)
def test_true_tiles_are_as_good_as_eager(dtype, sizes, H, V):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((sum(sizes), H), generator=generator)
    weight = torch.randn((V, H), generator=generator)
    bias = torch.randn(V, generator=generator)
    assert_as_good_as_eager((hidden, bounds_of(sizes), weight, bias), dtype)


@pytest.mark.usefixtures("small_tiles")
def test_ties_go_to_the_first_token_across_blocks():
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    hidden = torch.ones((60, 1))
    hidden[50] = torch.nan
    hidden[55] = torch.nan
    pooled = project_pool(hidden, torch.tensor([0, 3, 40, 60]), weight, return_argmax=True)
    assert pooled.argmax.tolist() == [[0, 0, 0], [0, 0, 0], [10, 10, 10]]
    assert pooled.logits.isnan().tolist() == [[False] * 3, [False] * 3, [True] * 3]
    assert not pooled.logits[:2, 2].signbit().any()


def test_other_documents_nan_stays_there():
    hidden = torch.ones((4, 8))
    hidden[1] = torch.nan
    pooled = project_pool(hidden, torch.tensor([0, 1, 2, 4]), torch.ones(5, 8))
    assert pooled.logits.isnan().all(1).tolist() == [False, True, False]


def test_strides_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((30, 64), generator=generator)
    weight = torch.randn((300, 64), generator=generator)
    bounds = torch.tensor([0, 13, 30], dtype=torch.int32)
    expected = project_pool(hidden, bounds, weight[100:]).logits
    wide = torch.randn((31, 99), generator=generator)
    wide[1:, 1:65] = hidden
    columns_first = weight.T.contiguous().T
    got = project_pool(wide[1:, 1:65], bounds, columns_first[100:]).logits
    assert torch.equal(got, expected)


SIZES = [1, 1, 2, 3, 11, 12, 13, 15, 16, 17, 31, 33, 64, 65, 100, 1, 129, 400, 1, 7]


@pytest.mark.parametrize(
    ("H", "V", "threads"),
    [(768, 2300, 1), (384, 2049, 1), (123, 507, 2), (64, 1, 1), (64, 1, 2), (1, 40, 1)],
)
def test_a_document_depends_on_itself_alone_bit_for_bit(H, V, threads):
    """One by one, in batches of every size, shuffled, and beside NaN: the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(H)
        weight = torch.randn((V, H), generator=generator)
        documents = random_documents(generator, SIZES, H)
        logits, argmax = pool_documents(documents, weight)
        for b, document in enumerate(documents):
            alone = pool_documents([document], weight)
            assert torch.equal(alone.logits[0], logits[b])
            assert torch.equal(alone.argmax[0], argmax[b])
        for count in (2, 3, 5, 9, 14, 19):
            order = torch.randperm(len(documents), generator=generator)[:count].tolist()
            some = pool_documents([documents[i] for i in order], weight)
            assert torch.equal(some.logits, logits[order])
            assert torch.equal(some.argmax, argmax[order])
        noisy = [torch.full((5, H), torch.nan), *documents, torch.full((1, H), torch.inf)]
        assert torch.equal(pool_documents(noisy, weight).logits[1:-1], logits)
    finally:
        torch.set_num_threads(before)


def test_a_blas_that_depends_on_neighbours_costs_speed_not_the_promise(monkeypatch):
    """Where the trial of the packed path fails, each document goes through alone."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((50, 24), generator=generator)
    documents = random_documents(generator, [*SIZES, 0], 24)
    packed = pool_documents(documents, weight)
    monkeypatch.setattr(cpu, "rows_are_independent", lambda *sizes: False)
    blocks = list(cpu.plan_blocks([0, 5, 5, 405, 406], Tile(50, 384), packed=False))
    assert [(block.start, block.tokens) for block in blocks] == [
        (0, 5),
        (5, 384),
        (389, 16),
        (405, 1),
    ]
    alone = pool_documents(documents, weight)
    torch.testing.assert_close(alone, packed)
    for b, document in enumerate(documents):
        assert torch.equal(pool_documents([document], weight).logits[0], alone.logits[b])


def test_the_trial_notices_a_blas_that_depends_on_neighbours(monkeypatch):
    true_mm = torch.mm
    tile = Tile(columns=8, tokens=64)

    def narrow_products_differ(a, b):
        product = true_mm(a, b)
        return product * (1 + 2**-20) if b.shape[1] == 32 else product

    def last_place_differs(a, b):
        product = true_mm(a, b)
        product[:, -1] *= 1 + 2**-20
        return product

    for wrong in (narrow_products_differ, last_place_differs):
        tiles._try_rows.cache_clear()
        monkeypatch.setattr(torch, "mm", wrong)
        assert not tiles.rows_are_independent(tile, 16, 8, torch.float32)
    monkeypatch.setattr(torch, "mm", true_mm)
    tiles._try_rows.cache_clear()
    assert tiles.rows_are_independent(tile, 16, 8, torch.float32)


@given(sizes=lengths(), packed=st.booleans())
def test_blocks_cover_every_token_once(sizes, packed):
    bounds = bounds_of(sizes).tolist()
    seen = []
    for block in cpu.plan_blocks(bounds, Tile(8, 16), packed=packed):
        assert block.tokens <= block.rows <= 16
        covered = 0
        for span in block.spans:
            assert span.start == covered
            for i in range(span.documents):
                first = block.start + span.start + i * span.length
                assert first == bounds[span.document + i] + span.skipped
                seen.extend((span.document + i, first + n) for n in range(span.length))
            covered += span.documents * span.length
        assert covered == block.tokens
    assert seen == [(b, t) for b in range(len(sizes)) for t in range(bounds[b], bounds[b + 1])]


def test_tiles_fit_memory():
    for H in (1, 128, 768, 1024, 4096, 8192):
        tile = tiles.tile_for(H, 250_002, torch.float32)
        floats = tile.columns * H + tile.tokens * H + tile.columns * tile.tokens
        assert floats * 4 <= 32 << 20
        assert tile.tokens in tiles.block_sizes(tile.tokens)
    assert tiles.tile_for(768, 507, torch.float32).columns == 507


def assert_same_selection(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@given(choice=choices())
def test_selection_is_the_references(choice):
    logits, k, activation, lexical = choice
    options = {"activation": activation, "lexical": lexical}
    assert_same_selection(
        cpu.select_topk(logits, k, **options), reference.select_topk(logits, k, **options)
    )
    wide = torch.stack([logits, logits], 2).double()[:, :, 0]
    assert_same_selection(
        cpu.select_topk(wide, k, **options), reference.select_topk(wide, k, **options)
    )


@pytest.mark.parametrize("k", [1, 768, 4000, None])
def test_selection_of_many_rows(monkeypatch, k):
    monkeypatch.setattr(cpu_selection, "_BLOCK_LOGITS", 3 * 4000)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((20, 4000), generator=generator).mul(50).round()
    lexical = (torch.arange(21) * 3, torch.randint(0, 4000, (60,), generator=generator))
    for rows, given_columns in ((logits, lexical), (logits[:, ::2].contiguous(), None)):
        size = None if k is None else min(k, rows.shape[1])
        options = {"activation": "elu1p", "lexical": given_columns}
        expected = reference.select_topk(rows, size, **options)
        assert_same_selection(cpu.select_topk(rows, size, **options), expected)


def test_selection_of_a_row_depends_on_that_row_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((40, 1000), generator=generator) * 4
    for activation in ("elu1p", "log1p_relu", "double_log1p_relu"):
        together = cpu.select_topk(logits, 77, activation=activation)
        for b in range(40):
            start, end = together.indptr[b : b + 2].tolist()
            alone = cpu.select_topk(logits[b : b + 1], 77, activation=activation)
            assert torch.equal(alone.columns, together.columns[start:end])
            assert torch.equal(alone.weights, together.weights[start:end])
