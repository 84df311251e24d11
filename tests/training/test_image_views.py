"""Images of a run: altered copies, and states of the stem kept on disk."""

import numpy as np
import pytest
import torch
from PIL import Image
from shape_pictures import write_shapes

from vdr_db.errors import ConfigError, InputError
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.towers.image_hybrid import HybridBody, HybridConfig
from vdr_db.training.images.data import Pair, read_pairs
from vdr_db.training.images.views import SHARD, PairImages, StemStates, alter

SIDE = 64


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return read_pairs(write_shapes(tmp_path_factory.mktemp("images"), "train", each=1))


@pytest.fixture(scope="module")
def body():
    """A hybrid with small random weights."""
    made = HybridBody(HybridConfig(image_size=SIDE, hidden_size=32))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in made.state_dict().items():
        size = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
        state[name] = torch.randn(tensor.shape, generator=generator) * size**-0.5
    made.load_state_dict(state, assign=True)
    return made.eval()


def states(pairs, body, folder, **options):
    preprocessing = Preprocessing(size=SIDE, crop=False)
    return StemStates(pairs, preprocessing, seed=1, body=body, folder=folder, **options)


def test_kept_states_are_those_of_the_stem(pairs, body, tmp_path):
    found = states(pairs, body, tmp_path, views=1)
    pixels = PairImages(pairs, found.preprocessing, seed=1)
    numbers, views = [3, 0, 15], [0, 1, 1]
    with torch.no_grad():
        expected = body.features(pixels.take(numbers, views))
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(found.take(numbers, views), expected, rtol=2e-3, atol=2e-3)


def test_states_are_computed_once(pairs, body, tmp_path):
    assert len(pairs) < SHARD
    done = []
    states(pairs, body, tmp_path, views=1, progress=lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    written = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(written) == 2
    states(pairs, body, tmp_path, views=1)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
    states(pairs[1:], body, tmp_path)  # other images, another file
    assert len(list(tmp_path.iterdir())) == 3
    with torch.no_grad():
        body.stem.last.bias.add_(0.01)
    states(pairs, body, tmp_path)  # another stem, another file
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_written_is_said(pairs, body, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"set `image\.cache` to a folder with room"):
        states(pairs, body, tmp_path / "file" / "below")


def test_altered_copies_are_drawn_by_name_seed_and_view(pairs):
    preprocessing = Preprocessing(size=SIDE, crop=False)
    one, other = (PairImages(pairs, preprocessing, seed=1) for _ in range(2))
    shifted = PairImages(pairs[2:], preprocessing, seed=1)
    assert np.array_equal(one.pixels(2, 1), other.pixels(2, 1))
    assert np.array_equal(one.pixels(2, 1), shifted.pixels(0, 1))
    assert not np.array_equal(one.pixels(2, 1), one.pixels(2, 2))
    assert not np.array_equal(
        one.pixels(2, 1), PairImages(pairs, preprocessing, seed=2).pixels(2, 1)
    )


def test_what_is_transparent_gets_another_background():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (10, 10, 22, 22))
    corners, centres = set(), []
    for seed in range(12):
        made = alter(image, np.random.default_rng(seed))
        assert (made.mode, made.size) == ("RGB", (32, 32))
        corners.add(made.getpixel((0, 0)))
        centres.append(made.getpixel((16, 16)))
    assert len(corners) > 4
    assert all(red > 90 and red > 2 * max(green, blue) for red, green, blue in centres)


def test_an_image_that_cannot_be_read_names_its_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    images = PairImages(
        [Pair(tmp_path / "a.png", ("a",), "pairs.jsonl:7")], Preprocessing(), seed=0
    )
    with pytest.raises(InputError, match=r"^pairs\.jsonl:7: "):
        images.take([0], [0])
