"""Lengths of gated rows: exact values, and gradients that are right on average."""

import model_folders
import numpy as np
import pytest
import torch

from vdr_db.encoders.text import SparseEncoder
from vdr_db.training.sampled_lengths import draw_columns, scaled_to_unit
from vdr_db.training.sparse_ops import GatedRows
from vdr_db.training.vectors import Side

TEXTS = ["green sun", "blue book and a heavy star", "red"]


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "bert"
    model_folders.write_bert(folder)
    encoder = SparseEncoder.from_pretrained(folder, activation="elu1p", query_k=9, device="cpu")
    return Side.of(encoder, "query", lexical=True)


def gradients(side, unit_sample):
    """Weights of rows of length 1, and the gradient of some function of them."""
    tokens = side.encoder.tokenizer.encode(TEXTS)
    parameters = dict(side.tower.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_()
        parameter.grad = None
    chosen = np.arange(len(TEXTS))
    if unit_sample:
        weights = side.encode(tokens, chosen, {"gated"}, unit_sample=unit_sample).gated.weights
    else:
        found = side.encode(tokens, chosen, {"gated", "dense"})
        weights = found.gated.weights / found.dense.norm(dim=1)[found.gated.rows]
    (weights * torch.arange(len(weights)).cos()).sum().backward()
    return weights.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}


def test_all_columns_drawn_give_the_gradient_of_the_whole_row(side):
    weights, exact = gradients(side, 0)
    found, gradient = gradients(side, side.encoder.vocabulary.columns + 5)
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-7)
    assert gradient.keys() == exact.keys()
    scale = max(float(expected.abs().max()) for expected in exact.values())
    for name, expected in exact.items():
        torch.testing.assert_close(gradient[name], expected, rtol=1e-3, atol=1e-6 * scale, msg=name)


def test_a_few_drawn_columns_give_it_on_average(side):
    weights, exact = gradients(side, 0)
    name = "head.norm.weight"
    draws = []
    for seed in range(400):
        torch.manual_seed(seed)
        found, gradient = gradients(side, 12)
        torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-7)
        draws.append(gradient[name])
    drawn = torch.stack(draws)
    error = drawn.std(dim=0) / len(draws) ** 0.5
    assert float(drawn.std(dim=0).max()) > 0
    assert bool(((drawn.mean(dim=0) - exact[name]).abs() < 5 * error + 1e-6).all())


def test_loops_in_float64_agree():
    """Value and gradient of one row, written out."""
    generator = torch.Generator().manual_seed(4)
    everything = torch.rand(1, 7, dtype=torch.float64, generator=generator) + 0.1
    columns = torch.tensor([5, 0, 2])
    own = everything[0, [0, 4]].clone().requires_grad_()
    drawn = everything[:, columns].clone().requires_grad_()
    kept = GatedRows(torch.tensor([0, 2]), torch.tensor([0, 4]), own, 7)
    found = scaled_to_unit(kept, everything, drawn, columns).weights
    length = float(everything.square().sum().sqrt())
    assert found.tolist() == pytest.approx([float(w) / length for w in own.detach()])
    found[1].backward()
    # d (w4 / |v|) = dw4 / |v| - w4 / |v|^3 (w0 dw0 + w4 dw4 + 5 / 2 (w5 dw5 + w2 dw2))
    w0, w4, w5, w2 = (float(everything[0, i]) for i in (0, 4, 5, 2))
    slope = w4 / length**3
    assert own.grad.tolist() == pytest.approx([-slope * w0, 1 / length - slope * w4])
    assert drawn.grad[0].tolist() == pytest.approx([-slope * 2.5 * w5, 0.0, -slope * 2.5 * w2])


def test_columns_are_drawn_once_each():
    torch.manual_seed(0)
    some = draw_columns(50, 20, torch.device("cpu"))
    assert len(set(some.tolist())) == 20
    assert sorted(draw_columns(5, 20, torch.device("cpu")).tolist()) == list(range(5))


def test_a_row_that_keeps_everything_needs_no_sample():
    everything = torch.tensor([[1.0, 2.0, 2.0]])
    kept = GatedRows(torch.tensor([0, 3]), torch.arange(3), everything[0].clone(), 3)
    columns = torch.tensor([1])
    found = scaled_to_unit(kept, everything, everything[:, columns], columns)
    assert found.weights.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
