"""Image encoders against a forward pass written from the description of VDR's image side.

The pass below is NumPy in float64 and takes the checkpoint's own names; it shares nothing with the
library but the file and the pixels.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from image_folders import VIT, ascii_ids, image_shapes, pixels, write_cross_modal
from model_folders import bert_tokenizer, bert_tokens, write_bert
from safetensors.torch import load_file, save_file

from vdr_db import CrossModalEncoder, ImageEncoder, SparseEncoder
from vdr_db.checkpoints.image_plan import upstream_names
from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from vdr_db.towers.image import ImageHead, ImageTower
from vdr_db.towers.image_body import VitBody, VitConfig

pytest.importorskip("PIL.Image")
from PIL import Image

SIZES = [(24, 24), (60, 40), (31, 77), (24, 25), (300, 24), (7, 5)]
PICTURES = [pixels(*size, seed=i) for i, size in enumerate(SIZES)]


# An independent forward pass


def norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def image_scores(weights, image, *, patch_size, layers, heads, **_):
    """Scores `[P, V]` of every patch of one preprocessed image `[3, S, S]`, float64."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    side = image.shape[1] // patch_size
    x = np.stack(
        [
            np.einsum(
                "ocij,cij->o",
                w["conv1.weight"],
                image[:, r : r + patch_size, c : c + patch_size],
            )
            for r in range(0, side * patch_size, patch_size)
            for c in range(0, side * patch_size, patch_size)
        ]
    )
    x = norm(x + w["positional_embedding"], w["ln_pre.weight"], w["ln_pre.bias"])
    for i in range(layers):
        b = f"transformer.resblocks.{i}."
        y = norm(x, w[f"{b}ln_1.weight"], w[f"{b}ln_1.bias"])
        y = y @ w[f"{b}attn.in_proj_weight"].T + w[f"{b}attn.in_proj_bias"]
        q, k, v = (part.reshape(len(x), heads, -1) for part in np.split(y, 3, axis=-1))
        mixed = np.zeros_like(q)
        for head in range(heads):
            scores = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1])
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = scores / scores.sum(-1, keepdims=True) @ v[:, head]
        mixed = mixed.reshape(x.shape) @ w[f"{b}attn.out_proj.weight"].T
        x = x + mixed + w[f"{b}attn.out_proj.bias"]
        y = norm(x, w[f"{b}ln_2.weight"], w[f"{b}ln_2.bias"])
        y = y @ w[f"{b}mlp.c_fc.weight"].T + w[f"{b}mlp.c_fc.bias"]
        y = y / (1 + np.exp(-1.702 * y))
        x = x + y @ w[f"{b}mlp.c_proj.weight"].T + w[f"{b}mlp.c_proj.bias"]
    return norm(x, w["ln_post.weight"], w["ln_post.bias"]) @ w["proj"].T


def image_row(weights, image, *, ids, size, k, **vit):
    """Weights over all token ids: elu1p of the largest score, L2 norm 1, then the k largest."""
    best = image_scores(weights, image, **vit).max(0)
    full = np.where(best >= 0, best + 1, np.exp(best))
    full /= np.sqrt((full**2).sum())
    kept = np.argsort(-best, kind="stable")[:k]
    row = np.zeros(size)
    row[np.array(ids)[kept]] = full[kept]
    return row


def image_weights(folder):
    file = folder / "model.safetensors"
    stored = load_file(file) if file.is_file() else torch.load(folder / "pytorch_model.bin")
    return {
        name.removeprefix("encoder_p."): tensor
        for name, tensor in stored.items()
        if name.startswith("encoder_p.")
    }


def dense(rows):
    return rows.to_scipy().toarray()


def with_pillow(array, size):
    """What torchvision's transforms of a PIL image are: Resize, CenterCrop, ToTensor, Normalize."""
    image = Image.fromarray(array)
    width, height = image.size
    short = min(width, height)
    image = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    scaled = np.asarray(image, np.float64) / 255
    return ((scaled - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cross_modal(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def encoder(folder):
    return ImageEncoder.from_pretrained(folder, device="cpu")


# Published checkpoints


@pytest.mark.parametrize("file", ["safetensors", "bin"])
@pytest.mark.parametrize("schema", ["2024", "spring 2024"])
def test_checkpoints_give_the_vectors_of_the_description(tmp_path, schema, file):
    folder = write_cross_modal(tmp_path / "m", schema=schema, file=file)
    encoder = ImageEncoder.from_pretrained(folder, device="cpu")
    assert (encoder.vocabulary.kind, encoder.norm, encoder.k) == ("ascii_from_999", True, 30)
    assert encoder.activation == "elu1p"
    weights = image_weights(folder)
    images = [with_pillow(array, VIT["resolution"]) for array in PICTURES]
    expected = [
        image_row(weights, image, ids=ascii_ids(), size=len(bert_tokens()), k=30, **VIT)
        for image in images
    ]
    encoded = encoder.encode_images(PICTURES)
    assert not encoded.refused
    np.testing.assert_allclose(dense(encoded.rows), np.stack(expected), atol=2e-6)
    assert encoded.rows.counts.tolist() == [30] * len(PICTURES)
    assert (np.linalg.norm(dense(encoded.rows), axis=1) < 1).all(), "norm first, then selection"


def test_k_none_keeps_a_vector_of_norm_one(folder):
    encoder = ImageEncoder.from_pretrained(folder, device="cpu", k=None)
    row = dense(encoder.encode_images(PICTURES[:1]).rows)[0]
    assert np.count_nonzero(row) == encoder.vocabulary.columns
    assert np.linalg.norm(row) == pytest.approx(1, rel=1e-6)


def test_both_sides_of_a_checkpoint_open_together(folder):
    both = CrossModalEncoder.from_pretrained(folder, device="cpu")
    text = SparseEncoder.from_pretrained(folder, device="cpu")
    image = ImageEncoder.from_pretrained(folder, device="cpu")
    texts = ["the cat", "blue book"]
    assert both.encode_queries(texts) == text.encode_queries(texts)
    assert both.encode_documents(texts) == text.encode_documents(texts)
    assert both.bag_of_tokens(texts) == text.bag_of_tokens(texts)
    assert both.token_ids("cats") == text.token_ids("cats")
    assert both.encode_images(PICTURES).rows == image.encode_images(PICTURES).rows
    assert (both.stamp().head, both.stamp().image) == ("vdr", image.stamp())
    assert both.stamp().as_before().head == "vdr+image"
    digests = {one.weights for one in (both.stamp().as_before(), text.stamp(), image.stamp())}
    assert len(digests) == 3
    assert not text.stamp().difference(both.stamp()), "texts are the same"
    assert text.stamp().difference(image.stamp())


def test_the_published_vocabulary_gives_27623_columns(tmp_path, tiny_splade_folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_splade_folder / "tokenizer.json"))
    folder = write_cross_modal(tmp_path / "m", tokenizer=tokenizer, topk=512)
    both = CrossModalEncoder.from_pretrained(folder, device="cpu")
    vocabulary = both.vocabulary
    assert (vocabulary.size, vocabulary.columns) == (30522, 27623)
    image = with_pillow(PICTURES[1], VIT["resolution"])
    expected = image_row(
        image_weights(folder), image, ids=vocabulary.column_to_id, size=30522, k=512, **VIT
    )
    (row,) = dense(both.encode_images(PICTURES[1:2]).rows)
    np.testing.assert_allclose(row, expected, atol=1e-7)


PUBLISHED = {"resolution": 224, "patch_size": 32, "width": 768, "layers": 12, "heads": 12}


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    config = VitConfig()  # the defaults are the published sizes
    tower = ImageTower(VitBody(config), ImageHead(config.hidden_size, 27_623))
    names = upstream_names("encoder_p", config.layers)
    ours = {names[name][0]: tuple(p.shape) for name, p in tower.named_parameters()}
    expected = image_shapes(27_623, **PUBLISHED)
    assert ours == {f"encoder_p.{name}": shape for name, shape in expected.items()}
    assert sum(p.numel() for p in tower.parameters()) == 108_668_928
    assert tower.body.patches == 49


@pytest.mark.parametrize(("topk", "k"), [(-1, None), (5, 5)])
def test_topk_of_the_checkpoint(tmp_path, topk, k):
    folder = write_cross_modal(tmp_path / "m", topk=topk)
    assert ImageEncoder.from_pretrained(folder).k == k


def test_missing_and_foreign_weights_are_named(tmp_path):
    folder = write_cross_modal(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    file = folder / "model.safetensors"
    save_file({**tensors, "encoder_p.class_embedding": torch.zeros(32)}, file)
    with pytest.raises(ConfigError, match=r"hold encoder_p\.class_embedding, which"):
        ImageEncoder.from_pretrained(folder)
    lacking = {name: t for name, t in tensors.items() if name != "encoder_p.ln_post.bias"}
    save_file(lacking, file)
    with pytest.raises(ConfigError, match=r"lacks encoder_p\.ln_post\.bias"):
        ImageEncoder.from_pretrained(folder)
    save_file({**tensors, "encoder_p.proj": torch.zeros(7, 32)}, file)
    with pytest.raises(ConfigError, match=r"encoder_p\.proj \[7, 32\] instead of"):
        ImageEncoder.from_pretrained(folder)
    save_file({n: t for n, t in tensors.items() if n != "encoder_p.conv1.weight"}, file)
    with pytest.raises(ConfigError, match=r"lack encoder_p\.conv1\.weight"):
        ImageEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 0}, "`topk` of encoder_p .* got 0"),
        ({"heads": 5}, "`heads` of the image encoder must divide"),
        ({"resolution": 48}, r"positional_embedding \[9, 32\] instead of \[36, 32\]"),
        ({"resolution": 25}, "`patch_size` of the image encoder must divide"),
        ({"resolution": "big"}, "`image_size` .* integer"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tmp_path, settings, message):
    folder = write_cross_modal(tmp_path / "m", **settings)
    with pytest.raises(ConfigError, match=message):
        ImageEncoder.from_pretrained(folder)


def test_text_models_and_image_models_are_told_apart(tmp_path, folder):
    text = write_bert(tmp_path / "text")
    with pytest.raises(ConfigError, match="must hold an image encoder"):
        ImageEncoder.from_pretrained(text)
    ImageEncoder.from_pretrained(folder).save_pretrained(tmp_path / "image")
    with pytest.raises(ConfigError, match=r"got an image encoder; load it with ImageEncoder"):
        SparseEncoder.from_pretrained(tmp_path / "image")
    with pytest.raises(ConfigError, match="must have the same tokens"):
        CrossModalEncoder(SparseEncoder.from_pretrained(text), ImageEncoder.from_pretrained(folder))


# One image, one vector


def test_a_vector_does_not_depend_on_its_batch(encoder):
    alone = [encoder.encode_images([array]).rows for array in PICTURES]
    for size in (1, 2, 3, 6, 16):
        rows = encoder.encode_images(PICTURES, batch_size=size).rows
        for i, row in enumerate(alone):
            assert rows[i] == row, f"image {i} in batches of {size}"
    order = [3, 0, 5, 1, 1, 4]
    shuffled = encoder.encode_images([PICTURES[i] for i in order]).rows
    for place, i in enumerate(order):
        assert shuffled[place] == alone[i]


def test_backends_agree(folder, encoder):
    other = ImageEncoder.from_pretrained(folder, device="cpu", backend="reference")
    expected = encoder.encode_images(PICTURES).rows
    assert other.encode_images(PICTURES).rows.allclose(expected)


def test_half_precision_is_the_same_model(folder, encoder):
    half = ImageEncoder.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.stamp() == encoder.stamp()
    expected = dense(encoder.encode_images(PICTURES).rows)
    got = dense(half.encode_images(PICTURES).rows)
    assert (got * expected).sum() / (np.linalg.norm(got) * np.linalg.norm(expected)) > 0.99


def test_broken_weights_name_the_picture(tmp_path):
    folder = write_cross_modal(tmp_path / "m")
    encoder = ImageEncoder.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        encoder.tower.head.projection[3] = float("nan")
    with pytest.raises(ConfigError, match=r"the vector of image 'image 1' \(number 1\)"):
        encoder.encode_images([b"broken", PICTURES[0]])


def test_the_tower_tells_patches_and_has_gradients(folder):
    encoder = ImageEncoder.from_pretrained(folder, device="cpu")
    images = torch.from_numpy(
        np.stack([encoder.preprocessing.apply(Image.fromarray(a)) for a in PICTURES[:2]])
    )
    pooled = encoder.tower(images, return_argmax=True)
    weights = image_weights(folder)
    for b in range(2):
        scores = image_scores(weights, images[b].double().numpy(), **VIT)
        np.testing.assert_allclose(pooled.logits[b].detach().numpy(), scores.max(0), atol=2e-5)
        chosen = np.take_along_axis(scores, pooled.argmax[b].numpy()[None].astype(int), 0)[0]
        np.testing.assert_allclose(chosen, scores.max(0), atol=2e-5)
    pooled.logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.tower.parameters())
    with pytest.raises(ShapeError, match=r"\[B, 3, 24, 24\], got \[1, 3, 8, 8\]"):
        encoder.tower(torch.zeros(1, 3, 8, 8))


def test_weights_of_patches(folder, encoder):
    rows = encoder.encode_images(PICTURES).rows
    for i, array in enumerate(PICTURES):
        ids, weights = rows.row(i)
        alone = encoder.patch_weights(array, ids)
        assert alone.shape == (9, len(ids))
        np.testing.assert_allclose(alone.max(0), weights, rtol=1e-5)
    scores = image_scores(image_weights(folder), with_pillow(PICTURES[1], 24), **VIT)
    ids = rows.row(1)[0]
    chosen = scores[:, encoder.vocabulary.id_to_column[ids]]
    expected = np.where(chosen >= 0, chosen + 1, np.exp(chosen))
    best = scores.max(0)
    expected /= np.linalg.norm(np.where(best >= 0, best + 1, np.exp(best)))
    np.testing.assert_allclose(encoder.patch_weights(PICTURES[1], ids), expected, atol=1e-5)
    for bad in ([0], [-1], [10**6]):
        with pytest.raises(InputError, match="computes no weight of the token ids"):
            encoder.patch_weights(PICTURES[0], bad)
    with pytest.raises(InputError, match="no image of a known format"):
        encoder.patch_weights(b"broken", ids)


# Preprocessing


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (480, 640), (33, 91), (1000, 227)])
def test_preprocessing_gives_the_numbers_of_transformers(size):
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = Image.fromarray(pixels(*size))
    expected = processors.CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    got = Preprocessing().apply(image)
    assert got.dtype == np.float32
    assert got.shape == (3, 224, 224)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_resize_crop_and_scale(size):
    array = pixels(*size)
    got = Preprocessing(size=24).apply(Image.fromarray(array))
    np.testing.assert_allclose(got, with_pillow(array, 24), atol=1e-6)


def test_odd_margins_are_cut_as_torchvision_cuts_them():
    # 227 - 224 = 3: torchvision takes round(1.5) = 2 columns from the left
    array = pixels(227, 224)
    middle = array[:, 2:226]
    assert np.array_equal(
        Preprocessing().apply(Image.fromarray(array)),
        Preprocessing().apply(Image.fromarray(middle)),
    )


def test_endless_strips_cost_no_memory():
    strip = Image.fromarray(pixels(60_000, 2))
    assert Preprocessing().apply(strip).shape == (3, 224, 224)
    assert Preprocessing().apply(strip.transpose(Image.Transpose.ROTATE_90)).shape == (3, 224, 224)


def test_other_preprocessings():
    array = pixels(50, 30)
    image = Image.fromarray(array)
    squeezed = Preprocessing(
        size=16, crop=False, resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float64) / 127.5 - 1
    np.testing.assert_allclose(squeezed.apply(image), expected.transpose(2, 0, 1), atol=1e-6)
    larger = Preprocessing(size=16, short_side=20).apply(image)
    whole = Preprocessing(size=20).apply(image)
    np.testing.assert_array_equal(larger, whole[:, 2:18, 2:18])
    assert Preprocessing.from_dict(json.loads(json.dumps(squeezed.to_dict()))) == squeezed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "1 <= size <= short_side"),
        ({"size": 30, "short_side": 20}, "1 <= size <= short_side"),
        ({"resample": "lanczos"}, "`resample` must be one of"),
        ({"std": (1.0, 0.0, 1.0)}, "those of `std` positive"),
    ],
    ids=str,
)
def test_impossible_preprocessings(options, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**options)


# Saving


def test_an_image_encoder_is_saved_and_read_back(tmp_path, folder, encoder):
    place = tmp_path / "saved"
    encoder.save_pretrained(place)
    again = ImageEncoder.from_pretrained(place, device="cpu")
    assert again.encode_images(PICTURES).rows == encoder.encode_images(PICTURES).rows
    assert again.stamp().difference(encoder.stamp()) == []
    assert again.preprocessing == encoder.preprocessing
    encoder.save_pretrained(place)  # replaces
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must be free, empty or an encoder saved before"):
        encoder.save_pretrained(tmp_path / "else")


def test_a_cross_modal_encoder_is_saved_and_read_back(tmp_path, folder):
    both = CrossModalEncoder.from_pretrained(folder, device="cpu", k=20)
    both.save_pretrained(tmp_path / "saved")
    again = CrossModalEncoder.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.encode_images(PICTURES).rows == both.encode_images(PICTURES).rows
    assert again.encode_queries(["the cat"]) == both.encode_queries(["the cat"])
    assert both.stamp().difference(again.stamp()) == []
    text = SparseEncoder.from_pretrained(tmp_path / "saved", device="cpu")
    assert text.encode_queries(["the cat"]) == both.encode_queries(["the cat"])
    image = ImageEncoder.from_pretrained(tmp_path / "saved", device="cpu")
    assert image.encode_images(PICTURES).rows == both.encode_images(PICTURES).rows
    both.save_pretrained(tmp_path / "saved")  # replaces
    assert CrossModalEncoder.from_pretrained(folder, image_k=3).image.k == 3


def test_damaged_folders_are_refused(tmp_path, encoder):
    encoder.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "vdr_db_image.json"
    saved = json.loads(file.read_text())
    for change, message in (
        ({"format": 9}, "must have format 1, got 9"),
        ({"body": {"kind": "cnn", "settings": {}}}, "'hybrid' or 'transformers', got 'cnn'"),
        ({"body": {"kind": "vit", "settings": {}}}, "the settings of a ViT must be"),
        ({"body": {"kind": "transformers", "settings": {"class": "os"}}}, "a model class of"),
        ({"body": {}}, "must hold the settings"),
        ({"preprocessing": {"blur": 1}}, "no setting blur"),
        ({"activation": "tanh"}, "`activation` must be one of"),
    ):
        file.write_text(json.dumps({**saved, **change}))
        with pytest.raises(ConfigError, match=message):
            ImageEncoder.from_pretrained(tmp_path / "m")


# Other bodies


def vision_model(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 24,
        "patch_size": 8,
    }
    kind = getattr(transformers, name)
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    return kind(kind.config_class(**sizes), **options).eval()


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel", "DeiTModel", "Dinov2Model"])
def test_vision_models_of_transformers_become_encoders(tmp_path, name):
    model = vision_model(name)
    encoder = ImageEncoder.from_vision_model(
        model, bert_tokenizer(), vocabulary="ascii_from_999", k=30
    )
    encoded = encoder.encode_images(PICTURES)
    head = encoder.tower.head
    with torch.no_grad():
        for i, array in enumerate(PICTURES):
            image = torch.from_numpy(encoder.preprocessing.apply(Image.fromarray(array)))[None]
            states = model(pixel_values=image).last_hidden_state[0, -9:].double().numpy()
            scores = norm(states, 1.0, 0.0) @ head.projection.double().numpy().T
            best = scores.max(0)
            full = np.where(best >= 0, best + 1, np.exp(best))
            full /= np.linalg.norm(full)
            kept = np.sort(full)[-30:]
            np.testing.assert_allclose(np.sort(encoded.rows.row(i)[1]), kept, atol=1e-5)
    encoder.save_pretrained(tmp_path / "m")
    again = ImageEncoder.from_pretrained(tmp_path / "m", device="cpu")
    assert again.encode_images(PICTURES).rows.allclose(encoded.rows, atol=1e-6)
    assert again.stamp().weights == encoder.stamp().weights


def test_the_projection_of_a_new_encoder(tmp_path):
    model = vision_model("ViTModel")
    words = torch.randn(len(ascii_ids()), 32)
    encoder = ImageEncoder.from_vision_model(
        model, bert_tokenizer(), vocabulary="ascii_from_999", projection=words
    )
    assert torch.equal(encoder.tower.head.projection, words)
    first, second = (
        ImageEncoder.from_vision_model(model, bert_tokenizer()).tower.head.projection
        for _ in range(2)
    )
    assert torch.equal(first, second), "the same random numbers in every run"
    with pytest.raises(ConfigError, match="`projection` must be"):
        ImageEncoder.from_vision_model(model, bert_tokenizer(), projection=words[:3])
    with pytest.raises(ConfigError, match="must have integers `image_size`"):
        ImageEncoder.from_vision_model(torch.nn.Linear(3, 3), bert_tokenizer())
