"""Measures forward tiles on a device, on request; nothing here runs by itself.

row = autotune.tune(hidden, cu_seqlens, weight)
print(autotune.as_source(row))        # a line for `configs.POOL_TILES`
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from vdr_db.errors import ConfigError
from vdr_db.kernels.cuda import pooling
from vdr_db.kernels.cuda.configs import PoolRow, PoolTile
from vdr_db.kernels.cuda.primitives import compute_capability

__all__ = ["CANDIDATES", "as_source", "tune"]

logger = logging.getLogger(__name__)

CANDIDATES: tuple[PoolTile, ...] = (
    PoolTile("aligned", 256, 128, 64, 8, 8, 3, True),
    PoolTile("aligned", 256, 128, 64, 8, 8, 4, True),
    PoolTile("aligned", 256, 128, 64, 16, 8, 4, True),
    PoolTile("aligned", 256, 128, 64, 4, 8, 4, True),
    PoolTile("aligned", 256, 128, 128, 8, 8, 2, True),
    PoolTile("aligned", 128, 256, 64, 8, 8, 4, True),
    PoolTile("aligned", 128, 128, 64, 8, 4, 3, True),
    PoolTile("aligned", 256, 64, 64, 8, 8, 4, True),
    PoolTile("packed", 256, 128, 64, 8, 8, 4, True),
    PoolTile("packed", 256, 64, 64, 8, 8, 4, True),
    PoolTile("packed", 128, 64, 64, 8, 4, 4, True),
    PoolTile("packed", 256, 32, 64, 8, 8, 4, True),
    PoolTile("aligned", 128, 128, 64, 8, 8, 3, False),
    PoolTile("packed", 128, 64, 64, 8, 8, 3, False),
)
"""Tiles worth measuring with 16-bit inputs; those a device cannot run are passed over."""


def tune(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    *,
    need_argmax: bool = False,
    candidates: Sequence[PoolTile] = CANDIDATES,
    measure_ms: Callable[[Callable[[], object]], float] | None = None,
) -> PoolRow:
    """Row of the tile table for these inputs: the fastest candidate.

    Args:
        hidden: `[T, H]`, as for `pooling.forward`.
        cu_seqlens: `[B + 1]`, as for `pooling.forward`.
        weight: `[V, H]`, as for `pooling.forward`.
        need_argmax: Measure with token positions.
        candidates: Tiles to try.
        measure_ms: Milliseconds that a call takes; by default the median by device events.

    Returns:
        A row whose bounds are these very sizes; widen them by hand.

    Raises:
        ConfigError: No candidate could run.
    """
    if measure_ms is None:
        from triton.testing import do_bench

        def measure_ms(call: Callable[[], object]) -> float:
            return float(do_bench(call, warmup=10, rep=50, return_mode="median"))

    times: list[tuple[float, PoolTile]] = []
    for tile in candidates:
        try:
            elapsed = measure_ms(
                lambda tile=tile: pooling.forward(  # type: ignore[misc]
                    hidden, cu_seqlens, weight, need_argmax=need_argmax, tile=tile
                )
            )
        except Exception as error:  # compilers and drivers raise many kinds: the tile cannot run
            logger.info("%s cannot run: %s", tile, error)
            continue
        times.append((elapsed, tile))
    if not times:
        raise ConfigError("`candidates` held no tile that runs on this device; pass smaller ones.")
    return PoolRow(
        sm=compute_capability(hidden),
        bits=hidden.element_size() * 8,
        hidden_max=hidden.shape[1],
        vocabulary_max=weight.shape[0],
        length_max=-(-hidden.shape[0] // (cu_seqlens.shape[0] - 1)),
        tile=min(times, key=lambda pair: pair[0])[1],
    )


def as_source(row: PoolRow) -> str:
    """A row as a line of `configs.POOL_TILES`."""
    *bounds, _ = dataclasses.astuple(row)
    tile = ", ".join(repr(value) for value in dataclasses.astuple(row.tile)).replace("'", '"')
    return f"PoolRow({', '.join(map(str, bounds))}, PoolTile({tile})),"
