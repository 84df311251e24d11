"""The convolutional stem against batch norms that are not folded, and the hybrid on top of it."""

import json
from dataclasses import replace

import model_folders
import pytest
import torch
import torch.nn.functional as F
from shape_pictures import COLOURS, SHAPES, write_shapes
from stem_weights import BLOCKS, published_weights

from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.encoders.image import ImageEncoder
from vdr_db.errors import ConfigError
from vdr_db.towers.image_hybrid import HybridBody, HybridConfig
from vdr_db.towers.image_stem import fold_norms, read_published
from vdr_db.training.config import build_config
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.images.models import (
    channel_statistics,
    load_pair,
    save_pair,
    standardise,
)
from vdr_db.training.images.vectors import ImageSide


def forward_with_norms(weights, x):
    """The published network in float64, batch norms apart, TensorFlow's padding written out."""

    def convolve(x, convolution, norm, stride=1, groups=1):
        weight = weights[f"{convolution}.weight"].double()
        kernel, side = weight.shape[2], x.shape[2]
        rest = max(0, (-(-side // stride) - 1) * stride + kernel - side)
        x = F.pad(x, (rest // 2, rest - rest // 2, rest // 2, rest - rest // 2))
        y = F.conv2d(x, weight, None, stride, 0, 1, groups)
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(weights[f"{norm}.{p}"].double() for p in parts), eps=1e-3)

    x = F.relu6(convolve(x.double(), "_conv_stem", "_bn0", 2))
    for i, (_, stride, expansion, inputs, outputs) in enumerate(BLOCKS):
        y, name = x, f"_blocks.{i}."
        if expansion > 1:
            y = F.relu6(convolve(y, f"{name}_expand_conv", f"{name}_bn0"))
        groups = y.shape[1]
        y = F.relu6(convolve(y, f"{name}_depthwise_conv", f"{name}_bn1", stride, groups))
        y = convolve(y, f"{name}_project_conv", f"{name}_bn2")
        x = x + y if stride == 1 and inputs == outputs else y
    x = F.relu6(convolve(x, "_conv_head", "_bn1"))
    return x.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def stem_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("stem") / "stem.pth"
    torch.save(published_weights(), file)
    return file


@pytest.mark.parametrize("side", [64, 80])
def test_folded_norms_change_nothing(stem_file, side):
    """80 pixels meet odd maps, where the padding is uneven; random blocks amplify rounding."""
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = forward_with_norms(published_weights(), pixels)
    with torch.no_grad():
        found = read_published(stem_file)(pixels)
    assert found.shape == (2, (-(-side // 32)) ** 2, 1280)
    assert expected.std() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read as weights of a stem"):
        read_published(tmp_path / "a.pth")
    torch.save([1], tmp_path / "b.pth")
    with pytest.raises(ConfigError, match="must hold weights by name, got list"):
        read_published(tmp_path / "b.pth")
    with pytest.raises(ConfigError, match=r"lack '_conv_stem\.weight'"):
        fold_norms({"conv1.weight": torch.zeros(1)})


def test_a_hybrid_has_the_stride_of_its_stem():
    with pytest.raises(ConfigError, match="`patch_size` of a hybrid must be 32"):
        HybridBody(HybridConfig(patch_size=16))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, stem_file):
    """An untrained pair whose pictures are projected by the text side's matrix."""
    folder = tmp_path_factory.mktemp("pair")
    model_folders.write_bert(folder / "bert")
    write_shapes(folder, "train", each=1)
    image = {"stem": str(stem_file), "size": 64, "hidden_size": 32, "layers": 1, "k": 30}
    config = build_config(
        {
            "model": {"start": str(folder / "bert"), "activation": "elu1p", "k": 30, "query_k": 20},
            "image": image,
            "data": {"train": [{"path": str(folder / "train.jsonl")}]},
        }
    )
    pictures = [folder / f"train/{c}-{s}-0.png" for c in COLOURS for s in SHAPES]
    return load_pair(config, config.image, torch.device("cpu")), pictures


def test_kept_states_of_the_stem_give_the_same_vectors(pair):
    body = pair[0].image.tower.body
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(body.contextualise(body.features(pixels)), body(pixels))
        single = torch.cat([body(one[None]) for one in pixels])
        torch.testing.assert_close(single, body(pixels), rtol=0, atol=1e-3)


def test_a_shared_matrix_is_saved_once(pair, tmp_path):
    encoder, pictures = pair
    assert encoder.is_tied
    save_pair(encoder, tmp_path / "m", torch.float32)
    rows = encoder.encode_images(pictures).rows
    both = CrossModalEncoder.from_pretrained(tmp_path / "m", device="cpu")
    assert both.is_tied
    assert both.encode_images(pictures).rows == rows
    assert both.encode_queries(["blue sun"]) == encoder.encode_queries(["blue sun"])
    alone = ImageEncoder.from_pretrained(tmp_path / "m" / "image", device="cpu")
    assert alone.encode_images(pictures).rows == rows
    # Alone, the image side needs its matrix for itself.
    both.image.save_pretrained(tmp_path / "alone")
    again = ImageEncoder.from_pretrained(tmp_path / "alone", device="cpu")
    assert again.encode_images(pictures).rows == rows
    saved = json.loads((tmp_path / "m/image/vdr_db_image.json").read_text())
    assert saved["projection"] == "text"
    (tmp_path / "m" / "text").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="takes its projection from a text encoder"):
        ImageEncoder.from_pretrained(tmp_path / "m" / "image", device="cpu")


def test_half_precision_halves_the_folder(pair, tmp_path):
    encoder, pictures = pair
    save_pair(encoder, tmp_path / "half", torch.float16)
    save_pair(encoder, tmp_path / "full", torch.float32)
    sizes = [(tmp_path / n / "image/model.safetensors").stat().st_size for n in ("half", "full")]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.02)
    found = CrossModalEncoder.from_pretrained(tmp_path / "half", device="cpu")
    one, other = found.encode_images(pictures).rows, encoder.encode_images(pictures).rows
    assert float((one.dot(other).diagonal() / other.dot(other).diagonal()).min()) > 0.9


def test_a_new_body_sees_standardised_channels(pair):
    body = HybridBody(HybridConfig(image_size=64, hidden_size=8, heads=2))
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(8, 1280, generator=generator)
    body.narrow.weight = torch.nn.Parameter(first.clone())
    body.narrow.bias = torch.nn.Parameter(torch.zeros(8))
    states = torch.rand(50, 4, 1280, generator=generator) * torch.rand(1280, generator=generator)
    mean, deviation = channel_statistics(states)
    standardise(body, mean, deviation)
    expected = ((states - mean) / deviation) @ first.T
    with torch.no_grad():
        torch.testing.assert_close(body.narrow(states), expected, rtol=1e-3, atol=1e-2)


def test_a_picture_may_be_one_patch(pair):
    body = pair[0].image.tower.body
    features = torch.rand(3, 4, 1280, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = body.contextualise(features.mean(dim=1, keepdim=True))
        assert whole.shape == (3, 1, body.hidden_size)
        body.position.data.zero_()
        alike = features.mean(dim=1, keepdim=True).expand(-1, 4, -1)
        expected = body.contextualise(features.mean(dim=1, keepdim=True))
        torch.testing.assert_close(body.contextualise(alike)[:, :1], expected, rtol=0, atol=1e-4)


def test_contrast_moves_patches_towards_their_mean(pair):
    states = torch.rand(2, 4, 1280, generator=torch.Generator().manual_seed(6))
    mean = states.mean(dim=1, keepdim=True)
    body = pair[0].image.tower.body
    plain = body.config
    try:
        with torch.no_grad():
            body.config = replace(plain, contrast=0.25)
            found = body.contextualise(states)
            body.config = replace(plain, contrast=0.0)
            same = body.contextualise(states)
            body.config = plain
            expected = body.contextualise(0.25 * states + 0.75 * mean)
            alike = body.contextualise(mean.expand(-1, 4, -1))
    finally:
        body.config = plain
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, alike, rtol=1e-4, atol=1e-4)
    assert float((found - same).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match=r"`contrast` must be in \[0, 1\], got 1\.5"):
        HybridConfig(contrast=1.5)


def test_dropped_channels_are_dropped_in_all_patches(pair):
    encoder = pair[0]
    centre = torch.full((1280,), 0.5)
    side = ImageSide(encoder, ImageConfig(dropout=0.5), centre=centre)
    seen = []
    body = encoder.image.tower.body
    states = torch.rand(2, 4, 1280, generator=torch.Generator().manual_seed(5))
    encoder.image.tower.train()
    try:
        hook = body.narrow.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            side.states(states)
        hook.remove()
    finally:
        encoder.image.tower.eval()
    given = seen[0][:8].view(2, 4, 1280)
    is_dropped = given == 0.5
    assert 0.4 < float(is_dropped.float().mean()) < 0.6
    assert torch.equal(is_dropped.all(dim=1), is_dropped.any(dim=1))


def test_dropped_patches_leave_the_mean_of_the_others(pair):
    encoder = pair[0]
    side = ImageSide(encoder, ImageConfig(patch_dropout=0.7, as_one_patch=True))
    seen = []
    tower = encoder.image.tower
    # a digit for each patch: a mean says which ones it is of
    states = torch.zeros(64, 4, 1280)
    states[:, range(4), range(4)] = 1
    hook = tower.body.narrow.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            side.states(states)
            tower.train()
            side.states(states)
    finally:
        hook.remove()
        tower.eval()
    whole, given = (each[:64, :4] for each in seen)
    assert torch.equal(whole, torch.full((64, 4), 0.25))
    counts = (given > 0).sum(dim=1)
    torch.testing.assert_close(given.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(given, (given > 0) / counts[:, None])
    assert int(counts.min()) == 1  # a picture all of whose patches were dropped keeps one
    assert 0.2 < float((given > 0).float().mean()) < 0.5
