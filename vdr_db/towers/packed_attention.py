"""Attention of transformers' own bodies on packed rows.

transformers lets a program register an attention function and a mask function by name. Ours leave
masks out, and go through the texts of a packed row as `text_body` does: on the CPU one call for
each run of texts of equal length, on a GPU one call for all. So every body that asks for its
attention by name runs without padding, and a text's vector depends on that text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.towers.packing import Run
from vdr_db.towers.text_body import QUERY_MULTIPLE, Padding, Ragged, ragged_attention

__all__ = ["NAME", "NotPackable", "PackedTexts", "register"]

NAME = "vdr_db_packed"
"""Name of attention and mask in transformers' registers."""

_REFUSED = ("position_bias", "softcap", "s_aux", "head_mask")


class NotPackable(Exception):
    """A body asks its attention for something that packed rows do not offer."""


@dataclass(frozen=True)
class PackedTexts:
    """The texts of a packed row.

    Attributes:
        runs: Texts of equal length in packed order.
        layout: As in `text_body.Body.layout`; None for one call of attention a run.
    """

    runs: Sequence[Run]
    layout: Padding | Ragged | None = None


def register() -> None:
    """Makes `NAME` known to transformers; again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask at all: which rows see each other follows from the runs."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed: PackedTexts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Softmax attention within each text, by the calling convention of transformers.

    Args:
        module: The layer that asks.
        query: `[1, heads, T, d]`.
        key: `[1, key heads, T, d]`.
        value: `[1, key heads, T, d]`.
        attention_mask: None.
        scaling: Of the products; None for 1 / sqrt(d).
        dropout: Probability to drop a weight.
        sliding_window: How far a row sees.
        is_causal: Whether rows see only earlier ones; None leaves it to the layer.
        packed: The texts, handed through the body.
        others: Whatever else the body hands to its attention.

    Returns:
        `[1, T, heads, d]`, and no weights.

    Raises:
        NotPackable: The body needs more than that.
    """
    if packed is None or attention_mask is not None or query.shape[0] != 1:
        raise NotPackable("texts and masks")
    asked = [name for name in _REFUSED if others.get(name) is not None]
    if asked or (key.shape[2] != query.shape[2]):
        raise NotPackable(", ".join(asked) or "keys of other rows")
    own = bool(getattr(module, "is_causal", True))
    causal = own if is_causal is None else is_causal
    # Decoders made bidirectional see up to the window on both sides, encoders one less: so do the
    # masks of transformers.
    reach = None
    if sliding_window is not None:
        reach = sliding_window if own and not causal else sliding_window - 1
    q, k, v = (rows[0].transpose(0, 1) for rows in (query, key, value))  # [T, heads, d]
    if k.shape[1] != q.shape[1]:
        k, v = (rows.repeat_interleave(q.shape[1] // rows.shape[1], dim=1) for rows in (k, v))
    if packed.layout is None:
        parts = [_run(q, k, v, run, scaling, dropout, causal, reach) for run in packed.runs]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        out = _at_once(q, k, v, packed.layout, scaling, dropout, causal, reach)
    return out[None], None


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run: Run,
    scaling: float | None,
    dropout: float,
    causal: bool,
    reach: int | None,
) -> Tensor:
    """Attention of texts of one length, `[count * length, heads, d]`."""
    q, k, v = (
        rows[run.start : run.stop].unflatten(0, (run.count, run.length)).transpose(1, 2)
        for rows in (query, key, value)
    )
    seen = _seen(run.length, causal, reach, query.device)
    if rest := -run.length % QUERY_MULTIPLE:
        q = F.pad(q, (0, 0, 0, rest))
        if seen is not None:  # added rows see everything: their result is thrown away
            seen = F.pad(seen, (0, 0, 0, rest), value=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)
    return out[:, :, : run.length].transpose(1, 2).flatten(0, 1)


def _at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Padding | Ragged,
    scaling: float | None,
    dropout: float,
    causal: bool,
    reach: int | None,
) -> Tensor:
    """Attention of all texts in one call, `[T, heads, d]`."""
    heads = query.shape[1]
    if isinstance(layout, Ragged):
        attention = ragged_attention(query.device, query.dtype, query.shape[2])
        assert attention is not None  # the tower has asked
        side = -1 if reach is None else reach
        bounds, longest = layout.bounds, layout.longest
        window = (side, 0 if causal else side)
        out: Tensor = attention(
            *(query.contiguous(), key.contiguous(), value.contiguous()),
            *(bounds, bounds, longest, longest),
            scale=scaling,
            window_size=window,
        )
        return out
    q, k, v = (layout.spread(rows.flatten(1), heads) for rows in (query, key, value))
    seen = _seen(q.shape[2], causal, reach, query.device)
    mask = layout.seen if seen is None else layout.seen & seen
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
    collected: Tensor = layout.collect(out.nan_to_num()).unflatten(1, (heads, -1))
    return collected


def _seen(length: int, causal: bool, reach: int | None, device: torch.device) -> Tensor | None:
    """Which row sees which, `[length, length]`, or None where each sees all."""
    if not causal and (reach is None or reach >= length - 1):
        return None
    rows = torch.arange(length, device=device)
    distance = rows[:, None] - rows
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if reach is None else seen & (distance.abs() <= reach)
