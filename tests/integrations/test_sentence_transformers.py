"""`accelerate`: the same vectors and gradients as sentence-transformers alone, and undoable."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from vdr_db.errors import ConfigError  # noqa: E402
from vdr_db.integrations.sentence_transformers import TOLERANCE, accelerate  # noqa: E402

TEXTS = [
    "a cat is laying next to a blue book",
    "",
    "one",
    "many words " * 40,
    "日本語 and emoji 🙂",
]
PAIRS = (["a cat on a sofa", "how tall is a giraffe"], ["the cat sleeps", "giraffes are tall"])


@pytest.fixture(scope="module")
def st():
    """Imported here: it takes seconds, which only the process that runs these tests need spend."""
    return pytest.importorskip("sentence_transformers")


@pytest.fixture
def model(st, tiny_splade_folder):
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    transformer = Transformer(str(tiny_splade_folder), transformer_task="fill-mask")
    return st.SparseEncoder(modules=[transformer, SpladePooling("max")], device="cpu")


def encode(model):
    return model.encode(TEXTS, convert_to_sparse_tensor=False, batch_size=3)


def without_dropout(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def loss_and_gradients(model):
    from sentence_transformers.sparse_encoder import losses

    loss = losses.SpladeLoss(
        model,
        losses.SparseMultipleNegativesRankingLoss(model),
        query_regularizer_weight=1e-3,
        document_regularizer_weight=1e-3,
    )
    features = [model.preprocess(texts) for texts in PAIRS]
    parts = loss(features, None)
    value = sum(parts.values()) if isinstance(parts, dict) else parts
    value.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return value.item(), gradients


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_vectors_agree_and_come_back(model, activation):
    model[1].activation_function = activation
    expected = encode(model)
    handle = accelerate(model)
    torch.testing.assert_close(encode(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected[0], torch.zeros_like(expected[0]))
    handle.restore()
    handle.restore()
    assert torch.equal(encode(model), expected)


def test_logits_are_never_held(model):
    seen = []
    vocabulary_size = model[0].model.config.vocab_size
    model[1].register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0]["token_embeddings"].shape[-1])
    )
    encode(model)
    assert set(seen) == {vocabulary_size}
    with accelerate(model):
        seen.clear()
        encode(model)
    assert set(seen) == {model[0].model.config.hidden_size}
    seen.clear()
    encode(model)
    assert set(seen) == {vocabulary_size}


def test_training_has_the_same_loss_and_gradients(model):
    plain = without_dropout(copy.deepcopy(model))
    fused = copy.deepcopy(model)
    accelerate(fused)
    expected_loss, expected = loss_and_gradients(plain)
    loss, gradients = loss_and_gradients(without_dropout(fused))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().clamp(min=1e-6)
        gap = ((gradient - expected[name]).abs().max() / scale).item()
        assert gap < 1e-3, f"{name}: {gap}"


def test_copies_and_pickles_stay_whole(model):
    accelerate(model)
    expected = encode(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pooling = twin[1].__dict__["forward"]
        assert pooling.projection is twin[0].model.get_output_embeddings()
        assert pooling.pooling is twin[1]
        assert torch.equal(encode(twin), expected)


def test_saved_files_are_those_of_the_plain_model(st, model, tmp_path):
    names = [name for name, _ in model.named_parameters()]
    accelerate(model)
    assert [name for name, _ in model.named_parameters()] == names
    expected = encode(model)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = st.SparseEncoder(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(encode(loaded), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_and_autocast(model):
    model.bfloat16()
    expected = encode(model)
    accelerate(model)
    vectors = encode(model)
    assert vectors.dtype == expected.dtype
    torch.testing.assert_close(
        vectors, expected, rtol=TOLERANCE[torch.bfloat16], atol=TOLERANCE[torch.bfloat16]
    )
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.preprocess(TEXTS)
        assert model(features)["sentence_embedding"].dtype == torch.float32


def test_what_cannot_be_accelerated_says_why(model):
    handle = accelerate(model)
    with pytest.raises(ConfigError, match="accelerated already"):
        accelerate(model)
    handle.restore()
    model[1].pooling_strategy = "sum"
    with pytest.raises(ConfigError, match="pool by 'max', got 'sum'"):
        accelerate(model)
    with pytest.raises(ConfigError, match="must be a sentence-transformers SparseEncoder, got str"):
        accelerate("naver/splade-v3")


class ScaledProjection(torch.nn.Linear):
    """A projection that does more than multiply, which the fused head cannot know."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_a_model_with_another_projection_is_left_unchanged(model):
    decoder = model[0].model.get_output_embeddings()
    decoder.__class__ = ScaledProjection
    expected = encode(model)
    with pytest.raises(ConfigError, match=r"The model is unchanged"):
        accelerate(model)
    assert torch.equal(encode(model), expected)
