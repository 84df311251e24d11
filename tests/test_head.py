"""Heads and bodies: against loops in float64, against torch's own modules, and their memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vdr_db.errors import ConfigError
from vdr_db.kernels import project_pool
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import FAMILIES
from vdr_db.towers.packing import Run
from vdr_db.towers.text_body import ACTIVATIONS, Body, Padding, attend, packing_is_exact
from vdr_db.towers.text_head import make_head

H, IDS = 16, 1100
CONFIG = FAMILIES["bert"].body_config(
    {"vocab_size": IDS, "hidden_size": H, "num_attention_heads": 2, "intermediate_size": 24}
)
TOKENS = [f"w{i}" if i % 3 else f"é{i}" for i in range(IDS)]


def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary(TOKENS, kind=kind)


def filled(head: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in head.named_parameters()
    }
    head.load_state_dict(state, assign=True)
    return head


def scored(head: torch.nn.Module, hidden: torch.Tensor, bounds: list[int], table: torch.Tensor):
    """As a tower scores the last layer of its body."""
    parts = head.transform(hidden), torch.tensor(bounds), head.matrix(table), head.bias_rows()
    return project_pool(*parts)


def normed(x: np.ndarray, head: torch.nn.Module, eps: float) -> np.ndarray:
    weight, bias = (p.detach().numpy().astype(np.float64) for p in head.norm.parameters())
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * weight + bias


def largest(z: np.ndarray, bounds: list[int]) -> np.ndarray:
    return np.stack([z[i:j].max(0) for i, j in itertools.pairwise(bounds)])


@pytest.mark.parametrize("kind", ["all", "from_999", "from_1000", "ascii_from_999"])
def test_vdr_head_is_norm_and_tied_embeddings(kind):
    words = vocabulary(kind)
    head = filled(make_head("vdr", CONFIG, words, tied=True))
    hidden, table = torch.randn(7, H) * 1e-2, torch.randn(IDS, H)
    bounds = [0, 3, 7]
    with torch.no_grad():
        pooled = scored(head, hidden, bounds, table)
    x = normed(hidden.numpy().astype(np.float64), head, 1e-5)  # small states: epsilon shows
    z = x @ table.numpy().astype(np.float64)[words.column_to_id].T
    assert pooled.logits.shape == (2, words.columns)
    np.testing.assert_allclose(pooled.logits.numpy(), largest(z, bounds), atol=2e-5)


@pytest.mark.parametrize("kind", ["all", "ascii_from_999"])
@pytest.mark.parametrize("tied", [True, False])
def test_mlm_head_is_transform_decoder_and_bias(kind, tied):
    words = vocabulary(kind)
    head = filled(make_head("mlm", CONFIG, words, tied=tied))
    hidden, table = torch.randn(7, H), torch.randn(IDS, H)
    bounds = [0, 4, 7]
    with torch.no_grad():
        pooled = scored(head, hidden, bounds, table)
    dense = {n: p.detach().numpy().astype(np.float64) for n, p in head.named_parameters()}
    x = hidden.numpy().astype(np.float64) @ dense["dense.weight"].T + dense["dense.bias"]
    x = x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    x = normed(x, head, 1e-12)
    decoder = table.numpy() if tied else dense["decoder.weight"]
    z = x @ decoder[words.column_to_id].T.astype(np.float64) + dense["bias"][words.column_to_id]
    np.testing.assert_allclose(pooled.logits.numpy(), largest(z, bounds), atol=5e-5)


def test_a_range_of_columns_is_a_view():
    table = torch.randn(IDS, H)
    rows = make_head("vdr", CONFIG, vocabulary("from_999"), tied=True).matrix(table)
    assert rows.data_ptr() == table[999].data_ptr()


def test_scattered_columns_are_gathered_once_and_again_after_a_change():
    table = torch.randn(IDS, H)
    words = vocabulary("ascii_from_999")
    head = make_head("vdr", CONFIG, words, tied=True)
    with torch.inference_mode():
        first = head.matrix(table)
        assert head.matrix(table).data_ptr() == first.data_ptr()
    table.mul_(2)
    assert torch.equal(head.matrix(table), table[words.column_to_id.astype(np.int64)])


@pytest.mark.parametrize("kind", ["from_999", "ascii_from_999"])
def test_gradients_reach_the_tied_embeddings(kind):
    words = vocabulary(kind)
    head = filled(make_head("vdr", CONFIG, words, tied=True))
    table = torch.randn(IDS, H, requires_grad=True)
    hidden = torch.randn(5, H, requires_grad=True)
    scored(head, hidden, [0, 2, 5], table).logits.sum().backward()
    touched = table.grad.abs().sum(1) > 0
    assert touched.nonzero()[:, 0].tolist() == words.column_to_id.tolist()
    assert head.norm.weight.grad.abs().sum() > 0
    assert hidden.grad.abs().sum() > 0


def test_a_model_with_fewer_rows_than_ids_is_refused():
    with pytest.raises(ConfigError, match=r"each of the tokenizer's 1101 ids, got 1100 rows"):
        make_head("vdr", CONFIG, Vocabulary([*TOKENS, "more"]), tied=True)


def test_unknown_head_and_activation_are_refused():
    with pytest.raises(ConfigError, match=r"\['vdr', 'mlm', 'mean'\], got 'splade'"):
        make_head("splade", CONFIG, vocabulary("all"), tied=True)
    odd = FAMILIES["bert"].body_config({"hidden_act": "mish"})
    with pytest.raises(ConfigError, match="got 'mish'"):
        Body(odd)
    with pytest.raises(ConfigError, match="got 'mish'"):
        make_head("mlm", odd, vocabulary("all"), tied=True)


def test_attention_on_runs_is_attention_of_each_text():
    query, key, value = torch.randn(3, 14, H).unbind()
    runs = [Run(0, 2, 4, 3), Run(8, 1, 6, 6)]
    out = attend(query, key, value, runs, 2)
    for start, length, kept in ((0, 4, 3), (4, 4, 3), (8, 6, 6)):
        rows, seen = slice(start, start + length), slice(start, start + kept)
        q = query[rows].view(length, 2, -1).double()
        k, v = (x[seen].view(kept, 2, -1).double() for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) / (H // 2) ** 0.5
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, H)
        torch.testing.assert_close(out[rows].double(), expected, atol=1e-6, rtol=0)


def test_padded_attention_of_other_devices_agrees():
    query, key, value = torch.randn(3, 14, H).unbind()
    runs = [Run(0, 2, 4, 3), Run(8, 1, 6, 6)]
    padding = Padding.of(runs, torch.device("cpu"))
    assert padding.slots.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17]
    padded = attend(query, key, value, runs, 2, padding=padding)
    torch.testing.assert_close(padded, attend(query, key, value, runs, 2))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(name):
    known = {
        "gelu": torch.nn.functional.gelu,
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "swish": torch.nn.functional.silu,
    }
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    expected = known.get(name, lambda x: torch.nn.functional.gelu(x, approximate="tanh"))(x)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_a_row_do_not_depend_on_other_rows(name):
    x = torch.randn(333, 136) * 3
    whole = ACTIVATIONS[name](x)
    for start, stop in ((0, 1), (5, 12), (100, 333)):
        assert torch.equal(ACTIVATIONS[name](x[start:stop].clone()), whole[start:stop])


def test_this_machine_packs_exactly_or_says_so():
    assert packing_is_exact(CONFIG, torch.float32) in (True, False)


def test_a_new_body_takes_no_memory_before_its_weights_come():
    body = Body(FAMILIES["bert"].body_config({}))
    assert {parameter.device.type for parameter in body.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in body.parameters()) == 108_891_648
