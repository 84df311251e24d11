"""Models of every body and head that has graphs, texts for them, and what counts as equal."""

from model_folders import write_bert, write_distilbert, write_roberta, write_upstream

TEXTS = [
    "the cat paints a blue wave",
    "cats",
    "",
    "heavy books of the theory in small light, running and running to the sea",
    "the moon and the sun " * 30,
    "water",
]
CLOSE = 1e-4
"""Most that a weight may differ between the runtimes; a column whose score is nearer than twice
that to the next may be kept by one alone."""


def assert_close(ours, theirs):
    """Two batches of vectors are the same up to rounding."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        mine = dict(zip(mine.indices.tolist(), mine.values.tolist(), strict=True))
        other = dict(zip(other.indices.tolist(), other.values.tolist(), strict=True))
        assert len(mine) == len(other)
        lowest = min(mine.values(), default=0.0)
        for id in mine.keys() ^ other.keys():
            assert abs({**mine, **other}[id] - lowest) < 2 * CLOSE
        for id in mine.keys() & other.keys():
            assert abs(mine[id] - other[id]) < CLOSE


FOLDERS = {
    "bert": (write_bert, {}),
    "untied": (write_bert, {"tied": False}),
    "gelu_new": (write_bert, {"hidden_act": "gelu_new"}),
    "relu": (write_bert, {"hidden_act": "relu"}),
    "silu": (write_bert, {"hidden_act": "silu"}),
    "distilbert": (write_distilbert, {}),
    "roberta": (write_roberta, {}),
    "vdr, two towers": (write_upstream, {}),
    "vdr, one tower": (write_upstream, {"shared": True, "file": "bin"}),
    "vdr, ASCII tokens": (write_upstream, {"kind": "vdr_crossmodal_text"}),
}
