"""What tests of the GPU path use without a GPU: encoders in main memory, loops for kernels."""

from __future__ import annotations

import itertools
import random

import torch

from vdr_db.encoders.text import SparseEncoder


def load(folder, **options):
    return SparseEncoder.from_pretrained(folder, device="cpu", **options)


def texts_of(encoder, count, seed=0, longest=24):
    chooser = random.Random(seed)
    words = [token for token in encoder.vocabulary.tokens if token.isalpha()]
    return [" ".join(chooser.choices(words, k=chooser.randint(0, longest))) for _ in range(count)]


def looped_attention(q, k, v, bounds, bounds_k, longest, longest_k):
    """What torch's kernel for packed rows computes, text by text."""
    assert bounds is bounds_k
    assert longest == longest_k
    assert bounds.dtype == torch.int32
    out = torch.full_like(q, torch.nan)
    for start, stop in itertools.pairwise(bounds.tolist()):
        assert stop - start <= longest
        rows = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(*rows)
        out[start:stop] = found[0].transpose(0, 1)
    return out
