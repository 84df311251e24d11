"""Attention of transformers' bodies on packed rows, in all its layouts, against masked products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vdr_db.towers import packed_attention as packed
from vdr_db.towers.packing import Run
from vdr_db.towers.text_body import Padding, Ragged

LENGTHS = [9, 9, 5, 1]
RUNS = [Run(0, 2, 9, 9), Run(18, 1, 5, 5), Run(23, 1, 1, 1)]
HEADS, KEY_HEADS, SIZE = 4, 2, 8


class Layer(nn.Module):
    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


def by_hand(query, key, value, *, causal, reach):
    """Each text alone, with its mask written out."""
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    out, start = [], 0
    for length in LENGTHS:
        q, k, v = (x[0, :, start : start + length] for x in (query, key, value))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = distance >= 0 if causal else torch.ones(length, length, dtype=torch.bool)
        if reach is not None:
            seen = seen & (distance.abs() <= reach)
        scores = (q @ k.transpose(1, 2) * 0.3).masked_fill(~seen, -torch.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(out)[None]


def ragged(q, k, v, bounds, _bounds, longest, _longest, *, scale, window_size):
    """What torch's `varlen_attn` is asked for, by its documented meaning."""
    left, right = window_size
    out = []
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        ahead = torch.arange(b - a) - torch.arange(b - a)[:, None]
        seen = (ahead <= right) if right >= 0 else torch.ones_like(ahead, dtype=torch.bool)
        seen = seen & (ahead >= -left) if left >= 0 else seen
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[a:b]))
    return torch.cat(out)


@pytest.mark.parametrize("layout", ["runs", "padding", "ragged"])
@pytest.mark.parametrize(
    ("own", "causal", "window", "reach"),
    [
        (False, False, None, None),
        (False, None, 4, 3),  # an encoder's window, as ModernBERT has it
        (True, None, None, None),
        (True, None, 3, 2),  # a decoder's
        (True, False, 3, 3),  # a decoder made bidirectional sees as far on both sides
    ],
)
def test_every_layout_gives_each_text_its_own_attention(
    monkeypatch, layout, own, causal, window, reach
):
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, 24, SIZE), (KEY_HEADS, 24, SIZE), (KEY_HEADS, 24, SIZE))
    query, key, value = (torch.randn(1, *size, generator=generator) for size in sizes)
    bounds = torch.tensor([0, 9, 18, 23, 24], dtype=torch.int32)
    layouts = {
        "runs": None,
        "padding": Padding.of(RUNS, torch.device("cpu")),
        "ragged": Ragged(bounds, 9),
    }
    monkeypatch.setattr(packed, "ragged_attention", lambda *_: ragged)
    out, weights = packed.packed_attention(
        Layer(own),
        query,
        key,
        value,
        None,
        scaling=0.3,
        is_causal=causal,
        sliding_window=window,
        packed=packed.PackedTexts(RUNS, layouts[layout]),
    )
    assert weights is None
    is_causal = own if causal is None else causal
    expected = by_hand(query, key, value, causal=is_causal, reach=reach)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_what_packed_rows_do_not_offer_is_refused():
    x = torch.zeros(1, 1, 1, 8)
    texts = packed.PackedTexts([Run(0, 1, 1, 1)])
    for more in ({"position_bias": x}, {"softcap": 3.0}, {"s_aux": x}):
        with pytest.raises(packed.NotPackable, match=next(iter(more))):
            packed.packed_attention(Layer(False), x, x, x, None, packed=texts, **more)
    with pytest.raises(packed.NotPackable):
        packed.packed_attention(Layer(False), x, x, x, torch.ones(1), packed=texts)
