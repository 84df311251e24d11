"""Tiles fit the shared memory of the card that they are chosen for, whatever its number."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from vdr_db.kernels.cuda.configs import POOL_TILES, backward_tiles, pool_tile

KILOBYTE = 1024
CARDS = [(75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
"""Compute capability, and kilobytes of shared memory that a program may have."""


@pytest.mark.parametrize(("sm", "kilobytes"), CARDS)
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("mean_length", [8.0, 500.0])
@pytest.mark.parametrize("descriptors", [True, False])
def test_a_tile_fits_the_card(sm, kilobytes, bits, mean_length, descriptors):
    sizes = (bits, 768, 30522, mean_length)
    try:
        tile = pool_tile(sm, *sizes, descriptors=descriptors, shared_memory=kilobytes * KILOBYTE)
    except LookupError:
        assert sm < 80
        return
    assert tile.shared_bytes(bits) <= kilobytes * KILOBYTE
    assert tile.num_stages * (tile.block_v + tile.block_t) * tile.block_k * bits // 8 < (
        tile.shared_bytes(bits)
    )
    assert not (tile.descriptors and sm < 90)
    if bits > 8:
        assert backward_tiles(sm, bits).onehot_length > 0


def test_two_cards_of_one_generation_may_get_two_tiles():
    def tile(kilobytes):
        return pool_tile(
            90, 16, 768, 30522, 500.0, descriptors=True, shared_memory=kilobytes * KILOBYTE
        )

    assert tile(227).block_v == 256
    assert tile(99).shared_bytes(16) <= 99 * KILOBYTE < tile(227).shared_bytes(16)


def test_every_row_of_the_table_is_chosen_for_some_card():
    chosen = {
        pool_tile(
            sm, bits, 768, 30522, length, descriptors=wide, shared_memory=kilobytes * KILOBYTE
        )
        for sm, kilobytes in CARDS[1:]
        for bits in (8, 16, 32)
        for length in (8.0, 500.0)
        for wide in (True, False)
    }
    assert {row.tile for row in POOL_TILES} == chosen
